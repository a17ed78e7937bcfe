"""Why does Dev3 start from the base again, and not from Dev2?

The paper: Dev3 fine-tunes DeepSeek-V3-Base on Dev2's answers, not Dev2 itself (R1 v1 section
2.3.3, v2 section B.3.3). It does not say why.

    python r1mini.py study restart

Dev3's fine-tuning and R1's RL are those of the lesson, with fewer steps, on the same data and
with the same reward models. An arm is the model that Dev3 starts from:

    base           the base, as in R1
    dev1, dev2     Dev1, Dev2
    unannealed     the base before its learning rate fell: some fine-tuners start there
    constant       a base as long as R1's, whose rate never fell: the control of unannealed
    chat_first     the base, in another lab's order: general prompts come first in RL, and
                   verifiable rewards alone come last

Each arm fine-tunes with two learning rates, and goes on with the model that is better on dev.
Dev1, Dev2, their data, the reward models and the unannealed base are not kept. The study trains
them first, for all arms of a seed; the page says how long that takes.
"""
import dataclasses
import json
import shutil

import torch

import moe
import r1mini
import tasks
from engine import checkpoint
from engine.folder import Folder, read_log
from tools.compare import compare
from tools.study import load_kept, start_folder, test_record
from tools.tables import cell, table

SEEDS = range(6)
SETTINGS = ("dev3.steps=48", "r1.steps=12", "r1.problems=24", "eval.samples=8",
            "eval.fewer_samples=2", "data.prompts=25")
ARMS = dict.fromkeys(("base", "dev1", "dev2", "unannealed", "constant", "chat_first"), "")
DIFFERENCES = {f"{arm}_minus_base.{key}": (f"{arm}.{key}", f"base.{key}")
               for arm in ARMS if arm != "base" for key in ("pass@1", "longer")}
DIFFERENCES |= {f"unannealed_minus_constant.{key}": (f"unannealed.{key}", f"constant.{key}")
                for key in ("pass@1", "longer")}
START = ("dev1", "dev2", "dev3", "helpful", "safe")  # stages of the lesson, for all arms
STAGES = (*START, "constant", "unannealed", "chat", "r1")
RATES = (1e-3, 3e-3)  # of the fine-tuning; R1's recipe has the first


# ------------------------------------------------------------------------------
# What all arms start from


def _start(folder, arm):
    """(the folder that the arms of a seed share, its models by stage)."""
    start = start_folder(folder, arm, STAGES)
    models = {name: load_kept(folder, name) for name in ("base", "zero")}
    for stage in START:
        models[stage] = r1mini.STAGES[stage](start, models)
    models["constant"] = _constant_base(start)
    models["unannealed"] = start.load(start.path / "unannealed.pt")[0]
    return start, models


def _constant_base(start):
    """A base whose learning rate stays. It is saved as `unannealed` where the rate of R1's base
    begins to fall. Until there the two are the same."""
    run = start.run
    s = dataclasses.replace(run.base, decay=0.0)
    before_decay = round(run.base.steps * (1 - run.base.decay))
    torch.manual_seed(run.seed)
    model = start.place(moe.Transformer(run.model))

    def loop(m, state):
        return r1mini.train(m, s, lambda rng: tasks.make_document(rng, run.corpus), run.seed, state)

    def watch(m, record, bar):
        if record["step"] == before_decay:
            checkpoint.save(start.path / "unannealed.pt", m, **start.kept())

    return start.stage("constant", model, loop, s.steps, watch)


# ------------------------------------------------------------------------------
# The arms


def _fine_tune(start, models, name):
    """Dev3 from the model of this name, with the learning rate that is best on dev, and its
    numbers. It is trained once: base and chat_first share it."""
    found = {}
    for rate in RATES:
        run = dataclasses.replace(start.run, dev3=dataclasses.replace(
            start.run.dev3, lr=rate, muon_lr=rate))
        path = start.path.with_name(f"{start.path.name}-{name}-{rate}")
        folder = Folder(path, run, start.options, STAGES)
        shutil.copy(start.path / "dev3.jsonl", path)  # Dev2's answers; dev3() only reads them
        dev3 = r1mini.dev3(folder, {"dev2": models["dev2"], "base": models[name]})
        on_dev = [r["pass@1"] for r in read_log(path) if r["kind"] == "dev"]
        found[rate] = on_dev[-1], dev3, test_record(path, "dev3")["pass@1"]
    rate = max(found, key=lambda rate: found[rate][0])
    on_dev, dev3, on_test = found[rate]
    return dev3, {"rate": rate, "dev3.dev": on_dev, "dev3.pass@1": on_test}


def _reinforce(arm, folder, models):
    """R1's RL. In chat_first its part with general prompts comes first, and then no more of
    them."""
    if arm != "chat_first":
        r1mini.r1(folder, models)
        return
    s, judges = folder.run.r1, (models["helpful"], models["safe"])
    steps = s.steps - round(s.general_from * s.steps)
    chat = dataclasses.replace(s, steps=steps, general_from=0.0)
    chat_model = r1mini.rl(folder, "chat", models, "dev3", chat, judges)
    verifiable = dataclasses.replace(s, steps=s.steps - steps, general=0.0)
    r1mini.rl(folder, "r1", {"chat": chat_model}, "chat", verifiable, judges)


def measure_arm(arm, folder):
    """The numbers of an arm after Dev3's fine-tuning and after RL."""
    start, models = _start(folder, arm)
    models["dev3"], tuned = _fine_tune(start, models, "base" if arm == "chat_first" else arm)
    _reinforce(arm, folder, models)
    log, test = read_log(folder.path), test_record(folder.path, "r1")
    [longer] = [r for r in log if r["kind"] == "test" and r["set"] == "longer"]
    [general] = [r for r in log if r["kind"] == "general"]
    rollouts = [r for r in log if r["kind"] in ("chat", "r1")]
    numbers = tuned | {key: test[key] for key in ("pass@1", "mixing", "length")}
    numbers |= {"longer": longer["pass@1"], "gain": test["pass@1"] - tuned["dev3.pass@1"],
                "entropy.first": rollouts[0]["entropy"], "entropy.last": rollouts[-1]["entropy"],
                "helpfulness": general["helpfulness"], "safe": general["unsafe.safe"],
                "refused_harmless": general["how.refused"]}
    if arm == "base":
        numbers["start_minutes"] = _minutes(start.path)
    return numbers


def _minutes(path):
    """The minutes that a folder's stages have taken."""
    lines = map(json.loads, (path / "timing.jsonl").read_text("utf-8").splitlines())
    return sum(line.get("seconds", 0.0) for line in lines) / 60


def combine(numbers):
    """Accuracy, and accuracy on longer problems, of each arm."""
    return {f"restart.{arm}.{key}": numbers[f"{arm}.{key}"]
            for arm in ARMS for key in ("pass@1", "longer")}


# ------------------------------------------------------------------------------
# The report

NAMES = {"base": "base", "dev1": "Dev1", "dev2": "Dev2", "unannealed": "base before its rate fell",
         "constant": "base whose rate never fell", "chat_first": "base, general prompts first"}


def page(rows, notes):
    """The lines of the report: the arms, and each against base."""
    columns = {"rate": "learning rate", "dev3.pass@1": "pass@1 of Dev3", "pass@1": "after RL",
               "gain": "gain by RL", "longer": "7 and 8 operations", "entropy.first": "entropy",
               "entropy.last": "after RL", "mixing": "mixes", "helpfulness": "helpfulness",
               "safe": "safe", "refused_harmless": "harmless refused", "length": "tokens"}
    body = [[name, *(cell(rows, f"{arm}.{key}") for key in columns)]
            for arm, name in NAMES.items()]
    lines = [*table(["Dev3 starts from", *columns.values()], body), ""]
    pairs = [("base", arm) for arm in NAMES if arm != "base"] + [("constant", "unannealed")]
    for control, arm in pairs:
        for key in ("pass@1", "longer"):
            comparison = compare(rows, f"{control}.{key}", f"{arm}.{key}")
            if comparison:
                lines.append(f"- {key}, {NAMES[arm]}, minus {NAMES[control]}: "
                             f"{comparison.text(points=True)}")
    return [*lines, "", "What all arms start from takes "
            f"{cell(rows, 'base.start_minutes')} minutes for one seed."]
