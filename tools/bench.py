"""bench: how fast this machine trains and samples, also as a share of its peak.

    python r1mini.py bench [--preset P] [--json]      this project
    python r1mini.py bench --against [--from CKPT]    beside transformers and TRL: studies/peers.py

train       tokens/s of forward, backward and update on 200 rows of 36 random tokens, in passes of
            at most 4,096 tokens
documents   tokens/s of the real supervised loop, on documents packed into rows of 128 tokens
prefill     tokens/s of reading 64 prompts of 128 tokens into the cache
decode      tokens/s of writing 64 tokens after each of 512 prompts of 12 tokens
decode.long the same for 32 tokens after each of 64 prompts of 1,024 tokens. Reading the prompts is
            not timed. operations: multiplications and additions per new token. bytes: the least
            that a new token reads, of its cache and its share of the weights. gemm_share,
            bandwidth_share: the rates reached, as a share of gemm and copy
step        seconds per GRPO step: 24 questions of 12 tokens, 16 answers of 42 tokens to each.
            whole is the whole step; sample, reward and learn are its parts; train is learn without
            the reference model
gemm        10^9 operations per second of the product of two 2048 x 2048 matrices. gemm.bfloat16 is
            the same in bfloat16: if it is several times as fast (AMX), --dtype bfloat16 may be too
copy        10^9 bytes per second, read and written, by a copy of 256 MiB
cache       bytes per token: latent (ours), and heads (what multi-head attention would keep)

gemm and copy are measured in the same rounds as the rest, so that the shares of the peak are fair.
Each number is the median of ROUNDS rounds, after a first round that is dropped. It counts all
processes together (--processes).
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
from engine.evaluate import prompts_of, repeat_for_answers
from engine.folder import describe_machine
from grpo import Rollout, advantages, improve
from tools.cost import count_parameters
from tools.flops import flops_per_token
from tools.settings import resolve_settings

ROUNDS = 11
ROWS, LENGTH = 200, 36                  # train: rows, tokens per row
PASS = 4096                             # train and step: tokens per pass
PREFILL_PROMPTS, PREFILL_LENGTH = 64, 128
PROMPTS, PROMPT, NEW = 512, 12, 64      # decode: prompts, tokens per prompt, new tokens of each
LONG_PROMPTS, LONG, LONG_NEW = 64, 1024, 32  # the same of decode.long
QUESTIONS, GROUP, ANSWER = 24, 16, 42   # step: questions, answers per question, tokens per answer
SHAPES = (f"rows x tokens: train {ROWS} x {LENGTH}, prefill {PREFILL_PROMPTS} x {PREFILL_LENGTH}, "
          f"decode {PROMPTS} x ({PROMPT} + {NEW}), "
          f"decode.long {LONG_PROMPTS} x ({LONG} + {LONG_NEW}); step {QUESTIONS} questions x "
          f"{GROUP} x ({PROMPT} + {ANSWER})")


def main(options):
    """The command bench."""
    run = resolve_settings(options.preset, options.set)
    for option, value in (("--from", options.start), ("--part", options.part)):
        if value:
            raise UserError(f"{option} is for bench --against")
    with devices.processes(options.device, options.processes, options.itself) as device:
        announce("nano takes two minutes on two idle cores")
        numbers = {"machine": describe_bench(options), "shapes": SHAPES}
        numbers |= measure_ours(run, device, options.dtype)
    print(json.dumps(numbers) if options.json else console_text(numbers))
    return 0


# -------------------------------------------------------------------------------------------------
# The clock


def seconds(call, device):
    """How long a call takes in the first process, with its kernels. All processes get this
    number."""
    devices.any_process()
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    taken = time.perf_counter() - began
    return float(devices.all_sum(torch.tensor(taken if devices.is_main() else 0.0)))


def seconds_by_round(calls, device, rounds=None):
    """{name: seconds in each round} of several calls, which run in turn: A B A B. The first round
    is dropped."""
    times = {name: [] for name in calls}
    for _ in range((rounds or ROUNDS) + 1):
        for name, call in calls.items():
            times[name].append(seconds(call, device))
    return {name: times_of_call[1:] for name, times_of_call in times.items()}


def median_seconds(calls, device, rounds=None):
    """{name: median of seconds_by_round}."""
    times = seconds_by_round(calls, device, rounds)
    return {name: median(times_of_call) for name, times_of_call in times.items()}


# -------------------------------------------------------------------------------------------------
# What is timed: each function makes a call without arguments


def bench_model(config, device, dtype, weights=None):
    """A model of random weights, or of those given."""
    torch.manual_seed(0)
    model = moe.Transformer(config)
    if weights:
        kept = {name: x for name, x in weights.items()
                if model.mtp is not None or not name.startswith("mtp.")}
        model.load_state_dict(kept)
    return devices.place_model(model, device, dtype)


def bench_gemm(device, dtype, n=2048):
    """The product of two n x n matrices."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b


def bench_train_step(model, rows=ROWS, length=LENGTH, limit=PASS):
    """One update on random tokens, in micro-batches of `limit` tokens as in training."""
    device = model.device
    tokens = torch.randint(model.config.vocab_size, (rows, length), device=device)
    document = torch.ones_like(tokens)  # each row is one document
    weight = document.float()
    optimizers = optim.make_optimizers(model.train(), 1e-3)

    def step():
        for part in optim.micro_batches([length] * rows, range(rows), limit):
            if part:  # a process without rows has nothing to do
                loss, _ = moe.supervised_loss(model, tokens[part], document[part],
                                              weight[part], rows * (length - 1), rows)
                loss.backward()
        optim.optimizer_update(model, optimizers)
    return step


def bench_document_step(model, run):
    """One step of the supervised loop on the corpus. Returns (call, a list to which each call adds
    the number of tokens of its step)."""
    s = dataclasses.replace(run.base, steps=10 ** 9)
    steps = r1mini.train(model, s, lambda rng: tasks.make_document(rng, run.corpus), 0)
    tokens_of_step = []

    def step():
        record, _ = next(steps)
        tokens_of_step.append(record["tokens"])
    return step, tokens_of_step


def _bench_prompts(config, n, length):
    """n prompts of random tokens."""
    return torch.randint(config.vocab_size, (n, length)).tolist()


def _prefill(model, n=PREFILL_PROMPTS, length=PREFILL_LENGTH):
    """Reads n prompts and writes one token to each."""
    prompts = _bench_prompts(model.config, n, length)
    return lambda: sampling.generate(model, prompts, 1, -1, 0)


def decode(model, n=PROMPTS, length=PROMPT, new=NEW):
    """Writes `new` tokens to each of n prompts. No token ends an answer."""
    prompts = _bench_prompts(model.config, n, length)
    return lambda: sampling.generate(model, prompts, new, -1, 0)


def decoding_rate(model, context, n, new=LONG_NEW):
    """Tokens per second of n answers of `new` tokens to prompts of `context` tokens. The clock
    starts at the first token, so reading the prompts does not count."""
    times, prompts = [], _bench_prompts(model.config, n, context)
    sampling.generate(model, prompts, new + 1, -1, 0,
                      watch=lambda _: times.append(time.perf_counter()))
    return new * n / (times[-1] - times[0])


def _long_decoding(config, device, dtype):
    """(call, a list to which each call adds its decoding rate) behind LONG tokens."""
    longest = max(config.max_seq_len, LONG + LONG_NEW + 1)
    model = bench_model(dataclasses.replace(config, max_seq_len=longest), device, dtype)
    rates = []
    return lambda: rates.append(decoding_rate(model, LONG, LONG_PROMPTS)), rates


def _decoding_bytes(config, context, prompts, processes, cache_bytes):
    """Bytes that a new token reads at least: the cache of `context` tokens, of cache_bytes each,
    and its part of the weights (float32), which each process reads once for its prompts."""
    parameters, _ = count_parameters(config)
    weight_bytes = 4 * (parameters - config.vocab_size * config.dim)  # the embedding is looked up
    return context * cache_bytes + processes * weight_bytes / prompts


@dataclasses.dataclass(frozen=True)
class Work:
    """What sampling samples, and what a GRPO step learns from."""
    prompts: list                # token ids; the prompts of a group are neighbours
    new: int                     # most tokens per answer
    end_id: int = -1             # the token that ends an answer; -1: all answers have `new` tokens
    weights: dict | None = None  # of a checkpoint; None: random weights
    limit: int = PASS            # tokens per pass of learning

    @property
    def key_part(self):
        """".even" in the keys of answers that all have one length."""
        return ".even" if self.end_id < 0 else ""


def bench_equal_works(config, questions=QUESTIONS):
    """(Work to sample, Work of a GRPO step): random tokens and answers of one length."""
    to_sample = Work(_bench_prompts(config, PROMPTS, PROMPT), NEW)
    to_learn = Work(repeat_for_answers(_bench_prompts(config, questions, PROMPT), GROUP), ANSWER)
    return to_sample, to_learn


def bench_zero_work(run, weights):
    """The Work of Zero's RL: train problems, the weights of a checkpoint, answers that end."""
    rng = random.Random(0)
    problems = [r1mini.draw_problem(rng, run, run.zero.levels) for _ in range(QUESTIONS)]
    prompts = repeat_for_answers(prompts_of(problems), GROUP)
    return Work(prompts, run.zero.max_new_tokens, tasks.END_ID, weights, run.zero.micro_tokens)


def bench_sampling(model, work):
    """Samples an answer to each prompt of a Work. The call returns the number of tokens."""
    seeds = itertools.count()

    def sample():
        samples = sampling.generate(model, work.prompts, work.new, work.end_id, tasks.PAD_ID,
                                    seed=next(seeds))
        return int(samples.answer.sum())
    return sample


def bench_grpo_step(model, run, work):
    """The parts of a GRPO step on a Work, and the whole step: {name: call}."""
    questions = len(work.prompts) // GROUP
    s = dataclasses.replace(run.zero, problems=questions, group_size=GROUP,
                            max_new_tokens=work.new, micro_tokens=work.limit)
    reference, rng, seeds = copy.deepcopy(model).eval(), random.Random(0), itertools.count()
    problems = [r1mini.draw_problem(rng, run, s.levels) for _ in range(questions)]
    problem_of_answer = repeat_for_answers(problems, GROUP)
    optimizers = optim.make_optimizers(model, 1e-6)
    newest = {}  # the samples and the rollout that the next part takes

    def sample():
        newest["samples"] = sampling.generate(model, work.prompts, work.new, work.end_id,
                                              tasks.PAD_ID, seed=next(seeds))

    def reward():
        texts = [tasks.decode(ids) for ids in newest["samples"].answers()]
        for rule in (tasks.accuracy, tasks.format_reward):
            for text, problem in zip(texts, problem_of_answer):
                rule(text, problem)
        # The rewards are random, since learn() would skip groups of equal rewards. They are the
        # same in all processes.
        rewards = torch.rand(questions, GROUP, generator=torch.Generator().manual_seed(0))
        newest["rollout"] = Rollout(problems, newest["samples"], texts, {}, rewards,
                                    advantages(rewards))

    def learn(beta=s.beta):
        model.train()
        improve(model, reference, optimizers, newest["rollout"],
                dataclasses.replace(s, beta=beta), random.Random(0), 0)

    def whole():
        sample()
        reward()
        learn()
    return {"sample": sample, "reward": reward, "learn": learn, "train": lambda: learn(0.0),
            "whole": whole}


# -------------------------------------------------------------------------------------------------
# All numbers


def measure_ours(run, device, dtype):
    """{key: number} of this project on this machine."""
    config, (_, processes) = run.model, devices.rank_and_size()
    model = bench_model(config, device, dtype)
    document_call, document_tokens = bench_document_step(bench_model(config, device, dtype), run)
    prefill_call = _prefill(model)
    long_call, long_rates = _long_decoding(config, device, dtype)
    source, target = (torch.ones(2 ** 26, device=device) for _ in range(2))
    calls = {
        "gemm": bench_gemm(device, dtype), "bfloat16": bench_gemm(device, torch.bfloat16),
        "copy": lambda: target.copy_(source), "documents": document_call,
        "train": bench_train_step(bench_model(config, device, dtype)),
        "prefill": prefill_call, "decode": decode(model), "long": long_call}
    times = seconds_by_round(calls, device)
    taken = {name: median(times_of_call) for name, times_of_call in times.items()}
    gemm_operations = processes * 2 * 2048 ** 3 / 1e9
    document_rates = [n / x for n, x in zip(document_tokens[1:], times["documents"])]
    numbers = {
        "gemm": gemm_operations / taken["gemm"],
        "gemm.bfloat16": gemm_operations / taken["bfloat16"],
        "train": ROWS * LENGTH / taken["train"],
        "documents": median(document_rates),
        "prefill": PREFILL_PROMPTS * PREFILL_LENGTH / taken["prefill"],
        "decode": PROMPTS * NEW / taken["decode"]}
    flops = flops_per_token(config, "learn", mtp=True)
    numbers["train.peak_share"] = flops * numbers["train"] / 1e9 / numbers["gemm"]

    _, work = bench_equal_works(config)
    parts = seconds_by_round(bench_grpo_step(model, run, work), device)
    parts["reference"] = [learn - train for learn, train in zip(parts["learn"], parts["train"])]
    for part, times_of_part in parts.items():
        numbers[f"step.{part}"] = median(times_of_part)

    bytes_per_number = 4 if dtype == torch.float32 else 2
    latent = config.n_layers * (config.kv_lora_rank + config.qk_rope_head_dim)
    heads = config.n_layers * config.n_heads * (
        config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    numbers["cache.latent"] = bytes_per_number * latent
    numbers["copy"] = processes * 2 * source.nbytes / 1e9 / taken["copy"]
    numbers["cache.heads"] = bytes_per_number * heads
    # On average half of the new tokens are in the cache.
    bytes_read = _decoding_bytes(config, PROMPT + NEW / 2, PROMPTS, processes,
                                numbers["cache.latent"])
    numbers["decode.bandwidth_share"] = numbers["decode"] * bytes_read / 1e9 / numbers["copy"]

    context, long_rate = LONG + LONG_NEW / 2, median(long_rates[1:])
    operations = flops_per_token(config, "write", seen=context)
    bytes_read = _decoding_bytes(config, context, LONG_PROMPTS, processes, numbers["cache.latent"])
    numbers |= {
        "decode.long": long_rate,
        "decode.long.operations": operations,
        "decode.long.bytes": bytes_read,
        "decode.long.gemm_share": long_rate * operations / 1e9 / numbers["gemm"],
        "decode.long.bandwidth_share": long_rate * bytes_read / 1e9 / numbers["copy"]}
    return numbers


def console_text(numbers):
    """What is printed: a line for each number, a sentence on long contexts, and whether bfloat16
    is faster here."""
    lines = []
    for key, value in numbers.items():
        if isinstance(value, str):
            lines.append(f"{key:28} {value}")
        else:
            lines.append(f"{key:28} {_digits_of(value)} {_unit_of(key)}")
    if "decode.long" in numbers:
        lines.append(_long_sentence(numbers))
    gain = numbers.get("gemm.bfloat16", 0.0) / numbers.get("gemm", 1.0)
    if gain > 1.5:
        lines.append(f"Large products are {gain:.1f} times as fast in bfloat16 here. On a CPU "
                     "--dtype bfloat16 pays where the same shapes come again: docs/speed.md.")
    return "\n".join(lines)


def _digits_of(value):
    """A number as it is printed."""
    if isinstance(value, int):
        return f"{value:,}"
    if 0 < value < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.3f}" if value < 100 else f"{value:,.0f}"


def _long_sentence(numbers):
    """What decoding behind a long context costs, and how near it is to the machine's limits."""
    rate, operations = numbers["decode.long"], numbers["decode.long.operations"]
    return (f"Behind {LONG:,} tokens a new token takes {operations / 1e6:.1f} million operations "
            f"and reads at least {numbers['decode.long.bytes'] / 1e6:.2f} MB. At {rate:,.0f} "
            f"tokens a second this is {numbers['decode.long.gemm_share']:.0%} of the operations "
            f"and {numbers['decode.long.bandwidth_share']:.0%} of the bytes a second that this "
            "machine reached in a large product and a large copy.")


def _unit_of(key):
    """The unit of a number. The first part that is in the key decides."""
    units = {"dev": "of dev problems", "rollouts": "rollouts", "loss_difference": "nats",
             "operations": "operations per token", "bytes": "bytes per token",
             "bandwidth": "of copy", "copy": "GB/s", "share": "of gemm", "gemm": "GFLOP/s",
             "vs_": "times as fast", "step": "s", "rl_to_85": "s", "cache": "bytes per token"}
    for part, unit in units.items():
        if part in key:
            return unit
    return "tokens/s"


def describe_bench(options):
    """The machine, processes, threads, torch and dtype of a measurement, as a text."""
    return (f"{describe_machine()}, {devices.rank_and_size()[1]} processes of "
            f"{torch.get_num_threads()} "
            f"threads, torch {torch.__version__}, {str(options.dtype).removeprefix('torch.')}")


def announce(duration):
    """Says in the first process how long the measurement takes."""
    if devices.is_main():
        print(f"measuring: {duration}; all numbers are printed at the end", file=sys.stderr)


def run_bench(folder, *words):
    """The numbers of the command bench, which runs in a process of its own."""
    command = [sys.executable, r1mini.__file__, "bench", "--preset", folder.run.preset, "--json",
               "--device", folder.run.device, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or [""])[-1]
        raise UserError(f"{' '.join(command)}: {last_line}")
    return json.loads(done.stdout.strip().splitlines()[-1])
