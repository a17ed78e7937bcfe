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

Speed must not cost accuracy. So the rounds have the seeds 3, 4 and 5, which the older commit's
results/r1 lacks: with them both commits have six seeds. main.minus_old.STAGE is the new accuracy
less the old one, paired by seed, on test problems at temperature 1.

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
from engine.folder import describe_machine, read_log
from tools.compare import paired_difference
from tools.tables import table

SEEDS, SETTINGS, NEEDS, STAGES = (0,), (), (), ()
OLD = "308ae82"
ROUNDS = (3, 4, 5)  # the seed of each round
COMPARED = {"base": "base.pass@1", "zero": "zero.pass@1", "r1": "r1.pass@1",
            "distill": "student.distill.pass@1"}  # a stage, and its key in results/r1


def _git(repository, *words):
    """What a git command prints. UserError if it fails."""
    done = subprocess.run(["git", "-C", str(repository), *words], capture_output=True, text=True)
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or ["failed"])[-1]
        raise UserError(f"git {' '.join(words)}: {last_line}")
    return done.stdout.strip()


def _run_main_command(repository, commit, preset, seed):
    """What the main command of a commit takes and learns: {"seconds": training, samples and tests;
    "right": {stage: pass@1}}."""
    words = [] if preset == "nano" else ["--preset", preset]
    with tempfile.TemporaryDirectory() as top:
        archive, files = f"{top}/files.tar", f"{top}/files"
        _git(repository, "archive", "--output", archive, commit)
        shutil.unpack_archive(archive, files, filter="data")
        command = [sys.executable, "r1mini.py", *words, "--seed", str(seed), "--out", f"{top}/run"]
        done = subprocess.run(command, cwd=files, capture_output=True, text=True)
        if done.returncode:
            last_line = (done.stderr.strip().splitlines() or [""])[-1]
            raise UserError(f"the main command of {commit} failed: {last_line}")
        return {"seconds": round(_seconds_of(f"{top}/run/timing.jsonl"), 3),
                "right": _accuracies(f"{top}/run")}


def _seconds_of(path):
    """The sum of all seconds in a timing.jsonl."""
    lines = Path(path).read_text("utf-8").splitlines()
    return sum(record.get("seconds", 0.0) for record in map(json.loads, lines))


def _accuracies(path):
    """{stage: pass@1} on test problems at temperature 1, of a run's folder."""
    return {r["stage"]: r["pass@1"] for r in read_log(path) if r["kind"] == "test"
            and r["stage"] in COMPARED and r["set"] == "test" and r["temperature"] == 1}


def _finished_runs(path, same):
    """{(seed, commit): record} of the lines of runs.jsonl whose values for the keys of
    `same` are those. A torn last line does not count."""
    if not path.exists():
        return {}
    records = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    return {(r["seed"], r["commit"]): r for r in records
            if {key: r.get(key) for key in same} == same}


def _measure_rounds(repository, path, old, new, preset, rounds=ROUNDS):
    """{(seed, commit): record} of both commits in each round. What is in runs.jsonl is not run
    again."""
    same = {"old": old, "new": new, "machine": describe_machine(), "preset": preset}
    done = _finished_runs(path, same)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():  # a kill can tear the last line
        content = path.read_bytes()
        path.write_bytes(content[:content.rfind(b"\n") + 1])
    for seed in rounds:
        for commit in (old, new):
            if (seed, commit) in done:
                continue
            print(f"seed {seed} of {rounds}, {commit}", flush=True)
            record = {"seed": seed, "commit": commit} | same
            record |= _run_main_command(repository, commit, preset, seed)
            done[seed, commit] = record
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    return {key: record for key, record in done.items() if key[0] in rounds}


def _numbers_of(done, old, new):
    """{key: number} of the seconds of the rounds."""
    seconds = {commit: [r["seconds"] for (_, c), r in sorted(done.items()) if c == commit]
               for commit in (old, new)}
    ratios = [a / b for a, b in zip(seconds[old], seconds[new], strict=True)]
    return {"main.speed_ratio": median(ratios),
            "main.speed_ratio.least": min(ratios), "main.speed_ratio.most": max(ratios),
            "main.minutes.old": median(seconds[old]) / 60,
            "main.minutes.new": median(seconds[new]) / 60}


def _accuracy_differences(done, old, new, published):
    """{key: number}: the new accuracy less the old one, with the ends of its 95% interval.
    published: {commit: the metrics of its results/r1}. Other seeds are those of the rounds."""
    numbers = {}
    for stage, key in COMPARED.items():
        right = {commit: {str(seed): r["right"][stage] for (seed, c), r in done.items()
                          if c == commit} | published[commit][key]["per_seed"]
                 for commit in (old, new)}
        difference = paired_difference(right[new], right[old])
        for field in ("mean", "low", "high", "n"):
            ending = "" if field == "mean" else f".{field}"
            numbers[f"main.minus_old.{stage}{ending}"] = difference[field]
    return numbers


def measure(folder):
    """The numbers of all rounds, and which commits were compared."""
    repository, preset = Path(r1mini.__file__).parent, folder.run.preset
    old, new = (_git(repository, "rev-parse", "--short=7", commit) for commit in (OLD, "HEAD"))
    name = "ratio" if preset == "nano" else f"ratio-{preset}"
    done = _measure_rounds(repository, Path("results") / name / "runs.jsonl", old, new, preset)
    numbers = _numbers_of(done, old, new) | {"main.commits": f"{new} and the older {old}"}
    if preset == "nano":
        summaries = {commit: _git(repository, "show", f"{commit}:results/r1/summary.json")
                     for commit in (old, new)}
        numbers |= _accuracy_differences(done, old, new, {
            commit: json.loads(text)["metrics"] for commit, text in summaries.items()})
    return numbers


def page(rows, notes):
    """The lines of the report: the ratio in a sentence, and a table of the numbers."""
    number = {key: row["mean"] for key, row in rows.items()}
    commits = next(iter(notes["main.commits"].values()))
    return [f"The main command is {number['main.speed_ratio']:.2f} times as fast "
            f"({number['main.speed_ratio.least']:.2f} to {number['main.speed_ratio.most']:.2f} by "
            f"round). Commits: {commits}.", "",
            *table(["key", "value"], [[key, f"{x:.4g}"] for key, x in number.items()])]
