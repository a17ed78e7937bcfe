"""annotate: one HTML page for each lesson file, prose and equations on the left, code on the right.

    python r1mini.py annotate                 writes annotated/moe.html and three more

A page is made from the file as it is:
- A docstring stands beside the `def` or `class` that it describes, the module's at the top.
- Comments that have lines of their own stand beside the code that follows them.
- A comment at the end of a line stays in the code, as do lines that continue it at the same
  column. If it names an equation, the equation stands beside this line.
The text of each equation is in docs/equations.md. _find_mentions() says what counts as a name.

pycco was tried first. It misses docstrings of one line and breaks those that end in text, so
Python's own ast and tokenize find the prose here. pygments colours the code, latex2mathml sets
the equations.
"""
import ast
import html
import importlib
import io
import re
import string
import textwrap
import tokenize
from pathlib import Path

from engine.errors import UserError

ROOT = Path(__file__).parent.parent
# The lesson files in reading order. A number without a paper belongs to this paper.
OWN_PAPER = {"moe": "V3", "grpo": "DeepSeekMath", "tasks": "R1 v2", "r1mini": "R1 v2"}
PAPERS = r"V3|V2|DeepSeekMath|R1\sv1|R1\sv2|R1|Dr\.\sGRPO|DAPO|GSPO|Kimi\sk1\.5"
NUMBER = r"\d+(?:\.\d+)*"
MENTION = re.compile(
    rf"(?:\b(?P<paper>{PAPERS})(?:'s|\sreport)?,?\s)?\b(?P<kind>eq|section)"
    rf"\s(?P<numbers>{NUMBER}(?:-{NUMBER})?(?:,\s{NUMBER}(?:-{NUMBER})?)*)"
    rf"|\b(?P<paper_of_section>{PAPERS}),?\s(?P<section>\d+\.{NUMBER})"  # "DeepSeekMath 4.1.2"
    r"|^(?P<objective>GSPO)\b")                                          # "GSPO: one ratio for ..."


def _find_mentions(text, own_paper):
    """[(match, names)] of all places in a text that name equations or sections.

    "eq 12, 17-20" names five equations of the file's own paper, "DAPO eq 8" one of another paper.
    "R1 v2 section 3.1" and "R1 v2, 3.1" are the same. A text that begins with "GSPO" names its
    objective, whose number we do not know.
    """
    found = []
    for match in MENTION.finditer(text):
        if match["objective"]:
            found.append((match, [match["objective"]]))
            continue
        paper = match["paper"] or match["paper_of_section"] or own_paper
        kind = match["kind"] or "section"
        numbers = []
        for part in re.split(r",\s", match["numbers"] or match["section"]):
            first, _, last = part.partition("-")
            numbers += range(int(first), int(last) + 1) if last else [first]
        paper = " ".join(paper.split())  # it may stand at the end of a line
        found.append((match, [f"{paper} {kind} {number}" for number in numbers]))
    return found


def _read_equations():
    """{"V3 eq 13": (its LaTeX formulas, its sentence)} of docs/equations.md."""
    equations = {}
    for part in (ROOT / "docs/equations.md").read_text("utf-8").split("\n### ")[1:]:
        name, _, text = part.partition("\n")
        formulas = re.findall(r"```math\n(.*?)\n```", text, re.DOTALL)
        sentence = re.sub(r"```math\n.*?\n```", "", text, flags=re.DOTALL).partition("\n## ")[0]
        equations[name] = formulas, " ".join(sentence.split())
    return equations


# -------------------------------------------------------------------------------------------
# What of a file is prose


class Lesson:
    """A lesson file, taken apart. Lines are counted from 1."""

    def __init__(self, source):
        self.lines = source.splitlines()
        self.prose_lines = set()     # lines that are prose and not code
        self.prose = {}              # line of code -> texts that stand beside it
        self.line_comments = {}      # line of code -> its comment, if that ends the line
        self.headings = {}           # line of code -> heading of the section that begins there
        tree = ast.parse(source)
        self.opening = ast.get_docstring(tree)
        self.find_comments(source)   # first: a comment above a class comes before its docstring
        self.find_docstrings(tree)

    def find_comments(self, source):
        """Fills in comments: those with lines of their own go to the next line of code."""
        own, rule, last = {}, False, (0, 0)
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type != tokenize.COMMENT:
                continue
            text, (number, column) = token.string.lstrip("# "), token.start
            if not self.lines[number - 1].lstrip().startswith("#"):
                self.line_comments[number], last = text, (number, column)
                first = number
            elif last == (number - 1, column):  # continues the comment at the end of a line
                self.line_comments[first] += "\n" + text
                last = number, column
            else:
                own[number] = text
        self.prose_lines |= own.keys()
        block = []
        for number, text in own.items():
            if set(text) == {"-"}:
                rule = True
            else:
                block.append(text)
            if number + 1 in own:
                continue
            line = self.next_code(number)
            if rule:
                self.headings[line] = " ".join(block)
            else:
                self.prose.setdefault(line, []).append("\n".join(block))
            block, rule = [], False

    def next_code(self, number):
        """The first line of code after a line; one more than there are lines if there is none."""
        number += 1
        while number <= len(self.lines) and (
                number in self.prose_lines or not self.lines[number - 1].strip()):
            number += 1
        return number

    def find_docstrings(self, tree):
        """Fills in docstrings. Each goes to the first line of its class or function."""
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                continue
            if ast.get_docstring(node) is None:
                continue
            text = node.body[0]
            if not self.lines[text.lineno - 1].startswith(" " * text.col_offset + '"""'):
                continue  # it stands behind code, as in `def f(): """..."""`
            self.prose_lines |= set(range(text.lineno, text.end_lineno + 1))
            if isinstance(node, ast.Module):
                continue
            first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
            self.prose.setdefault(first, []).append(ast.get_docstring(node))


# -------------------------------------------------------------------------------------------
# HTML


def _anchor(name):
    """The id of an equation in a page."""
    return re.sub(r"\W+", "-", name.lower())


def _set_prose(text, link=lambda text: text):
    """A docstring or comment as HTML: paragraphs, "- " lists, and indented lines as they are.

    link(text) may turn the equations that a text names into links.
    """
    parts = []
    for block in link(html.escape(text, quote=False)).split("\n\n"):
        if block.startswith("    "):
            parts.append(f"<pre>{textwrap.dedent(block)}</pre>")
            continue
        block = re.sub(r"`([^`]+)`", r"<code>\1</code>", block)
        paragraph, *items = re.split(r"(?:^|\n)- ", block)
        if paragraph:
            parts.append(f"<p>{paragraph}</p>")
        if items:
            parts.append("<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>")
    return "\n".join(parts)


class Page:
    """One page: rows of prose and code, with the equations that are named."""

    def __init__(self, name, equations, to_mathml, highlighted):
        self.name, self.equations, self.to_mathml = name, equations, to_mathml
        self.highlighted = highlighted   # the file's lines as HTML
        self.anchored = set()            # equations that stand somewhere above: one id each
        self.explained = set()           # equations whose sentence stands somewhere above
        self.lesson = Lesson((ROOT / f"{name}.py").read_text("utf-8"))
        texts = [*self.lesson.line_comments.values(), *sum(self.lesson.prose.values(), [])]
        self.alone = {names[0] for text in texts for names in self.named(text) if len(names) == 1}

    def named(self, text):
        """[names] for each mention in a text, of equations that docs/equations.md has."""
        found = ([name for name in names if name in self.equations]
                 for _, names in _find_mentions(text, OWN_PAPER[self.name]))
        return [names for names in found if names]

    def link(self, text):
        """A text whose mentions are links to the equations, or the text as it is."""
        for match, names in reversed(_find_mentions(text, OWN_PAPER[self.name])):
            if names[0] in self.equations:
                linked = f'<a href="#{_anchor(names[0])}">{match[0]}</a>'
                text = text[:match.start()] + linked + text[match.end():]
        return text

    def set_equations(self, text):
        """The equations that a text names. The sentence of an equation stands once in a page:
        where the equation is first named alone, or in a range if it never is."""
        mentions, parts = self.named(text), []
        alone = {names[0] for names in mentions if len(names) == 1}
        for name in dict.fromkeys(sum(mentions, [])):
            formulas, sentence = self.equations[name]
            label = f"<small>{name.removeprefix(OWN_PAPER[self.name] + ' ')}</small>"
            ident = "" if name in self.anchored else f' id="{_anchor(name)}"'
            self.anchored.add(name)
            parts.append(f'<div class="equation"{ident}>')
            for formula in formulas:
                parts.append(f'<div><span class="math">{self.mathml(formula, "block")}</span>'
                             f"{label}</div>")
                label = ""
            if name not in self.explained and (name in alone or name not in self.alone):
                self.explained.add(name)
                parts.append(f"<p>{self.set_sentence(sentence)}</p>")
            parts.append("</div>")
        return "\n".join(parts)

    def set_sentence(self, sentence):
        """A sentence with its formulas set. Punctuation stays on the line of its formula."""
        return re.sub(r"\$(.+?)\$([.,;:)]*)",
                      lambda m: f'<span class="together">{self.mathml(m[1])}{m[2]}</span>',
                      html.escape(sentence, quote=False))

    def mathml(self, latex, display="inline"):
        """A formula as MathML. HTML needs no namespace; names such as min get less space."""
        text = self.to_mathml(html.unescape(latex), display=display)
        text = text.replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "")
        return re.sub(r"<m[io]>([A-Za-z]{2,})</m[io]>",
                      r'<mo lspace="0.15em" rspace="0.1em">\1</mo>', text)

    def body(self):
        """The HTML of the whole page."""
        lesson = self.lesson
        pages = " ".join(f'<a href="{other}.html">{other}.py</a>' for other in OWN_PAPER)
        sections = " ".join(
            f'<a href="#{_anchor(title)}">{html.escape(title.partition(".")[0])}</a>'
            for title in lesson.headings.values())
        parts = [f"<nav>{pages}</nav>", f'<div class="head"><h1>{self.name}.py</h1>',
                 _set_prose(lesson.opening, self.link), "</div>", f"<nav>{sections}</nav>"]
        beside = {number for number, text in lesson.line_comments.items() if self.named(text)}
        starts = sorted({self.lesson.next_code(0), *lesson.prose, *lesson.headings, *beside})
        for start, end in zip(starts, [*starts[1:], len(lesson.lines) + 1]):
            if start in lesson.headings:
                title = lesson.headings[start]
                parts.append(f'<h2 id="{_anchor(title)}">{html.escape(title)}</h2>')
            left = [_set_prose(text) + self.set_equations(text)
                    for text in lesson.prose.get(start, [])]
            left.append(self.set_equations(lesson.line_comments.get(start, "")))
            parts.append(f'<div class="row"><div class="prose">{"".join(left)}</div>'
                         f'<div class="code"><pre>{self.code(start, end, beside)}</pre></div>'
                         "</div>")
        return "\n".join(parts)

    def code(self, start, end, marked):
        """The code from line start to before end. Blank lines after prose and at the end go."""
        lines, prose = self.lesson.lines, self.lesson.prose_lines
        numbers = [n for n in range(start, end) if n not in prose and (
            lines[n - 1].strip() or n - 1 not in prose)]
        while numbers and not lines[numbers[-1] - 1].strip():
            numbers.pop()
        return "\n".join(f'<span class="line{" named" * (n in marked)}" data-n="{n}">'
                         f"{self.highlighted[n - 1]}</span>" for n in numbers)


def _packages():
    """(latex2mathml.converter, pygments); UserError if one is not installed."""
    try:
        importlib.import_module("pygments.lexers")
        importlib.import_module("pygments.formatters")
        pygments = importlib.import_module("pygments")
        return importlib.import_module("latex2mathml.converter"), pygments
    except ImportError:
        raise UserError("annotate wants pygments and latex2mathml: "
                        "pip install pygments latex2mathml") from None


def main(options):
    """Writes the pages into the folder of the options."""
    latex2mathml, pygments = _packages()
    folder, equations = Path(options.folder), _read_equations()
    template = string.Template((ROOT / "tools/annotate.html").read_text("utf-8"))
    lexer = pygments.lexers.PythonLexer(stripnl=False)
    formatter = pygments.formatters.HtmlFormatter(nowrap=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name in OWN_PAPER:
        source = (ROOT / f"{name}.py").read_text("utf-8")
        highlighted = pygments.highlight(source, lexer, formatter).splitlines()
        page = Page(name, equations, latex2mathml.convert, highlighted)
        text = template.substitute(title=f"{name}.py, annotated", body=page.body())
        (folder / f"{name}.html").write_text(text, "utf-8")
        print(folder / f"{name}.html")
    return 0
