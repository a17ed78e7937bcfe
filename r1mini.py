"""r1mini: DeepSeek-R1 in miniature.

The recipe of R1 (arXiv 2501.12948, of which v1 is of January 2025 and v2 of January 2026;
Nature Fig 2). One function per stage, in this order:

    stage       starts from  data                                   loss             gives
    base        -            corpus: problems, some solved          next token, MTP  base
    zero        base         problems; rewards: right, format       GRPO             R1-Zero
    dev1        base         Zero's good answers, rewritten         next token, MTP  Dev1
    dev2        dev1         problems; Zero's rewards, language     GRPO             Dev2
    dev3        base         Dev2's good answers, general replies   next token, MTP  Dev3
    helpful     dev3         pairs of replies, one of them better   pairwise         reward model
    safe        dev3         replies that are safe or not           pointwise        reward model
    r1          dev3         problems, general prompts; Dev2's      GRPO             R1
                             rewards, both reward models
    student     -            base's corpus                          next token       student
    distill     student      R1's good answers                      next token       distilled
    student_rl  student      problems; rewards: right, format       GRPO             student + RL
    distill_rl  distill      problems; rewards: right, format       GRPO             distilled + RL

MTP is multi-token prediction (moe.py). Two ablations run only if they are asked for:
distill_logits and student_rl_no_format.

    python r1mini.py                     every stage of the table, nano preset, runs/nano
    python r1mini.py base|zero|r1|...    the stages up to this one
        --from CKPT                      takes the earlier models from another run's folder
        --only STAGE ...                 runs these stages alone
    python r1mini.py distill --data FILE trains a student on your dialogues (chat format)
    python r1mini.py eval CKPT           pass@1, majority vote, pass@k on held-out problems
    python r1mini.py chat CKPT           a conversation; thinking and answer apart
    python r1mini.py export CKPT DIR     a Hugging Face folder; `import DIR CKPT` reads one
    python r1mini.py report RUN ...      mean and spread over runs
    python r1mini.py look RUN            a page that shows RL on a run; `show`: in the terminal
    python r1mini.py study NAME          the runs behind a page of results/
    python r1mini.py check               what works on this machine, within a minute
    python r1mini.py bench               tokens per second on this machine
    python r1mini.py cost                the parameters of a preset

A run's folder holds config.json, log.jsonl, timing.jsonl, checkpoints, samples.md and
report.md. The log contains no times, so two runs can be compared byte by byte. Give the same
command again to continue a stopped run.

tools/cli.py turns the command's words into settings, and calls the stages in this order with
a dict of the models before them.
"""
import dataclasses
import math
import random
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import moe
import tasks
from engine.checkpoint import restore_all
from engine.devices import all_sum, any_process, copy_model
from engine.errors import UserError
from engine.evaluate import prompts_of, sample_answers
from engine.jsonl import jsonl_dialogue, read_chat
from engine.optim import learning_rate_at, make_optimizers, micro_batches, optimizer_update
from engine.sampling import pad_right, reading_passes
from engine.watch import Watch, print_styles, test_stage
from grpo import RL, Task, judge_scores, preference_loss, safety_loss, train_rl
from moe import supervised_loss

# ------------------------------------------------------------------------------
# Stages. Each takes the run's folder and a dict of the models before it, and returns
# its model.


def base(folder, models):
    """The base model, pretrained on the corpus."""
    return pretrain(folder, "base", folder.run.model, folder.run.base)


def zero(folder, models):
    """R1-Zero: GRPO on the base. It is rewarded for right answers and for the format,
    and it sees no worked solution (R1 v1 section 2.2)."""
    return rl(folder, "zero", models, "base", folder.run.zero)


def dev1(folder, models):
    """The cold start. The base is trained on Zero's right and readable answers, which are
    rewritten in the language of the question, with a summary (R1 v2 section B.3.2)."""
    def keep(text, problem):
        return tasks.accuracy(text, problem) and tasks.is_readable(text)

    documents = collect(folder, "dev1", models["zero"], folder.run.data.cold_start,
                        keep=keep, change=tasks.rewrite_answer)
    return supervised(folder, "dev1", models["base"], folder.run.dev1, one_of(documents))


def dev2(folder, models):
    """RL for reasoning: like Zero's, with a reward for keeping to one language (R1 v2
    eq 7)."""
    return rl(folder, "dev2", models, "dev1", folder.run.dev2)


def dev3(folder, models):
    """Rejection sampling. The base, not Dev2, is trained on Dev2's right answers and on
    replies to general prompts, 3:1 (R1 v2 section B.3.3)."""
    documents = collect(folder, "dev3", models["dev2"], folder.run.data.rejection,
                        keep=is_fit)

    def draw(rng):
        if rng.random() < folder.run.data.general:
            prompt = tasks.make_prompt(rng)
            return tasks.dialogue(prompt, tasks.reply(prompt, rng, tasks.CURATED))
        return rng.choice(documents)

    return supervised(folder, "dev3", models["base"], folder.run.dev3, draw)


def helpful(folder, models):
    """The reward model of helpfulness. It learns from pairs of replies.
    tasks.helpful_pair shows it the question and what the reader sees, never the
    thinking."""
    return train_reward_model(folder, "helpful", models["dev3"], tasks.helpful_pair,
                              pairwise_loss)


def safe(folder, models):
    """The reward model of safety. It learns from single replies with a label. It sees the
    question and the whole reply, thinking included."""
    return train_reward_model(folder, "safe", models["dev3"], tasks.labelled_response,
                              pointwise_loss)


def r1(folder, models):
    """RL for all scenarios. Rules score the answers to problems. Late in the run, general
    prompts join, and the reward models score their replies (R1 v2 eq 8-10)."""
    reward_models = models["helpful"], models["safe"]
    return rl(folder, "r1", models, "dev3", folder.run.r1, reward_models)


def student(folder, models):
    """A smaller, dense base on the same corpus."""
    return pretrain(folder, "student", folder.run.student, folder.run.student_base)


def distill(folder, models):
    """Distillation: SFT on R1's right answers (R1 v1 section 2.4). Unlike the paper,
    which uses Dev3's data, we use fresh answers of R1."""
    documents = teacher_answers(folder, models)
    return supervised(folder, "distill", models["student"], folder.run.distill,
                      one_of(documents))


def distill_logits(folder, models):
    """An ablation: distill's answers, but the student learns R1's whole distribution at
    each token."""
    documents = teacher_answers(folder, models)
    return supervised(folder, "distill_logits", models["student"], folder.run.distill,
                      one_of(documents), distillation_loss(models["r1"].eval()))


def student_rl(folder, models):
    """Zero's recipe on the student's base, for the comparison with distillation (R1 v1
    section 4.1). The report has the FLOPs of both."""
    return rl(folder, "student_rl", models, "student", folder.run.student_rl)


def student_rl_no_format(folder, models):
    """An ablation: student_rl without the format reward."""
    s = dataclasses.replace(folder.run.student_rl, format_weight=0.0)
    return rl(folder, "student_rl_no_format", models, "student", s)


def distill_rl(folder, models):
    """GRPO after distillation. The paper says that it helps, without numbers (R1 v1
    2.4, 3.2)."""
    return rl(folder, "distill_rl", models, "distill", folder.run.distill_rl)


STAGES = {stage.__name__: stage for stage in (
    base, zero, dev1, dev2, dev3, helpful, safe, r1, student, distill, distill_logits,
    student_rl, student_rl_no_format, distill_rl)}
ABLATIONS = {"distill_logits", "student_rl_no_format"}


# ------------------------------------------------------------------------------
# The supervised loop, and the losses that it lowers

# Arguments and result of a loss: it takes the model, the examples of one pass and all
# examples of the step. Its denominators count the whole step, so that cutting a step
# into passes never changes the gradient, apart from rounding. It returns (loss, what
# this pass adds to the logged loss).


def next_token_loss(model, examples, step_examples):
    """DeepSeek-V3's loss on documents: next token, MTP and balance of the experts. The
    log has the next token's part alone."""
    loss, info = supervised_loss(model, *batch_of(model, examples),
                                 count_targets(step_examples), len(step_examples))
    return loss, info["loss"]


def distillation_loss(teacher):
    """Hinton's distillation: forward KL(teacher || student), here at temperature 1. R1
    itself distils by SFT only."""
    def loss(model, examples, step_examples):
        tokens, document, weight = batch_of(model, examples)
        predicting = F.pad(weight[:, 1:] > 0, (0, 1))  # the logits at t predict token t + 1
        inputs = {"tokens": tokens, "real": document > 0, "document": document,
                  "logits_at": predicting}
        with torch.no_grad():
            teacher_logp = teacher(**inputs).logits.log_softmax(-1)
        student_logp = model(**inputs).logits.log_softmax(-1)
        kl = F.kl_div(student_logp, teacher_logp, reduction="sum", log_target=True)
        kl = kl / count_targets(step_examples)
        return kl, kl.detach()
    return loss


def pairwise_loss(reward_model, examples, step_examples):
    """The loss of the helpfulness reward model, on pairs of tasks.Judgement."""
    better = judge_scores(reward_model, [pair.tokens for pair in examples], tasks.PAD_ID)
    worse = judge_scores(reward_model, [pair.worse for pair in examples], tasks.PAD_ID)
    loss = preference_loss(better, worse) / len(step_examples)
    return loss, loss.detach()


def pointwise_loss(reward_model, examples, step_examples):
    """The loss of the safety reward model, on labels of tasks.Judgement."""
    scores = judge_scores(reward_model, [example.tokens for example in examples], tasks.PAD_ID)
    labels = torch.tensor([example.safe for example in examples], device=scores.device)
    loss = safety_loss(scores, labels) / len(step_examples)
    return loss, loss.detach()


def train(model, s, draw, seed, state=None, loss=next_token_loss):
    """Lowers a loss on examples drawn by draw(rng). The only supervised loop.

    Trains the model in place. A generator of (record, snapshot) after each step.
    snapshot() is all that a stopped run needs besides the weights; call it before the
    next step. A continued run on a CPU is bit-identical to an unbroken one, since each
    step draws its examples from the seed and the step's number alone.
    """
    optimizers = make_optimizers(model, s.lr, s.muon_lr)
    first = 0
    if state:
        first = state["step"]
        restore_all(optimizers, state["optimizers"])
    model.train()
    for step in range(first, s.steps):
        # Every process draws all examples, and trains on its share of the passes.
        rng = random.Random(f"{seed}/train/{step}")
        examples = [draw(rng) for _ in range(s.documents)]
        if isinstance(examples[0], tasks.Document):
            examples = pack(examples, s.row_tokens)
        lengths = [len(example.tokens) for example in examples]
        total_loss = torch.zeros((), dtype=torch.float64)
        for rows in micro_batches(lengths, range(len(examples)), s.micro_tokens):
            pass_loss, logged = loss(model, [examples[i] for i in rows], examples)
            pass_loss.backward()
            total_loss += float(logged)
        factor = learning_rate_at(step, s.steps, s.warmup, s.decay)
        record = {"step": step + 1, "loss": float(all_sum(total_loss)),
                  "tokens": sum(map(count_tokens, examples))}
        record |= optimizer_update(model, optimizers, factor)
        yield record, lambda: {"step": step + 1,
                               "optimizers": [o.state_dict() for o in optimizers]}


def pack(documents, row_tokens):
    """Packs documents into rows of at most row_tokens tokens: longest document first,
    each into the first row with room. A document longer than that gets a row of its own.
    """
    rows = []
    for document in sorted(documents, key=lambda d: len(d.tokens), reverse=True):
        room = row_tokens - len(document.tokens)
        row = next((row for row in rows if len(row.tokens) <= room), None)
        if row is None:
            row = Row([], [], [])
            rows.append(row)
        number = row.document[-1] + 1 if row.document else 1
        row.tokens += document.tokens
        row.weight += document.weight
        row.document += [number] * len(document.tokens)
    return rows


@dataclass
class Row:
    """Documents one after the other."""
    tokens: list[int]    # ids
    weight: list[int]    # of each token in the loss, as in tasks.Document
    document: list[int]  # which of the documents each token is in, from 1


def batch_of(model, rows):
    """tokens, document and weight (B, T) of rows, on the model's device. document is 0
    at padding."""
    tokens = pad_right([row.tokens for row in rows], tasks.PAD_ID, model.device)
    document = pad_right([row.document for row in rows], 0, model.device)
    weight = pad_right([row.weight for row in rows], 0, model.device).float()
    return tokens, document, weight


def count_targets(documents):
    """The number of tokens that are predicted: their weight is 1, that of all others is
    0."""
    return sum(sum(document.weight) for document in documents)


def count_tokens(example):
    """The tokens of a document, of a labelled response, or of both responses of a pair.
    """
    return len(example.tokens) + len(getattr(example, "worse", None) or [])


# ------------------------------------------------------------------------------
# What the stages share


def pretrain(folder, name, config, s):
    """A model from random weights, trained on the base corpus."""
    torch.manual_seed(folder.run.seed)
    model = folder.place(moe.Transformer(config))

    def draw(rng):
        return tasks.make_document(rng, folder.run.corpus)

    model = supervised(folder, name, model, s, draw)
    print_styles(folder, name)
    return model


def supervised(folder, name, model, s, draw, loss=next_token_loss):
    """A supervised stage: a copy of the model is trained, then tested."""
    def loop(m, state):
        return train(m, s, draw, folder.run.seed, state, loss)

    watch = Watch(folder, name, every=s.dev_every, steps=s.steps)
    # stage() runs the loop, logs, saves, and goes on where a stopped run ended.
    model = folder.stage(name, copy_model(model), loop, s.steps, watch)
    test_stage(folder, name, model)
    return model


def one_of(documents):
    """A function (rng) -> a random one of these documents."""
    return lambda rng: rng.choice(documents)


def rl(folder, name, models, before, s, reward_models=None):
    """A stage of RL: a copy of the model of the stage before is trained, then tested."""
    rewards = rule_rewards(s)
    if reward_models:
        rewards["preference"] = (s.preference_weight, preference_reward(*reward_models))
    task = make_task(folder.run, s, rewards)

    def loop(m, state):
        return train_rl(m, task, s, folder.run.seed, state)

    watch = Watch(folder, name, every=s.dev_every, steps=s.steps, settings=s, before=before)
    model = folder.stage(name, copy_model(models[before]), loop, s.steps, watch)
    test_stage(folder, name, model)
    return model


def make_task(run, s, rewards):
    """The problems of RL, and these rewards, for train_rl. General prompts join late in the
    run."""
    def draw(rng, n, step):
        share = s.general if step >= s.general_from * s.steps else 0.0
        return [tasks.make_prompt(rng) if rng.random() < share
                else draw_problem(rng, run, s.levels) for _ in range(n)]

    return Task(draw=draw, encode=lambda problem: tasks.encode_prompt(problem.question),
                decode=tasks.decode, rewards=rewards, measures=tasks.MEASURES,
                end_id=tasks.END_ID, pad_id=tasks.PAD_ID)


def rule_rewards(s):
    """{name: (weight, reward)} of the rules with a weight (R1 v2 eq 4). Accuracy is
    always included, so that it is logged; it is nan for general prompts. The others
    apply to these too.
    """
    def accuracy(text, problem):
        return tasks.accuracy(text, problem) if problem.kind == "sum" else math.nan

    rewards = {"accuracy": (s.accuracy_weight, for_each(accuracy))}
    if s.format_weight:
        rewards["format"] = s.format_weight, for_each(tasks.format_reward)
    if s.language_weight:
        rewards["language_reward"] = s.language_weight, for_each(
            lambda text, problem: tasks.language_share(text, problem.language))
    return rewards


def for_each(rule):
    """A rule (text, problem) -> number as a reward (texts, problems) -> numbers."""
    return lambda texts, problems: [float(rule(t, p)) for t, p in zip(texts, problems)]


def preference_reward(helpful_model, safety_model):
    """The reward of the two reward models, 0 to 1; nan for problems (R1 v2 section 3.1).

    The safety model reads the whole response to a harmful request. The helpfulness model
    reads what the reader is shown of any other response, and never the thinking.
    """
    def whole_response(text):
        return text

    # (model, what it reads, kinds of prompts that it scores)
    views = ((helpful_model.eval(), tasks.shown_part, tasks.HELPFUL),
             (safety_model.eval(), whole_response, ("unsafe",)))

    @torch.no_grad()
    def reward(texts, problems):
        rewards = [0.0 if p.kind in tasks.GENERAL else math.nan for p in problems]
        for model, view, kinds in views:
            rows, sequences = [], []
            for i, (text, problem) in enumerate(zip(texts, problems)):
                seen = view(text)
                if problem.kind in kinds and seen:  # an empty reply keeps 0
                    ids = tasks.encode_prompt(problem.question) + tasks.encode_response(seen)
                    rows.append(i)
                    sequences.append(ids[:model.config.max_seq_len])
            scores = [score for part in reading_passes(sequences)
                      for score in judge_scores(model, part, tasks.PAD_ID)]
            for i, score in zip(rows, scores):
                # Rounding makes nearly equal scores equal. Otherwise GRPO, which divides
                # by the standard deviation, makes large advantages of tiny differences.
                rewards[i] = round(float(score.sigmoid()), 2)
        return rewards
    return reward


def train_reward_model(folder, name, model, draw, loss):
    """Trains a reward model: a head with one output (R1 v2 section 3.1). It starts from
    Dev3's weights, which is our choice."""
    run = folder.run
    torch.manual_seed(run.seed)
    config = dataclasses.replace(model.config, n_outputs=1, n_mtp_layers=0)
    reward_model = folder.place(moe.Transformer(config))
    weights = {key: weight for key, weight in model.state_dict().items()
               if not key.startswith(("head.", "mtp."))}
    reward_model.load_state_dict(weights, strict=False)  # its head stays random

    def loop(m, state):
        return train(m, run.judge, draw, run.seed, state, loss)

    def no_watch(model, record, bar):
        """Reward models are not evaluated on dev."""

    return folder.stage(name, reward_model, loop, run.judge.steps, no_watch)


def draw_problem(rng, run, levels):
    """A random train problem, put as in the corpus: mostly with stray spaces."""
    level = rng.choice(levels)
    problem = tasks.make_problem(rng, level, "train", products=run.corpus.products)
    if rng.random() < run.corpus.spaced:
        problem = tasks.add_spaces(problem, rng)
    return problem


def is_fit(text, problem):
    """Whether an answer is right, readable, and only in the language of the question."""
    return (tasks.accuracy(text, problem) and tasks.is_readable(text)
            and tasks.language_share(text, problem.language) == 1.0)


def teacher_answers(folder, models):
    """What students learn from: R1's right answers, or the user's dialogues."""
    if folder.run.data_file:
        return read_dialogues(folder.run.data_file, folder.run.student.max_seq_len)
    return collect(folder, "distill", models["r1"], folder.run.data.distill, keep=is_fit)


def collect(folder, name, model, n, keep, change=lambda text, problem: text):
    """Rejection sampling. The model answers n train problems `tries` times. Answers for
    which keep(text, problem) holds become change(text, problem), and are written to
    NAME.jsonl in chat format. Duplicates are dropped. Returns them as documents.

    If the file is there already, it is only read.
    """
    run, path = folder.run, folder.path / f"{name}.jsonl"
    longest = min(run.model.max_seq_len, run.student.max_seq_len)
    if any_process(not path.exists()):  # all processes take one branch
        # Remove from the log what a stopped attempt wrote.
        folder.cut(folder.begun(name, collected=True))
        began, rng = time.monotonic(), random.Random(f"{run.seed}/{name}")
        problem_of_answer = []
        for _ in range(n):
            problem_of_answer += [draw_problem(rng, run, run.zero.levels)] * run.data.tries
        prompts = prompts_of(problem_of_answer)
        ids = sample_answers(model, prompts, run.zero.max_new_tokens, run.eval.rows,
                             seed=run.seed, name=f"{name}: samples")
        lines = {}  # a dict keeps the order and drops duplicates
        for answer_ids, problem in zip(ids, problem_of_answer):
            text = tasks.decode(answer_ids)
            if keep(text, problem):
                text = change(text, problem)
                # Encoded again, a text can have more tokens than were sampled.
                if len(tasks.dialogue(problem, text).tokens) <= longest:
                    lines[jsonl_dialogue(problem.question, text)] = None
        if not lines and run.data.stand_in:
            for problem in problem_of_answer:
                working, number = tasks.write_working(problem, "checked", rng)
                lines[jsonl_dialogue(problem.question, tasks.response(working, number))] = None
        if not lines:
            raise UserError(f"{name}: none of {len(ids)} answers can be used; train the "
                            "model that writes them for longer")
        folder.log({"kind": "collected", "stage": name, "kept": len(lines), "of": len(ids),
                    "tokens": sum(map(len, ids)),
                    "prompt_tokens": sum(map(len, prompts))})
        folder.write(path, "".join(lines))
        folder.clock(f"collect_{name}", step=0, began=began)
        folder.check()  # ends here if Ctrl-C was pressed
    return read_dialogues(path, longest)


def read_dialogues(path, longest):
    """The documents of a file of dialogues; UserError if one has more than `longest`
    tokens."""
    documents = []
    for number, (question, text) in enumerate(read_chat(path), 1):
        problem = tasks.Problem(question, answer="", language="")  # only the question counts
        document = tasks.dialogue(problem, text)
        if len(document.tokens) > longest:
            raise UserError(f"{path}: dialogue {number} has {len(document.tokens)} tokens; "
                            f"at most {longest} fit")
        documents.append(document)
    return documents


# ------------------------------------------------------------------------------
# Settings


# The settings of RL, and their defaults, are grpo.RL.


@dataclass(frozen=True)
class Train:
    """Settings of the supervised loop."""
    steps: int = 1000
    documents: int = 80            # in a step
    lr: float = 1e-2               # of AdamW: embedding, head, norms, router
    muon_lr: float = 1e-2          # of Muon: all other matrices; 0: AdamW updates them
    warmup: int = 20               # steps in which the learning rates rise from 0
    decay: float = 0.4             # last share of the steps, in which they fall to 0
    row_tokens: int = 128          # of the rows that documents are packed into
    micro_tokens: int = 2048       # tokens in one pass; changes memory and speed only
    dev_every: int = 250           # steps between evaluations on dev


@dataclass(frozen=True)
class Evaluation:
    """How a model is tested. Choices are made on dev; test is for reporting."""
    problems: int = 500            # test problems, evenly over the levels
    samples: int = 16              # answers per problem on dev; and on test, for base and
                                   # zero, at temperature 1
    fewer_samples: int = 4         # answers per problem in all other tests
    temperature: float = 0.6       # R1's (R1 v1 section 3)
    top_p: float = 0.95            # R1's
    longer: int = 100              # test problems one step longer than any in training,
                                   # and as many two steps longer
    dev_problems: int = 48         # asked between steps, at temperature 1
    rows: int = 2048               # answers sampled at once; another number, other answers


@dataclass(frozen=True)
class Data:
    """Data that models make for models. In brackets: the paper's numbers of samples."""
    cold_start: int = 400          # problems that Zero answers for Dev1 [thousands]
    rejection: int = 1500          # problems that Dev2 answers for Dev3 [600K]
    distill: int = 1500            # problems that R1 answers for the student [800K]
    tries: int = 2                 # answers to each, at temperature 1
    general: float = 0.25          # share of general replies in Dev3's data [200K of 800K]
    prompts: int = 100             # held-out general prompts of each kind, no two alike,
                                   # 4 answers each
    stand_in: bool = False         # worked solutions, if no answer can be used (micro)


PRESETS = {
    "micro": moe.Config(
        dim=32, inter_dim=64, moe_inter_dim=32, n_layers=2, n_heads=2, n_routed_experts=4,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16),
    "nano": moe.NANO,
    "laptop": moe.Config(
        dim=256, inter_dim=768, moe_inter_dim=128, n_layers=6, n_heads=8,
        n_routed_experts=16, n_activated_experts=4, route_scale=2.5, kv_lora_rank=64,
        qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, init_std=0.02,
        max_seq_len=1024),
    "node": moe.Config(
        dim=1024, inter_dim=4096, moe_inter_dim=512, n_layers=16, n_heads=16,
        n_routed_experts=32, n_activated_experts=4, n_expert_groups=8, n_limited_groups=4,
        route_scale=2.5, q_lora_rank=384, kv_lora_rank=256, qk_nope_head_dim=64,
        qk_rope_head_dim=64, v_head_dim=128, init_std=0.006, max_seq_len=4096),
    "v3": moe.V3,
    "student": moe.Config(dim=48, inter_dim=144, n_dense_layers=3, n_mtp_layers=0),  # dense
}


@dataclass(frozen=True)
class Run:
    """Everything that determines a run."""
    preset: str = "nano"
    seed: int = 0
    start: str = ""                # checkpoint of another run, which has the earlier models
    data_file: str = ""            # dialogues to distil from, instead of R1's answers
    device: str = "cpu"            # cpu, cuda or mps
    dtype: str = "float32"         # of the forward pass
    model: moe.Config = moe.NANO
    student: moe.Config = PRESETS["student"]
    corpus: tasks.Corpus = field(default_factory=tasks.Corpus)
    base: Train = Train()
    zero: RL = RL(steps=24, minibatches=4)
    # After 50 steps Dev1 would not mix languages any more, and Dev2's language reward
    # would have nothing to do.
    dev1: Train = Train(steps=20, documents=48, lr=2e-3, muon_lr=2e-3)
    dev2: RL = RL(steps=14, problems=32, decay=0.0, language_weight=0.5)
    # At higher rates Dev3 forgets how to go on to chains that are longer than those it is
    # trained on.
    dev3: Train = Train(steps=160, documents=64, lr=1e-3, muon_lr=1e-3)
    judge: Train = Train(steps=60, documents=64, lr=5e-3, muon_lr=5e-3)  # reward models
    r1: RL = RL(steps=20, problems=32, lr=1e-4, decay=0.0, language_weight=0.5,
                temperature=0.7, general=0.5, dev_every=10)
    student_base: Train = Train(steps=400)
    distill: Train = Train(steps=320, documents=48)
    student_rl: RL = RL(steps=96, problems=48, minibatches=4, dev_every=24,
                        max_new_tokens=140)
    distill_rl: RL = RL(steps=12, lr=1e-4, dev_every=6)
    data: Data = Data()
    eval: Evaluation = Evaluation()


if __name__ == "__main__":
    from tools.cli import main
    sys.exit(main())
