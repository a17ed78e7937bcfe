"""The folder of a run: what is kept of it, and where a stopped run goes on.

    config.json          the settings
    log.jsonl            one record a line; no clock, so that two runs can be compared byte by byte
    timing.jsonl         seconds, tokens a second and memory
    STAGE.pt             the model of a finished stage
    STAGE.partial.pt     the last save of an unfinished stage
    STAGE.jsonl          the dialogues that a stage learns from
    tensorboard/         the log's curves for TensorBoard, with --tensorboard
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
except ImportError:  # on Windows; there, only the log shows that two commands wrote one folder
    fcntl = None

LOCKS = {}  # {folder that this process writes: lock}; the system frees them when it ends
PATIENCE = 10  # skipped updates in a row


def lock_folder(path):
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


def flatten_settings(tree, prefix=""):
    """A nested dict as {dotted key: value}."""
    leaves = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves |= flatten_settings(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves


def read_log(path):
    """The records of a run's log.jsonl. UserError if the folder holds no run, or if a step is there
    twice, since then two commands wrote the folder at once."""
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
        if content.endswith(b"\n"):
            remedy = "start over with --fresh"
        else:
            remedy = "if only the last line is torn, the command that made this run repairs it"
        raise UserError(f"{path}/log.jsonl is damaged; {remedy}") from None


def tensorboard_scalars(record):
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
    with contextlib.suppress(OSError, IndexError):
        name = re.findall("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text("utf-8"))[0]
    return f"{name}, {os.cpu_count()} cores"


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
    """

    def __init__(self, path, run, options, stages):
        self.path, self.run, self.options, self.stop = Path(path), run, options, False
        self.board, self.stages = None, list(stages)
        if devices.is_main():
            self.begin(stages)
            self.draw()
        devices.any_process()
        processes = devices.rank_and_size()[1]
        self.log({"machine": describe_machine(), "threads": torch.get_num_threads() * processes,
                  "processes": processes}, "timing.jsonl")

    def begin(self, stages):
        """Makes the folder, or checks that it holds this very run."""
        run, options = self.run, self.options
        if self.path.is_file():
            raise UserError(f"{self.path} is a file; --out names a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        lock_folder(self.path)
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
                old = flatten_settings(json.loads(known.read_text("utf-8")))
                new = flatten_settings(config)
            except (ValueError, AttributeError):
                raise UserError(f"{known} is damaged; start over with --fresh") from None
            if other := sorted(key for key in old | new if old.get(key) != new.get(key)):
                difference = ", ".join(other[:3])
                if len(other) > 3:
                    difference += f" and {len(other) - 3} more"
                if "preset" in other:
                    difference = f"its preset is {old.get('preset')}, here {new['preset']}"
                raise UserError(f"{self.path} holds a run with other settings ({difference}): "
                                "choose another --out, or --fresh to start over")
            for name in ("log.jsonl", "timing.jsonl"):  # a kill or a full disk can tear a line
                if (self.path / name).exists():
                    whole_lines = (self.path / name).read_bytes().rfind(b"\n") + 1
                    self.cut(whole_lines, name)
            read_log(self.path)
        else:
            (self.path / "log.jsonl").write_text("", "utf-8")
            versions = {"python": platform.python_version(), "torch": torch.__version__}
            self.append({"kind": "config", "versions": versions} | config, "log.jsonl")
            known.with_suffix(".tmp").write_text(json.dumps(config, indent=1), "utf-8")
            known.with_suffix(".tmp").replace(known)

    def append(self, record, name):
        """Adds a record to a file, as a line."""
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def log(self, record, name="log.jsonl"):
        """Appends a record to log.jsonl. One process writes; none reads it before all have met
        again, for the next step or an evaluation."""
        if devices.is_main():
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
            step, values = tensorboard_scalars(record)
            for tag, value in values.items():
                self.board.add_scalar(tag, value, step)
        self.board.flush()

    def write(self, path, text):
        """Writes a text whole or not at all. One process writes, the others wait."""
        if devices.is_main():
            path.with_suffix(".tmp").write_text(text, "utf-8")
            path.with_suffix(".tmp").replace(path)
        devices.any_process()

    def check(self):
        """Raises KeyboardInterrupt in all processes if one of them was asked to stop."""
        if devices.any_process(self.stop):
            raise KeyboardInterrupt

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
        """Shortens log.jsonl to so many bytes. What came after is done, and logged, again."""
        if devices.is_main():
            with open(self.path / name, "r+b") as file:
                shorter = position < file.seek(0, os.SEEK_END)
                file.truncate(position)
            if shorter:
                self.draw()

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
        if loaded.config != model.config or "log" not in record or (
                path.name.endswith(".partial.pt") and "optimizers" not in record):
            raise UserError(f"{path} is not of this run: replace or delete it")
        if record["log"] > (self.path / "log.jsonl").stat().st_size:
            raise UserError(f"{self.path}/log.jsonl has lost what was logged before {path.name} "
                            "was saved; start over with --fresh")
        return loaded, record

    def check_order(self, name):
        """UserError if another stage was stopped half-way. When that stage went on, it would cut
        the log where it stopped, and so lose what this stage had logged."""
        begun = set()
        for record in read_log(self.path):
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
                    raise KeyboardInterrupt
                began = started = time.monotonic()
        return model

    def interrupt(self, *_):
        """Called at Ctrl-C: the present step ends and is saved. A second Ctrl-C stops at once."""
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True
        print("\nfinishing this step and saving it (Ctrl-C again stops now)", file=sys.stderr)
