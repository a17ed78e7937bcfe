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


def _folder(preset):
    """What measure_arm() reads of a run folder."""
    return SimpleNamespace(run=SimpleNamespace(preset=preset))


def test_ratio_runs_both_commits_in_turn(repository):
    """A round runs the main command of the old commit, then of the new one, each from its own
    files. A run's time is the sum of its clock: training, samples and tests. Accuracies are those
    at temperature 1, and of no other stage."""
    old, new, calls = repository
    found = ratio.measure_arm("3", _folder("micro"))
    assert found == {"commits": f"{new} and the older {old}",
                     "old.seconds": 100, "old.base": 0.5, "old.zero": 0.9,
                     "new.seconds": 20, "new.base": 0.5, "new.zero": 0.9}
    ratio.measure_arm("4", _folder("nano"))  # the default preset
    assert calls.read_text().splitlines() == [
        "95 --preset micro --seed 3 --out", "15 --preset micro --seed 3 --out",
        "95 --seed 4 --out", "15 --seed 4 --out"]
    assert not ratio._git("status", "--porcelain")


def test_ratio_is_the_median_of_rounds(monkeypatch):
    """By hand: ratios 5, 2 and 4. The ratio of medians would be 5. The new commit is better by 0.2,
    0.3 and 0.4 in the rounds, and by 0.3 on the seed 0 that both have published. The mean is 0.3;
    the interval is 3.182 standard errors on both sides."""
    numbers = {}
    for arm, old, new, gain in (("3", 600, 120, 0.2), ("4", 300, 150, 0.3), ("5", 480, 120, 0.4)):
        numbers |= {f"{arm}.old.seconds": old, f"{arm}.new.seconds": new}
        for stage in ratio.COMPARED:
            numbers |= {f"{arm}.old.{stage}": 0.5, f"{arm}.new.{stage}": 0.5 + gain}
    monkeypatch.setattr(ratio, "_git", lambda show, place: json.dumps({"metrics": {
        key: {"per_seed": {"0": 0.6 if place.startswith(ratio.OLD) else 0.9}}
        for key in ratio.COMPARED.values()}}))
    found = ratio.combine(numbers)
    assert (found["main.speed_ratio"], found["main.speed_ratio.least"],
            found["main.speed_ratio.most"]) == (4, 2, 5)
    assert (found["main.minutes.old"], found["main.minutes.new"]) == (8, 2)
    assert found["main.minus_old.r1"] == pytest.approx(0.3) and found["main.minus_old.r1.n"] == 4
    half = 3.1824 * (0.02 / 3) ** 0.5 / 2
    assert found["main.minus_old.r1.low"] == pytest.approx(0.3 - half, abs=1e-4)
    rows = {key: {"mean": x} for key, x in found.items()}
    lines = ratio.page(rows, {f"{arm}.commits": {"0": "b and the older a"} for arm in ratio.ARMS})
    assert lines[0] == ("The main command is 4.00 times as fast (2.00 to 5.00 by round). Commits: "
                        "b and the older a.")
    assert "| main.minutes.old | 8 |" in lines


def test_ratio_says_which_command_failed(repository, monkeypatch):
    """The last line of a main command that fails is shown. An unknown commit is refused."""
    (ratio.REPOSITORY / "r1mini.py").write_text("raise SystemExit('no memory')")
    ratio._git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "x")
    with pytest.raises(UserError, match="HEAD failed: no memory"):
        ratio.measure_arm("3", _folder("nano"))
    monkeypatch.setattr(ratio, "OLD", "abcdef1")
    with pytest.raises(UserError, match="git rev-parse"):
        ratio.measure_arm("3", _folder("nano"))


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
