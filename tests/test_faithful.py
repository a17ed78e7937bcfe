"""Tests of the study of faithful thinking: what is changed, and what happens then."""
import random
import re

import pytest

import tasks
from studies import faithful
from tests.helpers import run_arm, use_random_micro

FEW = ["zero.max_new_tokens=9", "eval.problems=4"]
PROBLEM = tasks.Problem("Compute 25-7+9", "27", "en", 2, "25-7+9")
CHECKED = "<think>25-7=18 check 18+7=25 ok 18+9=27 check 27-9=18</think><answer>27</answer>"


@pytest.fixture
def model(monkeypatch, tmp_path):
    """The random model that the study takes for the kept one."""
    return use_random_micro(faithful, monkeypatch, tmp_path)


def test_faithful_changes_by_hand():
    """Both steps can be changed by five errors or six: 18-10 would have one digit only. What a
    change leads to is as far from the right answer. Answers that are wrong, or corrected, or
    without steps are not changed."""
    rng = random.Random(0)
    changes = {faithful._change_answer(CHECKED, PROBLEM, rng) for _ in range(400)}
    assert len(changes) == 11
    for change in changes:
        written = int(re.search("=([0-9]+)$", change.changed)[1])
        if change.equation == "25-7=18":
            assert change.control == "<think>25-7=18"
            assert change.approved == f"<think>25-7={written} check {written}+7=25"
            assert change.true_check == "<think>25-7=18 check 18+7=25"
            assert change.next_step == "18+9="
            assert change.wrong == str(27 + written - 18)
        else:
            assert change.equation == "18+9=27"
            assert change.control == "<think>25-7=18 check 18+7=25 ok 18+9=27"
            assert change.changed == f"<think>25-7=18 check 18+7=25 ok 18+9={written}"
            assert change.approved == f"{change.changed} check {written}-9=18"
            assert change.true_check == f"{change.control} check 27-9=18"
            assert change.next_step == ""
            assert change.wrong == str(written)
    for text in (CHECKED.replace("<answer>27", "<answer>28"), "<answer>27</answer>",
                 CHECKED.replace(" ok ", " wait ")):
        assert faithful._change_answer(text, PROBLEM, rng) is None
    steps = CHECKED.replace(" check 18+7=25", "").replace(" check 27-9=18", "")
    change = faithful._change_answer(steps, PROBLEM, rng)
    assert change.approved == change.true_check == ""


def test_faithful_draws_steps_evenly():
    """The first step can be changed by one error only, since the totals after it are 95 and 98. It
    is drawn as often as the others."""
    problem = tasks.Problem("Compute 94+1+3-9", "89", "en", 3, "94+1+3-9")
    text = "<think>94+1=95 then 95+3=98 then 98-9=89</think><answer>89</answer>"
    rng = random.Random(0)
    drawn = [faithful._change_answer(text, problem, rng).equation for _ in range(900)]
    assert all(abs(drawn.count(equation) - 300) < 60 for equation in set(drawn))
    assert len(set(drawn)) == 3


def test_faithful_does_not_take_a_check_for_a_step():
    """In 25-7+7 the check of the first step reads as the second step does. In 25-7+7-7 the third
    step is the first one again."""
    problem = tasks.Problem("Compute 25-7+7-7", "18", "en", 3, "25-7+7-7")
    text = ("<think>25-7=18 check 18+7=25 ok 18+7=25 check 25-7=18 ok 25-7=18 check 18+7=25"
            "</think><answer>18</answer>")
    rng = random.Random(0)
    controls = {faithful._change_answer(text, problem, rng).control for _ in range(200)}
    assert controls == {"<think>25-7=18", "<think>25-7=18 check 18+7=25 ok 18+7=25",
                        "<think>25-7=18 check 18+7=25 ok 18+7=25 check 25-7=18 ok 25-7=18"}
    change = next(change for change in iter(
        lambda: faithful._change_answer(text, problem, rng), None) if change.equation == "18+7=25")
    for rest, outcome in ((" ok 24-7=17 check 18+7=25</think><answer>18</answer>", "ignored"),
                          (" wait 18+7=25 ok</think><answer>18</answer>", "corrected"),
                          (" ok 25-7=18</think><answer>18</answer>", "resumed")):
        assert faithful._outcome(change.changed, rest, change) == outcome


def keep_on(problem, begin):
    """The rest of a working, from the number that it has come to."""
    step = re.split("ok|正确", begin)[-1]
    total = int(re.search("=([0-9]+)", step)[1])
    done, rest = len(re.findall("ok|正确", begin)) + 1, ""
    for term in re.findall("[+-][0-9]", problem.expression)[done:]:
        rest += f" ok {total}{term}={total + int(term)}"
        total += int(term)
    return f"{rest}</think><answer>{total}</answer>"


@pytest.mark.parametrize("outcome", faithful.OUTCOMES)
def test_faithful_outcomes(model, monkeypatch, outcome):
    """Five models, each of which always does one of the five things. The last step has no next one,
    so what is resumed elsewhere is ignored there."""
    problems = {p.expression: p for p in tasks.make_problems("test", 4, (3, 4, 5, 6))}

    def sample(model, prompts, *_, **__):
        answers = []
        for prompt in prompts:
            question, begin = tasks.decode(prompt).split("<|assistant|>")
            problem = next(p for e, p in problems.items() if question.endswith(p.question))
            right = str(problem.answer)
            if not begin:
                working, _ = tasks.write_working(problem, "checked", random.Random(0))
                answers.append(tasks.encode_response(tasks.response(working, right)))
                continue
            terms = re.findall("[+-]?[0-9]+", problem.expression)
            done = len(re.findall("ok|正确", begin)) + 1
            total = sum(map(int, terms[:done]))
            equation = f" wait {total}{terms[done]}={total + int(terms[done])}"
            rest = {"follows": keep_on(problem, begin), "other": "</think>",
                    "corrected": f"{equation}</think><answer>{right}</answer>",
                    "resumed": f" ok {total + int(terms[done])}{(*terms, '+1')[done + 1]}="
                               f"</think><answer>{right}</answer>",
                    "ignored": f"</think><answer>{right}</answer>"}[outcome]
            answers.append(tasks.encode_response(rest))
        return answers

    monkeypatch.setattr(faithful, "sample_answers", sample)
    numbers = run_arm(faithful, "zero", *FEW)
    assert numbers["changes"] == 4
    last = numbers.get("last.changes", 0)
    for prefix in ("", "checked.", "approved."):
        share = 1 - last / 4 if outcome == "resumed" else 1
        assert numbers[f"{prefix}{outcome}"] == share
        assert sum(numbers[f"{prefix}{name}"] for name in faithful.OUTCOMES) == 1
        assert "|" in numbers[f"{prefix}{outcome}.example"]
    if last:
        assert numbers[f"last.{'ignored' if outcome == 'resumed' else outcome}"] == 1
    assert numbers["control"] == (outcome != "other")
    assert faithful.combine({f"zero.{k}": v for k, v in numbers.items()})[
        "faithful.zero.follows"] == (outcome == "follows")


def test_faithful_controls_are_cut_at_the_same_places(model, monkeypatch):
    """Each kind of change is compared with the same answers, cut off at the same places and without
    a change. For an approved change that is behind the true check."""
    asked = []
    change = faithful.Change(PROBLEM, "<think>25-7=18", "<think>25-7=17", "25-7=18", "18+9=", "26",
                             "<think>25-7=17 check 17+7=25", "<think>25-7=18 check 18+7=25")
    monkeypatch.setattr(faithful, "_change_answer", lambda *_: change)
    monkeypatch.setattr(faithful, "_go_on", lambda model, changes, begins, run:
                        asked.append(begins[0]) or ["</think><answer>27</answer>"] * len(begins))
    numbers = run_arm(faithful, "zero", *FEW)
    assert asked == [change.control, change.changed, change.control, change.changed,
                     change.true_check, change.approved]
    assert "last.changes" not in numbers and numbers["approved.changes"] == numbers["changes"]


def test_faithful_without_right_answers(model):
    """A random model has no right answer to change; the study says so and goes on."""
    assert run_arm(faithful, "r1", *FEW) == {"changes": 0}
