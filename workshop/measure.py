"""The workshop's experiments, run and written down.

    python workshop/measure.py                     all of them, then the pages' tables
    python workshop/measure.py no_std clip_10      these
    python workshop/measure.py try zero zero.lr=1e-3   the code as you have edited it, and settings,
    python workshop/measure.py try base                beside the plain run
    python workshop/measure.py pages               the pages again, from what was kept

An experiment that edits code edits a copy. Runs go into runs/workshop/NAME; of each one measured
curves/NAME.json is kept. tools/pages.py writes the numbers into the pages; what an experiment
changes (`<!-- change NAME -->`) is written here.
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
from tools import pages

ON_DEV = ("pass@1", "length", "reflection", "mixing", "language", "format", "cut_off")
EACH_STEP = ("accuracy", "loss", "kl", "clip", "entropy", "dead_groups", "expert_load")
RUNS = "runs/workshop"


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


def figure(x):
    """A number as the tables have it."""
    return f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}"


def change(name):
    """The lines of experiments.md that say what an experiment changes, and its command."""
    experiment, lines = EXPERIMENTS[name], []
    for file, before, after in experiment.edits:
        lines += [f"In `{file}`, instead of", "", "```python", before, "```", "", "put", "",
                  "```python", after, "```", ""]
    words = f"python workshop/measure.py try {experiment.start} {experiment.settings}".strip()
    return [*lines, "```", words, "```"]


def fill(text):
    """experiments.md with all its changes written anew."""
    return re.sub(r"(<!-- change (\S+) -->\n).*?(<!-- end -->)", lambda m: "\n".join(
        [m[1], *change(m[2]), "", m[3]]), text, flags=re.DOTALL)


def write_pages():
    """Writes what the experiments change, then the numbers of all pages."""
    path = HERE / "experiments.md"
    path.write_text(fill(path.read_text("utf-8")), "utf-8")
    pages.write_pages()


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
            plain = kept(PLAIN[EXPERIMENTS[name].start])
            print("\n".join(compare(name, record, plain, EXPERIMENTS[name].shows)), flush=True)
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
