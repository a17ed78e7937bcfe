"""Does RL on sums make a model a better start for RL on another task?

The paper: R1-Zero learns to reason by RL on verifiable problems (R1 v1 section 2.2). It does not
say whether its weights are a better start for RL on another task than the base's.

    python r1mini.py study transfer

The task is to put digits in order: `Sort 3820`, answer `0238`. workshop/own.py uses the same task
as an example. All arms first learn from the same 3,200 documents. Three in ten of these are right,
so that RL has something to reward. Then all arms do the same number of rollouts, with the same
questions. An arm is the kept model that it starts from:

    from_base    the base, which is the control
    from_zero    Zero
    from_r1      R1

The digits of a test question are in no training question, in any order. Only 88 sets of digits are
of the test part, so 500 questions are less than 500 independent ones.
"""
import random
from statistics import fmean

import tasks
from engine.devices import copy_model
from engine.evaluate import prompts_of, repeat_for_answers, sample_answers
from grpo import Task, train_rl
from r1mini import train
from tools.compare import compare
from tools.figures import Picture, arms_panel
from tools.study import load_kept
from tools.tables import cell, table

SEEDS = range(6)
SETTINGS = ("zero.steps=20", "zero.max_new_tokens=12", "zero.dev_every=2", "dev1.steps=100",
            "dev1.documents=32", "dev1.warmup=5", "dev1.lr=1e-2", "dev1.muon_lr=5e-3")
STAGES = ()
ARMS = dict.fromkeys(("from_base", "from_zero", "from_r1"), "")
DIFFERENCES = {f"{arm}_minus_from_base.{key}": (f"{arm}.{key}", f"from_base.{key}")
               for arm in ("from_zero", "from_r1")
               for key in ("pass@1", "mean_on_dev", "before", "gain")}
RIGHT = 0.3  # share of documents that give the right answer; others can do so by chance


# ------------------------------------------------------------------------------
# The task


def question(rng, n=1, step=0, part="train"):
    """n problems of a part. step is the rollout's number, for tasks that become harder; here it is
    not used."""
    problems = []
    while len(problems) < n:
        drawn = "".join(rng.choices("0123456789", k=4))
        answer = "".join(sorted(drawn))
        if tasks.part_of_problem(f"sort/{answer}") == part:
            problems.append(tasks.Problem(f"Sort {drawn}", answer, "en"))
    return problems


def document(rng):
    """A document for the base. Three in ten give the digits in order, others in a random order."""
    [problem] = question(rng)
    shuffled = "".join(rng.sample(problem.answer, 4))
    return tasks.dialogue(problem, problem.answer if rng.random() < RIGHT else shuffled)


def right(texts, problems):
    """The reward of each text: 1.0 if it is the answer and nothing else, else 0.0."""
    return [float(text == problem.answer) for text, problem in zip(texts, problems)]


def make_task(draw, reward):
    """The task for grpo.train_rl. draw(rng, n, step) -> n problems; reward(texts, problems) -> a
    number for each text."""
    return Task(draw=draw, encode=lambda problem: tasks.encode_prompt(problem.question),
                decode=tasks.decode, rewards={"accuracy": (1.0, reward)}, measures={},
                end_id=tasks.END_ID, pad_id=tasks.PAD_ID)


# ------------------------------------------------------------------------------
# The arms


def _test(model, run, part):
    """pass@1 at temperature 1 on questions of a part."""
    problems = question(random.Random(f"{part}/transfer"), run.eval.problems, part=part)
    asked = repeat_for_answers(problems, run.eval.fewer_samples)
    ids = sample_answers(model, prompts_of(asked), run.zero.max_new_tokens, run.eval.rows, seed=1)
    return sum(right([tasks.decode(x) for x in ids], asked)) / len(asked)


def measure_arm(arm, folder):
    """The numbers of an arm: on test before and after RL, and on dev every few rollouts."""
    run, s = folder.run, folder.run.zero
    model = copy_model(load_kept(folder, arm.removeprefix("from_")))
    for _ in train(model, run.dev1, document, run.seed):
        pass
    numbers, on_dev = {"before": _test(model, run, "test")}, {0: _test(model, run, "dev")}
    for record, _ in train_rl(model, make_task(question, right), s, run.seed):
        if record["step"] % s.dev_every == 0:
            on_dev[record["step"]] = _test(model, run, "dev")
            print(f"  rollout {record['step']}: dev {on_dev[record['step']]:.3f}", flush=True)
    numbers |= {f"dev{step}": share for step, share in on_dev.items()}
    after = _test(model, run, "test")
    return numbers | {"pass@1": after, "gain": after - numbers["before"],
                      "mean_on_dev": fmean(share for step, share in on_dev.items() if step > 0)}


def combine(numbers):
    """Accuracy of each arm after RL."""
    return {f"transfer.{arm}.pass@1": numbers[f"{arm}.pass@1"] for arm in ARMS}


def picture(rows):
    """Right answers to the other task after RL and on the way, by the model that RL starts from."""
    names = {"from_base": "from the base", "from_zero": "from Zero", "from_r1": "from R1"}
    after, on_the_way = (100 * (rows[f"from_zero.{key}"]["mean"] - rows[f"from_base.{key}"]["mean"])
                         for key in ("pass@1", "mean_on_dev"))
    return Picture([arms_panel(f"From Zero: {after:+.1f} points\nafter RL on sorted digits,", rows,
                               names, "pass@1", "correct answers"),
                    arms_panel(f"{on_the_way:+.1f} points\non the way", rows, names,
                               "mean_on_dev", "correct, mean on dev")],
                   "test and dev questions, temperature 1; a dot is a seed, a line the mean")


def page(rows, notes):
    """The lines of the report: the arms with their training curves on dev, and how from_zero and
    from_r1 differ from from_base."""
    steps = sorted(int(key.removeprefix("from_base.dev")) for key in rows
                   if key.startswith("from_base.dev"))
    columns = {"before": "before RL", "pass@1": "after RL", "gain": "gain by RL",
               "mean_on_dev": "mean on dev"}
    columns |= {f"dev{step}": f"dev, rollout {step}" for step in steps}
    body = [[arm, *(cell(rows, f"{arm}.{key}") for key in columns)] for arm in ARMS]
    lines = [*table(["start", *columns.values()], body), ""]
    for arm in ("from_zero", "from_r1"):
        for key, name in columns.items():
            comparison = compare(rows, f"from_base.{key}", f"{arm}.{key}")
            if comparison and not key.startswith("dev"):
                lines.append(f"- {name}, {arm}, minus from_base: {comparison.text(points=True)}")
    return lines
