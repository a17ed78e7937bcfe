"""Is a training step the same however several processes share it?

The paper: V3's training shares the experts among 64 GPUs and the layers among 16 pipeline
stages (V3 section 3.2).

    python r1mini.py study layouts

A layout says how many processes take a step together, how they hold the model, and how
many of them share its experts. In each layout this study takes four steps of
pretraining and two steps of GRPO (with two updates each) on fixed rollouts, in float32
on the micro preset. It also continues from the checkpoint that one process wrote
half-way, and takes four steps with a dense student and with a reward model. The results
should equal those of one process up to rounding.
"""
import dataclasses
import random
import sys
from pathlib import Path

import torch

import grpo
import moe
import r1mini
import tasks
from engine import checkpoint, devices, optim, sampling
from tools.study import measure_once
from tools.tables import table

# A layout: (processes, how they hold the model, how many share the experts, recompute).
# See devices.shard. All layouts of one number of processes are launched together.
ONE = (1, "none", 1, False)
LAYOUTS = {1: [ONE, (1, "none", 1, True)],
           2: [(2, "ddp", 1, False), (2, "fsdp", 1, False), (2, "ddp", 2, False),
               (2, "fsdp", 2, True)],
           4: [(4, "ddp", 1, False), (4, "fsdp", 1, False), (4, "ddp", 2, False),
               (4, "fsdp", 2, False), (4, "fsdp", 4, False)]}


def _name_of(layout):
    """A layout's name in files and tables, such as 4-fsdp-2."""
    name = "-".join(map(str, layout[:3]))
    return name + "-recompute" if layout[3] else name


def _shard_arguments(layout):
    """The arguments for devices.place_model that spread a model in this layout. One process
    needs none."""
    return () if layout == ONE else layout[1:]


# ------------------------------------------------------------------------------
# What is trained


def _document(rng):
    """A document of the corpus."""
    return tasks.make_document(rng, tasks.Corpus())


# Models of other kinds: {name: (sizes, examples, loss)}. They only take pretraining's steps.
OTHERS = {"student": ({"n_dense_layers": 2, "n_mtp_layers": 0}, _document, r1mini.next_token_loss),
          "judge": ({"n_outputs": 1, "n_mtp_layers": 0}, tasks.helpful_pair, r1mini.pairwise_loss)}


def _new_model(layout, **sizes):
    """A model with random weights. They are the same in every layout."""
    torch.manual_seed(0)
    config = dataclasses.replace(r1mini.PRESETS["micro"], vocab_size=tasks.VOCAB_SIZE, **sizes)
    return devices.place_model(
        moe.Transformer(config), "cpu", torch.float32, *_shard_arguments(layout))


def _pretrain(model, state=None, path=None, draw=_document, loss=r1mini.next_token_loss):
    """Takes four steps, or those that are left after a state. Returns the losses.

    path: where to save a checkpoint after the second step.
    """
    s, losses = r1mini.Train(steps=4, documents=7, micro_tokens=300), []
    for record, snapshot in r1mini.train(model, s, draw, 0, state, loss):
        losses.append(record["loss"])
        if path and record["step"] == 2:
            checkpoint.save(path, model, **snapshot())
    return losses


def _fixed_rollout(s):
    """A rollout of worked answers, right and wrong, with random rewards. It is the same
    in every layout.

    The log-probabilities are as if a policy had written them to which all tokens are
    about equally likely.
    """
    rng = random.Random(0)
    problems = [tasks.make_problem(rng, 3) for _ in range(s.problems)]
    rows = []  # (prompt, answer)
    for problem in problems:
        prompt = tasks.encode_prompt(problem.question)
        styles = random.Random(problem.question).choices(tasks.STYLES, k=s.group_size)
        for style in styles:
            text = tasks.response(*tasks.write_working(problem, style, rng))
            rows.append((prompt, tasks.encode_response(text)))
    sequences = [prompt + answer for prompt, answer in rows]
    tokens = sampling.pad_right(sequences, tasks.PAD_ID)            # (N, T)
    column = torch.arange(tokens.size(1))
    is_answer = torch.stack([
        (column >= len(prompt)) & (column < len(prompt) + len(answer))
        for prompt, answer in rows])                              # (N, T)
    old = torch.where(is_answer, -6.2, 0.0)
    rewards = torch.rand(s.problems, s.group_size, generator=torch.Generator().manual_seed(0))
    rewards[0] = 1.0                                              # a dead group
    finished = torch.ones(len(rows), dtype=torch.bool)
    samples = sampling.Samples(tokens, is_answer, old, finished)
    return grpo.Rollout(problems, samples, [], {}, rewards, grpo.advantages(rewards))


def _reinforce(model, state=None, path=None):
    """Takes two steps of GRPO, or the one that is left after a state. Returns their logs.

    path: where to save a checkpoint after the first step.
    """
    s = grpo.RL(problems=3, group_size=3, minibatches=2, micro_tokens=300, lr=1e-4)
    optimizers = optim.make_optimizers(model, s.lr)
    reference = devices.copy_model(model).eval()
    if state:
        checkpoint.restore_all([reference, *optimizers],
                               [state["reference"], *state["optimizers"]])
    model.train()
    logs = []
    first_step = 1 if state else 0
    for step in range(first_step, 2):
        logs.append(grpo.improve(model, reference, optimizers, _fixed_rollout(s), s,
                                 random.Random(step), step))
        if path and step == 0:
            checkpoint.save(path, model, reference=reference.state_dict(),
                            optimizers=[optimizer.state_dict() for optimizer in optimizers])
    return logs


def _sample(model, prompts):
    """[Samples] of a model: of all prompts, then of the first 1, 2 and 4.

    In these the first answer ends at its second token, while other processes still write.
    """
    samples = [sampling.generate(model, prompts, 12, tasks.END_ID, tasks.PAD_ID)]
    for n in (1, 2, 4):
        free = sampling.generate(model, prompts[:n], 12, tasks.END_ID, tasks.PAD_ID)
        second_token = int(free.tokens[0, len(prompts[0]) + 1])
        samples.append(sampling.generate(model, prompts[:n], 12, second_token, tasks.PAD_ID))
    return samples


# ------------------------------------------------------------------------------
# Taking the steps in every layout


def _take_steps(layout, folder):
    """Takes all steps in one layout. Saves checkpoints, logged numbers and samples in the
    folder."""
    name, model = _name_of(layout), _new_model(layout)
    logged = {"loss": _pretrain(model, path=folder / f"{name}.base.half.pt")}
    checkpoint.save(folder / f"{name}.base.pt", model)

    prompts = [tasks.encode_prompt(f"Compute {a}+{a}*7") for a in (3, 12, 100, 7, 41)]
    model = devices.copy_model(model)  # as when a stage begins: a copy that samples first
    sampling.generate(model, prompts, 2, tasks.END_ID, tasks.PAD_ID)
    logs = _reinforce(model, path=folder / f"{name}.zero.half.pt")
    for key in ("kl", "ratio", "entropy", "clip", "grad_norm", "expert_load"):
        logged[key] = [log[key] for log in logs]
    samples = [vars(s) for s in _sample(model, prompts)]
    checkpoint.save(folder / f"{name}.zero.pt", model, logged=logged, samples=samples)

    for kind, (sizes, draw, loss) in OTHERS.items():
        model = _new_model(layout, **sizes)
        _pretrain(model, draw=draw, loss=loss)
        checkpoint.save(folder / f"{name}.{kind}.pt", model)
    if layout != ONE:
        _resume(layout, ONE, folder)


def _resume(layout, saved_by, folder):
    """Pretraining and GRPO in one layout, from what another layout saved half-way."""
    for stage, learn in (("base", _pretrain), ("zero", _reinforce)):
        model, state = checkpoint.load(folder / f"{_name_of(saved_by)}.{stage}.half.pt", "cpu",
                                       torch.float32, *_shard_arguments(layout))
        learn(model, state)
        path = folder / f"{_name_of(layout)}.{stage}.after.{_name_of(saved_by)}.pt"
        checkpoint.save(path, model)


def _launch(count, folder):
    """Takes the steps of all layouts of `count` processes. This process is the first of
    them."""
    code = (f"import sys; sys.path.insert(0, {str(Path(moe.__file__).parent)!r}); from pathlib "
            f"import Path; from studies import layouts; "
            f"layouts._launch({count}, Path({str(folder)!r}))")
    with devices.processes(torch.device("cpu"), count, [sys.executable, "-c", code]):
        for layout in LAYOUTS[count]:
            _take_steps(layout, folder)


# ------------------------------------------------------------------------------
# Comparing with one process


def _weight_difference(path, other_path):
    """The largest difference between the weights of two checkpoints, relative to the
    largest weight of each tensor."""
    weights = checkpoint.load(path)[0].state_dict()
    other_weights = checkpoint.load(other_path)[0].state_dict()
    differences = []
    for name, x in weights.items():
        largest = x.abs().max().clamp(min=1e-2)
        differences.append(float((x - other_weights[name]).abs().max() / largest))
    return max(differences)


def _same_samples(x, y):
    """Whether two sampling.Samples, as dictionaries, are the same. Their
    log-probabilities may differ by rounding."""
    same = all(torch.equal(x[key], y[key]) for key in ("tokens", "answer", "finished"))
    return same and torch.allclose(x["logprobs"], y["logprobs"], atol=1e-4)


def _compare(layout, folder):
    """A layout's relative differences from one process. All should be rounding.

    base, zero, student, judge   weights after the steps
    went on from one             weights after it resumed from the checkpoint of one
                                 process
    one went on                  weights after one process resumed from its checkpoint
    log                          logged numbers
    answers                      0 if the sampled answers are the same, else 1
    """
    one, name = _name_of(ONE), _name_of(layout)
    _resume(ONE, layout, folder)
    differences = {}
    for stage in ("base", "zero", *OTHERS):
        differences[stage] = _weight_difference(folder / f"{one}.{stage}.pt",
                                                folder / f"{name}.{stage}.pt")
    for key, resumed, saved_by in (("went on from one", name, one), ("one went on", one, name)):
        differences[key] = max(
            _weight_difference(folder / f"{one}.{stage}.pt",
                               folder / f"{resumed}.{stage}.after.{saved_by}.pt")
            for stage in ("base", "zero"))

    _, record_of_one = checkpoint.load(folder / f"{one}.zero.pt")
    _, record = checkpoint.load(folder / f"{name}.zero.pt")
    relative = []
    for key, values in record_of_one["logged"].items():
        for x, y in zip(values, record["logged"][key]):
            relative.append(abs(x - y) / max(abs(x), 1e-3))
    differences["log"] = max(relative)
    pairs = zip(record_of_one["samples"], record["samples"])
    differences["answers"] = 0.0 if all(_same_samples(x, y) for x, y in pairs) else 1.0
    return differences


def _compare_all(folder):
    """The differences of every layout, by key such as 4-fsdp-2.base, and the largest of
    all."""
    for count in LAYOUTS:
        _launch(count, folder)
    numbers = {}
    for layouts in LAYOUTS.values():
        for layout in layouts:
            if layout != ONE:
                differences = _compare(layout, folder)
                numbers |= {f"{_name_of(layout)}.{key}": x for key, x in differences.items()}
    return numbers | {"layouts.max_relative_difference": max(numbers.values())}


# ------------------------------------------------------------------------------
# The study

SEEDS, SETTINGS, NEEDS, STAGES = (0,), (), (), ()


def measure(folder):
    """The differences of every layout, in the folder of a run."""
    return measure_once(folder, "layouts", lambda: _compare_all(Path(folder.path)))


def page(rows, notes=()):
    """The lines of the report."""
    names = [_name_of(layout) for layouts in LAYOUTS.values() for layout in layouts
             if layout != ONE]
    keys = [key.partition(".")[2] for key in rows if key.startswith(f"{names[0]}.")]
    body = [[name, *(f"{rows[f'{name}.{key}']['mean']:.1e}" for key in keys)] for name in names]
    largest = rows["layouts.max_relative_difference"]["mean"]
    return ["Relative differences from one process, in float32. A layout is named by its number "
            "of processes, how they hold the model, and how many share the experts.", "",
            *table(["layout", *keys], body), "",
            f"The largest: {largest:.1e}."]
