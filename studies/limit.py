"""What does a higher limit on length do in the middle of RL?

The paper: the limit on R1-Zero's answers rose from 32,768 to 65,536 tokens at step 8,200.
Accuracy and length jumped there (R1 v2 section 2.1).

    python r1mini.py study limit

All arms start from the same kept Zero, on problems with six and seven operations, on which it is
often wrong. With checks, answers to these have 80 to 140 tokens. Zero was trained with a limit of
200. So `fixed` and `raised` first have to learn to keep within less. The arms differ in the limit
of the rollouts:

    fixed     110 tokens
    raised    110 tokens, and 200 from the middle on
    high      200 tokens from the beginning

The learning rate is constant for 70% of the rollouts, so it is still high when the limit rises. All
arms have as many rollouts, so an arm with a higher limit may generate more tokens. The answers to
dev problems have at most 200 tokens in all arms. Halfway, the same weights are also tested with
110: the gain at once needs no learning. A stopped arm begins anew.
"""
import dataclasses

import tasks
from engine.evaluate import evaluate
from grpo import train_rl
from r1mini import make_task, rule_rewards
from tools.compare import compare
from tools.figures import Picture, lines_panel
from tools.study import load_kept, test_numbers
from tools.tables import cell, table

SEEDS = range(6)
LOW, HIGH = 110, 200  # tokens
SETTINGS, STAGES = ("zero.levels=6,7", "zero.dev_every=4", "zero.decay=0.3", "eval.samples=8"), ()
LIMITS = {"fixed": (LOW, LOW), "raised": (LOW, HIGH), "high": (HIGH, HIGH)}
ARMS = dict.fromkeys(LIMITS, "")
DIFFERENCES = {f"limit.{arm}.minus_fixed.{key}": (f"{arm}.{key}", f"fixed.{key}")
               for arm in ("raised", "high") for key in ("pass@1", "at_limit", "length")}
DIFFERENCES |= {f"limit.raised.minus_high.{key}": (f"raised.{key}", f"high.{key}")
                for key in ("pass@1", "length")}


def measure_arm(arm, folder):
    """The numbers of an arm: on test, on dev, and of its rollouts. dev and length: every few
    rollouts on dev, with the limit HIGH. half.110, half.200: halfway on dev, with both limits.
    at_limit: on test with LOW."""
    run, model, state = folder.run, load_kept(folder, "zero"), None
    dev, test = (tasks.make_problems(part, n, run.zero.levels)
                 for part, n in (("dev", run.eval.dev_problems), ("test", run.eval.problems)))
    middle, numbers = run.zero.steps // 2, {"generated": 0}

    def test_with(limit, problems, samples):
        means, _ = evaluate(model, problems, samples, 1.0, 1.0, limit, run.eval.rows, seed=1)
        return means

    for limit, last in zip(LIMITS[arm], (middle, run.zero.steps)):
        s = dataclasses.replace(run.zero, max_new_tokens=limit)
        for record, snapshot in train_rl(model, make_task(run, s, rule_rewards(s)), s, run.seed,
                                         state):
            step = record["step"]
            numbers["generated"] += record["tokens"]
            numbers[f"cut.{step}"] = record["cut_off"]
            if step % s.dev_every == 0:
                means = test_with(HIGH, dev, run.eval.samples)
                numbers |= {f"dev.{step}": means["pass@1"], f"length.{step}": means["length"]}
            if step == last:
                state = snapshot()  # the second half goes on from it
                break
        if last == middle:
            numbers |= {f"half.{x}": test_with(x, dev, run.eval.samples)["pass@1"]
                        for x in (LOW, HIGH)}
    at_limit = test_with(LOW, test, run.eval.fewer_samples)
    return numbers | test_numbers(model, run) | {"at_limit": at_limit["pass@1"]}


NAMES = {"raised": "raised", "fixed": "fixed", "high": "high from the start"}


def picture(rows):
    """pass@1 and tokens on dev by rollout."""
    points, tokens = (rows[f"raised.{key}"]["mean"] - rows[f"fixed.{key}"]["mean"]
                      for key in ("pass@1", "length"))
    return Picture([lines_panel(f"A raised limit:\n{100 * points:+.1f} points of pass@1,", rows,
                                NAMES, "dev", "rollout", "correct answers"),
                    lines_panel(f"{tokens:+.0f} tokens\nin an answer", rows, NAMES, "length",
                                "rollout", "tokens in an answer", percent="")],
                   "dev problems with six and seven operations; the titles are of test problems")


def page(rows, notes):
    """The lines of the report: the arms by rollout, halfway, on test, and their differences."""
    begin, lines = "fixed.dev.", []
    steps = sorted(int(key.removeprefix(begin)) for key in rows if key.startswith(begin))
    for key, name in (("dev", "right on dev"), ("length", "tokens on dev"),
                      ("cut", "cut off in the rollout")):
        body = [[name_of_arm, *(cell(rows, f"{arm}.{key}.{step}") for step in steps)]
                for arm, name_of_arm in NAMES.items()]
        lines += [*table([name, *(f"rollout {step}" for step in steps)], body), ""]
    columns = {f"half.{LOW}": f"halfway on dev, {LOW} tokens",
               f"half.{HIGH}": f"halfway on dev, {HIGH} tokens",
               "pass@1": f"test, {HIGH} tokens", "at_limit": f"test, {LOW} tokens",
               "length": "tokens", "reflection": "checks", "generated": "tokens generated in RL"}
    body = [[name, *(cell(rows, f"{arm}.{key}") for key in columns)]
            for arm, name in NAMES.items()]
    lines += [*table(["limit", *columns.values()], body), ""]
    for control, arm in (("fixed", "raised"), ("fixed", "high"), ("high", "raised")):
        comparison = compare(rows, f"{control}.pass@1", f"{arm}.pass@1")
        if comparison:
            lines.append(f"- {arm} minus {control}: {comparison.text(points=True)}")
    return lines
