"""How much faster is the main command than it was at an older commit?

The papers give no number for this. The yardstick is this project before its speed was
worked on: commit 308ae82.

    python r1mini.py study ratio

The files of both commits go to a temporary folder. Their main commands run in turn, on the
machine that this study runs on. It must have nothing else to do. The time of a run is the sum
of all seconds in its timing.jsonl: training, samples and tests. main.speed_ratio is the old
time divided by the new time.

The two commits have different recipes, so they do different work. The ratio says how much
sooner the command ends, not how much faster an operation is. The new side is HEAD.
Uncommitted changes are not measured. To measure a later HEAD, delete results/ratio/runs.jsonl.

Speed must not cost accuracy. main.minus_old.STAGE is the new accuracy less the old one, on test
problems at temperature 1. The older commit has published seeds 0 to 2. For these, both accuracies
are read from the results/r1 of each commit, and nothing is run. Seeds 3 to 5 are run.
"""
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import r1mini
from engine.errors import UserError
from engine.folder import read_log
from tools.report import seconds_of
from tools.tables import cell, table

SEEDS, SETTINGS, STAGES = range(6), (), ()
ARMS = {"main": ""}
OLD, NEW = "308ae82", "HEAD"
PUBLISHED = range(3)  # seeds
COMPARED = {"base": "base.pass@1", "zero": "zero.pass@1", "r1": "r1.pass@1",
            "distill": "student.distill.pass@1"}  # a stage, and its key in results/r1
DIFFERENCES = {f"main.minus_old.{stage}": (f"main.new.{stage}", f"main.old.{stage}")
               for stage in COMPARED}
REPOSITORY = Path(r1mini.__file__).parent


def _git(*words):
    """What a git command prints. UserError if it fails."""
    done = subprocess.run(["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True)
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or ["failed"])[-1]
        raise UserError(f"git {' '.join(words)}: {last_line}")
    return done.stdout.strip()


def _run_main_command(commit, preset, seed):
    """{"minutes": in all; STAGE: pass@1} of the main command of a commit."""
    words = [] if preset == "nano" else ["--preset", preset]
    with tempfile.TemporaryDirectory() as top:
        # Not a tar: its safe filter is missing in Python before 3.11.4, such as Debian 12's.
        archive, files = f"{top}/files.zip", f"{top}/files"
        _git("archive", "--output", archive, commit)  # a ZIP file by its name
        shutil.unpack_archive(archive, files)
        command = [sys.executable, "r1mini.py", *words, "--seed", seed, "--out", f"{top}/run"]
        done = subprocess.run(command, cwd=files, capture_output=True, text=True)
        if done.returncode:
            last_line = (done.stderr.strip().splitlines() or [""])[-1]
            raise UserError(f"the main command of {commit} failed: {last_line}")
        return {"minutes": seconds_of(f"{top}/run") / 60} | _accuracies(f"{top}/run")


def _accuracies(path):
    """{stage: pass@1} on test problems at temperature 1, of a run's folder."""
    return {r["stage"]: r["pass@1"] for r in read_log(path) if r["kind"] == "test"
            and r["stage"] in COMPARED and r["set"] == "test" and r["temperature"] == 1}


def _published_accuracies(commit, seed):
    """{stage: pass@1} on test problems at temperature 1, of the results/r1 of a commit."""
    metrics = json.loads(_git("show", f"{commit}:results/r1/summary.json"))["metrics"]
    return {stage: metrics[key]["per_seed"][seed] for stage, key in COMPARED.items()}


def measure_arm(arm, folder):
    """The numbers of a seed: both times and their ratio, and the accuracies of both commits."""
    seed, numbers = str(folder.run.seed), {}
    is_published = folder.run.seed in PUBLISHED and folder.run.preset == "nano"
    # First of all: HEAD may move while the older commit runs.
    commits = {"old": _git("rev-parse", "--short=7", OLD),
               "new": _git("rev-parse", "--short=7", NEW)}
    for side, commit in commits.items():
        if is_published:
            numbers_of_side = _published_accuracies(commit, seed)
        else:
            numbers_of_side = _run_main_command(commit, folder.run.preset, seed)
        numbers |= {f"{side}.{key}": x for key, x in numbers_of_side.items()}
        numbers[f"commit.{side}"] = commit
    if not is_published:
        numbers["speed_ratio"] = numbers["old.minutes"] / numbers["new.minutes"]
    return numbers


def page(rows, notes):
    """The lines of the report: both commits, and the new one less the old one."""
    body = []
    for key in ("minutes", *COMPARED):
        name = key if key == "minutes" else f"{key}, pass@1"
        body.append([name, cell(rows, f"main.old.{key}"), cell(rows, f"main.new.{key}")])
    commits = [sorted(set(notes[f"main.commit.{side}"].values())) for side in ("old", "new")]
    lines = table(["", *map(", ".join, commits)], body)
    if "main.speed_ratio" in rows:
        lines += ["", f"times as fast: {cell(rows, 'main.speed_ratio')}"]
    return lines
