"""Tests of engine/folder.py: TensorBoard, damaged folders, failing machines, two commands at
once."""
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest
import torch

import grpo
import moe
import r1mini
from engine import checkpoint, jsonl, optim
from engine.errors import UserError
from engine.folder import LOCKS, Folder, _lock_folder, read_log, release_locks
from studies.scale import _same
from tests.helpers import FEW, micro_run
from tests.refusing import Evil, contents, refused
from tools import cli

# A command of base and zero that takes seconds.
SHORT = ["zero", "--preset", "micro", "--set", "base.steps=8", "base.documents=4", "zero.steps=3",
         "zero.max_new_tokens=16", "eval.problems=2", "eval.dev_problems=2", "eval.longer=1",
         "data.prompts=1"]


# -------------------------------------------------------------------------------------------------
# TensorBoard


class Writer:
    """Replaces TensorBoard's writer."""

    def __init__(self, path, purge_step):
        self.file = pathlib.Path(path) / "points.jsonl"
        self.file.parent.mkdir(parents=True)
        self.lines = []

    def add_scalar(self, tag, value, step):
        """Keeps a point."""
        self.lines.append([tag, step, value])

    def flush(self):
        """Writes the points."""
        self.file.write_text("".join(json.dumps(line) + "\n" for line in self.lines))

    close = flush


def points_in(path):
    """All points in a run's TensorBoard folder, sorted: [tag, step, value]."""
    if (path / "points.jsonl").exists():
        return sorted(map(json.loads, (path / "points.jsonl").read_text().splitlines()))
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = events.EventAccumulator(str(path), {"scalars": 0}).Reload()
    return sorted([tag, point.step, point.value] for tag in events.Tags()["scalars"]
                  for point in events.Scalars(tag))


def expected_points(path):
    """The points that should be there: every number of every log line that has a step."""
    found = []
    for line in (path / "log.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        if "step" not in record:
            continue
        stem = f"{record['stage']}/{record['kind']}/" if "stage" in record else f"{record['kind']}/"
        for name, value in record.items():
            if isinstance(value, dict):
                for key, inner in value.items():
                    for last, x in inner.items() if isinstance(inner, dict) else [("", inner)]:
                        tag = f"{stem}{name}.{key}" + f".{last}" * bool(last)
                        found += [[tag, record["step"], x]] if x is not None else []
            elif name != "step" and isinstance(value, (int, float)):
                found.append([stem + name, record["step"], value])
    return sorted(found)


def run_stages(path, *more, killed=None, stages=("base", "zero")):
    """Runs stages of seven steps that learn nothing, with a save at every third step."""
    options = cli.parse_arguments(["zero", "--preset", "micro", "--tensorboard",
                                   "--save-every", "3", "--out", str(path), *more])
    folder = Folder(path, cli._plan_run(options)[0], options, r1mini.STAGES)

    def loop(model, state):
        for step in range(state["step"] if state else 0, 7):
            yield ({"step": step + 1, "loss": 1 / (step + 1), "tokens": 5, "none": None},
                   lambda: {"step": step + 1, "optimizers": []})

    for stage in stages:
        def watch(model, record, bar):
            if record["step"] % 2 == 0:
                folder.log({"kind": "dev", "stage": stage, "step": record["step"], "pass@1": 0.5,
                            "by_style": {"steps": {"share": 0.25, "3": None}}})
            if (stage, record["step"]) == killed:
                raise RuntimeError("killed")
        folder.stage(stage, moe.Transformer(r1mini.PRESETS["micro"]), loop, 7, watch)
        folder.log({"kind": "test", "stage": stage, "pass@1": 0.5})


@pytest.mark.parametrize("real", [False, True])
def test_folder_tensorboard_shows_every_point_once(tmp_path, monkeypatch, real):
    """After kills between two saves, TensorBoard holds every point of the log exactly once, and
    --fresh removes the old points."""
    if real:
        pytest.importorskip("tensorboard")
    else:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                            SimpleNamespace(SummaryWriter=Writer))
    for killed in (("base", 5), ("zero", 2), ("zero", 6)):
        with pytest.raises(RuntimeError, match="killed"):
            run_stages(tmp_path, killed=killed)
    run_stages(tmp_path)
    expected, found = expected_points(tmp_path), points_in(tmp_path / "tensorboard")
    assert [point[:2] for point in found] == [point[:2] for point in expected]
    values = [point[2] for point in expected]
    assert [point[2] for point in found] == pytest.approx(values, rel=1e-6)
    assert {tag: sum(t == tag for t, *_ in found) for tag, *_ in found} == {
        f"{stage}/{name}": n for stage in ("base", "zero") for name, n in (
            ("loss", 7), ("tokens", 7), ("dev/pass@1", 4), ("dev/by_style.steps.share", 4))}
    run_stages(tmp_path, "--fresh", stages=["base"])
    assert {tag.split("/")[0] for tag, *_ in points_in(tmp_path / "tensorboard")} == {"base"}


def test_folder_missing_tensorboard_is_one_line(tmp_path, monkeypatch, capsys):
    """Where TensorBoard is not installed, --tensorboard is refused by one line and exit code 2, and
    no folder is made."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert cli.main(["base", "--preset", "micro", "--tensorboard", "--out",
                     str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install tensorboard" in error
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------
# Order, and several commands


def test_folder_stage_waits_for_a_stopped_stage(tmp_path, monkeypatch):
    """A stage is refused while another was stopped half-way, since resuming that one would cut off
    its records. The log stays as it is, and once the stopped stage has ended, the log equals that
    of a run without a stop."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        SimpleNamespace(SummaryWriter=Writer))
    for name in ("run", "undisturbed"):
        (tmp_path / name).mkdir()
    for killed in (("zero", 2), ("zero", 6)):  # before its first save, and after
        with pytest.raises(RuntimeError, match="killed"):
            run_stages(tmp_path / "run", killed=killed)
        before = (tmp_path / "run" / "log.jsonl").read_bytes()
        with pytest.raises(UserError, match="zero was stopped half-way"):
            run_stages(tmp_path / "run", stages=["student"])
        assert (tmp_path / "run" / "log.jsonl").read_bytes() == before
    for name in ("run", "undisturbed"):  # records collected for another stage do not matter
        run_stages(tmp_path / name)
        with open(tmp_path / name / "log.jsonl", "a") as log:
            log.write('{"kind": "collected", "stage": "distill"}\n')
        run_stages(tmp_path / name, stages=["base", "zero", "student"])
    one, two = ((tmp_path / name / "log.jsonl").read_text() for name in ("run", "undisturbed"))
    assert one.replace("run", "undisturbed") == two


def test_folder_log_with_a_repeated_step_is_refused(tmp_path):
    """read_log refuses a log that holds a step of a stage twice. The same step of two stages is
    accepted."""
    lines = ['{"kind": "config"}', '{"kind": "zero", "step": 1}', '{"kind": "zero", "step": 2}',
             '{"kind": "dev", "stage": "zero", "step": 1}', '{"kind": "dev2", "step": 1}']
    file = tmp_path / "log.jsonl"
    file.write_text("\n".join(lines) + "\n")
    assert len(read_log(tmp_path)) == 5
    file.write_text("\n".join([*lines, lines[1]]) + "\n")
    with pytest.raises(UserError, match="damaged"):
        read_log(tmp_path)


def test_folder_has_one_writer(tmp_path):
    """While another process holds the folder, a command is refused by one line and exit code 2, and
    touches nothing. After a kill of that process the same command succeeds."""
    out = tmp_path / "run"
    out.mkdir()
    hold = ("import fcntl, os, sys, time; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), "
            "fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", hold, out], stdout=subprocess.PIPE)
    other.stdout.readline()
    command = [sys.executable, r1mini.__file__, "base", "--preset", "micro", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "another command is writing there" in done.stderr
    assert "Traceback" not in done.stderr and not os.listdir(out)
    other.kill()
    other.wait()
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_folder_locks_are_released(tmp_path):
    """release_locks() closes the files of all locks, and others can lock the folders."""
    fcntl = pytest.importorskip("fcntl")
    _lock_folder(tmp_path)
    other = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    release_locks()
    assert not LOCKS
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


@pytest.mark.parametrize("words_of, message", [
    ("--preset nano", "its preset is micro, here nano"), ("--seed 1", "(seed)"),
    ("--set zero.lr=1 base.lr=1 dev1.lr=1 eval.top_p=1", "and 1 more")])
def test_folder_names_the_settings_that_differ(words_of, message, capsys):
    """A folder with other settings is refused. The line names the preset alone if it differs, and
    otherwise at most three settings and how many more."""
    assert cli.main(["zero", *FEW, *words_of.split(), "--out", str(micro_run())]) == 2
    assert message in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------
# Damaged folders


def make_partial(run, **changes):
    """Replaces zero.pt by a save in the middle of zero. A change to None leaves an entry out."""
    model, record = checkpoint.load(run / "zero.pt")
    record |= {"step": 2, "optimizers": [], "reference": {}} | changes
    (run / "zero.pt").unlink()
    kept = {key: x for key, x in record.items() if x is not None}
    checkpoint.save(run / "zero.partial.pt", model, **kept)


def rewrite(file, change):
    """Changes the bytes of a file."""
    file.write_bytes(change(file.read_bytes()))


def resize(file, **sizes):
    """Replaces a checkpoint by a model of other sizes."""
    model, record = checkpoint.load(file)
    config = dataclasses.replace(model.config, **sizes)
    checkpoint.save(file, moe.Transformer(config), **record)


DAMAGES = {  # damage to the folder of a finished run, what the line must contain
    "config cut off": (lambda run: rewrite(run / "config.json", lambda b: b[:99]),
                       "config.json is damaged"),
    "config a list": (lambda run: rewrite(run / "config.json", lambda b: b"[1]"),
                      "config.json is damaged"),
    "config gone": (lambda run: (run / "config.json").unlink(), "config.json is missing"),
    "config gone, log torn": (lambda run: ((run / "config.json").unlink(), rewrite(
        run / "log.jsonl", lambda b: b[:-9])), "config.json is missing"),
    "config and log gone": (lambda run: [(run / name).unlink() for name in (
        "config.json", "log.jsonl")], "config.json is missing"),
    "config and mark gone": (lambda run: [(run / name).unlink() for name in (
        "config.json", ".r1mini")], "is not empty and holds no run"),
    "mark cut off": (lambda run: rewrite(run / ".r1mini", lambda b: b[:9]), ".r1mini is damaged"),
    "log torn, checkpoint cut off": (lambda run: (
        rewrite(run / "log.jsonl", lambda b: b + b'{"ki'), rewrite(run / "r1.pt", lambda b: b[:99])
        ), "r1.pt: damaged"),
    "log torn and garbled": (lambda run: rewrite(
        run / "log.jsonl", lambda b: b.replace(b'"kind"', b"?", 3) + b'{"ki'),
                             "log.jsonl is damaged"),
    "dialogues cut off": (lambda run: (rewrite(run / "dev1.jsonl", lambda b: b[:99])),
                          "dev1.jsonl, line 1"),
    "a stage half-way": (lambda run: [(run / name).unlink() for name in (
        "student_rl.pt", "distill.pt", "distill.jsonl")],
                         "student_rl was stopped half-way and has to end before distill"),
    "log gone": (lambda run: (run / "log.jsonl").unlink(), "no log.jsonl"),
    "log emptied": (lambda run: rewrite(run / "log.jsonl", lambda b: b""), "log.jsonl has lost"),
    "log shortened": (lambda run: rewrite(
        run / "log.jsonl", lambda b: b[:b.index(b"\n", 3000) + 1]), "log.jsonl has lost"),
    "log garbled": (lambda run: rewrite(run / "log.jsonl", lambda b: b.replace(b'"kind"', b"?", 3)),
                    "log.jsonl is damaged"),
    "log of numbers": (lambda run: rewrite(run / "log.jsonl", lambda b: b"5\n" * 9999),
                       "log.jsonl is damaged"),
    "checkpoint cut off": (lambda run: rewrite(run / "base.pt", lambda b: b[:5000]),
                           "base.pt: damaged"),
    "checkpoint a byte off": (lambda run: rewrite(run / "zero.pt", lambda b: b"\0" + b[1:]),
                              "zero.pt: damaged"),
    "checkpoint of another size": (lambda run: resize(run / "zero.pt", n_heads=4),
                                   "zero.pt is not of this run"),
    "a checkpoint of fewer tokens": (lambda run: resize(run / "base.pt", vocab_size=300),
                                     "base.pt has a vocabulary of 300"),
    "a reward model": (lambda run: resize(run / "base.pt", n_outputs=1),
                       "base.pt is not of this run"),
    "a pickle": (lambda run: torch.save({"format": 1, "model": Evil(run / "mark")},
                                        run / "zero.pt"), "zero.pt: damaged"),
    "save cut off": (lambda run: (make_partial(run), rewrite(run / "zero.partial.pt",
                                                        lambda b: b[:5000])),
                     "zero.partial.pt: damaged"),
    "save of a whole stage": (lambda run: make_partial(run, optimizers=None),
                              "zero.partial.pt is not of this run"),
    "save without its log": (lambda run: make_partial(run, log=10 ** 9), "log.jsonl has lost"),
}


@pytest.mark.parametrize("name", list(DAMAGES))
def test_folder_damage_is_refused_and_nothing_changes(tmp_path, capsys, name):
    """The command that made a folder refuses the damaged folder by one line that names the file,
    and executes, changes and deletes nothing."""
    folder = tmp_path / "run"
    shutil.copytree(micro_run(), folder)
    damage, message = DAMAGES[name]
    damage(folder)
    before = contents(folder)
    line = refused([*FEW, "--out", str(folder)], capsys)
    assert message in line and str(folder) in line and contents(folder) == before


# Somebody's files, which have the names of a run's.
FOREIGN = {"log.jsonl": '{"level": "info"}\n', "report.md": "# Mine\n", "config.json": "{}\n",
           "r1.pt": "weights", "base.jsonl": '{"a": 1}\n', "tensorboard/events": "points"}


@pytest.mark.parametrize("names", [["notes.txt"], ["log.jsonl", "report.md"], [".hidden"],
                                   list(FOREIGN)])
@pytest.mark.parametrize("more", [[], ["--fresh"]])
def test_folder_of_somebody_else_is_never_touched(tmp_path, capsys, names, more):
    """A folder with files and no run in it is refused by one line, with --fresh too, and keeps
    every byte."""
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(FOREIGN.get(name, "mine"))
    before = contents(tmp_path)
    line = refused([*SHORT, *more, "--out", str(tmp_path)], capsys)
    assert f"{tmp_path} is not empty and holds no run" in line and contents(tmp_path) == before


@pytest.mark.parametrize("log", ['{"level": "info"}\n', '{"kind": "config"}\nfive\n', "", None])
def test_folder_without_a_mark_needs_config_and_log(tmp_path, capsys, log):
    """A config.json with a run's keys alone does not make a folder a run's: its log must be one."""
    shutil.copy(micro_run() / "config.json", tmp_path)
    if log is not None:
        (tmp_path / "log.jsonl").write_text(log)
    before = contents(tmp_path)
    line = refused([*FEW, "--fresh", "--out", str(tmp_path)], capsys)
    assert "holds no run" in line and contents(tmp_path) == before


def test_folder_made_before_marks_is_recognized(tmp_path, capsys):
    """A run's folder without a mark, even with a torn log, is known by its config.json and its log.
    The command that made it goes on there, and leaves the mark."""
    folder = tmp_path / "run"
    shutil.copytree(micro_run(), folder, ignore=shutil.ignore_patterns(".r1mini"))
    assert cli.main(["report", str(folder)]) == 0
    rewrite(folder / "log.jsonl", lambda b: b + b'{"kind": "te')
    assert cli.main([*FEW, "--out", str(folder)]) == 0
    assert json.loads((folder / ".r1mini").read_text()) == {"inputs": {}}
    assert (folder / "log.jsonl").read_bytes() == (micro_run() / "log.jsonl").read_bytes()


def test_folder_begins_again_after_a_kill_at_its_start(tmp_path):
    """A kill may leave the mark, or half of it, and a log of one line without config.json. The same
    command then begins anew."""
    first_line = (micro_run() / "log.jsonl").read_bytes().split(b"\n")[0] + b"\n"
    mark = {".r1mini": b'{"inputs": {}}'}
    for i, files in enumerate(({".r1mini.tmp": b'{"inp'}, mark, mark | {"log.jsonl": b'{"kin'},
                               mark | {"log.jsonl": first_line, "config.json.tmp": b"{"})):
        folder = tmp_path / str(i)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        assert cli.main(["base", *SHORT[1:], "base.steps=1", "--out", str(folder)]) == 0
        assert not list(folder.glob("*.tmp"))


# -------------------------------------------------------------------------------------------------
# Files of others that a run depends on


def distilling(tmp_path, data):
    """The words of a command that distils a file, into tmp_path/out."""
    return ["distill", *FEW, "distill.steps=6", "--save-every", "2", "--from",
            str(micro_run() / "student.pt"), "--data", str(data), "--out", str(tmp_path / "out")]


@pytest.mark.parametrize("stopped", [True, False])
def test_folder_notices_other_data(tmp_path, monkeypatch, capsys, stopped):
    """A run that was begun with one file of dialogues, stopped or finished, is refused with
    another of the same name, and changes nothing. With the old one back it goes on."""
    data = tmp_path / "d.jsonl"
    data.write_text(jsonl.jsonl_dialogue("2+3", "5") * 3, "utf-8")
    words = distilling(tmp_path, data)

    def stop(_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        if stopped:
            stop_after(patch, "distill", 4, stop)
        assert cli.main(words) == (130 if stopped else 0)
    data.write_text(jsonl.jsonl_dialogue("2+4", "6") * 3, "utf-8")
    before = contents(tmp_path)
    line = refused(words, capsys)
    assert f"{data} is not the file with which the run" in line and contents(tmp_path) == before
    data.write_text(jsonl.jsonl_dialogue("2+3", "5") * 3, "utf-8")
    assert cli.main(words) == 0


@pytest.mark.parametrize("changed", ["dev3.pt", "safe.pt"])
def test_folder_notices_other_checkpoints_of_from(tmp_path, capsys, changed):
    """A run that starts from another run's models is refused when one of them has other weights
    by now: the one that --from names, or one beside it that a stage learns from."""
    given, out = tmp_path / "given", tmp_path / "out"
    shutil.copytree(micro_run(), given)
    words = ["r1", *FEW, "--from", str(given / "dev3.pt"), "--only", "r1", "--out", str(out)]
    assert cli.main(words) == 0
    hashes = json.loads((out / ".r1mini").read_text())["inputs"]
    assert set(hashes) == {"dev3.pt", "helpful.pt", "safe.pt"}
    assert hashes["safe.pt"] == hashlib.sha256((given / "safe.pt").read_bytes()).hexdigest()
    model, record = checkpoint.load(given / changed)
    model.norm.weight.data += 1
    checkpoint.save(given / changed, model, **record)
    before = contents(tmp_path)
    assert f"{given / changed} is not the file" in refused(words, capsys)
    assert contents(tmp_path) == before


def test_folder_knows_an_input_by_another_path(tmp_path, monkeypatch):
    """A relative and an absolute path to one checkpoint, and a path to a copy of it, are the same
    setting. Another stage's checkpoint is another setting."""
    shutil.copytree(micro_run(), tmp_path / "given")
    shutil.copytree(micro_run(), tmp_path / "moved")
    words = ["distill", *FEW, "--only", "student_rl", "--out", str(tmp_path / "out"), "--from"]
    monkeypatch.chdir(tmp_path)
    assert cli.main([*words, "given/student.pt"]) == 0
    for path in (tmp_path / "given/student.pt", "./given/../given/student.pt", "moved/student.pt"):
        assert cli.main([*words, str(path)]) == 0
    (tmp_path / "out" / ".r1mini").unlink()  # as of a run that was made before there were marks
    assert cli.main([*words, str(tmp_path / "given/student.pt")]) == 0
    assert cli.main([*words, "given/r1.pt"]) == 2


def test_folder_fresh_spares_its_own_input(tmp_path, capsys):
    """--fresh is refused if it would delete the file that --data names."""
    folder = tmp_path / "run"
    shutil.copytree(micro_run(), folder)
    before = contents(folder)
    line = refused(["distill", *FEW, "--data", str(folder / "distill.jsonl"), "--fresh", "--out",
                    str(folder)], capsys)
    assert "--fresh would delete" in line and contents(folder) == before


def test_folder_says_why_a_stage_cannot_be_longer(capsys):
    """A finished run that is asked for more steps is refused by a line that gives the reason."""
    line = refused(["zero", *FEW, "zero.steps=9", "--out", str(micro_run())], capsys)
    assert "zero.steps" in line and "learning rate" in line and "another --out" in line


def test_folder_repairs_what_a_kill_leaves(tmp_path):
    """A kill may tear the last line of timing.jsonl or of log.jsonl, and may leave a partial save
    beside the finished stage. report ignores the torn time and refuses the torn log; the command
    that made the run repairs both."""
    run, folder = micro_run(), tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.copy(run / "base.pt", folder / "base.partial.pt")
    for name in ("timing.jsonl", "log.jsonl"):
        with open(folder / name, "ab") as file:
            file.write(b'{"kind": "test", "sta')
        assert cli.main(["report", str(folder)]) == (0 if name == "timing.jsonl" else 2)
    assert cli.main([*FEW, "--out", str(folder)]) == 0
    assert (folder / "log.jsonl").read_bytes() == (run / "log.jsonl").read_bytes()
    assert not (folder / "base.partial.pt").exists()
    assert cli.main(["report", str(folder)]) == 0


# -------------------------------------------------------------------------------------------------
# Machines that fail


def stop_after(monkeypatch, stage, step, what):
    """Calls what(path of the run) when a step is done and its time is written."""
    clock = Folder.clock

    def clocked(self, name, at, *rest):
        clock(self, name, at, *rest)
        if (name, at) == (stage, step):
            what(self.path)
    monkeypatch.setattr(Folder, "clock", clocked)


def test_folder_full_disk_loses_no_saved_step(tmp_path, monkeypatch, capsys):
    """From step 4 on no file may grow beyond 100 KB, so torch's own write fails half-way. The save
    of step 4 is whole, no temporary file remains, and the same command ends in the bits of an
    undisturbed run."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    argv = [*SHORT, "--save-every", "4", "--out", str(tmp_path / "run")]
    try:
        with monkeypatch.context() as patch:
            stop_after(patch, "base", 4, lambda _: resource.setrlimit(
                resource.RLIMIT_FSIZE, (100_000, hard)))
            line = refused(argv, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "free some space, and the same command goes on" in line and str(tmp_path) in line
    assert checkpoint.load(tmp_path / "run" / "base.partial.pt")[1]["step"] == 4
    assert not list(tmp_path.rglob("*.tmp"))
    assert cli.main(argv) == 0
    assert cli.main([*SHORT, "--out", str(tmp_path / "undisturbed")]) == 0
    assert _same(tmp_path / "run", tmp_path / "undisturbed")


def test_folder_deleted_while_training_is_named(tmp_path, monkeypatch, capsys):
    """When the folder is deleted while a command trains, one line names the file that is
    missing."""
    stop_after(monkeypatch, "base", 3, shutil.rmtree)
    line = refused([*SHORT, "--out", str(tmp_path / "run")], capsys)
    assert f"{tmp_path}/run/log.jsonl: No such file" in line


@contextlib.contextmanager
def nobody():
    """Changes root, who may write anywhere, to nobody for a while."""
    root = os.geteuid() == 0
    os.seteuid(65534) if root else None
    try:
        yield
    finally:
        os.seteuid(0) if root else None


@pytest.mark.skipif(sys.platform == "win32", reason="no such permissions")
@pytest.mark.parametrize("where", ["", "run"])
def test_folder_without_permission_is_named(capsys, where):
    """A run's folder without write permission, or its parent, is named by one line, and the files
    stay as they were."""
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        shutil.copytree(micro_run(), place / "run")
        before = contents(place)
        os.chmod(place, 0o755 if where else 0o555), os.chmod(place / "run", 0o555)
        try:
            with nobody():
                line = refused([*FEW, "--out", str(place / (where or "other"))], capsys)
        finally:
            os.chmod(place, 0o755), os.chmod(place / "run", 0o755)
        assert "Permission denied" in line and str(place) in line and contents(place) == before


def poison(monkeypatch, bad):
    """Gives the updates with the numbers in `bad` (counted from 1) a NaN gradient, and all others a
    finite one."""
    count, update = iter(range(1, 999)), optim.optimizer_update

    def poisoned(model, *rest, **settings):
        value = math.nan if next(count) in bad else 1.0
        model.norm.weight.grad = torch.full_like(model.norm.weight, value)
        return update(model, *rest, **settings)
    monkeypatch.setattr(r1mini, "optimizer_update", poisoned)
    monkeypatch.setattr(grpo, "optimizer_update", poisoned)


LONGER = [*SHORT, "base.steps=16", "zero.steps=9", "zero.minibatches=2", "--save-every", "1",
          "--out"]


@pytest.mark.parametrize("first, stage, saved", [
    (6, "base", 5), (1, "base", 0), (21, "zero", 2), (22, "zero", 3)])
def test_folder_ten_skipped_updates_in_a_row_stop_the_run(tmp_path, monkeypatch, capsys, first,
                                                          stage, saved):
    """From one update on, all gradients are NaN (one update a step in base, two in zero). The tenth
    stops the run. The line names the stage and the checkpoint, which holds a step before the first
    bad one, although every step would be saved."""
    poison(monkeypatch, range(first, 999))
    line, path = refused([*LONGER, str(tmp_path)], capsys), tmp_path / f"{stage}.partial.pt"
    assert f"{stage}: 10 updates in a row" in line
    assert (f"{path} has step {saved}" if saved else "nothing was saved before") in line
    assert path.exists() == bool(saved) and (not saved or checkpoint.load(path)[1]["step"] == saved)
    assert not (tmp_path / f"{stage}.pt").exists()


def test_folder_nine_skipped_updates_do_not_stop_the_run(tmp_path, monkeypatch):
    """Nine bad updates in a row are counted in the log, and training continues and saves again."""
    poison(monkeypatch, {*range(2, 11), *range(12, 16), *range(17, 26)})
    assert cli.main([*LONGER, str(tmp_path)]) == 0
    log = read_log(tmp_path)
    assert [r["skipped"] for r in log if r["kind"] == "base"] == [0] + [1] * 9 + [0] + [1] * 4 + [0]
    assert [r["skipped"] for r in log if r["kind"] == "zero"] == [2] * 4 + [1] + [0] * 4
