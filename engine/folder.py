"""The folder of a run: what is kept of it, and where a stopped run goes on.

    .r1mini              marks the folder as a run's; the hashes of the run's input files
    config.json          the settings
    log.jsonl            one record a line; no clock, so that two runs can be compared byte by byte
    timing.jsonl         machine and commit; seconds, tokens a second and memory
    STAGE.pt             the model of a finished stage
    STAGE.partial.pt     the last save of an unfinished stage
    STAGE.jsonl          the dialogues that a stage learns from
    look.jsonl           one group of answers at every second step of RL (engine/look.py)
    tensorboard/         the log's curves for TensorBoard, with --tensorboard
"""
import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import tasks
from engine import checkpoint, devices
from engine.errors import UserError

try:
    import fcntl
except ImportError:  # on Windows; there, only the log shows that two commands wrote one folder
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent
LOCKS = {}  # {folder that this process writes: lock}; the system frees those left when it ends
PATIENCE = 10  # skipped updates in a row
MARK = ".r1mini"  # the file that every run's folder has
LOOK = "look.jsonl"  # written by engine/look.py
FILES = ("start", "data_file")  # the settings that name a file


def _lock_folder(path):
    """Locks a folder for this process. UserError if another process writes there."""
    if fcntl is None or path.resolve() in LOCKS:
        return
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        LOCKS[path.resolve()] = file
    except OSError as error:
        os.close(file)
        if isinstance(error, BlockingIOError):  # other errors: the file system has no locks
            raise UserError(f"{path}: another command is writing there; wait until it ends, or "
                            "choose another --out") from None


def release_locks():
    """Frees all locks of this process. A process that writes hundreds of folders, one after the
    other, would otherwise have too many open files."""
    for file in LOCKS.values():
        os.close(file)
    LOCKS.clear()


def flatten_settings(tree, prefix=""):
    """A nested dict as {dotted key: value}."""
    leaves = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves |= flatten_settings(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves


def list_names(names):
    """The first three names, and how many more there are."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def read_log(path, repaired=False):
    """The records of a run's log.jsonl. UserError if the folder holds no run, or if a step is there
    twice, since then two commands wrote the folder at once. repaired: without a torn last line."""
    try:
        content = (Path(path) / "log.jsonl").read_bytes()
        if repaired:
            content = content[:content.rfind(b"\n") + 1]
        records = [json.loads(line) for line in content.split(b"\n") if line]
        if any(r["kind"] != "config" for r in records[:1]):
            raise ValueError
        points = [(r["kind"], r.get("stage"), r["step"]) for r in records if "step" in r]
        if len(set(points)) < len(points):
            raise ValueError
        return records
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no run in this folder (no log.jsonl)") from None
    except (ValueError, TypeError, KeyError):
        if content.endswith(b"\n"):
            remedy = "start over with --fresh"
        else:
            remedy = "if only the last line is torn, the command that made this run repairs it"
        raise UserError(f"{path}/log.jsonl is damaged; {remedy}") from None


def holds_run(path, settings):
    """Whether a folder is a run's, so that its files may be replaced. It has a mark. A run that was
    made before there were marks has a config.json with all `settings` (their names) and no others,
    and a log.jsonl that can be read."""
    path = Path(path)
    if (path / MARK).is_file():
        return True
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
        return isinstance(config, dict) and set(config) == set(settings) and bool(
            read_log(path, repaired=True))
    except (ValueError, OSError):  # UserError is a ValueError
        return False


def _hash_of(path):
    """The SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tensorboard_scalars(record):
    """(step, {tag: number}) of a log record, for TensorBoard. Tags are such as zero/kl of a step
    and zero/dev/pass@1 of an evaluation. A record without a step has no numbers."""
    kind, step, values = record["kind"], record.get("step"), {}
    if step is None:
        return step, values
    stem = f"{record['stage']}/{kind}" if "stage" in record else kind
    for name, value in flatten_settings(record).items():
        if name != "step" and type(value) in (int, float):
            values[f"{stem}/{name}"] = value
    return step, values


def tensorboard():
    """TensorBoard's writer class. UserError if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter
    except ImportError:
        raise UserError("--tensorboard: not installed (pip install tensorboard). The same numbers "
                        "are in log.jsonl") from None


def describe_machine():
    """The processor's name and the number of its cores."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError, UnicodeDecodeError):
        name = re.findall("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text("utf-8"))[0]
    return f"{name}, {os.cpu_count()} cores"


def describe_commit():
    """The commit of this clone, with a + if files outside results/ were changed since. "" outside a
    clone."""
    def git(*words):
        return subprocess.run(["git", *words], capture_output=True, cwd=ROOT, text=True)

    try:
        name = git("describe", "--always", "--exclude=*").stdout.strip()
        changed = git("diff", "--quiet", "HEAD", "--", ".", ":(exclude)results").returncode == 1
        return f"{name}+" if name and changed else name
    except OSError:
        return ""


def peak_gib():
    """The largest resident memory of this process so far, in GiB; 0 on Windows, which does not
    say."""
    with contextlib.suppress(ImportError):
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on a Mac bytes
        return round(peak / 2 ** (30 if sys.platform == "darwin" else 20), 3)
    return 0.0


class Folder:
    """A run's folder: its settings, log, clock and checkpoints.

    run: the settings, r1mini.Run. options: of the command line. stages: the names of all stages.
    expected: {stage: the model's Config} of the stages that the command runs, in their order.
    inputs: the checkpoints of other runs that it starts from or learns from.
    """

    def __init__(self, path, run, options, stages, expected=None, inputs=()):
        self.path, self.run, self.options = Path(path), run, options
        self.stop, self.signal = False, signal.SIGINT  # asked to stop, by this signal
        self.board, self.stages = None, list(stages)
        processes = devices.rank_and_size()[1]
        # To be logged before the first time.
        self.machine = {"machine": describe_machine(), "processes": processes,
                        "threads": torch.get_num_threads() * processes,
                        "commit": describe_commit()}
        if devices.is_main():
            self.begin(expected or {}, inputs)
            self.draw()
            if not (self.path / "timing.jsonl").exists():
                self.log_machine()
        devices.any_process()

    def begin(self, expected, inputs):
        """Makes the folder, or checks that it holds this very run. All is checked before anything
        is written, so a command that is refused here has changed nothing."""
        if self.path.is_file():
            raise UserError(f"{self.path} is a file; --out names a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        _lock_folder(self.path)
        config = json.loads(json.dumps(dataclasses.asdict(self.run)))
        mark = self.path / MARK
        is_run = holds_run(self.path, config)
        if not is_run and {file.name for file in self.path.iterdir()} - {f"{MARK}.tmp"}:
            raise UserError(f"{self.path} is not empty and holds no run of r1mini: choose another "
                            "--out")
        hashes = self.hashes(inputs)
        known_hashes = self.known_hashes()
        goes_on = not self.options.fresh and self.check_run(config, hashes, known_hashes, expected)
        if self.options.fresh:
            self.check_fresh()
        # From here on the folder is changed.
        if not goes_on:
            known_hashes = {}
        if not mark.exists() or known_hashes | hashes != self.known_hashes():
            self.replace(mark, json.dumps({"inputs": known_hashes | hashes}, indent=1))
        if self.options.fresh:
            for name in self.replaceable():
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        if goes_on:
            for name in ("log.jsonl", "timing.jsonl"):  # a kill or a full disk can tear a line
                if (self.path / name).exists():
                    self.cut(self.whole_lines(name), name)
        else:
            (self.path / "log.jsonl").write_text("", "utf-8")
            versions = {"python": platform.python_version(), "torch": torch.__version__}
            self.append({"kind": "config", "versions": versions} | config, "log.jsonl")
            self.replace(self.path / "config.json", json.dumps(config, indent=1))

    def replaceable(self):
        """The names of the files that --fresh deletes."""
        stage_files = [stage + end for stage in self.stages
                       for end in (".pt", ".partial.pt", ".jsonl")]
        return ["config.json", "log.jsonl", "timing.jsonl", "samples.md", "report.md",
                "report.html", LOOK, "look.html", *stage_files]

    def check_fresh(self):
        """UserError if --fresh would delete what the run needs."""
        for path in (self.run.start, self.run.data_file):
            in_folder = path and Path(path).resolve().parent == self.path.resolve()
            if in_folder and (path == self.run.start or Path(path).name in self.replaceable()):
                raise UserError(f"--fresh would delete {path}: choose another --out")

    def hashes(self, inputs):
        """{name: hash} of the files of others that the run depends on."""
        files = {Path(path).name: path for path in (*inputs, self.run.start) if path}
        files["data_file"] = self.run.data_file
        return {name: _hash_of(path) for name, path in files.items()
                if path and Path(path).is_file()}

    def known_hashes(self):
        """The hashes() of when the run began; {} if nobody wrote them down."""
        try:
            return dict(json.loads((self.path / MARK).read_text("utf-8"))["inputs"])
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{self.path / MARK} is damaged; delete this file, and the command "
                            "that made this run goes on") from None

    def check_run(self, config, hashes, known_hashes, expected):
        """Whether a run was begun in the folder. UserError if it has other settings or other
        inputs, or if it is damaged, or if another of its stages has to end first."""
        known = self.path / "config.json"
        if not known.exists():
            log = self.path / "log.jsonl"
            begun = log.exists() and log.read_bytes().count(b"\n") > 1
            models = [name for name in self.replaceable() if name.endswith(".pt")]
            if begun or any((self.path / name).exists() for name in models):
                raise UserError(f"{known} is missing, but a run was begun in this folder: put it "
                                "back, or choose another --out, or --fresh to start over")
            return False
        try:
            old = flatten_settings(json.loads(known.read_text("utf-8")))
        except (ValueError, AttributeError):
            raise UserError(f"{known} is damaged; start over with --fresh") from None
        self.check_settings(old, flatten_settings(config), hashes, known_hashes)
        for name, value in hashes.items():
            if known_hashes.get(name, value) != value:
                path = self.run.data_file
                if name != "data_file":
                    path = Path(self.run.start).parent / name
                raise UserError(f"{path} is not the file with which the run in {self.path} began: "
                                "put the old one back, or choose another --out, or --fresh to "
                                "start over")
        records = read_log(self.path, repaired=True)
        for name, expected_config in expected.items():
            path = self.path / f"{name}.pt"
            if not path.exists():
                path = self.path / f"{name}.partial.pt"
            if path.exists():
                model, record = checkpoint.load(path)
                self.check_checkpoint(path, model.config, expected_config, record)
        unfinished = [name for name in expected if not (self.path / f"{name}.pt").exists()]
        if unfinished:
            self.check_order(unfinished[0], records)
        return True

    def check_settings(self, old, new, hashes, known_hashes):
        """UserError if the settings of two runs, {dotted key: value}, differ. Two paths to one file
        are the same setting."""
        other = sorted(key for key in old | new if old.get(key) != new.get(key))
        for key in set(other) & set(FILES):
            name = "data_file" if key == "data_file" else Path(new[key]).name
            if not old.get(key) or not new[key]:
                continue
            is_same_path = Path(old[key]).resolve() == Path(new[key]).resolve()
            if is_same_path or name in hashes and hashes[name] == known_hashes.get(name):
                other.remove(key)
        if not other:
            return
        difference = list_names(other)
        if "preset" in other:
            difference = f"its preset is {old.get('preset')}, here {new['preset']}"
        elif any(key.endswith(".steps") for key in other):
            difference += ("; a stage cannot be made longer, since its learning rate is planned "
                           "for all its steps")
        raise UserError(f"{self.path} holds a run with other settings ({difference}): choose "
                        "another --out, or --fresh to start over")

    def replace(self, path, text):
        """Writes a file whole or not at all."""
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(text, "utf-8")
        temporary.replace(path)

    def whole_lines(self, name):
        """How many bytes of a file there are up to the end of its last whole line."""
        return (self.path / name).read_bytes().rfind(b"\n") + 1

    def log_machine(self):
        """Appends the machine to timing.jsonl, once. A command that is refused, or that
        finds all stages finished, has timed nothing."""
        if self.machine:
            self.append(self.machine, "timing.jsonl")
            self.machine = None

    def append(self, record, name):
        """Adds a record to a file, as a line."""
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def log(self, record, name="log.jsonl"):
        """Appends a record to log.jsonl. One process writes; none reads it before all have met
        again, for the next step or an evaluation."""
        if devices.is_main():
            if name == "timing.jsonl":
                self.log_machine()
            self.append(record, name)
            if name == "log.jsonl":
                self.draw([record])

    def draw(self, records=None):
        """Shows records to TensorBoard. Without records, shows all of log.jsonl instead of what was
        shown before."""
        if not getattr(self.options, "tensorboard", False):
            return
        if records is None:
            if self.board:
                self.board.close()
            shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
            # purge_step=0: a running TensorBoard forgets what it has seen.
            self.board = tensorboard()(str(self.path / "tensorboard"), purge_step=0)
            records = read_log(self.path)
        for record in records:
            step, values = _tensorboard_scalars(record)
            for tag, value in values.items():
                self.board.add_scalar(tag, value, step)
        self.board.flush()

    def write(self, path, text):
        """Writes a text whole or not at all. One process writes, the others wait."""
        if devices.is_main():
            self.replace(path, text)
        devices.any_process()

    def check(self):
        """Raises KeyboardInterrupt in all processes if one of them was asked to stop."""
        if devices.any_process(self.stop):
            raise KeyboardInterrupt(self.signal)

    def clock(self, stage, step, began, tokens=0, worked=None):
        """Appends to timing.jsonl, which alone has a clock. `seconds` is all time since `began`;
        tokens a second are those of the step alone, which took `worked` seconds."""
        record = {"stage": stage, "step": step, "seconds": round(time.monotonic() - began, 3)}
        if worked:
            record |= {"tokens": tokens, "tokens_per_second": round(tokens / worked)}
        peak = float(devices.all_sum(torch.tensor(peak_gib()).double()))  # of all processes
        self.log(record | {"peak_gib": round(peak, 3)}, "timing.jsonl")

    def kept(self):
        """What a checkpoint remembers of the run: how many bytes of log.jsonl there are, which are
        on the disk when this returns."""
        with open(self.path / "log.jsonl", "ab") as file:
            os.fsync(file.fileno())
            return {"log": file.tell(), "preset": self.run.preset}

    def cut(self, position, name="log.jsonl"):
        """Shortens log.jsonl, or another file, to `position` bytes. What came after that
        position is done, and logged, again."""
        if devices.is_main():
            with open(self.path / name, "r+b") as file:
                shorter = position < file.seek(0, os.SEEK_END)
                file.truncate(position)
            if shorter:
                self.draw()

    def cut_look(self, stage, step):
        """Removes from look.jsonl what a stage wrote after a step, and a torn last line. -1 is
        before the stage began."""
        if not (self.path / LOOK).exists():
            return
        position = 0
        for line in (self.path / LOOK).read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line)
                later = record["stage"] == stage and record["step"] > step
            except (ValueError, KeyError, TypeError):
                later = False  # damaged: engine/look.py skips this line
            if later or not line.endswith(b"\n"):
                break
            position += len(line)
        self.cut(position, LOOK)

    def begun(self, name, collected=False):
        """The position in log.jsonl of a stage's first record, or the end if there is none. The
        record of what was collected for the stage counts only with `collected`."""
        position = 0
        for line in (self.path / "log.jsonl").read_bytes().splitlines(keepends=True):
            record = json.loads(line)
            if name in (record["kind"], record.get("stage")) and (
                    collected or record["kind"] != "collected"):
                break
            position += len(line)
        return position

    def place(self, model):
        """Puts a new model on the run's device, in its dtype, spread over its processes."""
        options = self.options
        return devices.place_model(model, options.device, options.dtype, *options.layout)

    def load(self, path):
        """(model, all else that was saved) of a checkpoint. The model is placed like a new one."""
        options = self.options
        return checkpoint.load(path, options.device, options.dtype, *options.layout)

    def resume(self, path, model):
        """load() of a checkpoint of this run. UserError if it belongs to another."""
        loaded, record = self.load(path)
        self.check_checkpoint(path, loaded.config, model.config, record)
        return loaded, record

    def check_checkpoint(self, path, config, expected, record):
        """UserError if a checkpoint, of a model of this config, does not belong to this run."""
        if config != expected:
            if expected.vocab_size == tasks.VOCAB_SIZE:
                checkpoint.check_vocabulary(path, config)
            raise UserError(f"{path} is not of this run: replace or delete it")
        if "log" not in record or (
                path.name.endswith(".partial.pt") and "optimizers" not in record):
            raise UserError(f"{path} is not of this run: replace or delete it")
        if record["log"] > self.whole_lines("log.jsonl"):
            raise UserError(f"{self.path}/log.jsonl has lost what was logged before {path.name} "
                            "was saved; start over with --fresh")

    def check_order(self, name, records):
        """UserError if another stage was stopped half-way. When that stage went on, it would cut
        the log where it stopped, and so lose what this stage had logged."""
        begun = set()
        for record in records:
            if record["kind"] != "collected":
                begun |= {record["kind"], record.get("stage")}
        for other in self.stages:
            if other != name and other in begun and not (self.path / f"{other}.pt").exists():
                raise UserError(f"{self.path}: {other} was stopped half-way and has to end before "
                                f"{name} begins: repeat the command that began it, or choose "
                                "another --out")

    def stage(self, name, model, loop, steps, watch):
        """Runs loop(model, state), a generator of (record, snapshot), and returns the model.

        Each record is logged and given to watch(model, record, bar). A checkpoint is saved every
        --save-every steps and at the end. A finished stage is loaded instead. A stopped stage goes
        on from its last save; what was logged after that is done again. After PATIENCE skipped
        updates in a row it ends with UserError; none of these is saved.
        """
        every, state = self.options.save_every, None
        final, partial = self.path / f"{name}.pt", self.path / f"{name}.partial.pt"
        if final.exists():
            print(f"{name}: finished earlier, {final}")
            partial.unlink(missing_ok=True)  # a kill can leave both
            return self.resume(final, model)[0]
        if partial.exists():
            model, state = self.resume(partial, model)
            print(f"{name}: goes on after step {state['step']} of {steps}")
        self.check_order(name, read_log(self.path))
        devices.any_process()
        self.cut(state["log"] if state else self.begun(name))
        self.cut_look(name, state["step"] if state else -1)
        devices.any_process()
        began, saved, skipped = time.monotonic(), state["step"] if state else 0, 0
        with tqdm(total=steps, initial=saved, desc=name, dynamic_ncols=True) as bar:
            if not state:
                watch(model, {"step": 0}, bar)
            started = time.monotonic()
            for record, snapshot in loop(model, state):
                worked = time.monotonic() - started
                self.log({"kind": name} | record)
                watch(model, record, bar)
                all_skipped = record.get("skipped") and not record["grad_norm"]
                skipped = skipped + record["skipped"] if all_skipped else 0
                if skipped >= PATIENCE:
                    kept = f"{partial} has step {saved}" if saved else "nothing was saved before"
                    raise UserError(f"{name}: {skipped} updates in a row were skipped, since their "
                                    f"gradients were not finite; {kept}. Lower its lr and start "
                                    "again with another --out")
                stop = devices.any_process(self.stop)
                if record["step"] == steps:
                    checkpoint.save(final, model, **self.kept())
                    if devices.is_main():
                        partial.unlink(missing_ok=True)
                elif (stop or record["step"] % every == 0) and not skipped:
                    saved = record["step"]
                    checkpoint.save(partial, model, **self.kept(), **snapshot())
                self.clock(name, record["step"], began, record["tokens"], worked)
                shown = {k: record[k] for k in ("loss", "accuracy", "length") if k in record}
                speed = {"tok/s": f"{record['tokens'] / worked:.0f}"}
                bar.set_postfix(shown | speed, refresh=False)
                bar.update()
                if stop:
                    raise KeyboardInterrupt(self.signal)
                began = started = time.monotonic()
        return model

    def interrupt(self, number=signal.SIGINT, _=None):
        """Called at Ctrl-C and other signals to end: the present step ends and is saved. A second
        signal stops at once."""
        if self.stop:
            raise KeyboardInterrupt(number)
        self.stop, self.signal = True, number
        with contextlib.suppress(RuntimeError):  # the signal came in the middle of a print
            print("\nfinishing this step and saving it (Ctrl-C again stops now)", file=sys.stderr)
