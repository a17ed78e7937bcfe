"""The tests of report.html: it says what report.md says, and needs nothing beside it."""
import base64
import html
import pathlib
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from extras import webpage

HERE = pathlib.Path(__file__).parent.parent
REPORTS = sorted((HERE / "results").glob("*/report.md"))
EMPTY = {"meta", "img", "br"}  # elements that are not closed


class Page(HTMLParser):
    """What a browser would find: elements with their text and what they refer to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.attributes = [], [], []  # elements are [tag, text]
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        """Opens an element."""
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in EMPTY:
            self.found.append([tag, ""])
            self.open.append(self.found[-1])

    def handle_endtag(self, tag):
        """Closes the innermost element, which it must be."""
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        """Text belongs to all elements around it."""
        for element in self.open:
            element[1] += data

    def texts(self, *tags):
        """The texts of elements, in order."""
        return [text for tag, text in self.found if tag in tags]


def cells(markdown):
    """Each table cell of a Markdown text, by hand: what stands between two pipes."""
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    return [cell.strip().replace("`", "").replace("**", "") for row in rows
            if not re.fullmatch("[|-]+", row) for cell in row.split("|")[1:-1]]


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.parent.name)
def test_every_table_cell_is_in_the_page(path):
    """In order; and so is every other line of the report."""
    markdown = path.read_text("utf-8")
    page = Page(webpage.page(markdown, path.parent))
    assert page.texts("th", "td") == cells(markdown)
    squeezed = re.sub(r"\s", "", *page.texts("body"))
    for line in markdown.splitlines():
        if not line.startswith(("|", "![")):
            assert re.sub(r"\s|`|^#+|^- ", "", line) in squeezed
    assert page.texts("li") == [line[2:].replace("`", "") for line in markdown.splitlines()
                                if line.startswith("- ")]


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.parent.name)
def test_nothing_refers_outside(path):
    """No script or style sheet; links lead to a section of this very page, pictures are in it."""
    text = webpage.page(path.read_text("utf-8"), path.parent)
    page = Page(text)
    names = [value for _, name, value in page.attributes if name == "id"]
    assert len(set(names)) == len(names)
    for tag, name, value in page.attributes:
        if name in ("href", "src"):
            assert value.startswith("data:image/png;base64,") or value[1:] in names
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.found}
    assert "url(" not in text and "@import" not in text and "://" not in page.texts("style")[0]
    assert ("meta", "name", "viewport") in page.attributes
    assert "prefers-color-scheme: dark" in text


def test_pictures_are_inlined_or_left_out(tmp_path):
    """The file's own bytes; a picture whose file is gone leaves nothing."""
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "a.png").write_bytes(b"\x89PNG one")
    page = Page(webpage.page("# R\n\n![a <b>](figures/a.png)\n![gone](figures/b.png)\n", tmp_path))
    [source] = [value for _, name, value in page.attributes if name == "src"]
    assert base64.b64decode(source.partition(",")[2]) == b"\x89PNG one"
    assert ("img", "alt", "a <b>") in page.attributes and "gone" not in page.texts("body")[0]


def test_what_models_write_stays_text():
    """Tags, ampersands and quotes are shown as they are, in code and outside; stars in code too."""
    page = Page(webpage.page("# R\n\n| a `<think>**x**</think>` & \"b\" | <script> |  |\n"
                             "|---|---|---|\n| **c** | [d](e.md) |  |\n", "."))
    assert page.texts("th") == ["a <think>**x**</think> & \"b\"", "<script>", ""]
    assert page.texts("td") == ["c", "d", ""]
    assert page.texts("strong") == ["c"] and page.texts("code") == ["<think>**x**</think>"]


def test_sections_are_listed_and_linked():
    """Of the headings the second kind, each once, though others have the same words."""
    page = Page(webpage.page("# A\n\n## The B & c\n\n### D\n\n## E\n\n### D\n", "."))
    assert page.texts("a") == page.texts("h2") == ["The B & c", "E"]
    assert [value for _, name, value in page.attributes if name == "id"] == ["the-b-c", "e"]
    assert [value for _, name, value in page.attributes if name == "href"] == ["#the-b-c", "#e"]


def test_both_are_written(tmp_path):
    """publish(): report.md as it is, report.html beside it."""
    webpage.publish("# Title & more\n\ntext\n", tmp_path)
    assert (tmp_path / "report.md").read_text("utf-8") == "# Title & more\n\ntext\n"
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert page.texts("title") == ["r1mini: Title & more"] and page.texts("p") == ["text"]


@pytest.mark.slow
@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.parent.name)
def test_a_browser_shows_it_on_a_phone(path, tmp_path):
    """Chromium, where there is one: 390 pixels are wide enough for the page (a wide table moves
    within), and all pictures are there."""
    if not (browser := shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("no Chromium here")
    page = html.escape(path.with_suffix(".html").read_text("utf-8"))
    frame = tmp_path / "frame.html"
    frame.write_text(f"""<!doctype html><meta charset="utf-8"><iframe style="width:390px"
        srcdoc="{page}" onload="const d = this.contentDocument; document.title =
        [d.documentElement.scrollWidth, [...d.images].filter(i => !i.naturalWidth).length]">
        </iframe>""", "utf-8")
    shown = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                            frame.as_uri()], capture_output=True, text=True, timeout=120).stdout
    width, missing = re.search(r"<title>(\d+),(\d+)</title>", shown).groups()
    assert 300 < int(width) <= 390 and missing == "0"
