"""The reward as a share of unit tests passed, against all or nothing.

    python r1mini.py study program

    problem     f(0)=3 f(1)=5 f(2)=7 f(3)=9
    answer      an expression in x, here 2*x+3, that must pass these tests
    partial     reward: the share of the tests it passes
    strict      reward: 1 if it passes all, else 0

A small dense base reads what careless authors wrote: of the right syntax, seldom right. RL then
starts from it with each reward, on the same seed. A line has slope 1..9 and intercept 0..9; which
of the 90 lines are for training, dev or test, tasks.part_of says. A wrong line meets the right one
in one point at most, so it passes none or one of the four tests, mostly f(0), which can be copied
from the prompt. Slopes can be learnt by heart, there are so few lines; then train rises without
dev. R1's own rewards for reasoning are binary (R1 v2 B.3.1): strict is the paper's.
"""
import ast
import copy
import operator
import re

import torch

import moe
import tasks
from engine import devices
from engine.evaluate import mean, prompts_of, sample_answers
from engine.folder import read_log
from grpo import Task, train_rl
from r1mini import for_each, train
from tools.study import once
from tools.tables import cell, table

SETTINGS = ("student_base.steps=400", "student_rl.max_new_tokens=24", "student_rl.steps=40",
            "student_rl.lr=1e-3", "eval.samples=64")
NEEDS, STAGES = (), ("authors", "partial", "strict")
EVERY = 5                                  # RL steps between evaluations on dev
RIGHT = {"slope": 0.25, "intercept": 0.3}  # chance that an author finds it; else it is any
FORMS = ("{a}*x+{b}", "{b}+{a}*x", "x+{b}", "{a}*x", "{a}+{b}", "{b}*x+{a}", "x*x+{b}", "{b}-x")


def make_program(slope, intercept):
    """The problem of one line."""
    tests = " ".join(f"f({x})={slope * x + intercept}" for x in range(4))
    return tasks.Problem(tests, f"{slope}*x+{intercept}", "en", kind="program")


# All problems, by part of the world.
PROGRAMS = {part: [problem for a in range(1, 10) for b in range(10)
                   for problem in [make_program(a, b)] if tasks.part_of(problem.answer) == part]
            for part in ("train", "dev", "test")}


def careless(problem, rng):
    """What a careless author answers: any form; slope and intercept are sometimes right."""
    a, b = problem.answer.split("*x+")
    a = a if rng.random() < RIGHT["slope"] else rng.randint(1, 9)
    b = b if rng.random() < RIGHT["intercept"] else rng.randint(0, 9)
    return tasks.response("", rng.choice(FORMS).format(a=a, b=b))


def author(rng):
    """A document of the base's corpus."""
    problem = rng.choice(PROGRAMS["train"])
    return tasks.dialogue(problem, careless(problem, rng))


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def run_program(text, x):
    """The value of an expression of x, whole numbers, +, - and *, by a walk over its syntax tree;
    None if it is anything else, long or large. Nothing of it is executed."""
    def walk(node):
        if isinstance(node, ast.Constant):  # digits alone pass the test below
            value = node.value
        elif isinstance(node, ast.Name) and node.id == "x":
            value = x
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = -walk(node.operand)
        else:
            value = OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        return value if abs(value) <= 10 ** 6 else 1 / 0
    if len(text) > 60 or not re.fullmatch(r"(?:[0-9+*() -]|(?<![0-9])x(?![0-9]))+", text):
        return None
    try:
        return walk(ast.parse(text.strip(), mode="eval").body)
    except (ArithmeticError, AttributeError, KeyError, ValueError, SyntaxError, RecursionError,
            MemoryError):
        return None


def tests_passed(text, problem):
    """The share of a problem's unit tests, f(0)=3 f(1)=5, that the answer of a response passes."""
    answer = tasks.parse(text)[1]
    tests = re.findall(r"f\((-?[0-9]+)\)=(-?[0-9]+)", problem.question)
    passed = [answer is not None and run_program(answer, int(x)) == int(y) for x, y in tests]
    return sum(passed) / len(tests) if tests else 0.0


def all_passed(text, problem):
    """1.0 if a response passes all tests, else 0.0."""
    return float(tests_passed(text, problem) == 1.0)


REWARDS = {"partial": tests_passed, "strict": all_passed}
MEASURES = {"share": tests_passed, "all": all_passed,
            "any": lambda text, problem: tests_passed(text, problem) > 0}


def passed(model, part, run):
    """{measure: its mean over answers to all problems of a part}."""
    asked = [problem for problem in PROGRAMS[part] for _ in range(run.eval.samples)]
    ids = sample_answers(model, prompts_of(asked), run.student_rl.max_new_tokens, run.eval.rows,
                         seed=1)
    pairs = [(tasks.decode(answer), problem) for answer, problem in zip(ids, asked)]
    return {name: mean(f(*pair) for pair in pairs) for name, f in MEASURES.items()}


def task_of(rule):
    """The world as RL sees it, with a reward."""
    return Task(draw=lambda rng, n, step: rng.choices(PROGRAMS["train"], k=n),
                encode=lambda problem: tasks.encode_prompt(problem.question), decode=tasks.decode,
                rewards={"tests": (1.0, for_each(rule))}, measures=MEASURES, end_id=tasks.END_ID,
                pad_id=tasks.PAD_ID)


def watcher(folder, stage, every):
    """What happens after a step: evaluation on dev."""
    def watch(model, record, bar):
        if record["step"] % every == 0:
            r = passed(model, "dev", folder.run)
            folder.log({"kind": "dev", "stage": stage, "step": record["step"]} | r)
            bar.write(f"  {stage} {record['step']:>4}: of the tests {r['share']:.3f}  all "
                      f"{r['all']:.3f}  any {r['any']:.3f}")
    return watch


def measure(folder):
    """The figures of one seed: dev curves, and test, by key such as partial.all."""
    run = folder.run
    torch.manual_seed(run.seed)
    base = devices.place(moe.Transformer(run.student), folder.options.device, folder.options.dtype)
    models = {"authors": folder.stage(
        "authors", base, lambda m, state: train(m, run.student_base, author, run.seed, state),
        run.student_base.steps, watcher(folder, "authors", 100))}
    for name, rule in REWARDS.items():
        models[name] = folder.stage(
            name, copy.deepcopy(models["authors"]), lambda m, state: train_rl(
                m, task_of(rule), run.student_rl, run.seed, state),
            run.student_rl.steps, watcher(folder, name, EVERY))
    found = {f"{name}.{key}": x for name, model in models.items() for key, x in once(
        folder, f"test_{name}", lambda: passed(model, "test", run)).items()}
    for r in read_log(folder.path):
        if r.get("stage") in REWARDS:
            found |= {f"{r['stage']}.dev{r['step']}.{key}": r[key] for key in MEASURES}
        elif r["kind"] in REWARDS and r["step"] % EVERY == 0:
            found |= {f"{r['kind']}.train{r['step']}.{key}": r[key] for key in MEASURES}
    return found


# What a curve is of: part of the world and measure.
CURVES = {"train: tests": ("train", "share"), "train: all": ("train", "all"),
          "dev: tests": ("dev", "share"), "dev: all": ("dev", "all")}


def page(rows, notes):
    """The tables of the report, and which reward learns faster, by the mean of each curve."""
    steps = sorted({int(key.split(".")[1][3:]) for key in rows if key.startswith("partial.dev")})
    lines = ["By RL step: the share of tests passed, and how often all are; on train as RL acts, "
             "on dev held out.", "", *table(
                 ["step", *(f"{name}, {text}" for name in REWARDS for text in CURVES)], [
                     [str(n), *(cell(rows, f"{name}.{part}{n}.{key}") for name in REWARDS
                                for part, key in CURVES.values())] for n in steps]),
             "", "Test:", "", *table(["model", *MEASURES], [
                 [name, *(cell(rows, f"{name}.{key}") for key in MEASURES)] for name in STAGES]),
             "", "Partial credit beside all or nothing, mean over the curve from the first step:"]
    for text, (part, key) in CURVES.items():
        points = [[rows[f"{name}.{part}{n}.{key}"]["per_seed"] for n in steps[1:]]
                  for name in REWARDS]
        gaps = [sum(a[seed] - b[seed] for a, b in zip(*points)) / len(points[0])
                for seed in points[0][0]]
        lines.append(f"- {text}: {100 * sum(gaps) / len(gaps):+.1f} points, ahead on "
                     f"{sum(gap > 0 for gap in gaps)} of {len(gaps)} seeds")
    return lines
