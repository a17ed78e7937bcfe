"""The tests of what the console says when something is off."""
import json

import pytest

from engine import doctor
from engine.doctor import advice, on_track
from grpo import RL
from tools import cli

FINE = {"step": 5, "cut_off": 0.0, "dead_groups": 0.1, "accuracy": 0.5, "format": 0.7, "kl": 0.0,
        "entropy": 0.3, "gap_p999": 1e-6, "loads": [[0.9, 1.1], [1.2, 0.8]], "skipped": 0}


@pytest.mark.parametrize("keyword, change", [
    ("cut", {"cut_off": 0.62}), ("dead", {"dead_groups": 0.9}), ("entropy", {"entropy": 0.001}),
    ("kl", {"kl": 2.0}), ("gap", {"gap_p999": 0.1}), ("load", {"loads": [[1, 1], [2, 0.01]]}),
    ("skipped", {"skipped": 1}), ("loss", {"step": 1}), ("stuck", {"accuracy": 0.0, "step": 10}),
    ("form", {"format": 0.99, "accuracy": 0.4})])
def test_each_sentence_comes_with_its_cause(keyword, change):
    """One change, its sentence alone; and none without a change."""
    assert advice(FINE, FINE, RL(), "dev2") == []
    [(said, sentence)] = advice(FINE | change, FINE, RL(), "dev2")
    assert said == keyword and len(sentence) > 30


def test_what_to_try_is_named():
    """The figure and the setting, an ablation's its stage's; too easy is not too hard."""
    [(_, sentence)] = advice(FINE | {"cut_off": 0.62}, FINE, RL(), "dev2_no_format")
    assert "62% of answers are cut off" in sentence and "dev2.max_new_tokens" in sentence
    for accuracy, word in ((0.9, "easy"), (0.1, "hard")):
        change = {"dead_groups": 0.9, "accuracy": accuracy}
        assert word in advice(FINE | change, FINE | change, RL(), "")[0][1]


def test_a_rollout_without_a_sum_is_advised_on_too():
    """Its accuracy is None: neither stuck nor easy nor fallen, and nothing raised."""
    record = FINE | {"step": 20, "accuracy": None, "dead_groups": 0.9, "format": 1.0}
    assert set(dict(advice(record, FINE, RL(), "r1"))) == {"dead"}
    assert set(dict(advice(record, record, RL(), "r1"))) == {"dead"}


def test_entropy_of_a_few_live_groups_is_no_alarm():
    """Where most groups are dead, what is left says nothing of the policy."""
    record = FINE | {"step": 20, "dead_groups": 0.6, "entropy": 0.001}
    assert advice(record, FINE, RL(), "r1") == []


def test_a_supervised_stage_is_watched_for_collapse_alone():
    """Its record has a loss and loads; a dense model's no loads, and the first steps balance."""
    record = {"step": 100, "loss": 0.5, "skipped": 0, "loads": [[4, 0, 0, 0]]}
    assert set(dict(advice(record, record, None, "base"))) == {"load"}
    few = FINE | {"loads": [[4, 0, 0, 0]], "dead_groups": 0.6}  # RL's load is of live groups alone
    assert advice(few, FINE, RL(), "r1") == []
    assert advice(record | {"step": 99}, record, None, "base") == []
    assert advice(record | {"loads": []}, record, None, "student") == []


def test_a_run_is_told_whether_it_is_on_track(tmp_path, monkeypatch):
    """Beside curves made by hand: near the worst seed or above, below, and where nothing is known.
    Each line fits the console."""
    curve = {"pass@1": [["zero", 5, 0.5], ["zero", 10, 0.8]]}
    other = {"pass@1": [["zero", 5, 0.4], ["zero", 10, 0.7]]}
    file = tmp_path / "curves.json"
    file.write_text(json.dumps({"grpo-seed0": curve, "grpo-seed1": other,
                                "no_language_reward-seed0": {"pass@1": [["zero", 5, 0.1]]}}))
    monkeypatch.setattr(doctor, "REFERENCE", file)
    run = cli.resolve("nano", [])
    assert on_track(run, "zero", 5, 0.36) == " on track"
    assert "0.40 to 0.50" in on_track(run, "zero", 5, 0.34)
    assert on_track(run, "zero", 10, 0.9) == " on track"
    assert on_track(run, "zero", 7, 0.9) == on_track(run, "r1", 5, 0.9) == ""
    assert on_track(cli.resolve("micro", []), "zero", 5, 0.4) == ""
    assert all(len(line) <= 100 for line in on_track(run, "zero", 5, 0.0).split("\n"))
    file.write_text("{")
    assert on_track(run, "zero", 5, 0.4) == ""
