"""Tests of tools/bench.py: every number is there, and rates divide by their own time."""
import json
from types import SimpleNamespace

import pytest
import torch

import tasks
from engine.sampling import generate
from tools import bench, cli
from tools.cost import count_parameters
from tools.flops import flops_per_token


def test_bench_prints_every_number(capsys, monkeypatch):
    """One round on micro prints rates above 0, a share of the peak below 1, and the parts of a
    step. The advice on bfloat16 comes only where it is much faster."""
    for name, value in (("ROUNDS", 1), ("LONG", 130), ("LONG_PROMPTS", 4), ("LONG_NEW", 3)):
        monkeypatch.setattr(bench, name, value)
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
               "learn": [5, 9], "documents": [1, 2], "copy": [2, 2]}
    monkeypatch.setattr(bench, "seconds_by_round", lambda calls, device: {
        name: by_hand.get(name, [1, 1]) for name in calls})
    monkeypatch.setattr(bench, "bench_document_step", lambda *_: (
        None, [100, 10, 30]))  # tokens by round; the first round is dropped
    monkeypatch.setattr(bench, "_long_decoding", lambda *_: (None, [9000.0, 500.0, 700.0]))
    run = cli.resolve_settings("micro", [])
    found = bench.measure_ours(run, torch.device("cpu"), torch.float32)
    assert found["gemm"] == pytest.approx(2048 ** 3 / 1e9)
    assert found["gemm.bfloat16"] == 4 * found["gemm"]
    assert (found["train"], found["prefill"], found["decode"]) == (
        200 * 36 / 4, 64 * 128 / 8, 512 * 64)
    assert (found["step.learn"], found["step.reference"]) == (7, 3)
    assert found["documents"] == 12.5
    assert found["decode.long"] == 600
    operations, bytes_read = found["decode.long.operations"], found["decode.long.bytes"]
    assert found["decode.long.gemm_share"] == pytest.approx(600 * operations / 2048 ** 3)
    assert found["decode.long.bandwidth_share"] == pytest.approx(600 * bytes_read / 2 ** 28)
    assert operations == flops_per_token(run.model, "write", seen=1040)
    # The cache of 1,040 tokens, and a 64th of the weights without the embedding.
    parameters, _ = count_parameters(run.model)
    weights = parameters - run.model.vocab_size * run.model.dim
    assert bytes_read == 1040 * found["cache.latent"] + 4 * weights / 64
    two = bench._decoding_bytes(run.model, 1040, 64, 2, found["cache.latent"])
    assert two - bytes_read == 4 * weights / 64  # each process reads all weights


def test_bench_decoding_operations_equal_torchs_count():
    """The operations of a new token equal what torch counts in a real decoding step."""
    from torch.utils.flop_counter import FlopCounterMode
    config = cli.resolve_settings("micro", ["model.n_dense_layers=2"]).model  # torch does not
    model = bench.bench_model(config, torch.device("cpu"), torch.float32).eval()  # count experts

    def counted(context):
        """Operations of the second token after `context` tokens: its cache has one more."""
        totals = []
        for new in (1, 2):
            with FlopCounterMode(display=False) as counter:
                generate(model, [[5] * context], new, -1, tasks.PAD_ID)
            totals.append(counter.get_total_flops())
        return totals[1] - totals[0]

    for context in (7, 100):
        assert counted(context) == flops_per_token(config, "write", seen=context + 1)


def test_bench_decoding_rate_leaves_out_the_prompt(monkeypatch):
    """By a clock made by hand: the time from the first token to the last, of all prompts."""
    times = iter([10.0, 12.0, 14.0, 20.0])
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    config = cli.resolve_settings("micro", []).model
    model = bench.bench_model(config, torch.device("cpu"), torch.float32)
    assert bench.decoding_rate(model, 5, 2, new=3) == 2 * 3 / 10


def test_bench_says_what_a_long_context_costs():
    """The sentence has the operations and the bytes of a token, and the shares of the limits."""
    page = bench.console_text({
        "decode.long": 4469.0, "decode.long.operations": 2453952, "decode.long.bytes": 646044.0,
        "decode.long.gemm_share": 0.069, "decode.long.bandwidth_share": 0.093,
        "documents.same_rows.loss_difference": 2e-6, "cache.heads": 3072})
    assert ("Behind 1,024 tokens a new token takes 2.5 million operations and reads at least "
            "0.65 MB. At 4,469 tokens a second this is 7% of the operations and 9% of the bytes a "
            "second") in page
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in page.splitlines()}
    assert lines["decode.long.operations"] == "2,453,952 operations per token"
    assert lines["decode.long.bytes"] == "646,044 bytes per token"
    assert lines["decode.long.gemm_share"] == "0.069 of gemm"
    assert lines["decode.long.bandwidth_share"] == "0.093 of copy"
    assert lines["documents.same_rows.loss_difference"] == "2.0e-06 nats"
    assert lines["cache.heads"] == "3,072 bytes per token"


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
    assert cli.main(["bench", "--preset", "micro", "--part", "rl"]) == 2
    assert "--part is for bench --against" in capsys.readouterr().err
