"""The command line: from words to settings, with presets and --set; then stages or a tool run."""
import argparse
import dataclasses
import difflib
import errno
import importlib
import math
import os
import signal
import sys
import traceback
from pathlib import Path

import torch

import r1mini
import tasks
from engine import checkpoint, devices, kernels
from engine.errors import UserError
from engine.folder import Folder, flat, read_log, tensorboard
from grpo import OBJECTIVES, RL, SETTINGS
from r1mini import PRESETS, Run, Train

THREADS = torch.get_num_threads()  # one a core, before anyone changes it

# What a preset changes beside the model's sizes; what it says of base holds for every supervised
# stage, of zero for every stage of RL, but for steps and rates, unless it is micro. Larger models
# learn longer chains, with products; beyond base and zero laptop and node are untuned.
LARGE = {"corpus.products": 0.2, "corpus.levels": (1, 2, 3, 4, 5, 6, 7),
         "zero.levels": (4, 5, 6, 7), "zero.max_new_tokens": 400}
TRAINING = {
    "micro": {"base.steps": 20, "base.documents": 16, "base.dev_every": 10, "zero.steps": 4,
              "zero.problems": 4, "zero.group_size": 4, "zero.max_new_tokens": 48,
              "zero.reference_every": 2, "eval.problems": 8, "eval.samples": 4, "eval.longer": 2,
              "eval.dev_problems": 4, "zero.dev_every": 2, "data.cold_start": 8,
              "data.rejection": 8, "data.distill": 8, "data.prompts": 2, "data.stand_in": True,
              "student.dim": 16},
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
    model, student = (dataclasses.replace(PRESETS[name], vocab_size=tasks.VOCAB_SIZE)
                      for name in (preset, "student"))
    run = Run(preset, model=model, student=student, **fields)
    stages = {"zero": [p for p in vars(run) if isinstance(getattr(run, p), RL)],
              "base": [p for p in vars(run) if isinstance(getattr(run, p), Train)]}
    pairs = [assignment.partition("=") for assignment in assignments]
    for key, equals, _ in pairs:
        if not equals:
            raise UserError(f"--set {key}: wanted key=value, such as --set zero.lr=1e-4")
    settings = []
    for key, value in TRAINING[preset].items():
        part, _, name = key.partition(".")
        own = name in ("steps", "lr") and preset != "micro"
        settings += [(f"{p}.{name}", value) for p in ([part] if own else stages.get(part, [part]))]
    for key, _, value in pairs:
        if key.endswith(".objective"):
            if value not in OBJECTIVES:
                raise UserError(f"--set {key}={value}: choose one of {', '.join(OBJECTIVES)}")
            part = key.partition(".")[0]
            settings += [(f"{part}.{name}", v) for name, v in SETTINGS[value].items()]
    for key, value in [*settings, *((key, value) for key, _, value in pairs)]:
        run = change(run, key, value)
    check(run)
    return run


PROMPT = 50  # tokens of the longest question, stray spaces included
MAY_BE_ZERO = {"seed", "n_dense_layers", "n_mtp_layers", "q_lora_rank", "n_outputs", "warmup",
               "overlong"}


def sizes(m, part):
    """[(whether it is wrong, message)] of a model's sizes."""
    grouped = m.n_limited_groups * (m.n_routed_experts // m.n_expert_groups)
    return [
        ((m.qk_rope_head_dim | m.qk_nope_head_dim | m.kv_lora_rank) % 2, f"{part}: "
         "qk_rope_head_dim, qk_nope_head_dim, kv_lora_rank must be even: pairs are rotated"),
        (m.dim % 8 or m.moe_inter_dim % 8, f"{part}: dim and moe_inter_dim: multiples of 8 only"),
        (m.n_dense_layers > m.n_layers, f"{part}: n_dense_layers exceeds n_layers"),
        (m.n_mtp_layers not in (0, 1), f"{part}: n_mtp_layers must be 0 or 1"),
        (m.n_routed_experts % m.n_expert_groups,
         f"{part}: n_expert_groups must divide the experts"),
        (m.n_routed_experts < 2 * m.n_expert_groups, f"{part}: a group needs at least 2 experts"),
        (m.n_limited_groups > m.n_expert_groups,
         f"{part}: n_limited_groups exceeds n_expert_groups"),
        (m.n_activated_experts > grouped,
         f"{part}: n_activated_experts exceeds the experts to be had")]


def check(run):
    """UserError if settings make no sense, or contradict each other."""
    for key, value in flat(dataclasses.asdict(run)).items():
        least = int(type(value) is int and key.rpartition(".")[2] not in MAY_BE_ZERO)
        if isinstance(value, (int, float)) and value < least and key != "seed":
            raise UserError(f"{key} must be at least {least}")
    c, e = run.corpus, run.eval
    tests = [(max(c.shares()) > 1 or min(c.shares()) < -1e-9,
              "the corpus' shares must not exceed 1, nor its styles' together"),
             (max(c.products, c.spaced, c.tags, c.summary, c.foreign, c.switched, c.steps_mixed,
                  c.checked_mixed, c.direct_slips, c.steps_slips, c.checked_slips,
                  run.data.general) > 1, "the corpus' shares must not exceed 1"),
             (not 1 <= min(c.levels) <= max(c.levels) <= 7, "corpus.levels must be within 1..7"),
             (not 0 < e.top_p <= 1, "eval.top_p must be above 0 and at most 1")]
    for part, m in (("model", run.model), ("student", run.student)):
        tests += sizes(m, part) + [
            (m.vocab_size != tasks.VOCAB_SIZE, f"{part}.vocab_size must be {tasks.VOCAB_SIZE}"),
            (m.n_outputs, f"{part}.n_outputs is for reward models"),
            (m.max_seq_len < 300, f"{part}.max_seq_len must be at least 300, for the corpus"),
            (run.zero.max_new_tokens + PROMPT > m.max_seq_len,
             f"zero.max_new_tokens exceeds {part}.max_seq_len")]
    for part in (p for p in vars(run) if isinstance(getattr(run, p), RL)):
        s = getattr(run, part)
        tests += [
            (s.overlong >= s.max_new_tokens, f"{part}.overlong must be below max_new_tokens"),
            (not 2 <= min(s.levels) <= max(s.levels) <= 7,
             f"{part}.levels must be within 2..7: single steps are in the drills, so not held out"),
            (s.group_size < 2, f"{part}.group_size must be at least 2: an advantage compares "
             "answers"),
            (s.minibatches > s.problems * s.group_size, f"{part}.minibatches exceeds the answers"),
            (s.temperature <= 0, f"{part}.temperature must be above 0: RL needs different answers"),
            (max(s.general, s.general_from) > 1, f"{part}.general and general_from: at most 1"),
            (s.max_new_tokens + PROMPT > min(run.model.max_seq_len, run.student.max_seq_len),
             f"{part}.max_new_tokens exceeds max_seq_len")]
    for wrong, message in tests:
        if wrong:
            raise UserError(message)


COMMANDS = {"all": "every stage", "base": "pretraining", "zero": "up to R1-Zero",
            "dev1": "up to the cold start", "dev2": "up to RL for reasoning",
            "dev3": "up to rejection sampling and SFT", "r1": "up to R1",
            "distill": "up to the students"}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        """Exits with code 2."""
        self.exit(2, f"r1mini: {message} (try: python {self.prog} --help)\n")


def shared_options():
    """Options that several commands have: of the sizes, of all that compute, of processes, of
    runs; four parsers."""
    sized, common, several, running = (Parser(add_help=False) for _ in range(4))
    sized.add_argument("--preset", default="nano", choices=list(PRESETS),
                       help="sizes and settings")
    add = common.add_argument
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: cuda where there is one")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
        help="of the forward pass; auto: bfloat16 on CUDA, float32 elsewhere")
    add("--threads", type=int, default=0, help="CPU threads in all; 0: one a core")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", action="extend",
        help="any setting, such as zero.lr=1e-4 or model.dim=128")
    several.add_argument(
        "--processes", type=int, default=0,
        help="that share each step on this machine; 0: on a CPU one a thread, four at most")
    add = running.add_argument
    add("--out", help="the run's folder; default runs/PRESET")
    add("--parallel", choices=["none", "ddp", "fsdp"], default="ddp",
        help="how processes hold the model: each the whole (ddp), or each a part of every weight")
    add("--expert-parallel", type=int, default=1, metavar="N",
        help="N processes share the routed experts; tokens travel to them")
    add("--recompute", action="store_true",
        help="keep no activations within a block: less memory, a third more time")
    add("--seed", type=int, default=0)
    add("--save-every", type=int, default=20, help="steps between saves")
    add("--fresh", action="store_true", help="delete the folder's run and start over")
    add("--tensorboard", action="store_true", help="the log's curves for TensorBoard too")
    add("--only", nargs="+", choices=list(r1mini.STAGES), metavar="STAGE",
        help="leave out the other stages")
    return sized, common, several, running


def parser():
    """The command line."""
    sized, common, several, running = shared_options()
    top = Parser(prog="r1mini.py", description=r1mini.__doc__,
                 formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", parser_class=Parser, metavar="COMMAND")
    for name, text in COMMANDS.items():
        one = commands.add_parser(name, parents=[sized, common, several, running], help=text)
        if name != "base":
            one.add_argument("--from", dest="start", metavar="CKPT",
                             help="take this stage and those before it from CKPT's folder")
        if name == "distill":
            one.add_argument("--data", metavar="FILE.jsonl",
                             help="dialogues in chat format, instead of R1's answers")
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
    for name, text, words in (("export", "a checkpoint as a Hugging Face folder",
                               ("checkpoint", "folder")),
                              ("import", "the way back", ("folder", "checkpoint"))):
        one = commands.add_parser(name, help=text)
        for word in words:
            one.add_argument(word)
        one.set_defaults(command="export", back=name == "import", device="cpu", dtype="float32",
                         threads=0)  # both are in tools/export.py: no module is named import
    one = commands.add_parser("report", help="means and spread over runs")
    one.add_argument("runs", nargs="*")
    one.add_argument("--pages", action="store_true",
                     help="write the numbers of results/ into README, docs and workshop")
    one.add_argument("--to", metavar="DIR", help="keep summary.json and the table there")
    one = commands.add_parser("study", parents=[sized], help="the runs behind a table")
    one.add_argument("name", metavar="NAME", help="r1, choices, speed and more: see the README")
    one.add_argument("rest", nargs=argparse.REMAINDER, help="--seeds 0 1 2, options for its runs"
                     ).required = False  # or a study without a name asks for these too
    one = commands.add_parser("bench", parents=[sized, common, several], help="tokens a second")
    one.add_argument("--json", action="store_true", help="one object")
    one.add_argument("--against", action="store_true", help="beside transformers and TRL")
    one.add_argument("--from", dest="start", metavar="CKPT",
                     help="compare rollouts and steps of this checkpoint, not random ones")
    one = commands.add_parser("cost", parents=[sized], help="what a preset's sizes come to")
    add = one.add_argument
    add("--gpus", type=int, help="also what training on so many takes")
    add("--tokens", type=float, help="to train on; default 14.8e12, V3's")
    add("--mfu", type=float, help="share of the peak FLOPs; default: what V3's hours imply")
    add("--dollars-per-hour", type=float, help="of a GPU; default 2")
    one = commands.add_parser("annotate", help="the lesson files as pages beside the equations")
    one.add_argument("folder", nargs="?", default="annotated", help="default annotated")
    return top


def choose_device(device="auto", dtype="auto"):
    """(torch.device, torch.dtype) of a user's words; UserError if the device is not there."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        device = torch.zeros(1, device=device).device
        torch.autocast(device.type, torch.bfloat16)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {device}: not to be had here ({reason})") from None
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return device, getattr(torch, dtype)


def prepare(options):
    """Threads, memory, device and dtype of a command, checked before anything long begins."""
    for name, least, most in (("threads", 0, 4 * os.cpu_count()), ("save_every", 1, 10**9),
                              ("processes", 0, 4 * os.cpu_count()),
                              ("samples", 1, 10**5), ("seed", 0, 2**62), ("gpus", 1, 10**6),
                              ("tokens", 1, 1e18), ("mfu", 0.001, 1),
                              ("dollars_per_hour", 0, 10**6)):
        if (value := getattr(options, name, None)) is not None and not least <= value <= most:
            raise UserError(f"--{name.replace('_', '-')} must be within {least}..{most}")
    if getattr(options, "tensorboard", False):
        tensorboard()  # or it is found missing after the folder is made
    if hasattr(options, "device"):
        options.device, options.dtype = choose_device(options.device, options.dtype)
        # On a CPU each new shape of a bfloat16 product is compiled; 1,024 kept would be too few.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
        threads = options.threads or THREADS
        several = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or getattr(options, "processes", 1)
        if not several:  # micro's steps are shorter than messages
            busy = options.device.type == "cpu" and options.preset != "micro" and \
                getattr(options, "parallel", "") != "none"
            several = min(4, threads) if busy else 1
        torch.set_num_threads(max(1, threads // several))
        kernels.keep_freed_memory()
        options.processes = several
        if hasattr(options, "parallel"):
            options.layout = layout_of(options, int(os.environ.get("WORLD_SIZE", 0)) or several)


def layout_of(options, count):
    """What devices.place() is told of how `count` processes hold a model; nothing if each holds
    all. UserError if they cannot."""
    mode, experts = options.parallel, options.expert_parallel
    if mode == "none" and count > 1:
        raise UserError(f"--parallel none is for one process, here are {count}")
    if mode == "fsdp" and count == 1:
        raise UserError("--parallel fsdp spreads the weights over several processes: give "
                        "--processes, or start by torchrun")
    if experts < 1 or count % experts:
        raise UserError(f"--expert-parallel {experts} must divide the number of processes, {count}")
    plain = mode != "fsdp" and experts == 1 and not options.recompute
    return () if plain else (mode, experts, options.recompute)


def excuse(error, options=None):
    """The one line on an error that the user can mend; None if the fault is ours."""
    if isinstance(error, UserError):
        return " ".join(str(error).splitlines())
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
        return "out of memory; ask for less"
    if isinstance(error, RuntimeError):  # torch wraps what happens while it writes
        error = error.__context__
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        where = error.filename or getattr(options, "out", None) or "a file"
        return f"{where}: {error.strerror or error}" + (
            "; free some space, and the same command goes on" * full)
    return None


def parse(argv):
    """The options of a command line; no command is all."""
    check_torchrun()
    if int(os.environ.get("RANK", 0)):  # of several processes the first speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w")
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv.insert(0, "all")
    options = parser().parse_args(argv)
    for name, value in vars(options).items():
        if any(isinstance(x, str) and not x.strip() for x in [value, *(
                value if isinstance(value, list) else ())]):
            raise UserError(f"{name}: got an empty text; leave it out, or say what is meant")
    options.itself = [sys.executable, r1mini.__file__, *argv]  # for more processes of it
    prepare(options)
    return options


def check_torchrun():
    """UserError if the environment names several processes, as torchrun's does, but not rightly."""
    names = ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    env = {name: os.environ[name] for name in (*names, "MASTER_ADDR") if name in os.environ}
    wrong = [name for name in names if not env.get(name, "0").isdecimal()]
    if "RANK" in env or "WORLD_SIZE" in env:
        wrong += [name for name in (*names[:3], "MASTER_ADDR") if not env.get(name)]
    if wrong:
        raise UserError(f"the environment's {wrong[0]} is missing or wrong: start with torchrun, "
                        "or unset RANK and WORLD_SIZE")


def load_writer(options):
    """(model, all else) of the checkpoint of a command; UserError if it cannot write."""
    model, record = checkpoint.load(options.checkpoint, options.device, options.dtype)
    if model.config.n_outputs:
        raise UserError(f"{options.checkpoint} is a reward model: it scores, and cannot write")
    if model.config.vocab_size != tasks.VOCAB_SIZE:  # imported
        raise UserError(f"{options.checkpoint}: no text for a vocabulary of "
                        f"{model.config.vocab_size}; r1mini's has {tasks.VOCAB_SIZE}")
    return model, record


# The models a stage begins with, or learns from, beside those of the same command.
NEEDS = {"zero": ["base"], "dev1": ["zero", "base"], "dev2": ["dev1"], "dev3": ["dev2", "base"],
         "helpful": ["dev3"], "safe": ["dev3"], "r1": ["dev3", "helpful", "safe"],
         "distill": ["student", "r1"], "distill_logits": ["student", "r1"],
         "student_rl": ["student"], "student_rl_no_format": ["student"], "distill_rl": ["distill"]}


def wanted(options, start, data, names):
    """{path: stage} of the checkpoints that a command needs and does not make; UserError if one is
    not there, or --fresh would delete it."""
    folder, found = Path(options.out or f"runs/{options.preset}"), {}
    for name in names:
        for needed in NEEDS.get(name, ()):
            path = folder / f"{needed}.pt"
            if needed in names or data and (name, needed) == ("distill", "r1"):
                continue
            if start and (options.fresh or not path.exists()):
                path = Path(start).parent / path.name
            elif options.fresh and path.exists():
                raise UserError(f"--fresh would delete {path}, which {name} needs")
            if not path.exists():
                raise UserError(f"{name} needs {path}, which is not there: leave out --only, or "
                                "give --from CKPT, another run's")
            found[path] = needed
    return found


def load_stage(path, name, run):
    """Finds a checkpoint of a stage whole and of this run's sizes, or UserError."""
    config = run.student if name.startswith(("student", "distill")) else run.model
    if name in ("helpful", "safe"):
        config = dataclasses.replace(config, n_outputs=1, n_mtp_layers=0)
    model, record = checkpoint.load(path)
    if model.config != config:
        made = f", of preset {record['preset']}," if "preset" in record else ""
        raise UserError(f"{path}{made} has other sizes than this run; give its --preset/--set")


def plan(options):
    """(the Run, the names of its stages) of a command that trains."""
    start, data = (getattr(options, name, None) or "" for name in ("start", "data"))
    run = resolve(options.preset, options.set, seed=options.seed, start=start, data_file=data,
                  device=options.device.type, dtype=str(options.dtype).removeprefix("torch."))
    for part, m in (("model", run.model), ("student", run.student)):
        if m.n_dense_layers < m.n_layers and m.n_routed_experts % options.expert_parallel:
            raise UserError(f"--expert-parallel {options.expert_parallel} must divide "
                            f"{part}.n_routed_experts, {m.n_routed_experts}")
    stages = list(r1mini.STAGES)
    last = stages[-1] if options.command in ("all", "distill") else options.command
    names = stages[:stages.index(last) + 1]
    if data:
        names = names if options.only else ["student", "distill"]
        r1mini.read_dialogues(data, run.student.max_seq_len)  # or it is found wrong minutes later
    if start:
        given = Path(start).stem
        if given not in stages:
            raise UserError(f"--from {start}: name it after its stage, such as base.pt; the models "
                            "before it are taken from its folder")
        if given not in names[:-1]:
            raise UserError(f"--from {start}: {options.command} has nothing to do after {given}")
        load_stage(start, given, run)
        names = names[names.index(given) + 1:]
    names = [name for name in names if name in (options.only or set(names) - r1mini.ABLATIONS)]
    if not names:
        raise UserError(f"--only {' '.join(options.only)}: not a stage of this command")
    for path, name in wanted(options, start, data, names).items():
        load_stage(path, name, run)
    timed = options.preset == "nano" and options.command == "all" and not (
        options.set or options.only)
    options.expected = "10 to 20 minutes and 2 GiB on two cores; " * (timed and not start)
    return run, names


# -------------------------------------------------------------------------------------------------
# Running stages, a tool or a study


class Models(dict):
    """The models of a run by stage. One that this command did not make is loaded when asked for,
    from the run's own folder, or else from that of --from."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def __missing__(self, name):
        path = self.folder.path / f"{name}.pt"
        if self.folder.run.start and not path.exists():
            path = Path(self.folder.run.start).parent / path.name
        self[name] = self.folder.load(path)[0]
        return self[name]


def run_stages(options, run, names):
    """The stages named, their tests on held-out problems, and the report."""
    with devices.processes(options.device, options.processes, options.itself) as options.device:
        folder = Folder(options.out or f"runs/{options.preset}", run, options, r1mini.STAGES)
        models = Models(folder)
        print(f"{run.preset}, seed {run.seed}, into {folder.path}; {options.expected}stages:\n"
              f"  {' '.join(names)}\nWatch the loss fall, or in RL the accuracy rise; dev scores "
              "come on the way, test scores at the end.\nCtrl-C saves; the same command goes on.")
        signal.signal(signal.SIGINT, folder.interrupt)
        try:
            for name in names:
                models[name] = r1mini.STAGES[name](folder, models)
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if devices.is_main() and any(r["kind"] == "test" for r in read_log(folder.path)):
            print("\n" + importlib.import_module("tools.report").report([folder.path]))

TOOLS = ("eval", "chat", "export", "report", "study", "bench", "cost", "annotate")


def find_study(name):
    """The module of a study; UserError if there is none of this name."""
    folder = Path(r1mini.__file__).parent / "studies"
    names = sorted(path.stem for path in folder.glob("[a-z]*.py"))
    if name not in names:
        raise UserError(f"study {name}: choose one of {', '.join(names)}")
    return importlib.import_module(f"studies.{name}")


def main(argv=None):
    """Runs one command. Returns 0, 2 for what the user can mend, or 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # consoles that cannot print Chinese
    options = None
    try:
        options = parse(list(sys.argv[1:] if argv is None else argv))
        if options.command == "study":
            return importlib.import_module("tools.study").main(options, find_study(options.name))
        if options.command == "bench" and options.against:
            return find_study("peers").main(options)
        if options.command == "cost" and options.gpus is not None:
            return find_study("hours").main(options)
        if options.command in TOOLS:
            return importlib.import_module(f"tools.{options.command}").main(options)
        run_stages(options, *plan(options))
    except Exception as error:
        if not (line := excuse(error, options)):
            raise  # a fault of ours
        print(f"r1mini: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "; the same command goes on where it was" * (
            options is not None and options.command not in TOOLS)
        print(f"r1mini: stopped{kept}", file=sys.stderr)
        return 130
    return 0
