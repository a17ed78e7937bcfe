"""The tests of study speed: what it counts, from files and figures made by hand."""
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

import tasks
from engine import sampling
from engine.errors import UserError
from studies import peers, speed
from tools import bench, cli
from tools.cli import resolve


def write(run, threads):
    """A run of two steps of base and four of Zero, right on 90% of dev after the second."""
    machine = {"machine": "a processor, 2 cores", "threads": threads, "processes": 1}
    times = [machine] + [{"stage": stage, "step": step, "seconds": seconds, "peak_gib": 1.0}
                         for stage, step, seconds in (
                             ("base", 1, 30), ("base", 2, 30), ("test_base", 0, 60),
                             ("zero", 1, 12), ("zero", 2, 12), ("zero", 3, 12), ("zero", 4, 12))]
    dev = [{"kind": "dev", "stage": "zero", "step": step, "pass@1": x}
           for step, x in ((0, 0.1), (2, 0.9), (4, 0.9))]
    for name, records in (("timing", times), ("log", [{"kind": "config"}, *dev])):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_minutes_by_hand(tmp_path):
    """In all with the tests; to 85% training alone. A run that shared its machine has none."""
    write(tmp_path, 2)
    with open(tmp_path / "timing.jsonl", "a") as file:  # a command that found all finished
        file.write(json.dumps({"machine": "a processor, 2 cores", "threads": 1}) + "\n")
    found = speed.minutes(tmp_path)
    assert found["minutes.total"] == pytest.approx((60 + 60 + 48) / 60)
    assert found["minutes.to_85"] == pytest.approx((60 + 24) / 60)
    with open(tmp_path / "timing.jsonl", "a") as file:  # and one that took a step after all
        file.write(json.dumps({"stage": "zero", "step": 5, "seconds": 1, "peak_gib": 1.0}) + "\n")
    with pytest.raises(UserError, match="alone"):
        speed.minutes(tmp_path)
    write(tmp_path, 1)
    with pytest.raises(UserError, match="alone"):
        speed.minutes(tmp_path)


def test_shares_of_time_are_of_all_of_it():
    """Products are there in both, fused attention in training alone; together they are one."""
    folder = SimpleNamespace(run=resolve("micro", []), options=SimpleNamespace(
        device=torch.device("cpu"), dtype=torch.float32))
    found = speed.spent(folder)
    for name in ("train", "decode"):
        shares = {key: x for key, x in found.items() if key.startswith(f"share.{name}.")}
        assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0
        assert shares[f"share.{name}.products"] > 0.01
    assert found["share.train.fused_attention"] > 0.01 > found["share.decode.fused_attention"]


def test_growth_by_hand(monkeypatch):
    """By a clock made by hand: a batch eight times as large takes nine times as long, then one four
    times as large five times; behind eight times the context an answer takes thrice as long."""
    monkeypatch.setattr(bench, "make", lambda *_: None)
    monkeypatch.setattr(bench, "train_step", lambda model, rows, limit: rows)
    clock = {56: 1.0, 448: 9.0, 1792: 45.0}
    monkeypatch.setattr(bench, "in_turn", lambda work, *_: {
        name: clock[rows] for name, rows in work.items()})
    rate = {128: 30, 1024: 10}
    monkeypatch.setattr(speed, "decoding", lambda model, context, n: n * rate[context])
    found = speed.growth(SimpleNamespace(run=resolve("micro", []), options=SimpleNamespace(
        device=torch.device("cpu"), dtype=torch.float32)))
    assert found["train.2k"] == 56 * 36 and found["train.64k"] == pytest.approx(1792 * 36 / 45)
    assert found["train.spread"] == pytest.approx(45 / 32)
    for name, n in (("decode.one", 1), ("decode", speed.PROMPTS)):
        assert found[f"{name}.128"] == 30 * n and found[f"{name}.1024_to_128"] == pytest.approx(3)


def test_the_page_says_what_was_asked():
    """A figure within its limit, one beyond, one not there; and the settings beneath."""
    rows = {key: {"mean": x, "std": 0.0, "per_seed": {"0": x}} for key, x in (
        ("minutes.total", 9.0), ("step.vs_trl", 3.0), ("step.vs_trl.least", 2.5),
        ("step.vs_trl.most", 3.5))}
    text = "\n".join(speed.page(rows, {"sample.ours.setting": {"0": "float32"}}))
    assert "- Yes: `minutes.total` at most 10 (9)." in text
    assert "- No: `step.vs_trl` at least 4 (3; by round 2.5 to 3.5)." in text
    assert "- No: `minutes.to_85` at most 4 (nan)." in text
    assert "`sample.ours.setting`: float32." in text


def test_the_best_way_and_the_best_in_float32(monkeypatch):
    """By a clock made by hand: bfloat16 on two threads is fastest, float32 is on one."""
    clock = {(torch.float32, 1): 3, (torch.float32, 2): 4, (torch.bfloat16, 1): 2,
             (torch.bfloat16, 2): 1}
    monkeypatch.setattr(bench, "seconds", lambda work, _: clock[work()])
    before = torch.get_num_threads()
    best = peers.tried({(d, n): peers.at(n, lambda d=d: (d, torch.get_num_threads()))
                        for d, n in clock}, None)
    assert best == [(torch.bfloat16, 2), (torch.float32, 1)] and torch.get_num_threads() == before


def test_a_comparison_by_hand():
    """The best way counts; a ratio is the median of the rounds' own, not that of medians."""
    ours, exact, theirs = (torch.bfloat16, 1), (torch.float32, 1), (torch.float32, 2)
    pairs = [(ours, theirs, [1, 1, 1], [3, 4, 9]), (exact, theirs, [1, 4, 3], [3, 4, 9])]
    found = peers.compared("step", "trl", pairs)
    assert (found["step.ours"], found["step.trl"], found["step.vs_trl"]) == (1, 4, 4)
    ends = [found["step.float32.vs_trl" + end] for end in ("", ".least", ".most")]
    assert ends == [3, 1, 3]  # of 3, 1, 3; medians would say 4 / 3
    assert found["step.ours.setting"] == "bfloat16, processes x threads 1 x 1"
    found = peers.compared("train", "transformers", pairs, tokens=100)
    assert (found["train.ours"], found["train.transformers"]) == (100, 25)


def test_against_transformers_by_hand(monkeypatch):
    """By a clock made by hand: which of the calls are timed, of which sizes, and what is told. A
    rate is of the tokens that its own side wrote in that round."""
    clock = {("train", torch.float32): 3.0, ("train", torch.bfloat16): 2.0,
             ("decode", torch.float32): 4.0, ("decode", torch.bfloat16): 5.0,
             ("their train", torch.float32): 6.0, ("their train", torch.bfloat16): 7.0,
             ("their decode", torch.float32): 16.0, ("their decode", torch.bfloat16): 8.0}
    now, calls = [], {"decode": 0, "their decode": 0}

    def timed(key, dtype, tokens=0):
        def call():
            now[:] = [clock[key, dtype]]
            if tokens:
                calls[key] += 1  # 7 trials of a dtype, a round thrown away: not theirs
                return tokens if calls[key] > {"decode": 15, "their decode": 16}[key] else 1
        return call

    def seconds(work, _):
        work()
        return now[0]
    monkeypatch.setattr(bench, "make", lambda config, device, dtype, weights=None: dtype)
    monkeypatch.setattr(bench, "theirs", lambda *_: torch.nn.Module())
    monkeypatch.setattr(bench, "train_step", lambda dtype: timed("train", dtype))
    monkeypatch.setattr(bench, "their_train_step", lambda model, dtype: timed("their train", dtype))
    monkeypatch.setattr(bench, "sampled", lambda dtype, work: timed("decode", dtype, 1000))
    monkeypatch.setattr(bench, "their_sampled", lambda model, dtype, work: timed(
        "their decode", dtype, 500))
    monkeypatch.setattr(bench, "their_ways", lambda: [(dtype, 1) for dtype in peers.DTYPES])
    monkeypatch.setattr(bench, "seconds", seconds)
    found = peers.training(None, torch.device("cpu"), 3)
    rows = bench.ROWS * bench.LENGTH
    assert (found["train.ours"], found["train.transformers"]) == (rows / 2, rows / 6)
    assert (found["train.vs_transformers"], found["train.float32.vs_transformers"]) == (3, 2)
    found = peers.writing(None, torch.device("cpu"), bench.Work([], 0, 9), 3, 6)
    assert found["sample.ours"] == pytest.approx(1000 / 4)
    assert found["sample.transformers"] == pytest.approx(500 / 8)
    for end in ("", ".least", ".most"):  # of every round
        assert found["sample.vs_transformers" + end] == pytest.approx(4)
        assert found["sample.float32.vs_transformers" + end] == pytest.approx(8)
    assert found["sample.ours.setting"].startswith("float32")
    assert found["sample.transformers.setting"].startswith("bfloat16")
    assert "sample.even.ours" in peers.writing(None, torch.device("cpu"), bench.Work([], 0), 3, 6)


def test_tokens_count_up_to_an_answers_end():
    """Of theirs by hand: behind two columns of prompt, an answer of two tokens, its end included,
    and one that is cut off. Of ours: as many as the answers have."""
    class Other(torch.nn.Module):
        """Two rows that stand fast."""
        device, generation_config = torch.device("cpu"), SimpleNamespace()

        def generate(self, input_ids, attention_mask, **_):
            """A prompt of one token is padded on the left."""
            assert attention_mask.tolist() == [[0, 1], [1, 1]]
            assert self.generation_config.eos_token_id == 9
            return torch.cat((input_ids, torch.tensor([[5, 9, 0], [5, 6, 7]])), 1)
    work = bench.Work([[3], [4, 4]], 3, 9)
    assert peers.their_sampled(Other(), torch.float32, work)() == 5
    model = bench.make(resolve("micro", []).model, torch.device("cpu"), torch.float32)
    work = bench.Work([[3], [4, 4]] * 30, 12, 7)
    written = sampling.generate(model, work.prompts, 12, 7, tasks.PAD_ID, seed=0)
    assert bench.sampled(model, work)() == sum(map(len, written.answers()))


def test_both_sides_have_a_checkpoints_weights():
    """transformers' logits on a rollout's questions are ours; answers end at the same token."""
    pytest.importorskip("transformers")
    run = resolve("micro", [])
    weights = bench.make(run.model, "cpu", torch.float32).state_dict()
    weights["head.weight"] = torch.randn_like(weights["head.weight"])  # not make()'s own
    plain, work = dataclasses.replace(run.model, n_mtp_layers=0), bench.real_work(run, weights)
    ours = bench.make(plain, torch.device("cpu"), torch.float32, weights).eval()
    tokens = torch.tensor([work.prompts[0]])
    with torch.no_grad():
        theirs = peers.theirs(plain, torch.device("cpu"), weights).eval()(tokens).logits
        torch.testing.assert_close(ours(tokens).logits, theirs, atol=1e-4, rtol=1e-4)
    assert len(work.prompts) == bench.QUESTIONS * bench.GROUP and work.even == ""
    assert work.end_id == tasks.END_ID and work.prompts[0] == work.prompts[bench.GROUP - 1]


def test_a_checkpoint_is_for_a_comparison(capsys):
    """Without --against, --from would change nothing: one line says so."""
    assert cli.main(["bench", "--preset", "micro", "--from", "no.pt"]) == 2
    assert "--from is for bench --against" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("real", [False, True])
def test_against_others_on_micro(real):
    """One round of each comparison: all that is asked for is there, and above 0."""
    for name in ("transformers", "trl", "datasets"):
        pytest.importorskip(name)
    run = resolve("micro", [])
    weights = bench.make(run.model, "cpu", torch.float32).state_dict() if real else None
    found = peers.against(run, torch.device("cpu"), weights, 1)
    even = "" if real else ".even"
    for name, peer in (("train", "transformers"), (f"sample{even}", "transformers"),
                       (f"step{even}", "trl"))[real:]:
        assert min(found[f"{name}.{end}"] for end in ("ours", peer, f"vs_{peer}")) > 0
        assert found[f"{name}.float32.vs_{peer}.least"] > 0


@pytest.mark.parametrize("best", [torch.float32, torch.bfloat16])
def test_theirs_and_ours_take_turns(monkeypatch, best):
    """Ours after each of theirs, on our threads; the first pair does not count. Where theirs is
    best in bfloat16, each ratio is of pairs that ran together."""
    order, own = [], torch.get_num_threads()
    clock = iter([9, 2, 9, 4, 9, 5] + [7, 2, 7, 8, 7, 10])  # beside theirs at best, then in float32

    def steps(model, run, work, dtype, rounds, between=lambda: None):
        for _ in range(rounds + 1):
            order.append((dtype, torch.get_num_threads()))
            between()
        return [10.0 if dtype == best else 20.0] * rounds

    def seconds(work, device):
        order.append(("ours", torch.get_num_threads()))
        return next(clock)
    monkeypatch.setattr(bench, "theirs", lambda *_: torch.nn.Module())
    monkeypatch.setattr(bench, "their_ways", lambda: [(d, own + 1) for d in peers.DTYPES])
    monkeypatch.setattr(bench, "their_grpo_steps", steps)
    monkeypatch.setattr(bench, "grpo_step", lambda *_: {"whole": lambda: None})
    monkeypatch.setattr(bench, "tried", lambda works, device, trial: [
        (torch.bfloat16, own), (torch.float32, own)])
    monkeypatch.setattr(bench, "seconds", seconds)
    run = resolve("micro", [])
    found = peers.against_trl(run.model, run, torch.device("cpu"), bench.Work([], 0, 9), 2)
    turn = [("ours", own)] * 2
    of = [[(dtype, own + 1), *turn] * 3 for dtype in dict.fromkeys((best, torch.float32))]
    assert order == [(d, own + 1) for d in peers.DTYPES for _ in range(3)] + sum(of, [])
    assert (found["step.ours"], found["step.trl"]) == (9, 10)
    ends = [found["step.float32.vs_trl" + end] for end in ("", ".least", ".most")]
    assert ends == pytest.approx([2.25, 2, 2.5])  # 10 s beside 4 s and 5 s, or 20 s beside 8 and 10
    assert own == torch.get_num_threads()
