"""Tests of studies/scale.py: hostile texts, and runs that are killed at any moment."""
import multiprocessing
import random
import re
from types import SimpleNamespace

import pytest

import tasks
from studies import program, scale

LINE = program._make_program(2, 3)


def test_scale_hostile_texts_are_never_paid():
    """Of 20,000 hostile texts none raises an error, none is paid wrongly, none takes long, and
    every right one is paid. The oracle is a set of rules written apart from tasks.py."""
    found = scale._hostile(20_000)
    assert "hostile.offender" not in found, found["hostile.offender"]
    assert found["hostile.raised"] == found["hostile.paid"] == found["hostile.withheld"] == 0
    assert found["hostile.tried"] == 20_000 and found["hostile.earned"] > 500
    assert found["hostile.slowest_ms"] < 500


def last_answer(text):
    """The text in the last pair of answer tags, wherever they are; "" if there is none."""
    return ["", *re.findall("<answer>(.*?)</answer>", text, re.DOTALL)][-1]


def as_int(text):
    """The integer that int() reads, or None."""
    try:
        return int(text)
    except ValueError:
        return None


LENIENT = {  # mistakes that an author of rewards might make
    "any place": (tasks, "accuracy", lambda t, p: last_answer(t) == p.answer),
    "int()": (tasks, "accuracy", lambda t, p: as_int(tasks.parse(t)[1] or "") == int(
        p.answer if p.kind == "sum" else 0)),
    "strip()": (tasks, "accuracy", lambda t, p: (tasks.parse(t)[1] or "").strip() == p.answer),
    "in": (tasks, "accuracy", lambda t, p: p.answer in (tasks.parse(t)[1] or "")),
    "upper case": (tasks, "accuracy", lambda t, p: tasks.parse(t.lower())[1] == p.answer),
    "of a program": (tasks, "accuracy", lambda t, p: tasks.parse(t)[1] == p.answer),
    "tags alone": (tasks, "format_reward", lambda t, p: all(tag in t for tag in scale.TAGS)),
    "blank": (tasks, "format_reward", lambda t, p: tasks.parse(t)[0] is not None),
    "all words": (tasks, "language_share", lambda t, language: 1.0),
    "nan": (tasks, "language_share", lambda t, language: float("nan")),
    "powers": (program, "_run_program", lambda t, x: RUN(t.replace("**1", ""), x)),
    "commas": (program, "_run_program", lambda t, x: RUN(t.replace(",", ""), x)),
    "first word": (program, "_run_program", lambda t, x: RUN(t.split("#")[0].strip("; "), x)),
}

RUN = program._run_program


@pytest.mark.parametrize("name", list(LENIENT))
def test_scale_hostile_texts_deceive_lenient_rewards(monkeypatch, name):
    """Three thousand hostile texts deceive every lenient reward of the list at least once."""
    module, reward, lenient = LENIENT[name]
    monkeypatch.setattr(module, reward, lenient)
    assert scale._hostile(3000)["hostile.paid"] > 0


def test_scale_counts_and_shows_rewards_that_raise(monkeypatch):
    """A reward that raises an error is counted once a text, and the texts go on."""
    monkeypatch.setattr(tasks, "format_reward", lambda text, problem: 1 / 0)
    found = scale._hostile(50)
    assert found["hostile.raised"] == found["hostile.tried"] == 50 and found["hostile.paid"] == 0
    assert found["hostile.offender"].startswith("ZeroDivisionError: ")


def test_scale_counts_rewards_that_are_withheld(monkeypatch):
    """A reward that never pays withholds from every right text."""
    monkeypatch.setattr(tasks, "accuracy", lambda text, problem: 0.0)
    found = scale._hostile(500)
    assert found["hostile.withheld"] == found["hostile.earned"] > 0 == found["hostile.paid"]


THINK = "<think>1+2=3</think>"


@pytest.mark.parametrize("text, accuracy, form, tests", [
    (f"{THINK}<answer>5</answer>", 1, 1, 0.25), (f"{THINK}so<answer>2*x+3</answer>", 0, 1, 1),
    ("5 it is <answer>5</answer>", 1, 0, 0.25), (f"{THINK}5<answer>5</answer>", 0, 0, 0),
    (f"{THINK}<answer>5</answer>.", 0, 0, 0), (f"{THINK}<answer> </answer>", 0, 0, 0),
    (f"<|end|>{THINK}<answer>5</answer>", 0, 0, 0), (f"{THINK * 2}<answer>5</answer>", 0, 0, 0),
    ("<answer>5</answer>" * 2, 0, 0, 0), (f"{THINK}<answer>５</answer>", 0, 1, 0)])
def test_scale_due_rewards_equal_hand_results(text, accuracy, form, tests):
    """The rewards that a text may earn, by hand, where 5 is right and the tests are f(0)=3 f(1)=5
    f(2)=7 f(3)=9."""
    most = scale._due(text, tasks.Problem("", "5", "en"), LINE)
    assert (most["accuracy"], most["format"], most["tests"]) == (accuracy, form, tests)
    assert most["accuracy of a program"] == 0 and most["all tests"] == (tests == 1)


@pytest.mark.parametrize("text, value", [
    ("2*x+3", 13), ("-(x-1)*2", -8), ("x*-x", -25), (" x - 7 ", -2), ("(x", None), ("x)", None),
    ("x x", None), ("2x", None), ("x**2", None), ("", None), ("٣", None), ("x+", None),
    ("1+" * 40 + "1", None)])
def test_scale_worth_equals_hand_results(text, value):
    """The value at x = 5, worked by hand."""
    assert scale._worth(text, 5) == value


def test_scale_texts_depend_on_the_seed_only():
    """One seed gives the same texts twice, and another seed gives others."""
    def texts(seed):
        rng = random.Random(seed)
        return [recipe(rng, "33") for recipe in scale.RECIPES for _ in range(20)]
    assert texts(0) == texts(0) != texts(1)


forks = pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(),
                           reason="no fork here")


@forks
@pytest.mark.parametrize("n", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_scale_killed_runs_end_in_the_same_bits(tmp_path, n):
    """A run is killed (SIGKILL) at random moments and started again. Weights, log and files equal
    those of an undisturbed run."""
    found = scale._kills(tmp_path / "kills", n, seed=n)
    assert found == {"kills.tried": n, "kills.survived": n}


@forks
def test_scale_different_end_does_not_count_as_survived(tmp_path, monkeypatch):
    """A kill counts as survived only if the run ends in the same bits."""
    monkeypatch.setattr(scale, "_same", lambda one, other: False)
    assert scale._kills(tmp_path / "kills", 1) == {"kills.tried": 1, "kills.survived": 0}


def test_scale_rates_count_documents_and_answers(monkeypatch):
    """The rates of one and of two processes come from `bench`: tokens of documents, and answer
    tokens of a GRPO step over its seconds (24 questions, 16 answers of 42 tokens)."""
    monkeypatch.setattr(scale.bench, "run_bench", lambda folder, *words: {
        "documents": 10.0 * int(words[1]), "step.whole": 2.0 / int(words[1])})
    assert scale._rates(SimpleNamespace()) == {
        "rates.1.pretraining": 10.0, "rates.1.step": 24 * 16 * 42 / 2,
        "rates.2.pretraining": 20.0, "rates.2.step": 24 * 16 * 42}
