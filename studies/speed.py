"""What the whole command takes, and its parts beside others and beside the machine.

    python r1mini.py study speed --seeds 0

Minutes are those of runs/r1-SEED, if it had the machine to itself; the rest is measured now, by
`bench --against`, once more `--from` that run's Zero, in processes of their own, and here: what the
time goes to, how training and decoding grow with size, and what MTP's drafts are worth in
speculative decoding.
"""
import dataclasses
import json
import time
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
from tools.study import once
from tools.tables import table

SEEDS = (0,)
SETTINGS, NEEDS, STAGES = (), ("distill_rl.pt",), ()
PROMPTS = 64                                  # of drafts, and of decoding in long contexts
# What an operation is; batched products are attention's in decoding.
KINDS = {"products": ("aten::mm", "aten::addmm"),
         "batched_products": ("aten::bmm", "aten::baddbmm"),
         "fused_attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",
                             "aten::_scaled_dot_product_flash_attention_for_cpu_backward")}


def minutes(run):
    """What a run took in all, and until Zero was right on 85% of dev, from random weights and tests
    apart."""
    times = read_timing(run)[2]
    if not times:
        raise UserError(f"{run} shared its machine: no minutes to be had; run it again, alone")
    log = read_log(run)
    reached = [r["step"] for r in log if r["kind"] == "dev" and r["stage"] == "zero"
               and r["pass@1"] >= 0.85]
    found = {"minutes.total": sum(times.values())}
    found |= {f"minutes.{stage}": x for stage, x in times.items()}
    if reached:
        timing = map(json.loads, (run / "timing.jsonl").read_text("utf-8").splitlines())
        found["minutes.to_85"] = times["base"] + sum(
            t["seconds"] / 60 for t in timing if t.get("stage") == "zero"
            and t["step"] <= reached[0])
    return found


def spent(folder):
    """Shares of the processor's time that operations of each kind take, on one process."""
    device, config, found = folder.options.device, folder.run.model, {}
    for name, work in (
            ("train", bench.train_step(bench.make_model(config, device, folder.options.dtype))),
            ("decode", bench.decode(bench.make_model(config, device, folder.options.dtype)))):
        work()
        with torch.profiler.profile() as watched:
            work()
        taken = {e.key: e.self_cpu_time_total for e in watched.key_averages()}
        known = {kind: sum(taken.get(key, 0) for key in keys) for kind, keys in KINDS.items()}
        known["rest"] = sum(taken.values()) - sum(known.values())
        found |= {f"share.{name}.{kind}": x / sum(taken.values()) for kind, x in known.items()}
    return found


def in_bfloat16(folder):
    """What training and decoding would be with products in bfloat16."""
    found = bench.run_bench(folder, "--dtype", "bfloat16")
    return {f"bfloat16.{key}": found[key] for key in ("train", "documents", "decode")}


def growth(folder):
    """Tokens a second of training by the size of the batch, always in passes of zero.micro_tokens,
    and of decoding by the context; in turn, so that a slow minute of the machine meets all sizes.
    On one process: to be compared with each other only."""
    device, config, found = folder.options.device, folder.run.model, {}
    rows = {"2k": 56, "16k": 448, "64k": 1792}
    taken = bench.median_seconds({name: bench.train_step(
        bench.make_model(config, device, folder.options.dtype), n,
        limit=folder.run.zero.micro_tokens)
        for name, n in rows.items()}, device, 9)
    rates = [rows[name] * bench.LENGTH / x for name, x in taken.items()]
    found |= {f"train.{name}": rate for name, rate in zip(rows, rates)}
    found["train.spread"] = max(rates) / min(rates)
    long = bench.make_model(dataclasses.replace(config, max_seq_len=2048), device,
                            folder.options.dtype)
    for n, name in ((1, "decode.one"), (PROMPTS, "decode")):  # last what takes gigabytes to read
        pairs = [[decoding(long, context, n) for context in (128, 1024)] for _ in range(21)]
        found[f"{name}.128"], found[f"{name}.1024"] = map(median, zip(*pairs))
        found[f"{name}.1024_to_128"] = found[f"{name}.128"] / found[f"{name}.1024"]
    return found


def decoding(model, context, n, new=32):
    """Tokens a second of n answers behind prompts of `context` tokens, from the first token on:
    reading the prompts is not in it."""
    stamps, prompts = [], bench.random_prompts(model.config, n, context)
    sampling.generate(model, prompts, new + 1, -1, 0,
                  watch=lambda _: stamps.append(time.perf_counter()))
    return new * n / (stamps[-1] - stamps[0])


def drafting(folder):
    """Share of MTP's drafts accepted on dev problems, at temperature 1, and tokens a second with
    them and without, for one prompt and for many."""
    device, found = folder.options.device, {}
    problems = tasks.make_problems("dev", PROMPTS, folder.run.zero.levels)
    prompts, ends = prompts_of(problems), (tasks.END_ID, tasks.PAD_ID)
    for stage in ("base", "zero"):
        model, _ = checkpoint.load(Path(folder.run.start).parent / f"{stage}.pt", device)
        kept = {}
        for n in (1, PROMPTS):
            def plain():
                kept["plain"] = sampling.generate(model, prompts[:n], 120, *ends)

            def drafted():
                kept["drafted"], kept["share"] = sampling.speculate(model, prompts[:n], 120, *ends)
            taken = bench.median_seconds({"plain": plain, "drafted": drafted}, device, 3)
            for name, x in taken.items():
                found[f"{stage}.{name}.{n}"] = int(kept[name].answer.sum()) / x
        found[f"{stage}.accepted"] = kept["share"]
    return found


def measure(folder):
    """The figures of a seed."""
    found = minutes(Path(folder.run.start).parent)
    found |= peers.measure(folder)
    for kind, work in (("spent", lambda: spent(folder)),
                       ("bfloat16", lambda: in_bfloat16(folder)),
                       ("growth", lambda: growth(folder)), ("drafts", lambda: drafting(folder))):
        found |= {key: x for key, x in once(folder, kind, work).items() if key != "machine"}
    return found


def page(rows, notes):
    """One table of all figures, and what was asked of them."""
    asked = {"minutes.total": ("at most", 10.0), "minutes.to_85": ("at most", 4.0),
             "train.vs_transformers": ("at least", 2.0), "step.vs_trl": ("at least", 4.0),
             "sample.vs_transformers": ("at least", 5.0),
             "step.even.vs_trl": ("at least", 4.0),
             "sample.even.vs_transformers": ("at least", 5.0), "train.spread": ("at most", 1.15),
             "decode.1024_to_128": ("at most", 1.5), "decode.one.1024_to_128": ("at most", 1.5)}
    lines = []
    for key, (how, limit) in asked.items():
        x = rows[key]["mean"] if key in rows else float("nan")
        met = x <= limit if how == "at most" else x >= limit
        ends = [rows[key + end]["mean"] for end in (".least", ".most") if key + end in rows]
        span = f"; by round {ends[0]:.3g} to {ends[1]:.3g}" if ends else ""
        lines.append(f"- {'Yes' if met else 'No'}: `{key}` {how} {limit:g} ({x:.3g}{span}).")
    lines += ["", *table(["figure", "value"], [[key, f"{row['mean']:.4g}"]
                                               for key, row in rows.items()])]
    settings = {key: next(iter(seeds.values())) for key, seeds in notes.items()}
    return [*lines, "", *(f"`{key}`: {text}." for key, text in settings.items())]
