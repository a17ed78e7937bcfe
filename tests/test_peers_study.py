"""Tests of studies/peers.py: comparisons with transformers and TRL, by a clock made by hand."""
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import moe
import r1mini
import tasks
from engine import checkpoint, optim, sampling
from studies import peers
from tests.helpers import MICRO, equal_states
from tools import bench, cli
from tools.cli import resolve_settings


@pytest.fixture
def zero(tmp_path):
    """The path of a run's zero.pt, with base.pt beside it: two models of random weights."""
    for name, seed in (("base", 0), ("zero", 1)):
        torch.manual_seed(seed)
        checkpoint.save(tmp_path / f"{name}.pt", moe.Transformer(MICRO))
    return str(tmp_path / "zero.pt")


def test_peers_try_setups_finds_the_fastest(monkeypatch):
    """By a clock made by hand: bfloat16 on two threads is fastest, and in float32 one thread is.
    The number of threads is restored."""
    clock = {(torch.float32, 1): 3, (torch.float32, 2): 4, (torch.bfloat16, 1): 2,
             (torch.bfloat16, 2): 1}
    monkeypatch.setattr(bench, "seconds", lambda work, _: clock[work()])
    before = torch.get_num_threads()
    works = {(d, n): peers.with_threads(n, lambda d=d: (d, torch.get_num_threads()))
             for d, n in clock}
    best = peers._try_setups(works, None)
    assert best == [(torch.bfloat16, 2), (torch.float32, 1)] and torch.get_num_threads() == before


def test_peers_ratio_is_the_median_of_rounds():
    """By hand: the best setup counts, and a ratio is the median of the rounds' ratios, not the
    ratio of medians."""
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
    monkeypatch.setattr(peers, "their_model", lambda *_: torch.nn.Module())
    monkeypatch.setattr(peers, "bench_train_step", lambda dtype: timed("train", dtype))
    monkeypatch.setattr(peers, "_their_train_step",
                        lambda model, dtype: timed("their train", dtype))
    monkeypatch.setattr(peers, "bench_sampling", lambda dtype, work: timed("decode", dtype, 1000))
    monkeypatch.setattr(peers, "_their_sampled", lambda model, dtype, work: timed(
        "their decode", dtype, 500))
    monkeypatch.setattr(peers, "_their_setups", lambda: [(dtype, 1) for dtype in peers.DTYPES])
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


def test_peers_losses_on_documents_agree():
    """On the same packed rows transformers' loss equals ours, though theirs has another attention,
    another mask and several passes. Padded as a Trainer pads, it is the same loss."""
    pytest.importorskip("transformers")
    run = resolve_settings("micro", ["base.documents=80"])
    config = dataclasses.replace(run.model, n_mtp_layers=0)
    weights = bench.bench_model(config, "cpu", torch.float32).state_dict()
    for name, x in weights.items():  # far from uniform, so that a wrong mask shows
        weights[name] = x * 4 if x.dim() > 1 else x
    cpu = torch.device("cpu")
    ours = bench.bench_model(config, cpu, torch.float32, weights)
    theirs = peers.their_model(config, cpu, weights)
    for documents in peers._base_documents(run, 2):
        for row_tokens in (run.base.row_tokens, 60):  # in short rows many have one document
            assert len(documents) == 80
            our_loss, their_loss = peers._losses(ours, theirs, documents, row_tokens)
            assert their_loss == pytest.approx(our_loss, rel=1e-5)
        with torch.no_grad():
            padded = sum(float(theirs(**arguments).loss)
                         for arguments in peers._their_passes(theirs, documents))
            unmasked = 0.0  # each document of a row sees those before it
            for arguments in peers._their_passes(theirs, documents, 128):
                arguments["attention_mask"] = (arguments["input_ids"] != tasks.PAD_ID).long()
                unmasked += float(theirs(**arguments).loss)
        assert padded == pytest.approx(our_loss, rel=1e-5)
        assert abs(unmasked - our_loss) > 1e-3


def test_peers_both_sides_train_on_the_same_documents():
    """A step of ours is one step of r1mini.train with AdamW on the documents that the base draws
    itself. A step of theirs is on the same documents, and lowers the loss."""
    pytest.importorskip("transformers")
    run = resolve_settings("micro", ["base.documents=6"])
    config, cpu = dataclasses.replace(run.model, n_mtp_layers=0), torch.device("cpu")
    steps = peers._base_documents(run, 2)
    model, by_hand = (bench.bench_model(config, cpu, torch.float32) for _ in range(2))
    our_step = peers._our_document_step(model, steps, run.base)
    tokens = [our_step() for _ in range(3)]  # after the last step comes the first one again
    s = dataclasses.replace(run.base, steps=10 ** 9, muon_lr=0.0)
    records = r1mini.train(by_hand, s, lambda rng: tasks.make_document(rng, run.corpus), run.seed)
    expected = [next(records)[0]["tokens"] for _ in range(2)]
    assert tokens == [*expected, expected[0]]
    assert len(optim.make_optimizers(model, 1.0, s.muon_lr)) == 1

    theirs = peers.their_model(config, cpu)
    before = peers._losses(model, theirs, steps[0], 128)[1]
    their_step = peers._their_document_step(theirs, steps, run.base, 128)
    assert [their_step() for _ in range(3)] == tokens
    assert peers._losses(model, theirs, steps[0], 128)[1] < before


def test_peers_passes_hold_every_token_once():
    """Theirs gets each document once: packed in our rows, or one a row, sorted by length, in passes
    of 16. Only answers have labels."""
    run = resolve_settings("micro", ["base.documents=80"])
    documents = peers._base_documents(run, 1)[0]
    model = SimpleNamespace(device=torch.device("cpu"))
    count = sum(len(d.tokens) for d in documents)
    padded = peers._their_passes(model, documents)
    assert [len(arguments["input_ids"]) for arguments in padded] == [16] * 5
    lengths = [arguments["attention_mask"].sum(1) for arguments in padded]
    assert torch.cat(lengths).tolist() == sorted(len(d.tokens) for d in documents)
    packed = peers._their_passes(model, documents, 128)
    rows = [row.tokens for row in r1mini.pack(documents, 128)]
    found = [ids.tolist() for arguments in packed for ids in arguments["input_ids"]]
    assert sorted(ids[:len(row)] for ids, row in zip(found, sorted(rows, key=len))) == sorted(rows)
    for passes in (padded, packed):
        labels = torch.cat([arguments["labels"].flatten() for arguments in passes])
        assert int((labels != -100).sum()) == r1mini.count_targets(documents)
        assert passes[0]["num_items_in_batch"] == r1mini.count_targets(documents)
    assert sum(map(len, rows)) == count


def test_peers_documents_are_compared_in_float32_alone(monkeypatch):
    """By a clock made by hand: ours beside the same rows, and beside padded passes. There is one
    ratio of each, since both sides compute in float32."""
    monkeypatch.setattr(peers, "bench_model", lambda config, device, dtype: dtype)
    monkeypatch.setattr(peers, "their_model", lambda *_: None)
    monkeypatch.setattr(peers, "_our_document_step", lambda dtype, steps, s: lambda: (2.0, 100))
    monkeypatch.setattr(peers, "_their_document_step", lambda model, steps, s, row_tokens: (
        lambda: (3.0 if row_tokens else 5.0, 100)))
    monkeypatch.setattr(peers, "_losses", lambda *_: (2.5, 2.25))
    now = []

    def counted(seconds_and_tokens):
        now[:] = [seconds_and_tokens[0]]
        return seconds_and_tokens[1]

    def compare(name, ours_of, theirs_of, *rest):
        def timed(make):
            return lambda dtype: lambda: counted(make(dtype)())
        return original(name, timed(ours_of), timed(theirs_of), *rest)
    original = peers._compare_with_transformers
    monkeypatch.setattr(peers, "_compare_with_transformers", compare)
    monkeypatch.setattr(bench, "seconds", lambda work, _: (work(), now[0])[1])
    run = resolve_settings("micro", [])
    found = peers._compare_documents(run.model, run, torch.device("cpu"), 3, 1)
    assert found["documents.ours"] == 50 and found["documents.transformers"] == 20
    assert found["documents.vs_transformers"] == 2.5
    assert found["documents.same_rows.vs_transformers"] == 1.5
    assert found["documents.same_rows.loss_difference"] == 0.25
    assert not any("documents" in key and "float32" in key for key in found)


def test_peers_tables_put_real_work_first():
    """Real work is the first table and work of one shape the second. What was not measured is left
    out. RL that did not reach 85% says so."""
    numbers = {
        "documents.transformers.setting": "", "documents.ours": 2e4, "documents.transformers": 1e4,
        "documents.vs_transformers": 2.0, "documents.vs_transformers.least": 1.5,
        "documents.vs_transformers.most": 2.5, "rl_to_85.trl.setting": "", "rl_to_85.ours": 41.0,
        "rl_to_85.trl.result": "not reached within ten minutes (60% then)",
        "rl_to_85.vs_trl.at_least": 14.6, "step.even.trl.setting": "", "step.even.ours": 1.0,
        "step.even.trl": 3.0, "step.even.vs_trl": 3.0, "step.even.float32.vs_trl": 2.5}
    lines = peers.comparison_tables(numbers)
    rows = [line for line in lines if line.startswith("| ") and "ours" not in line]
    assert rows == [
        "| training, padded as a Trainer pads (transformers) | 20,000 tokens/s | 10,000 tokens/s | "
        "2.00 | 1.50 | 2.50 |  |",
        "| RL to 85% on dev (TRL) | 41.00 s | not reached within ten minutes (60% then) | "
        "at least 14.60 |  |  |  |",
        "| a GRPO step, answers of one length (TRL) | 1.00 s | 3.00 s | 3.00 |  |  | 2.50 |"]
    first, second = peers.COMPARED
    assert lines.index(first) < lines.index(rows[1]) < lines.index(second) < lines.index(rows[2])
    assert peers.comparison_tables({}) == []


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
        theirs = peers.their_model(plain, torch.device("cpu"), weights).eval()(tokens).logits
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
    weights = bench.bench_model(run.model, "cpu", torch.float32).state_dict()
    parts = ("zero",) if real else ("documents", "shape")
    found = peers.against(run, torch.device("cpu"), parts, weights, rounds=1)
    if real:
        names = {"sample": "transformers", "step": "trl"}
    else:
        names = {"documents": "transformers", "documents.same_rows": "transformers",
                 "train": "transformers", "sample.even": "transformers", "step.even": "trl"}
    for name, peer in names.items():
        assert min(found[f"{name}.{end}"] for end in ("ours", peer, f"vs_{peer}")) > 0
        least = f"vs_{peer}.least" if "documents" in name else f"float32.vs_{peer}.least"
        assert found[f"{name}.{least}"] > 0


@pytest.mark.parametrize("best", [torch.float32, torch.bfloat16])
def test_peers_trl_and_ours_take_turns(monkeypatch, best):
    """Our step follows each of TRL's, on our threads, and the first pair does not count. Where TRL
    is best in bfloat16, ratios are of steps that ran together."""
    order, threads = [], torch.get_num_threads()
    # Seconds of our steps beside TRL's best setup, then beside TRL in float32.
    clock = iter([9, 2, 9, 4, 9, 5] + [7, 2, 7, 8, 7, 10])

    def steps(model, run, work, dtype, rounds, between=lambda: None):
        for _ in range(rounds + 1):
            order.append((dtype, torch.get_num_threads()))
            between()
        return [10.0 if dtype == best else 20.0] * rounds

    def seconds(work, device):
        order.append(("ours", torch.get_num_threads()))
        return next(clock)
    monkeypatch.setattr(peers, "their_model", lambda *_: torch.nn.Module())
    monkeypatch.setattr(peers, "_their_setups", lambda: [(d, threads + 1) for d in peers.DTYPES])
    monkeypatch.setattr(peers, "_their_grpo_steps", steps)
    monkeypatch.setattr(peers, "bench_grpo_step", lambda *_: {"whole": lambda: None})
    monkeypatch.setattr(peers, "_try_setups", lambda works, device, trial: [
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


def test_peers_main_compares_what_it_has_a_checkpoint_for(zero, monkeypatch, capsys):
    """`bench --against` compares documents and work of one shape, says what needs a checkpoint, and
    adds our own numbers. With --from it compares Zero's work and RL from base.pt too. --part
    chooses parts."""
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    calls = []
    monkeypatch.setattr(bench, "measure_ours", lambda *_: {"train": 5.0})
    monkeypatch.setattr(peers, "against", lambda run, device, parts, weights, base: calls.append(
        (list(parts), weights, base)) or {"step.vs_trl": 4.0})
    words = ["bench", "--preset", "micro", "--against", "--json"]
    assert cli.main(words) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert calls.pop() == (["documents", "shape"], None, None)
    assert found["train"] == 5.0 and found["step.vs_trl"] == 4.0
    assert "--from runs/nano/zero.pt" in printed.err

    assert cli.main([*words, "--from", zero]) == 0
    printed = capsys.readouterr()
    parts, weights, base = calls.pop()
    assert tuple(parts) == peers.PARTS and "head.weight" in weights
    base_weights = checkpoint.load(Path(zero).with_name("base.pt"))[0].state_dict()
    assert equal_states(base.state_dict(), base_weights)
    assert not equal_states(weights, base_weights) and "zero.pt" not in printed.err

    assert cli.main([*words, "--part", "zero", "--from", zero]) == 0
    assert calls.pop()[0] == ["zero"] and "train" not in json.loads(capsys.readouterr().out)


def test_peers_refuses_parts_without_their_checkpoint(zero, tmp_path, capsys):
    """A part that needs a checkpoint is refused without one, and RL without base.pt beside it."""
    words = ["bench", "--preset", "micro", "--against"]
    assert cli.main([*words, "--part", "rl"]) == 2
    assert "--part rl needs a trained model" in capsys.readouterr().err
    assert cli.main([*words, "--from", zero, "--set", "zero.objective=dapo"]) == 2
    assert "zero.objective must be grpo" in capsys.readouterr().err
    (tmp_path / "base.pt").unlink()
    assert cli.main([*words, "--from", zero]) == 2
    assert f"RL starts from {tmp_path / 'base.pt'}" in capsys.readouterr().err


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
