"""How fast is r1mini beside what others would use: transformers and TRL?

The papers give no number for this. The yardsticks are transformers (training and
sampling) and TRL (RL), as their users run them on the same machine.

    python r1mini.py bench --against                     what needs no trained model
    python r1mini.py bench --against --from CKPT         everything
    python r1mini.py bench --against --part documents    one part of it

CKPT is zero.pt of a finished run, such as runs/nano/zero.pt; base.pt has to be beside it.
The parts, of which the first three are real work:

    documents   training on the base's own documents, 80 in a step. Ours packs them into
                rows of 128 tokens, as in the main command. transformers is measured
                twice: on the same packed rows (documents.same_rows), and on documents
                padded as a Trainer pads: sorted by length, in passes of 16 (documents)
    zero        sampling and a GRPO step of Zero's own work, with CKPT's weights: 24 train
                questions, 16 answers to each at temperature 1. Answers end by themselves
    rl          RL to 85% on dev from base.pt: race.py
    shape       work of one shape, which the main command does not do: train, sample.even
                and step.even with random weights, all answers of one length. The sizes
                are those of train, decode and step in tools/bench.py

How it is measured:

- A number is the median of ROUNDS rounds, after one round that is thrown away, and
  counts all processes (--processes) together.
- The two sides take turns (A B A B), so a slow minute of the machine affects both. A
  ratio is the median of the ratios of the rounds; .least and .most are the extremes.
- Documents: both sides train in float32 with AdamW, and without MTP, which transformers
  does not train. The main command uses MTP, and Muon for the matrices. Both get the same
  documents in each round, and start from the same weights. Tokens are those of the
  documents, without padding. Packing, sorting and padding are timed. Drawing
  the documents is not timed. On the same rows the losses agree:
  documents.same_rows.loss_difference. Ours also computes the balance loss, and moves
  the routing bias.
- In the other parts each side runs in the dtype that was fastest in a trial. The ratios
  in float32 stand beside. Theirs runs with the number of threads that was fastest.
- Ours shares a step between processes, and cuts it into passes: of base's and Zero's size
  in real work, of 4,096 tokens in work of one shape. Theirs is one process, as its users
  start it, and takes its batch (TRL a minibatch) in one pass.
- In Zero's work ours lets finished rows go, learns from rows of similar length and reads
  a prompt once for all its answers. Theirs writes until the longest answer ends, pads all
  answers to its length, and TRL reads a prompt once for each answer. Rewards are random
  on both sides. Otherwise there would be dead groups, which ours leaves out.
- Theirs samples by its own generate, not by vLLM.
- TRL computes old log-probabilities in an extra forward pass; ours keeps the sampler's.
"""
import dataclasses
import importlib.util
import itertools
import json
import logging
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch

import moe
import r1mini
import tasks
from engine import checkpoint, devices, sampling
from engine.errors import UserError
from studies.race import (
    check_race,
    rl_to_85,
    their_model,
    trl_settings,
    with_threads,
    word_tokenizer,
)
from tools import bench
from tools.bench import (
    GROUP,
    LENGTH,
    QUESTIONS,
    ROUNDS,
    ROWS,
    SHAPES,
    announce,
    bench_equal_works,
    bench_grpo_step,
    bench_model,
    bench_sampling,
    bench_train_step,
    bench_zero_work,
    describe_bench,
    run_bench,
    seconds,
    seconds_by_round,
)
from tools.cli import load_from_arguments
from tools.settings import resolve_settings
from tools.study import measure_once
from tools.tables import table

PARTS = ("documents", "zero", "rl", "shape")
WITH_CHECKPOINT = ("zero", "rl")  # the parts that need --from
REAL_ROUNDS = 5  # of Zero's work: its rollouts take longer
THEIR_ROWS = 16  # rows of a pass of theirs, in training on documents
DTYPES = (torch.float32, torch.bfloat16)


# ------------------------------------------------------------------------------
# Theirs


def _their_train_step(model, dtype, rows=ROWS, length=LENGTH):
    """A function that makes one update on random tokens, as users of transformers write
    it. bfloat16 is mixed precision."""
    tokens = torch.randint(model.config.vocab_size, (rows, length), device=model.device)
    optimizer = torch.optim.AdamW(model.train().parameters(), 1e-3, fused=True)

    def step():
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def _their_passes(model, documents, row_tokens=0):
    """The passes of a step on documents, as lists of a model's arguments: padded as a
    Trainer pads. With row_tokens, the documents are packed into the rows that ours
    trains on."""
    if row_tokens:
        rows = r1mini.pack(documents, row_tokens)
    else:
        rows = [r1mini.Row(d.tokens, d.weight, [1] * len(d.tokens)) for d in documents]
    rows = sorted(rows, key=lambda row: len(row.tokens))
    passes = []
    for i in range(0, len(rows), THEIR_ROWS):
        tokens, document, weight = r1mini.batch_of(model, rows[i:i + THEIR_ROWS])
        # transformers takes a mask of four dimensions as it is.
        mask = moe.document_mask(document) if row_tokens else (document > 0).long()
        passes.append({"input_ids": tokens, "attention_mask": mask,
                       "labels": tokens.masked_fill(weight == 0, -100),
                       "num_items_in_batch": r1mini.count_targets(documents)})
    return passes


def _their_document_step(model, steps, s, row_tokens=0):
    """A function that makes one update on the documents of the next step, as users of
    transformers write it, and returns their number of tokens. s: of the base."""
    optimizer = torch.optim.AdamW(model.train().parameters(), s.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0, fused=True)
    next_documents = itertools.cycle(steps)

    def step():
        documents = next(next_documents)
        for arguments in _their_passes(model, documents, row_tokens):
            model(**arguments).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return sum(len(document.tokens) for document in documents)
    return step


def _their_sampled(model, dtype, work):
    """A function that answers the prompts of a bench.Work by generate(), with weights
    in dtype. It returns the number of tokens written, up to and with the end of each
    answer."""
    tokens, real = sampling.pad_left(work.prompts, tasks.PAD_ID, model.device)
    model.generation_config.eos_token_id = work.end_id if work.end_id >= 0 else None
    model.generation_config.pad_token_id = tasks.PAD_ID
    model = model.eval().to(dtype)

    def sample():
        sequences = model.generate(
            input_ids=tokens, attention_mask=real.long(), do_sample=True, top_k=0,
            max_new_tokens=work.new, temperature=1.0, top_p=1.0)
        answers = sequences[:, tokens.size(1):]
        is_end = (answers == work.end_id).int()
        ends_before = is_end.cumsum(1) - is_end  # number of end tokens before each token
        return int((ends_before == 0).sum())
    return sample


def _their_grpo_steps(model, run, work, dtype, rounds, between=lambda: None):
    """Seconds of each GRPO step (a rollout and its updates) of TRL's GRPOTrainer on a
    bench.Work, without the first step. bfloat16 is mixed precision.

    between: what to call after each step.
    """
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOTrainer
    s, rng = run.zero, random.Random(0)
    update_seconds, began = [], [0.0]

    class Clock(TrainerCallback):
        """Takes the time of each update. The first update of a rollout includes the
        rollout."""

        def on_step_begin(self, args, state, control, **kwargs):
            """Before an update."""
            began[0] = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            """After an update."""
            update_seconds.append(time.perf_counter() - began[0])
            if len(update_seconds) % s.minibatches == 0:
                between()

    def random_rewards(completions, **_):
        return [rng.random() for _ in completions]

    questions = [" ".join(f"t{i}" for i in ids) for ids in work.prompts[::GROUP]]
    data = Dataset.from_list([{"prompt": text} for text in questions * (rounds + 1)])
    limits = {"min_new_tokens": work.new} if work.end_id < 0 else {}
    with tempfile.TemporaryDirectory() as path:  # TRL reads the model and the reference from here
        model.save_pretrained(path)
        settings = trl_settings(
            s, path, model.device, dtype, len(work.prompts), GROUP, work.new, rounds + 1,
            learning_rate=1e-6, generation_kwargs=limits)
        trainer = GRPOTrainer(path, random_rewards, settings, train_dataset=data,
                              processing_class=word_tokenizer(model.config.vocab_size),
                              callbacks=[Clock()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    step_seconds = []
    for i in range(0, len(update_seconds), s.minibatches):
        step_seconds.append(sum(update_seconds[i:i + s.minibatches]))
    return step_seconds[1:]


# ------------------------------------------------------------------------------
# Setups of each side. A setup is a tuple (dtype, threads per process), and also has the
# side where one dict has the setups of both sides.


def _our_setups():
    """The setups that are tried for ours."""
    return [(dtype, torch.get_num_threads()) for dtype in DTYPES]


def _their_setups():
    """The setups that are tried for theirs, in one process: with one thread, and with as
    many as all our processes have."""
    all_threads = torch.get_num_threads() * devices.rank_and_size()[1]
    return [(dtype, n) for dtype in DTYPES for n in sorted({1, all_threads})]


def _fastest(seconds_of_setup):
    """[the fastest setup, the fastest setup in float32] of {setup: seconds}."""
    in_float32 = [setup for setup in seconds_of_setup if setup[0] == torch.float32]
    return [min(seconds_of_setup, key=seconds_of_setup.get),
            min(in_float32, key=seconds_of_setup.get)]


def _try_setups(works, device, rounds=6):
    """_fastest() of {setup: function}. The functions take turns, and the best round of
    each counts."""
    times = seconds_by_round(works, device, rounds)
    return _fastest({setup: min(seconds_of_rounds) for setup, seconds_of_rounds in times.items()})


# ------------------------------------------------------------------------------
# Comparisons


def _comparison(name, peer, pairs, tokens=0):
    """The numbers of a comparison.

    pairs: two tuples (our setup, their setup, our seconds in each round, theirs), of the
    fastest setups and of the fastest setups in float32. tokens: of one round. If given,
    the numbers are tokens per second and not seconds.
    """
    numbers = {}
    our_setup, their_setup, our_seconds, their_seconds = pairs[0]
    sides = (("ours", our_setup, our_seconds, devices.rank_and_size()[1]),
             (peer, their_setup, their_seconds, 1))
    for side, (dtype, threads, *_), seconds_of_rounds, processes in sides:
        typical = median(seconds_of_rounds)
        numbers[f"{name}.{side}"] = tokens / typical if tokens else typical
        dtype_name = str(dtype).removeprefix("torch.")
        numbers[f"{name}.{side}.setting"] = (
            f"{dtype_name}, processes x threads {processes} x {threads}")
    for prefix, (_, _, our_seconds, their_seconds) in zip(("", "float32."), pairs):
        ratios = [b / a for a, b in zip(our_seconds, their_seconds)]
        key = f"{name}.{prefix}vs_{peer}"
        numbers |= {key: median(ratios), f"{key}.least": min(ratios), f"{key}.most": max(ratios)}
    return numbers


def _compare_with_transformers(name, ours_of, theirs_of, device, rounds, trial=6,
                               dtypes=DTYPES):
    """The numbers of a comparison with transformers.

    ours_of(dtype) and theirs_of(dtype) make functions that do one round and return its
    number of tokens. trial: rounds to find the fastest setups. dtypes: those that are
    tried; float32 is one of them.
    """
    token_counts = {}  # {setup: tokens of each call}

    def counted(setup, work):
        """A function that calls work() and notes its tokens."""
        return lambda: token_counts.setdefault(setup, []).append(work())

    def seconds_per_token(works, rounds):
        """{setup: seconds per token in each round}. All processes use the first one's
        token counts, so that all choose the same setups."""
        result = {}
        for setup, times in seconds_by_round(works, device, rounds).items():
            counts = torch.tensor(token_counts[setup][-len(times):], dtype=torch.float64)
            counts = devices.all_sum(counts * devices.is_main()).tolist()
            result[setup] = [x / n for x, n in zip(times, counts)]
        return result

    def fastest_of(works):
        """_fastest() of {setup: function}, by the best round of each."""
        times = seconds_per_token(works, trial)
        return _fastest({setup: min(of_rounds) for setup, of_rounds in times.items()})

    ours = {(*setup, "ours"): ours_of(setup[0]) for setup in _our_setups() if setup[0] in dtypes}
    theirs = {}
    for setup in _their_setups():
        dtype, threads = setup
        if dtype not in dtypes:
            continue
        if devices.is_main():  # theirs runs in the first process, and the others wait
            work = with_threads(threads, theirs_of(dtype))
        else:
            def work():
                return 1
        theirs[(*setup, "theirs")] = work
    ours = {setup: counted(setup, work) for setup, work in ours.items()}
    theirs = {setup: counted(setup, work) for setup, work in theirs.items()}

    best_pairs = list(zip(fastest_of(ours), fastest_of(theirs)))
    if len(dtypes) == 1:  # then the fastest setup is the fastest in float32 too
        best_pairs = best_pairs[:1]
    works = ours | theirs
    best_works = {setup: works[setup] for pair in best_pairs for setup in pair}
    times = seconds_per_token(best_works, rounds)
    pairs = [(our_setup, their_setup, times[our_setup], times[their_setup])
             for our_setup, their_setup in best_pairs]
    return _comparison(name, "transformers", pairs, tokens=1)


def _base_documents(run, steps):
    """The documents of the first steps of the base, a list for each step."""
    drawn = []
    for step in range(steps):
        rng = random.Random(f"{run.seed}/train/{step}")  # as in r1mini.train
        drawn.append([tasks.make_document(rng, run.corpus) for _ in range(run.base.documents)])
    return drawn


def _our_document_step(model, steps, s):
    """A function that makes one step of r1mini.train on the documents of the next step,
    with AdamW alone, and returns their number of tokens. s: of the base."""
    documents = itertools.chain.from_iterable(itertools.cycle(steps))
    s = dataclasses.replace(s, steps=10 ** 9, muon_lr=0.0)
    records = r1mini.train(model, s, lambda rng: next(documents), 0)

    def step():
        record, _ = next(records)
        return record["tokens"]
    return step


def _losses(ours, theirs, documents, row_tokens):
    """(our loss, theirs) on the same rows of documents, of the next token alone."""
    rows = r1mini.pack(documents, row_tokens)
    targets = r1mini.count_targets(documents)
    with torch.no_grad():
        _, info = moe.supervised_loss(ours, *r1mini.batch_of(ours, rows), targets, len(rows))
        their_loss = sum(float(theirs(**arguments).loss)
                         for arguments in _their_passes(theirs, documents, row_tokens))
    return float(info["loss"]), their_loss


def _compare_documents(config, run, device, rounds=None, trial=6):
    """Tokens per second of training on the base's documents in float32 with AdamW, ours
    and transformers', and ratios. Theirs gets the same rows as ours, or is padded."""
    steps = _base_documents(run, trial + (rounds or ROUNDS) + 2)
    numbers = {}
    for name, row_tokens in (("documents.same_rows", run.base.row_tokens), ("documents", 0)):
        def ours_of(dtype):
            return _our_document_step(bench_model(config, device, dtype), steps, run.base)

        def theirs_of(dtype):
            return _their_document_step(their_model(config, device), steps, run.base, row_tokens)

        numbers |= _compare_with_transformers(name, ours_of, theirs_of, device, rounds, trial,
                                              (torch.float32,))
    if devices.is_main():
        ours, theirs = _losses(bench_model(config, device, torch.float32),
                               their_model(config, device), steps[0], run.base.row_tokens)
        numbers["documents.same_rows.loss_difference"] = abs(ours - theirs)
    return numbers


def _compare_training(config, device, rounds=None):
    """Tokens per second of training, ours and transformers', and ratios."""
    def counted(step):
        def step_and_count():
            step()
            return ROWS * LENGTH
        return step_and_count

    def ours_of(dtype):
        return counted(bench_train_step(bench_model(config, device, dtype)))

    def theirs_of(dtype):
        return counted(_their_train_step(their_model(config, device), dtype))

    return _compare_with_transformers("train", ours_of, theirs_of, device, rounds)


def _compare_sampling(config, device, work, rounds=None, trial=6):
    """Tokens per second of sampling, ours and transformers', and ratios."""
    def ours_of(dtype):
        return bench_sampling(bench_model(config, device, dtype, work.weights), work)

    def theirs_of(dtype):
        return _their_sampled(their_model(config, device, work.weights), dtype, work)

    return _compare_with_transformers(f"sample{work.key_part}", ours_of, theirs_of, device, rounds,
                                      trial)


def _compare_grpo_steps(config, run, device, work, rounds=None, trial=6):
    """Seconds of a GRPO step, ours and TRL's, and ratios. After each step of theirs
    comes one of ours. Each of their setups is tried for two steps, after one that is
    thrown away."""
    rounds, our_threads = rounds or ROUNDS, torch.get_num_threads()

    def take_turns(their_setup, our_works, rounds):
        """(seconds of their steps, {our setup: seconds of our steps}), the first step of
        each left out. Every process gets their seconds."""
        their_seconds, our_seconds = [0.0] * rounds, {setup: [] for setup in our_works}

        def our_turn():
            for setup, our_work in our_works.items():
                our_seconds[setup].append(seconds(our_work, device))

        if devices.is_main():
            dtype, threads, *_ = their_setup
            model = their_model(config, device, work.weights)
            their_seconds = with_threads(threads, lambda: _their_grpo_steps(
                model, run, work, dtype, rounds, with_threads(our_threads, our_turn)))()
        else:
            for _ in range(rounds + 1):
                our_turn()
        their_seconds = devices.all_sum(torch.tensor(their_seconds)).tolist()
        return their_seconds, {setup: times[1:] for setup, times in our_seconds.items()}

    ours = {}
    for setup in _our_setups():
        model = bench_model(config, device, setup[0], work.weights)
        ours[setup] = bench_grpo_step(model, run, work)["whole"]
    our_best = _try_setups(ours, device, trial)
    trial_seconds = {setup: min(take_turns(setup, {}, 2)[0]) for setup in _their_setups()}
    their_best = _fastest(trial_seconds)
    best_works = {setup: ours[setup] for setup in our_best}
    times = {}  # {their setup: what take_turns returns}; the two fastest setups may be one
    for their_setup in dict.fromkeys(their_best):
        times[their_setup] = take_turns(their_setup, best_works, rounds)
    pairs = []
    for our_setup, their_setup in zip(our_best, their_best):
        their_seconds, our_seconds = times[their_setup]
        pairs.append((our_setup, their_setup, our_seconds[our_setup], their_seconds))
    return _comparison(f"step{work.key_part}", "trl", pairs)


def against(run, device, parts, weights=None, base=None, rounds=None):
    """{key: number or text} of some of PARTS.

    weights: of a checkpoint, for zero. base: a model, for rl.
    """
    config, numbers = dataclasses.replace(run.model, n_mtp_layers=0), {}
    if "documents" in parts:
        numbers |= _compare_documents(config, run, device, rounds)
    if "zero" in parts:
        work, zero_rounds = bench_zero_work(run, weights), rounds or REAL_ROUNDS
        numbers |= _compare_sampling(config, device, work, zero_rounds, 2)
        numbers |= _compare_grpo_steps(config, run, device, work, zero_rounds, 2)
    if "rl" in parts:
        numbers |= rl_to_85(base, run, device)
    if "shape" in parts:
        to_sample, to_learn = bench_equal_works(config)
        numbers |= _compare_training(config, device, rounds)
        numbers |= _compare_sampling(config, device, to_sample, rounds)
        numbers |= _compare_grpo_steps(config, run, device, to_learn, rounds)
    return numbers


# ------------------------------------------------------------------------------
# What is printed

# {title of a table: {key: what is compared}}
COMPARED = {
    "Real work": {
        "documents.same_rows": "training, the same rows",
        "documents": "training, padded as a Trainer pads",
        "sample": "sampling, Zero's work",
        "step": "a GRPO step, Zero's work",
        "rl_to_85": "RL to 85% on dev"},
    "Work of one shape, which the main command does not do": {
        "train": "training, rows of random tokens",
        "sample.even": "sampling, answers of one length",
        "step.even": "a GRPO step, answers of one length"}}


def comparison_tables(numbers):
    """The lines of the two tables, real work first, from {key: number or text}. Work that
    was not measured is left out."""
    head = ["", "ours", "theirs", "times as fast", "least", "most", "both in float32"]
    lines = []
    for title, work_of_key in COMPARED.items():
        body = []
        for key, work in work_of_key.items():
            peer = next((p for p in ("transformers", "trl") if f"{key}.{p}.setting" in numbers),
                        None)
            if peer is None:
                continue
            cells = [_amount(numbers, key, side) for side in ("ours", peer)]
            ratio = f"{key}.vs_{peer}"
            for name in (ratio, f"{ratio}.least", f"{ratio}.most", f"{key}.float32.vs_{peer}"):
                cells.append(f"{numbers[name]:.2f}" if name in numbers else "")
            if f"{ratio}.at_least" in numbers:
                cells[2] = f"at least {numbers[f'{ratio}.at_least']:.2f}"
            body.append([f"{work} ({'TRL' if peer == 'trl' else peer})", *cells])
        if body:
            lines += [title, "", *table(head, body), ""]
    return lines


def _amount(numbers, key, side):
    """A side's number with its unit, or why there is none."""
    value = numbers.get(f"{key}.{side}")
    if value is None:
        return numbers.get(f"{key}.{side}.result", "")
    return f"{value:.2f} s" if key.startswith(("step", "rl_to_85")) else f"{value:,.0f} tokens/s"


def _console_text(numbers):
    """What is printed: the two tables, then all numbers and settings."""
    return "\n".join([*comparison_tables(numbers), bench.console_text(numbers)])


# ------------------------------------------------------------------------------
# The study and the command

SEEDS, SETTINGS, NEEDS, STAGES = (0,), (), ("base.pt", "zero.pt"), ()


def measure(folder):
    """The numbers of bench --against with a run's Zero. Each part runs in a process of
    its own, so a stopped study goes on with the next part."""
    zero, numbers = str(Path(folder.run.start).parent / "zero.pt"), {}
    for part in PARTS:
        words = ["--against", "--part", part]
        if part in WITH_CHECKPOINT:
            words += ["--from", zero]
        numbers |= measure_once(folder, f"against {part}", lambda: run_bench(folder, *words))
    return {key: x for key, x in numbers.items() if key != "machine"}


def page(rows, notes):
    """The lines of the report: the comparisons, and one table of all numbers."""
    numbers = {key: row["mean"] for key, row in rows.items()}
    texts = {key: next(iter(text_of_seed.values())) for key, text_of_seed in notes.items()}
    return [*comparison_tables(numbers | texts),
            *table(["key", "value"], [[key, f"{x:.4g}"] for key, x in numbers.items()])]


def _read_start(run, start, parts):
    """(run with the checkpoint's sizes, its weights, the path of the base) of --from.
    UserError if what the parts need is not there."""
    options = SimpleNamespace(checkpoint=start, device="cpu", dtype=torch.float32)
    model, _ = load_from_arguments(options)
    base_path = Path(start).with_name("base.pt")
    if "rl" in parts and not base_path.exists():
        raise UserError(f"--against: RL starts from {base_path}, which is not there; with --part "
                        "zero the other work of Zero is compared alone")
    return dataclasses.replace(run, model=model.config), model.state_dict(), base_path


def main(options):
    """The command bench --against."""
    run, weights, base_path = resolve_settings(options.preset, options.set), None, None
    parts = options.part or [part for part in PARTS if options.start
                             or part not in WITH_CHECKPOINT]
    needing = [part for part in parts if part in WITH_CHECKPOINT]
    if needing and not options.start:
        raise UserError(f"--part {needing[0]} needs a trained model: --from runs/nano/zero.pt")
    if QUESTIONS * GROUP % run.zero.minibatches:  # TRL wants minibatches of equal size
        raise UserError(f"--against: zero.minibatches must divide {QUESTIONS * GROUP}, the number "
                        "of answers in a step")
    if "rl" in parts:
        check_race(run)
    if options.start:
        run, weights, base_path = _read_start(run, options.start, parts)
    if any(importlib.util.find_spec(name) is None for name in ("transformers", "trl", "datasets")):
        raise UserError("--against needs transformers and trl: pip install '.[peers]'")
    for name in ("transformers", "trl", "py.warnings"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with devices.processes(options.device, options.processes, options.itself) as device:
        announce(f"{', '.join(parts)} (nano takes ten minutes on two idle cores, and with --from "
                 "35)")
        if not options.part and not options.start and devices.is_main():
            print("Sampling, GRPO steps and RL of Zero's own work need a trained model: add --from "
                  "runs/nano/zero.pt", file=sys.stderr)
        base = checkpoint.load(base_path, device)[0] if "rl" in parts else None
        numbers = {"machine": describe_bench(options)}
        numbers |= against(run, device, parts, weights, base)
        if "shape" in parts:
            numbers |= {"shapes": SHAPES} | bench.measure_ours(run, device, options.dtype)
    print(json.dumps(numbers) if options.json else _console_text(numbers))
    return 0
