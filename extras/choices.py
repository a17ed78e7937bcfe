"""study choices: how soon Zero is right on 85% of dev, from random weights, by recipe.

    python r1mini.py study choices

Each recipe is the default's with one change (AdamW with a rate of its own). What it costs to come
there is counted in operations (report.FLOPS), which a busy machine does not change.
Test problems are few, for nothing is read off them.
"""
from extras.folder import read_log
from extras.report import FLOPS, cell, of_flops, per_seed, table

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


def measure(seed, at="runs/"):
    """What became of each recipe of a seed, by key such as Dr. GRPO.tflop."""
    return {f"{text}.{key}": x for text, (start, own) in folders(seed, at).items()
            for key, x in climb(read_log(start), read_log(own)).items()}


def page(rows, notes):
    """What each recipe takes to 85%."""
    return compared(rows, folders(0, ""))


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
