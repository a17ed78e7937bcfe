"""Tests of the studies of RL's reach: frontier, emergence, limit."""
import collections
import copy
import dataclasses
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import grpo
import moe
import tasks
from engine.folder import read_log
from engine.optim import learning_rate_at
from r1mini import make_task, rule_rewards
from studies import emergence, frontier, limit
from tests.helpers import MICRO
from tools import study
from tools.settings import resolve_settings

FEW = ["zero.problems=4", "zero.group_size=2", "zero.steps=2", "zero.minibatches=1",
       "zero.max_new_tokens=9", "eval.problems=4", "eval.dev_problems=4", "eval.samples=2",
       "eval.fewer_samples=1", "base.steps=3", "base.documents=8", "zero.dev_every=1"]


@pytest.fixture
def arm(monkeypatch, tmp_path):
    """A function that runs an arm of a study on a random micro model and returns its line."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = moe.Transformer(MICRO)
    monkeypatch.setattr(limit, "load_kept", lambda *_: model)

    def run(module, name):
        one = SimpleNamespace(
            ARMS={name: module.ARMS[name]}, STAGES=module.STAGES, page=lambda *_: [],
            SETTINGS=(*module.SETTINGS, *FEW), measure_arm=module.measure_arm)
        options = SimpleNamespace(name="demo", preset="micro", rest=["--seeds", "0"])
        study.main(options, one)
        lines = study._measure_arms(options, one, 0, [])
        return lines[0]["metrics"]
    return run


def test_frontier_problems():
    """Operands recur, the total stays within 0 to 99, and a problem is of its part by the hash that
    all problems have. The corpus' documents have up to six operations."""
    problems = frontier._problems("test", 12, 50)
    assert problems == frontier._problems("test", 12, 50)
    for problem, plain in zip(problems, frontier._problems("test", 12, 50, spaces=False)):
        assert tasks.part_of_problem(problem.expression) == "test"
        assert problem.question.replace(" ", "") == plain.question.replace(" ", "")
        assert re.sub("[^0-9+-]", "", plain.question) == plain.expression in plain.question
        assert len(problem.question) > len(plain.question)
        assert eval(problem.expression) == int(problem.answer)  # an oracle, on our own text
        numbers = problem.expression.replace("-", "+").split("+")
        assert len(numbers) == 13 and problem.level == 12
        assert len(set(numbers[1:])) < 12
    rng, corpus = random.Random(0), tasks.Corpus()
    documents = [frontier._draw_document(rng, corpus) for _ in range(400)]
    solved = [d.problem for d in documents if d.style in tasks.STYLES]
    assert {p.level for p in solved} == {1, 2, 3, 4, 5, 6}
    recurring = [p for p in solved if len(set(p.expression.replace("-", "+").split("+")[1:]))
                 < p.level]
    assert len(recurring) > 0.2 * len(solved)
    shares = [sum(d.style == style for d in documents) / 400 for style in tasks.STYLES]
    assert shares == pytest.approx(corpus.shares()[:3], abs=0.08)


def test_frontier_moves_when_half_are_right():
    """By hand."""
    rollouts = [{"frontier": share} for share in (0.2, 0.5, None, 0.49, 0.9)]
    assert [frontier._frontier(rollouts[:i]) for i in range(6)] == [6, 6, 7, 7, 7, 8]
    assert frontier._frontier([{"frontier": 1.0}] * 99) == frontier.LAST
    problems = [dataclasses.replace(p, level=level) for p, level in
                zip(tasks.make_problems("train", 3, (3,)), (5, 6, 6))]
    texts = [f"<answer>{p.answer}</answer>" for p in problems]
    assert frontier._frontier_accuracy(texts, problems) == 1.0
    assert frontier._frontier_accuracy([*texts[:2], "8"], problems) == 0.5


def test_frontier_bound():
    """The rule of three; and with k right answers a chance at which k or fewer have a probability
    of 5%, by adding up the binomial distribution."""
    from math import exp, lgamma, log
    assert frontier._upper_bound(0, 10_000) == pytest.approx(2.9957 / 10_000, rel=1e-3)
    for right, n in ((1, 10_000), (7, 10_000), (40, 2_000), (900, 100_000)):
        p = frontier._upper_bound(right, n)
        below = sum(exp(lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)
                        + k * log(p) + (n - k) * log(1 - p)) for k in range(right + 1))
        assert below == pytest.approx(0.05, abs=0.005)


@pytest.mark.parametrize("thinking, mistake", [
    ("25-7=18 then 18+9=27 then 27-3=24", "end"),              # all steps are right
    ("25-7=18 then 18+9=27", "end"),
    ("25-7=18 ok 18+9=27 ok 27-3=24 ok 24+1=25", "end"),
    ("25-7=18 then 18-3=15 then 15+9=24", "operand"),
    ("25-7=18 check 18+7=25 ok 18+9=28 then 28-3=25", "sum"),
    ("25-7=19 check 19+7=26 wait 25-7=18 ok 18+9=27 ok 27-9=18", "operand"),
    ("25-7=18 then 17+9=26", "other"), ("", "other"), ("25-7 is 18", "other"),
    ("25-7=18然后18+9=28", "sum"), ("25-7=19等等25-7=18正确18+3=21", "operand")])
def test_frontier_first_mistake(thinking, mistake):
    """By hand, of workings of 25-7+9-3. Lucky answers are not worked out."""
    problem = tasks.Problem("Compute 25-7+9-3", "24", "en", 3, "25-7+9-3")
    assert frontier._first_mistake(tasks.response(thinking, "1"), problem) == mistake
    lucky, bare = tasks.response(thinking, "24"), tasks.response(thinking, "24", tags=False)
    all_right = thinking == "25-7=18 then 18+9=27 then 27-3=24"
    assert frontier._first_mistake(lucky, problem) == (None if all_right else mistake)
    in_any_order = all_right or thinking == "25-7=18 then 18-3=15 then 15+9=24"
    for text in (lucky, bare):
        assert frontier._is_worked(text, problem) == in_any_order
    assert not frontier._is_worked(tasks.response(thinking, "1"), problem)


@pytest.fixture
def further(monkeypatch, tmp_path):
    """A function that returns (task, settings) with which an arm of frontier goes on after Zero.
    The records given to it are those of its log."""
    def run(name, records=()):
        seen = []
        monkeypatch.setattr(frontier.grpo, "train_rl",
                            lambda m, task, s, *_: seen.append((task, s)) or [])
        monkeypatch.setattr(frontier, "read_log", lambda _: [
            {"kind": "further", "tokens": 1, "frontier": share} for share in records])
        zero, trained = moe.Transformer(MICRO), []

        def stage(name, model, loop, steps, watch):
            trained.append(model)
            list(loop(model, None))

        folder = SimpleNamespace(path=tmp_path, run=resolve_settings("nano", []), stage=stage)
        frontier._train_further(name, folder, zero)
        assert trained[0] is not zero  # Zero is tested after its copy was trained
        return seen[0]
    return run


def test_frontier_arms_draw_the_levels_that_they_say(further):
    """Three rollouts of five have passed, so the frontier is at nine: a quarter of the questions
    are from nine, eight and seven each, the others are easier. An earlier step does not see the
    rollouts that came after it. The fixed arm asks three to six."""
    rng, records = random.Random(0), (0.5, 0.6, 0.1, 0.9, 0.2)
    for arm, of_step in (("curriculum", {0: 6, 2: 8, 5: 9}), ("expert_iteration", {5: 9}),
                         ("fixed", {5: None})):
        task, _ = further(arm, records)
        for step, top in of_step.items():
            problems = task.draw(rng, 240, step)
            count = collections.Counter(p.level for p in problems)
            if top is None:
                assert count == dict.fromkeys(range(3, 7), 60)
            else:
                assert [count[level] for level in (top, top - 1, top - 2)] == [60] * 3
                assert set(count) == set(range(3, top + 1))
            assert {tasks.part_of_problem(p.expression) for p in problems} == {"train"}


def test_frontier_expert_iteration_imitates_right_answers_only(further):
    """A wrong answer in the template has no higher reward than one without it. So in a group
    without right answers nothing is imitated. The other arms reward the template."""
    problem = tasks.make_problems("train", 1, (3,))[0]
    texts = ["<think>1</think><answer>1000</answer>", "1000",
             f"<think>1</think><answer>{problem.answer}</answer>"]

    def rewards(arm):
        task, s = further(arm)
        parts = [(weight, reward(texts, [problem] * 3)) for weight, reward in task.rewards.values()]
        return s, [sum(weight * values[i] for weight, values in parts) for i in range(3)]

    s, of_texts = rewards("expert_iteration")
    assert of_texts == [0.0, 0.0, 1.0]
    assert (s.objective, s.normalize_std, s.beta) == ("rest", False, 0.0)
    for arm in ("curriculum", "fixed"):
        s, of_texts = rewards(arm)
        assert of_texts[0] > of_texts[1] and s.objective == "grpo"


def test_frontier_longest_problems_fit_into_the_model():
    """The longest prompts and answers of a rollout and of a test fit into what nano reads."""
    rng, longest = random.Random(0), frontier.FURTHER["max_new_tokens"]
    drawn = [tasks.add_spaces(frontier._recurring(rng, frontier.LAST), rng) for _ in range(300)]
    asked = frontier._problems("test", frontier.LAST + 4, 100)
    for problem in (*drawn, *asked):
        assert len(tasks.encode_prompt(problem.question)) + longest <= moe.NANO.max_seq_len


def test_frontier_level_is_the_highest_with_half_right():
    """By hand."""
    assert frontier._highest({3: (0.9, 1), 4: (0.4, 1), 5: (0.5, 1), 6: (0.49, 1)}) == 5
    assert frontier._highest({3: (0.2, 1)}) == 0


@pytest.mark.parametrize("name", ["curriculum", "expert_iteration"])
def test_frontier_arm_ends_with_its_budget(arm, monkeypatch, name):
    """A tiny run of all parts: it stops at the budget, goes on where it stopped, and has numbers of
    every kind."""
    monkeypatch.setattr(frontier, "BUDGET", 300)
    monkeypatch.setattr(frontier, "FURTHER", frontier.FURTHER | {"max_new_tokens": 12})
    monkeypatch.setattr(frontier, "PROBLEMS", 2)
    monkeypatch.setattr(frontier, "BASE_ANSWERS", 4)
    numbers = arm(frontier, name)
    assert 250 <= numbers["generated"] < 300 + 4 * 2 * 12
    assert sum(numbers[f"mistake.{kind}"] for kind in frontier.MISTAKES) == 1
    assert {f"dev.{level}.0" for level in frontier.DEV_LEVELS} | {"dev_length.0"} <= set(numbers)
    assert numbers["level"] == 0 and numbers["frontier"] == frontier.FIRST
    if name == "curriculum":
        assert numbers["base.bound"] == pytest.approx(3 / 4, rel=0.01)
        assert numbers["base.top"] == 7 and numbers["base.right.7"] == 0


def test_frontier_rate_falls_at_the_end(monkeypatch):
    """By hand: after 8 of 10 rollouts with ten tokens each, the rate falls in two more rollouts. So
    it does if more of these rollouts are in the log."""
    monkeypatch.setattr(frontier, "BUDGET", 100)
    monkeypatch.setattr(frontier, "FALLING", 0.2)
    s = grpo.RL(steps=1000, decay=0.0, warmup=0)
    assert frontier._with_falling_rate(s, [{"tokens": 10}] * 7) is s
    for n in (8, 9):
        falling = frontier._with_falling_rate(s, [{"tokens": 10}] * n)
        assert (falling.steps, falling.decay) == (10, 0.2)
        rates = [learning_rate_at(step, 10, 0, falling.decay) for step in range(10)]
        assert rates == [1.0] * 9 + [pytest.approx(0.5)]


def test_frontier_goes_on_where_it_stopped(arm, monkeypatch):
    """A run that is stopped twice, before its rate falls and while it falls, has the numbers of an
    unbroken one."""
    for name, value in (("BUDGET", 500), ("FALLING", 0.5), ("PROBLEMS", 2), ("BASE_ANSWERS", 4),
                        ("EVERY", 1)):
        monkeypatch.setattr(frontier, name, value)
    monkeypatch.setattr(frontier, "FURTHER", frontier.FURTHER | {"max_new_tokens": 12})
    unbroken = arm(frontier, "expert_iteration")
    assert unbroken["rollouts"] >= 5
    shutil.rmtree("runs")
    shutil.rmtree("results")
    evaluate, stops = frontier.evaluate, [2, 4]

    def stop(*arguments, **named):
        rollouts = [r for r in read_log(next(Path("runs").glob("*expert_iteration-0")))
                    if r["kind"] == "further"]
        if stops and len(rollouts) == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt
        return evaluate(*arguments, **named)

    monkeypatch.setattr(frontier, "evaluate", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            arm(frontier, "expert_iteration")
    assert arm(frontier, "expert_iteration") == unbroken and not stops


def test_frontier_base_limit(monkeypatch):
    """By hand: two problems with three answers each. At seven operations one has two answers that
    are worked out, and the other a lucky one. At eight operations nothing is right."""
    monkeypatch.setattr(frontier, "PROBLEMS", 2)
    monkeypatch.setattr(frontier, "BASE_ANSWERS", 6)
    texts = {}
    for level in (7, 8):
        first, second = frontier._problems("test", level, 2)
        working, answer = tasks.write_working(first, "steps", random.Random(0))
        worked, lucky = tasks.response(working, answer), tasks.response("", second.answer)
        wrong = tasks.response(working, int(first.answer) + 1)
        texts[level] = ([worked, wrong, worked, wrong, lucky, wrong] if level == 7 else [wrong] * 6)
    levels = iter((7, 8))
    monkeypatch.setattr(frontier, "sample_answers", lambda model, prompts, *_, **__: [
        tasks.encode_response(text) for text in texts[next(levels)]])
    numbers = frontier._base_limit(None, 8, 9)
    assert (numbers["base.right.7"], numbers["base.worked.7"], numbers["base.solved.7"]) == (
        3, 2, 0.5)
    assert (numbers["base.right.8"], numbers["base.worked.8"], numbers["base.solved.8"]) == (
        0, 0, 0.0)
    assert numbers["base.bound"] == numbers["base.bound.8"] == frontier._upper_bound(0, 6)


def test_frontier_combine_takes_the_curriculums_own_level():
    """A seed that comes to eight operations: the base's numbers are those at eight."""
    numbers = {f"{arm}.level": 8 for arm in frontier.ARMS}
    for level in (7, 8, 9):
        numbers |= {f"curriculum.pass@1.{level}": level / 10, f"curriculum.length.{level}": level}
    for level in (7, 8):
        numbers |= {f"curriculum.base.right.{level}": 10 * level, f"curriculum.worked.{level}": 0.5,
                    f"curriculum.base.worked.{level}": 8 - level}
    found = frontier.combine(numbers | {"curriculum.base.bound": 3e-4})
    assert found["frontier.curriculum.level"] == 8 and found["frontier.base.bound"] == 3e-4
    assert (found["frontier.base.right"], found["frontier.base.worked"]) == (80, 0)
    assert (found["frontier.curriculum.pass@1"], found["frontier.curriculum.next"]) == (0.8, 0.9)
    assert (found["frontier.curriculum.length"], found["frontier.curriculum.worked"]) == (8, 0.5)


def test_emergence_arms(arm):
    """The arms differ in the corpus as they say, and a tiny run has numbers of base and Zero."""
    for name, settings in emergence.ARMS.items():
        corpus = resolve_settings("nano", settings.split()).corpus
        if name.isdigit():
            assert corpus.checked == int(name) / 100
            assert corpus.checked + corpus.steps == pytest.approx(0.38)
            assert corpus.shares()[3:] == pytest.approx(tasks.Corpus().shares()[3:])
        else:
            assert {corpus.steps_mixed, corpus.checked_mixed} == {0.5 * (name == "mixed")}
    numbers = arm(emergence, "0")
    assert {"base.pass@1", "zero.pass@1", "zero.hot", "zero.cool"} <= set(numbers)


def test_limit_arms(arm):
    """A tiny run: fixed and raised are the same up to the middle. After it, raised writes longer
    answers, as high does from the beginning; the random model hardly ever ends one."""
    numbers = {name: arm(limit, name) for name in limit.ARMS}
    for name, limits in (("fixed", 220), ("raised", 310), ("high", 400)):
        most = 8 * limits  # 4 problems, 2 answers
        assert 0.75 * most < numbers[name]["generated"] <= most
    for key in ("dev.1", "length.1", "cut.1", f"half.{limit.LOW}"):
        assert numbers["fixed"][key] == numbers["raised"][key]


def test_limit_half_goes_on_as_one_run(monkeypatch):
    """With the same limit in both halves, the weights are those of a run without a break."""
    torch.manual_seed(0)
    base = moe.Transformer(MICRO)
    trained = copy.deepcopy(base)
    run = resolve_settings("micro", [*FEW, "zero.dev_every=9", "zero.steps=6"])
    s = dataclasses.replace(run.zero, max_new_tokens=limit.LOW)
    for _ in grpo.train_rl(trained, make_task(run, s, rule_rewards(s)), s, run.seed):
        pass
    broken = copy.deepcopy(base)
    monkeypatch.setattr(limit, "load_kept", lambda *_: broken)
    limit.measure_arm("fixed", SimpleNamespace(run=run))
    for a, b in zip(trained.parameters(), broken.parameters()):
        assert torch.equal(a, b)


def test_studies_share_a_start(tmp_path, monkeypatch):
    """The folder of what all arms start from is beside theirs, whatever their names are."""
    monkeypatch.chdir(tmp_path)
    run, options = study._resolve_run("micro", [], 3, "", "x", [])
    for arm_name in ("merge", "merge_shortest"):
        folder = study.Folder(f"runs/micro-long2short-{arm_name}-3", run, options, ("base",))
        start = study.start_folder(folder, arm_name, ("base",))
        assert str(start.path) == "runs/micro-long2short-start-3"
