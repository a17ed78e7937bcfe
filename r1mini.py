"""r1mini: DeepSeek-R1 in miniature. The pipeline, evaluation and the command line.

    python r1mini.py                     every stage on the nano preset, into runs/nano
    python r1mini.py base | zero         up to that stage; zero --from CKPT starts from another base
    python r1mini.py eval CKPT           pass@1, vote and pass@k, on held-out problems or your own
    python r1mini.py chat CKPT           talk to it; the thinking apart from the answer
    python r1mini.py report RUN RUN ...  means and spread over runs; --to results/NAME keeps them
    python r1mini.py study NAME          the runs behind a table of the README
    python r1mini.py cost --preset v3    what a preset's sizes come to

A run folder holds config.json, log.jsonl (without a clock: two runs compare to the bit),
timing.jsonl, checkpoints, samples.md and report.md. The same command goes on where a run stopped.
"""
import argparse
import contextlib
import dataclasses
import difflib
import errno
import importlib
import json
import math
import os
import platform
import random
import re
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import moe
import tasks
from grpo import OBJECTIVES, RL, SETTINGS, Task, advice, micro_batches, train_rl
from moe import UserError

# -------------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class Train:
    """Settings of the supervised loop."""
    steps: int = 1200
    documents: int = 80            # a step
    lr: float = 1e-2               # AdamW: embedding, head, norms, router
    muon_lr: float = 1e-2          # Muon: the matrices between; 0: AdamW for all
    warmup: int = 20               # steps
    decay: float = 0.4             # share of the steps over which the learning rates fall to 0
    micro_tokens: int = 3000       # tokens in one forward pass; memory and speed only
    dev_every: int = 250           # steps between evaluations on dev


@dataclass(frozen=True)
class Evaluation:
    """How a model is asked. Choices are made on dev; test is for what is reported."""
    problems: int = 500            # test problems, evenly over the levels
    samples: int = 16              # answers to each
    temperature: float = 0.6       # as R1 is evaluated (R1 v1 section 3)
    top_p: float = 0.95
    longer: int = 100              # test problems of each of the two levels above any in training
    dev_problems: int = 64
    dev_every: int = 5             # RL steps between evaluations on dev, at temperature 1
    rows: int = 1024               # answers written at a time, and with it which random numbers


@dataclass(frozen=True)
class Run:
    """Everything that determines a run."""
    preset: str = "nano"
    seed: int = 0
    start: str = ""                # checkpoint that zero starts from, if not this run's own base
    device: str = "cpu"            # the kind: cpu, cuda, mps
    dtype: str = "float32"         # of the forward pass
    model: moe.Config = field(default_factory=moe.Config)
    corpus: tasks.Corpus = field(default_factory=tasks.Corpus)
    base: Train = field(default_factory=Train)
    zero: RL = field(default_factory=RL)
    eval: Evaluation = field(default_factory=Evaluation)


# What a preset changes beside the model's sizes: larger models learn longer chains, with products.
LARGE = {"corpus.products": 0.2, "corpus.levels": (1, 2, 3, 4, 5, 6, 7),
         "zero.levels": (4, 5, 6, 7), "zero.max_new_tokens": 400}
TRAINING = {
    "micro": {"base.steps": 20, "base.documents": 16, "base.dev_every": 10, "zero.steps": 4,
              "zero.problems": 4, "zero.group_size": 4, "zero.max_new_tokens": 48,
              "zero.reference_every": 2, "eval.problems": 8, "eval.samples": 4, "eval.longer": 2,
              "eval.dev_problems": 4, "eval.dev_every": 2},
    "nano": {},
    "laptop": LARGE | {"base.steps": 4000, "base.documents": 256, "base.lr": 1e-3,
                       "zero.lr": 1e-4, "zero.steps": 200},
    "node": LARGE | {"base.steps": 20000, "base.documents": 1024, "base.lr": 5e-4,
                     "zero.lr": 2e-5, "zero.steps": 500, "zero.problems": 128},
}


def convert(key, text, like):
    """The value of a text in the type of `like`; UserError if it is none."""
    kinds = {bool: "true or false", tuple: "whole numbers with commas between",
             int: "a whole number", float: "a number"}
    try:
        if isinstance(like, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(like, tuple):
            return tuple(int(x) for x in text.split(","))
        value = type(like)(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError
        return value
    except (ValueError, KeyError):
        raise UserError(f"--set {key}: wanted {kinds[type(like)]}, got {text!r}") from None


def flat(tree, prefix=""):
    """A nested dict as {dotted key: value}."""
    return {key: leaf for name, value in tree.items() for key, leaf in (
        flat(value, f"{prefix}{name}.") if isinstance(value, dict)
        else {prefix + name: value}).items()}


def change(run, key, value):
    """The Run with one field, such as zero.lr, set to a value or to the text of one."""
    keys = [known for known in flat(dataclasses.asdict(run)) if "." in known]
    if key not in keys:
        near = difflib.get_close_matches(key, keys, 1, 0.0)[0]
        raise UserError(f"--set: there is no setting {key!r}; the nearest is {near}")
    part, name = key.split(".")
    settings = getattr(run, part)
    value = convert(key, value, getattr(settings, name)) if isinstance(value, str) else value
    return dataclasses.replace(run, **{part: dataclasses.replace(settings, **{name: value})})


def resolve(preset, assignments, **fields):
    """The Run of a preset and the user's key=value texts; UserError if they make no sense."""
    if preset not in TRAINING:
        raise UserError(f"--preset {preset} is for counting (cost); train {', '.join(TRAINING)}")
    model = dataclasses.replace(moe.PRESETS[preset], vocab_size=tasks.VOCAB_SIZE)
    run = Run(preset, model=model, **fields)
    pairs = [assignment.partition("=") for assignment in assignments]
    for key, equals, _ in pairs:
        if not equals:
            raise UserError(f"--set {key}: wanted key=value, such as --set zero.lr=1e-4")
    objective = {key: value for key, _, value in pairs}.get("zero.objective", run.zero.objective)
    if objective not in OBJECTIVES:
        raise UserError(f"--set zero.objective={objective}: choose one of {', '.join(OBJECTIVES)}")
    method = {f"zero.{key}": value for key, value in SETTINGS[objective].items()}
    for key, value in [*TRAINING[preset].items(), *method.items(), *((k, v) for k, _, v in pairs)]:
        run = change(run, key, value)
    check(run)
    return run


MAY_BE_ZERO = {"seed", "model.n_dense_layers", "model.n_mtp_layers", "model.q_lora_rank",
               "base.warmup", "zero.warmup", "zero.overlong"}


def check(run):
    """UserError if settings make no sense, or contradict each other."""
    for key, value in flat(dataclasses.asdict(run)).items():
        least = int(type(value) is int and key not in MAY_BE_ZERO)
        if isinstance(value, (int, float)) and value < least and key != "seed":
            raise UserError(f"{key} must be at least {least}")
    m, c, z, e = run.model, run.corpus, run.zero, run.eval
    shares = dataclasses.astuple(dataclasses.replace(c, levels=0, drill=0))
    grouped = m.n_limited_groups * (m.n_routed_experts // m.n_expert_groups)
    for wrong, message in (
            (z.overlong >= z.max_new_tokens, "zero.overlong must be below zero.max_new_tokens"),
            (max(shares) > 1 or c.direct + c.steps + c.checked > 1 + 1e-9,
             "the corpus' shares must not exceed 1, nor its styles' together"),
            (m.vocab_size != tasks.VOCAB_SIZE, f"model.vocab_size must be {tasks.VOCAB_SIZE}"),
            (m.qk_rope_head_dim % 2, "model.qk_rope_head_dim must be even: pairs are rotated"),
            (m.dim % 8 or m.moe_inter_dim % 8, "model.dim and moe_inter_dim: multiples of 8 only"),
            (m.n_dense_layers > m.n_layers, "model.n_dense_layers exceeds n_layers"),
            (m.n_mtp_layers not in (0, 1), "model.n_mtp_layers must be 0 or 1"),
            (m.n_routed_experts % m.n_expert_groups, "n_expert_groups must divide the experts"),
            (m.n_routed_experts < 2 * m.n_expert_groups, "a group needs at least 2 experts"),
            (m.n_limited_groups > m.n_expert_groups, "n_limited_groups exceeds n_expert_groups"),
            (m.n_activated_experts > grouped, "n_activated_experts exceeds the experts to be had"),
            (not 2 <= min(z.levels) <= max(z.levels) <= 7,
             "zero.levels must be within 2..7: single steps are in the drills, so not held out"),
            (not 1 <= min(c.levels) <= max(c.levels) <= 7, "corpus.levels must be within 1..7"),
            (z.group_size < 2, "zero.group_size must be at least 2: an advantage compares answers"),
            (z.minibatches > z.problems * z.group_size, "zero.minibatches exceeds the answers"),
            (z.temperature <= 0, "zero.temperature must be above 0: RL needs different answers"),
            (not 0 < e.top_p <= 1, "eval.top_p must be above 0 and at most 1"),
            (m.max_seq_len < 300, "model.max_seq_len must be at least 300, for the corpus"),
            (z.max_new_tokens + 30 > m.max_seq_len, "zero.max_new_tokens exceeds max_seq_len")):
        if wrong:
            raise UserError(message)


# -------------------------------------------------------------------------------------------------
# The supervised loop


def train(model, s, document, seed, state=None):
    """V3's loss on documents drawn by document(rng): the only supervised loop.

    Trains the model in place; a generator of (record, snapshot) after each step, where snapshot()
    is the state to continue from, to the same bits: each step draws its documents afresh from the
    seed and its own number.
    """
    optimizers = moe.make_optimizer(model, s.lr, s.muon_lr)
    device, first = model.head.weight.device, state["step"] if state else 0
    for optimizer, saved in zip(optimizers, state["optimizers"] if state else ()):
        optimizer.load_state_dict(saved)
    model.train()
    for step in range(first, s.steps):
        rng = random.Random(f"{seed}/train/{step}")
        documents = [document(rng) for _ in range(s.documents)]
        lengths = [len(d.tokens) for d in documents]
        targets = sum(sum(d.weight) for d in documents)  # counted over the whole batch first
        loss = 0.0
        for rows in micro_batches(lengths, range(len(documents)), s.micro_tokens):
            tokens = moe.pad([documents[i].tokens for i in rows], tasks.PAD_ID, device)
            weight = moe.pad([documents[i].weight for i in rows], 0, device).float()
            part, info = moe.supervised_loss(model, tokens, tokens != tasks.PAD_ID, weight, targets,
                                             len(documents))
            part.backward()
            loss += float(info["loss"])
        factor = moe.learning_rate_at(step, s.steps, s.warmup, s.decay)
        record = {"step": step + 1, "loss": loss, "tokens": sum(lengths)}
        yield record | moe.update(model, optimizers, factor), lambda: {
            "step": step + 1, "optimizers": [o.state_dict() for o in optimizers]}


# -------------------------------------------------------------------------------------------------
# Evaluation


def mean(values):
    """The mean of numbers, rounded for the log; None of none."""
    values = [float(v) for v in values]
    return round(sum(values) / len(values), 6) if values else None


def evaluate(model, problems, samples, temperature, top_p, max_new_tokens, rows=1024, seed=0,
             quiet=True):
    """Asks each problem `samples` times. Returns (means, one record a problem in order)."""
    texts, lengths, finished, many = [], [], [], max(1, rows // samples)
    asked = [p for p in problems for _ in range(samples)]
    for i in tqdm(range(0, len(problems), many), "answers", disable=quiet):
        prompts = [tasks.encode_prompt(p.question) for p in asked[i * samples:(i + many) * samples]]
        out = moe.generate(model, prompts, max_new_tokens, tasks.END_ID, tasks.PAD_ID, temperature,
                           top_p, seed=seed * 1_000_003 + i)
        texts += [tasks.decode(ids) for ids in out.answers()]
        lengths += out.answer.sum(1).tolist()
        finished += out.finished.tolist()
    right = [tasks.accuracy(text, problem) for text, problem in zip(texts, asked)]
    each = []
    for i, problem in enumerate(problems):
        mine = slice(i * samples, (i + 1) * samples)
        vote = tasks.majority([tasks.parse(text)[1] for text in texts[mine]])
        each.append({"question": problem.question, "answer": problem.answer, "level": problem.level,
                     "right": int(sum(right[mine])), "vote": vote, "length": mean(lengths[mine])})
    levels = sorted({p.level for p in problems})
    record = {"problems": len(problems), "samples": samples, "temperature": temperature,
              "top_p": top_p}
    for k in (k for k in (1, 2, 4, 8, 16, 32, 64) if k <= samples):
        record[f"pass@{k}"] = mean(tasks.pass_at_k(samples, e["right"], k) for e in each)
    record[f"cons@{samples}"] = mean(e["vote"] == e["answer"] for e in each)
    record |= {"length": mean(lengths), "cut_off": 1 - mean(finished)}
    for name, measure in (tasks.MEASURES | {"format": tasks.format_reward}).items():
        record[name] = mean(measure(text, problem) for text, problem in zip(texts, asked))
    record["by_level"] = {str(n): mean(e["right"] / samples for e in each if e["level"] == n)
                          for n in levels}
    styles = [tasks.style_of(t) if tasks.parse(t)[1] is not None else "" for t in texts]
    record["by_style"] = {style: {"share": mean(s == style for s in styles)} | {
        str(n): mean(r for r, s, p in zip(right, styles, asked) if s == style and p.level == n)
        for n in levels} for style in tasks.STYLES}  # of the answers that can be read
    return record, each


# -------------------------------------------------------------------------------------------------
# Runs: what is kept, and where a stopped one goes on


def read_log(path):
    """The records of a run's log.jsonl; UserError if the folder holds no run."""
    try:
        lines = (Path(path) / "log.jsonl").read_text("utf-8").split("\n")
        return [json.loads(line) for line in lines if line]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no run in this folder (no log.jsonl)") from None
    except ValueError:
        raise UserError(f"{path}/log.jsonl is damaged; start over with --fresh") from None


def machine():
    """The processor's name and how many of its cores this process sees."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        name = re.findall("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text("utf-8"))[0]
    return f"{name}, {os.cpu_count()} cores"


def peak_gib():
    """The largest resident memory of this process so far, GiB; 0 where it is not told (Windows)."""
    with contextlib.suppress(ImportError):
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on a Mac bytes
        return round(peak / 2 ** (30 if sys.platform == "darwin" else 20), 3)
    return 0.0


class Folder:
    """A run's folder: its settings, log, clock and checkpoints."""

    FILES = ("config.json", "log.jsonl", "timing.jsonl", "samples.md", "report.md",
             "base.pt", "base.partial.pt", "zero.pt", "zero.partial.pt")

    def __init__(self, path, run, options):
        self.path, self.run, self.options, self.stop = Path(path), run, options, False
        self.path.mkdir(parents=True, exist_ok=True)
        config, known = json.loads(json.dumps(dataclasses.asdict(run))), self.path / "config.json"
        if options.fresh:
            if run.start and Path(run.start).resolve().parent == self.path.resolve():
                raise UserError(f"--fresh would delete {run.start}: choose another --out")
            for name in self.FILES:
                (self.path / name).unlink(missing_ok=True)
        if known.exists():
            try:
                old, new = flat(json.loads(known.read_text("utf-8"))), flat(config)
            except ValueError:
                raise UserError(f"{known} is damaged; start over with --fresh") from None
            if other := sorted(key for key in old | new if old.get(key) != new.get(key)):
                raise UserError(f"{self.path} holds a run with other settings ({', '.join(other)})"
                                ": choose another --out, or --fresh to start over")
            self.cut((self.path / "log.jsonl").read_bytes().rfind(b"\n") + 1)  # torn by a kill
        else:
            (self.path / "log.jsonl").write_text("", "utf-8")
            versions = {"python": platform.python_version(), "torch": torch.__version__}
            self.log({"kind": "config", "versions": versions} | config)
            known.with_suffix(".tmp").write_text(json.dumps(config, indent=1), "utf-8")
            known.with_suffix(".tmp").replace(known)
        self.log({"machine": machine(), "threads": torch.get_num_threads()}, "timing.jsonl")

    def log(self, record, name="log.jsonl"):
        """Appends a record to log.jsonl."""
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def clock(self, stage, step, began, tokens=0, worked=None):
        """Appends to timing.jsonl, the one place where time is kept. seconds are all since
        `began`; tokens a second are of the step alone, which took `worked` seconds."""
        record = {"stage": stage, "step": step, "seconds": round(time.monotonic() - began, 3)}
        if worked:
            record |= {"tokens": tokens, "tokens_per_second": round(tokens / worked)}
        self.log(record | {"peak_gib": peak_gib()}, "timing.jsonl")

    def position(self):
        """Bytes of log.jsonl so far, safe on disk; a checkpoint remembers them."""
        with open(self.path / "log.jsonl", "ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def cut(self, position):
        """Shortens log.jsonl: what came after will be done, and logged, again."""
        with open(self.path / "log.jsonl", "r+b") as file:
            file.truncate(position)

    def begun(self, name):
        """Where in log.jsonl a stage's first record stands, or would."""
        position = 0
        for line in (self.path / "log.jsonl").read_bytes().splitlines(keepends=True):
            if name in (json.loads(line)["kind"], json.loads(line).get("stage")):
                break
            position += len(line)
        return position

    def stage(self, name, model, loop, steps, watch):
        """Runs loop(model, state), a generator of (record, snapshot), and returns the model.

        Each record is logged and shown to watch(model, record, bar); a checkpoint is saved every
        --save-every steps and at the end. A finished stage is loaded instead; one that was stopped
        goes on from its last save, and what was logged since then is done again.
        """
        options, state = self.options, None
        final, partial = self.path / f"{name}.pt", self.path / f"{name}.partial.pt"
        if final.exists():
            print(f"{name}: finished before, {final}")
            return moe.load(final, options.device, options.dtype)[0]
        if partial.exists():
            model, state = moe.load(partial, options.device, options.dtype)
            print(f"{name}: goes on after step {state['step']} of {steps}")
        self.cut(state["log"] if state else self.begun(name))
        began = time.monotonic()
        with tqdm(total=steps, initial=state["step"] if state else 0, desc=name,
                  dynamic_ncols=True) as bar:
            if not state:
                watch(model, {"step": 0}, bar)
            started = time.monotonic()
            for record, snapshot in loop(model, state):
                worked = time.monotonic() - started
                self.log({"kind": name} | record)
                watch(model, record, bar)
                kept = {"log": self.position(), "preset": self.run.preset}
                if record["step"] == steps:
                    moe.save(final, model, **kept)
                    partial.unlink(missing_ok=True)
                elif self.stop or record["step"] % options.save_every == 0:
                    moe.save(partial, model, **kept, **snapshot())
                self.clock(name, record["step"], began, record["tokens"], worked)
                shown = {k: record[k] for k in ("loss", "accuracy", "length") if k in record}
                speed = {"tok/s": f"{record['tokens'] / worked:.0f}"}
                bar.set_postfix(shown | speed, refresh=False)
                bar.update()
                if self.stop:
                    raise KeyboardInterrupt
                began = started = time.monotonic()
        return model

    def interrupt(self, *_):
        """Ctrl-C: the step at hand is ended and saved; a second one stops at once."""
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True
        print("\nending this step and saving (Ctrl-C again: stop now)", file=sys.stderr)


# -------------------------------------------------------------------------------------------------
# Stages


def watcher(folder, stage, every, steps):
    """What happens after a step: evaluation on dev, sample answers, the teacher's sentences."""
    run, s, said = folder.run, folder.run.eval, set()
    dev = tasks.make_problems("dev", s.dev_problems, run.zero.levels, run.corpus.products)
    shown = tasks.make_problems("test", 2 * len(run.zero.levels), run.zero.levels,
                                run.corpus.products, "shown")

    def watch(model, record, bar):
        step = record["step"]
        if step == 0 and stage == "base":
            return  # random weights
        for keyword, sentence in advice(record, run.zero) if step and stage == "zero" else []:
            if keyword not in said:
                bar.write(f"  note: {sentence}")
                said.add(keyword)
        if step % every == 0 or step == steps:
            r, _ = evaluate(model, dev, s.samples, 1.0, 1.0, run.zero.max_new_tokens, s.rows)
            folder.log({"kind": "dev", "stage": stage, "step": step} | r)
            bar.write(f"  {stage} {step:>4}: dev pass@1 {r['pass@1']:.3f}  "
                      f"vote {r[f'cons@{s.samples}']:.3f}  length {r['length']:5.1f}  "
                      f"checks {r['reflection']:.2f}  mixed {r['mixing']:.2f}")
        if step in (0, steps // 2, steps):
            prompts = [tasks.encode_prompt(p.question) for p in shown]
            out = moe.generate(model, prompts, run.zero.max_new_tokens, tasks.END_ID, tasks.PAD_ID,
                               s.temperature, s.top_p)
            folder.log({"kind": "samples", "stage": stage, "step": step, "answers": [
                [p.question, p.answer, tasks.decode(ids)] for p, ids in zip(shown, out.answers())]})
    return watch


def test_stage(folder, stage, model):
    """A stage's figures on held-out problems; those on longer ones than in training apart."""
    run, s, levels = folder.run, folder.run.eval, folder.run.zero.levels
    done = sum(r["kind"] == "test" and r["stage"] == stage for r in read_log(folder.path))
    longest = max(*run.corpus.levels, *levels)
    problems = tasks.make_problems("test", s.problems, levels, run.corpus.products)
    longer = tasks.make_problems("test", 2 * s.longer, (longest + 1, longest + 2),
                                 run.corpus.products)
    plans = [("test", problems, 1.0, 1.0), ("test", problems, s.temperature, s.top_p),
             ("longer", longer, s.temperature, s.top_p)]
    for name, asked, temperature, top_p in tqdm(plans[done:], f"test {stage}", disable=done == 3):
        if folder.stop:
            raise KeyboardInterrupt
        began = time.monotonic()
        r, _ = evaluate(model, asked, s.samples, temperature, top_p, run.zero.max_new_tokens,
                        s.rows, seed=1)
        folder.log({"kind": "test", "stage": stage, "set": name} | r)
        folder.clock(f"test_{stage}", 0, began)


def base(folder):
    """The base model, from random weights. What it can do by style bounds what RL can amplify."""
    run, options = folder.run, folder.options
    torch.manual_seed(run.seed)
    model = moe.place(moe.Transformer(run.model), options.device, options.dtype)

    def loop(model, state):
        return train(model, run.base, lambda rng: tasks.make_document(rng, run.corpus), run.seed,
                     state)
    model = folder.stage("base", model, loop, run.base.steps,
                         watcher(folder, "base", run.base.dev_every, run.base.steps))
    dev = [r for r in read_log(folder.path) if r["kind"] == "dev" and r["stage"] == "base"][-1]
    print("\n  What the base does on dev, at temperature 1, by number of operations\n"
          "  style      share" + "".join(f"{n:>6}" for n in dev["by_level"]))
    for style, row in [*dev["by_style"].items(), ("all", {"share": 1.0} | dev["by_level"])]:
        print(f"  {style:9}", *(f"{math.nan if x is None else x:5.2f}" for x in row.values()))
    return model


def zero(folder, model):
    """R1-Zero: GRPO on the base, rewarding accuracy and format, with no example (R1, 2.2)."""
    run, s, c = folder.run, folder.run.zero, folder.run.corpus

    def sample(rng, n):  # asked as in the corpus, some with stray spaces
        drawn = [tasks.make_problem(rng, rng.choice(s.levels), "train", None, c.products)
                 for _ in range(n)]
        return [tasks.space(p, rng) if rng.random() < c.spaced else p for p in drawn]
    task = Task(sample=sample, decode=tasks.decode,
                encode=lambda problem: tasks.encode_prompt(problem.question),
                rewards={"accuracy": (s.accuracy_weight, tasks.accuracy),
                         "format": (s.format_weight, tasks.format_reward)},
                measures=tasks.MEASURES, end_id=tasks.END_ID, pad_id=tasks.PAD_ID)
    return folder.stage("zero", model, lambda m, state: train_rl(m, task, s, run.seed, state),
                        s.steps, watcher(folder, "zero", run.eval.dev_every, s.steps))


# -------------------------------------------------------------------------------------------------
# The command line


def run_stages(options):
    """The stages up to the one asked for, their tests on held-out problems, and the report."""
    run = resolve(options.preset, options.set, seed=options.seed,
                  start=getattr(options, "start", None) or "", device=options.device.type,
                  dtype=str(options.dtype).removeprefix("torch."))
    model = moe.load(run.start, options.device, options.dtype)[0] if run.start else None
    if model and model.config != run.model:
        raise UserError(f"{run.start} has other model sizes than this run; give its --preset/--set")
    folder = Folder(options.out or f"runs/{options.preset}", run, options)
    timed = options.preset == "nano" and options.command != "base" and not options.set
    print(f"{options.preset}, seed {run.seed}, into {folder.path}: expect "
          f"{'7 minutes and 1 GiB on two CPU cores' if timed else 'what the bars say'}. "
          "Ctrl-C saves; the same command goes on.\n"
          f"First the base ({run.base.steps} steps, scored every {run.base.dev_every}), then "
          f"RL ({run.zero.steps} steps, scored every {run.eval.dev_every}), each with its test.")
    signal.signal(signal.SIGINT, folder.interrupt)
    try:
        if not model:
            model = base(folder)
            test_stage(folder, "base", model)
        if options.command != "base":
            model = zero(folder, model)
            test_stage(folder, "zero", model)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    print("\n" + importlib.import_module("extras.report").report([folder.path]))
    print(f"written: {folder.path / 'report.md'}, {folder.path / 'samples.md'}")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        """Exits with code 2."""
        self.exit(2, f"r1mini: {message} (try: python r1mini.py --help)\n")


def parser():
    """The command line."""
    sized, common, running = (Parser(add_help=False) for _ in range(3))
    sized.add_argument("--preset", default="nano", choices=list(moe.PRESETS),
                       help="sizes and settings")
    add = common.add_argument
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: cuda where there is one")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
        help="of the forward pass; auto: bfloat16 on CUDA, float32 elsewhere")
    add("--threads", type=int, default=0, help="CPU threads; 0: as torch decides")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", action="extend",
        help="any setting, such as zero.lr=1e-4 or model.dim=128")
    add = running.add_argument
    add("--out", help="the run's folder; default runs/PRESET")
    add("--seed", type=int, default=0)
    add("--save-every", type=int, default=20, help="steps between saves")
    add("--fresh", action="store_true", help="delete the folder's run and start over")
    top = Parser(prog="r1mini.py", description=__doc__,
                 formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", parser_class=Parser, metavar="COMMAND")
    for name, text in (("all", "every stage"), ("base", "pretraining"), ("zero", "and R1-Zero")):
        one = commands.add_parser(name, parents=[sized, common, running], help=text)
        if name != "base":
            one.add_argument("--from", dest="start", metavar="CKPT", help="a base for zero")
    for name, text in (("eval", "pass@1, vote, pass@k"), ("chat", "talk to a checkpoint")):
        one = commands.add_parser(name, parents=[common], help=text)
        one.add_argument("checkpoint")
        if name == "chat":
            one.add_argument("--ask", metavar="TEXT", help="one question, for a pipe")
        else:
            one.add_argument("--problems", metavar="FILE.jsonl",
                             help='{"question": ..., "answer": ...} a line')
            one.add_argument("--samples", type=int, default=16, help="answers a problem")
            one.add_argument("--json", action="store_true", help="one object, all problems in it")
    one = commands.add_parser("report", help="means and spread over runs")
    one.add_argument("runs", nargs="+")
    one.add_argument("--to", metavar="DIR", help="keep summary.json and the table there")
    one = commands.add_parser("study", parents=[sized], help="the runs behind a table")
    one.add_argument("name")
    one.add_argument("rest", nargs=argparse.REMAINDER, help="options for each of its runs")
    commands.add_parser("cost", parents=[sized], help="what a preset's sizes come to")
    return top


EXTRAS = {"eval": "eval", "chat": "chat", "report": "report", "study": "report", "cost": "cost"}


def prepare(options):
    """Threads, device and dtype of a command, checked before anything long begins."""
    for name, least, most in (("threads", 0, 4 * os.cpu_count()), ("save_every", 1, 10**9),
                              ("samples", 1, 10**5), ("seed", 0, 2**62)):
        if not least <= getattr(options, name, least) <= most:
            raise UserError(f"--{name.replace('_', '-')} must be within {least}..{most}")
    if getattr(options, "threads", 0):
        torch.set_num_threads(options.threads)
    if hasattr(options, "device"):
        options.device, options.dtype = moe.choose_device(options.device, options.dtype)


def main(argv=None):
    """Runs one command. Returns 0, 2 for what the user can mend, or 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # consoles that cannot print Chinese
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv.insert(0, "all")
    try:
        options = parser().parse_args(argv)
        prepare(options)
        if options.command in EXTRAS:
            return importlib.import_module(f"extras.{EXTRAS[options.command]}").main(options)
        run_stages(options)
    except (UserError, tasks.ProblemError) as error:
        print(f"r1mini: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        hint = "; free some space, and the same command goes on" * (error.errno == errno.ENOSPC)
        print(f"r1mini: {error.filename or 'a file'}: {error.strerror or error}{hint}",
              file=sys.stderr)
        return 2
    except MemoryError:
        print("r1mini: out of memory; ask for less", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "; the same command goes on where it was" * (argv[0] in ("all", "base", "zero"))
        print(f"r1mini: stopped{kept}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.modules["r1mini"] = sys.modules[__name__]  # extras/ import r1mini: let that be this module
    sys.exit(main())
