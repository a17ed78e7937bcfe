"""Tests of studies/speed.py: minutes, shares of time and growth, from numbers made by hand."""
import json
from types import SimpleNamespace

import pytest
import torch

from engine.errors import UserError
from studies import speed
from tools import bench
from tools.cli import resolve_settings


def write(run, threads):
    """Writes a run of two steps of base and four of Zero, with pass@1 of 0.9 on dev after Zero's
    second step."""
    machine = {"machine": "a processor, 2 cores", "threads": threads, "processes": 1}
    times = [machine] + [{"stage": stage, "step": step, "seconds": seconds, "peak_gib": 1.0}
                         for stage, step, seconds in (
                             ("base", 1, 30), ("base", 2, 30), ("test_base", 0, 60),
                             ("zero", 1, 12), ("zero", 2, 12), ("zero", 3, 12), ("zero", 4, 12))]
    dev = [{"kind": "dev", "stage": "zero", "step": step, "pass@1": x}
           for step, x in ((0, 0.1), (2, 0.9), (4, 0.9))]
    for name, records in (("timing", times), ("log", [{"kind": "config"}, *dev])):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_speed_minutes_equal_hand_count(tmp_path):
    """By hand: the total includes the tests, the minutes to 85% are training alone. A run that
    shared its machine has no minutes."""
    write(tmp_path, 2)
    with open(tmp_path / "timing.jsonl", "a") as file:  # a command with nothing left to do
        file.write(json.dumps({"machine": "a processor, 2 cores", "threads": 1}) + "\n")
    found = speed._minutes(tmp_path)
    assert found["minutes.total"] == pytest.approx((60 + 60 + 48) / 60)
    assert found["minutes.to_85"] == pytest.approx((60 + 24) / 60)
    with open(tmp_path / "timing.jsonl", "a") as file:  # a command that took a step
        file.write(json.dumps({"stage": "zero", "step": 5, "seconds": 1, "peak_gib": 1.0}) + "\n")
    with pytest.raises(UserError, match="alone"):
        speed._minutes(tmp_path)
    write(tmp_path, 1)
    with pytest.raises(UserError, match="alone"):
        speed._minutes(tmp_path)


def test_speed_shares_of_time_add_up_to_one():
    """Shares of time add up to one. Products are in training and decoding, fused attention is in
    training only."""
    folder = SimpleNamespace(run=resolve_settings("micro", []), options=SimpleNamespace(
        device=torch.device("cpu"), dtype=torch.float32))
    found = speed._share_of_time(folder)
    for name in ("train", "decode"):
        shares = {key: x for key, x in found.items() if key.startswith(f"share.{name}.")}
        assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0
        assert shares[f"share.{name}.products"] > 0.01
    assert found["share.train.fused_attention"] > 0.01 > found["share.decode.fused_attention"]


def test_speed_growth_equals_hand_count(monkeypatch):
    """With a clock made by hand, a batch eight times as large takes nine times as long, and one
    four times as large again takes five times as long. Behind eight times the context an answer
    takes three times as long."""
    monkeypatch.setattr(bench, "bench_model", lambda *_: None)
    monkeypatch.setattr(bench, "bench_train_step", lambda model, rows, limit: rows)
    clock = {56: 1.0, 448: 9.0, 1792: 45.0}
    monkeypatch.setattr(bench, "median_seconds", lambda work, *_: {
        name: clock[rows] for name, rows in work.items()})
    rate = {128: 30, 1024: 10}
    monkeypatch.setattr(bench, "decoding_rate", lambda model, context, n: n * rate[context])
    options = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    found = speed._growth(SimpleNamespace(run=resolve_settings("micro", []), options=options))
    assert found["train.2k"] == 56 * 36 and found["train.64k"] == pytest.approx(1792 * 36 / 45)
    assert found["train.spread"] == pytest.approx(45 / 32)
    for name, n in (("decode.one", 1), ("decode", speed.PROMPTS)):
        assert found[f"{name}.128"] == 30 * n and found[f"{name}.1024_to_128"] == pytest.approx(3)


def test_speed_page_says_which_limits_are_met():
    """The page says yes for a number within its limit, no for one beyond it or missing, and lists
    the settings."""
    rows = {key: {"mean": x, "std": 0.0, "per_seed": {"0": x}} for key, x in (
        ("minutes.total", 9.0), ("step.vs_trl", 3.0), ("step.vs_trl.least", 2.5),
        ("step.vs_trl.most", 3.5))}
    text = "\n".join(speed.page(rows, {"sample.ours.setting": {"0": "float32"}}))
    assert "- Yes: `minutes.total` at most 10 (9)." in text
    assert "- No: `step.vs_trl` at least 4 (3; by round 2.5 to 3.5)." in text
    assert "- No: `minutes.to_85` at most 4 (nan)." in text
    assert "`sample.ours.setting`: float32." in text
