"""Tests of studies/program.py: expressions are evaluated safely, and unit tests pay by share."""
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tasks
from studies import program
from tests.helpers import nano_run

expressions = st.recursive(
    st.just("x") | st.integers(0, 9).map(str),
    lambda inner: st.builds("{}{}{}".format, inner, st.sampled_from(["+", "-", "*", " + "]), inner)
    | inner.map("-{}".format) | inner.map("({})".format), max_leaves=6)  # 9 ** 6 is below a million


@settings(deadline=None, derandomize=True, max_examples=300)
@given(expressions, st.integers(-9, 9))
def test_program_values_equal_python(text, x):
    """Every expression of at most 60 characters has the value that Python's eval gives, and a
    longer one has none."""
    expected = eval(text, {"__builtins__": {}}, {"x": x}) if len(text) <= 60 else None
    assert program._run_program(text, x) == expected


@pytest.mark.parametrize("text, value", [
    ("3+2*x", 13), ("x", 5), ("-x", -5), ("--x", 5), ("(x+1)*(x-1)", 24), (" x - 7 ", -2),
    ("2*x+3*x-x", 20), ("7", 7), ("1000*1000", 10 ** 6), ("-" * 57 + "1", -1)])
def test_program_values_equal_hand_results(text, value):
    """The value at x = 5, worked by hand."""
    assert program._run_program(text, 5) == value


HOSTILE = ["", " ", "x**2", "2**99999999", "9**9**9", "x//2", "x/2", "x%2", "x()", "x(x)", "(x)(x)",
           "(x,)", "()", "x.__class__", "().__class__", "lambda: 1", "lambda x: x", "__import__",
           "print(1)", "eval('1')", "xx", "x x", "1 2", "3x", "x3", "0x10", "0b1", "1e5", "1_0",
           "1.5", "True", "x if x else 1", "[x]", "{x}", "x:=1", "x=1", "x==1", "x<1", "not x",
           "~x",
           "+", "-", "*x", "(*x)", "x+", "(x", "x)", "(" * 50, ")" * 50, "(" * 31 + "x" + ")" * 31,
           "9" * 60, "-" * 59 + "11", "9*" * 29 + "9", "1000*1001", "0*(1000*1001)", "007",
           "３+x", "٣", "²", "x\n", "\nx", "x\t", "x\0", "x #", "x;x", "\ud800", "x" * 10 ** 6,
           "-" * 10 ** 6 + "x", "<answer>x"]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:20]))
def test_program_hostile_text_has_no_value(text):
    """Powers, calls, names, other notations, deep nesting and huge texts have no value, and nothing
    is raised."""
    assert program._run_program(text, 3) is None


@pytest.mark.parametrize("answer, share", [
    ("2*x+3", 1), ("3+2*x", 1), ("x+x+3", 1), ("(x+1)*2+1", 1), ("3", 1 / 3), ("2*x-3", 0),
    ("x+3", 1 / 3), ("5", 1 / 3), ("x*x+3", 1 / 3), ("x*x*x+x+3", 2 / 3), ("2x+3", 0), ("", 0),
    ("x**1+x+3", 0), ("x//0", 0)])
def test_program_reward_is_the_share_of_tests_passed(answer, share):
    """By hand, for f(0)=3, f(1)=5, f(-2)=-1: every form of 2x+3 passes all tests, and other answers
    earn the share that they pass."""
    problem = tasks.Problem("f(0)=3 f(1)=5 f(-2)=-1", "2*x+3", "en", kind="program")
    text = f"<think>1+1=2</think><answer>{answer}</answer>"
    assert program.tests_passed(text, problem) == pytest.approx(share)
    assert program.tests_passed(answer, problem) == 0                    # outside the template


def test_program_lines_are_split_into_three_parts():
    """The 900 lines are split, each into one part of train, dev and test, and dev and test have at
    least 100. By hand, an answer that passes one of four tests earns a quarter."""
    parts = [{p.answer for p in ps} for ps in program.PROGRAMS.values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 900
    assert min(map(len, parts)) >= 100
    p = program._make_program(2, 3)
    assert p.question == "f(0)=3 f(1)=5 f(2)=7 f(3)=9"
    for answer, share in (("2*x+3", 1), ("3+x*2", 1), ("x+3", 0.25), ("", 0), ("9", 0.25)):
        assert program.tests_passed(tasks.response("", answer), p) == share


def test_program_evaluation_asks_each_program_equally_often(monkeypatch):
    """Each test program is asked twice. By hand: if the first half of the programs is right each
    time and the last program once of two times, the mean and its error over programs."""
    programs, asked = program.PROGRAMS["test"], []
    n, half = len(programs), len(programs) // 2

    def scripted(model, prompts, *_, **__):
        asked.extend(prompts)
        answers = [p.answer if i < half else "0" for i, p in enumerate(programs) for _ in range(2)]
        answers[-1] = programs[-1].answer
        return [tasks.encode_response(tasks.response("", answer)) for answer in answers]

    monkeypatch.setattr(program, "sample_answers", scripted)
    monkeypatch.setattr(program, "prompts_of", lambda problems: [p.question for p in problems])
    got = program._evaluate(None, "test", nano_run(**{"eval.samples": 2}))
    assert Counter(asked) == {p.question: 2 for p in programs} and got["programs"] == n
    mean = (half + 0.5) / n
    squares = half * (1 - mean) ** 2 + (0.5 - mean) ** 2 + (n - half - 1) * mean ** 2
    assert got["all"] == pytest.approx(mean)
    assert got["all.se"] == pytest.approx(math.sqrt(squares / (n - 1) / n))


def test_program_page_compares_the_rewards_by_seed():
    """By hand: `partial` is 10 points above on each curve and seed, but for the share of all tests
    on dev: there it is 0.3 above on one seed and 0.1 below on the other, and 12.706 * 0.2 to each
    side contains 0."""
    rows = {}
    for name, low in (("strict", (0.2, 0.4)), ("partial", (0.3, 0.5))):
        for curve in ("train", "dev"):
            for step in (0, 5, 10):  # step 0 is not compared
                for key in program.MEASURES:
                    shift = {"strict": 0.0, "partial": 0.2}[name] * (curve + key == "devall")
                    values = {"0": low[0] + shift, "1": low[1] - shift}
                    if step == 0:
                        values = {"0": 0.0, "1": 0.0 if name == "strict" else 1.0}
                    rows[f"{name}.{curve}{step}.{key}"] = {
                        "mean": sum(values.values()) / 2, "std": 0.0, "per_seed": values}
    rows["partial.programs"] = {"mean": 115.0}
    for key in program.MEASURES:
        rows |= {f"{name}.{key}": {"mean": 0.1, "std": 0.0, "per_seed": {"0": 0.1, "1": 0.1}}
                 for name in program.STAGES}
    lines = program.page(rows, {})
    for curve in ("train: tests", "train: all", "dev: tests"):
        assert (f"- {curve}: +10.0 ± 0.0 points, 95% interval +10.0 to +10.0, 2 seeds, on every "
                "seed; that partial is above strict holds") in lines
    assert ("- dev: all: +10.0 ± 28.3 points, 95% interval -244.1 to +264.1, 2 seeds; that partial "
            "is above strict cannot be told") in lines
