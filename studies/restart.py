"""Why does Dev3 start from the base again, and not from Dev2?

The paper: to make Dev3, DeepSeek-V3-Base is fine-tuned again, on Dev2's answers. Dev2 itself is not
trained further (R1 v1 section 2.3.3, v2 section B.3.3). On AIME 2024 Dev2 has 74.0, Dev3 78.1 and
R1 79.8 (R1 v2 Table 3). The paper does not say why it starts from the base again.

    python r1mini.py study restart

An arm is the model that is fine-tuned into Dev3. All arms have the same data and reward models:

    base           the base, as in R1
    dev1           Dev1
    dev2           Dev2
    unannealed     the base before its learning rate fell; some fine-tuners start there
    constant       the control of unannealed: it is trained for as many steps as the base, and its
                   learning rate does not fall
    chat_first     the base, with another order of RL: first general prompts and problems, then
                   problems alone. These are two stages. The second has new optimizers, and its
                   reference policy is the model after the first

Dev3's fine-tuning and R1's RL are those of the lesson, with fewer steps. Entropy is that of one
answer to each dev problem at temperature 1.

The kept models do not include Dev1, Dev2, the reward models and the unannealed base. So the study
trains them first, once for all arms of a seed. The page says how long that takes.
"""
import dataclasses
import json
import shutil

import torch

import moe
import r1mini
import tasks
from engine import checkpoint
from engine.evaluate import prompts_of
from engine.folder import Folder, read_log
from engine.sampling import generate
from grpo import logprobs
from tools.compare import compare
from tools.figures import Picture, arms_panel
from tools.study import load_kept, start_folder, test_record
from tools.tables import cell, table

SEEDS = range(6)
# Fewer steps than in the lesson, so that a seed ends within 15 minutes.
SETTINGS = ("dev3.steps=100", "dev3.warmup=5", "r1.steps=12", "r1.problems=16", "eval.samples=4",
            "eval.longer=250", "data.prompts=25", "dev2.dev_every=14", "r1.dev_every=12")
ARMS = dict.fromkeys(("base", "dev1", "dev2", "unannealed", "constant", "chat_first"), "")
DIFFERENCES = {f"{arm}_minus_base.{key}": (f"{arm}.{key}", f"base.{key}")
               for arm in ARMS if arm != "base" for key in ("pass@1", "longer")}
DIFFERENCES |= {f"unannealed_minus_constant.{key}": (f"unannealed.{key}", f"constant.{key}")
                for key in ("pass@1", "longer")}
START = ("dev1", "dev2", "dev3", "helpful", "safe")  # stages that are trained once for all arms
STAGES = (*START, "constant", "unannealed", "chat", "r1")
# Learning rates of the fine-tuning. All are the lesson's, as for base and chat_first: they are not
# yet chosen for each arm.
RATES = {"dev1": 1e-3, "dev2": 1e-3, "unannealed": 1e-3, "constant": 1e-3}


# ------------------------------------------------------------------------------
# What all arms start from


def _start(folder, arm):
    """Trains what all arms of a seed start from. Returns (the folder that they share, {stage:
    model})."""
    start = start_folder(folder, arm, STAGES)
    models = {name: load_kept(folder, name) for name in ("base", "zero")}
    for stage in START:
        models[stage] = r1mini.STAGES[stage](start, models)
    models["constant"] = _constant_base(start)
    models["unannealed"] = start.load(start.path / "unannealed.pt")[0]
    return start, models


def _constant_base(start):
    """A base whose learning rate does not fall. Its weights are also saved as unannealed.pt at the
    step where the rate of R1's base begins to fall. Up to this step the two bases are equal, apart
    from rounding: the kept base may have been trained with other threads."""
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


def _fine_tune(arm, start, models):
    """(Dev3 of an arm, its pass@1 on test): the model that the arm starts from, after fine-tuning
    on Dev2's answers. base and chat_first have the Dev3 that all arms share."""
    if arm not in RATES:
        return models["dev3"], test_record(start.path, "dev3")["pass@1"]
    s = dataclasses.replace(start.run.dev3, lr=RATES[arm], muon_lr=RATES[arm])
    path = start.path.with_name(f"{start.path.name}-{arm}")
    folder = Folder(path, dataclasses.replace(start.run, dev3=s), start.options, STAGES)
    shutil.copy(start.path / "dev3.jsonl", path)  # Dev2's answers; dev3() only reads them
    dev3 = r1mini.dev3(folder, {"dev2": models["dev2"], "base": models[arm]})
    return dev3, test_record(path, "dev3")["pass@1"]


@torch.no_grad()
def _entropy(model, run):
    """The mean entropy of a token in one answer to each dev problem at temperature 1, in nats."""
    problems = tasks.make_problems("dev", run.eval.dev_problems, run.r1.levels)
    samples = generate(model, prompts_of(problems), run.r1.max_new_tokens, tasks.END_ID,
                       tasks.PAD_ID)
    last = samples.answer.cumsum(1).argmax(1, keepdim=True)                # (N, 1)
    real = torch.arange(samples.tokens.size(1), device=model.device) <= last
    _, entropy = logprobs(model.eval(), samples.tokens, samples.answer, real)
    return float(entropy.sum() / samples.answer.sum())


def _reinforce(arm, folder, models):
    """The model after R1's RL. In chat_first the rollouts with general prompts come first. There
    are as many of them as in the other arms."""
    if arm != "chat_first":
        return r1mini.r1(folder, models)
    s, judges = folder.run.r1, (models["helpful"], models["safe"])
    steps = s.steps - round(s.general_from * s.steps)
    chat = dataclasses.replace(s, steps=steps, general_from=0.0)
    chat_model = r1mini.rl(folder, "chat", models, "dev3", chat, judges)
    verifiable = dataclasses.replace(s, steps=s.steps - steps, general=0.0)
    return r1mini.rl(folder, "r1", {"chat": chat_model}, "chat", verifiable, judges)


def measure_arm(arm, folder):
    """The numbers of an arm after fine-tuning and after RL."""
    run, (start, models) = folder.run, _start(folder, arm)
    models["dev3"], dev3_pass = _fine_tune(arm, start, models)
    numbers = {"dev3.pass@1": dev3_pass, "dev3.entropy": _entropy(models["dev3"], run)}
    model = _reinforce(arm, folder, models)
    log, test = read_log(folder.path), test_record(folder.path, "r1")
    [longer] = [r for r in log if r["kind"] == "test" and r["set"] == "longer"]
    [general] = [r for r in log if r["kind"] == "general"]
    numbers |= {key: test[key] for key in ("pass@1", "mixing", "length")}
    numbers |= {"longer": longer["pass@1"], "gain": test["pass@1"] - dev3_pass,
                "entropy": _entropy(model, run), "helpfulness": general["helpfulness"],
                "safe": general["unsafe.safe"], "refused_harmless": general["how.refused"]}
    if arm == "base":
        numbers["start_minutes"] = _minutes(start.path)
    return numbers


def _minutes(path):
    """How many minutes the stages of a folder took."""
    lines = map(json.loads, (path / "timing.jsonl").read_text("utf-8").splitlines())
    return sum(line.get("seconds", 0.0) for line in lines) / 60


def combine(numbers):
    """pass@1 of each arm on problems of the levels of training, and on longer ones."""
    return {f"restart.{arm}.{key}": numbers[f"{arm}.{key}"]
            for arm in ARMS for key in ("pass@1", "longer")}


# ------------------------------------------------------------------------------
# The report

NAMES = {"base": "base", "dev1": "Dev1", "dev2": "Dev2", "unannealed": "base before its rate falls",
         "constant": "base whose rate does not fall", "chat_first": "base, general prompts first"}


def picture(rows):
    """pass@1 on problems of the levels of training, and on longer ones."""
    points, longer = (100 * (rows[f"dev2.{key}"]["mean"] - rows[f"base.{key}"]["mean"])
                      for key in ("pass@1", "longer"))
    return Picture([arms_panel(f"Dev2 minus base:\n{points:+.1f} points,", rows, NAMES, "pass@1",
                               "correct answers"),
                    arms_panel(f"{longer:+.1f}\non longer sums", rows, NAMES, "longer",
                               "correct, 7 and 8 operations")],
                   "R1 by the start of Dev3; test problems; a dot is a seed, a line the mean")


def page(rows, notes):
    """The lines of the report: the arms, and the difference of each from base."""
    columns = {"dev3.pass@1": "pass@1 of Dev3", "pass@1": "after RL", "gain": "gain by RL",
               "longer": "7 and 8 operations, temperature 0.6", "dev3.entropy": "entropy of Dev3",
               "entropy": "after RL", "mixing": "mixes",
               "helpfulness": "helpfulness", "safe": "safe",
               "refused_harmless": "harmless refused", "length": "tokens"}
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
    return [*lines, "", "Training what all arms start from takes "
            f"{cell(rows, 'base.start_minutes')} minutes for one seed."]
