"""Tests of tools/bench.py: every number is there, and rates divide by their own time."""
import json
from types import SimpleNamespace

import pytest
import torch

from tools import bench, cli


def test_bench_prints_every_number(capsys, monkeypatch):
    """One round on micro prints rates above 0, a share of the peak below 1, and the parts of a
    step. The advice on bfloat16 comes only where it is much faster."""
    monkeypatch.setattr(bench, "ROUNDS", 1)
    assert cli.main(["bench", "--preset", "micro", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert min(x for key, x in found.items() if not isinstance(x, str)
               and key != "step.reference") > 0  # a difference of two times
    assert 0 < found["train.peak_share"] < 1
    assert min(found[f"step.{part}"] for part in ("sample", "reward", "learn", "whole")) > 0
    assert (found["cache.latent"], found["cache.heads"]) == (4 * 2 * 24, 4 * 2 * 2 * 32)
    assert "times as fast" in bench.console_text({"step.vs_trl": 4.0, "train": 1e5})
    for rate, advised in ((300.0, True), (120.0, False)):
        page = bench.console_text({"gemm": 100.0, "gemm.bfloat16": rate})
        assert ("as fast in bfloat16" in page) == advised


def test_bench_rates_equal_hand_results(monkeypatch):
    """With a clock made by hand, every rate divides its own tokens by its own time, and the
    reference's part is a median of differences by round."""
    by_hand = {"gemm": [2, 2], "bfloat16": [0.5, 0.5], "train": [4, 4], "prefill": [8, 8],
               "learn": [5, 9], "documents": [1, 2]}
    monkeypatch.setattr(bench, "seconds_by_round", lambda calls, device: {
        name: by_hand.get(name, [1, 1]) for name in calls})
    monkeypatch.setattr(bench, "bench_document_step", lambda *_: (
        None, [100, 10, 30]))  # tokens by round; the first round is dropped
    run = cli.resolve_settings("micro", [])
    found = bench.measure_ours(run, torch.device("cpu"), torch.float32)
    assert found["gemm"] == pytest.approx(2048 ** 3 / 1e9)
    assert found["gemm.bfloat16"] == 4 * found["gemm"]
    assert (found["train"], found["prefill"], found["decode"]) == (
        200 * 36 / 4, 64 * 128 / 8, 512 * 64)
    assert (found["step.learn"], found["step.reference"]) == (7, 3)
    assert found["documents"] == 12.5


def test_bench_whole_step_samples_rewards_and_learns(monkeypatch):
    """A whole step samples, rewards and learns once each, in this order. The rewards are the same
    in every process, whatever random numbers it drew before."""
    done, rewards = [], []
    monkeypatch.setattr(bench.sampling, "generate", lambda *_, seed: done.append(
        "sample") or SimpleNamespace(answers=lambda: []))
    monkeypatch.setattr(bench, "Rollout", lambda *parts: done.append("reward") or rewards.append(
        parts[4]))
    monkeypatch.setattr(bench, "improve", lambda model, reference, optimizers, rollout, s, *_: (
        done.append(("learn", s.beta))))
    run = cli.resolve_settings("micro", [])
    model = bench.bench_model(run.model, torch.device("cpu"), torch.float32)
    step = bench.bench_grpo_step(model, run, bench.bench_equal_works(run.model)[1])
    for seed in (1, 2):
        torch.manual_seed(seed)
        step["whole"]()
    assert done == ["sample", "reward", ("learn", run.zero.beta)] * 2
    assert torch.equal(*rewards) and rewards[0].unique().numel() > 1


def test_bench_median_seconds_alternates_and_drops_the_first_round(monkeypatch):
    """Calls run in turn, A B A B. The first round is dropped, and the median of the others
    counts."""
    order, clock = [], iter([9, 9, 1, 10, 5, 20, 2, 30])
    monkeypatch.setattr(bench, "seconds", lambda call, device: call() or next(clock))
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    assert bench.median_seconds(calls, None, 3) == {"a": 2, "b": 20}
    assert order == ["a", "b"] * 4


def test_bench_of_a_command_reads_the_last_line_as_numbers(monkeypatch):
    """run_bench() starts `bench --json` on the folder's preset and device and reads its last line.
    A failed command becomes an error with its last line."""
    commands = []

    def run(command, **_):
        commands.append(command)
        return SimpleNamespace(returncode=len(commands) - 1, stdout='words\n{"train": 5}\n',
                               stderr="words\nno memory\n")
    monkeypatch.setattr(bench.subprocess, "run", run)
    folder = SimpleNamespace(run=SimpleNamespace(preset="micro", device="cpu"))
    assert bench.run_bench(folder, "--processes", "2") == {"train": 5}
    assert commands[0][2:] == ["bench", "--preset", "micro", "--json", "--device", "cpu",
                               "--processes", "2"]
    with pytest.raises(bench.UserError, match="no memory"):
        bench.run_bench(folder)


def test_bench_from_needs_against(capsys):
    """Without --against a checkpoint would change nothing, so --from is refused."""
    assert cli.main(["bench", "--preset", "micro", "--from", "no.pt"]) == 2
    assert "--from is for bench --against" in capsys.readouterr().err
