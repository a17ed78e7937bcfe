"""How much faster is the main command than it was at an older commit?

The papers give no number for this. The yardstick is this project before its speed was
worked on: commit 308ae82.

    python r1mini.py study ratio

The files of both commits go to a temporary folder. Their main commands run in turn, three
times each, on the machine that this study runs on. It must have nothing else to do. The time
of a run is the sum of all seconds in its timing.jsonl: training, samples and tests. In each
round the ratio is the old time divided by the new time. main.speed_ratio is the median of the
rounds.

The two commits have different recipes, so they do different work. The ratio says how much
sooner the command ends, not how much faster an operation is. The new side is HEAD.
Uncommitted changes are not measured.

Speed must not cost accuracy. So the rounds have the seeds 3, 4 and 5, which the older commit's
results/r1 lacks: with them both commits have six seeds. main.minus_old.STAGE is the new accuracy
less the old one, paired by seed, on test problems at temperature 1.

A round is an arm: if the study is stopped, finished rounds are not run again.
"""
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import r1mini
from engine.errors import UserError
from engine.folder import read_log
from tools.compare import paired_difference
from tools.report import seconds_of
from tools.tables import table

SEEDS, SETTINGS, STAGES = (0,), (), ()
ARMS = dict.fromkeys(("3", "4", "5"), "")  # the seed of each round
OLD, NEW = "308ae82", "HEAD"
COMPARED = {"base": "base.pass@1", "zero": "zero.pass@1", "r1": "r1.pass@1",
            "distill": "student.distill.pass@1"}  # a stage, and its key in results/r1
REPOSITORY = Path(r1mini.__file__).parent


def _git(*words):
    """What a git command prints. UserError if it fails."""
    done = subprocess.run(["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True)
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or ["failed"])[-1]
        raise UserError(f"git {' '.join(words)}: {last_line}")
    return done.stdout.strip()


def _run_main_command(commit, preset, seed):
    """{"seconds": of training, samples and tests; STAGE: pass@1} of the main command of a commit.
    """
    words = [] if preset == "nano" else ["--preset", preset]
    with tempfile.TemporaryDirectory() as top:
        archive, files = f"{top}/files.tar", f"{top}/files"
        _git("archive", "--output", archive, commit)
        shutil.unpack_archive(archive, files, filter="data")
        command = [sys.executable, "r1mini.py", *words, "--seed", seed, "--out", f"{top}/run"]
        done = subprocess.run(command, cwd=files, capture_output=True, text=True)
        if done.returncode:
            last_line = (done.stderr.strip().splitlines() or [""])[-1]
            raise UserError(f"the main command of {commit} failed: {last_line}")
        return {"seconds": round(seconds_of(f"{top}/run"), 3)} | _accuracies(f"{top}/run")


def _accuracies(path):
    """{stage: pass@1} on test problems at temperature 1, of a run's folder."""
    return {r["stage"]: r["pass@1"] for r in read_log(path) if r["kind"] == "test"
            and r["stage"] in COMPARED and r["set"] == "test" and r["temperature"] == 1}


def measure_arm(arm, folder):
    """A round: the old commit's numbers, then the new one's."""
    numbers = {"commits": " and the older ".join(
        _git("rev-parse", "--short=7", commit) for commit in (NEW, OLD))}
    for side, commit in (("old", OLD), ("new", NEW)):
        found = _run_main_command(commit, folder.run.preset, arm)
        numbers |= {f"{side}.{key}": x for key, x in found.items()}
    return numbers


def combine(numbers):
    """The ratio over the rounds, and the new accuracies less the old ones."""
    seconds = {side: [numbers[f"{arm}.{side}.seconds"] for arm in ARMS] for side in ("old", "new")}
    ratios = [old / new for old, new in zip(seconds["old"], seconds["new"])]
    found = {"main.speed_ratio": median(ratios),
             "main.speed_ratio.least": min(ratios), "main.speed_ratio.most": max(ratios),
             "main.minutes.old": median(seconds["old"]) / 60,
             "main.minutes.new": median(seconds["new"]) / 60}
    published = {side: json.loads(_git("show", f"{commit}:results/r1/summary.json"))["metrics"]
                 for side, commit in (("old", OLD), ("new", NEW))}
    for stage, key in COMPARED.items():
        old, new = ({arm: numbers[f"{arm}.{side}.{stage}"] for arm in ARMS}
                    | published[side][key]["per_seed"] for side in ("old", "new"))
        difference = paired_difference(new, old)
        for field in ("mean", "low", "high", "n"):
            ending = "" if field == "mean" else f".{field}"
            found[f"main.minus_old.{stage}{ending}"] = difference[field]
    return found


def page(rows, notes):
    """The lines of the report: the ratio in a sentence, and a table of the numbers."""
    number = {key: row["mean"] for key, row in rows.items()}
    commits = sorted({text for arm in ARMS for text in notes[f"{arm}.commits"].values()})
    return [f"The main command is {number['main.speed_ratio']:.2f} times as fast "
            f"({number['main.speed_ratio.least']:.2f} to {number['main.speed_ratio.most']:.2f} by "
            f"round). Commits: {'; '.join(commits)}.", "",
            *table(["key", "value"], [[key, f"{x:.4g}"] for key, x in number.items()])]
