"""study schedules: two recipes beside those of study choices, which no setting makes.

    python r1mini.py study schedules

growing      pretraining whose steps read half as many documents as usual in the first third, and
             half as many again in the last: as many in all (V3's batch grows, too: section 4.2)
grown        Zero's RL from there
curriculum   Zero's RL from the usual base; levels are drawn by the share of answers to them that
             were wrong when dev was last asked (Kimi k1.5 section 2.3.4, there of each problem)

Each is compared with runs/r1-SEED, as in study choices; nothing here is read off test problems.
"""
import dataclasses
from pathlib import Path

import torch

import moe
import tasks
from extras import choices
from extras.folder import read_log
from grpo import Task, train_rl
from r1mini import ask, each, rl, train, watcher

SETTINGS = ("eval.problems=8", "eval.longer=1")
NEEDS, STAGES = ("base.pt", "zero.pt"), ("growing", "grown", "curriculum")
GROWTH = (0.5, 1.0, 1.5)  # documents a step, of the usual number, in each part of pretraining
RECIPES = choices.DEFAULT, "batches that grow in pretraining", "a curriculum by success rate"


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
        return [ask(rng, folder.run, rng.choices(s.levels, weights)) for _ in range(n)]
    return Task(sample=sample, encode=lambda problem: tasks.encode_prompt(problem.question),
                decode=tasks.decode, measures=tasks.MEASURES, end_id=tasks.END_ID,
                pad_id=tasks.PAD_ID, rewards={
                    "accuracy": (s.accuracy_weight, each(tasks.accuracy)),
                    "format": (s.format_weight, each(tasks.format_reward))})


def measure(folder):
    """The figures of a seed, by key such as grown.tflop."""
    run, given = folder.run, Path(folder.run.start).parent
    torch.manual_seed(run.seed)
    model = folder.place(moe.Transformer(run.model))
    model = folder.stage("growing", model, lambda m, state: growing(
        m, run.base, lambda rng: tasks.make_document(rng, run.corpus), run.seed, state),
        run.base.steps, watcher(folder, "growing", run.base.dev_every, run.base.steps))
    rl(folder, "grown", {"growing": model}, "growing", run.zero)
    base, _ = moe.load(given / "base.pt", folder.options.device, folder.options.dtype)
    folder.stage("curriculum", base, lambda m, state: train_rl(
        m, by_success(folder, run.zero), run.zero, run.seed, state), run.zero.steps,
        watcher(folder, "curriculum", run.zero.dev_every, run.zero.steps, run.zero))
    own, usual = read_log(folder.path), read_log(given)
    grown = called(own, growing="base", grown="zero")
    logs = (usual, usual), (grown, grown), (usual, called(own, curriculum="zero"))
    return {f"{text}.{key}": x for text, pair in zip(RECIPES, logs)
            for key, x in choices.climb(*pair).items()}


def called(log, **names):
    """The records of some of a log's stages, called by other names."""
    found = log[:1]
    for r in log[1:]:
        key = "stage" if "stage" in r else "kind"
        if r[key] in names:
            found.append(r | {key: names[r[key]]})
    return found


def page(rows, notes):
    """What each recipe takes to 85%, in the columns of study choices."""
    return choices.compared(rows, RECIPES)
