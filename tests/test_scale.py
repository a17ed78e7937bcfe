"""The tests of what must hold under load: hostile texts, and runs killed at any moment."""
import multiprocessing
import random
import re

import pytest

import tasks
from studies import program, scale

LINE = program.make_program(2, 3)


def test_no_hostile_text_is_paid():
    """Twenty thousand: none raises or is paid falsely, no right one goes empty, none takes long."""
    found = scale.hostile(20_000)
    assert "hostile.offender" not in found, found["hostile.offender"]
    assert found["hostile.raised"] == found["hostile.paid"] == found["hostile.withheld"] == 0
    assert found["hostile.tried"] == 20_000 and found["hostile.earned"] > 500
    assert found["hostile.slowest_ms"] < 500


def last_answer(text):
    """What stands in the last answer tags, wherever they are; "" if nowhere."""
    return ["", *re.findall("<answer>(.*?)</answer>", text, re.DOTALL)][-1]


def as_int(text):
    """int(), or None."""
    try:
        return int(text)
    except ValueError:
        return None


LENIENT = {  # what somebody might write in a reward's place
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
    "powers": (program, "run_program", lambda t, x: RUN(t.replace("**1", ""), x)),
    "commas": (program, "run_program", lambda t, x: RUN(t.replace(",", ""), x)),
    "first word": (program, "run_program", lambda t, x: RUN(t.split("#")[0].strip("; "), x)),
}
RUN = program.run_program


@pytest.mark.parametrize("name", list(LENIENT))
def test_a_lenient_reward_is_deceived(monkeypatch, name):
    """The texts find out each of many ways to be paid falsely, within some thousands."""
    module, reward, lenient = LENIENT[name]
    monkeypatch.setattr(module, reward, lenient)
    assert scale.hostile(3000)["hostile.paid"] > 0


def test_what_raises_is_counted_and_shown(monkeypatch):
    """A reward that raises is one offence a text, not the end."""
    monkeypatch.setattr(tasks, "format_reward", lambda text, problem: 1 / 0)
    found = scale.hostile(50)
    assert found["hostile.raised"] == found["hostile.tried"] == 50 and found["hostile.paid"] == 0
    assert found["hostile.offender"].startswith("ZeroDivisionError: ")


def test_what_is_withheld_is_counted(monkeypatch):
    """A reward that pays nobody."""
    monkeypatch.setattr(tasks, "accuracy", lambda text, problem: 0.0)
    found = scale.hostile(500)
    assert found["hostile.withheld"] == found["hostile.earned"] > 0 == found["hostile.paid"]


THINK = "<think>1+2=3</think>"


@pytest.mark.parametrize("text, accuracy, form, tests", [
    (f"{THINK}<answer>5</answer>", 1, 1, 0.25), (f"{THINK}so<answer>2*x+3</answer>", 0, 1, 1),
    ("5 it is <answer>5</answer>", 1, 0, 0.25), (f"{THINK}5<answer>5</answer>", 0, 0, 0),
    (f"{THINK}<answer>5</answer>.", 0, 0, 0), (f"{THINK}<answer> </answer>", 0, 0, 0),
    (f"<|end|>{THINK}<answer>5</answer>", 0, 0, 0), (f"{THINK * 2}<answer>5</answer>", 0, 0, 0),
    ("<answer>5</answer>" * 2, 0, 0, 0), (f"{THINK}<answer>５</answer>", 0, 1, 0)])
def test_what_may_be_paid_by_hand(text, accuracy, form, tests):
    """Where 5 is right, and f(0)=3 f(1)=5 f(2)=7 f(3)=9."""
    most = scale.due(text, tasks.Problem("", "5", "en"), LINE)
    assert (most["accuracy"], most["format"], most["tests"]) == (accuracy, form, tests)
    assert most["accuracy of a program"] == 0 and most["all tests"] == (tests == 1)


@pytest.mark.parametrize("text, value", [
    ("2*x+3", 13), ("-(x-1)*2", -8), ("x*-x", -25), (" x - 7 ", -2), ("(x", None), ("x)", None),
    ("x x", None), ("2x", None), ("x**2", None), ("", None), ("٣", None), ("x+", None),
    ("1+" * 40 + "1", None)])
def test_worth_by_hand(text, value):
    """At x = 5."""
    assert scale.worth(text, 5) == value


def test_the_same_texts_for_the_same_seed():
    """And others for another."""
    def texts(seed):
        rng = random.Random(seed)
        return [recipe(rng, "33") for recipe in scale.RECIPES for _ in range(20)]
    assert texts(0) == texts(0) != texts(1)


forks = pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(),
                           reason="no fork here")


@forks
@pytest.mark.parametrize("n", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_ends_in_the_same_bits(tmp_path, n):
    """SIGKILL at random moments, then the same command: weights, log and files of a whole run."""
    found = scale.kills(tmp_path / "kills", n, seed=n)
    assert found == {"kills.tried": n, "kills.survived": n}


@forks
def test_a_run_that_ends_otherwise_has_not_survived(tmp_path, monkeypatch):
    """Kills count only if what came of it is the same."""
    monkeypatch.setattr(scale, "same", lambda one, other: False)
    assert scale.kills(tmp_path / "kills", 1) == {"kills.tried": 1, "kills.survived": 0}
