"""Could the base do as well without RL?

The paper: RL raises R1-Zero's pass@1 on AIME 2024 from 15.6% to 71.0%; its majority
vote of 64 answers is right on 86.7% (R1 v1 section 2.2.4).

    python r1mini.py study baseline

Four other ways to use the same base stand beside RL:

    sft         SFT on the base's own right answers, with as many FLOPs as Zero's RL took
    examples2   the base with 2 worked examples in its prompt
    examples4   the base with 4 worked examples in its prompt
    cons        the base's majority vote

FLOPs per token, with N weights in products (tools/flops.py): 2N to write or to read it,
6N to learn from it. RL takes 10N per token: the policy writes it (2N), the reference
reads it (2N), and the policy learns from it (6N). A token of a dead group takes 2N. SFT
takes 2N for each token that it samples, and 6N for each one that it learns from, where N
includes MTP. All models are tested on held-out test problems at temperature 1. The FLOPs
decide where SFT stops; nothing else was tuned.
"""
import copy
import dataclasses
import random
from pathlib import Path

import tasks
from engine import checkpoint
from engine.errors import UserError
from engine.evaluate import repeat_for_answers, sample_answers, selection_scores
from engine.folder import read_log
from engine.watch import Watch
from r1mini import collect, train
from tools.compare import compare
from tools.flops import flops_by_stage, flops_per_token
from tools.study import measure_once, test_record
from tools.tables import cell, table

SEEDS, SETTINGS, NEEDS, STAGES = range(6), (), ("base.pt", "zero.pt"), ("sft",)
DIFFERENCES = {f"zero_less_{name}.pass@1": ("zero.pass@1", f"{name}.pass@1")
               for name in ("base", "sft")}


# ------------------------------------------------------------------------------
# SFT with RL's FLOPs


def _answers_of_rl(log):
    """The number of answers that Zero's RL drew, from the log of a run."""
    s = log[0]["zero"]
    steps = sum(r["kind"] == "zero" for r in log)
    return steps * s["problems"] * s["group_size"] * s["oversample"]


def _tflop_of_sft(log):
    """What SFT took so far: its samples, and its training."""
    flops = flops_by_stage(log)
    return flops["collect_sft"] + flops.get("sft", 0.0)


def _sft_steps(rl_log, log, documents, run):
    """The number of SFT steps after which SFT has taken as many FLOPs as RL. log: of the
    study's run, which has collected the documents."""
    tflop_left = flops_by_stage(rl_log)["zero"] - _tflop_of_sft(log)
    tokens_per_document = sum(len(d.tokens) for d in documents) / len(documents)
    tokens_per_step = run.dev3.documents * tokens_per_document
    tflop_per_step = tokens_per_step * flops_per_token(
        run.model, "learn", mtp=run.model.mtp_weight > 0) / 1e12
    return max(1, round(tflop_left / tflop_per_step))


def _rejection_sampling(folder, base, rl_log):
    """SFT on the base's own right answers. Returns (model, numbers).

    The base draws as many answers as RL did. SFT learns from those that earn RL's full
    reward, until RL's FLOPs are spent.
    """
    run = folder.run

    def earns_full_reward(text, problem):
        return tasks.accuracy(text, problem) and tasks.format_reward(text)

    n_problems = _answers_of_rl(rl_log) // run.data.tries
    documents = collect(folder, "sft", base, n_problems, earns_full_reward)
    log_of_samples = [r for r in read_log(folder.path) if r["kind"] != "sft"]
    steps = _sft_steps(rl_log, log_of_samples, documents, run)
    s = dataclasses.replace(run.dev3, steps=steps)

    def loop(model, state):
        return train(model, s, lambda rng: rng.choice(documents), run.seed, state)

    watch = Watch(folder, "sft", s.dev_every, s.steps)
    model = folder.stage("sft", copy.deepcopy(base), loop, s.steps, watch)
    log = read_log(folder.path)
    collected = next(r for r in log if r["kind"] == "collected")
    return model, {"sft.kept": collected["kept"], "sft.of": collected["of"],
                   "sft.steps": s.steps, "sft.epochs": s.steps * s.documents / len(documents),
                   "sft.tflop": _tflop_of_sft(log),
                   "zero.tflop": flops_by_stage(rl_log)["zero"]}


# ------------------------------------------------------------------------------
# Worked examples in the prompt


def _few_shot_prompt(problem, n, rng, level):
    """Token ids of a prompt that begins with n dialogues. Each dialogue is a problem of
    this level in the same language, with a right solution that checks its steps."""
    ids = []
    for _ in range(n):
        example = tasks.make_problem(rng, level, "train", problem.language)
        thinking, answer = tasks.write_working(example, "checked", rng)
        ids += tasks.encode_prompt(example.question)
        ids += tasks.encode_response(tasks.response(thinking, answer))
    return ids + tasks.encode_prompt(problem.question)


def _few_shot_test(run, n):
    """(problems, prompts) of the test, with n worked examples in each prompt. The examples
    have the lowest level of the problems, so the prompts stay short."""
    problems = tasks.make_problems("test", run.eval.problems, run.zero.levels,
                                   run.corpus.products)
    prompts = []
    for i, problem in enumerate(problems):
        rng = random.Random(f"examples/{i}")
        prompts.append(_few_shot_prompt(problem, n, rng, min(run.zero.levels)))
    return problems, prompts


def _check_examples_fit(run, n=4):
    """UserError if n worked examples leave no room for an answer."""
    longest = max(map(len, _few_shot_test(run, n)[1]))
    if longest >= run.model.max_seq_len:
        raise UserError(f"zero.levels: {n} worked examples and a question have {longest} tokens, "
                        f"and model.max_seq_len is {run.model.max_seq_len}: give a lower level, "
                        "such as 3, beside the others")


def _few_shot_baseline(model, run, n):
    """pass@k and cons@k of a model on the test problems, with n worked examples in each
    prompt."""
    problems, prompts = _few_shot_test(run, n)
    tokens_left = model.config.max_seq_len - max(map(len, prompts))
    limit = min(tokens_left, run.zero.max_new_tokens)
    prompts = repeat_for_answers(prompts, run.eval.samples)
    answers = sample_answers(model, prompts, limit, run.eval.rows, seed=1)
    return selection_scores([tasks.decode(ids) for ids in answers], problems)


# ------------------------------------------------------------------------------
# The study


def measure(folder):
    """The numbers of one seed, by key such as sft.pass@1."""
    run, options = folder.run, folder.options
    _check_examples_fit(run)
    r1_folder = Path(run.start).parent
    base = checkpoint.load(r1_folder / "base.pt", options.device, options.dtype)[0]
    sft, numbers = _rejection_sampling(folder, base, read_log(r1_folder))
    records = {"zero": test_record(r1_folder, "zero")}
    for name, model, n in (("base", base, 0), ("sft", sft, 0), ("examples2", base, 2),
                           ("examples4", base, 4)):
        records[name] = measure_once(
            folder, f"test_{name}", lambda: _few_shot_baseline(model, run, n))
    for name, record in records.items():
        for key in ("pass@1", f"cons@{run.eval.samples}"):
            if key in record:
                numbers[f"{name}.{key}"] = record[key]
    return numbers


NAMES = {"base": "the base", "examples2": "with 2 worked examples in the prompt",
         "examples4": "with 4 worked examples", "sft": "SFT on its own right answers",
         "zero": "RL: zero"}


def page(rows, notes):
    """The lines of the report: a table, and what each way gains over the base."""
    cons = next(key.partition(".")[2] for key in rows if key.startswith("base.cons@"))
    body = [[text, cell(rows, f"{name}.pass@1"), cell(rows, f"{name}.{cons}")]
            for name, text in NAMES.items()]
    def change(low, high):
        return compare(rows, low, high).text(points=True)

    best_examples = max("examples2", "examples4",
                        key=lambda name: rows[f"{name}.pass@1"]["mean"])
    rl_over_sft = compare(rows, "sft.pass@1", "zero.pass@1")
    kept, drawn, steps, epochs, tflop = (
        rows[f"sft.{key}"]["mean"] for key in ("kept", "of", "steps", "epochs", "tflop"))
    return [*table(["", "pass@1", cons], body), "",
            "Differences of pass@1, paired by seed:", "",
            f"- RL less the base: {change('base.pass@1', 'zero.pass@1')}",
            "- SFT on the base's own right answers, with as many FLOPs, less the base: "
            f"{change('base.pass@1', 'sft.pass@1')}",
            f"- examples in the prompt, at best, less the base: "
            f"{change('base.pass@1', f'{best_examples}.pass@1')}",
            f"- the base's majority vote less its pass@1: {change('base.pass@1', f'base.{cons}')}",
            f"- RL less SFT: {rl_over_sft.text(points=True)}. That RL is above SFT "
            f"{rl_over_sft.verdict}.", "",
            f"SFT: {kept:.0f} of {drawn:.0f} answers kept, {steps:.0f} steps, {epochs:.1f} epochs, "
            f"{tflop:.3g} TFLOP; RL took {rows['zero.tflop']['mean']:.3g}. The base has only read "
            "documents of one dialogue each."]
