"""bench: how fast this is here, beside what others would use, and beside the machine's limit.

    python r1mini.py bench [--preset P] [--json]      ours
    python r1mini.py bench --against                  and transformers and TRL, in turn with ours

train       tokens/s of forward, backward and update on 200 rows of 36 random tokens
documents   tokens/s of the real supervised loop, on documents of the corpus
prefill     tokens/s of reading 64 prompts of 128 tokens into the cache
decode      tokens/s of writing 64 tokens to each of 512 prompts of 12
step        seconds of one GRPO step, 32 questions, 16 answers of 42 tokens, and its parts
gemm        10^9 operations a second of a product of two matrices of 2048 x 2048, in this very run

Figures are medians of ROUNDS runs, after one that is thrown away. Where ours and theirs are
compared they run in turn, so that a slow minute of the machine meets both. transformers'
DeepseekV3 has no multi-token prediction in training: beside it, neither has ours. In training and
sampling each side has the number of threads and the dtype that suit it best, tried first; a GRPO
step is in float32, on the threads given.
"""
import copy
import dataclasses
import json
import logging
import random
import tempfile
import time
from statistics import median

import torch

import grpo
import moe
import r1mini
import tasks
from extras.cost import count_parameters
from extras.folder import machine
from extras.options import resolve
from grpo import Rollout, advantages, improve
from moe import UserError

ROUNDS = 5
ROWS, LENGTH = 200, 36             # of train
PROMPTS, PROMPT, NEW = 512, 12, 64  # of decode
QUESTIONS, GROUP, ANSWER = 32, 16, 42  # of a step


def seconds(work, device):
    """How long a call takes, its kernels included."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def in_turn(works, device, rounds=0):
    """{name: median seconds} of several calls, run in turn: A B A B."""
    taken = {name: [] for name in works}
    for _ in range((rounds or ROUNDS) + 1):
        for name, work in works.items():
            taken[name].append(seconds(work, device))
    return {name: median(each[1:]) for name, each in taken.items()}


def gemm(device, dtype, n=2048):
    """A product of two n x n matrices."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b


# --------------------------------------------------------------------------------------------------
# Ours


def make(config, device, dtype):
    """A model of random weights."""
    torch.manual_seed(0)
    return moe.place(moe.Transformer(config), device, dtype)


def train_step(model, rows=ROWS, length=LENGTH):
    """One update on random tokens."""
    device = model.head.weight.device
    tokens = torch.randint(model.config.vocab_size, (rows, length), device=device)
    real, weight = torch.ones_like(tokens).bool(), torch.ones_like(tokens).float()
    optimizers = grpo.make_optimizer(model.train(), 1e-3)

    def work():
        loss, _ = grpo.supervised_loss(model, tokens, real, weight, rows * (length - 1), rows)
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


def decode(model, n=PROMPTS, length=PROMPT, new=NEW):
    """Answers of `new` tokens to n prompts; no token ends one."""
    prompts = random_prompts(model.config, n, length)
    return lambda: grpo.generate(model, prompts, new, -1, 0)


def grpo_parts(model, run, device):
    """{part of a GRPO step: seconds}: one whole step's work, on random answers of one length."""
    s = dataclasses.replace(run.zero, problems=QUESTIONS, group_size=GROUP, max_new_tokens=ANSWER)
    reference, rng = copy.deepcopy(model).eval(), random.Random(0)
    problems = [r1mini.ask(rng, run, s.levels) for _ in range(QUESTIONS)]
    asked = [p for p in problems for _ in range(GROUP)]
    prompts, optimizers = r1mini.prompts_of(asked), grpo.make_optimizer(model, 1e-6)
    found = {}

    def sample():
        found["samples"] = grpo.generate(model, prompts, ANSWER, -1, tasks.PAD_ID)

    def reward():
        texts = [tasks.decode(ids) for ids in found["samples"].answers()]
        for rule in (tasks.accuracy, tasks.format_reward):
            [rule(text, p) for text, p in zip(texts, asked)]
        rewards = torch.rand(QUESTIONS, GROUP)  # random models are never right: all would be dead
        found["rollout"] = Rollout(problems, found["samples"], texts, {}, rewards,
                                   advantages(rewards))

    def learn(beta):
        model.train()
        improve(model, reference, optimizers, found["rollout"],
                dataclasses.replace(s, beta=beta), random.Random(0), 0)
    parts = in_turn({"sample": sample, "reward": reward, "learn": lambda: learn(s.beta),
                     "train": lambda: learn(0.0)}, device)
    parts["reference"] = max(0.0, parts["learn"] - parts["train"])
    return parts | {"whole": parts["sample"] + parts["reward"] + parts["learn"]}


# --------------------------------------------------------------------------------------------------
# What others would use


def theirs(config, **more):
    """transformers' DeepseekV3ForCausalLM of the same sizes, without MTP, with more of its own
    settings; UserError if it is not installed."""
    try:
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    except ImportError:
        raise UserError("--against wants transformers and trl: pip install '.[peers]'") from None
    c = config
    return DeepseekV3ForCausalLM(DeepseekV3Config(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.inter_dim,
        moe_intermediate_size=c.moe_inter_dim, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_heads, num_mtp_layers=0,
        first_k_dense_replace=c.n_dense_layers, n_routed_experts=c.n_routed_experts,
        n_shared_experts=c.n_shared_experts, num_experts_per_tok=c.n_activated_experts,
        n_group=c.n_expert_groups, topk_group=c.n_limited_groups, kv_lora_rank=c.kv_lora_rank,
        q_lora_rank=c.q_lora_rank or None, routed_scaling_factor=c.route_scale,
        v_head_dim=c.v_head_dim, qk_nope_head_dim=c.qk_nope_head_dim,
        qk_rope_head_dim=c.qk_rope_head_dim, rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, **more))


def their_train_step(model, rows=ROWS, length=LENGTH):
    """One update on random tokens, as their users write it."""
    tokens = torch.randint(model.config.vocab_size, (rows, length), device=model.device)
    optimizer = torch.optim.AdamW(model.train().parameters(), 1e-3, fused=True)

    def work():
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return work


def their_decode(model, n=PROMPTS, length=PROMPT, new=NEW):
    """generate(): answers of `new` tokens to n prompts."""
    tokens = torch.randint(1, model.config.vocab_size, (n, length), device=model.device)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return lambda: model.eval().generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new,
        do_sample=True, top_k=0, top_p=1.0)


def their_grpo_step(model, run, rounds=ROUNDS):
    """Median seconds of a step of TRL's GRPOTrainer, of the shape of ours."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    words = {f"t{i}": i for i in range(model.config.vocab_size)}
    inner = Tokenizer(models.WordLevel(words, unk_token="t0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="t0", eos_token="t1",
                                        padding_side="left")
    taken, began = [], [0.0]

    class Clock(TrainerCallback):
        """Takes the time of each optimisation of a rollout."""

        def on_step_begin(self, args, state, control, **kwargs):
            """A step begins."""
            began[0] = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            """A step ends."""
            taken.append(time.perf_counter() - began[0])
    rng = random.Random(0)
    data = Dataset.from_list([{"prompt": " ".join(f"t{rng.randrange(2, len(words))}" for _ in range(
        PROMPT))} for _ in range(QUESTIONS * (rounds + 1))])
    s, answers = run.zero, QUESTIONS * GROUP
    with tempfile.TemporaryDirectory() as path:  # where it reads model and reference from
        model.save_pretrained(path)
        settings = GRPOConfig(
            output_dir=path, per_device_train_batch_size=answers // s.minibatches,
            steps_per_generation=s.minibatches, num_generations=GROUP, beta=s.beta,
            max_completion_length=ANSWER, epsilon=s.clip_low, learning_rate=1e-6, bf16=False,
            max_steps=s.minibatches * (rounds + 1), save_strategy="no", report_to="none",
            logging_strategy="no", use_cpu=model.device.type == "cpu", disable_tqdm=True,
            generation_kwargs={"min_new_tokens": ANSWER}, loss_type="grpo",
            gradient_checkpointing=False)  # theirs by default; ours recomputes nothing
        GRPOTrainer(path, lambda completions, **_: [rng.random() for _ in completions],
                    settings, train_dataset=data, processing_class=tokenizer,
                    callbacks=[Clock()]).train()
    steps = [sum(taken[i:i + s.minibatches]) for i in range(0, len(taken), s.minibatches)]
    return median(steps[1:])


# --------------------------------------------------------------------------------------------------
# The command


def ours(run, device, dtype):
    """Figures of this project on this machine, by key; rates in tokens a second."""
    model, peak = make(run.model, device, dtype), 2 * 2048 ** 3 / 1e9
    work, documents = document_step(make(run.model, device, dtype), run)
    reading = random_prompts(run.model, 64, 128)
    taken = in_turn({
        "gemm": gemm(device, dtype), "train": train_step(make(run.model, device, dtype)),
        "documents": work, "decode": decode(model),
        "prefill": lambda: grpo.generate(model, reading, 1, -1, 0)}, device)
    found = {"gemm": peak / taken["gemm"], "train": ROWS * LENGTH / taken["train"],
             "documents": sum(documents[1:]) / ROUNDS / taken["documents"],
             "prefill": 64 * 128 / taken["prefill"], "decode": PROMPTS * NEW / taken["decode"]}
    active = count_parameters(run.model)[1]
    found["train.peak_share"] = 6 * active * found["train"] / 1e9 / found["gemm"]
    found |= {f"step.{part}": x for part, x in grpo_parts(model, run, device).items()}
    c, width = run.model, 4 if dtype == torch.float32 else 2
    found["cache.latent"] = 4 * c.n_layers * (c.kv_lora_rank + c.qk_rope_head_dim)  # float32
    found["cache.heads"] = width * c.n_layers * c.n_heads * (
        c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    return found


def best_of(make_work, device, dtypes):
    """The (dtype, threads) in which one call of make_work(dtype)() is fastest, tried two times."""
    threads, tried = torch.get_num_threads(), {}
    for dtype in dtypes:
        work = make_work(dtype)
        for n in sorted({1, threads} if device.type == "cpu" else {threads}):
            torch.set_num_threads(n)
            tried[dtype, n] = min(seconds(work, device) for _ in range(3))
    torch.set_num_threads(threads)
    return min(tried, key=tried.get)


def against(run, device, rounds=ROUNDS):
    """Ours and theirs in turn, each at its best dtype and number of threads; rates and ratios."""
    plain = dataclasses.replace(run.model, n_mtp_layers=0)
    dtypes, threads, found = (torch.float32, torch.bfloat16), torch.get_num_threads(), {}
    rivals = {
        "train": (lambda d: train_step(make(plain, device, d)),
                  lambda d: their_train_step(theirs(plain).to(device, d)), ROWS * LENGTH),
        "sample": (lambda d: decode(make(plain, device, d)),
                   lambda d: their_decode(theirs(plain).to(device, d)), PROMPTS * NEW)}
    for name, (mine, other, tokens) in rivals.items():
        best = [best_of(work, device, dtypes) for work in (mine, other)]

        def at(work, n):
            def timed():
                torch.set_num_threads(n)
                work()
            return timed
        taken = in_turn({who: at(make_work(dtype), n) for who, make_work, (dtype, n) in zip(
            ("ours", "transformers"), (mine, other), best)}, device, rounds)
        torch.set_num_threads(threads)
        for (who, x), (dtype, n) in zip(taken.items(), best):
            found[f"{name}.{who}"] = tokens / x
            found[f"{name}.{who}.setting"] = f"{str(dtype).removeprefix('torch.')}, {n} threads"
        found[f"{name}.vs_transformers"] = taken["transformers"] / taken["ours"]
    taken = {"ours": [], "trl": []}
    for _ in range(2):  # a trainer of theirs runs its rounds in one go: A B A B by trainers
        taken["ours"].append(grpo_parts(make(plain, device, torch.float32), run, device)["whole"])
        taken["trl"].append(their_grpo_step(theirs(plain).to(device), run, rounds))
    found |= {f"step.{who}": median(x) for who, x in taken.items()}
    return found | {"step.vs_trl": found["step.trl"] / found["step.ours"]}


def page(found):
    """What is printed: a line for each figure."""
    def line(key, x):
        if isinstance(x, str):
            return f"{key:28} {x}"
        units = {"share": "of gemm", "vs_": "times as fast", "step": "s", "cache": "bytes a token",
                 "gemm": "GFLOP/s", "": "tokens/s"}
        unit = next(unit for part, unit in units.items() if part in key)
        return f"{key:28} {x:{',.3f' if x < 100 else ',.0f'}} {unit}"
    return "\n".join(line(*pair) for pair in found.items())


def main(options):
    """The command bench."""
    run = resolve(options.preset, options.set)
    for name in ("transformers", "trl", "py.warnings"):
        logging.getLogger(name).setLevel(logging.ERROR)
    found = against(run, options.device) if options.against else ours(
        run, options.device, options.dtype)
    found = {"machine": f"{machine()}, {torch.get_num_threads()} threads, torch "
                        f"{torch.__version__}, {str(options.dtype).removeprefix('torch.')}"} | found
    print(json.dumps(found) if options.json else page(found))
    return 0
