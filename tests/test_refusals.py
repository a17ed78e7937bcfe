"""Tests of wrong commands and environments: one clear line, exit code 2, and nothing lost."""
import shlex
import shutil

import pytest
import torch

import moe
from engine import checkpoint, kernels
from tests.helpers import micro_run
from tests.refusing import Evil, contents, refused
from tools import cli

CASES = {  # a command, what its line must contain
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
    "eval {run}/zero.pt --against {tmp}/foreign.pt": "foreign.pt has a vocabulary of 24",
    "eval {run}/zero.pt --against {run}/safe.pt": "safe.pt is a reward model",
    "eval {run}/zero.pt --against {tmp}/none.pt": "none.pt: No such file",
    "eval {run}/zero.pt --against {run}/../whole/zero.pt": "this is the same checkpoint",
    "eval {run}/zero.pt --against {run}/base.pt --problems {tmp}/one.jsonl": "at least 2 different",
    "eval {run}/zero.pt --against {tmp}/large.pt": "is of preset laptop, ",
    "eval {run}/zero.pt more": "unrecognized arguments: more",
    "report ''": "runs: got an empty text",
    "report {tmp}": "no run in this folder",
    "report {run}/zero.pt": "no run in this folder",
    "report {tmp}/begun": "begun",
    "report {tmp}/torn": "damaged; if only the last line is torn, the command that made this run",
    "report {tmp}/scrambled": "damaged; start over with --fresh",
    "report {tmp}/other": "other: no run in this folder",
    "report NAME={tmp}/other": "other: no run in this folder",
    "zero --out {tmp}/other": "other is not empty and holds no run",
    "zero --out {tmp}/other --fresh": "other is not empty and holds no run",
    "zero --out {run} --seed 7": "with other settings",
    "report {run} --to {tmp}/empty.pt/inside": "empty.pt is a file; --to names a folder",
    "report {tmp}/lr=1": "no such folder. If NAME=PATH is meant",
    "study": "required: NAME (try: python r1mini.py study --help)",
    "study everything": "choose all or one of balance, base, baseline, choices",
    "study hours": "study hours has no runs: python r1mini.py cost --preset v3 --gpus",
    "study base --seeds": "--seeds: expected at least one",
    "study base --seed 3": "use --seeds 0 1 2",
    "study base --preset nan": "--preset: invalid choice",
    "study base --seeds one": "--seeds: invalid int",
    "study base --seeds -1": "--seed must be within",
    "study base --threads -1": "--threads must be within",
    "study base --unheard-of": "--unheard-of",
    "study --preset v3 program": "for counting",
    "study program --set nonsense=1": "'nonsense'",
    "bench --preset v3": "for counting",
    "check --preset v3": "for counting",
    "check --processes -1": "--processes must be within",
    "bench --set zero.lr=quick": "a number",
    "bench --against --set zero.minibatches=5": "zero.minibatches must divide 384",
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
    "zero --only zero --out {tmp}/out": "out/base.pt, which does not exist",
    "dev1 --only dev1 --out {tmp}/out": "dev1 needs",
    "zero --only zero --fresh --out {run}": "--fresh would delete",
    "dev3 --from {tmp}/dev2.pt --only dev3": "base.pt, which does not exist",
    "zero --from {tmp}/foreign/base.pt": "foreign/base.pt has a vocabulary of 24",
    "zero --from {run}/base.pt --preset nano": "of preset micro, has other sizes",
    "zero --set": "--set: expected at least one",
    "zero --set =1": "no setting ''",
    "zero --set zero=1": "no setting 'zero'",
    "zero --set nonsense=1": "the nearest is",
    "zero --set base.row_tokens=513": "base.row_tokens exceeds the 512 tokens",
    "zero --set data.prompts=101": "at most 100: the rarest kind has 100 test prompts",
    "zero --set zero.lr=": "a number, got ''",
    "zero --set zero.lr=1e999": "a number",
    "zero --set zero.levels=": "whole numbers",
    "zero --set zero.max_new_tokens=240 model.max_seq_len=300 student.max_seq_len=300 "
    "--set zero.max_new_tokens=260": "max_new_tokens exceeds",
}


@pytest.mark.parametrize("line", list(CASES), ids=lambda line: line[:50])
def test_refusals_are_one_clear_line(tmp_path, monkeypatch, capsys, line):
    """A wrong command is refused with exit code 2 by one line that names the mistake. No file is
    made, changed or executed."""
    run = micro_run()
    monkeypatch.chdir(tmp_path)
    model = moe.Transformer(moe.Config(vocab_size=24))
    (tmp_path / "empty.pt").write_bytes(b"")
    checkpoint.save(tmp_path / "foreign.pt", model)
    torch.save(torch.load(tmp_path / "foreign.pt", weights_only=True) | {"config": {"width": 8}},
               tmp_path / "newer.pt")
    torch.save({"format": checkpoint.FORMAT, "model": Evil(tmp_path / "mark")},
               tmp_path / "evil.pt")
    zero = torch.load(run / "zero.pt", weights_only=True)
    torch.save(zero | {"preset": "laptop"}, tmp_path / "large.pt")
    shutil.copy(run / "zero.pt", tmp_path / "dev2.pt")
    (tmp_path / "foreign").mkdir()
    shutil.copy(tmp_path / "foreign.pt", tmp_path / "foreign" / "base.pt")
    (tmp_path / "late.jsonl").write_text('{"question": "1+2", "answer": 3}\n{"question": 3}\n')
    (tmp_path / "one.jsonl").write_text('{"question": "1+2", "answer": 3}\n' * 2)
    for name, log in (("begun", (run / "log.jsonl").read_text("utf-8").split("\n")[0] + "\n"),
                      ("torn", '{"kind": "config"}\n{"ki'),
                      ("scrambled", '{"ki\n{"kind": "zero"}\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text(log, "utf-8")
    for name in ("begun", "torn", "scrambled"):
        shutil.copy(run / "config.json", tmp_path / name)
    shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns("*.pt"))
    (tmp_path / "other" / ".r1mini").unlink()
    (tmp_path / "other" / "config.json").write_text('{"port": 8080}')
    before = contents(tmp_path) | contents(run)
    argv = [w.format(tmp=tmp_path, run=run, long="x" * 300) for w in shlex.split(line)]
    if argv[0] in cli.COMMANDS and "--preset" not in argv:
        argv += ["--preset", "micro"]
    if argv[0] in cli.COMMANDS and "--out" not in argv:
        argv += ["--out", str(tmp_path / "out")]
    assert CASES[line] in refused(argv, capsys)
    assert contents(tmp_path) | contents(run) == before


@pytest.mark.parametrize("words, message", [
    ("--parallel fsdp --processes 1", "--parallel fsdp spreads the weights"),
    ("--parallel none --processes 2", "--parallel none is for one process, here are 2"),
    ("--expert-parallel 2 --processes 3", "must divide the number of processes, 3"),
    ("--expert-parallel 0", "must divide the number of processes, 1"),
    ("--expert-parallel 3 --processes 3", "must divide model.n_routed_experts, 4")])
def test_refusals_of_layouts_make_no_folder(tmp_path, capsys, words, message):
    """A layout of processes that cannot work is refused with exit code 2 by one line, before a
    folder is made."""
    out = tmp_path / "run"
    assert cli.main(["base", "--preset", "micro", *words.split(), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not out.exists()


def test_refusals_of_spread_experts_without_a_grouped_product(tmp_path, capsys, monkeypatch):
    """Without a grouped product experts run one after the other, which needs all of them on each
    process. So an old GPU refuses to spread them."""
    monkeypatch.setattr(kernels, "has_grouped_product", lambda x: False)
    out = tmp_path / "run"
    words = "base --preset micro --expert-parallel 2 --processes 2 --out".split()
    assert cli.main([*words, str(out)]) == 2
    assert "needs torch's grouped product" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("name, value", [
    ("RANK", "x"), ("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "two")])
def test_refusals_of_a_partial_torchrun_environment(monkeypatch, capsys, name, value):
    """RANK without WORLD_SIZE, or a value that is no number, is refused before anything is waited
    for."""
    monkeypatch.setenv(name, value)
    assert "torchrun" in refused(["cost"], capsys)


def test_refusals_of_too_large_a_model(tmp_path, capsys):
    """A model larger than any machine's memory is refused by one line."""
    argv = ["base", "--preset", "micro", "--out", str(tmp_path), "--set",
            "model.inter_dim=8000000000000"]
    assert "out of memory" in refused(argv, capsys)


@pytest.mark.parametrize("command, message", [
    ("study --preset micro compute --seeds 0", "first run python r1mini.py study --preset micro"),
    ("study compute --preset micro --seeds 0", "first run python r1mini.py study --preset micro"),
    ("study compute --out foo", "--out"), ("study r1 --out=foo", "--out")])
def test_refusals_of_studies_come_before_any_work(command, message, tmp_path, monkeypatch, capsys):
    """A study without its checkpoints, or with --out, is refused by one line and exit code 2 before
    anything is measured."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(command.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())
