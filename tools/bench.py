"""bench: how fast this is here, and beside the machine's limit.

    python r1mini.py bench [--preset P] [--json]      ours
    python r1mini.py bench --against                  beside others: studies/peers.py

train       tokens/s of forward, backward and update on 200 rows of 36 random tokens, in passes of
            at most 4,096 (documents, of all lengths, are padded less in smaller passes)
documents   tokens/s of the real supervised loop, on documents of the corpus
prefill     tokens/s of reading 64 prompts of 128 tokens into the cache
decode      tokens/s of writing 64 tokens to each of 512 prompts of 12
step        seconds of one GRPO step, 24 questions of 12 tokens, 16 answers of 42 each: the whole;
            and by part sample, reward and learn (train: learn without the reference model)
gemm        10^9 operations a second of a product of two matrices of 2048 x 2048, in this very run;
            and in bfloat16: where that is several times as fast (AMX), so may --dtype bfloat16 be
copy        10^9 bytes a second read and written by a copy of 256 MiB, in this very run

Figures are medians of ROUNDS runs, after one that is thrown away, and of all processes together
(--processes).
"""
import copy
import dataclasses
import itertools
import json
import random
import subprocess
import sys
import time
from statistics import median

import torch

import moe
import r1mini
import tasks
from engine import devices, optim, sampling
from engine.errors import UserError
from engine.evaluate import prompts_of
from engine.folder import machine
from grpo import Rollout, advantages, improve
from tools.cost import count_parameters, in_products
from tools.settings import resolve

ROUNDS = 11
ROWS, LENGTH, PASS = 200, 36, 4096  # of train; PASS: tokens in one pass, in a step too
PROMPTS, PROMPT, NEW = 512, 12, 64  # of decode
READ, READ_LENGTH = 64, 128         # of prefill
QUESTIONS, GROUP, ANSWER = 24, 16, 42  # of a step
SHAPES = (f"rows x tokens: train {ROWS} x {LENGTH}, prefill {READ} x {READ_LENGTH}, decode "
          f"{PROMPTS} x ({PROMPT} + {NEW}); step {QUESTIONS} questions x {GROUP} x "
          f"({PROMPT} + {ANSWER})")


def seconds(work, device):
    """How long a call takes in the first process, its kernels included; told to all."""
    devices.any_process()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return float(devices.all_sum(torch.tensor((time.perf_counter() - began) * devices.is_main())))


def by_round(works, device, rounds=None):
    """{name: seconds in each round} of several calls, run in turn: A B A B."""
    taken = {name: [] for name in works}
    for _ in range((rounds or ROUNDS) + 1):
        for name, work in works.items():
            taken[name].append(seconds(work, device))
    return {name: each[1:] for name, each in taken.items()}


def in_turn(works, device, rounds=None):
    """{name: median seconds} of several calls, run in turn."""
    return {name: median(each) for name, each in by_round(works, device, rounds).items()}


def gemm(device, dtype, n=2048):
    """A product of two n x n matrices."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b


# -------------------------------------------------------------------------------------------------
# What is timed


def make(config, device, dtype, weights=None):
    """A model of random weights, or of those given."""
    torch.manual_seed(0)
    model = moe.Transformer(config)
    model.load_state_dict({name: x for name, x in (weights or model.state_dict()).items()
                           if model.mtp is not None or not name.startswith("mtp.")})
    return devices.place(model, device, dtype)


def train_step(model, rows=ROWS, length=LENGTH, limit=PASS):
    """One update on random tokens, cut into micro-batches of `limit` tokens as in training."""
    device = model.device
    tokens = torch.randint(model.config.vocab_size, (rows, length), device=device)
    real, weight = torch.ones_like(tokens).bool(), torch.ones_like(tokens).float()
    optimizers = optim.make_optimizers(model.train(), 1e-3)

    def work():
        for some in filter(None, optim.micro_batches([length] * rows, range(rows), limit)):
            loss, _ = moe.supervised_loss(model, tokens[some], real[some], weight[some],
                                           rows * (length - 1), rows)
            loss.backward()
        optim.update(model, optimizers)
    return work


def document_step(model, run):
    """One step of the supervised loop on the corpus; (work, its tokens)."""
    s = dataclasses.replace(run.base, steps=10 ** 9)
    steps = r1mini.train(model, s, lambda rng: tasks.make_document(rng, run.corpus), 0)
    taken = []
    return lambda: taken.append(next(steps)[0]["tokens"]), taken


def random_prompts(config, n, length):
    """n prompts of random tokens."""
    return torch.randint(config.vocab_size, (n, length)).tolist()


@dataclasses.dataclass(frozen=True)
class Work:
    """What is sampled, and learnt from in a step."""
    prompts: list               # token ids, a group's beside each other
    new: int                    # tokens an answer has at most
    end_id: int = -1            # of the token that ends one; -1: none does, all are of one length
    weights: dict | None = None  # of a checkpoint; None: random ones
    limit: int = PASS           # tokens in one pass of learning

    @property
    def even(self):
        """What keys of answers of one length have."""
        return ".even" * (self.end_id < 0)


def even_works(config):
    """Work to sample, and a step's, of random tokens and answers of one length."""
    return (Work(random_prompts(config, PROMPTS, PROMPT), NEW),
            Work([ids for ids in random_prompts(config, QUESTIONS, PROMPT)
                  for _ in range(GROUP)], ANSWER))


def real_work(run, weights):
    """A rollout of Zero's, by a checkpoint's weights: train problems, answers that end."""
    rng = random.Random(0)
    problems = [r1mini.draw_problem(rng, run, run.zero.levels) for _ in range(QUESTIONS)]
    return Work([ids for ids in prompts_of(problems) for _ in range(GROUP)],
                run.zero.max_new_tokens, tasks.END_ID, weights, run.zero.micro_tokens)


def decode(model, n=PROMPTS, length=PROMPT, new=NEW):
    """Answers of `new` tokens to n prompts; no token ends one."""
    prompts = random_prompts(model.config, n, length)
    return lambda: sampling.generate(model, prompts, new, -1, 0)


def sampled(model, work):
    """Answers to a Work's prompts; the call returns how many tokens were written."""
    seeds = itertools.count()
    return lambda: int(sampling.generate(model, work.prompts, work.new, work.end_id, tasks.PAD_ID,
                                     seed=next(seeds)).answer.sum())


def grpo_step(model, run, work):
    """{part of a GRPO step on a Work, and whole: a call that does it}."""
    s = dataclasses.replace(run.zero, problems=QUESTIONS, group_size=GROUP,
                            max_new_tokens=work.new, micro_tokens=work.limit)
    reference, rng, seeds = copy.deepcopy(model).eval(), random.Random(0), itertools.count()
    problems = [r1mini.draw_problem(rng, run, s.levels) for _ in range(QUESTIONS)]
    asked = [p for p in problems for _ in range(GROUP)]
    optimizers, found = optim.make_optimizers(model, 1e-6), {}

    def sample():
        found["samples"] = sampling.generate(model, work.prompts, work.new, work.end_id,
                                             tasks.PAD_ID, seed=next(seeds))

    def reward():
        texts = [tasks.decode(ids) for ids in found["samples"].answers()]
        for rule in (tasks.accuracy, tasks.format_reward):
            [rule(text, p) for text, p in zip(texts, asked)]
        # Random, so that no group is dead: those ours leaves out. The same in all processes.
        rewards = torch.rand(QUESTIONS, GROUP, generator=torch.Generator().manual_seed(0))
        found["rollout"] = Rollout(problems, found["samples"], texts, {}, rewards,
                                   advantages(rewards))

    def learn(beta=s.beta):
        model.train()
        improve(model, reference, optimizers, found["rollout"],
                dataclasses.replace(s, beta=beta), random.Random(0), 0)

    def whole():
        sample()
        reward()
        learn()
    return {"sample": sample, "reward": reward, "learn": learn, "train": lambda: learn(0.0),
            "whole": whole}


# -------------------------------------------------------------------------------------------------
# The command


def ours(run, device, dtype):
    """Figures of this project on this machine, by key; rates in tokens a second."""
    model, peak = make(run.model, device, dtype), 2 * 2048 ** 3 / 1e9
    work, documents = document_step(make(run.model, device, dtype), run)
    reading = random_prompts(run.model, READ, READ_LENGTH)
    here, there = (torch.ones(2 ** 26, device=device) for _ in range(2))
    works = {
        "gemm": gemm(device, dtype), "bfloat16": gemm(device, torch.bfloat16),
        "copy": lambda: there.copy_(here), "documents": work,
        "train": train_step(make(run.model, device, dtype)),
        "prefill": lambda: sampling.generate(model, reading, 1, -1, 0), "decode": decode(model)}
    times = by_round(works, device)
    taken = {name: median(each) for name, each in times.items()}
    found = {"gemm": devices.rank_and_size()[1] * peak / taken["gemm"],
             "gemm.bfloat16": devices.rank_and_size()[1] * peak / taken["bfloat16"],
             "train": ROWS * LENGTH / taken["train"],
             "documents": median(n / x for n, x in zip(documents[1:], times["documents"])),
             "prefill": READ * READ_LENGTH / taken["prefill"],
             "decode": PROMPTS * NEW / taken["decode"]}
    c, width = run.model, 4 if dtype == torch.float32 else 2
    found["train.peak_share"] = 6 * in_products(c) * found["train"] / 1e9 / found["gemm"]
    parts = by_round(grpo_step(model, run, even_works(run.model)[1]), device)
    parts["reference"] = [a - b for a, b in zip(parts["learn"], parts["train"])]
    found |= {f"step.{part}": median(each) for part, each in parts.items()}
    found["cache.latent"] = width * c.n_layers * (c.kv_lora_rank + c.qk_rope_head_dim)
    found["copy"] = devices.rank_and_size()[1] * 2 * here.nbytes / 1e9 / taken["copy"]
    weights = 4 * devices.rank_and_size()[1] * (count_parameters(c)[0] - c.vocab_size * c.dim)
    moved = NEW * (weights + PROMPTS * (PROMPT + NEW / 2) * found["cache.latent"]) / 1e9  # at least
    found["decode.bandwidth_share"] = moved / taken["decode"] / found["copy"]
    found["cache.heads"] = width * c.n_layers * c.n_heads * (
        c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    return found


def page(found):
    """What is printed: a line for each figure, and whether the machine is fast at bfloat16."""
    def line(key, x):
        if isinstance(x, str):
            return f"{key:28} {x}"
        units = {"bandwidth": "of copy", "copy": "GB/s", "share": "of gemm", "gemm": "GFLOP/s",
                 "vs_": "times as fast", "step": "s", "cache": "bytes a token", "": "tokens/s"}
        unit = next(unit for part, unit in units.items() if part in key)
        return f"{key:28} {x:{',.3f' if x < 100 else ',.0f'}} {unit}"
    lines = [line(*pair) for pair in found.items()]
    if (gain := found.get("gemm.bfloat16", 0.0) / found.get("gemm", 1.0)) > 1.5:
        lines.append(f"Large products are {gain:.1f} times as fast in bfloat16 here. On a CPU "
                     "--dtype bfloat16 pays where shapes come again; see README, Speed.")
    return "\n".join(lines)


def benched(folder, *words):
    """The figures of the command bench, in a process of its own."""
    command = [sys.executable, r1mini.__file__, "bench", "--preset", folder.run.preset, "--json",
               "--device", folder.run.device, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {(done.stderr.strip().splitlines() or [''])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def announce(minutes):
    """Says in the first process how long it takes."""
    if devices.is_main():
        print(f"measuring: {minutes}; all is printed at the end", file=sys.stderr)


def setting(options):
    """The machine, processes, threads, torch and dtype of a measurement, in a text."""
    return (f"{machine()}, {devices.rank_and_size()[1]} processes of {torch.get_num_threads()} "
            f"threads, torch {torch.__version__}, {str(options.dtype).removeprefix('torch.')}")


def main(options):
    """The command bench."""
    run = resolve(options.preset, options.set)
    if options.start:
        raise UserError("--from is for bench --against")
    with devices.processes(options.device, options.processes, options.itself) as device:
        announce("nano takes a minute on two idle cores")
        found = {"machine": setting(options), "shapes": SHAPES}
        found |= ours(run, device, options.dtype)
    print(json.dumps(found) if options.json else page(found))
    return 0
