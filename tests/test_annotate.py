"""The tests of annotate: every equation that the lesson names is in docs/equations.md, and a page
holds the file's code and the equations beside it. Pages need pygments and latex2mathml."""
import html
import io
import re
import sys
import tokenize

import pytest

from engine.errors import UserError
from tests.helpers import ROOT
from tools import annotate, cli

LESSONS = tuple(annotate.OWN_PAPER)


def prose_of(name):
    """All docstrings and comments of a lesson file."""
    lesson = annotate.Lesson((ROOT / f"{name}.py").read_text("utf-8"))
    return [lesson.opening, *sum(lesson.prose.values(), []), *lesson.line_comments.values(),
            *lesson.headings.values()]


def named_in(name):
    """All equations and sections that a lesson file names."""
    return {equation for text in prose_of(name)
            for _, names in annotate._find_mentions(text, annotate.OWN_PAPER[name])
            for equation in names}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """{lesson: HTML} as the command writes them."""
    pytest.importorskip("pygments", reason="pages need pygments")
    pytest.importorskip("latex2mathml", reason="pages need latex2mathml")
    folder = tmp_path_factory.mktemp("pages") / "new"
    assert cli.main(["annotate", str(folder)]) == 0
    return {path.stem: path.read_text("utf-8") for path in folder.iterdir()}


def shown_lines(page):
    """[(number, text)] of the lines of code of a page."""
    found = re.findall(r'<span class="line(?: named)?" data-n="(\d+)">(.*?)</span>(?=\n<span class='
                       r'"line|</pre>)', page, re.DOTALL)
    return [(int(number), html.unescape(re.sub("<[^>]*>", "", text))) for number, text in found]


def row_of(page, number):
    """(prose, code) of the row of a page that begins with a line of the file."""
    [row] = [row for row in page.split('<div class="row">')
             if f'<div class="code"><pre><span class="line named" data-n="{number}">' in row]
    return row.split('<div class="code">')


def test_annotate_mentions_by_hand():
    """Ranges, lists, other papers' numbers, sections with and without the word; no other digits."""
    def found(text, paper="V3"):
        return [names for _, names in annotate._find_mentions(text, paper)]

    assert found("a (eq 12, 17-19): b") == [["V3 eq 12", "V3 eq 17", "V3 eq 18", "V3 eq 19"]]
    assert found("eq 2 and eq 5") == [["V3 eq 2"], ["V3 eq 5"]]
    assert found("eq 25, D = 1") == [["V3 eq 25"]]
    assert found("eq 8, (B, T)", "R1 v2") == [["R1 v2 eq 8"]]
    assert found("as in DeepSeekMath's eq 3. R1 v2 eq 4") == [["DeepSeekMath eq 3"], ["R1 v2 eq 4"]]
    assert found("(V2, section 2.1.2)") == [["V2 section 2.1.2"]]
    assert found("DeepSeekMath 4.1.2, R1 v2, 3.1") == [["DeepSeekMath section 4.1.2"],
                                                       ["R1 v2 section 3.1"]]
    assert found("the DeepSeek-V2 report, section 2.1.2") == [["V2 section 2.1.2"]]
    assert found("GSPO (arXiv): one") == [["GSPO"]] and found("as in GSPO: no") == []
    assert found("R1 v2\neq 8-9", "V3") == [["R1 v2 eq 8", "R1 v2 eq 9"]]
    assert found("seq 3, 4 tokens, R1 v1, freq 7") == []


@pytest.mark.parametrize("name", LESSONS)
def test_annotate_every_named_equation_is_kept(name):
    """docs/equations.md has each equation that a lesson file names; none is overlooked."""
    equations = annotate._read_equations()
    assert {equation for equation in named_in(name) if " eq " in equation} <= equations.keys()
    source = (ROOT / f"{name}.py").read_text("utf-8")
    written = re.findall(r"\beq\s+#?\s*\d", source)
    found = [match for text in prose_of(name) for match, _ in annotate._find_mentions(text, "V3")
             if match["kind"] == "eq"]
    assert len(found) == len(written)


def test_annotate_all_of_v3_is_kept_and_named():
    """V3's equations 1 to 25 are all in docs/equations.md. Each is named in moe.py beside the line
    that computes it, but for eq 14, which eq 16 replaces."""
    numbers = {f"V3 eq {number}" for number in range(1, 26)}
    assert {name for name in annotate._read_equations() if name.startswith("V3 eq")} == numbers
    assert {name for name in named_in("moe") if name.startswith("V3 eq")} == numbers
    lesson = annotate.Lesson((ROOT / "moe.py").read_text("utf-8"))
    comments = [*lesson.line_comments.values(), *(
        text for line, texts in lesson.prose.items() for text in texts
        if not lesson.lines[line - 1].lstrip().startswith(("def ", "class ", "@")))]
    computed = {name for text in comments for _, names in annotate._find_mentions(text, "V3")
                for name in names}
    assert computed == numbers - {"V3 eq 14"}


def test_annotate_no_equation_is_kept_in_vain():
    """Each equation of docs/equations.md stands there once, has a formula and a sentence, and is
    named by a lesson file. GitHub sets no formula with operatorname."""
    text = (ROOT / "docs/equations.md").read_text("utf-8")
    assert "operatorname" not in text
    headings = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert len(headings) == len(set(headings)) and set(headings) == set(annotate._read_equations())
    assert all(formulas and sentence and "```" not in sentence
               for formulas, sentence in annotate._read_equations().values())
    assert set(headings) <= set.union(*map(named_in, LESSONS))


def test_annotate_takes_a_file_apart_by_hand():
    """What goes where; a docstring behind code, a string and a last comment are no exception."""
    lesson = annotate.Lesson("""'''Opening.'''
import math  # eq 1

# ----
# Part

# One,
# two.
@decorated
class A:
    '''A class.'''
    x = "# no comment"  # eq 2,
                        # continued

    def f(self): '''Short.'''
# End
""".replace("'''", '"""'))
    assert lesson.opening == "Opening."
    assert lesson.line_comments == {2: "eq 1", 12: "eq 2,\ncontinued"}
    assert lesson.headings == {9: "Part"}
    assert lesson.prose == {9: ["One,\ntwo.", "A class."], 17: ["End"]}
    assert lesson.prose_lines == {1, 4, 5, 7, 8, 11, 16}


@pytest.mark.parametrize("name", LESSONS)
def test_annotate_a_page_has_each_line_of_code_once(pages, name):
    """The oracle: the file's tokens. Lines with one, but for comments and docstrings, are shown in
    order, as they are; all words of the docstrings and comments are in the page too. Shown besides
    are only comments that continue one in the line above, at the same column."""
    source = (ROOT / f"{name}.py").read_text("utf-8")
    lines, code, prose, before = source.splitlines(), set(), [], tokenize.NEWLINE
    marks = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_docstring = token.type == tokenize.STRING and token.string.startswith('"""') and \
            before in marks
        if is_docstring or token.type == tokenize.COMMENT:
            prose.append(token.string)
        elif token.type not in marks:
            code |= set(range(token.start[0], token.end[0] + 1))
        if token.type not in (tokenize.NL, tokenize.COMMENT):
            before = token.type
    shown = [(number, text) for number, text in shown_lines(pages[name]) if text.strip()]
    for number, text in shown:
        assert text == lines[number - 1].rstrip()
        if number not in code:
            assert text.strip().startswith("#") and lines[number - 2].find("#") == text.find("#")
    numbers = [number for number, _ in shown]
    assert numbers == sorted(set(numbers)) and code <= set(numbers)
    words = set(re.findall(r"\w+", html.unescape(re.sub("<[^>]*>", "", pages[name]))))
    assert set(re.findall(r"\w+", " ".join(prose))) <= words


def test_annotate_an_equation_stands_beside_its_line(pages):
    """Each line of moe.py that ends in "# eq N" begins a row whose left side has this equation as
    MathML. Eq 13 is a fraction, and its sentence stands below it."""
    lines = (ROOT / "moe.py").read_text("utf-8").splitlines()
    named = {n: re.findall(r"eq (\d+)", line.split("#")[1]) for n, line in enumerate(lines, 1)
             if re.search(r"\S.*# eq \d", line)}
    assert len(named) > 20
    for number, equations in named.items():
        prose, _ = row_of(pages["moe"], number)
        assert re.findall(r"<small>eq (\d+)</small>", prose) == equations
        assert prose.count('display="block"') == len(equations)
    [number] = [number for number, equations in named.items() if equations == ["13"]]
    prose, code = row_of(pages["moe"], number)
    assert "<mfrac>" in prose and "add up to 1" in prose
    assert "sum" in code.split("\n")[0]


@pytest.mark.parametrize("name", LESSONS)
def test_annotate_a_page_needs_nothing_else(pages, name):
    """No script, no address, no LaTeX left over; each id once, and each link within has its id."""
    page = pages[name]
    assert "<script" not in page and not re.search(r"https?:|url\(|src=|@import", page)
    set_parts = re.sub(r'<pre>.*?</pre>', "", page, flags=re.DOTALL)
    assert "\\" not in set_parts and "$" not in set_parts and "&amp;" not in set_parts
    ids = re.findall(r'id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"', page)) <= set(ids)
    assert set(re.findall(r'href="([^"#]*)"', page)) == {f"{other}.html" for other in LESSONS}


@pytest.mark.parametrize("missing", ["pygments.lexers", "latex2mathml.converter"])
def test_annotate_a_missing_package_is_one_line(missing, monkeypatch, tmp_path, capsys):
    """Without a package: one line that says what to install, code 2, and no folder."""
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match="pip install pygments latex2mathml"):
        annotate._packages()
    assert cli.main(["annotate", str(tmp_path / "new")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "new").exists()
