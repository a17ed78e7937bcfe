"""Copies of the project's code, so that nobody edits the project itself.

    edited(edits)       a temporary copy with an experiment's edits, or a student's function
    make_student_copy   workshop/mine/code, which a student edits by hand
    changed_lines       how the student's copy differs from the project
"""
import contextlib
import difflib
import shutil
import tempfile
from pathlib import Path

from engine.errors import UserError
from workshop.experiments import USES

ROOT = Path(__file__).resolve().parent.parent
MINE = ROOT / "workshop" / "mine"
CODE = MINE / "code"
FOLDERS = ("", "engine/", "tools/", "studies/")  # where the code of a run lies


def _code_files():
    """The paths of the project's code, relative to the project."""
    return [path.relative_to(ROOT) for folder in FOLDERS
            for path in sorted(ROOT.glob(f"{folder}*.py"))]


def _copy_code(folder):
    """Copies the project's code into a folder."""
    for path in _code_files():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, target)


@contextlib.contextmanager
def edited(edits, student_file=None):
    """A context with a folder of code: an edited copy of the project, or the project itself
    if there are no edits. student_file becomes the copy's module `mine`."""
    if not edits:
        yield ROOT
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _copy_code(folder)
        if student_file:
            shutil.copy(student_file, folder / "mine.py")
        for file, before, after in edits:
            text = (folder / file).read_text("utf-8")
            if text.count(before) != 1:
                raise UserError(f"{file} has changed: {before.strip()!r} stands in it "
                                f"{text.count(before)} times, and should stand there once")
            (folder / file).write_text(text.replace(before, after), "utf-8")
        yield folder


def edits_for(exercise):
    """The edits by which a copy of the code calls a student's function. UserError if no run
    can use it."""
    if exercise not in USES:
        raise UserError(f"--mine {exercise}: no run uses this; choose from {', '.join(USES)}")
    use = USES[exercise]
    return ((use.file, "import math\n", "import math\n\nimport mine\n"),
            (use.file, use.before, use.after))


def make_student_copy():
    """Makes workshop/mine/code. A copy that is there already gets a new name. Returns a
    sentence."""
    kept = ""
    if CODE.exists():
        number = 1
        while (old := MINE / f"code.old{number}").exists():
            number += 1
        CODE.rename(old)
        kept = f"; what was there is in {old.name}"
    _copy_code(CODE)
    return f"a copy of the code is in {CODE}: edit the files there{kept}"


def changed_lines():
    """The lines in which the student's copy differs from the project: - before, + after.
    UserError if there is no copy, or no difference."""
    if not CODE.exists():
        raise UserError("there is no copy of the code yet: python workshop/measure.py copy")
    lines = []
    for path in _code_files():
        texts = [(folder / path).read_text("utf-8").splitlines() if (folder / path).exists() else []
                 for folder in (ROOT, CODE)]
        changes = list(difflib.unified_diff(*texts, lineterm="", n=0))[2:]
        changes = [line for line in changes if not line.startswith("@@")]
        lines += [f"{path}", *(f"  {line}" for line in changes)] if changes else []
    if not lines:
        raise UserError(f"{CODE} is still as the project is: edit a file there, and save it")
    return lines
