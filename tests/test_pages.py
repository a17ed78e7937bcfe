"""The tests of tools/pages.py, and of the pages: no number is stale, no link or name is dead."""
import functools
import importlib
import json
import operator
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import UserError
from tools import pages

ROOT = Path(__file__).resolve().parent.parent
SUMMARY = {"command": "python r1mini.py study demo", "commit": "abc1234+", "machine": "a laptop",
           "seeds": [0, 1], "metrics": {
               "base.pass@1": {"mean": 0.25, "std": 0.0707, "per_seed": {"0": 0.2, "1": 0.3}},
               "zero.pass@1": {"mean": 0.9, "std": 0.1414, "per_seed": {"0": 0.8, "1": 1.0}},
               "zero.length": {"mean": 81.25, "std": 1.5, "per_seed": {"0": 80.0, "1": 82.5}},
               "zero.tokens": {"mean": 1234567.0, "std": 1, "per_seed": {"0": 1, "1": 2}},
               "difference": {"mean": 0.65, "std": 0.07, "per_seed": {"0": 0.6, "1": 0.7},
                              "low": 0.015, "high": 1.285, "n": 2},
               "gap": {"mean": 2.7e-6, "std": 0, "per_seed": {"0": 2.7e-6}},
               "wait's neutral": {"mean": 0.5, "std": 0, "per_seed": {"0": 0.5}}}}
CURVES = {"grpo-seed0": {"pass@1": [["zero", 0, 0.1], ["zero", 5, 0.5]]},
          "grpo-seed1": {"pass@1": [["zero", 5, 0.7]]}, "other-seed0": {"pass@1": [["zero", 5, 9]]}}
EXPERIMENT = {"command": "python r1mini.py zero", "edits": [], "seconds": 90, "core_seconds": 150,
              "load_before": 0.5, "machine": "a laptop", "tokens": 1234,
              "dev": {"pass@1": [[0, 0.1], [2, 0.5]]}, "steps": {"kl": [0.01, 20.0]}}


@pytest.fixture
def repository(tmp_path):
    """A repository with one study, one experiment and one page."""
    for path, content in {"results/demo/summary.json": SUMMARY, "results/demo/curves.json": CURVES,
                          "workshop/curves/quick.json": EXPERIMENT}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(json.dumps(content), "utf-8")
    (tmp_path / "README.md").write_text("right: 0.900<!--demo:zero.pass@1-->\n", "utf-8")
    return tmp_path


# --------------------------------------------------------------------------------------------------
# Marks and blocks


@pytest.mark.parametrize("mark, wanted", [
    ("demo:zero.pass@1", "0.900"), ("demo:zero.pass@1 %", "90%"), ("demo:zero.pass@1 .1", "0.9"),
    ("demo:zero.pass@1 .1 %", "90.0%"), ("demo:zero.pass@1 std", "0.900 ± 0.141"),
    ("demo:zero.pass@1 % std", "90% ± 14%"), ("demo:zero.length std", "81.2 ± 1.5"),
    ("demo:zero.pass@1 seeds", "0.800 / 1.000"), ("demo:zero.pass@1 seed=1", "1.000"),
    ("demo:zero.tokens", "1,234,567"), ("demo:gap e", "2.7e-06"),
    ("demo:wait's_neutral", "0.500"), ("demo:zero.pass@1 - base.pass@1 points", "+65.0"),
    ("demo:zero.pass@1 - base.pass@1 std", "0.650 ± 0.071"),
    ("demo:zero.pass@1 / base.pass@1 seeds .1", "4.0 / 3.3"),
    ("demo:difference interval", "0.650 (0.015 to 1.285)"),
    ("demo:difference interval points", "+65.0 (+1.5 to +128.5)"),
    ("demo:zero.pass@1 - base.pass@1 interval .2", "0.65 (0.01 to 1.29)"),  # 0.05 * 12.706 apart
    ("demo:zero.pass@1 - gap interval", "0.800"),  # one seed has no interval
    ("demo:zero.pass@1 above base.pass@1", "2 of 2"),
    ("demo:base.pass@1 above zero.pass@1", "0 of 2"),
    ("demo:commit", "`abc1234+`"), ("demo:machine", "`a laptop`"), ("demo:seeds", "`0, 1`"),
    ("demo:curve.grpo.zero.5.pass@1", "0.600"), ("quick:minutes .1", "1.5"),
    ("quick:pass@1", "0.500"), ("quick:kl", "20.0")])
def test_fill_writes_a_mark_in_each_form(repository, mark, wanted):
    """Worked by hand. What stood there before is replaced, and filling twice changes nothing."""
    for before in ("", wanted, "12.5", "0.1 ± 0.2", "1 / 2 / 3", "4 of 5", "`old`", "-3%", "1,000",
                   "-1.0 (-2.0 to +3%)"):
        text = f"It is {before}<!--{mark}-->."
        filled = pages._fill_page(text, "README.md", repository)
        assert filled == f"It is {wanted}<!--{mark}-->."
        assert pages._fill_page(filled, "README.md", repository) == filled


def test_fill_knows_the_source_of_a_results_page(repository):
    """On results/demo/README.md the source is demo; elsewhere this is an error."""
    text = "<!--:zero.length .0-->"
    assert pages._fill_page(text, "results/demo/README.md", repository) == "81" + text
    with pytest.raises(UserError, match="docs/x.md: .* needs a source"):
        pages._fill_page(text, "docs/x.md", repository)


def test_fill_prefers_a_study_to_an_experiment_of_its_name(repository):
    (repository / "workshop/curves/demo.json").write_text(json.dumps(EXPERIMENT), "utf-8")
    for page, wanted in (("README.md", "0.250"), ("results/demo/README.md", "0.250"),
                         ("workshop/answers.md", "0.500")):
        key = "pass@1" if page.startswith("workshop") else "base.pass@1"
        assert pages._fill_page(f"<!--demo:{key}-->", page, repository).startswith(wanted), page


def test_fill_writes_a_table_from_its_columns_and_rows(repository):
    """A cell without a measurement is a dash; a row of plain text stays as it is."""
    spec = ("<!-- table demo std\nheld-out | base=base | Zero=zero (%)\n"
            "pass@1 | *.pass@1\ntokens | *.length (.0)\npaper | 15.6 | 77.9\n-->\n")
    text = pages._fill_page(spec + "old\n<!-- end -->\n", "README.md", repository)
    assert text == spec + ("\n| held-out | base | Zero |\n|---|---|---|\n"
                           "| pass@1 | 0.250 ± 0.071 | 90% |\n| tokens | — | 8125% |\n"
                           "| paper | 15.6 | 77.9 |\n\n<!-- end -->\n")
    assert pages._fill_page(text, "README.md", repository) == text


def test_fill_writes_what_was_run(repository):
    """Machine, commit and seeds. A comment that it does not know stays."""
    text = pages._fill_page("<!-- run -->\n<!-- end -->\n<!-- change x -->\n",
                            "results/demo/README.md", repository)
    for wanted in ("Machine: a laptop. Commit: `abc1234` (with changes that were", "Seeds: 0, 1.",
                   "<!-- change x -->"):
        assert wanted in text


@pytest.mark.parametrize("text, said", [
    ("<!--demo:zero.pass-->", r"'zero.pass' in results/demo/summary.json; .* 'zero.pass@1'"),
    ("<!--none:zero.pass@1-->", "there is no results/none/summary.json"),
    ("<!--demo:zero.pass@1 percent-->", "'percent' is no form"),
    ("<!--demo:zero.pass@1 interval-->", "only a difference has an interval"),
    ("<!--demo:zero.pass@1 seed=7-->", "'seed=7' is no form"),
    ("<!--demo:zero.pass@1 1-->", "'1' is no form"),
    ("<!--demo:zero.pass@1 - -->", "needs a second key"),
    ("<!--demo:curve.grpo.zero.6.pass@1-->", r"'curve.grpo.zero.6.pass@1' in results/demo/curves"),
    ("<!--quick:nothing-->", "'nothing' in workshop/curves/quick.json"),
    ("<!-- table demo\na | b=zero\nrow | *.nothing\n-->\n<!-- end -->", r"no '\*.nothing'"),
    ("<!-- table demo\na | b=zero | c=none\nrow | *.length\n-->\n<!-- end -->", "column 'c'"),
    ("<!-- table demo\n-->\n<!-- end -->", "a table needs a source, columns and rows"),
    ("<!-- run demo -->\n<!-- run demo -->\n<!-- end -->", "has no <!-- end -->")])
def test_fill_tells_a_wrong_mark_with_page_and_key(repository, text, said):
    """Instead of a number that nobody measured."""
    with pytest.raises(UserError, match=said) as error:
        pages._fill_page(text, "docs/page.md", repository)
    assert str(error.value).startswith("docs/page.md: ") and "\n" not in str(error.value)


def test_write_pages_finds_a_changed_number(repository):
    """_stale_pages() names the page, write_pages() corrects it."""
    assert pages._stale_pages(repository) == []
    changed = json.loads(json.dumps(SUMMARY).replace('"mean": 0.9', '"mean": 0.95'))
    (repository / "results/demo/summary.json").write_text(json.dumps(changed), "utf-8")
    assert pages._stale_pages(repository) == ["README.md"] == pages.write_pages(repository)
    assert (repository / "README.md").read_text("utf-8").startswith("right: 0.950<!--")
    assert pages._stale_pages(repository) == []


# --------------------------------------------------------------------------------------------------
# The pages themselves


@pytest.mark.parametrize("page", pages._page_paths())
def test_pages_are_not_stale(page):
    """If one is: python r1mini.py report --pages."""
    text = (ROOT / page).read_text("utf-8")
    assert pages._fill_page(text, page) == text


@pytest.mark.parametrize("page", pages._page_paths())
def test_pages_links_lead_somewhere(page):
    """Links to files and headings of this repository. Pictures once the first one is drawn."""
    text = (ROOT / page).read_text("utf-8")
    for picture, link in re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", text):
        path, _, heading = link.partition("#")
        if "://" in link or picture and not (ROOT / "docs" / "picture.png").exists():
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-")
                               for t in titles], link


def test_results_pages_are_in_the_index():
    """The page has machine and commit; results/README.md links to it."""
    index = (ROOT / "results" / "README.md").read_text("utf-8")
    for summary in (ROOT / "results").glob("*/summary.json"):
        name = summary.parent.name
        if name == "schedules":  # a section of choices
            continue
        page = (summary.parent / "README.md").read_text("utf-8")
        assert f"({name}/README.md" in index and "<!-- run -->" in page, name
        for heading in ("**Question.**", "**Paper.**", "**Here.**", "**Finding.**"):
            assert heading in page, (name, heading)


def test_readme_is_read_in_five_minutes():
    """The README has at most 1,450 words, tables included."""
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL).split()) <= 1450


@functools.cache
def cost(preset):
    """What the command prints."""
    return subprocess.run([sys.executable, "r1mini.py", "cost", "--preset", preset], cwd=ROOT,
                          capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("preset, page, wanted", [
    ("nano", "README.md", "{millions:.1f} million parameters, {active:.2f} million of them active"),
    ("nano", "docs/claims.md", "{cache} numbers a token instead of {heads}"),
    ("v3", "docs/claims.md", "counts {parameters} and")])
def test_pages_sizes_are_those_of_cost(preset, page, wanted):
    """The numbers of parameters, and of the cache."""
    said = cost(preset)
    parameters, active = re.search(r"([\d,]+) parameters in all, ([\d,]+) active", said).groups()
    cache, heads = re.search(r"cache: ([\d,]+) numbers .* would keep ([\d,]+)", said).groups()
    wanted = wanted.format(parameters=parameters, cache=cache, heads=heads,
                           millions=int(parameters.replace(",", "")) / 1e6,
                           active=int(active.replace(",", "")) / 1e6)
    assert wanted in (ROOT / page).read_text("utf-8")


def test_paper_map_names_exist():
    """docs/paper-map.md: each name behind a `file.py` is in that file."""
    text = (ROOT / "docs" / "paper-map.md").read_text("utf-8")
    named = re.findall(r"`([\w/]+)\.py`, (`[\w.]+`(?:, `[\w.]+`)*)", text)
    assert len(named) > 20
    for file, names in named:
        module = importlib.import_module(file.replace("/", "."))
        for name in re.findall(r"`([\w.]+)`", names):
            assert operator.attrgetter(name)(module), (file, name)
