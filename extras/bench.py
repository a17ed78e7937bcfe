"""bench: how fast this is here, beside what others would use, and beside the machine's limit.

    python r1mini.py bench [--preset P] [--json]      ours
    python r1mini.py bench --against                  and transformers and TRL, in turn with ours
    python r1mini.py bench --against --from CKPT      ... sampling and learning as in its RL

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
graph       decode once more on CUDA, in fixed shapes, each token replayed as one graph

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
import copy
import dataclasses
import importlib.util
import itertools
import json
import logging
import random
import sys
import tempfile
import time
from statistics import median
from types import SimpleNamespace

import torch

import grpo
import moe
import r1mini
import tasks
from extras import export, graphs
from extras.cost import count_parameters, in_products
from extras.folder import machine
from extras.options import load_writer, resolve
from grpo import Rollout, advantages, improve, micro_batches
from moe import UserError

ROUNDS = 11
REAL_ROUNDS = 5  # of a checkpoint's rollouts, which are longer
ROWS, LENGTH, PASS = 200, 36, 4096  # of train; PASS: tokens in one pass, in a step too
PROMPTS, PROMPT, NEW = 512, 12, 64  # of decode
READ, READ_LENGTH = 64, 128         # of prefill
QUESTIONS, GROUP, ANSWER = 24, 16, 42  # of a step
SHAPES = (f"rows x tokens: train {ROWS} x {LENGTH}, prefill {READ} x {READ_LENGTH}, decode "
          f"{PROMPTS} x ({PROMPT} + {NEW}); step {QUESTIONS} questions x {GROUP} x "
          f"({PROMPT} + {ANSWER})")
DTYPES = (torch.float32, torch.bfloat16)


def seconds(work, device):
    """How long a call takes in the first process, its kernels included; told to all."""
    moe.any_of()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return float(moe.total(torch.tensor((time.perf_counter() - began) * moe.leads())))


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


# --------------------------------------------------------------------------------------------------
# Ours


def make(config, device, dtype, weights=None):
    """A model of random weights, or of those given."""
    torch.manual_seed(0)
    model = moe.Transformer(config)
    model.load_state_dict({name: x for name, x in (weights or model.state_dict()).items()
                           if model.mtp is not None or not name.startswith("mtp.")})
    return moe.place(model, device, dtype)


def train_step(model, rows=ROWS, length=LENGTH, limit=PASS):
    """One update on random tokens, cut into micro-batches of `limit` tokens as in training."""
    device = model.head.weight.device
    tokens = torch.randint(model.config.vocab_size, (rows, length), device=device)
    real, weight = torch.ones_like(tokens).bool(), torch.ones_like(tokens).float()
    optimizers = grpo.make_optimizer(model.train(), 1e-3)

    def work():
        for some in filter(None, micro_batches([length] * rows, range(rows), limit)):
            loss, _ = grpo.supervised_loss(model, tokens[some], real[some], weight[some],
                                           rows * (length - 1), rows)
            loss.backward()
        grpo.update(model, optimizers)
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
    problems = [r1mini.ask(rng, run, run.zero.levels) for _ in range(QUESTIONS)]
    return Work([ids for ids in r1mini.prompts_of(problems) for _ in range(GROUP)],
                run.zero.max_new_tokens, tasks.END_ID, weights, run.zero.micro_tokens)


def decode(model, n=PROMPTS, length=PROMPT, new=NEW, write=grpo.generate):
    """Answers of `new` tokens to n prompts; no token ends one."""
    prompts = random_prompts(model.config, n, length)
    return lambda: write(model, prompts, new, -1, 0)


def sampled(model, work):
    """Answers to a Work's prompts; the call returns how many tokens were written."""
    seeds = itertools.count()
    return lambda: int(grpo.generate(model, work.prompts, work.new, work.end_id, tasks.PAD_ID,
                                     seed=next(seeds)).answer.sum())


def grpo_step(model, run, work):
    """{part of a GRPO step on a Work, and whole: a call that does it}."""
    s = dataclasses.replace(run.zero, problems=QUESTIONS, group_size=GROUP,
                            max_new_tokens=work.new, micro_tokens=work.limit)
    reference, rng, seeds = copy.deepcopy(model).eval(), random.Random(0), itertools.count()
    problems = [r1mini.ask(rng, run, s.levels) for _ in range(QUESTIONS)]
    asked = [p for p in problems for _ in range(GROUP)]
    optimizers, found = grpo.make_optimizer(model, 1e-6), {}

    def sample():
        found["samples"] = grpo.generate(model, work.prompts, work.new, work.end_id, tasks.PAD_ID,
                                         seed=next(seeds))

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


# --------------------------------------------------------------------------------------------------
# What others would use


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
    tokens, real = grpo.pad_left(work.prompts, tasks.PAD_ID, model.device)
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


# --------------------------------------------------------------------------------------------------
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
        "prefill": lambda: grpo.generate(model, reading, 1, -1, 0), "decode": decode(model)}
    if graphs.recordable(model):
        works["graph"] = decode(model, write=graphs.generate)
    times = by_round(works, device)
    taken = {name: median(each) for name, each in times.items()}
    found = {"gemm": moe.world()[1] * peak / taken["gemm"],
             "gemm.bfloat16": moe.world()[1] * peak / taken["bfloat16"],
             "train": ROWS * LENGTH / taken["train"],
             "documents": median(n / x for n, x in zip(documents[1:], times["documents"])),
             "prefill": READ * READ_LENGTH / taken["prefill"],
             "decode": PROMPTS * NEW / taken["decode"]}
    if "graph" in taken:
        found["decode.graph"] = PROMPTS * NEW / taken["graph"]
    c, width = run.model, 4 if dtype == torch.float32 else 2
    found["train.peak_share"] = 6 * in_products(c) * found["train"] / 1e9 / found["gemm"]
    parts = by_round(grpo_step(model, run, even_works(run.model)[1]), device)
    parts["reference"] = [a - b for a, b in zip(parts["learn"], parts["train"])]
    found |= {f"step.{part}": median(each) for part, each in parts.items()}
    found["cache.latent"] = width * c.n_layers * (c.kv_lora_rank + c.qk_rope_head_dim)
    found["copy"] = moe.world()[1] * 2 * here.nbytes / 1e9 / taken["copy"]
    weights = 4 * moe.world()[1] * (count_parameters(c)[0] - c.vocab_size * c.dim)
    moved = NEW * (weights + PROMPTS * (PROMPT + NEW / 2) * found["cache.latent"]) / 1e9  # at least
    found["decode.bandwidth_share"] = moved / min(
        taken[way] for way in ("decode", "graph") if way in taken) / found["copy"]
    found["cache.heads"] = width * c.n_layers * c.n_heads * (
        c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    return found


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
    most = torch.get_num_threads() * moe.world()[1]
    return [(dtype, n) for dtype in DTYPES for n in sorted({1, most})]


def compared(name, peer, pairs, tokens=0):
    """Figures of a comparison. pairs, of the best ways and then of the best in float32: our way,
    theirs (each begins with a dtype and threads), our seconds by round, theirs. With the tokens of
    a run, tokens/s instead of seconds."""
    found = {}
    way, other, mine, its = pairs[0]
    for who, (dtype, n, *_), each in (("ours", way, mine), (peer, other, its)):
        found[f"{name}.{who}"] = tokens / median(each) if tokens else median(each)
        count = moe.world()[1] if who == "ours" else 1
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
            found[way] = [x / n for x, n in zip(times, moe.total(last * moe.leads()).tolist())]
        return found
    works = {(*way, "ours"): ours_of(way[0]) for way in our_ways()}
    others = {(*way, "theirs"): at(way[1], theirs_of(way[0])) if moe.leads() else lambda: 1
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


def sampling(config, device, work, rounds=None, trial=6):
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
        if moe.leads():
            other = theirs(config, device, work.weights)
            steps = at(way[1], lambda: their_grpo_steps(
                other, run, work, way[0], rounds, at(own, our_turn)))()
        else:
            for _ in range(rounds + 1):
                our_turn()
        told = moe.total(torch.tensor(steps)).tolist()
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
        return (sampling(plain, device, work, rounds, 2)
                | against_trl(plain, run, device, work, rounds, 2))
    to_sample, to_learn = even_works(plain)
    return (training(plain, device, rounds) | sampling(plain, device, to_sample, rounds)
            | against_trl(plain, run, device, to_learn, rounds))


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


def main(options):
    """The command bench."""
    run, weights = resolve(options.preset, options.set), None
    if options.start:
        if not options.against:
            raise UserError("--from is for bench --against")
        model, _ = load_writer(SimpleNamespace(checkpoint=options.start, device="cpu",
                                               dtype=torch.float32))
        run, weights = dataclasses.replace(run, model=model.config), model.state_dict()
    if options.against and any(importlib.util.find_spec(name) is None
                               for name in ("transformers", "trl", "datasets")):
        raise UserError("--against wants transformers and trl: pip install '.[peers]'")
    for name in ("transformers", "trl", "py.warnings"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with moe.processes(options.device, options.processes, options.itself) as device:
        if moe.leads():
            print("measuring: nano takes a minute on two idle cores, --against nine, with --from "
                  "ten; all is printed at the end", file=sys.stderr)
        found = {"machine": f"{machine()}, {moe.world()[1]} processes of {torch.get_num_threads()} "
                            f"threads, torch {torch.__version__}, "
                            f"{str(options.dtype).removeprefix('torch.')}"}
        if not weights:
            found |= {"shapes": SHAPES} | ours(run, device, options.dtype)
        if options.against:
            found |= against(run, device, weights)
    print(json.dumps(found) if options.json else page(found))
    return 0
