"""Are steps the same however processes share them? How far apart they end.

    python r1mini.py study layouts

Each layout takes four steps of pretraining and two of GRPO (two updates each) on fixed rollouts, on
the micro preset in float32, and goes on from the checkpoint that one process wrote half-way; and
four steps with a dense student and with a reward model.
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
from tools.study import once
from tools.tables import table

ONE = (1, "none", 1, False)
# processes, mode, how many share the experts, recompute: those of one count are launched together
LAYOUTS = {1: [ONE, (1, "none", 1, True)],
           2: [(2, "ddp", 1, False), (2, "fsdp", 1, False), (2, "ddp", 2, False),
               (2, "fsdp", 2, True)],
           4: [(4, "ddp", 1, False), (4, "fsdp", 1, False), (4, "ddp", 2, False),
               (4, "fsdp", 2, False), (4, "fsdp", 4, False)]}


def document(rng):
    """A document of the corpus."""
    return tasks.make_document(rng, tasks.Corpus())


# Models of other kinds, which take pretraining's steps alone: sizes, examples, loss.
OTHERS = {"student": ({"n_dense_layers": 2, "n_mtp_layers": 0}, document, r1mini.next_token_loss),
          "judge": ({"n_outputs": 1, "n_mtp_layers": 0}, tasks.helpful_pair, r1mini.pairwise_loss)}


def new(layout, **sizes):
    """A model of random weights, the same in every layout."""
    torch.manual_seed(0)
    config = dataclasses.replace(r1mini.PRESETS["micro"], vocab_size=tasks.VOCAB_SIZE, **sizes)
    return devices.place(moe.Transformer(config), "cpu", torch.float32,
                     *(layout[1:] if layout != ONE else ()))


def pretrain(model, state=None, path=None, draw=document, loss=r1mini.next_token_loss):
    """Four steps, or those left after a state; path: where what is to be gone on from is saved,
    half-way. Returns the losses."""
    s, losses = r1mini.Train(steps=4, documents=7, micro_tokens=300), []
    for record, snapshot in r1mini.train(model, s, draw, 0, state, loss):
        losses.append(record["loss"])
        if path and record["step"] == 2:
            checkpoint.save(path, model, **snapshot())
    return losses


def rollout(s):
    """Worked answers, right and wrong, as if a policy of even odds had written them."""
    rng, rows = random.Random(0), []
    problems = [tasks.make_problem(rng, 3) for _ in range(s.problems)]
    for p in problems:
        prompt = tasks.encode_prompt(p.question)
        rows += [(prompt, tasks.encode_response(tasks.response(*tasks.work(p, style, rng))))
                 for style in random.Random(p.question).choices(tasks.STYLES, k=s.group_size)]
    tokens = sampling.pad([a + b for a, b in rows], tasks.PAD_ID)
    at = torch.arange(tokens.size(1))
    answer = torch.stack([(at >= len(a)) & (at < len(a) + len(b)) for a, b in rows])
    old = torch.where(answer, -6.2, 0.0)
    rewards = torch.rand(s.problems, s.group_size, generator=torch.Generator().manual_seed(0))
    rewards[0] = 1.0                                          # a dead group
    samples = sampling.Samples(tokens, answer, old, torch.ones(len(rows), dtype=torch.bool))
    return grpo.Rollout(problems, samples, [], {}, rewards, grpo.advantages(rewards))


def reinforce(model, state=None, path=None):
    """Two steps of GRPO on a rollout, likewise. Returns what they log."""
    s, logs = grpo.RL(problems=3, group_size=3, minibatches=2, micro_tokens=300, lr=1e-4), []
    optimizers, reference = optim.make_optimizers(model, s.lr), devices.copy_model(model).eval()
    if state:
        checkpoint.restore(reference, state["reference"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            checkpoint.restore(optimizer, saved)
    model.train()
    for step in range(1 if state else 0, 2):
        logs.append(grpo.improve(model, reference, optimizers, rollout(s), s, random.Random(step),
                                 step))
        if path and step == 0:
            checkpoint.save(path, model, reference=reference.state_dict(),
                     optimizers=[optimizer.state_dict() for optimizer in optimizers])
    return logs


def name_of(layout):
    """A layout's name in files and tables, such as 4-fsdp-2."""
    return "-".join(map(str, layout[:3])) + "-recompute" * layout[3]


def take(layout, folder):
    """Takes all steps in one layout; its files go into the folder: half-way, weights, figures."""
    name, model = name_of(layout), new(layout)
    figures = {"loss": pretrain(model, path=folder / f"{name}.base.half.pt")}
    checkpoint.save(folder / f"{name}.base.pt", model)
    prompts = [tasks.encode_prompt(f"Compute {a}+{a}*7") for a in (3, 12, 100, 7, 41)]
    model = devices.copy_model(model)  # as a stage begins: a copy, asked before it learns
    sampling.generate(model, prompts, 2, tasks.END_ID, tasks.PAD_ID)
    logs = reinforce(model, path=folder / f"{name}.zero.half.pt")
    figures |= {key: [log[key] for log in logs] for key in ("kl", "ratio", "entropy", "clip",
                                                           "grad_norm", "expert_load")}
    samples = [sampling.generate(model, prompts, 12, tasks.END_ID, tasks.PAD_ID)]
    for n in (1, 2, 4):  # the first ends at its second token, while other processes go on
        free = sampling.generate(model, prompts[:n], 12, tasks.END_ID, tasks.PAD_ID)
        end = int(free.tokens[0, len(prompts[0]) + 1])
        samples.append(sampling.generate(model, prompts[:n], 12, end, tasks.PAD_ID))
    checkpoint.save(folder / f"{name}.zero.pt", model, figures=figures,
                    samples=[*map(vars, samples)])
    for kind, (sizes, draw, loss) in OTHERS.items():
        model = new(layout, **sizes)
        pretrain(model, draw=draw, loss=loss)
        checkpoint.save(folder / f"{name}.{kind}.pt", model)
    if layout != ONE:
        go_on(layout, ONE, folder)


def go_on(layout, other, folder):
    """Pretraining and GRPO again, in one layout from what another saved half-way."""
    for stage, learn in (("base", pretrain), ("zero", reinforce)):
        model, state = checkpoint.load(
            folder / f"{name_of(other)}.{stage}.half.pt", "cpu", torch.float32,
            *(layout[1:] if layout != ONE else ()))
        learn(model, state)
        checkpoint.save(folder / f"{name_of(layout)}.{stage}.after.{name_of(other)}.pt", model)


def launch(count, folder):
    """Takes the steps of the layouts of so many processes, of which this is the first."""
    code = (f"import sys; sys.path.insert(0, {str(Path(moe.__file__).parent)!r}); from pathlib "
            f"import Path; from studies import layouts; "
            f"layouts.launch({count}, Path({str(folder)!r}))")
    with devices.processes(torch.device("cpu"), count, [sys.executable, "-c", code]):
        for layout in LAYOUTS[count]:
            take(layout, folder)


def apart(a, b):
    """How far the weights of two checkpoints are apart, beside the largest weight of their kind."""
    one, two = (checkpoint.load(path)[0].state_dict() for path in (a, b))
    return max(float((x - two[name]).abs().max() / x.abs().max().clamp(min=1e-2))
               for name, x in one.items())


def alike(x, y):
    """Whether two sampling.Samples, as dictionaries, are the same but for rounding in logprobs."""
    return all(torch.equal(x[key], y[key]) for key in ("tokens", "answer", "finished")) and (
        torch.allclose(x["logprobs"], y["logprobs"], atol=1e-4))


def compare(layout, folder):
    """A layout's relative differences to one process, all of which should be rounding: weights
    after pretraining and GRPO, logged figures, sampled answers (0: the same), and weights when one
    went on from the other's checkpoint."""
    one, name = name_of(ONE), name_of(layout)
    go_on(ONE, layout, folder)
    found = {stage: apart(folder / f"{one}.{stage}.pt", folder / f"{name}.{stage}.pt")
             for stage in ("base", "zero", *OTHERS)}
    for text, own, start in (("went on from one", name, one), ("one went on", one, name)):
        found[text] = max(apart(folder / f"{one}.{stage}.pt",
                                folder / f"{own}.{stage}.after.{start}.pt")
                          for stage in ("base", "zero"))
    a, b = (checkpoint.load(folder / f"{n}.zero.pt")[1] for n in (one, name))
    pairs = [(x, y) for key in a["figures"] for x, y in zip(a["figures"][key], b["figures"][key])]
    found["log"] = max(abs(x - y) / max(abs(x), 1e-3) for x, y in pairs)
    found["answers"] = float(not all(alike(x, y) for x, y in zip(a["samples"], b["samples"])))
    return found


def compare_all(folder):
    """The differences of every layout, by key such as 4-fsdp-2.base, and the largest of all."""
    for count in LAYOUTS:
        launch(count, folder)
    found = {f"{name_of(layout)}.{key}": x for layouts in LAYOUTS.values() for layout in layouts
             if layout != ONE for key, x in compare(layout, folder).items()}
    return found | {"layouts.max_relative_difference": max(found.values())}


SEEDS, SETTINGS, NEEDS, STAGES = (0,), (), (), ()


def measure(folder):
    """The differences of every layout, in a run's folder."""
    return once(folder, "layouts", lambda: compare_all(Path(folder.path)))


def page(rows, notes=()):
    """The table of a report."""
    names = [name_of(layout) for layouts in LAYOUTS.values() for layout in layouts][1:]
    keys = [key.partition(".")[2] for key in rows if key.startswith(f"{names[0]}.")]
    return ["Relative differences to one process, in float32. A layout is named by its processes, "
            "how they hold the model, and how many share the experts.", "", *table(
                ["layout", *keys], [[name, *(f"{rows[f'{name}.{key}']['mean']:.1e}"
                                             for key in keys)] for name in names]), "",
            f"The largest: {rows['layouts.max_relative_difference']['mean']:.1e}."]
