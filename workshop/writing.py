"""Writes the workshop's pages and pictures from the experiments and their kept curves.

    <!-- change NAME -->    in experiments.md: what to change, the command, the time it takes
    <!-- answer NAME -->    in answers.md: a picture of the curves, and their table
    <!-- times -->          in answers.md: what all runs cost

Each ends with `<!-- end -->`. An experiment without kept curves says so. The numbers in the
text have marks, which tools/pages.py fills.
"""
import json
import re
from pathlib import Path

from tools import pages
from tools.figures import Picture, write_picture
from tools.tables import table
from workshop.experiments import EXPERIMENTS, PLAIN
from workshop.pictures import curves_panel

WORKSHOP = Path(__file__).resolve().parent
CURVES = WORKSHOP / "curves"
NOT_MEASURED = "Not measured yet: `python workshop/measure.py --keep {}`."


# ------------------------------------------------------------------------------
# Curves


def _kept_curves(name):
    """The kept curves of an experiment, or None."""
    path = CURVES / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def row(record, key):
    """{step: value} of a curve, whether it has a value per step or per evaluation on dev."""
    if key in record["dev"]:
        return dict(map(tuple, record["dev"][key]))
    return dict(enumerate(record["steps"].get(key, ()), 1))


def _label_of(name):
    """What a run is called beside another one."""
    return "plain" if name in PLAIN.values() else name


def compare(label, record, other, shows):
    """The lines of a table of a run at the steps that were evaluated on dev. The kept run
    named `other` stands beside it, unless it is missing or the same."""
    steps = [step for step, _ in record["dev"]["pass@1"]]
    runs = {label: record}
    beside = _kept_curves(other)
    if beside and label not in (other, _label_of(other)):
        runs = {_label_of(other): beside, label: record}
    body = []
    for key in shows:
        for name, curves in runs.items():
            values = row(curves, key)
            cells = [_as_text(values[step]) if step in values else "" for step in steps]
            body.append([f"{key}, {name}", *cells])
    return table(["after step", *map(str, steps)], body)


def _as_text(x):
    """A number as the tables write it."""
    return f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}"


# ------------------------------------------------------------------------------
# Pictures


def _titles(name):
    """{key: title} of an experiment's picture: what its curves show, with their last values.
    None if a curve is missing."""
    experiment = EXPERIMENTS[name]
    record, other = _kept_curves(name), _kept_curves(experiment.compared_with)
    if record is None or other is None:
        return None
    numbers = {}
    for prefix, curves in (("other ", other), ("", record)):
        for key in (*curves["dev"], *curves["steps"]):
            numbers[prefix + key] = list(row(curves, key).values())[-1]
    return {key: title.format_map(numbers) for key, title in experiment.titles.items()}


def _picture_of(name):
    """The Picture of an experiment's curves beside those of another run; None without
    curves."""
    found, other = _titles(name), EXPERIMENTS[name].compared_with
    if found is None:
        return None
    names = [name] if name == other else [other, name]
    panels = [curves_panel(title, key, {_label_of(n): {"0": row(_kept_curves(n), key)}
                                        for n in reversed(names)})
              for key, title in found.items()]
    return Picture(panels, "one run of each, seed 0, dev problems")


# ------------------------------------------------------------------------------
# Blocks


def _change(name):
    """The lines of experiments.md that say what an experiment changes, its command, and how
    long it takes."""
    experiment, lines = EXPERIMENTS[name], []
    words = f"python workshop/measure.py {name}"
    if experiment.edits:
        lines += ["```", "python workshop/measure.py copy", "```", ""]
        for file, before, after in experiment.edits:
            lines += [f"In `workshop/mine/code/{file}`, instead of", "", "```python", before, "```",
                      "", "put", "", "```python", after, "```", ""]
        words = f"python workshop/measure.py try --copy {experiment.start}"
    elif experiment.model == "base":
        words = f"python workshop/measure.py try {experiment.start}"
    if experiment.edits or experiment.model == "base":
        words = f"{words} {experiment.settings}".strip()
    record = _kept_curves(name)
    time = NOT_MEASURED.format(name)
    if record:
        time = f"{record['seconds'] / 60:.1f} minutes ({record['machine']})."
    return [*lines, "```", words, "```", "", f"**Time.** {time}"]


def answer(name):
    """The lines of answers.md with an experiment's picture and table."""
    record, experiment, found = _kept_curves(name), EXPERIMENTS[name], _titles(name)
    if found is None:
        return [NOT_MEASURED.format(name)]
    text = "; ".join(title.replace("\n", " ") for title in found.values())
    return [f"![{text}](curves/figures/{name}.png)", "",
            *compare(_label_of(name), record, experiment.compared_with, experiment.shows)]


def times(_):
    """The table of what all runs cost."""
    keys = ("seconds", "core_seconds", "machine", "load_before")
    body = []
    for name in EXPERIMENTS:
        if record := _kept_curves(name):
            body.append([name, f"{record['tokens']:,}", *(str(record[key]) for key in keys)])
    return table(["experiment", "tokens", "seconds", "processor seconds", "machine",
                  "load before"], body)


BLOCKS = {"change": _change, "answer": answer, "times": times}


def _fill(text):
    """The text of a page with all its blocks written anew."""
    def written(match):
        start, word, name, end = match.groups()
        return "\n".join([start, "", *BLOCKS[word](name), "", end])

    return re.sub(r"(<!-- (change|answer|times) ?(\S*) ?-->)\n.*?(<!-- end -->)", written, text,
                  flags=re.DOTALL)


def write_pages():
    """Writes the pictures, the blocks of the pages, then the numbers of all pages."""
    for name in EXPERIMENTS:
        write_picture(CURVES, name, _picture_of(name))
    for page in ("experiments.md", "answers.md"):
        path = WORKSHOP / page
        path.write_text(_fill(path.read_text("utf-8")), "utf-8")
    pages.write_pages()


