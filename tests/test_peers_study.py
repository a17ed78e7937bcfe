"""Tests of studies/peers.py: comparisons with transformers and TRL, by a clock made by hand."""
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

import tasks
from engine import sampling
from studies import peers
from tests.helpers import micro_run
from tools import bench, cli
from tools.cli import resolve_settings


@pytest.fixture(scope="module")
def zero():
    """The path of the zero checkpoint of a finished run."""
    return str(micro_run() / "zero.pt")


def test_peers_try_ways_finds_the_fastest(monkeypatch):
    """By a clock made by hand: bfloat16 on two threads is fastest, and in float32 one thread is.
    The number of threads is restored."""
    clock = {(torch.float32, 1): 3, (torch.float32, 2): 4, (torch.bfloat16, 1): 2,
             (torch.bfloat16, 2): 1}
    monkeypatch.setattr(bench, "seconds", lambda work, _: clock[work()])
    before = torch.get_num_threads()
    best = peers._try_ways({(d, n): peers._with_threads(n, lambda d=d: (d, torch.get_num_threads()))
                        for d, n in clock}, None)
    assert best == [(torch.bfloat16, 2), (torch.float32, 1)] and torch.get_num_threads() == before


def test_peers_ratio_is_the_median_of_rounds():
    """By hand: the best way counts, and a ratio is the median of the rounds' ratios, not the ratio
    of medians."""
    ours, exact, theirs = (torch.bfloat16, 1), (torch.float32, 1), (torch.float32, 2)
    pairs = [(ours, theirs, [1, 1, 1], [3, 4, 9]), (exact, theirs, [1, 4, 3], [3, 4, 9])]
    found = peers._comparison("step", "trl", pairs)
    assert (found["step.ours"], found["step.trl"], found["step.vs_trl"]) == (1, 4, 4)
    ends = [found["step.float32.vs_trl" + end] for end in ("", ".least", ".most")]
    assert ends == [3, 1, 3]  # of 3, 1, 3; medians would say 4 / 3
    assert found["step.ours.setting"] == "bfloat16, processes x threads 1 x 1"
    found = peers._comparison("train", "transformers", pairs, tokens=100)
    assert (found["train.ours"], found["train.transformers"]) == (100, 25)


def test_peers_transformers_rates_equal_hand_results(monkeypatch):
    """By a clock made by hand: which calls are timed, of which sizes. A rate divides the tokens
    that this side wrote in this round."""
    clock = {("train", torch.float32): 3.0, ("train", torch.bfloat16): 2.0,
             ("decode", torch.float32): 4.0, ("decode", torch.bfloat16): 5.0,
             ("their train", torch.float32): 6.0, ("their train", torch.bfloat16): 7.0,
             ("their decode", torch.float32): 16.0, ("their decode", torch.bfloat16): 8.0}
    now, calls = [], {"decode": 0, "their decode": 0}

    def timed(key, dtype, tokens=0):
        def call():
            now[:] = [clock[key, dtype]]
            if tokens:
                calls[key] += 1  # trials and the dropped round write 1
                return tokens if calls[key] > {"decode": 15, "their decode": 16}[key] else 1
        return call

    def seconds(work, _):
        work()
        return now[0]
    monkeypatch.setattr(peers, "bench_model", lambda config, device, dtype, weights=None: dtype)
    monkeypatch.setattr(peers, "_their_model", lambda *_: torch.nn.Module())
    monkeypatch.setattr(peers, "bench_train_step", lambda dtype: timed("train", dtype))
    monkeypatch.setattr(peers, "_their_train_step",
                        lambda model, dtype: timed("their train", dtype))
    monkeypatch.setattr(peers, "bench_sampling", lambda dtype, work: timed("decode", dtype, 1000))
    monkeypatch.setattr(peers, "_their_sampled", lambda model, dtype, work: timed(
        "their decode", dtype, 500))
    monkeypatch.setattr(peers, "_their_ways", lambda: [(dtype, 1) for dtype in peers.DTYPES])
    monkeypatch.setattr(bench, "seconds", seconds)
    found = peers._compare_training(None, torch.device("cpu"), 3)
    rows = bench.ROWS * bench.LENGTH
    assert (found["train.ours"], found["train.transformers"]) == (rows / 2, rows / 6)
    assert (found["train.vs_transformers"], found["train.float32.vs_transformers"]) == (3, 2)
    found = peers._compare_sampling(None, torch.device("cpu"), bench.Work([], 0, 9), 3, 6)
    assert found["sample.ours"] == pytest.approx(1000 / 4)
    assert found["sample.transformers"] == pytest.approx(500 / 8)
    for end in ("", ".least", ".most"):  # all rounds are equal
        assert found["sample.vs_transformers" + end] == pytest.approx(4)
        assert found["sample.float32.vs_transformers" + end] == pytest.approx(8)
    assert found["sample.ours.setting"].startswith("float32")
    assert found["sample.transformers.setting"].startswith("bfloat16")
    found = peers._compare_sampling(None, torch.device("cpu"), bench.Work([], 0), 3, 6)
    assert "sample.even.ours" in found


def test_peers_tokens_count_up_to_the_end_of_an_answer():
    """Of transformers' answers, by hand, tokens count up to and with the end. Of ours, as many
    count as the answers have."""
    class Other(torch.nn.Module):
        """A model with two fixed answers."""
        device, generation_config = torch.device("cpu"), SimpleNamespace()

        def generate(self, input_ids, attention_mask, **_):
            """Checks that a prompt of one token is padded on the left."""
            assert attention_mask.tolist() == [[0, 1], [1, 1]]
            assert self.generation_config.eos_token_id == 9
            return torch.cat((input_ids, torch.tensor([[5, 9, 0], [5, 6, 7]])), 1)
    work = bench.Work([[3], [4, 4]], 3, 9)
    assert peers._their_sampled(Other(), torch.float32, work)() == 5
    config = resolve_settings("micro", []).model
    model = bench.bench_model(config, torch.device("cpu"), torch.float32)
    work = bench.Work([[3], [4, 4]] * 30, 12, 7)
    written = sampling.generate(model, work.prompts, 12, 7, tasks.PAD_ID, seed=0)
    assert bench.bench_sampling(model, work)() == sum(map(len, written.answers()))


def test_peers_both_sides_have_the_same_weights():
    """transformers' logits on the questions of a rollout equal ours, and both sides end answers at
    the same token."""
    pytest.importorskip("transformers")
    run = resolve_settings("micro", [])
    weights = bench.bench_model(run.model, "cpu", torch.float32).state_dict()
    weights["head.weight"] = torch.randn_like(weights["head.weight"])  # unlike those of make()
    plain = dataclasses.replace(run.model, n_mtp_layers=0)
    work = bench.bench_zero_work(run, weights)
    ours = bench.bench_model(plain, torch.device("cpu"), torch.float32, weights).eval()
    tokens = torch.tensor([work.prompts[0]])
    with torch.no_grad():
        theirs = peers._their_model(plain, torch.device("cpu"), weights).eval()(tokens).logits
        torch.testing.assert_close(ours(tokens).logits, theirs, atol=1e-4, rtol=1e-4)
    assert len(work.prompts) == bench.QUESTIONS * bench.GROUP and work.key_part == ""
    assert work.end_id == tasks.END_ID and work.prompts[0] == work.prompts[bench.GROUP - 1]


@pytest.mark.slow
@pytest.mark.parametrize("real", [False, True])
def test_peers_every_comparison_on_micro(real):
    """One round of every comparison on micro gives all numbers, above 0."""
    for name in ("transformers", "trl", "datasets"):
        pytest.importorskip(name)
    run = resolve_settings("micro", [])
    weights = bench.bench_model(run.model, "cpu", torch.float32).state_dict() if real else None
    found = peers.against(run, torch.device("cpu"), weights, 1)
    even = "" if real else ".even"
    for name, peer in (("train", "transformers"), (f"sample{even}", "transformers"),
                       (f"step{even}", "trl"))[real:]:
        assert min(found[f"{name}.{end}"] for end in ("ours", peer, f"vs_{peer}")) > 0
        assert found[f"{name}.float32.vs_{peer}.least"] > 0


@pytest.mark.parametrize("best", [torch.float32, torch.bfloat16])
def test_peers_trl_and_ours_take_turns(monkeypatch, best):
    """Our step follows each of TRL's, on our threads, and the first pair does not count. Where TRL
    is best in bfloat16, ratios are of steps that ran together."""
    order, threads = [], torch.get_num_threads()
    # Seconds of our steps beside TRL's best way, then beside TRL in float32.
    clock = iter([9, 2, 9, 4, 9, 5] + [7, 2, 7, 8, 7, 10])

    def steps(model, run, work, dtype, rounds, between=lambda: None):
        for _ in range(rounds + 1):
            order.append((dtype, torch.get_num_threads()))
            between()
        return [10.0 if dtype == best else 20.0] * rounds

    def seconds(work, device):
        order.append(("ours", torch.get_num_threads()))
        return next(clock)
    monkeypatch.setattr(peers, "_their_model", lambda *_: torch.nn.Module())
    monkeypatch.setattr(peers, "_their_ways", lambda: [(d, threads + 1) for d in peers.DTYPES])
    monkeypatch.setattr(peers, "_their_grpo_steps", steps)
    monkeypatch.setattr(peers, "bench_grpo_step", lambda *_: {"whole": lambda: None})
    monkeypatch.setattr(peers, "_try_ways", lambda works, device, trial: [
        (torch.bfloat16, threads), (torch.float32, threads)])
    monkeypatch.setattr(peers, "seconds", seconds)
    run = resolve_settings("micro", [])
    found = peers._compare_grpo_steps(run.model, run, torch.device("cpu"), bench.Work([], 0, 9), 2)
    our_turn = [("ours", threads)] * 2
    expected = [[(dtype, threads + 1), *our_turn] * 3
                for dtype in dict.fromkeys((best, torch.float32))]
    assert order == [(d, threads + 1) for d in peers.DTYPES for _ in range(3)] + sum(expected, [])
    assert (found["step.ours"], found["step.trl"]) == (9, 10)
    ends = [found["step.float32.vs_trl" + end] for end in ("", ".least", ".most")]
    # 10 s beside 4 s and 5 s, or 20 s beside 8 s and 10 s.
    assert ends == pytest.approx([2.25, 2, 2.5])
    assert threads == torch.get_num_threads()


def test_peers_main_compares_random_weights_or_a_checkpoint(zero, monkeypatch, capsys):
    """`bench --against` adds the comparison to our own numbers. With --from, only rollouts and
    steps by the checkpoint's weights are compared."""
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    calls = []
    monkeypatch.setattr(bench, "measure_ours", lambda *_: {"train": 5.0})
    monkeypatch.setattr(peers, "against", lambda run, device, weights=None: calls.append(
        weights) or {"step.vs_trl": 4.0})
    words = ["bench", "--preset", "micro", "--against", "--json"]
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert calls == [None] and found["train"] == 5.0 and found["step.vs_trl"] == 4.0
    assert cli.main([*words, "--from", zero]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "head.weight" in calls[1] and "train" not in found and found["step.vs_trl"] == 4.0


def test_peers_without_trl_is_one_line(monkeypatch, capsys):
    """Where transformers or TRL is not installed, bench --against is refused by one line."""
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", "--preset", "micro", "--against"]) == 2
    error = capsys.readouterr().err
    assert "pip install '.[peers]'" in error and error.count("\n") == 1


def test_peers_page_shows_every_number():
    """The page is one table with a row for every number."""
    rows = {key: {"mean": x} for key, x in (("step.vs_trl", 4.25), ("train.ours", 123456.0))}
    assert peers.page(rows, {}) == ["| key | value |", "|---|---|", "| step.vs_trl | 4.25 |",
                                    "| train.ours | 1.235e+05 |"]
