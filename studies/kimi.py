"""Does Kimi k1.5's objective learn as GRPO does?

The paper: online mirror descent on whole answers (Kimi k1.5 section 2.3.2, eq 3). It has no
clip, no KL term per token, and no division by the group's standard deviation. Imitating only
the best answers (ReST) needs clearly more samples (section 3.5, Figure 10). The paper does
not compare with GRPO. It publishes neither tau nor the learning rate.

    python r1mini.py study kimi

All arms start from the same kept base. RL has the same questions, learning rate and number
of answers in all of them. CONTROL names the arm from which each one differs in one thing:

    grpo         Zero's default
    kimi         mirror descent; the optimizer keeps its state from rollout to rollout
    kimi_reset   the same, but the optimizer is reset before each rollout, as in the paper
    rest         only answers whose reward is above their group's mean are imitated
    warm_grpo    GRPO after a warm-up by SFT on checked workings, which is Kimi's order
    warm_kimi    mirror descent after the same warm-up
"""
import random

import torch

import grpo
import tasks
from engine.folder import read_log
from r1mini import draw_problem, one_of, rl, supervised
from tools.compare import compare
from tools.figures import Picture, arms_panel
from tools.study import load_kept, test_record
from tools.tables import cell, table

SEEDS = range(6)
SETTINGS, STAGES = ("eval.longer=1", "data.prompts=8"), ("warm", "zero")
MIRROR = "zero.objective=kimi zero.tau=0.1"  # tau: from a trial on dev, one seed
ARMS = {"grpo": "", "kimi": MIRROR, "kimi_reset": f"{MIRROR} zero.reset_optimizers=true",
        "rest": "zero.objective=rest", "warm_grpo": "", "warm_kimi": MIRROR}
CONTROL = {"kimi": "grpo", "kimi_reset": "kimi", "rest": "kimi", "warm_grpo": "grpo",
           "warm_kimi": "warm_grpo"}
DIFFERENCES = {f"{arm}.minus_{control}.pass@1": (f"{arm}.pass@1", f"{control}.pass@1")
               for arm, control in CONTROL.items()}
WORKINGS = 300  # that the warm-up learns from
GOAL = 0.85     # pass@1 on dev


def rest(new, old, reference, advantage, mask, batch, s):
    """ReST: the log-probability of the answers that are better than their group, without a
    weight. The other answers have no gradient."""
    better = (advantage > 0).float()             # (n,)
    log_probability = (new * mask).sum(1)        # (n,), log pi of whole answers
    J = (better * log_probability).sum() / batch.answers
    return J, {"kl": grpo.kl_k3(new, old), "clip": torch.zeros_like(mask).bool()}


grpo.OBJECTIVES["rest"] = rest
grpo.SETTINGS["rest"] = grpo.SETTINGS["kimi"]


def _warm_up(folder, base):
    """The base after SFT on a few workings that check every step, each in the language of its
    question."""
    documents = []
    rng = random.Random(f"{folder.run.seed}/warm")
    for _ in range(WORKINGS):
        problem = draw_problem(rng, folder.run, folder.run.zero.levels)
        thinking, answer = tasks.write_working(problem, "checked", rng)
        documents.append(tasks.dialogue(problem, tasks.response(thinking, answer)))
    return supervised(folder, "warm", base, folder.run.dev1, one_of(documents))


def measure_arm(arm, folder):
    """The numbers of an arm: on test, and the rollouts to GOAL on dev."""
    model, before = load_kept(folder, "base"), "base"
    if arm.startswith("warm"):
        model, before = _warm_up(folder, model), "warm"
    rl(folder, "zero", {before: model}, before, folder.run.zero)
    log, test = read_log(folder.path), test_record(folder.path, "zero")
    updates = [r for r in log if r["kind"] == "zero"]
    on_dev = {r["step"]: r["pass@1"] for r in log if r["kind"] == "dev" and r["stage"] == "zero"}
    numbers = {key: test[key] for key in ("pass@1", "length", "reflection")}
    numbers |= {f"dev{step}": share for step, share in on_dev.items()}
    # A seed that never reaches GOAL counts with all its rollouts. If it were left out, an arm
    # that fails on some seeds would look faster than it is.
    reached = [step for step, share in on_dev.items() if share >= GOAL]
    numbers["rollouts_to_85"] = min(reached, default=folder.run.zero.steps)
    clipped = sum(r["grad_clipped"] for r in updates)
    return numbers | {"clipped": clipped / len(updates) / folder.run.zero.minibatches}


NAMES = {"grpo": "GRPO", "kimi": "mirror descent", "kimi_reset": "mirror descent, reset optimizer",
         "rest": "imitation of the better answers (ReST)", "warm_grpo": "warm-up, then GRPO",
         "warm_kimi": "warm-up, then mirror descent"}


def picture(rows):
    """pass@1 of all arms. The title says how far mirror descent and imitation are from GRPO."""
    mirror, best = (100 * (rows[f"{arm}.pass@1"]["mean"] - rows["grpo.pass@1"]["mean"])
                    for arm in ("kimi", "rest"))
    title = f"Mirror descent: {mirror:+.1f} points\nfrom GRPO; imitation: {best:+.1f}"
    return Picture([arms_panel(title, rows, NAMES, "pass@1")],
                   "test problems, temperature 1; a dot is a seed, a line the mean")


def page(rows, notes):
    """The lines of the report: a table of the arms, and each arm against its control."""
    steps = sorted(int(key.removeprefix("grpo.dev")) for key in rows if key.startswith("grpo.dev"))
    columns = {"pass@1": "pass@1"} | {f"dev{step}": f"dev, rollout {step}" for step in steps}
    columns |= {"rollouts_to_85": "rollouts to 85% on dev (all, if never)", "length": "tokens",
                "reflection": "checks", "clipped": "updates whose gradient was clipped"}
    body = [[name, *(cell(rows, f"{arm}.{key}") for key in columns)]
            for arm, name in NAMES.items()]
    lines = [*table(["arm", *columns.values()], body), ""]
    for arm, control in CONTROL.items():
        comparison = compare(rows, f"{control}.pass@1", f"{arm}.pass@1")
        if comparison:
            lines.append(f"- {NAMES[arm]}, minus {NAMES[control]}: "
                         f"{comparison.text(points=True)}")
    return lines
