"""The tests of what a user can get wrong, and of what a machine can: one clear line, exit code 2,
nothing lost. (More wrong words are in test_r1mini.py's table.)"""
import contextlib
import dataclasses
import inspect
import math
import os
import pathlib
import re
import shlex
import shutil
import sys
import tempfile

import pytest
import torch

import grpo
import moe
import r1mini
import tasks
from engine import checkpoint, folder, optim
from studies.scale import same
from tools import cli

FEW = ["zero", "--preset", "micro", "--set", "base.steps=8", "base.documents=4", "zero.steps=3",
       "zero.max_new_tokens=16", "eval.problems=2", "eval.dev_problems=2", "eval.longer=1",
       "data.prompts=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a small run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert cli.main([*FEW, "--out", str(folder)]) == 0
    return folder


def contents(folder):
    """{file: bytes} of a folder, without the clock's."""
    return {f: f.read_bytes() for f in sorted(folder.rglob("*"))
            if f.is_file() and f.name != "timing.jsonl"}


def refused(argv, capsys):
    """The one line with which a command is refused, with exit code 2."""
    capsys.readouterr()
    try:
        code = cli.main(argv)
    except SystemExit as end:  # argparse
        code = end.code
    error = capsys.readouterr().err.split("\r")[-1].strip()
    lines = [line for line in error.split("\n") if line.startswith("r1mini: ")]
    assert code == 2 and len(lines) == 1 and "Traceback (most" not in error, error
    assert "None" not in lines[0] and 20 < len(lines[0]) < 400
    return lines[0]


class Evil:
    """A pickle of it makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


CASES = {  # a command, what its one line must name
    "cost --gpus 0": "--gpus must be within 1",
    "cost --gpus two": "--gpus: invalid int",
    "cost --gpus 8 --tokens 0": "--tokens must be within",
    "cost --gpus 8 --tokens nan": "--tokens must be within",
    "cost --gpus 8 --tokens many": "--tokens: invalid float",
    "cost --gpus 8 --mfu 0": "--mfu must be within",
    "cost --gpus 8 --mfu 40": "--mfu must be within",
    "cost --gpus 8 --dollars-per-hour -1": "--dollars-per-hour must be within",
    "cost --gpus 8 --dollars-per-hour inf": "--dollars-per-hour must be within",
    "cost --tokens 1e12": "go with --gpus",
    "cost --preset huge": "'nano'",
    "cost extra": "unrecognized arguments: extra",
    "chat": "required: checkpoint",
    "chat {run}/zero.pt --ask ''": "ask: got an empty text",
    "chat {run}/zero.pt --ask ' '": "ask: got an empty text",
    "chat '' --ask hi": "checkpoint: got an empty text",
    "chat {run} --ask hi": "Is a directory",
    "chat {run}/config.json --ask hi": "config.json: damaged",
    "chat {tmp}/evil.pt --ask hi": "evil.pt: damaged",
    "chat {tmp}/empty.pt --ask hi": "empty.pt: damaged",
    "chat {tmp}/newer.pt --ask hi": "newer.pt: damaged",
    "chat {tmp}/foreign.pt --ask hi": "vocabulary of 24",
    "chat {run}/zero.pt --ask hi --set zero.lr": "key=value",
    "chat {run}/zero.pt --ask hi --set eval.top_p=2": "eval.top_p",
    "chat {run}/zero.pt --ask hi --device cpu:x": "cpu:x",
    "eval {run}/zero.pt --samples many": "--samples: invalid int",
    "eval {run}/zero.pt --samples 1000000": "--samples must be within",
    "eval {run}/zero.pt --problems {tmp}": "Is a directory",
    "eval {run}/zero.pt --problems ''": "problems: got an empty text",
    "eval {run}/zero.pt --problems {tmp}/empty.pt": "no lines",
    "eval {run}/zero.pt --problems {run}/zero.pt": "line 1",
    "eval {run}/zero.pt --problems {tmp}/late.jsonl": "line 2",
    "eval {run}/zero.pt --set zero.max_new_tokens=480": "max_new_tokens exceeds",
    "eval {tmp}/foreign.pt": "vocabulary of 24",
    "eval {run}/zero.pt more": "unrecognized arguments: more",
    "report ''": "runs: got an empty text",
    "report {tmp}": "no run in this folder",
    "report {run}/zero.pt": "no run in this folder",
    "report {tmp}/begun": "begun",
    "report {tmp}/torn": "damaged; if only the last line is torn, the command that made this run",
    "report {tmp}/scrambled": "damaged; start over with --fresh",
    "report {run} --to {tmp}/empty.pt/inside": "empty.pt",
    "study": "required: NAME (try: python r1mini.py study --help)",
    "study everything": "choose one of base, zero, r1",
    "study base --seeds": "--seeds: expected at least one",
    "study base --seed 3": "it is --seeds",
    "study base --preset nan": "--preset: invalid choice",
    "study base --seeds one": "--seeds: invalid int",
    "study base --seeds -1": "--seed must be within",
    "study base --threads -1": "--threads must be within",
    "study base --unheard-of": "--unheard-of",
    "study --preset v3 program": "for counting",
    "study program --set nonsense=1": "'nonsense'",
    "bench --preset v3": "for counting",
    "bench --set zero.lr=quick": "a number",
    "bench --threads -1": "--threads must be within",
    "zero --out ''": "out: got an empty text",
    "zero --from ''": "start: got an empty text",
    "distill --data ''": "data: got an empty text",
    "distill --data {tmp}": "Is a directory",
    "zero --out {tmp}/empty.pt": "is a file; --out names a folder",
    "zero --out /proc/none/at/all": "/proc/none",
    "zero --out {tmp}/{long}": "File name too long",
    "zero --processes -1": "--processes must be within",
    "zero --processes two": "--processes: invalid int",
    "zero --dtype float16": "'bfloat16'",
    "zero --save-every 1.5": "--save-every: invalid int",
    "zero --seed -1": "--seed must be within",
    "zero --only nothing": "'student_rl'",
    "zero --only r1": "not a stage of this command",
    "zero --only zero --out {tmp}/out": "out/base.pt, which is not there",
    "dev1 --only dev1 --out {tmp}/out": "dev1 needs",
    "zero --only zero --fresh --out {run}": "--fresh would delete",
    "dev3 --from {tmp}/dev2.pt --only dev3": "base.pt, which is not there",
    "zero --from {run}/base.pt --preset nano": "of preset micro, has other sizes",
    "zero --set": "--set: expected at least one",
    "zero --set =1": "no setting ''",
    "zero --set zero=1": "no setting 'zero'",
    "zero --set nonsense=1": "the nearest is",
    "zero --set zero.lr=": "a number, got ''",
    "zero --set zero.lr=1e999": "a number",
    "zero --set zero.levels=": "whole numbers",
    "zero --set zero.max_new_tokens=240 model.max_seq_len=300 student.max_seq_len=300 "
    "--set zero.max_new_tokens=260": "max_new_tokens exceeds",
}


@pytest.mark.parametrize("line", list(CASES), ids=lambda line: line[:50])
def test_what_is_wrong_is_one_clear_line(run, tmp_path, monkeypatch, capsys, line):
    """Exit code 2, one line that names it; no file is made, changed or executed."""
    monkeypatch.chdir(tmp_path)
    model = moe.Transformer(moe.Config(vocab_size=24))
    (tmp_path / "empty.pt").write_bytes(b"")
    checkpoint.save(tmp_path / "foreign.pt", model)
    torch.save(torch.load(tmp_path / "foreign.pt", weights_only=True) | {"config": {"width": 8}},
               tmp_path / "newer.pt")
    torch.save({"format": checkpoint.FORMAT, "model": Evil(tmp_path / "mark")}, tmp_path / "evil.pt")
    shutil.copy(run / "zero.pt", tmp_path / "dev2.pt")
    (tmp_path / "late.jsonl").write_text('{"question": "1+2", "answer": 3}\n{"question": 3}\n')
    for name, log in (("begun", (run / "log.jsonl").read_text("utf-8").split("\n")[0] + "\n"),
                      ("torn", '{"kind": "config"}\n{"ki'),
                      ("scrambled", '{"ki\n{"kind": "zero"}\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text(log, "utf-8")
    before = contents(tmp_path) | contents(run)
    argv = [w.format(tmp=tmp_path, run=run, long="x" * 300) for w in shlex.split(line)]
    if argv[0] in cli.COMMANDS and "--preset" not in argv:
        argv += ["--preset", "micro"]
    if argv[0] in cli.COMMANDS and "--out" not in argv:
        argv += ["--out", str(tmp_path / "out")]
    assert CASES[line] in refused(argv, capsys)
    assert contents(tmp_path) | contents(run) == before


@pytest.mark.parametrize("name, value", [
    ("RANK", "x"), ("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "two")])
def test_half_an_environment_of_torchrun_is_refused(monkeypatch, capsys, name, value):
    """RANK without WORLD_SIZE, or no number: before anything is waited for."""
    monkeypatch.setenv(name, value)
    assert "torchrun" in refused(["cost"], capsys)


def test_what_a_stage_needs_is_what_it_asks_for():
    """NEEDS names exactly the models that each stage's own lines take, and the lessons' teacher."""
    for name, stage in r1mini.STAGES.items():
        source = inspect.getsource(stage)
        source += inspect.getsource(r1mini.lessons) if "lessons(" in source else ""
        asked = re.findall(r'models(?:\[|, )"(\w+)"', source)
        assert set(asked) == set(cli.NEEDS.get(name, ())), name


def test_the_longest_question_has_room():
    """No prompt of the corpus, with its stray spaces, is longer than what check() leaves."""
    rng = tasks.random.Random(0)
    asked = [tasks.space(tasks.make_problem(rng, 7, products=p), rng).question
             for p in (0.0, 0.5) for _ in range(3000)]
    asked += [p.question for p in tasks.make_problems("test", 200, (9,))]
    asked += [tasks.make_prompt(rng).question for _ in range(3000)]
    longest = max(len(tasks.encode_prompt(question)) for question in asked)
    assert 30 < longest <= cli.PROMPT


def test_no_memory_is_one_clear_line(tmp_path, capsys):
    """A model that no machine holds."""
    argv = ["base", "--preset", "micro", "--out", str(tmp_path), "--set",
            "model.inter_dim=8000000000000"]
    assert "out of memory" in refused(argv, capsys)


# -------------------------------------------------------------------------------------------------
# Folders that were damaged


def partial(run, **changes):
    """A save in the middle of zero, of a finished run; None leaves an entry out."""
    model, record = checkpoint.load(run / "zero.pt")
    record |= {"step": 2, "optimizers": [], "reference": {}} | changes
    (run / "zero.pt").unlink()
    checkpoint.save(run / "zero.partial.pt", model, **{k: x for k, x in record.items() if x is not None})


def rewrite(file, change):
    """Changes a file's bytes."""
    file.write_bytes(change(file.read_bytes()))


def of_sizes(file, **sizes):
    """Puts a model of other sizes in a checkpoint's place."""
    model, record = checkpoint.load(file)
    config = dataclasses.replace(model.config, **sizes)
    checkpoint.save(file, moe.Transformer(config), **record)


DAMAGES = {  # what happens to the folder of a finished run, what the line must name
    "config cut off": (lambda run: rewrite(run / "config.json", lambda b: b[:99]),
                       "config.json is damaged"),
    "config a list": (lambda run: rewrite(run / "config.json", lambda b: b"[1]"),
                      "config.json is damaged"),
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
    "checkpoint of another size": (lambda run: of_sizes(run / "zero.pt", n_heads=4),
                                   "zero.pt is not of this run"),
    "a reward model": (lambda run: of_sizes(run / "base.pt", n_outputs=1),
                       "base.pt is not of this run"),
    "a pickle": (lambda run: torch.save({"format": 1, "model": Evil(run / "mark")},
                                        run / "zero.pt"), "zero.pt: damaged"),
    "save cut off": (lambda run: (partial(run), rewrite(run / "zero.partial.pt",
                                                        lambda b: b[:5000])),
                     "zero.partial.pt: damaged"),
    "save of a whole stage": (lambda run: partial(run, optimizers=None),
                              "zero.partial.pt is not of this run"),
    "save without its log": (lambda run: partial(run, log=10 ** 9), "log.jsonl has lost"),
}


@pytest.mark.parametrize("name", list(DAMAGES))
def test_a_damaged_folder_is_refused(run, tmp_path, capsys, name):
    """The same command: one line that names the file; nothing is executed, changed or lost."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    damage, said = DAMAGES[name]
    damage(folder)
    before = contents(folder)
    line = refused([*FEW, "--out", str(folder)], capsys)
    assert said in line and str(folder) in line and contents(folder) == before


def test_what_a_kill_leaves_is_mended(run, tmp_path):
    """A last line torn, in the clock's book, then in the log too, and a save beside the finished
    stage: the clock's is left out of the report, the same command goes on."""
    folder = tmp_path / "run"
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
    """Calls what(folder) when a step is done and booked."""
    clock = folder.Folder.clock

    def clocked(self, name, at, *rest):
        clock(self, name, at, *rest)
        if (name, at) == (stage, step):
            what(self.path)
    monkeypatch.setattr(folder.Folder, "clock", clocked)


def test_a_disk_that_fills_up_costs_nothing(run, tmp_path, monkeypatch, capsys):
    """Files may not grow over 100 KB from step 4 on, so torch's own write fails in the middle: the
    save of step 4 is whole, nothing half written stays, the same command ends in the same bits."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    argv = [*FEW, "--save-every", "4", "--out", str(tmp_path / "run")]
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
    assert cli.main(argv) == 0 and same(tmp_path / "run", run)


def test_a_folder_that_vanishes_is_named(tmp_path, monkeypatch, capsys):
    """Deleted while it trains."""
    stop_after(monkeypatch, "base", 3, shutil.rmtree)
    line = refused([*FEW, "--out", str(tmp_path / "run")], capsys)
    assert f"{tmp_path}/run/log.jsonl: No such file" in line


@contextlib.contextmanager
def nobody():
    """Root may write anywhere, so become nobody for a while."""
    root = os.geteuid() == 0
    os.seteuid(65534) if root else None
    try:
        yield
    finally:
        os.seteuid(0) if root else None


@pytest.mark.skipif(sys.platform == "win32", reason="no such permissions")
@pytest.mark.parametrize("where", ["", "run"])
def test_a_folder_not_to_be_written_is_named(run, capsys, where):
    """A run's folder, or the one it is to be made in: one line, and its files are as they were."""
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        shutil.copytree(run, place / "run")
        before = contents(place)
        os.chmod(place, 0o755 if where else 0o555), os.chmod(place / "run", 0o555)
        try:
            with nobody():
                line = refused([*FEW, "--out", str(place / (where or "other"))], capsys)
        finally:
            os.chmod(place, 0o755), os.chmod(place / "run", 0o755)
        assert "Permission denied" in line and str(place) in line and contents(place) == before


def poison(monkeypatch, bad):
    """Gives some of a run's updates, counted from 1, a nan, and all others a gradient."""
    count, update = iter(range(1, 999)), optim.update

    def poisoned(model, *rest):
        value = math.nan if next(count) in bad else 1.0
        model.norm.weight.grad = torch.full_like(model.norm.weight, value)
        return update(model, *rest)
    monkeypatch.setattr(r1mini, "update", poisoned)
    monkeypatch.setattr(grpo, "update", poisoned)


LONGER = [*FEW, "base.steps=16", "zero.steps=9", "zero.minibatches=2", "--save-every", "1", "--out"]


@pytest.mark.parametrize("first, stage, saved", [
    (6, "base", 5), (1, "base", 0), (21, "zero", 2), (22, "zero", 3)])
def test_ten_bad_updates_in_a_row_stop_a_run(tmp_path, monkeypatch, capsys, first, stage, saved):
    """From one update on, all are nan, in base one a step, then in zero two: a line names the
    stage and the checkpoint, which is from before them though one is saved each step. A step of
    which one update was good is before them too."""
    poison(monkeypatch, range(first, 999))
    line, path = refused([*LONGER, str(tmp_path)], capsys), tmp_path / f"{stage}.partial.pt"
    assert f"{stage}: 10 updates in a row" in line
    assert (f"{path} is of step {saved}" if saved else "none of it was saved") in line
    assert path.exists() == bool(saved) and (not saved or checkpoint.load(path)[1]["step"] == saved)
    assert not (tmp_path / f"{stage}.pt").exists()


def test_nine_bad_updates_do_not_stop_a_run(tmp_path, monkeypatch):
    """They are counted in the log, and what follows is saved again."""
    poison(monkeypatch, {*range(2, 11), *range(12, 16), *range(17, 26)})
    assert cli.main([*LONGER, str(tmp_path)]) == 0
    log = folder.read_log(tmp_path)
    assert [r["skipped"] for r in log if r["kind"] == "base"] == [0] + [1] * 9 + [0] + [1] * 4 + [0]
    assert [r["skipped"] for r in log if r["kind"] == "zero"] == [2] * 4 + [1] + [0] * 4
