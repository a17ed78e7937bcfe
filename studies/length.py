"""Does a reward for short answers cost accuracy?

The paper: answers become much longer in RL. Kimi k1.5 adds a length reward (section 2.3.3).
The shortest answer of a group gets 0.5 and the longest -0.5; a wrong answer gets at most 0.
The reward slows early training, so it acts only later. The paper does not publish its weight,
and it does not compare with RL without it.

    python r1mini.py study length

All arms start from the same kept base, with Kimi's objective, which does not divide rewards
by a group's standard deviation. The first three ask the same questions:

    none     no length reward
    start    the length reward from the first rollout
    half     the length reward from halfway (Kimi's warm-up)
    live     no length reward. Twice as many problems are answered. Only groups whose rewards
             differ are learnt from, and at most as many groups as in the other arms

The last arm is a control. With a length reward, the rewards of nearly all groups differ, so
more groups are learnt from. Is this the only effect? The control generates twice as many
tokens.
"""
from statistics import fmean

from r1mini import make_task, rule_rewards
from tools.compare import compare
from tools.figures import Picture, arms_panel
from tools.study import load_kept, test_numbers, train_in_memory
from tools.tables import cell, table

SEEDS = range(6)
SETTINGS, STAGES = ("zero.objective=kimi", "zero.dev_every=6", "eval.samples=8"), ()
WEIGHT = "zero.length_weight=0.3"  # from a trial on dev, one seed
ARMS = {"none": "", "start": WEIGHT, "half": f"{WEIGHT} zero.length_from=0.5",
        "live": "zero.oversample=2"}
DIFFERENCES = {f"{arm}_minus_none.pass@1": (f"{arm}.pass@1", "none.pass@1")
               for arm in ("start", "live")}
DIFFERENCES["length.minus_none.pass@1"] = "half.pass@1", "none.pass@1"


def measure_arm(arm, folder):
    """The numbers of an arm: on test, on dev every six rollouts, and of its groups."""
    run, s = folder.run, folder.run.zero
    task = make_task(run, s, rule_rewards(s))
    model, records, on_dev = train_in_memory(load_kept(folder, "base"), task, s, run)
    groups = {"equal_groups": fmean(r["dead_groups"] for r in records),
              "equal_groups_late": fmean(r["dead_groups"] for r in records[len(records) // 2:]),
              "generated": sum(r["tokens"] for r in records)}
    return test_numbers(model, run) | on_dev | groups


def combine(numbers):
    """How long the answers are with the length reward from halfway, as a share of those without
    it."""
    return {"length.tokens_ratio": numbers["half.length"] / numbers["none.length"]}


NAMES = {"none": "no length reward", "start": "length reward from the start",
         "half": "length reward from halfway", "live": "no length reward, live groups only"}


def picture(rows):
    """Tokens and pass@1 of all arms. The titles are about the length reward from the start."""
    names = {"none": "none", "start": "from the start", "half": "from halfway",
             "live": "none, live groups only"}
    tokens = rows["start.length"]["mean"] / rows["none.length"]["mean"] - 1
    points = 100 * (rows["start.pass@1"]["mean"] - rows["none.pass@1"]["mean"])
    return Picture([arms_panel(f"A length reward:\n{tokens:+.0%} tokens,", rows, names, "length",
                               "tokens in an answer", percent=False),
                    arms_panel(f"{points:+.1f} points\nof pass@1", rows, names, "pass@1",
                               "correct answers")],
                   "test problems, temperature 1; a dot is a seed, a line the mean")


def page(rows, notes):
    """The lines of the report: the arms, the length by level, and each arm against none."""
    levels = sorted(key.removeprefix("none.") for key in rows if key.startswith("none.length@"))
    columns = {"pass@1": "pass@1", "length": "tokens"}
    columns |= {key: f"tokens at level {key.partition('@')[2]}" for key in levels}
    columns |= {"reflection": "checks", "equal_groups": "groups with equal rewards",
                "equal_groups_late": "in the second half", "generated": "tokens generated"}
    body = [[name, *(cell(rows, f"{arm}.{key}") for key in columns)]
            for arm, name in NAMES.items()]
    lines = [*table(["arm", *columns.values()], body), ""]
    for arm, name in NAMES.items():
        comparison = compare(rows, "none.pass@1", f"{arm}.pass@1")
        if arm != "none" and comparison:
            lines.append(f"- {name}, minus none: {comparison.text(points=True)}")
    return lines
