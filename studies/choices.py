"""Which recipe brings R1-Zero to 85% with the least compute?

The papers: dynamic sampling raises DAPO from 42 to 50 on AIME 2024 (DAPO Table 1). A
curriculum raises Kimi's accuracy from 0.553 to 0.590 at iteration 42 (Kimi k1.5 Figure
9). V3's batch grows from 3,072 to 15,360 sequences (V3 section 4.2).

    python r1mini.py study choices

The goal is a pass@1 of 85% on dev, counted from random weights. Each recipe changes one
thing in the default recipe (AdamW also gets its own learning rate). Costs are counted
in FLOPs (tools/flops.py), which do not depend on how busy the machine is. This study
reads nothing off the test problems, so there are few of them. No setting makes two of the
recipes, so this file trains them itself:

    growing      pretraining with half as many documents per step in the first third and
                 half as many again in the last. It reads as many documents in all
    grown        Zero's RL from `growing`
    curriculum   Zero's RL from the usual base. It draws a level more often the more
                 answers to it were wrong in the last evaluation on dev (Kimi k1.5
                 section 2.3.4 does this for single problems)
"""
import dataclasses
from pathlib import Path

import torch

import moe
import tasks
from engine import checkpoint
from engine.folder import read_log
from engine.watch import Watch
from grpo import train_rl
from r1mini import draw_problem, make_task, rl, rule_rewards, train
from tools.compare import compare
from tools.flops import FLOPS_NOTE, flops_by_stage
from tools.tables import cell, cell_per_seed, table

LIMIT = 0.85  # pass@1 on dev at temperature 1, evaluated every fifth RL step and at the last

# ------------------------------------------------------------------------------
# Recipes that are settings: {name of the recipe: (name in its folder, settings)}

# These change the base. RL then starts from it.
BASES = {
    "AdamW, no Muon": ("adamw", "base.muon_lr=0 base.lr=3e-3"),
    "twice the steps, of half the documents": ("small", "base.steps=2000 base.documents=40"),
    "a third fewer guesses, more drills": ("drills", "corpus.direct=0.24"),
    "rates that fall from the start": ("falling", "base.decay=1"),
}
# These change RL alone. It starts from the usual base.
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

RUNS = []
for name, settings in BASES.values():
    RUNS.append((f"choices-{name}-{{seed}}",
                 f"zero --set {settings} eval.problems=8 eval.longer=1"))
for name, settings in REINFORCED.values():
    RUNS.append((f"choices-{name}-{{seed}}", "zero --from runs/r1-{seed}/base.pt "
                 f"--set {settings} eval.problems=8 eval.longer=1"))


def _recipe_folders(seed, at):
    """{recipe: (folder of its base, folder of its RL)} of a seed."""
    default = f"{at}r1-{seed}"
    pairs = {DEFAULT: (default, default)}
    for recipe, (name, _) in BASES.items():
        folder = f"{at}choices-{name}-{seed}"
        pairs[recipe] = (folder, folder)
    for recipe, (name, _) in REINFORCED.items():
        pairs[recipe] = (default, f"{at}choices-{name}-{seed}")
    return pairs


def _training_curve(base_log, rl_log):
    """The numbers of a recipe, from the logs of its pretraining and of its RL. A recipe
    that does not reach LIMIT has no steps and no TFLOP."""
    dev = [r for r in rl_log if r["kind"] == "dev" and r["stage"] == "zero"]
    numbers = {"base": dev[0]["pass@1"]}
    for record in dev:
        if record["step"] in (10, 20):
            numbers[f"at {record['step']}"] = record["pass@1"]
    reached = next((r["step"] for r in dev if r["pass@1"] >= LIMIT), None)
    if reached is not None:
        rl_steps = [r for r in rl_log if r["kind"] == "zero" and r["step"] <= reached]
        base_tflop = flops_by_stage(base_log)["base"]
        rl_tflop = flops_by_stage([rl_log[0], *rl_steps])["zero"]  # the first record: settings
        numbers |= {"steps": reached, "base_tflop": base_tflop, "tflop": base_tflop + rl_tflop}
    return numbers


def numbers(seed, at="runs/"):
    """The numbers of the recipes of a seed that are settings, by key such as
    Dr. GRPO.tflop."""
    numbers = {}
    for recipe, (base_folder, rl_folder) in _recipe_folders(seed, at).items():
        curve = _training_curve(read_log(base_folder), read_log(rl_folder))
        numbers |= {f"{recipe}.{key}": x for key, x in curve.items()}
    return numbers


# ------------------------------------------------------------------------------
# Recipes that no setting makes

SETTINGS = ("eval.problems=8", "eval.longer=1")
SEEDS, NEEDS, STAGES = range(6), ("base.pt", "zero.pt"), ("growing", "grown", "curriculum")
# Documents per step in each third of pretraining, as a multiple of the usual number.
GROWTH = (0.5, 1.0, 1.5)
SCHEDULES = "batches that grow in pretraining", "a curriculum by success rate"


def _train_longer_and_longer(model, s, draw, seed, state=None):
    """r1mini.train with GROWTH: it calls train once for each third, from the state that
    the third before it left. Yields what train yields."""
    for i, factor in enumerate(GROWTH, 1):
        settings = dataclasses.replace(s, documents=round(factor * s.documents))
        last_step = s.steps * i // len(GROWTH)
        if state and state["step"] >= last_step:
            continue
        for record, snapshot in train(model, settings, draw, seed, state):
            yield record, snapshot
            if record["step"] == last_step:
                break
        state = snapshot()


def _level_weights(dev, levels):
    """The weight of each level: the share of wrong answers in a dev record, plus 0.05, so
    that every level is drawn now and then."""
    return [1.05 - dev["by_level"][str(level)] for level in levels]


def _levels_by_success(folder, s):
    """Zero's task, with levels drawn by their weakness.

    The dev records come from the log, so a killed run resumes to the same bits. This
    needs a run of one process, because only the first process writes the log.
    """
    def draw(rng, n, step):
        past = [r for r in read_log(folder.path) if r["kind"] == "dev"
                and r["stage"] == "curriculum" and r["step"] <= step]
        weights = _level_weights(past[-1], s.levels)
        return [draw_problem(rng, folder.run, rng.choices(s.levels, weights)) for _ in range(n)]

    return dataclasses.replace(make_task(folder.run, s, rule_rewards(s)), draw=draw)


def _train_growing(folder):
    """Stages `growing` and `grown`."""
    run = folder.run
    torch.manual_seed(run.seed)
    model = folder.place(moe.Transformer(run.model))

    def pretrain(model, state):
        def draw(rng):
            return tasks.make_document(rng, run.corpus)
        return _train_longer_and_longer(model, run.base, draw, run.seed, state)

    watch = Watch(folder, "growing", run.base.dev_every, run.base.steps)
    model = folder.stage("growing", model, pretrain, run.base.steps, watch)
    rl(folder, "grown", {"growing": model}, "growing", run.zero)


def _train_curriculum(folder):
    """Stage `curriculum`."""
    run, options = folder.run, folder.options
    base_path = Path(run.start).parent / "base.pt"
    base, _ = checkpoint.load(base_path, options.device, options.dtype)

    def reinforce(model, state):
        return train_rl(model, _levels_by_success(folder, run.zero), run.zero, run.seed, state)

    watch = Watch(folder, "curriculum", run.zero.dev_every, run.zero.steps, run.zero)
    folder.stage("curriculum", base, reinforce, run.zero.steps, watch)


def measure(folder):
    """The numbers of a seed's SCHEDULES, by key such as a curriculum by success
    rate.tflop."""
    _train_growing(folder)
    _train_curriculum(folder)
    log, usual_log = read_log(folder.path), read_log(Path(folder.run.start).parent)
    grown_log = _rename_stages(log, growing="base", grown="zero")
    curriculum_log = _rename_stages(log, curriculum="zero")
    curves = (_training_curve(grown_log, grown_log), _training_curve(usual_log, curriculum_log))
    numbers = {}
    for recipe, curve in zip(SCHEDULES, curves):
        numbers |= {f"{recipe}.{key}": x for key, x in curve.items()}
    return numbers


def _rename_stages(log, **names):
    """A log with the records of the named stages only, under their new names. The
    settings, its first record, stay."""
    records = log[:1]
    for record in log[1:]:
        key = "stage" if "stage" in record else "kind"
        if record[key] in names:
            records.append(record | {key: names[record[key]]})
    return records


# ------------------------------------------------------------------------------
# The report


def page(rows, notes):
    """The lines of the report."""
    return _recipe_table(rows, [*_recipe_folders(0, ""), *SCHEDULES])


def _recipe_table(rows, recipes):
    """A table of recipes. Costs are means over the seeds that reached 85%."""
    columns = {"base": "base, on dev", "at 10": "after 10 RL steps", "at 20": "after 20",
               "steps": "RL steps to 85%", "base_tflop": "TFLOP, base",
               "tflop": "TFLOP to 85%"}
    seeds = len(rows[f"{DEFAULT}.base"]["per_seed"])
    body = []
    for recipe in recipes:
        cells = [cell(rows, f"{recipe}.{key}") for key in columns]
        reached = len(cell_per_seed(rows, f"{recipe}.tflop"))
        difference = compare(rows, f"{DEFAULT}.tflop", f"{recipe}.tflop")
        is_other = recipe != DEFAULT and difference is not None
        body.append([recipe, *cells, f"{reached} of {seeds}",
                     difference.text() if is_other else ""])
    heads = ["recipe", *columns.values(), "seeds at 85%", "TFLOP to 85%, less the default's"]
    return [*table(heads, body), "",
            "pass@1 is on dev problems at temperature 1, with 16 answers per problem, after "
            f"every fifth RL step and after the last. {FLOPS_NOTE}"]
