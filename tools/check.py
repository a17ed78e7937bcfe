"""check: what works on this machine, in at most a minute. It is also the script for a new GPU.

    python r1mini.py check [--preset P] [--device cuda] [--dtype T] [--processes N]

software    versions of Python and torch
cpu, cuda   the processor and each GPU, with their memory
float32 and bfloat16
            whether a forward and a backward pass give a finite loss, and nearly the gradient that
            the CPU computes in float32
experts and attention
            which form of each engine/kernels.py chooses on this device
processes   whether several processes take a step together
speed       tokens/s, measured by the functions of bench. The peak is that of large matrix products
minutes     how long all stages would take at this speed
memory      whether training and sampling of each preset should fit. This is computed, not tried
largest     a real step of the largest preset that should fit. If it fails, of the next smaller one

The exit code is 1 if training with these options does not work here. Then the last line says what
to do.
"""
import contextlib
import dataclasses
import json
import math
import os
import platform
import random
import re
import subprocess
import tempfile
import textwrap
import time
from pathlib import Path
from statistics import median

import torch

import moe
import r1mini
import tasks
from engine import devices, kernels
from engine.errors import UserError
from engine.evaluate import prompts_of
from engine.folder import describe_machine, peak_gib
from engine.watch import test_plans
from grpo import RL
from tools import bench
from tools.cost import count_parts
from tools.flops import flops_per_token
from tools.settings import LONGEST_PROMPT, TRAINING, resolve_settings

SECONDS = 50            # for all parts. Python and torch need the rest of the minute to start
OVER = "not tried: the minute is over"
LATE = "it did not finish in time"
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # relative error of the gradient
ROUNDS = 1              # rounds that are measured, after a first one that is not counted
STEP_FLOPS = {"cpu": 3e10, "cuda": 1e14}  # about the FLOPs of a measured step
EXAMPLES = 200          # documents, and solutions, whose mean length is taken
CGROUP = Path("/sys/fs/cgroup")  # where Linux writes the limits of a container
GIB = 2 ** 30
PROCESS = 0.4 * GIB     # memory that Python and torch take in each process
# Copies of the weights in the last RL stage: policy, reference, gradient, AdamW's two moments, and
# the models of the stages before.
COPIES = 5 + list(r1mini.STAGES).index("r1")


def main(options):
    """The command check. Returns 0 if training works with these options, else 1."""
    if options.part:  # this process was started by Check.attempt()
        with devices.processes(options.device, options.processes, options.itself) as device:
            PARTS[options.part](options, device)
        return 0
    if "WORLD_SIZE" in os.environ:
        raise UserError("check starts its processes itself: leave out torchrun")
    check = Check(options)
    for part in (check.hardware, check.dtypes, check.forms, check.speed, check.memory):
        part()
    words = (f"--preset {options.preset} --device {options.device} "
             f"--dtype {_name_of(options.dtype)} --processes {options.processes}")
    if check.troubles:
        reason, remedy = check.troubles[0]
        print(f"python r1mini.py {words} does not work here: {reason}. {remedy}")
        return 1
    print(f"python r1mini.py {words} works here")
    return 0


class Check:
    """The parts of a check, in their order. Each prints its lines. If training cannot work, it
    adds (reason, what to do) to `troubles`."""

    def __init__(self, options):
        self.options, self.device, self.dtype = options, options.device, options.dtype
        self.run = resolve_settings(options.preset, options.set)
        self.deadline, self.troubles = time.monotonic() + SECONDS, []

    def say(self, label, text):
        """Prints a line at once."""
        print(f"{label:10} {text}", flush=True)

    def seconds_left(self):
        """The seconds to the deadline."""
        return self.deadline - time.monotonic()

    def hardware(self):
        """Software and devices."""
        self.say("software", f"Python {platform.python_version()}, torch {torch.__version__}, "
                             f"{platform.system()}")
        self.say("cpu", f"{describe_machine()}; {_memory_text(torch.device('cpu'))}")
        for i in range(torch.cuda.device_count()):
            device = torch.device("cuda", i)
            self.say(f"cuda:{i}", f"{torch.cuda.get_device_name(i)}; {_memory_text(device)}")
        if not torch.cuda.is_available():
            self.say("cuda", "not available")
        if torch.backends.mps.is_available():
            self.say("mps", "available; its memory is the CPU's")

    def dtypes(self):
        """A pass in each type, beside one on the CPU in float32."""
        _, exact = _loss_and_gradient(torch.device("cpu"), torch.float32)
        for dtype, tolerance in TOLERANCE.items():
            name = _name_of(dtype)
            if self.seconds_left() < 0:
                self.say(name, OVER)
                continue
            try:
                loss, gradient = _loss_and_gradient(self.device, dtype)
                distance = float((gradient - exact).norm() / exact.norm())
                works = math.isfinite(loss) and distance < tolerance  # False if it is nan
                text = f"loss {loss:.2f}, relative error of the gradient {distance:.1g}"
            except (RuntimeError, TypeError, AssertionError) as error:
                works, text = False, _one_line(str(error))
            self.say(name, text if works else f"does not work: {text}")
            if not works and dtype == self.dtype:
                other = "bfloat16" if dtype == torch.float32 else "float32"
                self.troubles.append((f"{name}: {text}", f"Give --dtype {other}"))

    def forms(self):
        """Which form of experts and of attention is used."""
        x = torch.zeros(1, device=self.device, dtype=self.dtype)
        grouped, fused = kernels.has_grouped_product(x), not kernels.fused_attention_is_slow(x)
        self.say("experts", "one grouped product for all" if grouped else "one after the other")
        form = {True: "fused kernel", False: "plain products"}
        self.say("attention", f"{form[fused]} in training, {form[x.is_cuda]} in sampling")

    def speed(self):
        """Processes, tokens per second, and the minutes of all stages."""
        count = self.options.processes
        if count == 1:
            self.try_two_processes()
        # If several processes hang, there must be time left to measure one alone.
        facts, reason = self.attempt("speed", 0.6 if count > 1 else 0.9)
        if count > 1:
            self.say_processes(count, facts, reason)
        if not facts.get("agree"):
            self.add_trouble("no step", reason or "weights differ", count)
            if count > 1:
                facts, reason = self.attempt("speed", 0.9, "--processes", "1")
        elif reason and reason != LATE:
            self.add_trouble(f"no step of {self.run.preset}", reason, count)
        if "documents" not in facts:
            self.say("speed", f"not measured: {reason}")
            return
        self.say("speed", f"pretraining {facts['documents']:,.0f} tokens/s, "
                          f"{_share_of_peak(self.run, facts, facts['documents'])}; sampling "
                          f"{facts['sample']:,.0f}; learning in RL {facts['learn']:,.0f}")
        expected = _minutes(self.run, facts)
        hours = f" ({expected / 60:,.0f} hours)" if expected > 120 else ""
        self.say("minutes", f"about {math.ceil(expected):,}{hours} for all stages, with the "
                            "machine as busy as now")

    def add_trouble(self, what, reason, count):
        """Notes why `count` processes cannot train, and what to do."""
        remedy = "Give --processes 1" if count > 1 else "Give another --device or --dtype"
        if reason in (OVER, LATE):
            remedy += ", or check again when the machine is less busy"
        self.troubles.append((f"{what}: {reason}", remedy))

    def try_two_processes(self):
        """Tries a step of two processes, although training would take one."""
        if self.device.type == "cuda" and torch.cuda.device_count() < 2:
            self.say("processes", "not tried: each needs a GPU, and there is one")
            return
        facts, reason = self.attempt("step", 0.4, "--processes", "2")
        self.say_processes(2, facts, reason)

    def say_processes(self, count, facts, reason):
        """Prints whether several processes took a step together."""
        if facts.get("agree"):
            self.say("processes", f"{count} took a step together and hold the same weights")
        else:
            self.say("processes", f"{count}: {reason or 'after a step their weights differ'}")

    def memory(self):
        """Which presets should fit, and a real step of the largest of them."""
        free, total = _memory_of(self.device)
        if total is None:
            self.say("memory", "this system does not say how much there is")
            return
        # On a CPU all processes share one memory.
        count = 1 if self.device.type == "cuda" else self.options.processes
        fitting = []
        for preset in TRAINING:
            run = self.run if preset == self.run.preset else resolve_settings(preset, [])
            needs = _needed_bytes(run, self.dtype, self.options.processes)
            training, sampling = (count * n / GIB for n in needs)
            fits = max(training, sampling) < (free or total) / GIB
            self.say("memory", f"{preset:6} {'fits' if fits else 'does not fit'}: training takes "
                               f"about {training:,.1f} GiB, sampling {sampling:,.1f} GiB")
            if fits:
                fitting.append(preset)
            elif run is self.run:
                self.troubles.append((f"{preset} needs more memory", "Give a smaller --preset"))
        while fitting and not self.take_step(fitting.pop()):
            pass

    def take_step(self, preset):
        """Takes a real step of a preset. Returns True if it worked, or if no time is left to try a
        smaller preset."""
        facts, reason = self.attempt("fit", 0.95, "--preset", preset)
        if reason:
            self.say("largest", f"{preset} should fit; a real step: {reason}")
            return self.seconds_left() < 3
        rate = facts["tokens"] / facts["seconds"]
        share = _share_of_peak(resolve_settings(preset, []), facts, rate)
        self.say("largest", f"{preset}: a real step of {facts['tokens']:,} tokens took "
                            f"{facts['gib']:,.1f} GiB; {rate:,.0f} tokens/s, {share}")
        return True

    def attempt(self, part, share, *words):
        """Runs one of PARTS in processes of its own, for at most this share of the time that is
        left. If they hang or are killed, this process goes on.

        Returns ({name: number} that the part has reported, why it did not finish; "" if it did).
        """
        seconds = share * self.seconds_left()
        if seconds < 2:
            return {}, OVER
        with tempfile.TemporaryDirectory(prefix="r1mini-", ignore_cleanup_errors=True) as folder:
            # Files and not pipes: a pipe stays open until the last process of a part ends.
            out, err = Path(folder) / "out", Path(folder) / "err"
            env = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), folder)
            with open(out, "wb") as stdout, open(err, "wb") as stderr:
                try:
                    code = subprocess.run(
                        [*self.options.itself, "--part", part, *words], timeout=seconds, env=env,
                        stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr).returncode
                except subprocess.TimeoutExpired:
                    code = None
            facts, errors = {}, err.read_text("utf-8", "replace").strip().splitlines()
            for line in out.read_text("utf-8", "replace").splitlines():
                if line.startswith("{"):  # NCCL prints lines too
                    facts |= json.loads(line)
        if code is None:
            return facts, LATE
        if code < 0:
            return facts, f"ended by signal {-code}, perhaps since it used too much memory"
        if code > 0:
            return facts, _one_line(errors[-1] if errors else f"exit code {code}")
        return facts, ""


def _one_line(text):
    """The first line of an error's text, shortened."""
    text = text.removeprefix("r1mini: ").partition("\n")[0]
    return textwrap.shorten(text, 160, placeholder=" ...")


def _name_of(dtype):
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _share_of_peak(run, facts, rate):
    """In words: the share of the peak that training reaches at `rate` tokens per second."""
    flops = flops_per_token(run.model, "learn", mtp=True)
    share = flops * rate / 1e9 / facts["gemm"]
    return f"{share:.0%} of the peak of {facts['gemm']:,.0f} GFLOP/s"


# -------------------------------------------------------------------------------------------------
# Parts that run in processes of their own


def _tell(**facts):
    """Reports facts to the check that started this process."""
    if devices.is_main():
        print(json.dumps(facts), flush=True)


def _step(options, device):
    """One step of micro, in all processes. agree: whether they hold the same weights after it."""
    model = bench.bench_model(resolve_settings("micro", []).model, device, options.dtype)
    bench.bench_train_step(model, rows=8, length=16)()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    total = devices.all_sum(weights.clone())
    _tell(agree=torch.allclose(total, devices.rank_and_size()[1] * weights))


def _speed(options, device):
    """A step of micro, then what the preset does: tokens per second of pretraining (documents), of
    sampling and of RL's learning, and GFLOP/s of large products (gemm)."""
    _step(options, device)
    run, questions = _few_examples(resolve_settings(options.preset, options.set), device)
    config, processes = run.model, devices.rank_and_size()[1]
    model = bench.bench_model(config, device, options.dtype)
    pretrain, tokens = bench.bench_document_step(model, run)
    _, work = bench.bench_equal_works(config, questions)
    calls = bench.bench_grpo_step(bench.bench_model(config, device, options.dtype), run, work)
    del calls["train"], calls["whole"]
    calls |= {"documents": pretrain, "gemm": bench.bench_gemm(device, options.dtype)}
    times = bench.seconds_by_round(calls, device, ROUNDS)
    taken = {name: median(times_of_call) for name, times_of_call in times.items()}
    answers = len(work.prompts)
    _tell(documents=median([n / x for n, x in zip(tokens[1:], times["documents"])]),
          sample=answers * work.new / taken["sample"],
          learn=answers * (bench.PROMPT + work.new) / taken["learn"],
          gemm=processes * 2 * 2048 ** 3 / 1e9 / taken["gemm"])


def _few_examples(run, device):
    """(the run with fewer documents in a step, the number of questions of an RL step), so that a
    step takes about a second. There is at least one of each. There are at most as many documents
    as in training, and as many questions as in bench."""
    flops = STEP_FLOPS["cpu" if device.type == "cpu" else "cuda"]
    documents = flops / (flops_per_token(run.model, "learn", mtp=True) * bench.LENGTH)
    write, read, learn = (flops_per_token(run.model, work) for work in ("write", "read", "learn"))
    length = bench.PROMPT + bench.ANSWER
    questions = flops / ((write + read + learn) * bench.GROUP * length)
    base = dataclasses.replace(run.base, documents=_clamp(documents, run.base.documents))
    return dataclasses.replace(run, base=base), _clamp(questions, bench.QUESTIONS)


def _clamp(x, most):
    """x as a whole number within 1..most."""
    return max(1, min(int(x), most))


def _fit(options, device):
    """Takes a real step of the preset, in one pass. Then makes the cache of a sampling pass."""
    _bound_memory(device)
    run = resolve_settings(options.preset, [])
    rows, processes = _pass_tokens(run) // bench.LENGTH, devices.rank_and_size()[1]
    model = bench.bench_model(run.model, device, options.dtype)
    train = bench.bench_train_step(model, rows, limit=rows * bench.LENGTH)
    gemm = bench.bench_gemm(device, options.dtype)
    if device.type == "cuda":
        train()  # the first one is slower
    seconds = bench.seconds(train, device)
    peak = processes * 2 * 2048 ** 3 / 1e9 / min(bench.seconds(gemm, device) for _ in range(5))
    gib = float(devices.all_sum(torch.tensor(peak_gib())))
    if device.type == "cuda":
        gib = torch.cuda.max_memory_allocated(device) / GIB
    moe.make_cache(model, *_sampling_size(run, processes))
    _tell(tokens=rows * bench.LENGTH, seconds=seconds, gib=gib, gemm=peak)


def _bound_memory(device):
    """On a CPU, limits this process to its share of the free memory, so that it gets an error if
    it asks for more. Otherwise the system would kill a process, perhaps another user's."""
    free, _ = _memory_of(device)
    if device.type != "cpu" or free is None:
        return
    with contextlib.suppress(ImportError, OSError, ValueError):  # not every system can
        import resource
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        limit = int(free / devices.rank_and_size()[1])
        resource.setrlimit(resource.RLIMIT_DATA, (limit, most))


PARTS = {"step": _step, "speed": _speed, "fit": _fit}


# -------------------------------------------------------------------------------------------------
# Numeric types


def _loss_and_gradient(device, dtype):
    """The loss of micro's random weights on random tokens, and its gradient as one vector on the
    CPU."""
    model = bench.bench_model(resolve_settings("micro", []).model, device, dtype).train()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(tasks.VOCAB_SIZE, (8, 16), generator=generator).to(device)
    ones = torch.ones_like(tokens)
    loss, _ = moe.supervised_loss(model, tokens, ones, ones.float(), 8 * 15, 8)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return float(loss.detach()), gradient.float().cpu()


# -------------------------------------------------------------------------------------------------
# Memory


def _memory_of(device):
    """(free, total) bytes of a device; None for what the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    free = total = None
    with contextlib.suppress(OSError, ValueError, AttributeError):  # on a Mac, on Windows
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        text = Path("/proc/meminfo").read_text("utf-8")
        free = 1024 * int(re.search(r"MemAvailable: *(\d+)", text)[1])
    with contextlib.suppress(OSError, ValueError, TypeError):  # a container may have less
        limit = int((CGROUP / "memory.max").read_text("utf-8"))
        cached = re.search(r"inactive_file (\d+)", (CGROUP / "memory.stat").read_text("utf-8"))
        used = int((CGROUP / "memory.current").read_text("utf-8")) - int(cached[1])
        free, total = min(free, limit - used), min(total, limit)
    return free, total


def _memory_text(device):
    """The memory of a device in words."""
    free, total = _memory_of(device)
    if total is None:
        return "memory not known"
    known = "" if free is None else f"{free / GIB:,.1f} GiB free of "
    return f"{known}{total / GIB:,.1f} GiB"


def _needed_bytes(run, dtype, processes):
    """(bytes of a training step, bytes of a sampling pass) in each process of a run, in its last RL
    stage, where it holds the most weights."""
    c = run.model
    parameters = count_parts(c)[0].total()
    size = 4 if dtype == torch.float32 else 2  # bytes of a number in products
    held = PROCESS + 4 * COPIES * parameters
    if dtype != torch.float32:
        held += size * parameters  # autocast's copy of the weights
    training = 4 * _numbers_per_token(c) * _pass_tokens(run)
    rows, columns = _sampling_size(run, processes)
    cache = 2 * size * c.n_layers * (c.kv_lora_rank + c.qk_rope_head_dim)  # old and new: 2
    scores = 2 * 4 * c.n_heads  # before and after the softmax
    sampling = rows * (columns * (cache + scores) + 4 * 4 * c.vocab_size)
    return held + training, held + sampling


def _pass_tokens(run):
    """The tokens of a run's largest pass of training."""
    return max(run.base.micro_tokens, run.zero.micro_tokens, LONGEST_PROMPT +
               run.zero.max_new_tokens)


def _sampling_size(run, processes):
    """(rows, columns) of the largest cache, in each process."""
    return math.ceil(run.eval.rows / processes), LONGEST_PROMPT + run.zero.max_new_tokens


def _numbers_per_token(c):
    """How many numbers the forward pass of a model keeps per token for the backward pass, with
    MTP; attention is one kernel that keeps no scores."""
    queries, values = c.qk_nope_head_dim + c.qk_rope_head_dim, c.v_head_dim
    attention = c.n_heads * (3 * queries + c.qk_nope_head_dim + 3 * values)
    attention += 3 * (c.q_lora_rank + c.kv_lora_rank + c.qk_rope_head_dim)
    block = 4 * c.dim + attention  # the residual stream twice, and what the norms make of it
    dense = 4 * c.inter_dim
    experts = c.n_activated_experts * (3 * c.dim + 4 * c.moe_inter_dim)
    experts += c.n_shared_experts * 4 * c.moe_inter_dim + c.dim
    ends = 3 * c.dim + c.vocab_size
    expert_layers = c.n_layers - c.n_dense_layers
    total = c.n_layers * block + c.n_dense_layers * dense + expert_layers * experts + ends
    if c.n_mtp_layers:
        total += block + (experts if expert_layers else dense) + ends + 5 * c.dim
    return total


# -------------------------------------------------------------------------------------------------
# Minutes


def _minutes(run, rates):
    """The minutes of all stages. rates: tokens per second of documents, sample and learn."""
    return sum(n / rates[kind] for kind, n in _tokens_of_run(run).items()) / 60


def _tokens_of_run(run):
    """{kind: tokens} that all stages read as documents, sample, and learn from in RL.

    Answers of a base, and of the student in its RL, are taken to be as long as those of the corpus.
    All others are taken to be worked solutions with checks, which RL leads to. A student's token
    counts by its share of the model's FLOPs.
    """
    rng = random.Random(0)
    problems = [r1mini.draw_problem(rng, run, run.zero.levels) for _ in range(EXAMPLES)]
    solutions = [tasks.response(*tasks.write_working(p, "checked", rng)) for p in problems]
    documents = [tasks.make_document(rng, run.corpus).tokens for _ in range(EXAMPLES)]
    prompt, document = _mean_length(prompts_of(problems)), _mean_length(documents)
    checked = _mean_length(map(tasks.encode_response, solutions))
    student_share = flops_per_token(run.student, "read") / flops_per_token(run.model, "read")
    collected = {"dev1": run.data.cold_start, "dev3": run.data.rejection,
                 "distill": run.data.distill}  # problems that a model answers for the stage

    tokens = dict.fromkeys(("documents", "sample", "learn"), 0.0)
    for name in set(r1mini.STAGES) - r1mini.ABLATIONS:
        s = _settings_of(run, name)
        share = student_share if name.startswith(("student", "distill")) else 1.0
        answer = document - prompt if name in ("base", "student", "student_rl") else checked
        answer = min(answer, run.zero.max_new_tokens)
        if isinstance(s, RL):
            rollouts = s.steps * s.problems * s.group_size
            tokens["learn"] += share * rollouts * (prompt + answer)
            tokens["sample"] += share * rollouts * s.oversample * answer
        else:
            is_corpus = name in ("base", "student")
            length = document if is_corpus else prompt + answer
            tokens["documents"] += share * s.steps * s.documents * length
        tokens["sample"] += share * answer * _tested_answers(run, name)
        tokens["sample"] += answer * collected.get(name, 0) * run.data.tries
    return tokens


def _settings_of(run, name):
    """The settings of a stage."""
    part = {"student": "student_base", "helpful": "judge", "safe": "judge"}.get(name, name)
    return getattr(run, part)


def _tested_answers(run, name):
    """How many answers the evaluations of a stage sample: on dev, and in its tests."""
    if name in ("helpful", "safe"):  # reward models do not write
        return 0
    s = _settings_of(run, name)
    answers = math.ceil(s.steps / s.dev_every) * run.eval.dev_problems * run.eval.samples
    for kind, problems, samples, _, _ in test_plans(run, name):
        if kind == "general":
            answers += 4 * len(tasks.GENERAL) * run.data.prompts
        else:
            answers += samples * len(problems)
    return answers


def _mean_length(sequences):
    """The mean length of sequences."""
    lengths = list(map(len, sequences))
    return sum(lengths) / len(lengths)
