"""The numbers on the pages: README.md, docs/, results/ and workshop/ quote what runs have measured.

    python r1mini.py report --pages

writes them anew. Nobody copies a number by hand. A number stands before a comment (a mark) that
names its source, so that the page stays readable as plain Markdown:

    Zero is right on 93%<!--r1:zero.pass@1 %--> of the problems.

A mark is SOURCE:KEY FORM. SOURCE is a folder of results/ (KEY is a metric of its summary.json) or
an experiment of the workshop (KEY is one of its curves, or `minutes`). If both have the name, the
experiment is meant on the pages of workshop/, and the study elsewhere. On the page
results/NAME/README.md, SOURCE may be left out: `<!--:zero.pass@1-->`. In KEY, "_" may stand for a
space. The mean over seeds is written, and FORM says how:

    (nothing)   0.931                   %        93%, in hundredths
    std         0.931 ± 0.003           points   +78.1, in percentage points
    seeds       0.930 / 0.930 / 0.935   .2       0.93, two decimals
    seed=1      0.930                   e        2.7e-06
    interval    0.781 (0.770 to 0.792), a difference and its 95% interval (tools/compare.py)

Two keys are compared seed by seed: `A - B`, `A / B`, and `A above B`, which is written "3 of 3".
An interval is of `A - B`, or of a difference in summary.json.
`commit`, `machine`, `seeds` and `command` are words, written as code.
`curve.ARM.STAGE.STEP.METRIC` is a point of curves.json, the mean over seeds.

Whole blocks are written between a comment and `<!-- end -->`. In a table, `*` in a row's key stands
for the value of a column. A cell without a measurement is a dash.

    <!-- table r1 std
    held-out | base=base | Zero=zero
    right at the first try | *.pass@1
    tokens | *.length (.0)
    -->

`run NAME` gives machine, commit and seeds. Other comments are left alone.
"""
import difflib
import json
import re
from pathlib import Path

from engine.errors import UserError
from tools.compare import paired_difference, summarise

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/*.md", "results/README.md", "results/*/README.md", "workshop/*.md")
WORDS = ("commit", "machine", "seeds", "command")  # of summary.json, beside the metrics
FORMS = ("%", "points", "std", "seeds", "e", "interval")   # beside .N and seed=N
DASH = "—"                                                 # a cell without a measurement

NUMBER = r"[-+]?\d(?:[\d,.]*\d)?(?:e[-+]?\d+)?%?"
VALUE = rf"(?:{NUMBER}(?: (?:±|/|of) {NUMBER})*(?: \({NUMBER} to {NUMBER}\))?|`[^`\n]*`)"
MARK = re.compile(rf"(?:{VALUE})?<!--([\w-]*):(?!\s)([^\n]*?)-->")  # the number, SOURCE, KEY FORM
BLOCK = re.compile(r"(<!-- (table|run)\b(.*?)-->\n)(.*?)(<!-- end -->)", re.DOTALL)


# --------------------------------------------------------------------------------------------------
# Where numbers come from


class Sources:
    """The measurements that the pages quote. Each file is read once."""

    def __init__(self, root, page):
        self.root, self.page, self.files = Path(root), page, {}
        parts = Path(page).parts
        self.own = parts[1] if len(parts) == 3 and parts[0] == "results" else ""

    def error(self, message):
        """A UserError that begins with the page's name."""
        return UserError(f"{self.page}: {message}")

    def read(self, path):
        """The contents of a JSON file, or None if there is no such file."""
        if path not in self.files:
            file = self.root / path
            self.files[path] = json.loads(file.read_text("utf-8")) if file.exists() else None
        return self.files[path]

    def study(self, name):
        """The summary.json of results/NAME."""
        summary = self.read(f"results/{name}/summary.json")
        if summary is None:
            raise self.error(f"there is no results/{name}/summary.json")
        return summary

    def experiment(self, name):
        """The curves of an experiment of the workshop, or None if there is no such experiment. If a
        study has the same name, it is the experiment on the pages of the workshop only."""
        in_workshop = Path(self.page).parts[0] == "workshop"
        if not in_workshop and (self.root / f"results/{name}/summary.json").exists():
            return None
        return self.read(f"workshop/curves/{name}.json")

    def measured(self, name, key):
        """The {"mean", "std", "per_seed"} of a metric. An experiment has one seed."""
        if (record := self.experiment(name)) is not None:
            return summarise({"0": self.of_experiment(name, record, key)})
        if key.startswith("curve."):
            return summarise(self.of_curve(name, key))
        metrics = self.study(name)["metrics"]
        found = metrics.get(key) or next(
            (metrics[known] for known in metrics if _plain_key(known) == _plain_key(key)), None)
        if found is None:
            raise self.error(f"there is no {key!r} in results/{name}/summary.json"
                             + _nearest_key(key, metrics))
        return found

    def of_experiment(self, name, record, key):
        """An experiment's minutes, or the last value of one of its curves."""
        if key == "minutes":
            return record["seconds"] / 60
        values = _curve_points(record, key)
        if not values:
            raise self.error(f"there is no {key!r} in workshop/curves/{name}.json"
                             + _nearest_key(key, [*record["dev"], *record["steps"]]))
        return list(values.values())[-1]

    def of_curve(self, name, key):
        """{seed: value} at one step of a training curve, from curves.json."""
        parts = key.split(".", 4)
        curves = self.read(f"results/{name}/curves.json") or {}
        if len(parts) == 5:
            _, arm, stage, step, metric = parts
            found = {run.rpartition("-seed")[2]: value for run, of_run in curves.items()
                     if run.rpartition("-seed")[0] == arm
                     for at_stage, at_step, value in of_run.get(metric, ())
                     if (at_stage, str(at_step)) == (stage, step)}
            if found:
                return found
        raise self.error(f"there is no {key!r} in results/{name}/curves.json; "
                         "wanted curve.ARM.STAGE.STEP.METRIC")

    def has(self, name, key):
        """Whether a metric was measured."""
        try:
            return bool(self.measured(name, key))
        except UserError:
            return False


def _plain_key(key):
    """A key in which "_" and a space are the same."""
    return key.replace("_", " ")


def _nearest_key(key, known):
    """The end of a message: the key that was probably meant."""
    found = difflib.get_close_matches(key, list(known), 1)
    return f"; the nearest is {found[0]!r}" if found else ""


def _curve_points(record, key):
    """{step: value} of a curve of the workshop, measured on dev or at every step."""
    if key in record["dev"]:
        return dict(map(tuple, record["dev"][key]))
    return dict(enumerate(record["steps"].get(key, ()), 1))


# --------------------------------------------------------------------------------------------------
# How a number is written


def _number_text(x, forms):
    """One number as text."""
    if "points" in forms:
        return f"{100 * x:+.1f}"
    if "e" in forms:
        return f"{x:.1e}"
    decimals = [int(form[1:]) for form in forms if re.fullmatch(r"\.\d", form)]
    if "%" in forms:
        return f"{100 * x:.{decimals[0] if decimals else 0}f}%"
    if decimals:
        return f"{x:,.{decimals[0]}f}"
    if abs(x) >= 1000:
        return f"{x:,.0f}"
    return f"{x:.1f}" if abs(x) >= 10 else f"{x:.3f}"


def _metric_text(metric, forms):
    """A metric as text: its mean, its mean ± std, the value of each seed, or of one."""
    if "seeds" in forms:
        return " / ".join(_number_text(x, forms) for x in metric["per_seed"].values())
    for form in forms:
        if form.startswith("seed="):
            return _number_text(metric["per_seed"][form[5:]], forms)
    text = _number_text(metric["mean"], forms)
    if "interval" in forms and metric.get("low") is not None:
        low, high = (_number_text(metric[end], forms) for end in ("low", "high"))
        return f"{text} ({low} to {high})"
    if "std" not in forms or len(metric["per_seed"]) < 2:
        return text
    if metric["mean"] >= 10 and not any(form.startswith(".") for form in forms):
        forms = [*forms, ".1"]  # the spread with as many decimals as the mean
    return f"{text} ± {_number_text(metric['std'], forms)}"


def _compare(metric, other, operator):
    """Two metrics, seed by seed: their difference or ratio; or the text "3 of 3" of `above`."""
    seeds = [seed for seed in metric["per_seed"] if seed in other["per_seed"]]
    pairs = {seed: (metric["per_seed"][seed], other["per_seed"][seed]) for seed in seeds}
    if operator == "above":
        return f"{sum(a > b for a, b in pairs.values())} of {len(pairs)}"
    if operator == "-":
        return paired_difference(metric["per_seed"], other["per_seed"])
    return summarise({seed: a / b for seed, (a, b) in pairs.items()})


def _mark_text(sources, name, words):
    """The text of a mark: KEY FORM..., or KEY OPERATOR KEY FORM..."""
    name = name or sources.own
    if not name:
        raise sources.error(f"{words!r} needs a source, such as r1:{words}")
    key, *forms = words.split()
    if key in WORDS and sources.experiment(name) is None:
        value = sources.study(name)[key]
        return f"`{', '.join(map(str, value)) if isinstance(value, list) else value}`"
    metric = sources.measured(name, key)
    if forms and forms[0] in ("-", "/", "above"):
        if len(forms) < 2:
            raise sources.error(f"{words!r} needs a second key")
        operator, other, *forms = forms
        metric = _compare(metric, sources.measured(name, other), operator)
        if operator == "above":
            return metric
    for form in forms:
        is_seed = form.startswith("seed=") and form[5:] in metric["per_seed"]
        if not (form in FORMS or is_seed or re.fullmatch(r"\.\d", form)):
            raise sources.error(f"{name}:{words}: {form!r} is no form")
    if "interval" in forms and "low" not in metric:
        raise sources.error(f"{name}:{words}: only a difference has an interval")
    return _metric_text(metric, forms)


# --------------------------------------------------------------------------------------------------
# Blocks


def _with_form(text):
    """A key and the forms in brackets behind it: `*.length (.0)`."""
    key, forms = re.fullmatch(r"(.*?)(?:\s\(([^()]*)\))?", text.strip()).groups()
    return key, forms or ""


def _table(sources, spec):
    """A table: its columns and rows are in the comment above it, the numbers are written here."""
    lines = [line.strip() for line in spec.strip().splitlines() if line.strip()]
    if len(lines) < 3:
        raise sources.error(f"a table needs a source, columns and rows, got {spec.strip()!r}")
    name, _, forms = lines[0].partition(" ")
    name = sources.own if name == "." else name
    heading, *columns = [cell.strip() for cell in lines[1].split("|")]
    titles = [column.rpartition("=")[0] for column in columns]
    values = [_with_form(column.rpartition("=")[2]) for column in columns]
    rows = ["| " + " | ".join([heading, *titles]) + " |", "|---" * (len(columns) + 1) + "|"]
    filled = set()
    for line in lines[2:]:
        label, *cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 1:
            pattern, of_row = _with_form(cells[0])
            source, colon, pattern = pattern.rpartition(":")
            source = source if colon else name
            keys = [pattern.replace("*", value).replace(" ", "_") for value, _ in values]
            measured = [sources.has(source, key) for key in keys]
            if not any(measured):
                raise sources.error(f"no {cells[0]!r} in results/{source}/summary.json")
            cells = [_mark_text(sources, source, f"{key} {of_column or of_row or forms}")
                     if there else DASH
                     for key, there, (_, of_column) in zip(keys, measured, values)]
            filled |= {i for i, there in enumerate(measured) if there}
        rows.append("| " + " | ".join([label, *cells]) + " |")
    if empty := [title for i, title in enumerate(titles) if i not in filled]:
        raise sources.error(f"the column {empty[0]!r} of a table has no number at all")
    return rows


def _study_note(sources, spec):
    """Machine, commit and seeds of a study."""
    summary = sources.study(spec.strip() or sources.own)
    commit, plus, _ = summary["commit"].partition("+")
    seeds = ", ".join(map(str, summary["seeds"]))
    return [f"Machine: {summary['machine']}. Commit: `{commit}`"
            + (" (with changes that were not yet committed)" if plus else "")
            + f". Seeds: {seeds}."]


BLOCKS = {"table": _table, "run": _study_note}


# --------------------------------------------------------------------------------------------------
# Pages


def _fill_page(text, page="README.md", root=ROOT):
    """The text of a page with all its numbers written anew. UserError names page and key."""
    sources = Sources(root, page)

    def block(match):
        start, word, spec, old, end = match.groups()
        if re.search(r"<!-- (table|run)\b", old):
            raise sources.error(f"the block {word!r} has no <!-- end -->: {spec.strip()[:40]!r}")
        return "\n".join([start.rstrip("\n"), "", *BLOCKS[word](sources, spec), "", end])

    def mark(match):
        source, words = match.groups()
        return f"{_mark_text(sources, source, words)}<!--{source}:{words}-->"

    return MARK.sub(mark, BLOCK.sub(block, text))


def _page_paths(root=ROOT):
    """The paths of all pages, relative to the repository."""
    found = (path for pattern in PAGES for path in sorted(Path(root).glob(pattern)))
    return [path.relative_to(root).as_posix() for path in found]


def _stale_pages(root=ROOT):
    """The pages whose numbers are not those of the measurements."""
    return [page for page in _page_paths(root)
            if (text := (Path(root) / page).read_text("utf-8")) != _fill_page(text, page, root)]


def write_pages(root=ROOT):
    """Writes the numbers of all pages anew. Returns the pages that changed."""
    changed = _stale_pages(root)
    for page in changed:
        path = Path(root) / page
        path.write_text(_fill_page(path.read_text("utf-8"), page, root), "utf-8")
    return changed
