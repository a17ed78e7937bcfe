"""Should a reward pay for each unit test passed, or only when all pass?

The paper: all of R1's rewards for reasoning are binary, those for code too (R1 v2 section
B.3.1). That is `strict` below.

    python r1mini.py study program

    problem     f(0)=3 f(1)=5 f(2)=7 f(3)=9
    answer      an expression in x, here 2*x+3, that should pass these tests
    partial     reward: the share of the tests that it passes
    strict      reward: 1 if it passes all tests, else 0

A small dense base reads what careless authors wrote: their syntax is right, their answers
seldom are. RL then starts from this base once with each reward, with the same seed.

A line has slope 1..9 and intercept 0..99. tasks.part_of_problem splits the 900 lines into
train, dev and test by a hash of the right program. A wrong line meets the right one in one
point at most, so it passes none or one of the four tests. That is mostly f(0), which can be
copied from the prompt. The slope is a difference, which cannot.

Dev and test ask each of their more than 100 programs equally often. A standard error is over
programs: it says how much would change with other programs of this kind.
"""
import ast
import copy
import math
import operator
import re
from statistics import fmean, stdev

import torch

import moe
import tasks
from engine import devices
from engine.evaluate import prompts_of, repeat_for_answers, sample_answers
from engine.folder import read_log
from grpo import Task, train_rl
from r1mini import for_each, train
from tools.compare import compare, summarise
from tools.study import measure_once
from tools.tables import cell, table

SETTINGS = ("student_base.steps=400", "student_rl.max_new_tokens=24", "student_rl.steps=40",
            "student_rl.lr=1e-3", "eval.samples=8")
NEEDS, STAGES = (), ("authors", "partial", "strict")
DIFFERENCES = {"partial_less_strict.all": ("partial.all", "strict.all")}
EVERY = 5                                  # RL steps between evaluations on dev

# ------------------------------------------------------------------------------
# Problems, and the base's corpus

SLOPES, INTERCEPTS = range(1, 10), range(100)
RIGHT = {"slope": 0.25, "intercept": 0.3}  # chance that an author finds it; else it is random
FORMS = ("{a}*x+{b}", "{b}+{a}*x", "x+{b}", "{a}*x", "{a}+{b}", "{b}*x+{a}", "x*x+{b}", "{b}-x")


def _make_program(slope, intercept):
    """The problem of one line."""
    tests = " ".join(f"f({x})={slope * x + intercept}" for x in range(4))
    return tasks.Problem(tests, f"{slope}*x+{intercept}", "en", kind="program")


def _all_programs():
    """{part: its problems} of all 900 lines."""
    programs = {"train": [], "dev": [], "test": []}
    for slope in SLOPES:
        for intercept in INTERCEPTS:
            problem = _make_program(slope, intercept)
            programs[tasks.part_of_problem(problem.answer)].append(problem)
    return programs


PROGRAMS = _all_programs()


def _careless(problem, rng):
    """The answer of a careless author: an expression of any form, with a slope and an
    intercept that are sometimes right."""
    a, b = problem.answer.split("*x+")
    a = a if rng.random() < RIGHT["slope"] else rng.choice(SLOPES)
    b = b if rng.random() < RIGHT["intercept"] else rng.choice(INTERCEPTS)
    return tasks.response("", rng.choice(FORMS).format(a=a, b=b))


def _author(rng):
    """A document of the base's corpus."""
    problem = rng.choice(PROGRAMS["train"])
    return tasks.dialogue(problem, _careless(problem, rng))


# ------------------------------------------------------------------------------
# Rewards

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
MOST = 10 ** 6  # no value in a calculation may be larger
# Whole numbers, x, + - * and brackets. An x does not touch a digit.
PROGRAM = re.compile(r"(?:[0-9+*() -]|(?<![0-9])x(?![0-9]))+")


def _run_program(text, x):
    """The value of an expression of x, whole numbers, + - * and brackets. None if it is
    anything else, has more than 60 characters, or meets a value above a million.

    Nothing is executed: this walks over the syntax tree.
    """
    def walk(node):
        if isinstance(node, ast.Constant):  # PROGRAM lets only digits through
            value = node.value
        elif isinstance(node, ast.Name) and node.id == "x":
            value = x
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = -walk(node.operand)
        else:
            value = OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        if abs(value) > MOST:
            raise OverflowError
        return value

    if len(text) > 60 or not PROGRAM.fullmatch(text):
        return None
    try:
        return walk(ast.parse(text.strip(), mode="eval").body)
    except (ArithmeticError, AttributeError, KeyError, ValueError, SyntaxError, RecursionError,
            MemoryError):
        return None


def tests_passed(text, problem):
    """The share of a problem's unit tests (f(0)=3 f(1)=5 ...) that a response's answer
    passes."""
    answer = tasks.parse(text)[1]
    tests = re.findall(r"f\((-?[0-9]+)\)=(-?[0-9]+)", problem.question)
    if answer is None or not tests:
        return 0.0
    passed = [_run_program(answer, int(x)) == int(y) for x, y in tests]
    return sum(passed) / len(tests)


def all_passed(text, problem):
    """1.0 if a response passes all tests, else 0.0."""
    return float(tests_passed(text, problem) == 1.0)


def _any_passed(text, problem):
    """Whether a response passes at least one test."""
    return tests_passed(text, problem) > 0


REWARDS = {"partial": tests_passed, "strict": all_passed}
RULES = {"share": tests_passed, "all": all_passed, "any": _any_passed}
MEASURES = {name: tasks.mean_of(rule) for name, rule in RULES.items()}


# ------------------------------------------------------------------------------
# Training


def _task_of(reward):
    """The problems of `train` as a task for RL, with one of REWARDS."""
    return Task(draw=lambda rng, n, step: rng.choices(PROGRAMS["train"], k=n),
                encode=lambda problem: tasks.encode_prompt(problem.question),
                decode=tasks.decode, rewards={"tests": (1.0, for_each(reward))},
                measures=MEASURES, end_id=tasks.END_ID, pad_id=tasks.PAD_ID)


def _evaluate(model, part, run):
    """Asks each program of a part eval.samples times. Returns {"programs": how many, name of
    a measure: its mean over programs, name.error: the standard error of that mean}."""
    programs, samples = PROGRAMS[part], run.eval.samples
    program_of_answer = repeat_for_answers(programs, samples)
    answers = sample_answers(model, prompts_of(program_of_answer),
                             run.student_rl.max_new_tokens, run.eval.rows, seed=1)
    numbers = {"programs": len(programs)}
    for name, rule in RULES.items():
        scores = [rule(tasks.decode(ids), program)
                  for ids, program in zip(answers, program_of_answer)]
        of_programs = [fmean(scores[i:i + samples]) for i in range(0, len(scores), samples)]
        numbers[name] = fmean(of_programs)
        numbers[f"{name}.error"] = stdev(of_programs) / math.sqrt(len(programs))
    return numbers


def _watcher(folder, stage, every):
    """The function that a stage calls after each step. It evaluates on dev every `every`
    steps."""
    def watch(model, record, bar):
        if record["step"] % every == 0:
            dev = _evaluate(model, "dev", folder.run)
            folder.log({"kind": "dev", "stage": stage, "step": record["step"]} | dev)
            bar.write(f"  {stage} {record['step']:>4}: share of tests passed {dev['share']:.3f}"
                      f"  all {dev['all']:.3f}  any {dev['any']:.3f}")
    return watch


def _train_models(folder):
    """{stage: model} of the base and of RL from it with each reward."""
    run = folder.run
    torch.manual_seed(run.seed)
    base = devices.place_model(moe.Transformer(run.student), folder.options.device,
                         folder.options.dtype)

    def pretrain(model, state):
        return train(model, run.student_base, _author, run.seed, state)

    base = folder.stage("authors", base, pretrain, run.student_base.steps,
                        _watcher(folder, "authors", 100))
    models = {"authors": base}
    for name, reward in REWARDS.items():
        def reinforce(model, state):
            return train_rl(model, _task_of(reward), run.student_rl, run.seed, state)

        models[name] = folder.stage(name, copy.deepcopy(base), reinforce, run.student_rl.steps,
                                    _watcher(folder, name, EVERY))
    return models


def measure(folder):
    """The numbers of one seed: curves by step such as partial.dev5.all, and the test
    such as partial.all."""
    numbers = {}
    for name, model in _train_models(folder).items():
        test = measure_once(folder, f"test_{name}", lambda: _evaluate(model, "test", folder.run))
        numbers |= {f"{name}.{key}": x for key, x in test.items()}
    for record in read_log(folder.path):
        if record.get("stage") in REWARDS:  # an evaluation on dev
            point = f"{record['stage']}.dev{record['step']}"
        elif record["kind"] in REWARDS and record["step"] % EVERY == 0:  # an RL step
            point = f"{record['kind']}.train{record['step']}"
        else:
            continue
        numbers |= {f"{point}.{key}": record[key] for key in MEASURES}
    return numbers


# ------------------------------------------------------------------------------
# The report

# {name of a curve: (part, measure)}
CURVES = {"train: tests": ("train", "share"), "train: all": ("train", "all"),
          "dev: tests": ("dev", "share"), "dev: all": ("dev", "all")}


def page(rows, notes):
    """The lines of the report: tables, and which reward learns faster by the mean of each
    curve."""
    steps = sorted({int(key.split(".")[1].removeprefix("dev")) for key in rows
                    if key.startswith("partial.dev")})
    head = [f"{name}, {curve}" for name in REWARDS for curve in CURVES]
    body = [[str(step), *(cell(rows, f"{name}.{part}{step}.{key}") for name in REWARDS
                          for part, key in CURVES.values())] for step in steps]
    columns = [column for key in MEASURES for column in (key, f"{key}.error")]
    test = [[name, *(cell(rows, f"{name}.{key}") for key in columns)] for name in STAGES]
    lines = ["By RL step: the share of tests passed, and how often all tests pass. On train "
             "these are RL's own answers; dev is held out.", "",
             *table(["step", *head], body), "",
             f"Test, on {rows['partial.programs']['mean']:.0f} programs. An .error is the "
             "standard error over programs:", "", *table(["model", *columns], test), "",
             "The reward for each test minus the reward for all tests, as the mean over the "
             "curve from the first evaluation after step 0:"]
    for curve in CURVES:
        comparison = compare(_curve_means(rows, curve, steps[1:]), "strict", "partial")
        lines.append(f"- {curve}: {comparison.text(points=True)}; that partial is above strict "
                     f"{comparison.verdict}")
    return lines


def _curve_means(rows, curve, steps):
    """{"partial", "strict"}: for each seed the mean over the steps of a curve."""
    part, key = CURVES[curve]
    means = {}
    for name in REWARDS:
        points = [rows[f"{name}.{part}{step}.{key}"]["per_seed"] for step in steps]
        means[name] = summarise({seed: fmean(point[seed] for point in points)
                                 for seed in points[0]})
    return means
