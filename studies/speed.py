"""How long does the whole command take, and where does the time go?

The paper: R1-Zero's training took 512 H800 about 198 hours (R1 v2 section B.4.4).
Drafts by MTP are accepted in 85 to 90% of cases and make V3 write 1.8 times as many
tokens per second (V3 section 5.4.3).

    python r1mini.py study speed --seeds 0

The minutes are those of runs/r1-SEED, which must have had the machine to itself. The
rest is measured now:

    peers       `bench --against` with that run's base and Zero: real work, and work of one
                shape (peers.py)
    spent       the share of time of each kind of operation
    bfloat16    training and decoding with products in bfloat16
    growth      how training speed depends on the size of the batch, and decoding speed
                on the length of the context
    drafts      what MTP's drafts gain in speculative decoding
"""
import dataclasses
import json
from pathlib import Path
from statistics import median

import torch

import tasks
from engine import checkpoint, sampling
from engine.errors import UserError
from engine.evaluate import prompts_of
from engine.folder import read_log
from studies import peers
from tools import bench
from tools.report import read_timing
from tools.study import measure_once
from tools.tables import table

SEEDS = (0,)
SETTINGS, NEEDS, STAGES = (), ("distill_rl.pt",), ()
PROMPTS = 64  # for drafts, and for decoding in long contexts
# {kind of operation: its names in torch}. Batched products are those of attention in
# decoding.
KINDS = {"products": ("aten::mm", "aten::addmm"),
         "batched_products": ("aten::bmm", "aten::baddbmm"),
         "fused_attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",
                             "aten::_scaled_dot_product_flash_attention_for_cpu_backward")}


def _minutes(run_folder):
    """The minutes of a run: in all, by stage, and until Zero was right on 85% of dev
    (training from random weights, without the tests)."""
    minutes_of_stage = read_timing(run_folder)[2]
    if not minutes_of_stage:
        raise UserError(f"{run_folder} shared the machine with something else, so its minutes "
                        "mean nothing; run it again, alone")
    numbers = {"minutes.total": sum(minutes_of_stage.values())}
    for stage, x in minutes_of_stage.items():
        numbers[f"minutes.{stage}"] = x
    reached = None  # the RL step
    for record in read_log(run_folder):
        is_dev = record["kind"] == "dev" and record["stage"] == "zero"
        if reached is None and is_dev and record["pass@1"] >= 0.85:
            reached = record["step"]
    if reached is not None:
        lines = (run_folder / "timing.jsonl").read_text("utf-8").splitlines()
        rl_minutes = 0.0
        for record in map(json.loads, lines):
            if record.get("stage") == "zero" and record["step"] <= reached:
                rl_minutes += record["seconds"] / 60
        numbers["minutes.to_85"] = minutes_of_stage["base"] + rl_minutes
    return numbers


def _share_of_time(folder):
    """The share of processor time of each kind of operation, in training and in
    decoding, on one process."""
    device, dtype, config = folder.options.device, folder.options.dtype, folder.run.model
    works = {"train": bench.bench_train_step(bench.bench_model(config, device, dtype)),
             "decode": bench.decode(bench.bench_model(config, device, dtype))}
    numbers = {}
    for name, work in works.items():
        work()  # not timed: the first call is slower
        with torch.profiler.profile() as profile:
            work()
        time_of_operation = {event.key: event.self_cpu_time_total
                             for event in profile.key_averages()}
        total = sum(time_of_operation.values())
        time_of_kind = {}
        for kind, operations in KINDS.items():
            time_of_kind[kind] = sum(time_of_operation.get(key, 0) for key in operations)
        time_of_kind["rest"] = total - sum(time_of_kind.values())
        for kind, x in time_of_kind.items():
            numbers[f"share.{name}.{kind}"] = x / total
    return numbers


def _in_bfloat16(folder):
    """The rates of training and decoding with products in bfloat16."""
    measured = bench.run_bench(folder, "--dtype", "bfloat16")
    return {f"bfloat16.{key}": measured[key] for key in ("train", "documents", "decode")}


def _growth(folder):
    """Tokens per second of training by the size of the batch, and of decoding by the
    length of the context.

    A pass always has zero.micro_tokens. The sizes take turns, so a slow minute of the
    machine affects all of them. This is on one process, so compare these numbers with
    each other only.
    """
    device, dtype, config = folder.options.device, folder.options.dtype, folder.run.model
    limit = folder.run.zero.micro_tokens
    numbers = {}
    rows = {"2k": 56, "16k": 448, "64k": 1792}  # {tokens: rows of bench.LENGTH tokens}
    works = {name: bench.bench_train_step(bench.bench_model(config, device, dtype), n, limit=limit)
             for name, n in rows.items()}
    seconds = bench.median_seconds(works, device, 9)
    rates = {name: rows[name] * bench.LENGTH / x for name, x in seconds.items()}
    for name, rate in rates.items():
        numbers[f"train.{name}"] = rate
    numbers["train.spread"] = max(rates.values()) / min(rates.values())

    long_config = dataclasses.replace(config, max_seq_len=2048)
    model = bench.bench_model(long_config, device, dtype)
    # Many prompts come last: their caches take gigabytes.
    for n, name in ((1, "decode.one"), (PROMPTS, "decode")):
        short_rates, long_rates = [], []
        for _ in range(21):
            short_rates.append(bench.decoding_rate(model, 128, n))
            long_rates.append(bench.decoding_rate(model, 1024, n))
        short, long = median(short_rates), median(long_rates)
        numbers |= {f"{name}.128": short, f"{name}.1024": long,
                    f"{name}.1024_to_128": short / long}
    return numbers


def _drafting(folder):
    """The share of MTP's drafts that are accepted on dev problems at temperature 1, and
    tokens per second with drafts and without, for one prompt and for many."""
    device, r1_folder = folder.options.device, Path(folder.run.start).parent
    problems = tasks.make_problems("dev", PROMPTS, folder.run.zero.levels)
    prompts = prompts_of(problems)
    numbers = {}
    for stage in ("base", "zero"):
        model, _ = checkpoint.load(r1_folder / f"{stage}.pt", device)
        last = {}  # what the last call of each function returned
        for n in (1, PROMPTS):
            def plain():
                last["plain"] = sampling.generate(model, prompts[:n], 120, tasks.END_ID,
                                                  tasks.PAD_ID)

            def drafted():
                last["drafted"], last["accepted"] = sampling.speculate(
                    model, prompts[:n], 120, tasks.END_ID, tasks.PAD_ID)

            seconds = bench.median_seconds({"plain": plain, "drafted": drafted}, device, 3)
            for name, x in seconds.items():
                numbers[f"{stage}.{name}.{n}"] = int(last[name].answer.sum()) / x
        numbers[f"{stage}.accepted"] = last["accepted"]
    return numbers


def measure(folder):
    """The numbers of one seed."""
    numbers = _minutes(Path(folder.run.start).parent)
    numbers |= peers.measure(folder)
    for kind, work in (("spent", _share_of_time), ("bfloat16", _in_bfloat16), ("growth", _growth),
                       ("drafts", _drafting)):
        record = measure_once(folder, kind, lambda: work(folder))
        numbers |= {key: x for key, x in record.items() if key != "machine"}
    return numbers


# ------------------------------------------------------------------------------
# The report

GOALS = {"minutes.total": ("at most", 10.0), "minutes.to_85": ("at most", 4.0),
         "train.vs_transformers": ("at least", 2.0), "step.vs_trl": ("at least", 4.0),
         "sample.vs_transformers": ("at least", 5.0), "step.even.vs_trl": ("at least", 4.0),
         "sample.even.vs_transformers": ("at least", 5.0), "train.spread": ("at most", 1.15),
         "decode.1024_to_128": ("at most", 1.5), "decode.one.1024_to_128": ("at most", 1.5)}


def page(rows, notes):
    """The lines of the report: which goals are met, the comparisons with others (real work
    first), and one table of all numbers."""
    lines = []
    for key, (bound, limit) in GOALS.items():
        x = rows[key]["mean"] if key in rows else float("nan")
        is_met = x <= limit if bound == "at most" else x >= limit
        by_round = ""
        if f"{key}.least" in rows and f"{key}.most" in rows:
            least, most = rows[f"{key}.least"]["mean"], rows[f"{key}.most"]["mean"]
            by_round = f"; by round {least:.3g} to {most:.3g}"
        lines.append(f"- {'Yes' if is_met else 'No'}: `{key}` {bound} {limit:g} "
                     f"({x:.3g}{by_round}).")
    texts = {key: next(iter(text_of_seed.values())) for key, text_of_seed in notes.items()}
    numbers = {key: row["mean"] for key, row in rows.items()}
    body = [[key, f"{x:.4g}"] for key, x in numbers.items()]
    lines += ["", *peers.comparison_tables(numbers | texts), *table(["key", "value"], body), ""]
    for key, text in texts.items():
        lines.append(f"`{key}`: {text}.")
    return lines
