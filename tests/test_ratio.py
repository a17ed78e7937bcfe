"""Tests of studies/ratio.py: real archives of a small repository, and ratios by hand."""
import json
import subprocess
from types import SimpleNamespace

import pytest

from engine.errors import UserError
from studies import ratio

# A main command that takes so many seconds by its own clock, and says how it was called.
PROGRAM = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True)
lines = [{{"machine": "one", "threads": 2}}, {{"stage": "base", "step": 1, "seconds": {0}}},
         {{"stage": "collect_dev1", "step": 0, "seconds": 2}},
         {{"stage": "test_base", "step": 0, "seconds": 3}}]
(out / "timing.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
tests = [("base", "test", 1.0, 0.5), ("base", "test", 0.6, 0.7), ("base", "longer", 0.6, 0.1),
         ("dev1", "test", 1.0, 0.2), ("zero", "test", 1.0, 0.9)]
(out / "log.jsonl").write_text('{{"kind": "config"}}\\n' + "".join(
    json.dumps({{"kind": "test", "stage": stage, "set": part, "temperature": heat, "pass@1": x}})
    + "\\n" for stage, part, heat, x in tests))
with open({1!r}, "a") as file:
    file.write("{0} " + " ".join(sys.argv[1:-1]) + "\\n")
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """(old commit, new commit, the file in which each run leaves a line) of a small repository."""
    folder, calls = tmp_path / "clone", tmp_path / "calls"
    folder.mkdir()
    calls.touch()
    monkeypatch.setattr(ratio, "REPOSITORY", folder)
    ratio._git("init", "-q")
    commits = []
    for seconds in (95, 15):
        (folder / "r1mini.py").write_text(PROGRAM.format(seconds, str(calls)))
        ratio._git("add", ".")
        ratio._git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x")
        commits.append(ratio._git("rev-parse", "--short=7", "HEAD"))
    monkeypatch.setattr(ratio, "OLD", commits[0])
    return *commits, calls


def _folder(preset, seed):
    """What measure_arm() reads of a run folder."""
    return SimpleNamespace(run=SimpleNamespace(preset=preset, seed=seed))


def test_ratio_runs_both_commits_in_turn(repository):
    """A seed runs the main command of the old commit, then of the new one, each from its own
    files. A run's time is the sum of its clock: training, samples and tests. Accuracies are those
    at temperature 1, and of no other stage."""
    old, new, calls = repository
    found = ratio.measure_arm("main", _folder("micro", 3))
    assert found == {"commit.old": old, "old.minutes": 100 / 60, "old.base": 0.5, "old.zero": 0.9,
                     "commit.new": new, "new.minutes": 20 / 60, "new.base": 0.5, "new.zero": 0.9,
                     "speed_ratio": pytest.approx(5)}
    ratio.measure_arm("main", _folder("nano", 4))  # the default preset
    assert calls.read_text().splitlines() == [
        "95 --preset micro --seed 3 --out", "15 --preset micro --seed 3 --out",
        "95 --seed 4 --out", "15 --seed 4 --out"]
    assert not ratio._git("status", "--porcelain")


def test_ratio_takes_published_accuracies(monkeypatch):
    """The seeds that both commits have published are read from their results/r1, and not run."""
    right = {ratio.OLD: 0.6, ratio.NEW: 0.9}

    def git(command, *words):
        if command == "rev-parse":
            return words[-1]
        commit, _, path = words[0].partition(":")
        assert (command, path) == ("show", "results/r1/summary.json")
        return json.dumps({"metrics": {key: {"per_seed": {"1": right[commit], "2": 0.1}}
                                       for key in ratio.COMPARED.values()}})
    monkeypatch.setattr(ratio, "_git", git)
    found = ratio.measure_arm("main", _folder("nano", 1))
    assert found == {"commit.old": ratio.OLD, "commit.new": ratio.NEW} | {
        f"{side}.{stage}": x
        for stage in ratio.COMPARED for side, x in (("old", 0.6), ("new", 0.9))}


def test_ratio_page_has_both_commits():
    """The table has a column for each commit."""
    rows = {f"main.{side}.{key}": {"mean": x, "std": 0.0, "per_seed": {"3": x}}
            for side, x in (("old", 0.5), ("new", 0.25)) for key in ("minutes", *ratio.COMPARED)}
    rows["main.speed_ratio"] = {"mean": 2.0, "std": 0.0, "per_seed": {"3": 2.0}}
    lines = ratio.page(rows, {"main.commit.old": {"3": "a"}, "main.commit.new": {"3": "b"}})
    assert lines[0] == "|  | a | b |" and "| r1, pass@1 | 0.500 | 0.250 |" in lines
    assert lines[-1] == "times as fast: 2.000"


def test_ratio_says_which_command_failed(repository, monkeypatch):
    """The last line of a main command that fails is shown. An unknown commit is refused."""
    (ratio.REPOSITORY / "r1mini.py").write_text("raise SystemExit('no memory')")
    ratio._git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "x")
    with pytest.raises(UserError, match="failed: no memory"):
        ratio.measure_arm("main", _folder("nano", 3))
    monkeypatch.setattr(ratio, "OLD", "abcdef1")
    with pytest.raises(UserError, match="git rev-parse"):
        ratio.measure_arm("main", _folder("nano", 3))


def test_ratio_old_commit_exists():
    """The commit that the study compares with is in this repository, unless it is a shallow copy.
    """
    done = subprocess.run(["git", "-C", str(ratio.REPOSITORY), "cat-file", "-e",
                           f"{ratio.OLD}^{{commit}}"], capture_output=True)
    shallow = subprocess.run(
        ["git", "-C", str(ratio.REPOSITORY), "rev-parse", "--is-shallow-repository"],
        capture_output=True, text=True)
    if shallow.stdout.strip() != "false":
        pytest.skip("not a whole clone")
    assert done.returncode == 0
