"""r1mini: DeepSeek-R1 in miniature. The pipeline, evaluation and the command line.

    python r1mini.py                     every stage on the nano preset, into runs/nano
    python r1mini.py base|zero|r1|...    up to that stage; --from CKPT goes on from another run
    python r1mini.py distill --data FILE a student on dialogues in chat format
    python r1mini.py eval CKPT           pass@1, vote and pass@k, on held-out problems or your own
    python r1mini.py chat CKPT           talk to it; the thinking apart from the answer
    python r1mini.py export CKPT DIR     a Hugging Face folder; import DIR CKPT is the way back
    python r1mini.py report RUN RUN ...  means and spread over runs; --to results/NAME keeps them
    python r1mini.py study NAME          the runs behind a table of the README
    python r1mini.py bench|cost          tokens a second here; what a preset's sizes come to

The paper's path (R1, Nature Fig 2), each arrow one short function under "Stages":

    base --GRPO--> zero --its right, readable samples, rewritten--> dev1: SFT on the base
    dev1 --GRPO, language reward--> dev2 --its right samples, 3:1 with more--> dev3: SFT on the base
    dev3 --GRPO, all prompts, two reward models (helpful, safe)--> r1
    student: a small dense base --SFT on r1's samples--> distill, or its logits, or GRPO instead

A run folder holds config.json, log.jsonl (without a clock: two runs compare to the bit),
timing.jsonl, checkpoints, samples.md and report.md. The same command goes on where a run stopped.
How a command's words become settings is in tools/cli.py.
"""
import dataclasses
import math
import random
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from tqdm import tqdm

import moe
import tasks
from engine.checkpoint import restore
from engine.devices import all_sum, any_process, copy_model
from engine.doctor import advice, note, on_track
from engine.errors import UserError
from engine.evaluate import evaluate, evaluate_general, prompts_of, sample_answers
from engine.folder import read_log
from engine.jsonl import chat_line, read_chat
from engine.optim import learning_rate_at, make_optimizers, micro_batches, update
from engine.sampling import pad
from grpo import RL, Task, preference_loss, safety_loss, score, train_rl
from moe import supervised_loss

# -------------------------------------------------------------------------------------------------
# Stages: each takes the run's folder and the models before it, by name, and returns its own


def base(folder, models):
    """The base model, from random weights. What it can do by style bounds what RL can amplify."""
    return pretrain(folder, "base", folder.run.model, folder.run.base)


def pretrain(folder, name, config, s):
    """A model from random weights, on the base corpus."""
    torch.manual_seed(folder.run.seed)
    model = folder.place(moe.Transformer(config))
    model = sft(folder, name, model, s, lambda rng: tasks.make_document(rng, folder.run.corpus))
    dev = [r for r in read_log(folder.path) if r["kind"] == "dev" and r["stage"] == name][-1]
    print(f"\n  What {name} does on dev, at temperature 1, by number of operations\n"
          "  style      share" + "".join(f"{n:>6}" for n in dev["by_level"]))
    for style, row in [*dev["by_style"].items(), ("all", {"share": 1.0} | dev["by_level"])]:
        print(f"  {style:9}", *(f"{math.nan if x is None else x:5.2f}" for x in row.values()))
    return model


def zero(folder, models):
    """R1-Zero: GRPO on the base, rewarding accuracy and format, with no example (R1 v1 2.2)."""
    return rl(folder, "zero", models, "base", folder.run.zero)


def dev1(folder, models):
    """Cold start: Zero's right and readable answers, rewritten in the language of the question
    and with a summary, teach the base (R1 v2 B.3.2)."""
    documents = collect(folder, "dev1", models["zero"], folder.run.data.cold_start,
                        lambda text, p: tasks.accuracy(text, p) and tasks.readable(text),
                        tasks.rewrite)
    return sft(folder, "dev1", models["base"], folder.run.dev1, lambda rng: rng.choice(documents))


def dev2(folder, models):
    """RL for reasoning: as Zero's, with a reward for keeping to one language (R1 v2 eq 7)."""
    return rl(folder, "dev2", models, "dev1", folder.run.dev2)


def dev3(folder, models):
    """Dev2's right answers, 3:1 with general data, teach the BASE again (R1 v2 B.3.3)."""
    documents = collect(folder, "dev3", models["dev2"], folder.run.data.rejection, fit)

    def draw(rng):
        if rng.random() >= folder.run.data.general:
            return rng.choice(documents)
        prompt = tasks.make_prompt(rng)
        return tasks.dialogue(prompt, tasks.reply(prompt, rng, tasks.CURATED))
    return sft(folder, "dev3", models["base"], folder.run.dev3, draw)


def fit(text, problem):
    """Whether an answer is right, in the question's language alone, and not repetitive."""
    return tasks.accuracy(text, problem) and tasks.readable(text) and \
        tasks.language_share(text, problem.language) == 1.0


def judge(folder, name, model, draw, loss):
    """A reward model: a head of one output (R1 v2 3.1), on Dev3's weights (our choice)."""
    run = folder.run
    torch.manual_seed(run.seed)
    config = dataclasses.replace(model.config, n_outputs=1, n_mtp_layers=0)
    scorer = folder.place(moe.Transformer(config))
    scorer.load_state_dict({key: weight for key, weight in model.state_dict().items()
                            if not key.startswith(("head.", "mtp."))}, strict=False)
    return folder.stage(name, scorer, lambda m, state: train(
        m, run.judge, draw, run.seed, state, loss), run.judge.steps, lambda *_: None)


def helpful(folder, models):
    """The reward model of helpfulness: pairs, of which it sees the summaries only."""
    return judge(folder, "helpful", models["dev3"], tasks.helpful_pair, pairwise)


def safe(folder, models):
    """The reward model of safety: single responses, of which it sees all."""
    return judge(folder, "safe", models["dev3"], tasks.labelled_response, pointwise)


def r1(folder, models):
    """RL for all scenarios: rules on sums; late, reward models on the rest (R1 v2 eq 8-10)."""
    return rl(folder, "r1", models, "dev3", folder.run.r1, (models["helpful"], models["safe"]))


def student(folder, models):
    """A smaller, dense base on the same corpus."""
    return pretrain(folder, "student", folder.run.student, folder.run.student_base)


def lessons(folder, models):
    """What students learn from: R1's right answers, or the user's dialogues."""
    if folder.run.data_file:
        return read_dialogues(folder.run.data_file, folder.run.student.max_seq_len)
    return collect(folder, "distill", models["r1"], folder.run.data.distill, fit)


def distill(folder, models):
    """Distillation: SFT alone, on R1's right answers (R1 v1 2.4; the paper's: Dev3's set)."""
    documents = lessons(folder, models)
    return sft(folder, "distill", models["student"], folder.run.distill,
               lambda rng: rng.choice(documents))


def distill_logits(folder, models):
    """The same answers, at each token R1's whole distribution (forward KL at temperature 1)."""
    documents = lessons(folder, models)
    return sft(folder, "distill_logits", models["student"], folder.run.distill,
               lambda rng: rng.choice(documents), teacher_logits(models["r1"].eval()))


def student_rl(folder, models):
    """What made Zero, on the student's base (R1 v1 4.1), for more FLOPs than distillation's."""
    return rl(folder, "student_rl", models, "student", folder.run.student_rl)


def student_rl_no_format(folder, models):
    """The same without the format reward; an ablation."""
    s = dataclasses.replace(folder.run.student_rl, format_weight=0.0)
    return rl(folder, "student_rl_no_format", models, "student", s)


def distill_rl(folder, models):
    """GRPO after distillation: said to help, without numbers (R1 v1 sections 2.4 and 3.2)."""
    return rl(folder, "distill_rl", models, "distill", folder.run.distill_rl)


STAGES = {stage.__name__: stage for stage in (
    base, zero, dev1, dev2, dev3, helpful, safe, r1, student, distill, distill_logits, student_rl,
    student_rl_no_format, distill_rl)}
ABLATIONS = {"distill_logits", "student_rl_no_format"}  # run by --only, and in the study r1


# -------------------------------------------------------------------------------------------------
# The supervised loop, and what it can be asked to lower

# A loss takes the model, some examples and all of a step's examples (for the denominator), so that
# cutting a step into micro-batches never changes the gradient. It returns (loss, its share to log).


def next_token(model, some, whole):
    """V3's loss on documents: next token, MTP, balance."""
    tokens, real, weight = batch_of(model, some)
    targets = sum(sum(d.weight) for d in whole)
    loss, info = supervised_loss(model, tokens, real, weight, targets, len(whole))
    return loss, info["loss"]


def teacher_logits(teacher, temperature=1.0):
    """Hinton's distillation (R1's is SFT): forward KL(teacher || student) by T squared."""
    def loss(model, some, whole):
        tokens, real, weight = batch_of(model, some)
        at = F.pad(weight[:, 1:] > 0, (0, 1))
        with torch.no_grad():
            wanted = (teacher(tokens, real, at=at).logits / temperature).log_softmax(-1)
        given = (model(tokens, real, at=at).logits / temperature).log_softmax(-1)
        kl = F.kl_div(given, wanted, reduction="sum", log_target=True) * temperature ** 2
        kl = kl / sum(sum(d.weight) for d in whole)
        return kl, kl.detach()
    return loss


def pairwise(judge, some, whole):
    """The helpfulness reward model's loss on tasks.Judgement pairs."""
    better, worse = (score(judge, rows, tasks.PAD_ID) for rows in
                     ([d.tokens for d in some], [d.worse for d in some]))
    loss = preference_loss(better, worse) / len(whole)
    return loss, loss.detach()


def pointwise(judge, some, whole):
    """The safety reward model's loss on tasks.Judgement labels."""
    scores = score(judge, [d.tokens for d in some], tasks.PAD_ID)
    loss = safety_loss(scores, torch.tensor([d.safe for d in some], device=scores.device))
    return loss / len(whole), loss.detach() / len(whole)


def batch_of(model, documents):
    """tokens, real and weight (B, T) of documents, on the model's device."""
    device = model.head.weight.device
    tokens = pad([d.tokens for d in documents], tasks.PAD_ID, device)
    weight = pad([d.weight for d in documents], 0, device).float()
    return tokens, tokens != tasks.PAD_ID, weight


def train(model, s, draw, seed, state=None, loss=next_token):
    """Lowers a loss on examples drawn by draw(rng): the only supervised loop.

    Trains the model in place; a generator of (record, snapshot) after each step, where snapshot()
    is the state to continue from, on a CPU to the same bits: each step draws its examples afresh
    from the seed and its own number.
    """
    optimizers = make_optimizers(model, s.lr, s.muon_lr)
    for optimizer, saved in zip(optimizers, state["optimizers"] if state else ()):
        restore(optimizer, saved)
    model.train()
    for step in range(state["step"] if state else 0, s.steps):
        rng = random.Random(f"{seed}/train/{step}")
        whole = [draw(rng) for _ in range(s.documents)]
        lengths = [len(d.tokens) for d in whole]
        total = torch.zeros((), dtype=torch.float64)  # in float64, as Python adds
        read = sum(lengths) + sum(len(getattr(d, "worse", None) or ()) for d in whole)
        for rows in micro_batches(lengths, range(len(whole)), s.micro_tokens):
            part, logged = loss(model, [whole[i] for i in rows], whole)
            part.backward()
            total += float(logged)
        factor = learning_rate_at(step, s.steps, s.warmup, s.decay)
        record = {"step": step + 1, "loss": float(all_sum(total)), "tokens": read}
        yield record | update(model, optimizers, factor), lambda: {
            "step": step + 1, "optimizers": [o.state_dict() for o in optimizers]}


# -------------------------------------------------------------------------------------------------
# What every stage shares


def watcher(folder, stage, every, steps, settings=None, before=None):
    """What happens after a step: evaluation on dev, sample answers, the teacher's sentences."""
    run, s, said, first = folder.run, folder.run.eval, set(), {}
    limit = run.zero.max_new_tokens
    dev = tasks.make_problems("dev", s.dev_problems, run.zero.levels, run.corpus.products)
    shown = tasks.make_problems("test", 2 * len(run.zero.levels), run.zero.levels,
                                run.corpus.products, "shown")
    rng = random.Random("test/shown")
    shown += [tasks.make_prompt(rng, "test", (kind,)) for kind in tasks.GENERAL]

    def watch(model, record, bar):
        step = record["step"]
        if step and not first:
            first.update(record)
        for keyword, sentence in advice(record, first, settings, stage) if step else []:
            if keyword not in said:
                bar.write(note(sentence))
                said.add(keyword)
        if step == 0 and not settings:
            return  # random weights, or another stage's
        here = {"stage": stage, "step": step}  # at 0 the weights are those that `before` ended with
        known = {r["kind"]: r | here for r in (read_log(folder.path) if step == 0 else ())
                 if r.get("stage") == before}
        if step % every == 0 or step == steps:
            r = known.get("dev") or {"kind": "dev"} | here | evaluate(
                model, dev, s.samples, 1.0, 1.0, limit, s.rows)[0]
            folder.log(r)
            bar.write(f"  {stage} {step:>4}: dev pass@1 {r['pass@1']:.3f}  "
                      f"vote {r[f'cons@{s.samples}']:.3f}  length {r['length']:3.0f}  "
                      f"check {r['reflection']:.2f}  mix {r['mixing']:.2f}"
                      + on_track(run, stage, step, r["pass@1"]))
        if step in (0, steps // 2, steps):
            folder.log(known.get("samples") or {"kind": "samples"} | here | {"answers": [
                [p.question, p.answer, tasks.decode(x)] for p, x in zip(shown, sample_answers(
                    model, prompts_of(shown), limit, s.rows, s.temperature, s.top_p))]})
    return watch


def test_stage(folder, stage, model):
    """A stage's figures on held-out problems: at temperature 1; of base, zero and r1 also as R1 was
    asked, on these and on longer ones than any in training; from zero to r1, general prompts."""
    run, s, levels = folder.run, folder.run.eval, folder.run.zero.levels
    done = sum(r["kind"] in ("test", "general") and r["stage"] == stage
               for r in read_log(folder.path))
    longest = max(*run.corpus.levels, *levels)
    problems = tasks.make_problems("test", s.problems, levels, run.corpus.products)
    longer = tasks.make_problems("test", 2 * s.longer, (longest + 1, longest + 2),
                                 run.corpus.products)
    samples = s.samples if stage in ("base", "zero") else s.fewer_samples
    plans = [("test", problems, samples, 1.0, 1.0)]
    if stage in ("base", "zero", "r1"):
        plans += [("test", problems, s.fewer_samples, s.temperature, s.top_p),
                  ("longer", longer, s.fewer_samples, s.temperature, s.top_p)]
    if stage in ("zero", "dev1", "dev2", "dev3", "r1"):
        plans.append(("general", None, 0, 1.0, 1.0))
    for name, asked, samples, temperature, top_p in tqdm(plans[done:], f"test {stage}",
                                                disable=done == len(plans)):
        folder.check()
        began = time.monotonic()
        if name == "general":
            folder.log({"kind": "general", "stage": stage} | evaluate_general(model, run))
        else:
            r, _ = evaluate(model, asked, samples, temperature, top_p, run.zero.max_new_tokens,
                            s.rows, seed=1)
            folder.log({"kind": "test", "stage": stage, "set": name} | r)
        folder.clock(f"test_{stage}", 0, began)


def sft(folder, name, model, s, draw, loss=next_token):
    """A supervised stage: a copy of the model lowers the loss, and is tested."""
    watch = watcher(folder, name, s.dev_every, s.steps)
    model = folder.stage(name, copy_model(model), lambda m, state: train(
        m, s, draw, folder.run.seed, state, loss), s.steps, watch)
    test_stage(folder, name, model)
    return model


def rl(folder, name, models, before, s, judges=None):
    """A stage of RL: a copy of the model before is improved, and tested. Rules with a weight of 0
    are left out, but accuracy is always logged, as a mean over sums."""
    run = folder.run
    rules = {"accuracy": (s.accuracy_weight, lambda text, problem: tasks.accuracy(
                 text, problem) if problem.kind == "sum" else math.nan),
             "format": (s.format_weight, tasks.format_reward),
             "language": (s.language_weight, tasks.MEASURES["language"])}
    rewards = {key: (weight, each(rule)) for key, (weight, rule) in rules.items()
               if weight or key == "accuracy"}
    if judges:
        rewards["preference"] = s.preference_weight, preference(*judges)

    def sample(rng, n, step):  # asked as in the corpus, some with stray spaces
        general = s.general if step >= s.general_from * s.steps else 0.0
        return [tasks.make_prompt(rng) if rng.random() < general else ask(rng, run, s.levels)
                for _ in range(n)]
    task = Task(sample=sample, decode=tasks.decode,
                encode=lambda problem: tasks.encode_prompt(problem.question), rewards=rewards,
                measures=tasks.MEASURES, end_id=tasks.END_ID, pad_id=tasks.PAD_ID)
    watch = watcher(folder, name, s.dev_every, s.steps, s, before)
    model = folder.stage(name, copy_model(models[before]), lambda m, state: train_rl(
        m, task, s, run.seed, state), s.steps, watch)
    test_stage(folder, name, model)
    return model


def ask(rng, run, levels):
    """A random problem to train on, put as the corpus does: often with stray spaces."""
    problem = tasks.make_problem(rng, rng.choice(levels), "train", None, run.corpus.products)
    return tasks.space(problem, rng) if rng.random() < run.corpus.spaced else problem


def each(rule):
    """A rule for one text as a reward for many."""
    return lambda texts, problems: [float(rule(t, p)) for t, p in zip(texts, problems)]


def preference(helpful, safe):
    """The reward of the two reward models on general prompts, 0..1: a harmful wish is judged for
    safety by the whole response, any other for helpfulness by its summary alone (R1 v2 3.1). In
    hundredths: GRPO divides by a group's deviation, and makes advantages of any noise."""
    @torch.no_grad()
    def reward(texts, problems):
        rewards = [0.0 if p.kind in tasks.GENERAL else math.nan for p in problems]
        for judge, view, kinds in ((helpful.eval(), tasks.summary_of, tasks.HELPFUL),
                                   (safe.eval(), str, ("unsafe",))):
            mine = [i for i, p in enumerate(problems) if p.kind in kinds and view(texts[i])]
            rows = [tasks.encode_prompt(problems[i].question) + tasks.encode_response(
                view(texts[i])) for i in mine]
            rows = [row[:judge.config.max_seq_len] for row in rows]
            for i, value in zip(mine, score(judge, rows, tasks.PAD_ID) if rows else ()):
                rewards[i] = round(float(value.sigmoid()), 2)
        return rewards
    return reward


def collect(folder, name, model, n, keep, change=lambda text, problem: text):
    """Rejection sampling: the model answers n train problems `tries` times; the answers that
    keep(text, problem) accepts, changed, go to NAME.jsonl in chat format, each once. Returns them
    as documents."""
    run, path = folder.run, folder.path / f"{name}.jsonl"
    if any_process(not path.exists()):  # all take one branch: what follows waits for all
        folder.cut(folder.begun(name, collected=True))
        began, rng = time.monotonic(), random.Random(f"{run.seed}/{name}")
        asked = [p for _ in range(n) for p in [ask(rng, run, run.zero.levels)] * run.data.tries]
        ids = sample_answers(model, prompts_of(asked), run.zero.max_new_tokens, run.eval.rows,
                             seed=run.seed, name=f"{name}: samples")
        texts = [tasks.decode(x) for x in ids]
        kept = {chat_line(p.question, change(text, p)): None
                for text, p in zip(texts, asked) if keep(text, p)}
        if not kept and run.data.stand_in:
            kept = {chat_line(p.question, tasks.response(*tasks.work(p, "checked", rng))):
                    None for p in asked}
        if not kept:
            raise UserError(f"{name}: none of {len(ids)} answers is fit; train their model longer")
        folder.log({"kind": "collected", "stage": name, "kept": len(kept), "of": len(texts),
                    "tokens": sum(map(len, ids))})
        folder.write(path, "".join(kept))
        folder.clock(f"collect_{name}", 0, began)
        folder.check()
    return read_dialogues(path, run.model.max_seq_len)


def read_dialogues(path, longest):
    """The documents of a file of dialogues; UserError if one is too long."""
    documents = [tasks.dialogue(tasks.Problem(question, "", ""), text)
                 for question, text in read_chat(path)]
    for i, document in enumerate(documents, 1):
        if len(document.tokens) > longest:
            raise UserError(f"{path}: dialogue {i} has {len(document.tokens)} tokens; at most "
                            f"{longest} fit")
    return documents


# -------------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class Train:
    """Settings of the supervised loop."""
    steps: int = 900
    documents: int = 80            # a step
    lr: float = 1e-2               # AdamW: embedding, head, norms, router
    muon_lr: float = 1e-2          # Muon: the matrices between; 0: AdamW for all
    warmup: int = 20               # steps
    decay: float = 0.4             # share of the steps over which the learning rates fall to 0
    micro_tokens: int = 1000       # tokens in one forward pass; memory and speed only
    dev_every: int = 250           # steps between evaluations on dev


@dataclass(frozen=True)
class Evaluation:
    """How a model is asked. Choices are made on dev; test is for what is reported."""
    problems: int = 500            # test problems, evenly over the levels
    samples: int = 16              # answers to each, of base and zero at temperature 1, and on dev
    fewer_samples: int = 4         # ... on all other tests
    temperature: float = 0.6       # as R1 is evaluated (R1 v1 section 3)
    top_p: float = 0.95
    longer: int = 100              # test problems of each of the two levels above any in training
    dev_problems: int = 48         # between steps, at temperature 1
    rows: int = 2048               # answers sampled at a time; their random numbers hang on it


@dataclass(frozen=True)
class Data:
    """Data that models make for models."""
    cold_start: int = 400          # train problems Zero answers for the cold start [thousands]
    rejection: int = 1500          # train problems Dev2 answers for Dev3's training [600K kept]
    distill: int = 1500            # train problems R1 answers for the students [Dev3's 800K]
    tries: int = 2                 # answers to each, at temperature 1
    general: float = 0.25          # share of general data in Dev3's training: 3:1 [600K to 200K]
    prompts: int = 128             # held-out general prompts of each kind, 4 answers to each
    stand_in: bool = False         # where no answer is fit, worked solutions are (micro only)


PRESETS = {
    "micro": moe.Config(dim=32, inter_dim=64, moe_inter_dim=32, n_layers=2, n_heads=2,
                    n_routed_experts=4, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
                    v_head_dim=16),
    "nano": moe.NANO,
    "laptop": moe.Config(dim=512, inter_dim=1536, moe_inter_dim=256, n_layers=8, n_heads=8,
                     n_routed_experts=32, n_activated_experts=4, route_scale=2.5, kv_lora_rank=128,
                     qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64, init_std=0.02,
                     max_seq_len=2048),
    "node": moe.Config(dim=1024, inter_dim=4096, moe_inter_dim=512, n_layers=16, n_heads=16,
                   n_routed_experts=32, n_activated_experts=4, n_expert_groups=8,
                   n_limited_groups=4, route_scale=2.5, q_lora_rank=384, kv_lora_rank=256,
                   qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=128, init_std=0.006,
                   max_seq_len=4096),
    "v3": moe.V3,
    "student": moe.Config(dim=48, inter_dim=144, n_dense_layers=3, n_mtp_layers=0),  # dense
}


@dataclass(frozen=True)
class Run:
    """Everything that determines a run."""
    preset: str = "nano"
    seed: int = 0
    start: str = ""                # checkpoint of another run: what came before is taken from there
    data_file: str = ""            # dialogues to distil from, if not R1's
    device: str = "cpu"            # the kind: cpu, cuda, mps
    dtype: str = "float32"         # of the forward pass
    model: moe.Config = field(default_factory=moe.Config)
    student: moe.Config = field(default_factory=lambda: PRESETS["student"])
    corpus: tasks.Corpus = field(default_factory=tasks.Corpus)
    base: Train = field(default_factory=Train)
    zero: RL = RL(steps=24, minibatches=4)  # at 2 the climb takes a fifth longer: results/choices
    dev1: Train = Train(steps=20, documents=48, lr=2e-3, muon_lr=2e-3)  # 50 leave no mixing
    dev2: RL = RL(steps=14, problems=32, decay=0.0, language_weight=0.5)
    dev3: Train = Train(steps=120, documents=64, lr=5e-3, muon_lr=5e-3)
    judge: Train = Train(steps=60, documents=64, lr=5e-3, muon_lr=5e-3)  # both reward models
    r1: RL = RL(steps=20, problems=32, lr=1e-4, decay=0.0, language_weight=0.5, temperature=0.7,
                general=0.5, dev_every=10)
    student_base: Train = Train(steps=400)
    distill: Train = Train(steps=200, documents=48)
    student_rl: RL = RL(steps=48, problems=48, minibatches=4, dev_every=16, max_new_tokens=140)
    distill_rl: RL = RL(steps=12, lr=1e-4, dev_every=6)
    data: Data = field(default_factory=Data)
    eval: Evaluation = field(default_factory=Evaluation)


if __name__ == "__main__":
    from tools.cli import main
    sys.exit(main())
