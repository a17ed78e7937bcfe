"""Tests of studies/compute.py: limits on thinking, wrong steps, forbidden words, the budget."""
import math
import random
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moe
import r1mini
import tasks
from studies import compute
from tests.helpers import lightly


def test_compute_cut_keeps_short_thinking():
    """By hand: thinking within the limit is kept. Longer thinking, in the template or not, is cut
    at the limit and an answer begins."""
    ids = tasks.encode_response("<think>1+2=3</think><answer>3</answer>")
    assert compute._cut_thinking(ids, 5) is None
    assert tasks.decode(compute._cut_thinking(ids, 2)) == "<think>1+</think><answer>"
    nothing = compute._cut_thinking(tasks.encode_response("1+2=3"), 0)
    assert tasks.decode(nothing) == "<think></think><answer>"
    whole = tasks.encode_response("<think></think><answer>3</answer>")
    assert compute._cut_thinking(whole, 0) is None


def test_compute_steps_tell_noticed_and_corrected():
    """By hand, a wrong step is noticed and corrected, and another is neither. In the corpus'
    checked workings every wrong step is noticed and corrected."""
    text = ("<think>25-7=17 check 17+7=24 wait 25-7=18 check 18+7=25 ok 18+9=26然后26+6=32</think>"
            "<answer>32</answer>")
    assert [(s["wrong"], s["noticed"], s["corrected"]) for s in compute._judge_steps(text)] == [
        (True, True, True), (True, False, False), (False, False, False)]
    rng = random.Random(0)
    for _ in range(200):
        p = tasks.make_problem(rng, 5, products=0.3)
        working = tasks.write_working(p, "checked", rng, 0.3, 0.4)
        found = compute._judge_steps(tasks.response(*working))
        assert found and all(s["corrected"] == s["noticed"] == s["wrong"] for s in found)


# The obvious pattern: a match may begin anywhere in a word or number, which takes quadratic time.
SLOW_STEP = re.compile(r"([^-+*=0-9]*)(-?[0-9]+)([-+*])([0-9]+)=(-?[0-9]+)")


@lightly
@given(st.text("01-+*= a等", max_size=40))
def test_compute_steps_equal_the_obvious_pattern(text):
    """In any text the steps and the words before them are those of the obvious pattern."""
    assert compute.STEP.findall(text) == SLOW_STEP.findall(text)


@pytest.mark.parametrize("text", ["7", "a", " ", "7+", "1-", "=7", "a7", "7+777777", "7+7 7=", "-"])
def test_compute_steps_of_a_long_text_take_linear_time(text):
    """400,000 characters without a step have none. The obvious pattern would take minutes."""
    assert compute._judge_steps(text * (400_000 // len(text))) == []
    assert compute._judge_steps("7" * 400_000 + text) == []


def test_compute_step_of_a_long_number_is_wrong():
    """A step with a number of thousands of digits is wrong. Python's int() would refuse it."""
    long = "7" * 5000
    judged = compute._judge_steps(f"{long}+0={long}然后1+{long}=1然后1+2=3")
    assert [step["wrong"] for step in judged] == [True, True, False]


def test_compute_ban_ends_with_its_context():
    """Inside the context the forbidden tokens have logits of -inf, and after it the logits are as
    before."""
    model = moe.Transformer(r1mini.PRESETS["micro"]).eval()
    tokens = torch.tensor([[1, 2, 3]])
    free = model(tokens).logits
    with compute._words_banned(model, [5, 7]):
        held = model(tokens).logits
    assert (held[..., [5, 7]] == -math.inf).all() and torch.equal(model(tokens).logits, free)


def test_compute_gap_is_the_difference_of_two_bans(monkeypatch):
    """By hand: each ban makes one of two answers wrong, so both have an effect of -0.5, and the gap
    between them is 0."""
    right, wrong = (tasks.encode_response(tasks.response("", n)) for n in (3, 4))
    plans = iter([[right, right], [right, wrong], [wrong, right], [wrong, wrong], [right, right]])
    monkeypatch.setattr(compute, "sample_answers", lambda *_, **__: next(plans))
    problem = tasks.Problem("Compute 1+2", "3", "en", 1, "1+2")
    model = moe.Transformer(r1mini.PRESETS["micro"])
    r = compute._accuracy_with_words_banned(model, [], [problem] * 2, 8, 8, [right], 1)
    assert (r["ban.wait.effect"], r["ban.wait's neutral.effect"]) == (-0.5, -0.5)
    assert r["ban.wait.gap"] == 0
    assert (r["ban.check.effect"], r["ban.check.gap"]) == (-1.0, -1.0)
    assert r["ban.wait.gap.error"] > 0 == r["ban.check.gap.error"]


def test_compute_neutral_word_is_about_as_frequent():
    """The neutral word is the token of 'then' or 'ok', in one language, whose count is nearest that
    of the forbidden word in both languages."""
    def text(name, language="en"):
        return tasks.ENCODING.encode_ordinary(tasks.WORDS[language][name])
    answers = [text("wait") * 3 + text("wait", "zh") * 2 + text("check") * 50
               + text("ok") * 40 + text("ok", "zh") * 9 + text("then", "zh") * 5]
    assert [compute._neutral_word(answers, "wait")] == text("then", "zh")
    assert [compute._neutral_word(answers, "check")] == text("ok")


@pytest.mark.parametrize("effect_of_word, effect_of_neutral, sentence", [
    (-0.2, -0.01, "does work: its ban costs 19.0 points"), (-0.1, -0.3, "costs 20.0 points more"),
    (0.2, 0.0, "does harm: its ban gains 20.0 points"),
    (-0.02, -0.015, "the two effects cannot be told apart (the neutral ban's accuracy less the "
                    "word's: +0.5 ± 1.4 points, 95% interval -12.2 to +13.2, 2 seeds; standard "
                    "error over problems 0.4)")])
def test_compute_verdict_compares_with_the_neutral_ban(effect_of_word, effect_of_neutral, sentence):
    """The verdict depends on the difference from the neutral ban, paired by seed. Two seeds differ
    by one point in either direction, so the interval is 12.706 points to each side."""
    figures = {"check": effect_of_word, "check's neutral": effect_of_neutral}
    rows = {f"r1.ban.{plan}.{part}": {"mean": x, "per_seed": {"0": x, "1": x}}
            for plan, effect in figures.items()
            for part, x in (("effect", effect), ("error", 0.01), ("frequency", 2))}
    for plan, effect in figures.items():
        shift = 0.01 if plan == "check" else 0.0
        accuracy = {"0": 0.5 + effect - shift, "1": 0.5 + effect + shift}
        rows[f"r1.ban.{plan}.pass@1"] = {"mean": 0.5 + effect, "per_seed": accuracy}
    rows["r1.ban.check.gap"] = {"mean": effect_of_word - effect_of_neutral}
    rows["r1.ban.check.gap.error"] = {"per_seed": {"0": 0.005, "1": 0.005}}
    notes = {"r1.ban.check's neutral.word": {"0": " ok "}}
    line = compute._verdict(rows, notes, "r1", "check")
    assert sentence in line and "'ok'" in line
    assert f"by {100 * effect_of_word:+.1f} ± 0.7 points" in line


def test_compute_budget_is_where_the_costs_meet():
    """After that many questions, RL and Zero's answers have cost as much as the votes. More votes
    cost more, so fewer questions suffice. All votes cost the same for each token, and the prompt is
    read once."""
    config = r1mini.PRESETS["nano"]
    numbers = {"base.length": 30.0, "base.prompt_length": 12.0, "zero.length": 80.0,
               "zero.prompt_length": 12.0, "base.cons@16": 0.4, "base.cons@64": 0.5}
    found = compute._budget(numbers, config, 2.0)
    weight = found["budget.zero@1.gflops"] / (80 + 12)  # of one token
    assert found["budget.base@64.gflops"] == pytest.approx(weight * (64 * 30 + 12))
    assert "budget.questions@4" not in found
    for k in (16, 64):
        q = found[f"budget.questions@{k}"]
        rl = 2e3 + q * found["budget.zero@1.gflops"]
        assert rl == pytest.approx(q * found[f"budget.base@{k}.gflops"])
    assert found["budget.questions@64"] < found["budget.questions@16"]
    votes_are_cheap = numbers | {"base.length": 1.0, "zero.length": 200.0}
    assert "budget.questions@16" not in compute._budget(votes_are_cheap, config, 2.0)


def test_compute_budget_is_of_the_runs_own_rl(monkeypatch, tmp_path):
    """The RL that is paid for is Zero's, in the log of the run whose checkpoints are measured."""
    logs = {tmp_path: {"base": 8.0, "zero": 2.0, "dev2": 4.0}}
    monkeypatch.setattr(compute, "read_log", lambda path: path)
    monkeypatch.setattr(compute, "flops_by_stage", logs.get)
    monkeypatch.setattr(compute, "measure_once", lambda *_: {
        "length": 30.0, "prompt_length": 12.0, "cons@64": 0.5})
    run = SimpleNamespace(start=str(tmp_path / "r1.pt"), model=r1mini.PRESETS["micro"])
    numbers = compute.measure(SimpleNamespace(run=run))
    assert numbers["budget.rl.tflops"] == 2.0 and "budget.questions@64" in numbers
