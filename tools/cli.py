"""The command line: reads the words, checks them before anything long begins, then runs stages, a
tool or a study."""
import argparse
import contextlib
import dataclasses
import errno
import importlib
import os
import re
import signal
import sys
import textwrap
import traceback
from pathlib import Path

import torch

import r1mini
from engine import checkpoint, devices, kernels
from engine.errors import UserError, is_out_of_memory
from engine.folder import Folder, read_log, tensorboard
from r1mini import PRESETS
from tools import output
from tools.settings import resolve_settings

CORES = torch.get_num_threads()  # torch's choice, before anyone changes it: one thread a core
COMMANDS = {"all": "every stage", "base": "pretraining", "zero": "up to R1-Zero",
            "dev1": "up to the cold start", "dev2": "up to RL for reasoning",
            "dev3": "up to rejection sampling and SFT", "r1": "up to R1",
            "distill": "up to the students"}
TOOLS = ("eval", "chat", "export", "report", "study", "bench", "cost", "check",
         "annotate", "look", "show")

CLOSED_PIPE = 128 + 13  # what a shell says of a command that SIGPIPE has ended
# Signals that ask a training to end. Windows has no SIGHUP, which a closed terminal sends.
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
            if hasattr(signal, name)]

# The models of other stages that a stage starts from or learns from.
NEEDS = {"zero": ["base"], "dev1": ["zero", "base"], "dev2": ["dev1"], "dev3": ["dev2", "base"],
         "helpful": ["dev3"], "safe": ["dev3"], "r1": ["dev3", "helpful", "safe"],
         "distill": ["student", "r1"], "distill_logits": ["student", "r1"],
         "student_rl": ["student"], "student_rl_no_format": ["student"], "distill_rl": ["distill"]}
# --OPTION: (least, most)
BOUNDS = {"threads": (0, 4 * os.cpu_count()), "processes": (0, 4 * os.cpu_count()),
          "save_every": (1, 10**9), "samples": (1, 10**5), "seed": (0, 2**62),
          "gpus": (1, 10**6), "tokens": (1, 1e18), "mfu": (0.001, 1),
          "dollars_per_hour": (0, 10**6)}


def main(argv=None):
    """Runs one command. Returns 0; 2 for what the user can correct; 130 after Ctrl-C, 143 after
    SIGTERM, 129 after SIGHUP; 141 if what it prints was not read to its end."""
    output.accept_any_output()
    options = None
    try:
        options = parse_arguments(list(sys.argv[1:] if argv is None else argv))
        code = _run_command(options)
        return code if output.flush_output() else CLOSED_PIPE
    except Exception as error:
        if isinstance(error, BrokenPipeError) and error.filename is None:
            output.silence_output(sys.stdout)
            return CLOSED_PIPE
        line = _user_error_line(error, options)
        if line is None:
            raise  # a fault of the program
        print(f"r1mini: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        line = "stopped"
        if options is not None and options.command not in TOOLS:
            line += f"; {_same_command(options)} goes on where it stopped"
        print(f"r1mini: {line}", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    finally:  # also after --help
        output.flush_output()


def _run_command(options):
    """Runs the command that the options name. Returns its exit code."""
    if options.command not in TOOLS:
        _run_stages(options, *_plan_run(options))
        return 0
    if options.command == "study":
        tool = importlib.import_module("tools.study")
        if options.name == "all":
            return tool.main_all(options, all_studies())
        return tool.main(options, _find_study(options.name))
    if options.command == "bench" and options.against:
        return _find_study("peers").main(options)
    if options.command == "cost" and options.gpus is not None:
        return _find_study("hours").main(options)
    return importlib.import_module(f"tools.{options.command}").main(options)


def _study_names():
    """The names of the files of studies/."""
    folder = Path(r1mini.__file__).parent / "studies"
    return sorted(path.stem for path in folder.glob("[a-z]*.py"))


def _find_study(name):
    """The module of a study. UserError if there is none of this name."""
    if name not in _study_names():
        raise UserError(f"study {name}: choose all or one of {', '.join(_study_names())}")
    return importlib.import_module(f"studies.{name}")


def has_runs(study):
    """Whether `study NAME` can run a study. The others have a command of their own."""
    return bool({"RUNS", "measure", "ARMS"} & set(vars(study)))


def all_studies():
    """{name: module} of all studies that have runs. r1 is the first, since others start from its
    models. Studies that are a part of `speed` or `scale` are left out."""
    studies = {name: _find_study(name) for name in ("r1", *_study_names())}
    parts = ("layouts", "peers", "race")
    return {name: study for name, study in studies.items()
            if name not in parts and has_runs(study)}


def _user_error_line(error, options=None):
    """The line to print about an error that the user can correct. None if it is the program's
    fault."""
    if isinstance(error, UserError):
        return " ".join(str(error).splitlines())
    if is_out_of_memory(error):
        return "out of memory; ask for less"
    if isinstance(error, RuntimeError):
        error = error.__context__  # torch wraps the errors that happen while it writes
    if isinstance(error, OSError):
        where = error.filename or getattr(options, "out", None) or "a file"
        line = f"{where}: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            line += f"; free some space, and {_same_command(options)} goes on"
        return line
    return None


def _same_command(options):
    """The words for the command that continues a stopped run. With --fresh it would delete the
    run."""
    fresh = getattr(options, "fresh", False)
    return "the same command without --fresh" if fresh else "the same command"


# ------------------------------------------------------------------------------
# Words


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        """Exits with code 2."""
        self.exit(2, f"r1mini: {message} (try: python {self.prog} --help)\n")


def _preset_options():
    """--preset."""
    options = Parser(add_help=False)
    options.add_argument("--preset", default="nano", choices=list(PRESETS),
                         help="the model's sizes and the settings of its training")
    return options


def _compute_options():
    """The options of everything that computes."""
    options = Parser(add_help=False)
    add = options.add_argument
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: cuda if there is one")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
        help="of the forward pass; auto: bfloat16 on CUDA, float32 elsewhere")
    add("--threads", type=int, default=0, help="CPU threads in all; 0: one a core")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", action="extend",
        help="any setting, such as zero.lr=1e-4 or model.dim=128")
    return options


def _process_options():
    """--processes."""
    options = Parser(add_help=False)
    options.add_argument(
        "--processes", type=int, default=0,
        help="processes on this machine that share each step; 0: on a CPU one a thread, at most "
             "four")
    return options


def _run_options():
    """The options of everything that has a run's folder."""
    options = Parser(add_help=False)
    add = options.add_argument
    add("--out", help="the run's folder; default runs/PRESET")
    add("--parallel", choices=["none", "ddp", "fsdp"], default="ddp",
        help="what each process holds: all weights (ddp) or a part of each weight (fsdp)")
    add("--expert-parallel", type=int, default=1, metavar="N",
        help="N processes share the routed experts; tokens travel to them")
    add("--recompute", action="store_true",
        help="keep no activations within a block: less memory, a third more time")
    add("--seed", type=int, default=0)
    add("--save-every", type=int, default=20, help="steps between saves")
    add("--fresh", action="store_true", help="delete the run in the folder and start over")
    add("--tensorboard", action="store_true", help="write the log's curves for TensorBoard too")
    add("--only", nargs="+", choices=list(r1mini.STAGES), metavar="STAGE",
        help="run these stages and no others")
    return options


def _make_parser():
    """The parser of the whole command line."""
    sized, computing = _preset_options(), _compute_options()
    several, running = _process_options(), _run_options()
    top = Parser(prog="r1mini.py", description=r1mini.__doc__,
                 formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", parser_class=Parser, metavar="COMMAND")

    for name, text in COMMANDS.items():
        command = commands.add_parser(name, parents=[sized, computing, several, running],
                                      help=text)
        if name != "base":
            command.add_argument("--from", dest="start", metavar="CKPT",
                                 help="take this model, and those before it, from CKPT's folder")
        if name == "distill":
            command.add_argument("--data", metavar="FILE.jsonl",
                                 help="dialogues in chat format, instead of R1's answers")

    command = commands.add_parser("eval", parents=[computing],
                                  help="pass@1, majority vote, pass@k")
    command.add_argument("checkpoint")
    command.add_argument("--problems", metavar="FILE.jsonl",
                         help='lines of {"question": ..., "answer": ...}')
    command.add_argument("--against", metavar="CKPT",
                         help="which of two is better, paired by problem, with an interval")
    command.add_argument("--samples", type=int, default=16, help="answers to each problem")
    command.add_argument("--json", action="store_true",
                         help="print one object with all problems in it")

    command = commands.add_parser("chat", parents=[computing], help="talk to a checkpoint")
    command.add_argument("checkpoint")
    command.add_argument("--ask", metavar="TEXT", help="one question, for a pipe")

    # Both are in tools/export.py: no module can be named import.
    command = commands.add_parser("export", help="write a checkpoint as a Hugging Face folder")
    command.add_argument("checkpoint")
    command.add_argument("folder")
    command.set_defaults(command="export", back=False, device="cpu", dtype="float32", threads=0)
    command = commands.add_parser("import", help="make a checkpoint of a Hugging Face folder")
    command.add_argument("folder")
    command.add_argument("checkpoint")
    command.set_defaults(command="export", back=True, device="cpu", dtype="float32", threads=0)

    command = commands.add_parser("report", help="mean and spread over runs")
    command.add_argument("runs", nargs="*")
    command.add_argument("--pages", action="store_true",
                         help="write the numbers of results/ into README, docs and workshop")
    command.add_argument("--to", metavar="DIR", help="keep summary.json and the curves there")

    command = commands.add_parser("study", parents=[sized], help="the runs behind a page of "
                                                                 "results/")
    command.add_argument("name", metavar="NAME", help="a file of studies/, such as r1 or zero; "
                                                     "all: every seed that is missing")
    rest = command.add_argument("rest", nargs=argparse.REMAINDER,
                                help="--seeds 0 1 2, and options for its runs")
    rest.required = False  # otherwise a study without a name asks for these too

    command = commands.add_parser("bench", parents=[sized, computing, several],
                                  help="tokens a second here")
    command.add_argument("--json", action="store_true", help="print one object")
    command.add_argument("--against", action="store_true", help="beside transformers and TRL")
    command.add_argument("--from", dest="start", metavar="CKPT",
                         help="with --against: zero.pt of a run; adds the work of its RL")
    command.add_argument("--part", nargs="+", choices=["documents", "zero", "rl", "shape"],
                         metavar="PART", help="with --against: documents, zero, rl or shape")

    command = commands.add_parser("cost", parents=[sized], help="the parameters of a preset")
    add = command.add_argument
    add("--gpus", type=int, help="also what training on so many GPUs takes")
    add("--tokens", type=float, help="tokens to train on; default 14.8e12, V3's")
    add("--mfu", type=float, help="share of the peak FLOPs; default: what V3's hours imply")
    add("--dollars-per-hour", type=float, help="of a GPU; default 2")

    command = commands.add_parser("check", parents=[sized, computing, several],
                                  help="what works on this machine, in a minute")
    command.add_argument("--part", choices=["step", "speed", "fit"],  # only check itself gives it
                         help=argparse.SUPPRESS)

    command = commands.add_parser("look", help="a page that shows RL on a run")
    command.add_argument("run", metavar="RUN", help="the run's folder; the page is its look.html")

    commands.add_parser("show", help="a group of answers, rewards and advantages, in ten seconds")

    one = commands.add_parser("annotate", help="the lesson files as pages beside the equations")
    one.add_argument("folder", nargs="?", default="annotated", help="default annotated")
    return top


def parse_arguments(argv):
    """The options of a command line. Without a command it is all."""
    _check_torchrun()
    if int(os.environ.get("RANK", 0)):  # of several processes, only the first prints
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)
    asks_for_help = argv and argv[0] in ("-h", "--help")
    if not argv or argv[0].startswith("-") and not asks_for_help:
        argv.insert(0, "all")
    options = _make_parser().parse_args(_join_question(argv))
    for name, value in vars(options).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                _check_word(name, text)
    options.itself = [sys.executable, r1mini.__file__, *argv]  # to start more processes of it
    _prepare_machine(options)
    return options


def _join_question(argv):
    """The words of a command line, with `--ask -5+3` as --ask=-5+3. Otherwise argparse would take
    the question for an option. If a question begins with a dash and then a letter or another dash,
    the user has to write the "="."""
    words = []
    for word in argv:
        if words and words[-1] == "--ask" and re.match("-[^a-zA-Z-]", word):
            words[-1] = f"--ask={word}"
        else:
            words.append(word)
    return words


def _check_word(name, text):
    """UserError if a word of the command line is empty, or has bytes that are no text: settings
    and reports are written in UTF-8. name: of the option."""
    if not text.strip():
        raise UserError(f"{name}: got an empty text; leave it out, or say what is meant")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name}: {text!a} is not valid {sys.getfilesystemencoding()}; rename the "
                        "file, or write the text in this encoding") from None


def _check_torchrun():
    """UserError if the environment names several processes, as torchrun's does, but wrongly."""
    numbers = ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    env = {name: os.environ[name] for name in (*numbers, "MASTER_ADDR") if name in os.environ}
    wrong = [name for name in numbers if not env.get(name, "0").isdecimal()]
    if devices.STORE not in os.environ and ("RANK" in env or "WORLD_SIZE" in env):
        needed = ("RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
        wrong += [name for name in needed if not env.get(name)]
    if wrong:
        raise UserError(f"the environment's {wrong[0]} is missing or wrong: start with torchrun, "
                        "or unset RANK and WORLD_SIZE")


# ------------------------------------------------------------------------------
# What a command needs


def _prepare_machine(options):
    """Checks numbers, device and dtype; sets threads, processes and memory."""
    for name, (least, most) in BOUNDS.items():
        value = getattr(options, name, None)
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name.replace('_', '-')} must be within {least}..{most}")
    if getattr(options, "tensorboard", False):
        tensorboard()  # fails here, and not after the folder is made
    if not hasattr(options, "device"):
        return
    options.device, options.dtype = _choose_device(options.device, options.dtype)
    # On a CPU each new shape of a bfloat16 product is compiled, and 1,024 are kept: too few.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    threads = options.threads or CORES
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or getattr(options, "processes", 1)
    if not processes:
        # The steps of micro take less time than the messages between processes.
        worth_it = (options.device.type == "cpu" and options.preset != "micro"
                    and getattr(options, "parallel", "") != "none")
        processes = min(4, threads) if worth_it else 1
    torch.set_num_threads(max(1, threads // processes))
    kernels.keep_freed_memory()
    options.processes = processes
    if hasattr(options, "parallel"):
        all_processes = int(os.environ.get("WORLD_SIZE", 0)) or processes
        options.layout = _layout_of(options, all_processes)


def _choose_device(device="auto", dtype="auto"):
    """(torch.device, torch.dtype) of a user's words. UserError if there is no such device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=device).device
        torch.autocast(device.type, torch.bfloat16)
    except Exception as error:  # torch raises many types, such as ModuleNotFoundError for hpu
        if is_out_of_memory(error):
            raise
        sentence = (str(error) or repr(error)).splitlines()[0].split(". ")[0]
        reason = textwrap.shorten(sentence, 100, placeholder=" ...")
        raise UserError(f"--device {device}: not available here ({reason})") from None
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return device, getattr(torch, dtype)


def _layout_of(options, processes):
    """The layout for devices.place_model(); () if each process holds the whole model.
    UserError if so many processes cannot have it."""
    mode, experts = options.parallel, options.expert_parallel
    if mode == "none" and processes > 1:
        raise UserError(f"--parallel none is for one process, here are {processes}")
    if mode == "fsdp" and processes == 1:
        raise UserError("--parallel fsdp spreads the weights over several processes: give "
                        "--processes, or start with torchrun")
    if experts < 1 or processes % experts:
        raise UserError(f"--expert-parallel {experts} must divide the number of processes, "
                        f"{processes}")
    if experts > 1 and not kernels.has_grouped_product(torch.empty(0, device=options.device)):
        raise UserError(f"--expert-parallel {experts} needs torch's grouped product. This device "
                        "lacks it: a CPU, or CUDA of compute capability 8.0 or later, has it")
    if mode != "fsdp" and experts == 1 and not options.recompute:
        return ()
    return mode, experts, options.recompute


def load_from_arguments(options, path=None):
    """(model, all else that was saved) of a command's checkpoint, or of another one at `path`.
    UserError if it cannot write."""
    path = path or options.checkpoint
    model, record = checkpoint.load(path, options.device, options.dtype)
    if model.config.n_outputs:
        raise UserError(f"{path} is a reward model: it gives scores and cannot write")
    checkpoint.check_vocabulary(path, model.config)
    return model, record


def _config_of(name, run):
    """The Config of a stage's model."""
    config = run.student if name.startswith(("student", "distill")) else run.model
    if name in ("helpful", "safe"):
        config = dataclasses.replace(config, n_outputs=1, n_mtp_layers=0)
    return config


def _load_stage(path, name, run):
    """UserError if a stage's checkpoint is damaged, or has other sizes than this run."""
    model, record = checkpoint.load(path)
    checkpoint.check_vocabulary(path, model.config)
    if model.config != _config_of(name, run):
        preset = f", of preset {record['preset']}," if "preset" in record else ""
        raise UserError(f"{path}{preset} has other sizes than this run; give its --preset and "
                        "--set")


def _needed_checkpoints(options, start, data, names):
    """{path: stage} of the checkpoints that a command needs and does not make. UserError if one is
    missing, or if --fresh would delete it."""
    folder, checkpoints = Path(options.out or f"runs/{options.preset}"), {}
    for name in names:
        for needed in NEEDS.get(name, ()):
            from_data = bool(data) and (name, needed) == ("distill", "r1")
            if needed in names or from_data:
                continue
            path = folder / f"{needed}.pt"
            if start and (options.fresh or not path.exists()):
                path = Path(start).parent / path.name
            elif options.fresh and path.exists():
                raise UserError(f"--fresh would delete {path}, which {name} needs")
            if not path.exists():
                raise UserError(f"{name} needs {path}, which does not exist: leave out --only, or "
                                "give --from CKPT with another run's checkpoint")
            checkpoints[path] = needed
    return checkpoints


def _plan_run(options):
    """(the Run, the names of its stages) of a command that trains. All files are checked."""
    start = getattr(options, "start", None) or ""
    data = getattr(options, "data", None) or ""
    run = resolve_settings(
        options.preset, options.set, seed=options.seed, start=start, data_file=data,
        device=options.device.type, dtype=str(options.dtype).removeprefix("torch."))
    for part, config in (("model", run.model), ("student", run.student)):
        has_experts = config.n_dense_layers < config.n_layers
        if has_experts and config.n_routed_experts % options.expert_parallel:
            raise UserError(f"--expert-parallel {options.expert_parallel} must divide "
                            f"{part}.n_routed_experts, {config.n_routed_experts}")
    stages = list(r1mini.STAGES)
    last = stages[-1] if options.command in ("all", "distill") else options.command
    names = stages[:stages.index(last) + 1]
    if data:
        longest = run.student.max_seq_len
        if "distill_logits" in (options.only or ()):  # there the teacher reads them too
            longest = min(longest, run.model.max_seq_len)
        r1mini.read_dialogues(data, longest)
        if not options.only:
            names = ["student", "distill"]
    if start:
        given = Path(start).stem
        if given not in stages:
            raise UserError(f"--from {start}: name it after its stage, such as base.pt; the models "
                            "before it are taken from its folder")
        if given not in names[:-1]:
            raise UserError(f"--from {start}: {options.command} has nothing to do after {given}")
        _load_stage(start, given, run)
        names = names[names.index(given) + 1:]
    chosen = options.only or set(names) - r1mini.ABLATIONS
    names = [name for name in names if name in chosen]
    if not names:
        raise UserError(f"--only {' '.join(options.only)}: not a stage of this command")
    for path, name in _needed_checkpoints(options, start, data, names).items():
        _load_stage(path, name, run)
    is_default = (options.preset == "nano" and options.command == "all"
                  and not (options.set or options.only or start))
    options.expected = "10 to 20 minutes and 2 GiB on two cores; " if is_default else ""
    return run, names


# ------------------------------------------------------------------------------
# Running the stages


class Models(dict):
    """The models of a run by stage. A model that this command did not make is loaded when it is
    asked for: from the run's own folder, or else from the folder of --from."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def __missing__(self, name):
        path = self.folder.path / f"{name}.pt"
        if self.folder.run.start and not path.exists():
            path = Path(self.folder.run.start).parent / path.name
        self[name] = self.folder.load(path)[0]
        return self[name]


def _stop_now(number, _):
    """Called at a signal to end, before the first stage and after the last."""
    raise KeyboardInterrupt(number)


@contextlib.contextmanager
def _on_signals(handler):
    """A context in which a handler is called at signals to end. nohup's choice, to ignore SIGHUP,
    stays."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number, old in before.items():
        if old != signal.SIG_IGN or number == signal.SIGINT:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _run_stages(options, run, names):
    """Runs the stages, tests each on held-out problems, and prints the report."""
    out = Path(options.out or f"runs/{options.preset}")
    needed = _needed_checkpoints(options, run.start, run.data_file, names)
    inputs = [path for path in needed if path.resolve().parent != out.resolve()]
    with (output.lasting_output(), _on_signals(_stop_now),
          devices.processes(options.device, options.processes, options.itself) as options.device):
        folder = Folder(out, run, options, r1mini.STAGES,
                        {name: _config_of(name, run) for name in names}, inputs)
        models = Models(folder)
        print(f"{run.preset}, seed {run.seed}, into {folder.path}; {options.expected}stages:\n"
              f"  {' '.join(names)}\n"
              "In pretraining the loss should fall, in RL the accuracy should rise. Dev scores "
              "come on the way,\ntest scores at the end of a stage. Ctrl-C saves; "
              f"{_same_command(options)} goes on.")
        with _on_signals(folder.interrupt):
            for name in names:
                models[name] = r1mini.STAGES[name](folder, models)
        if devices.is_main() and any(r["kind"] == "test" for r in read_log(folder.path)):
            report = importlib.import_module("tools.report").report
            print("\n" + report([folder.path]))
