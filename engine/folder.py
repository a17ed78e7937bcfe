"""The folder of a run: what is kept of it, and where a stopped one goes on.

config.json, log.jsonl (without a clock: two runs compare to the bit), timing.jsonl, a checkpoint
for each finished stage and a partial one for the stage at hand; with --tensorboard the log's curves
once more, for TensorBoard.
"""
import contextlib
import dataclasses
import json
import os
import platform
import re
import shutil
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from engine import checkpoint, devices
from engine.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: two commands in one folder are then told by the log alone
    fcntl = None

LOCKS = {}  # of the folders this process writes: the system frees them when it ends, killed or not


def lock(path):
    """Claims a folder for this process; UserError if another one is writing there."""
    if fcntl is None or path.resolve() in LOCKS:
        return
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        LOCKS[path.resolve()] = file
    except OSError as error:
        os.close(file)
        if isinstance(error, BlockingIOError):  # others: a file system without locks
            raise UserError(f"{path}: another command is writing there; wait for its end, or "
                            "choose another --out") from None


def flat(tree, prefix=""):
    """A nested dict as {dotted key: value}."""
    return {key: leaf for name, value in tree.items() for key, leaf in (
        flat(value, f"{prefix}{name}.") if isinstance(value, dict)
        else {prefix + name: value}).items()}


def read_log(path):
    """The records of a run's log.jsonl; UserError if the folder holds no run, or a step twice, as
    two commands leave it that write one folder at once."""
    try:
        content = (Path(path) / "log.jsonl").read_bytes()
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
        mend = "start over with --fresh" if content.endswith(b"\n") else (
            "if only the last line is torn, the command that made this run mends it")
        raise UserError(f"{path}/log.jsonl is damaged; {mend}") from None


def scalars(record):
    """(step, {tag: number}) of a log record: zero/kl of a step, zero/dev/pass@1 of an evaluation;
    no numbers of one that is no point on a curve."""
    kind, step = record["kind"], record.get("step")
    stem = f"{record['stage']}/{kind}" if "stage" in record else kind
    return step, {f"{stem}/{name}": value for name, value in flat(record).items()
                  if step is not None and name != "step" and type(value) in (int, float)}


def tensorboard():
    """TensorBoard's writer; UserError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter
    except ImportError:
        raise UserError("--tensorboard: not installed (pip install tensorboard); without it, the "
                        "same numbers are in log.jsonl") from None


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


PATIENCE = 10  # skipped updates in a row


class Folder:
    """A run's folder: its settings, log, clock and checkpoints."""

    def __init__(self, path, run, options, stages):
        self.path, self.run, self.options, self.stop = Path(path), run, options, False
        self.board, self.stages = None, list(stages)
        if devices.is_main():
            self.begin(stages)
            self.draw()
        devices.any_process()
        processes = devices.rank_and_size()[1]
        self.log({"machine": machine(), "threads": torch.get_num_threads() * processes,
                  "processes": processes}, "timing.jsonl")

    def begin(self, stages):
        """Makes the folder, or finds that it holds this very run."""
        run, options = self.run, self.options
        if self.path.is_file():
            raise UserError(f"{self.path} is a file; --out names a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        lock(self.path)
        config, known = json.loads(json.dumps(dataclasses.asdict(run))), self.path / "config.json"
        if options.fresh:
            if run.start and Path(run.start).resolve().parent == self.path.resolve():
                raise UserError(f"--fresh would delete {run.start}: choose another --out")
            for name in ("config.json", "log.jsonl", "timing.jsonl", "samples.md", "report.md",
                         "report.html", *(stage + end for stage in stages
                                          for end in (".pt", ".partial.pt", ".jsonl"))):
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        if known.exists():
            try:
                old, new = flat(json.loads(known.read_text("utf-8"))), flat(config)
            except (ValueError, AttributeError):
                raise UserError(f"{known} is damaged; start over with --fresh") from None
            if other := sorted(key for key in old | new if old.get(key) != new.get(key)):
                named = ", ".join(other[:3]) + f" and {len(other) - 3} more" * (len(other) > 3)
                if "preset" in other:
                    named = f"its preset is {old.get('preset')}, here {new['preset']}"
                raise UserError(f"{self.path} holds a run with other settings ({named})"
                                ": choose another --out, or --fresh to start over")
            for name in ("log.jsonl", "timing.jsonl"):  # a kill or a full disk tears a line
                if (self.path / name).exists():
                    self.cut((self.path / name).read_bytes().rfind(b"\n") + 1, name)
            read_log(self.path)
        else:
            (self.path / "log.jsonl").write_text("", "utf-8")
            versions = {"python": platform.python_version(), "torch": torch.__version__}
            self.append({"kind": "config", "versions": versions} | config, "log.jsonl")
            known.with_suffix(".tmp").write_text(json.dumps(config, indent=1), "utf-8")
            known.with_suffix(".tmp").replace(known)

    def append(self, record, name):
        """Adds a line to a file of records."""
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def log(self, record, name="log.jsonl"):
        """Appends a record to log.jsonl. One process writes; none reads it before all have met
        again, to make the next step or to evaluate."""
        if devices.is_main():
            self.append(record, name)
            if name == "log.jsonl":
                self.draw([record])

    def draw(self, records=None):
        """Shows records to TensorBoard; or all of log.jsonl afresh, in place of what was shown."""
        if not getattr(self.options, "tensorboard", False):
            return
        if records is None:
            if self.board:
                self.board.close()
            shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
            # 0: a TensorBoard that is looking on forgets what it has seen
            self.board = tensorboard()(str(self.path / "tensorboard"), purge_step=0)
            records = read_log(self.path)
        for record in records:
            step, values = scalars(record)
            for tag, value in values.items():
                self.board.add_scalar(tag, value, step)
        self.board.flush()

    def write(self, path, text):
        """Writes a text whole or not at all. One process writes, all wait."""
        if devices.is_main():
            path.with_suffix(".tmp").write_text(text, "utf-8")
            path.with_suffix(".tmp").replace(path)
        devices.any_process()

    def check(self):
        """KeyboardInterrupt, in all processes, if any was asked to stop."""
        if devices.any_process(self.stop):
            raise KeyboardInterrupt

    def clock(self, stage, step, began, tokens=0, worked=None):
        """Appends to timing.jsonl, the one place where time is kept. seconds are all since
        `began`; tokens a second are of the step alone, which took `worked` seconds."""
        record = {"stage": stage, "step": step, "seconds": round(time.monotonic() - began, 3)}
        if worked:
            record |= {"tokens": tokens, "tokens_per_second": round(tokens / worked)}
        peak = float(devices.all_sum(torch.tensor(peak_gib()).double()))  # of all processes
        self.log(record | {"peak_gib": round(peak, 3)}, "timing.jsonl")

    def kept(self):
        """What a checkpoint remembers of the run: the bytes of log.jsonl so far, safe on disk."""
        with open(self.path / "log.jsonl", "ab") as file:
            os.fsync(file.fileno())
            return {"log": file.tell(), "preset": self.run.preset}

    def cut(self, position, name="log.jsonl"):
        """Shortens log.jsonl: what came after will be done, and logged, again."""
        if devices.is_main():
            with open(self.path / name, "r+b") as file:
                shorter = position < file.seek(0, os.SEEK_END)
                file.truncate(position)
            if shorter:
                self.draw()

    def begun(self, name, collected=False):
        """Where in log.jsonl a stage's first record stands, or would; what was collected for it is
        of the stage only if asked."""
        position = 0
        for line in (self.path / "log.jsonl").read_bytes().splitlines(keepends=True):
            record = json.loads(line)
            if name in (record["kind"], record.get("stage")) and (
                    collected or record["kind"] != "collected"):
                break
            position += len(line)
        return position

    def place(self, model):
        """A new model on the run's device, in its dtype, spread over its processes."""
        options = self.options
        return devices.place(model, options.device, options.dtype, *options.layout)

    def load(self, path):
        """(model, all else that was saved) of a checkpoint, placed likewise."""
        options = self.options
        return checkpoint.load(path, options.device, options.dtype, *options.layout)

    def resume(self, path, model):
        """load() of a checkpoint of this very run; UserError if it is of another."""
        loaded, record = self.load(path)
        if loaded.config != model.config or "log" not in record or (
                path.name.endswith(".partial.pt") and "optimizers" not in record):
            raise UserError(f"{path} is not of this run: replace or delete it")
        if record["log"] > (self.path / "log.jsonl").stat().st_size:
            raise UserError(f"{self.path}/log.jsonl has lost what was logged before {path.name} "
                            "was saved; start over with --fresh")
        return loaded, record

    def check_order(self, name):
        """UserError if another stage was stopped half-way: going on, it would cut off the log where
        it stopped, and what this one had added since."""
        begun = {word for r in read_log(self.path) if r["kind"] != "collected"
                 for word in (r["kind"], r.get("stage"))}
        for other in self.stages:
            if other in begun - {name} and not (self.path / f"{other}.pt").exists():
                raise UserError(f"{self.path}: {other} was stopped half-way and has to end before "
                                f"{name}: first the command that began it, or another --out")

    def stage(self, name, model, loop, steps, watch):
        """Runs loop(model, state), a generator of (record, snapshot), and returns the model.

        Each record is logged and shown to watch(model, record, bar); a checkpoint is saved every
        --save-every steps and at the end. A finished stage is loaded instead; one that was stopped
        goes on from its last save, and what was logged since then is done again. After PATIENCE
        updates in a row that were skipped nothing more is saved, and UserError.
        """
        every, state = self.options.save_every, None
        final, partial = self.path / f"{name}.pt", self.path / f"{name}.partial.pt"
        if final.exists():
            print(f"{name}: finished before, {final}")
            partial.unlink(missing_ok=True)  # a kill came in between
            return self.resume(final, model)[0]
        if partial.exists():
            model, state = self.resume(partial, model)
            print(f"{name}: goes on after step {state['step']} of {steps}")
        self.cut(state["log"] if state else self.begun(name))
        devices.any_process()
        self.check_order(name)
        began, saved, skipped = time.monotonic(), state["step"] if state else 0, 0
        with tqdm(total=steps, initial=saved, desc=name, dynamic_ncols=True) as bar:
            if not state:
                watch(model, {"step": 0}, bar)
            started = time.monotonic()
            for record, snapshot in loop(model, state):
                worked = time.monotonic() - started
                self.log({"kind": name} | record)
                watch(model, record, bar)
                none = record.get("skipped") and not record["grad_norm"]  # of this step's updates
                skipped = skipped + record["skipped"] if none else 0
                if skipped >= PATIENCE:
                    kept = f"{partial} is of step {saved}" if saved else "none of it was saved"
                    raise UserError(f"{name}: {skipped} updates in a row were skipped, as their "
                                    f"gradients were not finite; before them, {kept}. Lower its lr "
                                    "and start it with another --out")
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
                    raise KeyboardInterrupt
                began = started = time.monotonic()
        return model

    def interrupt(self, *_):
        """Ctrl-C: the step at hand is ended and saved; a second one stops at once."""
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True
        print("\nending this step and saving (Ctrl-C again: stop now)", file=sys.stderr)
