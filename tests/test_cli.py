"""The tests of tools/cli.py: wrong words on the command line. (More are in test_robust.py.)"""
import shutil

import pytest

from tests.helpers import json_lines, micro_run
from tools import cli

BAD = {  # words of a command -> what the error line must name
    "zero --set zero.lrr=1": "zero.lr",
    "zero --set zero.lr=fast": "a number",
    "zero --set corpus.summary=2": "shares",
    "zero --set model.kv_lora_rank=17": "even",
    "zero --set zero.lr=nan": "a number",
    "zero --set zero.steps=1.5": "whole number",
    "zero --set zero.levels=3,x": "whole numbers",
    "zero --set zero.normalize_std=maybe": "true or false",
    "zero --set zero.steps": "key=value",
    "zero --set zero.objective=ppo": "dr_grpo",
    "zero --set zero.group_size=1": "group_size",
    "zero --set zero.steps=0": "at least 1",
    "zero --set zero.max_new_tokens=9999": "max_new_tokens",
    "zero --set zero.temperature=0": "temperature",
    "zero --set zero.levels=9": "levels",
    "zero --set model.qk_rope_head_dim=15": "even",
    "zero --set model.n_activated_experts=99": "n_activated_experts",
    "zero --set model.n_expert_groups=3": "n_expert_groups",
    "zero --set model.vocab_size=5": "vocab_size",
    "zero --set model.n_heads=0": "at least 1",
    "zero --set corpus.direct=0.9": "shares",
    "zero --set corpus.tags=2": "shares",
    "zero --set corpus.tags=-1": "at least 0",
    "zero --set zero.beta=-1": "at least 0",
    "zero --set zero.overlong=500": "overlong",
    "zero --set eval.top_p=0": "top_p",
    "zero --preset v3": "counting",
    "zero --preset nono": "nano",
    "zero --device cuda:77": "cuda:77",
    "zero --device toaster": "toaster",
    "zero --threads -1": "threads",
    "zero --save-every 0": "save-every",
    "zero --seed x": "seed",
    "zero --seed 99999999999999999999999": "seed",
    "zero --threads 100000": "threads",
    "zero --device meta": "meta",
    "zero --set model.dim=33": "multiples of 8",
    "eval {tmp}/half.pt": "damaged",
    "zero --from {tmp}/none.pt": "none.pt",
    "base --from {tmp}/none.pt": "--from",
    "zero --out {tmp}/file/inside": "file",
    "frobnicate": "frobnicate",
    "zero --frobnicate": "frobnicate",
    "eval": "checkpoint",
    "eval {tmp}/none.pt": "none.pt",
    "eval {tmp}/file": "file",
    "eval {micro}/zero.pt --samples 0": "samples",
    "eval {micro}/zero.pt --problems {tmp}/none.jsonl": "none.jsonl",
    "eval {micro}/zero.pt --problems {tmp}/file": "line 1",
    "eval {micro}/zero.pt --problems {tmp}/long.jsonl": "too long",
    "chat {tmp}/none.pt --ask hello": "none.pt",
    "chat {micro}/zero.pt --ask {long}": "tokens",
    "zero --from {micro}/base.pt --set model.dim=40": "has other sizes",
    "zero --from {micro}/base.pt --out {micro} --fresh": "delete",
    "report {micro} {micro}": "two of these runs",
    "zero --set zero.general=2": "at most 1",
    "zero --set data.general=2": "shares",
    "zero --set corpus.general=0.5": "shares",
    "zero --set judge.steps=0": "at least 1",
    "zero --set student.n_outputs=1": "reward models",
    "zero --set student.dim=20": "multiples of 8",
    "base --data {tmp}/file": "--data",
    "r1 --from {tmp}/none.pt": "none.pt",
    "r1 --from {tmp}/dev3.pt": "damaged",
    "r1 --from {tmp}/half.pt": "name it after its stage",
    "r1 --from {tmp}/own.pt": "own.pt",
    "dev1 --from {micro}/dev3.pt": "nothing to do",
    "zero --from {micro}/zero.pt": "nothing to do",
    "dev3 --from {micro}/helpful.pt": "nothing to do",
    "r1 --from {micro}/dev3.pt --set model.dim=40": "has other sizes",
    "distill --from {micro}/student.pt --set student.dim=24": "has other sizes",
    "distill --from {micro}/r1.pt --data {tmp}/file": "line 1",
    "eval {micro}/helpful.pt": "helpful.pt",
    "chat {micro}/safe.pt --ask hello": "safe.pt",
    "report {tmp}": "no run",
    "report {tmp}/none": "no run",
    "report": "runs",
    "study nothing": "zero",
}


@pytest.fixture(scope="session")
def micro():
    """The folder of one finished micro run of all stages; no test writes into it."""
    return micro_run()


@pytest.mark.parametrize("line", list(BAD))
def test_main_refuses_bad_words_in_one_line(micro, tmp_path, capsys, line):
    """Wrong words give exit code 2 and one line that names the trouble, and write nothing."""
    (tmp_path / "file").write_text("not what is wanted\n")
    for name in ("half.pt", "dev3.pt"):
        (tmp_path / name).write_bytes((micro / "zero.pt").read_bytes()[:20_000])
    shutil.copy(micro / "dev3.pt", tmp_path / "own.pt")
    (tmp_path / "long.jsonl").write_text(json_lines({"question": "1+" * 600, "answer": 1}))
    before = sorted(tmp_path.rglob("*"))
    argv = [w.format(tmp=tmp_path, micro=micro, long="1+" * 600) for w in line.split()]
    if argv[0] in ("zero", "base", "dev1", "dev3", "r1", "distill") and "--out" not in argv:
        argv += ["--out", str(tmp_path / "out")]
    if "--from" in argv and "--preset" not in argv:
        argv += ["--preset", "micro"]
    try:
        code = cli.main(argv)
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err.strip()
    assert code == 2 and error.count("\n") == 0 and BAD[line] in error, error
    assert "Traceback (most" not in error and [f for f in sorted(tmp_path.rglob("*"))
                                         if f not in before and f.suffix] == []
