"""Runs the workshop's experiments.

    python workshop/measure.py try base          the code as you have edited it
    python workshop/measure.py try zero zero.lr=1e-3     the same, with this setting
    python workshop/measure.py no_std clip_10    these experiments
    python workshop/measure.py                   all experiments

Each prints a table that compares a run with the plain run. An experiment that edits
code edits a copy of it. Runs go into runs/workshop/NAME, and nothing else is written.

Two more are for those who maintain the workshop:

    python workshop/measure.py --keep no_std     keeps its curves, then writes the pages
    python workshop/measure.py pages             the pages again, from the kept curves

The kept curves are curves/NAME.json. tools/pages.py writes their numbers into the pages.
This file writes what an experiment changes, at the marks `<!-- change NAME -->` of
experiments.md.
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

WORKSHOP = Path(__file__).resolve().parent
ROOT = WORKSHOP.parent
sys.path[:0] = [str(ROOT), str(WORKSHOP)]
from experiments import EXPERIMENTS, PLAIN, SHORT, STARTS, Experiment

from engine.errors import UserError
from engine.folder import read_log
from tools import pages

ON_DEV = ("pass@1", "length", "reflection", "mixing", "language", "format", "cut_off")
EACH_STEP = ("accuracy", "loss", "kl", "clip", "entropy", "dead_groups", "expert_load")
RUNS = "runs/workshop"
GRACE = 30  # seconds that a run has for its last step after Ctrl-C


# ------------------------------------------------------------------------------
# Running


def command(experiment):
    """The words of an experiment after `python r1mini.py`."""
    settings = f"{SHORT[experiment.start]} {experiment.settings}"
    return [*STARTS[experiment.start].split(), "--set", *settings.split()]


@contextlib.contextmanager
def edited(edits):
    """A context with a folder of code: an edited copy of this project, or the project
    itself if there are no edits."""
    if not edits:
        yield ROOT
        return
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for folder in ("", "engine/", "tools/", "studies/"):
            for path in ROOT.glob(f"{folder}*.py"):
                target = copy / path.relative_to(ROOT)
                target.parent.mkdir(exist_ok=True)
                shutil.copy(path, target)
        for file, before, after in edits:
            text = (copy / file).read_text("utf-8")
            if text.count(before) != 1:
                raise UserError(f"{file} has changed: {before.strip()!r} stands in it "
                                f"{text.count(before)} times, and should stand there once")
            (copy / file).write_text(text.replace(before, after), "utf-8")
        yield copy


def run(name, experiment, extra=()):
    """Runs an experiment into runs/workshop/NAME. Returns its curves. UserError if it
    fails."""
    words, out = [*command(experiment), *extra], f"{RUNS}/{name}"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    with edited(experiment.edits) as code:
        print(f"== {name}: python r1mini.py", *words, "--out", out, flush=True)
        began, core_seconds_before = time.monotonic(), core_seconds_of_children()
        run_to_its_end([sys.executable, str(code / "r1mini.py"), *words, "--out", out, "--fresh"],
                       name)
    record = {"command": " ".join(["python r1mini.py", *words]), "edits": experiment.edits,
              "seconds": round(time.monotonic() - began), "load_before": round(load, 2),
              "core_seconds": round(core_seconds_of_children() - core_seconds_before)}
    return record | curves(ROOT / out)


def run_to_its_end(words, name):
    """Runs a command. UserError if it fails. The command gets Ctrl-C too. Then this function
    waits until the command has saved its state."""
    process = subprocess.Popen(words, cwd=ROOT)
    try:
        process.wait()
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        raise
    finally:
        process.terminate()  # needed if the command got no Ctrl-C, or this process got two
        process.wait()
    if process.returncode:
        raise UserError(f"{name}: the run failed; the message above says why")


def core_seconds_of_children():
    """Processor time of the processes that this one has started and that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def curves(path):
    """What is kept of a run: {"dev": {key: [[step, value]]}, "steps": {key: [value per
    step]}} and more."""
    log = read_log(path)
    machine = json.loads((path / "timing.jsonl").read_text("utf-8").splitlines()[0])
    dev = [r for r in log if r["kind"] == "dev"]
    steps = [r for r in log if r["kind"] in ("zero", "base")]
    step_keys = [key for key in EACH_STEP if key in steps[0]]
    return {"machine": f"{machine['machine']}, {machine['threads']} threads",
            "tokens": sum(r["tokens"] for r in steps),
            "dev": {key: [[r["step"], short(r[key])] for r in dev if r[key] is not None]
                    for key in ON_DEV},  # None: no answer has words
            "steps": {key: [short(r[key]) for r in steps] for key in step_keys}}


def short(x):
    """A number with four significant digits."""
    return float(f"{x:.4g}")


# ------------------------------------------------------------------------------
# Writing


def kept_curves(name):
    """The kept curves of an experiment, or None."""
    path = WORKSHOP / "curves" / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def keep(name, record):
    """Writes curves/NAME.json, with one line for each curve."""
    (WORKSHOP / "curves").mkdir(exist_ok=True)
    text = re.sub(r"\n\s{3,}", " ", json.dumps(record, indent=1))
    (WORKSHOP / "curves" / f"{name}.json").write_text(text + "\n", "utf-8")


def row(record, key):
    """{step: value} of a curve, whether it has a value per step or per evaluation on dev."""
    if key in record["dev"]:
        return dict(map(tuple, record["dev"][key]))
    return dict(enumerate(record["steps"].get(key, ()), 1))


def compare(name, record, plain, shows):
    """The lines of a table of an experiment at the steps that were evaluated on dev.
    The plain run stands beside it, unless it is None."""
    steps = [step for step, _ in record["dev"]["pass@1"]]
    lines = ["| after step | " + " | ".join(map(str, steps)) + " |",
             "|---" * (len(steps) + 1) + "|"]
    runs = {name: record}
    if plain and name not in PLAIN.values():
        runs = {"plain": plain, name: record}
    for key in shows:
        for run_name, curves_of_run in runs.items():
            values = row(curves_of_run, key)
            cells = [as_text(values[step]) if step in values else "" for step in steps]
            lines.append(f"| {key}, {run_name} | " + " | ".join(cells) + " |")
    return lines


def as_text(x):
    """A number as the tables write it."""
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
    def changed(match):
        start, name, end = match.groups()
        return "\n".join([start, *change(name), "", end])

    return re.sub(r"(<!-- change (\S+) -->\n).*?(<!-- end -->)", changed, text, flags=re.DOTALL)


def write_pages():
    """Writes what the experiments change, then the numbers of all pages."""
    path = WORKSHOP / "experiments.md"
    path.write_text(fill(path.read_text("utf-8")), "utf-8")
    pages.write_pages()


# ------------------------------------------------------------------------------
# The command


def try_settings(words):
    """Runs `try START SETTINGS`, and prints the plain run beside it."""
    if not words or words[0] not in STARTS:
        raise UserError(f"try: choose where to start, one of {', '.join(STARTS)}; then come "
                        "settings")
    start, *settings = words
    plain = PLAIN[start]
    experiment = Experiment(start, " ".join(settings), shows=EXPERIMENTS[plain].shows)
    record = run("try", experiment)
    print("\n".join(compare("yours", record, kept_curves(plain), experiment.shows)))


def measure_all(names, keeps):
    """Runs experiments and prints their tables. `keeps`: whether it keeps their curves."""
    for name in names:
        experiment = EXPERIMENTS[name]
        record = run(name, experiment)
        if keeps:
            keep(name, record)
        plain = kept_curves(PLAIN[experiment.start])
        print("\n".join(compare(name, record, plain, experiment.shows)), flush=True)


def measure(words):
    """Runs the experiments that the words name, or all. With --keep it keeps their curves
    and writes the pages."""
    names = [word for word in words if word != "--keep"]
    unknown = [name for name in names if name not in EXPERIMENTS]
    if unknown:
        raise UserError(f"there is no experiment {unknown[0]!r}; choose from "
                        f"{', '.join(EXPERIMENTS)}, or try, or pages")
    keeps = "--keep" in words
    measure_all(names or EXPERIMENTS, keeps)
    if keeps:
        write_pages()


def main(words):
    """Runs what the words ask for. Returns 0, or 2 for what the user can correct, or
    130 after Ctrl-C."""
    try:
        if words[:1] == ["try"]:
            try_settings(words[1:])
        elif words == ["pages"]:
            write_pages()
        else:
            measure(words)
    except (UserError, OSError) as error:
        print(f"measure: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("measure: stopped; the same command starts afresh", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
