"""What does a higher limit on length do in the middle of RL?

The paper: the limit on R1-Zero's answers rose from 32,768 to 65,536 tokens at step 8,200.
Accuracy and length jumped there (R1 v2 section 2.1).

    python r1mini.py study limit

Both arms start from the same kept base, on problems with five and six operations, whose
checked answers need 60 to 150 tokens. The first half has a limit of LIMIT tokens:

    fixed     the second half has the same limit
    raised    the second half has twice the limit

Both have as many rollouts, so `raised` generates more tokens. Both are tested with a limit of
200 tokens, and with the last limit that they were trained with.
"""
import dataclasses

import tasks
from engine.evaluate import evaluate
from r1mini import make_task, rule_rewards
from tools.compare import compare
from tools.figures import Picture, arms_panel
from tools.study import load_kept, test_numbers, train_in_memory
from tools.tables import cell, table

SEEDS = range(6)
LIMIT = 80
SETTINGS, STAGES = ("zero.levels=5,6", "zero.dev_every=4", "eval.samples=8"), ()
ARMS = {"fixed": "", "raised": ""}
DIFFERENCES = {"limit.raised.minus_fixed.pass@1": ("raised.pass@1", "fixed.pass@1")}


def measure_arm(arm, folder):
    """The numbers of an arm: on test, on dev with its limit, and of its rollouts."""
    run = folder.run
    model, rollouts, numbers = load_kept(folder, "base"), 0, {"generated": 0}
    for half, limit in enumerate((LIMIT, 2 * LIMIT if arm == "raised" else LIMIT)):
        s = dataclasses.replace(run.zero, steps=run.zero.steps // 2, max_new_tokens=limit,
                                decay=run.zero.decay * half)  # the rate falls at the end only
        half_run = dataclasses.replace(run, zero=s, seed=run.seed + 1000 * half)
        task = make_task(half_run, s, rule_rewards(s))
        model, records, on_dev = train_in_memory(model, task, s, half_run)
        for record in records:
            step = rollouts + record["step"]
            numbers["generated"] += record["tokens"]
            if record["step"] % s.dev_every == 0:
                numbers[f"dev{step}"] = on_dev[f"dev{record['step']}"]
                numbers[f"length{step}"] = record["length"]
                numbers[f"cut{step}"] = record["cut_off"]
        rollouts += s.steps
    problems = tasks.make_problems("test", run.eval.problems, run.zero.levels)
    at_limit, _ = evaluate(model, problems, run.eval.fewer_samples, 1.0, 1.0, limit,
                           run.eval.rows, seed=1)  # the limit of the second half
    return numbers | test_numbers(model, run) | {"own_limit": at_limit["pass@1"]}


def picture(rows):
    """pass@1 and tokens of both arms."""
    names = {arm: arm for arm in ARMS}
    points, tokens = (rows[f"raised.{key}"]["mean"] - rows[f"fixed.{key}"]["mean"]
                      for key in ("pass@1", "length"))
    return Picture([arms_panel(f"A raised limit:\n{100 * points:+.1f} points of pass@1,", rows,
                               names, "pass@1", "correct answers"),
                    arms_panel(f"{tokens:+.0f} tokens\nin an answer", rows, names, "length",
                               "tokens in an answer", percent=False)],
                   "test problems with five and six operations, temperature 1; a dot is a seed")


def page(rows, notes):
    """The lines of the report: both arms by rollout, and the difference."""
    begin, lines = "fixed.dev", []
    steps = sorted(int(key.removeprefix(begin)) for key in rows if key.startswith(begin))
    for key, name in (("dev", "right on dev"), ("length", "tokens"), ("cut", "cut off")):
        body = [[arm, *(cell(rows, f"{arm}.{key}{step}") for step in steps)] for arm in ARMS]
        lines += [*table([name, *(f"rollout {step}" for step in steps)], body), ""]
    columns = {"pass@1": "pass@1, 200 tokens", "own_limit": "pass@1, its last limit",
               "length": "tokens", "generated": "tokens generated in RL"}
    body = [[arm, *(cell(rows, f"{arm}.{key}") for key in columns)] for arm in ARMS]
    lines += [*table(["on test", *columns.values()], body), ""]
    comparison = compare(rows, "fixed.pass@1", "raised.pass@1")
    if comparison:
        lines.append(f"- raised minus fixed: {comparison.text(points=True)}")
    return lines
