"""Tests of engine/doctor.py: what the console says when training goes wrong."""
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
def test_doctor_names_one_cause_at_a_time(keyword, change):
    """A healthy record gives no advice, and a record with one fault gives the advice for that fault
    only."""
    assert advice(FINE, FINE, RL(), "dev2") == []
    [(name, sentence)] = advice(FINE | change, FINE, RL(), "dev2")
    assert name == keyword and len(sentence) > 30


def test_doctor_names_the_number_and_the_setting():
    """The advice names the number and the setting to change, for an ablation that of its stage. It
    tells problems that are too easy from those that are too hard."""
    [(_, sentence)] = advice(FINE | {"cut_off": 0.62}, FINE, RL(), "dev2_no_format")
    assert "62% of the answers are cut off" in sentence and "dev2.max_new_tokens" in sentence
    for accuracy, word in ((0.9, "easy"), (0.1, "hard")):
        change = {"dead_groups": 0.9, "accuracy": accuracy}
        assert word in advice(FINE | change, FINE | change, RL(), "")[0][1]


def test_doctor_accepts_a_rollout_without_sums():
    """An accuracy of None is no fault: the record is called neither stuck nor too easy nor too
    hard."""
    record = FINE | {"step": 20, "accuracy": None, "dead_groups": 0.9, "format": 1.0}
    assert set(dict(advice(record, FINE, RL(), "r1"))) == {"dead"}
    assert set(dict(advice(record, record, RL(), "r1"))) == {"dead"}


def test_doctor_ignores_entropy_of_few_live_groups():
    """Low entropy gives no advice where most groups are dead: the few live ones do not represent
    the policy."""
    record = FINE | {"step": 20, "dead_groups": 0.6, "entropy": 0.001}
    assert advice(record, FINE, RL(), "r1") == []


def test_doctor_watches_router_collapse_in_supervised_stages():
    """In a supervised stage an unbalanced router gives advice from step 100 on. A dense model, RL's
    few live groups and the first steps give none."""
    record = {"step": 100, "loss": 0.5, "skipped": 0, "loads": [[4, 0, 0, 0]]}
    assert set(dict(advice(record, record, None, "base"))) == {"load"}
    few = FINE | {"loads": [[4, 0, 0, 0]], "dead_groups": 0.6}  # RL counts live groups
    assert advice(few, FINE, RL(), "r1") == []
    assert advice(record | {"step": 99}, record, None, "base") == []
    assert advice(record | {"loads": []}, record, None, "student") == []


def test_doctor_compares_dev_scores_with_reference_curves(tmp_path, monkeypatch):
    """Beside reference curves made by hand, a score near or above the lowest seed's is on track,
    and a lower one is told the range. Unknown steps, stages and presets, and a damaged file, give
    no sentence. Every line fits 100 columns."""
    curve = {"pass@1": [["zero", 5, 0.5], ["zero", 10, 0.8]]}
    other = {"pass@1": [["zero", 5, 0.4], ["zero", 10, 0.7]]}
    file = tmp_path / "curves.json"
    file.write_text(json.dumps({"grpo-seed0": curve, "grpo-seed1": other,
                                "no_language_reward-seed0": {"pass@1": [["zero", 5, 0.1]]}}))
    monkeypatch.setattr(doctor, "REFERENCE", file)
    run = cli.resolve_settings("nano", [])
    assert on_track(run, "zero", 5, 0.36) == " on track"
    assert "0.40 to 0.50" in on_track(run, "zero", 5, 0.34)
    assert on_track(run, "zero", 10, 0.9) == " on track"
    assert on_track(run, "zero", 7, 0.9) == on_track(run, "r1", 5, 0.9) == ""
    assert on_track(cli.resolve_settings("micro", []), "zero", 5, 0.4) == ""
    assert all(len(line) <= 100 for line in on_track(run, "zero", 5, 0.0).split("\n"))
    file.write_text("{")
    assert on_track(run, "zero", 5, 0.4) == ""


def test_doctor_names_the_reward_that_is_to_blame():
    """Groups without a difference: the problems' level, unless right answers earn nothing. A form
    that spreads while accuracy falls: the format reward, unless length costs."""
    dead, form_only = FINE | {"dead_groups": 0.9}, RL(accuracy_weight=0.0)
    assert "zero.levels" in dict(advice(dead, FINE, RL(), "zero"))["dead"]
    assert "zero.accuracy_weight" in dict(advice(dead, FINE, form_only, "zero"))["dead"]
    formal = FINE | {"format": FINE["format"] + 0.2, "accuracy": FINE["accuracy"] - 0.2}
    assert "zero.format_weight" in dict(advice(formal, FINE, RL(), "zero"))["form"]
    assert "zero.overlong" in dict(advice(formal, FINE, RL(overlong=9), "zero"))["form"]
