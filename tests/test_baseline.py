"""Tests of studies/baseline.py: RL's FLOPs, prompts with examples, and the page's gains."""
import dataclasses
import random
import re

import pytest

import tasks
from engine.errors import UserError
from studies import baseline
from tests.helpers import nano_run


def test_baseline_cost_of_rl_equals_hand_count():
    """By hand, for two RL steps: the answers drawn, the prompts' tokens, and the FLOPs a parameter:
    2 for each token of prompt and answer, 8 for each learnt token."""
    step = {"kind": "zero", "tokens": 700, "prompt_tokens": 300, "learnt_tokens": 400}
    run = nano_run(**{"zero.problems": 3, "zero.group_size": 4, "zero.oversample": 2})
    log = [{"kind": "config"} | dataclasses.asdict(run), step, step]
    answers, prompt_tokens, flops = baseline._cost_of_rl(log)
    assert (answers, prompt_tokens) == (2 * 3 * 4 * 2, 600)
    assert flops == pytest.approx(2 * (2 * 1000 + 8 * 400))


@pytest.mark.parametrize("n", [0, 2, 4])
def test_baseline_examples_come_before_the_question(n):
    """A prompt has n dialogues with right, checked workings in the problem's language, and ends
    with the prompt of the question alone. Python's eval is the oracle of the answers."""
    for language in tasks.LANGUAGES:
        problem = tasks.make_problem(random.Random(1), 5, "test", language)
        ids = baseline._few_shot_prompt(problem, n, random.Random(0), 4)
        question = tasks.encode_prompt(problem.question)
        assert ids[-len(question):] == question
        *examples, _ = tasks.ENCODING.decode(ids).split(tasks.USER)[1:]
        assert len(examples) == n
        for example in examples:
            question_text, _, answer = example.partition(tasks.ASSISTANT)
            value = eval(re.search(r"\d[-+*\d]*", question_text)[0])  # Python is the oracle
            response = answer.removesuffix(tasks.END)
            assert tasks.parse(response)[1] == str(value) and tasks.format_reward(response)
            assert tasks.language_share(response, language) == 1.0


@pytest.mark.parametrize("levels, fits", [("3,4,5,6", True), ("7", False), ("3,7", True)])
def test_baseline_examples_that_leave_no_room_are_refused(levels, fits):
    """Four examples of 7 operations do not fit into 512 tokens: one line says so before anything
    is trained. The examples have the lowest level."""
    run = nano_run(**{"zero.levels": levels, "eval.problems": 40})
    if fits:
        baseline._check_examples_fit(run)
    else:
        with pytest.raises(UserError, match="zero.levels: 4 worked examples .* give a lower level"):
            baseline._check_examples_fit(run)


def test_baseline_page_states_every_gain():
    """By hand: gains over the base in points, and the better of two and four examples."""
    values = {"base": (0.2, 0.3), "examples2": (0.25, 0.3), "examples4": (0.22, 0.3),
              "sft": (0.4, 0.5), "zero": (0.9, 0.95)}
    rows = {f"{name}.{key}": {"mean": x, "std": 0.0, "per_seed": {"0": x}}
            for name, pair in values.items() for key, x in zip(("pass@1", "cons@16"), pair)}
    rows |= {f"sft.{key}": {"mean": x, "std": 0.0, "per_seed": {"0": x}} for key, x in (
        ("kept", 50.0), ("of", 200.0), ("steps", 30.0), ("epochs", 1.5))}
    text = "\n".join(baseline.page(rows, {}))
    assert "RL changes pass@1 by +70.0 points" in text
    assert "with as many FLOPs, changes it by +20.0" in text
    assert "by +5.0 at best" in text and "majority vote is +10.0 points from its pass@1" in text
    assert "50 of 200 answers kept, 30 steps, 1.5 epochs" in text
