"""How fast is r1mini beside what others would use: transformers and TRL?

The papers give no number for this. The yardsticks are transformers (training and
sampling) and TRL (a GRPO step), as their users run them on the same machine.

    python r1mini.py bench --against                 training, sampling and a GRPO step
    python r1mini.py bench --against --from CKPT     sampling and a step as in its RL

--against measures train, sample.even and step.even with random weights. The sizes are
those of train, decode and step in tools/bench.py, and all answers have the same length.

--from CKPT measures sample and step with the weights of a checkpoint: 24 train
questions, 16 answers to each at temperature 1, at most as long as Zero's. Answers end
by themselves, so their lengths differ, and what a program does about that counts. Ours
lets finished rows go, learns from rows of similar length in passes of Zero's size, and
reads a prompt once for all its answers. Theirs writes until the longest answer ends,
pads all answers to its length, and TRL reads a prompt once for each answer. Rewards are
random on both sides. Otherwise there would be dead groups, which ours leaves out.

How it is measured:

- A number is the median of ROUNDS rounds, after one round that is thrown away, and
  counts all processes (--processes) together.
- The two sides take turns (A B A B), so a slow minute of the machine affects both. A
  ratio is the median of the ratios of the rounds; .least and .most are the extremes.
- Each side runs in the dtype that was fastest in a trial, and theirs with the number of
  threads that was. The ratios in float32 stand beside.
- Ours shares a step between processes, in passes of 4,096 tokens. Theirs is one
  process, as its users start it, and takes its batch (TRL a minibatch) in one pass.
  Smaller passes were not tried.
- Theirs samples by its own generate, not by vLLM.
- TRL computes old log-probabilities in an extra forward pass; ours keeps the sampler's.
- transformers' DeepseekV3 has no multi-token prediction in training, so ours has none
  either.
"""
import dataclasses
import importlib.util
import json
import logging
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch

import tasks
from engine import devices, sampling
from engine.errors import UserError
from tools import bench, export
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

REAL_ROUNDS = 5  # with a checkpoint: its rollouts take longer
DTYPES = (torch.float32, torch.bfloat16)


# ------------------------------------------------------------------------------
# Theirs


def _their_model(config, device, weights=None):
    """transformers' DeepseekV3ForCausalLM with the sizes and weights of bench_model()."""
    from transformers import DeepseekV3ForCausalLM
    with tempfile.TemporaryDirectory() as path:
        export.write_hf_folder(f"{path}/model", bench_model(config, "cpu", torch.float32, weights))
        return DeepseekV3ForCausalLM.from_pretrained(f"{path}/model").to(device)


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


def _word_tokenizer(vocab_size):
    """A tokenizer of transformers for texts such as "t17 t4", in which each word names
    a token id. So TRL trains on our token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocabulary = {f"t{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", pad_token=f"t{tasks.PAD_ID}",
        eos_token=f"t{tasks.END_ID}")


def _their_grpo_steps(model, run, work, dtype, rounds, between=lambda: None):
    """Seconds of each GRPO step (a rollout and its updates) of TRL's GRPOTrainer on a
    bench.Work, without the first step. bfloat16 is mixed precision.

    between: what to call after each step.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
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
        settings = GRPOConfig(
            output_dir=path, per_device_train_batch_size=len(work.prompts) // s.minibatches,
            steps_per_generation=s.minibatches, num_generations=GROUP, beta=s.beta,
            max_completion_length=work.new, epsilon=s.clip_low, learning_rate=1e-6,
            bf16=dtype == torch.bfloat16, max_steps=s.minibatches * (rounds + 1),
            save_strategy="no", report_to="none", logging_strategy="no", disable_tqdm=True,
            use_cpu=model.device.type == "cpu", generation_kwargs=limits,
            shuffle_dataset=False, loss_type="grpo",
            gradient_checkpointing=False)  # ours recomputes nothing either
        trainer = GRPOTrainer(path, random_rewards, settings, train_dataset=data,
                              processing_class=_word_tokenizer(model.config.vocab_size),
                              callbacks=[Clock()])
        trainer.train()
    step_seconds = []
    for i in range(0, len(update_seconds), s.minibatches):
        step_seconds.append(sum(update_seconds[i:i + s.minibatches]))
    return step_seconds[1:]


# ------------------------------------------------------------------------------
# Ways to run each side. A way is a tuple that begins with (dtype, threads per process).


def _with_threads(threads, work):
    """A function that calls work() with a number of threads."""
    def call():
        threads_before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return work()
        finally:
            torch.set_num_threads(threads_before)
    return call


def _our_ways():
    """The ways that are tried for ours."""
    return [(dtype, torch.get_num_threads()) for dtype in DTYPES]


def _their_ways():
    """The ways that are tried for theirs, in one process: with one thread, and with as
    many as all our processes have."""
    all_threads = torch.get_num_threads() * devices.rank_and_size()[1]
    return [(dtype, n) for dtype in DTYPES for n in sorted({1, all_threads})]


def _fastest(seconds_of_way):
    """[the fastest way, the fastest way in float32] of {way: seconds}."""
    in_float32 = [way for way in seconds_of_way if way[0] == torch.float32]
    return [min(seconds_of_way, key=seconds_of_way.get),
            min(in_float32, key=seconds_of_way.get)]


def _try_ways(works, device, rounds=6):
    """_fastest() of {way: function}. The functions take turns, and the best round of each
    counts."""
    times = seconds_by_round(works, device, rounds)
    return _fastest({way: min(seconds_of_rounds) for way, seconds_of_rounds in times.items()})


# ------------------------------------------------------------------------------
# Comparisons


def _comparison(name, peer, pairs, tokens=0):
    """The numbers of a comparison.

    pairs: two tuples (our way, their way, our seconds in each round, theirs), of the
    fastest ways and of the fastest ways in float32. tokens: of one round; if given, the
    numbers are tokens per second and not seconds.
    """
    numbers = {}
    our_way, their_way, our_seconds, their_seconds = pairs[0]
    sides = (("ours", our_way, our_seconds, devices.rank_and_size()[1]),
             (peer, their_way, their_seconds, 1))
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


def _compare_with_transformers(name, ours_of, theirs_of, device, rounds, trial=6):
    """The numbers of a comparison with transformers.

    ours_of(dtype) and theirs_of(dtype) make functions that do one round and return its
    number of tokens. trial: rounds to find the fastest ways.
    """
    token_counts = {}  # {way: tokens of each call}

    def counted(way, work):
        """A function that calls work() and notes its tokens."""
        return lambda: token_counts.setdefault(way, []).append(work())

    def seconds_per_token(works, rounds):
        """{way: seconds per token in each round}. All processes use the first one's
        token counts, so that all choose the same ways."""
        result = {}
        for way, times in seconds_by_round(works, device, rounds).items():
            counts = torch.tensor(token_counts[way][-len(times):], dtype=torch.float64)
            counts = devices.all_sum(counts * devices.is_main()).tolist()
            result[way] = [x / n for x, n in zip(times, counts)]
        return result

    def fastest_of(works):
        """_fastest() of {way: function}, by the best round of each."""
        times = seconds_per_token(works, trial)
        return _fastest({way: min(of_rounds) for way, of_rounds in times.items()})

    ours = {(*way, "ours"): ours_of(way[0]) for way in _our_ways()}
    theirs = {}
    for way in _their_ways():
        dtype, threads = way
        if devices.is_main():  # theirs runs in the first process, and the others wait
            work = _with_threads(threads, theirs_of(dtype))
        else:
            def work():
                return 1
        theirs[(*way, "theirs")] = work
    ours = {way: counted(way, work) for way, work in ours.items()}
    theirs = {way: counted(way, work) for way, work in theirs.items()}

    best_pairs = list(zip(fastest_of(ours), fastest_of(theirs)))
    works = ours | theirs
    times = seconds_per_token({way: works[way] for pair in best_pairs for way in pair}, rounds)
    pairs = [(our_way, their_way, times[our_way], times[their_way])
             for our_way, their_way in best_pairs]
    return _comparison(name, "transformers", pairs, tokens=1)


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
        return counted(_their_train_step(_their_model(config, device), dtype))

    return _compare_with_transformers("train", ours_of, theirs_of, device, rounds)


def _compare_sampling(config, device, work, rounds=None, trial=6):
    """Tokens per second of sampling, ours and transformers', and ratios."""
    def ours_of(dtype):
        return bench_sampling(bench_model(config, device, dtype, work.weights), work)

    def theirs_of(dtype):
        return _their_sampled(_their_model(config, device, work.weights), dtype, work)

    return _compare_with_transformers(f"sample{work.key_part}", ours_of, theirs_of, device, rounds,
                                      trial)


def _compare_grpo_steps(config, run, device, work, rounds=None, trial=6):
    """Seconds of a GRPO step, ours and TRL's, and ratios. After each step of theirs
    comes one of ours. Each of their ways is tried for two steps, after one that is
    thrown away."""
    rounds, our_threads = rounds or ROUNDS, torch.get_num_threads()

    def take_turns(their_way, our_works, rounds):
        """(seconds of their steps, {our way: seconds of our steps}), the first step of
        each left out. Every process gets their seconds."""
        their_seconds, our_seconds = [0.0] * rounds, {way: [] for way in our_works}

        def our_turn():
            for way, our_work in our_works.items():
                our_seconds[way].append(seconds(our_work, device))

        if devices.is_main():
            dtype, threads, *_ = their_way
            model = _their_model(config, device, work.weights)
            their_seconds = _with_threads(threads, lambda: _their_grpo_steps(
                model, run, work, dtype, rounds, _with_threads(our_threads, our_turn)))()
        else:
            for _ in range(rounds + 1):
                our_turn()
        their_seconds = devices.all_sum(torch.tensor(their_seconds)).tolist()
        return their_seconds, {way: times[1:] for way, times in our_seconds.items()}

    ours = {}
    for way in _our_ways():
        model = bench_model(config, device, way[0], work.weights)
        ours[way] = bench_grpo_step(model, run, work)["whole"]
    our_best = _try_ways(ours, device, trial)
    trial_seconds = {way: min(take_turns(way, {}, 2)[0]) for way in _their_ways()}
    their_best = _fastest(trial_seconds)
    best_works = {way: ours[way] for way in our_best}
    times = {}  # {their way: what take_turns returns}; the two fastest ways may be one
    for their_way in dict.fromkeys(their_best):
        times[their_way] = take_turns(their_way, best_works, rounds)
    pairs = []
    for our_way, their_way in zip(our_best, their_best):
        their_seconds, our_seconds = times[their_way]
        pairs.append((our_way, their_way, our_seconds[our_way], their_seconds))
    return _comparison(f"step{work.key_part}", "trl", pairs)


def against(run, device, weights=None, rounds=None):
    """All comparisons, each side at its best: rates, seconds and ratios.

    With the weights of a checkpoint: sampling and a GRPO step, by its rollouts. Without:
    training, sampling and a GRPO step, with answers of one length.
    """
    config = dataclasses.replace(run.model, n_mtp_layers=0)
    if weights:
        work, rounds = bench_zero_work(run, weights), rounds or REAL_ROUNDS
        return (_compare_sampling(config, device, work, rounds, 2)
                | _compare_grpo_steps(config, run, device, work, rounds, 2))
    to_sample, to_learn = bench_equal_works(config)
    return (_compare_training(config, device, rounds)
            | _compare_sampling(config, device, to_sample, rounds)
            | _compare_grpo_steps(config, run, device, to_learn, rounds))


# ------------------------------------------------------------------------------
# The study and the command

SEEDS, SETTINGS, NEEDS, STAGES = (0,), (), ("zero.pt",), ()


def measure(folder):
    """The numbers of bench --against, with random weights and with those of a run's
    Zero. Each command runs in a process of its own."""
    zero = str(Path(folder.run.start).parent / "zero.pt")
    numbers = measure_once(folder, "bench --against", lambda: run_bench(folder, "--against"))
    numbers |= measure_once(
        folder, "rollouts", lambda: run_bench(folder, "--against", "--from", zero))
    return {key: x for key, x in numbers.items() if key != "machine"}


def page(rows, notes):
    """The lines of the report: one table of all numbers."""
    return table(["key", "value"], [[key, f"{row['mean']:.4g}"] for key, row in rows.items()])


def main(options):
    """The command bench --against."""
    run, weights = resolve_settings(options.preset, options.set), None
    if QUESTIONS * GROUP % run.zero.minibatches:  # TRL wants minibatches of equal size
        raise UserError(f"--against: zero.minibatches must divide {QUESTIONS * GROUP}, the number "
                        "of answers in a step")
    if options.start:
        start = SimpleNamespace(checkpoint=options.start, device="cpu", dtype=torch.float32)
        model, _ = load_from_arguments(start)
        run, weights = dataclasses.replace(run, model=model.config), model.state_dict()
    if any(importlib.util.find_spec(name) is None for name in ("transformers", "trl", "datasets")):
        raise UserError("--against needs transformers and trl: pip install '.[peers]'")
    for name in ("transformers", "trl", "py.warnings"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with devices.processes(options.device, options.processes, options.itself) as device:
        announce("nano takes nine minutes on two idle cores, with --from ten")
        numbers = {"machine": describe_bench(options)}
        if not weights:
            numbers |= {"shapes": SHAPES} | bench.measure_ours(run, device, options.dtype)
        numbers |= against(run, device, weights)
    print(json.dumps(numbers) if options.json else bench.console_text(numbers))
    return 0
