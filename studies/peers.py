"""How fast is this beside what others would use: transformers and TRL?

    python r1mini.py bench --against                  training, sampling and a GRPO step, in turn
    python r1mini.py bench --against --from CKPT      ... sampling and learning as in its RL

--against: train, sample.even and step.even, of random weights, as train, decode and step above.
With --from CKPT instead sample and step, by its weights: 24 train questions, 16 answers to each at
temperature 1, at most as long as Zero's, that end by themselves. So some are long, and what is done
about that counts: ours lets ended rows go, learns from rows of like length, in passes of Zero's
size, and reads a prompt once; theirs writes until the longest answer ends, and pads all to it.
Rewards are random on both sides, or ours would leave dead groups out.

Figures are medians of ROUNDS runs, after one that is thrown away, and of all processes together
(--processes). What is compared runs in turn, A B A B, so that a slow minute of the machine meets
both; a ratio is the median of the rounds' ratios, .least and .most are its extremes.

Each side runs in the dtype, theirs also on the number of threads, that was fastest when tried
first; float32's own ratios stand beside. Ours shares a step between processes, in passes of 4,096
tokens. Theirs is one process, as their users start it, and takes its batch (TRL a minibatch) in
one pass (smaller ones were not tried), with its own generate (not vLLM). TRL computes old
log-probabilities in one forward pass more, where ours keeps the sampler's, and reads a prompt for
each of its answers, ours once. transformers' DeepseekV3 has no multi-token prediction in training:
beside it, neither has ours.
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
    ROUNDS,
    ROWS,
    SHAPES,
    announce,
    benched,
    by_round,
    even_works,
    grpo_step,
    make,
    real_work,
    sampled,
    seconds,
    setting,
    train_step,
)
from tools.cli import load_writer
from tools.settings import resolve
from tools.study import once
from tools.tables import table

REAL_ROUNDS = 5  # of a checkpoint's rollouts, which are longer
DTYPES = (torch.float32, torch.bfloat16)


def theirs(config, device, weights=None):
    """transformers' DeepseekV3ForCausalLM of the same sizes and the weights make() has."""
    from transformers import DeepseekV3ForCausalLM
    with tempfile.TemporaryDirectory() as path:
        export.write(f"{path}/model", make(config, "cpu", torch.float32, weights))
        return DeepseekV3ForCausalLM.from_pretrained(f"{path}/model").to(device)


def their_train_step(model, dtype, rows=ROWS, length=LENGTH):
    """One update on random tokens, as their users write it; bfloat16 is mixed precision."""
    tokens = torch.randint(model.config.vocab_size, (rows, length), device=model.device)
    optimizer = torch.optim.AdamW(model.train().parameters(), 1e-3, fused=True)

    def work():
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return work


def their_sampled(model, dtype, work):
    """generate(): answers to a Work's prompts, by weights in dtype; the call returns how many
    tokens were written, up to each answer's end."""
    tokens, real = sampling.pad_left(work.prompts, tasks.PAD_ID, model.device)
    model.generation_config.eos_token_id = work.end_id if work.end_id >= 0 else None
    model.generation_config.pad_token_id = tasks.PAD_ID
    model = model.eval().to(dtype)

    def write():
        out = model.generate(input_ids=tokens, attention_mask=real.long(), do_sample=True, top_k=0,
                             max_new_tokens=work.new, temperature=1.0, top_p=1.0)
        answers = out[:, tokens.size(1):]
        ended = (answers == work.end_id).cumsum(1) - (answers == work.end_id).int()
        return int((ended == 0).sum())
    return write


def their_grpo_steps(model, run, work, dtype, rounds, between=lambda: None):
    """Seconds of each GRPO step (a rollout and its updates) of TRL's GRPOTrainer on a Work, the
    first left out; bfloat16 is mixed precision. After each step `between` is called."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    words = {f"t{i}": i for i in range(model.config.vocab_size)}
    inner = Tokenizer(models.WordLevel(words, unk_token="t0"))  # a word a token, such as t17
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, padding_side="left", pad_token=f"t{tasks.PAD_ID}",
        eos_token=f"t{tasks.END_ID}")
    taken, began = [], [0.0]

    class Clock(TrainerCallback):
        """Takes the time of each of the trainer's steps: an update, the first with a rollout."""

        def on_step_begin(self, args, state, control, **kwargs):
            """Before a rollout or an update."""
            began[0] = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            """After an update; after a rollout's last one, it is the others' turn."""
            taken.append(time.perf_counter() - began[0])
            if len(taken) % run.zero.minibatches == 0:
                between()
    questions = [" ".join(f"t{i}" for i in ids) for ids in work.prompts[::GROUP]]
    data = Dataset.from_list([{"prompt": text} for text in questions * (rounds + 1)])
    s, answers, rng = run.zero, len(work.prompts), random.Random(0)
    limits = {"min_new_tokens": work.new} if work.end_id < 0 else {}
    with tempfile.TemporaryDirectory() as path:  # where it reads model and reference from
        model.save_pretrained(path)
        settings = GRPOConfig(
            output_dir=path, per_device_train_batch_size=answers // s.minibatches,
            steps_per_generation=s.minibatches, num_generations=GROUP, beta=s.beta,
            max_completion_length=work.new, epsilon=s.clip_low, learning_rate=1e-6,
            bf16=dtype == torch.bfloat16, max_steps=s.minibatches * (rounds + 1),
            save_strategy="no", report_to="none", logging_strategy="no", disable_tqdm=True,
            use_cpu=model.device.type == "cpu", generation_kwargs=limits,
            shuffle_dataset=False, loss_type="grpo",
            gradient_checkpointing=False)  # ours recomputes nothing
        GRPOTrainer(path, lambda completions, **_: [rng.random() for _ in completions],
                    settings, train_dataset=data, processing_class=tokenizer,
                    callbacks=[Clock()]).train()
    steps = [sum(taken[i:i + s.minibatches]) for i in range(0, len(taken), s.minibatches)]
    return steps[1:]


# -------------------------------------------------------------------------------------------------
# In turn


def at(threads, work):
    """The call, made with a number of threads."""
    def timed():
        own = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return work()
        finally:
            torch.set_num_threads(own)
    return timed


def best_of(taken):
    """Of {(dtype, threads): seconds} the fastest way, and the fastest in float32."""
    return [min(some, key=taken.get) for some in (
        taken, [way for way in taken if way[0] == torch.float32])]


def tried(works, device, rounds=6):
    """best_of calls by (dtype, threads), each by its fastest of some rounds in turn."""
    return best_of({way: min(each) for way, each in by_round(works, device, rounds).items()})


def our_ways():
    """The ways to run ours that are tried: (dtype, threads of a process)."""
    return [(dtype, torch.get_num_threads()) for dtype in DTYPES]


def their_ways():
    """Theirs, in one process: on one thread, and on as many as all our processes have."""
    most = torch.get_num_threads() * devices.rank_and_size()[1]
    return [(dtype, n) for dtype in DTYPES for n in sorted({1, most})]


def compared(name, peer, pairs, tokens=0):
    """Figures of a comparison. pairs, of the best ways and then of the best in float32: our way,
    theirs (each begins with a dtype and threads), our seconds by round, theirs. With the tokens of
    a run, tokens/s instead of seconds."""
    found = {}
    way, other, mine, its = pairs[0]
    for who, (dtype, n, *_), each in (("ours", way, mine), (peer, other, its)):
        found[f"{name}.{who}"] = tokens / median(each) if tokens else median(each)
        count = devices.rank_and_size()[1] if who == "ours" else 1
        found[f"{name}.{who}.setting"] = (
            f"{str(dtype).removeprefix('torch.')}, processes x threads {count} x {n}")
    for which, (_, _, mine, its) in zip(("", "float32."), pairs):
        each = [b / a for a, b in zip(mine, its)]
        found |= {f"{name}.{which}vs_{peer}{end}": of(each)
                  for end, of in (("", median), (".least", min), (".most", max))}
    return found


def in_turn_with_transformers(name, ours_of, theirs_of, device, rounds, trial=6):
    """Figures of a comparison by calls that return how many tokens they were for: ours_of(dtype)
    and theirs_of(dtype), each at its best."""
    counts = {}

    def counted(way, work):
        """The call, its tokens noted."""
        return lambda: counts.setdefault(way, []).append(work())

    def by_token(works, rounds):
        """{way: seconds a token in each round}, by the first process' tokens: all choose alike."""
        found = {}
        for way, times in by_round(works, device, rounds).items():
            last = torch.tensor(counts[way][-len(times):], dtype=torch.float64)
            told = devices.all_sum(last * devices.is_main()).tolist()
            found[way] = [x / n for x, n in zip(times, told)]
        return found
    works = {(*way, "ours"): ours_of(way[0]) for way in our_ways()}
    others = {(*way, "theirs"): at(way[1], theirs_of(way[0])) if devices.is_main() else lambda: 1
              for way in their_ways()}  # theirs runs in the first process; the others wait
    works, others = ({way: counted(way, work) for way, work in some.items()}
                     for some in (works, others))
    best = list(zip(*(best_of({way: min(each) for way, each in by_token(some, trial).items()})
                      for some in (works, others))))
    works |= others
    each = by_token({way: works[way] for pair in best for way in pair}, rounds)
    return compared(name, "transformers", [(*pair, *(each[way] for way in pair)) for pair in best],
                    tokens=1)


def training(config, device, rounds=None):
    """Tokens a second of training, ours and transformers', and ratios."""
    def counted(step):
        return lambda: step() or ROWS * LENGTH
    return in_turn_with_transformers(
        "train", lambda dtype: counted(train_step(make(config, device, dtype))),
        lambda dtype: counted(their_train_step(theirs(config, device), dtype)), device, rounds)


def writing(config, device, work, rounds=None, trial=6):
    """Tokens a second of sampling, ours and transformers', and ratios."""
    return in_turn_with_transformers(
        f"sample{work.even}",
        lambda dtype: sampled(make(config, device, dtype, work.weights), work),
        lambda dtype: their_sampled(theirs(config, device, work.weights), dtype, work),
        device, rounds, trial)


def against_trl(config, run, device, work, rounds=None, trial=6):
    """Seconds of a GRPO step and ratios: after each step of theirs one of ours. Each way of theirs
    is tried first: two steps, after one that is thrown away."""
    own, rounds = torch.get_num_threads(), rounds or ROUNDS

    def beside(way, works, rounds):
        """Seconds of steps of theirs, told to all processes; and of ours, each in turn with it."""
        steps, ours = [0.0] * rounds, {name: [] for name in works}

        def our_turn():
            for name, work in works.items():
                ours[name].append(seconds(work, device))
        if devices.is_main():
            other = theirs(config, device, work.weights)
            steps = at(way[1], lambda: their_grpo_steps(
                other, run, work, way[0], rounds, at(own, our_turn)))()
        else:
            for _ in range(rounds + 1):
                our_turn()
        told = devices.all_sum(torch.tensor(steps)).tolist()
        return told, {name: each[1:] for name, each in ours.items()}
    works = {way: grpo_step(make(config, device, way[0], work.weights), run, work)["whole"]
             for way in our_ways()}
    best = list(zip(tried(works, device, trial), best_of({
        way: min(beside(way, {}, 2)[0]) for way in their_ways()})))
    works = {mine: works[mine] for mine, _ in best}
    taken = {other: beside(other, works, rounds) for other in dict.fromkeys(b for _, b in best)}
    return compared(f"step{work.even}", "trl", [
        (mine, other, taken[other][1][mine], taken[other][0]) for mine, other in best])


def against(run, device, weights=None, rounds=None):
    """Ours and theirs in turn, each at its best; rates, seconds and ratios. With the weights of a
    checkpoint, of a rollout and a step by it; else also of training, and all of one length."""
    plain = dataclasses.replace(run.model, n_mtp_layers=0)
    if weights:
        work, rounds = real_work(run, weights), rounds or REAL_ROUNDS
        return (writing(plain, device, work, rounds, 2)
                | against_trl(plain, run, device, work, rounds, 2))
    to_sample, to_learn = even_works(plain)
    return (training(plain, device, rounds) | writing(plain, device, to_sample, rounds)
            | against_trl(plain, run, device, to_learn, rounds))


SEEDS, SETTINGS, NEEDS, STAGES = (0,), (), ("zero.pt",), ()


def measure(folder):
    """The figures of bench --against, and of its rollouts by a run's Zero, each in a process of
    its own."""
    zero = str(Path(folder.run.start).parent / "zero.pt")
    found = (once(folder, "bench --against", lambda: benched(folder, "--against"))
             | once(folder, "rollouts", lambda: benched(folder, "--against", "--from", zero)))
    return {key: x for key, x in found.items() if key != "machine"}


def page(rows, notes):
    """One table of all figures."""
    return table(["figure", "value"], [[key, f"{row['mean']:.4g}"] for key, row in rows.items()])


def main(options):
    """The command bench --against."""
    run, weights = resolve(options.preset, options.set), None
    if options.start:
        model, _ = load_writer(SimpleNamespace(checkpoint=options.start, device="cpu",
                                               dtype=torch.float32))
        run, weights = dataclasses.replace(run, model=model.config), model.state_dict()
    if any(importlib.util.find_spec(name) is None for name in ("transformers", "trl", "datasets")):
        raise UserError("--against wants transformers and trl: pip install '.[peers]'")
    for name in ("transformers", "trl", "py.warnings"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with devices.processes(options.device, options.processes, options.itself) as device:
        announce("nano takes nine minutes on two idle cores, with --from ten")
        found = {"machine": setting(options)}
        if not weights:
            found |= {"shapes": SHAPES} | bench.ours(run, device, options.dtype)
        found |= against(run, device, weights)
    print(json.dumps(found) if options.json else bench.page(found))
    return 0
