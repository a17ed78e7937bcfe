"""How much faster is the main command than it was at an older commit?

The papers give no number for this. The yardstick is this project before its speed was
worked on: commit 308ae82.

    python r1mini.py study ratio

The files of both commits go to a temporary folder. Their main
commands, `python r1mini.py --out DIR`, run in turn, three times each, on the machine that
this study runs on. It must have nothing else to do. A number is the sum of all seconds in
a run's timing.jsonl: training, samples and tests. In each round the ratio is old minutes
divided by new minutes. main.speed_ratio is the median of the rounds.

The two commits have different recipes, so they do different work. The ratio says how much
sooner the command ends, not how much faster an operation is. The new side is HEAD.
Uncommitted changes are not measured.

Each finished run appends a line to results/ratio/runs.jsonl, and is not done again while
the pair of commits, the machine and the preset are the same.
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
from engine.folder import describe_machine
from tools.tables import table

SEEDS, SETTINGS, NEEDS, STAGES = (0,), (), (), ()
OLD = "308ae82"
ROUNDS = 3


def _git(repository, *words):
    """What a git command prints. UserError if it fails."""
    done = subprocess.run(["git", "-C", str(repository), *words], capture_output=True, text=True)
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or ["failed"])[-1]
        raise UserError(f"git {' '.join(words)}: {last_line}")
    return done.stdout.strip()


def _run_main_command(repository, commit, preset):
    """The seconds of the main command of a commit: training, samples and tests."""
    words = [] if preset == "nano" else ["--preset", preset]
    with tempfile.TemporaryDirectory() as top:
        archive, files = f"{top}/files.tar", f"{top}/files"
        _git(repository, "archive", "--output", archive, commit)
        shutil.unpack_archive(archive, files, filter="data")
        command = [sys.executable, "r1mini.py", *words, "--out", f"{top}/run"]
        done = subprocess.run(command, cwd=files, capture_output=True, text=True)
        if done.returncode:
            last_line = (done.stderr.strip().splitlines() or [""])[-1]
            raise UserError(f"the main command of {commit} failed: {last_line}")
        return _seconds_of(f"{top}/run/timing.jsonl")


def _seconds_of(path):
    """The sum of all seconds in a timing.jsonl."""
    lines = Path(path).read_text("utf-8").splitlines()
    return sum(record.get("seconds", 0.0) for record in map(json.loads, lines))


def _finished_runs(path, same):
    """{(round, commit): seconds} of the lines of runs.jsonl whose values for the keys of
    `same` are those. A torn last line does not count."""
    seconds = {}
    if path.exists():
        for line in path.read_bytes().split(b"\n")[:-1]:
            record = json.loads(line)
            if {key: record.get(key) for key in same} == same:
                seconds[record["round"], record["commit"]] = record["seconds"]
    return seconds


def _measure_rounds(repository, path, old, new, preset, rounds=ROUNDS):
    """[(seconds of the old commit, seconds of the new one)] of each round. What is in
    runs.jsonl is not run again."""
    same = {"old": old, "new": new, "machine": describe_machine(), "preset": preset}
    done = _finished_runs(path, same)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():  # a kill can tear the last line
        content = path.read_bytes()
        path.write_bytes(content[:content.rfind(b"\n") + 1])
    for number in range(rounds):
        for commit in (old, new):
            if (number, commit) in done:
                continue
            print(f"round {number + 1} of {rounds}, {commit}", flush=True)
            seconds = _run_main_command(repository, commit, preset)
            done[number, commit] = seconds
            record = {"round": number, "commit": commit, "seconds": round(seconds, 3)} | same
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    return [(done[number, old], done[number, new]) for number in range(rounds)]


def _numbers_of(pairs):
    """{key: number} of the seconds of the rounds."""
    ratios = [old / new for old, new in pairs]
    return {"main.speed_ratio": median(ratios),
            "main.speed_ratio.least": min(ratios), "main.speed_ratio.most": max(ratios),
            "main.minutes.old": median(old for old, _ in pairs) / 60,
            "main.minutes.new": median(new for _, new in pairs) / 60}


def measure(folder):
    """The numbers of all rounds, and which commits were compared."""
    repository, preset = Path(r1mini.__file__).parent, folder.run.preset
    old, new = (_git(repository, "rev-parse", "--short=7", commit) for commit in (OLD, "HEAD"))
    name = "ratio" if preset == "nano" else f"ratio-{preset}"
    pairs = _measure_rounds(repository, Path("results") / name / "runs.jsonl", old, new, preset)
    return _numbers_of(pairs) | {"main.commits": f"{new} and the older {old}"}


def page(rows, notes):
    """The lines of the report: the ratio in a sentence, and a table of the numbers."""
    number = {key: row["mean"] for key, row in rows.items()}
    commits = next(iter(notes["main.commits"].values()))
    return [f"The main command is {number['main.speed_ratio']:.2f} times as fast "
            f"({number['main.speed_ratio.least']:.2f} to {number['main.speed_ratio.most']:.2f} by "
            f"round). Commits: {commits}.", "",
            *table(["key", "value"], [[key, f"{x:.4g}"] for key, x in number.items()])]
