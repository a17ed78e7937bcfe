"""Tests of studies/baseline.py: equal FLOPs, prompts with examples, and the page's gains."""
import dataclasses
import random
import re

import pytest

import moe
import tasks
from engine.errors import UserError
from studies import baseline
from tests.helpers import nano_run
from tools.flops import flops_by_stage


def test_baseline_sft_takes_the_flops_of_rl():
    """SFT's samples and steps together take what RL took, within one step. The oracle counts RL and
    SFT by hand from the weights of a real model: RL's answers, prompts, reference model and live
    groups; SFT's samples, and steps that train MTP too."""
    run = nano_run(**{"zero.problems": 3, "zero.group_size": 4, "zero.oversample": 2})
    settings = {"kind": "config"} | dataclasses.asdict(run)
    step = {"kind": "zero", "tokens": 70_000, "prompt_tokens": 30_000, "learnt_tokens": 40_000}
    rl_log = [settings, step, step]
    assert baseline._answers_of_rl(rl_log) == 2 * 3 * 4 * 2
    collected = {"kind": "collected", "stage": "sft", "tokens": 90_000, "prompt_tokens": 50_000}
    documents = [tasks.Document([0] * n, [1] * n, "") for n in (40, 50, 60)]
    steps = baseline._sft_steps(rl_log, [settings, collected], documents, run)

    model = moe.Transformer(run.model)
    weights = {name: p.numel() // (4 if ".experts." in name else 1)  # a token uses 2 of 8
               for name, p in model.named_parameters() if p.dim() > 1}
    N = sum(n for name, n in weights.items() if not name.startswith(("embed.", "mtp.")))
    mtp = sum(n for name, n in weights.items() if name.startswith("mtp."))
    mtp += weights["head.weight"]
    rl = 2 * N * (2 * 70_000 + 2 * 30_000 / 4 + 8 * 40_000)
    step_of_sft = 6 * (N + mtp) * run.dev3.documents * 50
    sft = 2 * N * (90_000 + 50_000 / 2) + steps * step_of_sft
    assert steps > 5 and abs(sft - rl) < step_of_sft
    sft_log = [settings, collected] + steps * [{"kind": "sft",
                                                "tokens": run.dev3.documents * 50}]
    assert baseline._tflop_of_sft(sft_log) == pytest.approx(sft / 1e12)
    assert flops_by_stage(rl_log)["zero"] == pytest.approx(rl / 1e12)


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
        ("kept", 50.0), ("of", 200.0), ("steps", 30.0), ("epochs", 1.5), ("tflop", 2.0))}
    rows["zero.tflop"] = {"mean": 2.1, "std": 0.0, "per_seed": {"0": 2.1}}
    text = "\n".join(baseline.page(rows, {}))
    assert "RL less the base: +70.0 points, one seed" in text
    assert "with as many FLOPs, less the base: +20.0 points" in text
    assert "at best, less the base: +5.0 points" in text
    assert "majority vote less its pass@1: +10.0 points" in text
    assert "RL less SFT: +50.0 points, one seed. That RL is above SFT holds." in text
    assert "50 of 200 answers kept, 30 steps, 1.5 epochs, 2 TFLOP; RL took 2.1" in text
