"""study choices: how soon Zero is right on 85% of dev, from random weights, by recipe.

    python r1mini.py study choices

Each recipe is the default's with one change (AdamW with a rate of its own). What it costs to come
there is counted in operations (report.FLOPS), which a busy machine does not change.
Test problems are few, for nothing is read off them. Two recipes more, which no setting makes:

growing      pretraining whose steps read half as many documents as usual in the first third, and
             half as many again in the last: as many in all (V3's batch grows, too: section 4.2)
grown        Zero's RL from there
curriculum   Zero's RL from the usual base; levels are drawn by the share of answers to them that
             were wrong when dev was last asked (Kimi k1.5 section 2.3.4, there of each problem)
"""
import dataclasses
from pathlib import Path

import torch

import moe
import tasks
from engine import checkpoint
from engine.folder import read_log
from engine.watch import Watch
from grpo import Task, train_rl
from r1mini import draw_problem, for_each, rl, train
from tools.report import of_flops
from tools.tables import FLOPS, cell, per_seed, table

LIMIT = 0.85  # pass@1 on dev, at temperature 1, asked after every fifth RL step and the last
# What a recipe is called: its folder, and what it changes. Some change the base, some RL alone.
BASES = {
    "AdamW, no Muon": ("adamw", "base.muon_lr=0 base.lr=3e-3"),
    "twice the steps, of half the documents": ("small", "base.steps=1800 base.documents=40"),
    "a third fewer guesses, more drills": ("drills", "corpus.direct=0.3"),
    "rates that fall from the start": ("falling", "base.decay=1"),
}
REINFORCED = {
    "Dr. GRPO": ("dr_grpo", "zero.objective=dr_grpo"),
    "2 updates a rollout, not 4": ("updates", "zero.minibatches=2"),
    "half as fast again": ("faster", "zero.lr=6e-4"),
    "32 questions, not 24": ("more", "zero.problems=32"),
    "48 questions of 8 answers": ("wide", "zero.problems=48 zero.group_size=8"),
    "12 questions learnt from of 24, those whose answers differ": (
        "dynamic", "zero.problems=12 zero.oversample=2"),
}
DEFAULT = "as it is"
RUNS = [(f"choices-{name}-{{seed}}", f"zero --set {words} eval.problems=8 eval.longer=1")
        for name, words in BASES.values()] + [
       (f"choices-{name}-{{seed}}", "zero --from runs/r1-{seed}/base.pt "
        f"--set {words} eval.problems=8 eval.longer=1") for name, words in REINFORCED.values()]


def folders(seed, at):
    """{recipe: (folder of its base, folder of its RL)} of a seed."""
    default = f"{at}r1-{seed}"
    found = {DEFAULT: (default, default)}
    for recipes in (BASES, REINFORCED):
        for text, (name, _) in recipes.items():
            own = f"{at}choices-{name}-{seed}"
            found[text] = (own if recipes is BASES else default, own)
    return found


def climb(base, log):
    """What became of a recipe, by the logs of its pretraining and of its RL; one that did not come
    to LIMIT has no figure of what that took."""
    asked = [r for r in log if r["kind"] == "dev" and r["stage"] == "zero"]
    found = {"base": asked[0]["pass@1"]}
    found |= {f"at {r['step']}": r["pass@1"] for r in asked if r["step"] in (10, 20)}
    reached = next((r["step"] for r in asked if r["pass@1"] >= LIMIT), None)
    if reached is not None:
        steps = [r for r in log if r["kind"] == "zero" and r["step"] <= reached]
        pretraining = of_flops(base)["base"]
        found |= {"steps": reached, "base_tflop": pretraining,
                  "tflop": pretraining + of_flops([log[0], *steps])["zero"]}
    return found


def figures(seed, at="runs/"):
    """What became of each recipe of a seed, by key such as Dr. GRPO.tflop."""
    return {f"{text}.{key}": x for text, (start, own) in folders(seed, at).items()
            for key, x in climb(read_log(start), read_log(own)).items()}


# Schedules: what no setting makes

SETTINGS = ("eval.problems=8", "eval.longer=1")
NEEDS, STAGES = ("base.pt", "zero.pt"), ("growing", "grown", "curriculum")
GROWTH = (0.5, 1.0, 1.5)  # documents a step, of the usual number, in each part of pretraining
SCHEDULES = "batches that grow in pretraining", "a curriculum by success rate"


def growing(model, s, draw, seed, state=None):
    """r1mini.train, whose steps come to read more."""
    for i, factor in enumerate(GROWTH, 1):
        part = dataclasses.replace(s, documents=round(factor * s.documents))
        end = s.steps * i // len(GROWTH)
        if state and state["step"] >= end:
            continue
        for record, snapshot in train(model, part, draw, seed, state):
            yield record, snapshot
            if record["step"] == end:
                break
        state = snapshot()


def weakness(dev, levels):
    """By level the share of wrong answers in a record of dev, and 0.05, lest one be left out."""
    return [1.05 - dev["by_level"][str(level)] for level in levels]


def by_success(folder, s):
    """Zero's task, its levels drawn by weakness. Dev is in the log, so a killed run goes on to the
    same bits; on one process, for only the first writes the log."""
    def sample(rng, n, step):
        dev = [r for r in read_log(folder.path) if r["kind"] == "dev" and r["step"] <= step
               and r["stage"] == "curriculum"][-1]
        weights = weakness(dev, s.levels)
        return [draw_problem(rng, folder.run, rng.choices(s.levels, weights)) for _ in range(n)]
    return Task(draw=sample, encode=lambda problem: tasks.encode_prompt(problem.question),
                decode=tasks.decode, measures=tasks.MEASURES, end_id=tasks.END_ID,
                pad_id=tasks.PAD_ID, rewards={
                    "accuracy": (s.accuracy_weight, for_each(tasks.accuracy)),
                    "format": (s.format_weight, for_each(tasks.format_reward))})


def measure(folder):
    """The figures of a seed, by key such as grown.tflop."""
    run, given = folder.run, Path(folder.run.start).parent
    torch.manual_seed(run.seed)
    model = folder.place(moe.Transformer(run.model))
    model = folder.stage("growing", model, lambda m, state: growing(
        m, run.base, lambda rng: tasks.make_document(rng, run.corpus), run.seed, state),
        run.base.steps, Watch(folder, "growing", run.base.dev_every, run.base.steps))
    rl(folder, "grown", {"growing": model}, "growing", run.zero)
    base, _ = checkpoint.load(given / "base.pt", folder.options.device, folder.options.dtype)
    folder.stage("curriculum", base, lambda m, state: train_rl(
        m, by_success(folder, run.zero), run.zero, run.seed, state), run.zero.steps,
        Watch(folder, "curriculum", run.zero.dev_every, run.zero.steps, run.zero))
    own, usual = read_log(folder.path), read_log(given)
    grown = called(own, growing="base", grown="zero")
    logs = (grown, grown), (usual, called(own, curriculum="zero"))
    return {f"{text}.{key}": x for text, pair in zip(SCHEDULES, logs)
            for key, x in climb(*pair).items()}


def called(log, **names):
    """The records of some of a log's stages, called by other names."""
    found = log[:1]
    for r in log[1:]:
        key = "stage" if "stage" in r else "kind"
        if r[key] in names:
            found.append(r | {key: names[r[key]]})
    return found


def page(rows, notes):
    """What each recipe takes to 85%."""
    return compared(rows, [*folders(0, ""), *SCHEDULES])


def compared(rows, names):
    """A table of recipes; what it takes is of the seeds that came there."""
    columns = {"base": "base, on dev", "at 10": "after 10 RL steps", "at 20": "after 20",
               "steps": "RL steps to 85%", "base_tflop": "TFLOP, base",
               "tflop": "TFLOP to 85%"}
    count = len(rows[f"{DEFAULT}.base"]["per_seed"])
    body = []
    for name in names:
        there = len(per_seed(rows, f"{name}.tflop"))
        body.append([name, *(cell(rows, f"{name}.{key}") for key in columns),
                     f"{there} of {count}"])
    return [*table(["recipe", *columns.values(), "seeds at 85%"], body), "",
            "pass@1 on dev problems at temperature 1, 16 answers to each, after every fifth RL "
            f"step and the last. {FLOPS} Muon's own products are left out too."]
