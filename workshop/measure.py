"""The workshop's experiments, run and written down.

    python workshop/measure.py                     all of them, then the pages' tables
    python workshop/measure.py no_std clip_10      these
    python workshop/measure.py try zero zero.lr=1e-3   the code as you have edited it, and settings,
    python workshop/measure.py try base                beside the plain run
    python workshop/measure.py pages               the pages' figures again, from what was kept

An experiment that edits code edits a copy. Runs go into runs/workshop/NAME; of each one measured
curves/NAME.json is kept. In a page a figure stands before a comment that says where it comes from,
SOURCE:KEY, and a table between two comments; `pages` writes both anew.
"""
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]
from experiments import EXPERIMENTS, PLAIN, SHORT, STARTS, Experiment

from engine.errors import UserError
from engine.folder import read_log

ON_DEV = ("pass@1", "length", "reflection", "mixing", "language", "format", "cut_off")
EACH_STEP = ("accuracy", "loss", "kl", "clip", "entropy", "dead_groups", "expert_load")
RUNS = "runs/workshop"
PAGES = ("README.md", "experiments.md", "answers.md", "questions.md")


# -------------------------------------------------------------------------------------------------
# Running


def command(experiment):
    """The words after `python r1mini.py` that an experiment stands for."""
    settings = f"{SHORT[experiment.start]} {experiment.settings}"
    return [*STARTS[experiment.start].split(), "--set", *settings.split()]


@contextlib.contextmanager
def edited(edits):
    """A folder with the code as edited: this one if nothing is to be, else a copy."""
    if not edits:
        yield ROOT
        return
    with tempfile.TemporaryDirectory() as copy:
        parts = ("", "engine/", "tools/", "studies/")
        for path in (path for part in parts for path in ROOT.glob(f"{part}*.py")):
            target = Path(copy) / path.relative_to(ROOT)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
        for name, before, after in edits:
            text = (Path(copy) / name).read_text("utf-8")
            if text.count(before) != 1:
                raise UserError(f"{name} has changed: {before.strip()!r} is in it "
                                f"{text.count(before)} times, wanted once")
            (Path(copy) / name).write_text(text.replace(before, after), "utf-8")
        yield Path(copy)


def run(name, experiment, extra=()):
    """Runs an experiment into runs/workshop/NAME. Returns its curves; UserError if it fails."""
    words, out = [*command(experiment), *extra], f"{RUNS}/{name}"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    with edited(experiment.edits) as code:
        print(f"== {name}: python r1mini.py", *words, "--out", out, flush=True)
        began, used = time.monotonic(), sum(os.times()[2:4])
        if subprocess.run([sys.executable, str(code / "r1mini.py"), *words, "--out", out,
                           "--fresh"], cwd=ROOT).returncode:
            raise UserError(f"{name}: the run failed, as it says above")
    record = {"command": " ".join(["python r1mini.py", *words]), "edits": experiment.edits,
              "seconds": round(time.monotonic() - began), "load_before": round(load, 2),
              "core_seconds": round(sum(os.times()[2:4]) - used)}  # of the processes it started
    return record | curves(ROOT / out)


def curves(path):
    """What is kept of a run: {"dev": {key: [[step, value]]}, "steps": {key: [value a step]}}."""
    log = read_log(path)
    machine = json.loads((path / "timing.jsonl").read_text("utf-8").splitlines()[0])
    dev = [r for r in log if r["kind"] == "dev"]
    steps = [r for r in log if r["kind"] in ("zero", "base")]
    return {"machine": f"{machine['machine']}, {machine['threads']} threads",
            "tokens": sum(r["tokens"] for r in steps),
            "dev": {key: [[r["step"], short(r[key])] for r in dev] for key in ON_DEV},
            "steps": {key: [short(r[key]) for r in steps] for key in EACH_STEP if key in steps[0]}}


def short(x):
    """A number with four digits that count."""
    return float(f"{x:.4g}")


# -------------------------------------------------------------------------------------------------
# Writing


def kept(name):
    """The curves of an experiment as they were measured, or None."""
    path = HERE / "curves" / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def row(record, key):
    """{step: value} of a curve on dev, or of one that has a value a step."""
    if key in record["dev"]:
        return dict(map(tuple, record["dev"][key]))
    return dict(enumerate(record["steps"].get(key, ()), 1))


def compare(name, record, plain, shows):
    """A table of an experiment beside its plain run, or None, at the steps when dev was asked."""
    at = [step for step, _ in record["dev"]["pass@1"]]
    lines = ["| after step | " + " | ".join(map(str, at)) + " |", "|---" * (len(at) + 1) + "|"]
    for key in shows:
        for label, values in ((f"{key}, plain", plain), (f"{key}, {name}", record)):
            if values and not (values is plain and name in PLAIN.values()):
                cells = row(values, key)
                lines.append(f"| {label} | " + " | ".join(
                    figure(cells[step]) if step in cells else "" for step in at) + " |")
    return lines


def times():
    """The table of what each experiment costs."""
    lines = ["| experiment | tokens | seconds | of one core | on | load before |",
             "|---|---|---|---|---|---|"]
    for name in EXPERIMENTS:
        if record := kept(name):
            cells = (record[key] for key in ("seconds", "core_seconds", "machine", "load_before"))
            lines.append(f"| {name} | {record['tokens']:,} | " + " | ".join(map(str, cells)) + " |")
    return lines


def figure(x):
    """A number as the tables have it."""
    return f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}"


def look_up(source, key):
    """The text of a figure SOURCE:KEY: of an experiment its minutes or a curve's last value, of a
    study a mean ("_" in the key may stand for a space). With % behind, in hundredths."""
    percent, key = key.endswith("%"), key.removesuffix("%")
    if source in EXPERIMENTS:
        record = kept(source)
        if record is None:
            return "?"
        x = record["seconds"] / 60 if key == "minutes" else list(row(record, key).values())[-1]
    else:
        path = ROOT / "results" / source / "summary.json"
        rows = json.loads(path.read_text("utf-8"))["metrics"]
        x = (rows.get(key) or rows[key.replace("_", " ")])["mean"]
    return f"{100 * x:.0f}%" if percent else f"{x:.1f}" if key == "minutes" else figure(x)


def block(word, name):
    """The lines of a table of a page: `curve NAME`, `times -`, `change NAME` or `study NAME`."""
    if word == "times":
        return times()
    if word == "study":
        path = ROOT / "results" / name / "report.md"
        return path.read_text("utf-8").splitlines()[2:] if path.exists() else [
            f"Not measured yet: `python r1mini.py study {name}` does it."]
    experiment = EXPERIMENTS[name]
    if word == "curve":
        record = kept(name)
        return compare(name, record, kept(PLAIN[experiment.start]), experiment.shows) if record \
            else [f"Not measured yet: `python workshop/measure.py {name}` does it."]
    lines = []
    for file, before, after in experiment.edits:
        lines += [f"In `{file}`, instead of", "", "```python", before, "```", "", "put", "",
                  "```python", after, "```", ""]
    words = f"python workshop/measure.py try {experiment.start} {experiment.settings}".strip()
    return [*lines, "```", words, "```"]


def fill(text):
    """A page with all its figures and tables written anew."""
    text = re.sub(r"(<!-- (\w+) (\S+) -->\n).*?(<!-- end -->)", lambda m: m[1] + "\n" + "\n".join(
        block(m[2], m[3])).strip() + "\n\n" + m[4], text, flags=re.DOTALL)
    return re.sub(r"[\d.+%?-]*(<!--(\w+):(\S+?)-->)", lambda m: look_up(m[2], m[3]) + m[1], text)


def write_pages():
    """Fills all pages."""
    for name in PAGES:
        path = HERE / name
        path.write_text(fill(path.read_text("utf-8")), "utf-8")


def main(words):
    """Runs what is asked for. Returns 0, or 2 for what the user can mend."""
    try:
        if words[:1] == ["try"]:
            if len(words) < 2 or words[1] not in STARTS:
                raise UserError(f"try: choose a start, one of {', '.join(STARTS)}, then settings")
            mine = Experiment(words[1], " ".join(words[2:]),
                              shows=EXPERIMENTS[PLAIN[words[1]]].shows)
            print("\n".join(compare("yours", run("try", mine), kept(PLAIN[words[1]]), mine.shows)))
            return 0
        names = [] if words == ["pages"] else words or list(EXPERIMENTS)
        if unknown := [name for name in names if name not in EXPERIMENTS]:
            raise UserError(f"there is no experiment {unknown[0]!r}; choose of "
                            f"{', '.join(EXPERIMENTS)}, or try, or pages")
        for name in names:
            record = run(name, EXPERIMENTS[name])
            (HERE / "curves").mkdir(exist_ok=True)
            text = re.sub(r"\n\s{3,}", " ", json.dumps(record, indent=1))  # a line a curve
            (HERE / "curves" / f"{name}.json").write_text(text + "\n", "utf-8")
            print("\n".join(block("curve", name)), flush=True)
        write_pages()
    except (UserError, OSError) as error:
        print(f"measure: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("measure: stopped; what was measured is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
