"""report.html: a report's Markdown as one page that needs nothing else, legible on a phone.

It knows the Markdown that reports are written in: headings, tables, lists, pictures, and within a
line `code`, **bold** and [links](to), of which only the words are kept. No scripts; pictures are
inlined, one whose file is not there is left out; tables scroll by themselves; dark where the
reader's screen is.
"""
import base64
import html
import itertools
import re
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1a1a1a; --soft: #5b5b5b; --line: #ddd;
        --code: #f1f1f1; --link: #0060a0 }
@media (prefers-color-scheme: dark) {
  :root { --back: #16181b; --text: #e6e6e6; --soft: #a8a8a8; --line: #3a3d42; --code: #25282c;
          --link: #7cc0f2 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 64rem; background: var(--back);
       color: var(--text); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word }
h1, h2, h3 { line-height: 1.25; margin: 2rem 0 .75rem }
h1 { margin-top: 0 }
a { color: var(--link) }
nav a { display: inline-block; margin: 0 1rem .25rem 0; padding: .25rem 0 }
code { background: var(--code); border-radius: .25rem; padding: .1rem .25rem; font-size: .9em }
img { display: block; width: 100%; max-width: 48rem; height: auto; margin: 1rem 0;
      border-radius: .25rem }
ul { padding-left: 1.25rem }
.wide { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: .375rem .625rem; text-align: left;
         vertical-align: top; white-space: nowrap }
th { color: var(--soft); vertical-align: bottom; white-space: normal }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--back);
                                 white-space: normal; min-width: 8rem; max-width: 14rem }
"""


def inline(text):
    """The HTML of a line's text."""
    parts = re.split("`([^`]*)`", text)  # every other one is code, in which nothing is marked
    for i, part in enumerate(parts):
        part = html.escape(part)
        if i % 2:
            parts[i] = f"<code>{part}</code>"
            continue
        part = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", part)
        parts[i] = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", part)
    return "".join(parts)


def anchor(title):
    """A heading's name within the page."""
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def heading(line):
    """The HTML of a heading; those of sections can be linked to."""
    marks, _, title = line.partition(" ")
    level, name = len(marks), f" id=\"{anchor(title)}\"" * (marks == "##")
    return f"<h{level}{name}>{inline(title)}</h{level}>"


def table(lines):
    """The HTML of a table's lines: its head, the rule below, its other lines."""
    head, _, *body = [line.strip().removeprefix("|").removesuffix("|").split("|") for line in lines]
    rows = ["".join(f"<{tag}>{inline(cell.strip())}</{tag}>" for cell in cells)
            for tag, cells in [("th", head), *(("td", cells) for cells in body)]]
    return ("<div class=\"wide\" tabindex=\"0\"><table>\n<thead><tr>" + rows[0]
            + "</tr></thead>\n<tbody>\n" + "".join(f"<tr>{row}</tr>\n" for row in rows[1:])
            + "</tbody></table></div>")


def picture(line, folder):
    """The HTML of a picture with its file in it; nothing if that is not there."""
    words, source = re.fullmatch(r"!\[([^]]*)\]\(([^)]*)\)", line).groups()
    if not (file := Path(folder) / source).is_file():
        return ""
    data = base64.b64encode(file.read_bytes()).decode()
    return f"<img alt=\"{html.escape(words)}\" src=\"data:image/png;base64,{data}\">"


def kind_of(line):
    """What a line of Markdown belongs to."""
    marks = {"#": "heading", "|": "table", "- ": "list", "![": "picture"}
    return next((kind for mark, kind in marks.items() if line.startswith(mark)),
                "paragraph" if line.strip() else "blank")


BLOCKS = {  # kind: neighbouring lines of it, and the folder pictures lie in, as HTML
    "heading": lambda lines, folder: "\n".join(map(heading, lines)),
    "table": lambda lines, folder: table(lines),
    "list": lambda lines, folder: "<ul>\n" + "".join(
        f"<li>{inline(line[2:])}</li>\n" for line in lines) + "</ul>",
    "picture": lambda lines, folder: "\n".join(picture(line, folder) for line in lines),
    "paragraph": lambda lines, folder: f"<p>{inline(' '.join(lines))}</p>",
    "blank": lambda lines, folder: ""}


def page(text, folder):
    """The whole page of a report's text; its pictures lie relative to the folder."""
    lines = text.splitlines()
    title = next((line[2:] for line in lines if line.startswith("# ")), "Report")
    links = "\n".join(f"<a href=\"#{anchor(line[3:])}\">{inline(line[3:])}</a>"
                      for line in lines if line.startswith("## "))
    blocks = [BLOCKS[kind](list(group), folder)
              for kind, group in itertools.groupby(lines, kind_of)]
    blocks.insert(1, f"<nav>\n{links}\n</nav>")
    return ("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
            "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
            f"<title>r1mini: {html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
            "<body>\n" + "\n".join(filter(None, blocks)) + "\n</body>\n</html>\n")


def publish(text, folder):
    """Writes report.md, and beside it report.html."""
    (Path(folder) / "report.md").write_text(text, "utf-8")
    (Path(folder) / "report.html").write_text(page(text, folder), "utf-8")
