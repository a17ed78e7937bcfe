"""Tests of studies/ratio.py: real archives of a small repository, and ratios by hand."""
import json
import subprocess

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
def repository(tmp_path):
    """(folder, old commit, new commit, the file in which each run leaves a line)."""
    folder, calls = tmp_path / "clone", tmp_path / "calls"
    folder.mkdir()
    calls.touch()
    ratio._git(folder, "init", "-q")
    commits = []
    for seconds in (95, 15):
        (folder / "r1mini.py").write_text(PROGRAM.format(seconds, str(calls)))
        ratio._git(folder, "add", ".")
        ratio._git(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x")
        commits.append(ratio._git(folder, "rev-parse", "--short=7", "HEAD"))
    return folder, *commits, calls


def test_ratio_runs_both_commits_in_turn(repository, tmp_path):
    """Each round runs the main command of the old commit, then of the new one, each from its own
    files. A run's time is the sum of its clock: training, samples and tests."""
    folder, old, new, calls = repository
    path = tmp_path / "results/runs.jsonl"
    done = ratio._measure_rounds(folder, path, old, new, "micro", (3, 4))
    assert {key: r["seconds"] for key, r in done.items()} == {
        (3, old): 100, (3, new): 20, (4, old): 100, (4, new): 20}
    assert calls.read_text().splitlines() == [
        f"{seconds} --preset micro --seed {seed} --out" for seed in (3, 4) for seconds in (95, 15)]
    assert done[3, new]["right"] == {"base": 0.5, "zero": 0.9}  # at temperature 1, no other stage
    assert not ratio._git(folder, "status", "--porcelain")


def test_ratio_goes_on_where_it_was_stopped(repository, tmp_path):
    """Finished runs are not done again. Lines of another pair of commits, another preset or another
    machine do not count, nor does a torn last line."""
    folder, old, new, calls = repository
    path = tmp_path / "runs.jsonl"
    ratio._measure_rounds(folder, path, old, new, "nano", (3,))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["seed"], line["commit"], line["seconds"]) for line in lines] == [
        (3, old, 100), (3, new, 20)]
    assert calls.read_text().splitlines()[0] == "95 --seed 3 --out"  # nano is the default preset
    with open(path, "a") as file:
        for change in ({"old": "abc"}, {"new": "abc"}, {"preset": "micro"}, {"machine": "x"}):
            file.write(json.dumps(lines[1] | {"seed": 4, "seconds": 1} | change) + "\n")
        file.write(json.dumps(lines[0] | {"seed": 4, "seconds": 50}) + "\n")
        file.write('{"seed": 4, "commit":')
    calls.write_text("")
    done = ratio._measure_rounds(folder, path, old, new, "nano", (3, 4))
    assert {key: r["seconds"] for key, r in done.items()} == {
        (3, old): 100, (3, new): 20, (4, old): 50, (4, new): 20}
    assert calls.read_text().splitlines() == ["15 --seed 4 --out"]
    assert json.loads(path.read_text().splitlines()[-1])["seed"] == 4


def test_ratio_is_the_median_of_rounds():
    """By hand: ratios 5, 2 and 4. The ratio of medians would be 5."""
    done = {(seed, commit): {"seconds": x} for seed, pair in enumerate(
        [(600, 120), (300, 150), (480, 120)]) for commit, x in zip("ab", pair)}
    found = ratio._numbers_of(done, "a", "b")
    assert (found["main.speed_ratio"], found["main.speed_ratio.least"],
            found["main.speed_ratio.most"]) == (4, 2, 5)
    assert (found["main.minutes.old"], found["main.minutes.new"]) == (8, 2)
    rows = {key: {"mean": x} for key, x in found.items()}
    lines = ratio.page(rows, {"main.commits": {"0": "b and the older a"}})
    assert lines[0] == ("The main command is 4.00 times as fast (2.00 to 5.00 by round). Commits: "
                        "b and the older a.")
    assert "| main.minutes.old | 8 |" in lines


def test_ratio_compares_accuracies_seed_by_seed():
    """By hand: the new commit b is better by 0.2 and 0.4 in the rounds, and by 0.3 on the seed that
    both have published. The mean is 0.3; the interval is 4.303 standard errors on both sides."""
    stages = dict.fromkeys(ratio.COMPARED, 0.5)
    done = {(3, "a"): {"right": stages}, (3, "b"): {"right": dict.fromkeys(stages, 0.7)},
            (4, "a"): {"right": stages}, (4, "b"): {"right": dict.fromkeys(stages, 0.9)}}
    published = {commit: {key: {"per_seed": {"0": x}} for key in ratio.COMPARED.values()}
                 for commit, x in (("a", 0.6), ("b", 0.9))}
    found = ratio._accuracy_differences(done, "a", "b", published)
    assert found["main.minus_old.r1"] == pytest.approx(0.3)
    assert found["main.minus_old.r1.low"] == pytest.approx(0.3 - 4.3027 * 0.1 / 3**0.5, abs=1e-4)
    assert found["main.minus_old.r1.n"] == 3
    assert len(found) == 16


def test_ratio_says_which_command_failed(repository, tmp_path):
    """A main command that fails leaves no line and no files behind, and its last line is shown. An
    unknown commit is refused."""
    folder, old, new, _ = repository
    (folder / "r1mini.py").write_text("raise SystemExit('no memory')")
    ratio._git(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "x")
    path = tmp_path / "runs.jsonl"
    with pytest.raises(UserError, match="no memory"):
        failing = ratio._git(folder, "rev-parse", "HEAD")
        ratio._measure_rounds(folder, path, failing, new, "nano")
    assert not path.exists()
    with pytest.raises(UserError, match="git archive"):
        ratio._measure_rounds(folder, path, "abcdef1", new, "nano")


def test_ratio_old_commit_exists():
    """The commit that the study compares with is in this repository, unless it is a shallow copy.
    """
    folder = ratio.Path(ratio.r1mini.__file__).parent
    done = subprocess.run(["git", "-C", str(folder), "cat-file", "-e", f"{ratio.OLD}^{{commit}}"],
                          capture_output=True)
    shallow = subprocess.run(["git", "-C", str(folder), "rev-parse", "--is-shallow-repository"],
                             capture_output=True, text=True)
    if shallow.stdout.strip() != "false":
        pytest.skip("not a whole clone")
    assert done.returncode == 0
