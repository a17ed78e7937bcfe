"""Tests of tools/check.py: each line follows from what was found, and counts equal measurements."""
import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import moe
import r1mini
from tests.helpers import ROOT
from tests.refusing import refused
from tools import check, cli
from tools.flops import flops_per_token
from tools.settings import resolve_settings

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
RATES = {"documents": 1e6, "sample": 1e6, "learn": 1e6, "gemm": 100.0}
STEP = {"tokens": 2016, "seconds": 2.0, "gib": 3.0, "gemm": 100.0}
WORKS = {"speed": ({"agree": True, **RATES}, ""), "step": ({"agree": True}, ""),
         "fit": (STEP, "")}


@pytest.fixture
def attempts(monkeypatch):
    """{part: (facts, reason)} of all attempts, which a test may change; a list of the attempts."""
    results, made = dict(WORKS), []

    def attempt(self, part, share, *words):
        made.append((part, *words))
        result = results[part]
        return result(*words) if callable(result) else result
    monkeypatch.setattr(check.Check, "attempt", attempt)
    monkeypatch.setattr(check, "_memory_of", lambda device: (64 * check.GIB, 64 * check.GIB))
    monkeypatch.setattr(check, "_loss_and_gradient", lambda device, dtype: (8.0, torch.ones(9)))
    monkeypatch.setattr(check, "_minutes", lambda run, rates: 11.5)
    return SimpleNamespace(results=results, made=made)


def run_check(capsys, words=""):
    """(exit code, printed text) of a check of nano with two processes."""
    argv = ["check", "--threads", "2", "--processes", "2", *words.split()]
    return cli.main(argv), capsys.readouterr().out


def measured(study):
    """{key: mean} of a study's summary."""
    summary = json.loads((ROOT / "results" / study / "summary.json").read_text("utf-8"))
    return {key: x["mean"] for key, x in summary["metrics"].items()}


# -------------------------------------------------------------------------------------------------
# Lines and the exit code


def test_check_of_a_machine_that_works(attempts, capsys):
    """Each line is there, the largest preset that fits takes the real step, and the code is 0. By
    hand: 1e6 tokens a second are 100% of a peak of 1e6 times the FLOPs of a token."""
    flops = flops_per_token(resolve_settings("nano", []).model, "learn", mtp=True)
    attempts.results["speed"] = ({"agree": True, **RATES, "gemm": 1e6 * flops / 1e9}, "")
    code, out = run_check(capsys)
    assert code == 0 and attempts.made == [("speed",), ("fit", "--preset", "laptop")]
    for words in (
            "software   Python", "cores; 64.0 GiB free of 64.0 GiB", "float32    loss 8.00",
            "bfloat16   loss 8.00", "one grouped product", "fused kernel in training, plain",
            "2 took a step together", "1,000,000 tokens/s, 100% of the peak",
            "minutes    about 12 for", "node   does not fit",
            "laptop: a real step of 2,016 tokens took 3.0 GiB; 1,008 tokens/s",
            "--preset nano --device cpu --dtype float32 --processes 2 works here\n"):
        assert words in out, words


def test_check_of_processes_that_do_not_work(attempts, capsys):
    """What stops two processes is one line. The check goes on with one process, and the last line
    says what to do."""
    attempts.results["speed"] = lambda *words: (
        WORKS["speed"] if "1" in words else ({}, "no network interface"))
    code, out = run_check(capsys)
    assert code == 1 and attempts.made[:2] == [("speed",), ("speed", "--processes", "1")]
    assert "processes  2: no network interface\n" in out and "minutes    about" in out
    assert out.endswith("does not work here: no step: no network interface. Give --processes 1\n")


def test_check_of_processes_that_disagree(attempts, capsys):
    """Processes whose weights differ after a step do not work."""
    attempts.results["speed"] = ({"agree": False, **RATES}, "")
    code, out = run_check(capsys)
    assert code == 1 and "processes  2: after a step their weights differ" in out


@pytest.mark.parametrize("reason, code", [("out of memory; ask for less", 1), (check.LATE, 0)])
def test_check_of_a_preset_that_fails_after_the_first_step(attempts, capsys, reason, code):
    """If micro's step works and the preset's does not, training does not work. If only the time
    was too short, it does."""
    attempts.results["speed"] = ({"agree": True}, reason)
    found, out = run_check(capsys)
    assert found == code and f"speed      not measured: {reason}" in out
    assert ("no step of nano: out of memory; ask for less. Give --processes 1" in out) == bool(code)


@pytest.mark.parametrize("dtype, code", [("float32", 0), ("bfloat16", 1)])
@pytest.mark.parametrize("loss, gradient, words", [
    (8.0, None, "no such kernel\n"), (float("nan"), 1, "loss nan"),
    (8.0, -1, "loss 8.00, relative error of the gradient 2"),
    (8.0, float("nan"), "loss 8.00, relative error of the gradient nan")])
def test_check_of_a_type_that_does_not_work(attempts, monkeypatch, capsys, dtype, code, loss,
                                            gradient, words):
    """An error, a loss that is not finite and a wrong gradient in bfloat16 are one line. They
    matter if training would use bfloat16."""
    def broken(device, dtype):
        if dtype == torch.float32:
            return 8.0, torch.ones(9)
        if gradient is None:
            raise RuntimeError("no such kernel\nand 1,000 characters more")
        return loss, gradient * torch.ones(9)
    monkeypatch.setattr(check, "_loss_and_gradient", broken)
    found, out = run_check(capsys, f"--dtype {dtype}")
    assert found == code and f"bfloat16   does not work: {words}" in out
    assert ("Give --dtype float32\n" in out) == bool(code) and "characters more" not in out


def test_check_of_too_little_memory(attempts, monkeypatch, capsys):
    """A preset that does not fit is named with a remedy, and no step of it is tried. Where a real
    step fails, the next smaller preset takes one."""
    monkeypatch.setattr(check, "_memory_of", lambda device: (4 * check.GIB, 64 * check.GIB))
    attempts.results["fit"] = lambda _, preset: (
        ({}, "out of memory; ask for less") if preset == "nano" else WORKS["fit"])
    code, out = run_check(capsys, "--preset laptop")
    assert code == 1 and "laptop needs more memory. Give a smaller --preset" in out
    assert attempts.made == [("speed",), ("fit", "--preset", "nano"), ("fit", "--preset", "micro")]
    assert "nano should fit; a real step: out of memory" in out and "micro: a real step" in out
    monkeypatch.setattr(check, "_memory_of", lambda device: (None, None))
    code, out = run_check(capsys)
    assert code == 0 and "this system does not say" in out


def test_check_ends_with_the_minute(monkeypatch, capsys):
    """After the deadline each part says so, and nothing is started."""
    monkeypatch.setattr(check, "SECONDS", -1)
    monkeypatch.setattr(subprocess, "run", None)
    code, out = run_check(capsys)
    assert code == 1 and out.count(check.OVER) == 6
    assert out.endswith("or check again when the machine is less busy\n")


def test_check_of_one_process_tries_two(attempts, capsys):
    """Where training takes one process, two are tried. Their failure keeps nothing from working."""
    attempts.results["step"] = ({}, "refused")
    code, out = run_check(capsys, "--processes 1")
    assert code == 0 and attempts.made[:2] == [("step", "--processes", "2"), ("speed",)]
    assert "processes  2: refused" in out


def test_check_of_gpus(monkeypatch, capsys):
    """Each GPU has its line. Two processes need two GPUs, and do not share their memory: node, with
    about 60 GiB in each, fits."""
    monkeypatch.setattr(check, "_minutes", lambda run, rates: 11.5)
    free = {0: 70 * check.GIB, 1: 80 * check.GIB}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"H{i}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (
        free[device.index], 80 * check.GIB))
    made = []
    monkeypatch.setattr(check.Check, "attempt", lambda self, part, share, *words: made.append(
        (part, *words)) or WORKS[part])
    for gpus in (1, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        options = SimpleNamespace(preset="nano", set=[], device=GPU, dtype=torch.bfloat16,
                                  processes=gpus)
        one = check.Check(options)
        one.hardware()
        one.speed()
        one.memory()
        assert not one.troubles
    out = capsys.readouterr().out
    assert "cuda:0     H0; 70.0 GiB free of 80.0 GiB\ncuda:1     H1; 80.0" in out
    assert "not tried: each needs a GPU" in out and "2 took a step together" in out
    assert made == 2 * [("speed",), ("fit", "--preset", "node")]


def test_check_is_not_for_torchrun(monkeypatch, capsys):
    """Under torchrun each process would check by itself, so it is refused."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"),
                        ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    assert "leave out torchrun" in refused(["check"], capsys)


# -------------------------------------------------------------------------------------------------
# Processes of its own


@pytest.mark.parametrize("script, facts, reason", [
    ("print('{\"a\": 1}\\nNCCL version 2\\n{\"b\": 2}')", {"a": 1, "b": 2}, ""),
    ("print('{\"a\": 1}', flush=True); time.sleep(60)", {"a": 1}, check.LATE),
    ("sys.exit('warning\\nr1mini: out of memory')", {}, "out of memory"),
    ("sys.exit(3)", {}, "exit code 3"),
    ("os.kill(os.getpid(), 9)", {}, "ended by signal 9")])
def test_check_attempt_survives_what_its_process_does(script, facts, reason, tmp_path, monkeypatch):
    """An attempt that hangs, fails or is killed gives its facts so far and one line. Its temporary
    files are gone."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    script = f"import os, sys, tempfile, time; open(tempfile.mktemp(), 'w'); {script}"
    options = SimpleNamespace(preset="micro", set=[], device=CPU, dtype=torch.float32,
                              itself=[sys.executable, "-c", script])
    one = check.Check(options)
    found = one.attempt("step", 2.001 / one.seconds_left())
    assert found[0] == facts and found[1].startswith(reason) and bool(found[1]) == bool(reason)
    assert not list(tmp_path.iterdir())


def told(capsys):
    """The facts that a part has told."""
    facts = {}
    for line in capsys.readouterr().out.splitlines():
        facts |= json.loads(line)
    return facts


def test_check_two_processes_take_a_step(capsys):
    """Two real processes take a step of micro and hold the same weights."""
    assert cli.main(["check", "--part", "step", "--processes", "2", "--threads", "2"]) == 0
    assert told(capsys) == {"agree": True}


def test_check_step_sees_weights_that_differ(monkeypatch, capsys):
    """If the sum over two processes is not twice the own weights, they do not agree."""
    monkeypatch.setattr(check.devices, "all_sum", lambda x: x + x.roll(1))
    monkeypatch.setattr(check.devices, "rank_and_size", lambda: (0, 2))
    monkeypatch.setattr(check.bench, "bench_train_step", lambda *_, **__: lambda: None)
    check._step(SimpleNamespace(dtype=torch.float32), CPU)
    assert told(capsys) == {"agree": False}


def test_check_speed_divides_tokens_by_their_time(monkeypatch, capsys):
    """With a clock made by hand, each rate divides its own tokens by its own time."""
    monkeypatch.setattr(check, "_step", lambda *_: None)
    monkeypatch.setattr(check.bench, "bench_document_step", lambda *_: (None, [99, 30, 50, 20]))
    monkeypatch.setattr(check.bench, "seconds_by_round", lambda calls, *_: {
        name: {"sample": [2, 4, 9], "gemm": [0.5] * 3}.get(name, [1, 1, 1]) for name in calls})
    run = resolve_settings("micro", [])
    monkeypatch.setattr(check, "_few_examples", lambda *_: (run, 3))
    check._speed(SimpleNamespace(preset="micro", set=[], dtype=torch.float32), CPU)
    assert told(capsys) == pytest.approx({
        "documents": 30, "sample": 3 * 16 * 42 / 4, "learn": 3 * 16 * (12 + 42),
        "gemm": 4 * 2048 ** 3 / 1e9})


def test_check_measures_real_calls(monkeypatch, capsys):
    """Rates of micro, and a real step of it in one pass, are above 0."""
    monkeypatch.setattr(check, "_bound_memory", lambda device: None)  # of this process
    monkeypatch.setattr(check, "STEP_FLOPS", {"cpu": 1e8})
    for part, count in (("speed", 5), ("fit", 4)):
        assert cli.main(["check", "--part", part, "--preset", "micro", "--processes", "1"]) == 0
        facts = told(capsys)
        assert len(facts) == count and min(facts.values()) > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA")
def test_check_bound_memory_makes_an_error_of_a_large_request():
    """Within the free memory tensors can be made. More raises torch's error, which is known as out
    of memory."""
    script = ("import torch; from tools import check; from engine.errors import *\n"
              "check._memory_of = lambda device: (2 ** 30, 2 ** 31)\n"
              "check._bound_memory(torch.device('cpu')); torch.ones(2 ** 25)\n"
              "try: torch.ones(2 ** 29)\n"
              "except RuntimeError as error: print(is_out_of_memory(error))")
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "True\n", run.stderr


def test_check_gradient_in_bfloat16_is_near_float32():
    """On this CPU both types give a finite loss and, up to rounding, one gradient."""
    loss, exact = check._loss_and_gradient(CPU, torch.float32)
    near, gradient = check._loss_and_gradient(CPU, torch.bfloat16)
    assert near == pytest.approx(loss, rel=0.01)
    error = (gradient - exact).norm() / exact.norm()
    assert 1e-4 < error < check.TOLERANCE[torch.bfloat16]


# -------------------------------------------------------------------------------------------------
# Counts


def test_check_minutes_agree_with_a_run():
    """At the rates of results/speed, the minutes are those of its run within a quarter."""
    x = measured("speed")
    answers = 24 * 16
    rates = {"documents": x["documents"], "sample": answers * 42 / x["step.sample"],
             "learn": answers * 54 / x["step.learn"]}
    assert check._minutes(resolve_settings("nano", []), rates) == pytest.approx(
        x["minutes.total"], rel=0.25)


def test_check_memory_agrees_with_a_run():
    """By the count, nano on two processes takes as much memory as in results/r1, within half."""
    needs = check._needed_bytes(resolve_settings("nano", []), torch.float32, 2)
    assert 2 * max(needs) / check.GIB == pytest.approx(measured("r1")["peak_gib"], rel=0.5)


@pytest.mark.parametrize("preset, changes", [
    ("micro", {}), ("nano", {}), ("nano", {"n_mtp_layers": 0}), ("student", {"n_mtp_layers": 1}),
    ("laptop", {"n_layers": 2}), ("nano", {"q_lora_rank": 512}),
    ("nano", {"n_activated_experts": 8})])
def test_check_numbers_per_token_equal_those_that_torch_keeps(preset, changes):
    """The count is within 5% of what torch keeps for the backward pass, besides weights."""
    config = dataclasses.replace(r1mini.PRESETS[preset], **changes)
    model, kept = moe.Transformer(config).train(), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return x

    tokens = torch.randint(config.vocab_size, (8, 36))
    ones = torch.ones_like(tokens)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        moe.supervised_loss(model, tokens, ones, ones.float(), 8 * 35, 8)
    numbers = sum(storage.nbytes() for storage in kept.values()) / 4 / tokens.numel()
    assert check._numbers_per_token(config) == pytest.approx(numbers, rel=0.05)


def test_check_few_examples_bound_the_work():
    """A step of few examples has at most so many FLOPs, but at least one document and question,
    and never more than in training."""
    for preset, documents, questions in (("nano", 80, 15), ("node", 1, 1)):
        run, asked = check._few_examples(resolve_settings(preset, []), CPU)
        assert (run.base.documents, asked) == (documents, questions)
    run, asked = check._few_examples(resolve_settings("laptop", []), GPU)
    assert (run.base.documents, asked) == (128, 24)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/meminfo")
def test_check_memory_of_a_container(tmp_path, monkeypatch):
    """All memory is that of the system, in a container at most its limit. By hand: of a limit of
    1 MB, 0.7 MB are used, but 0.2 MB of these are files that can be read again."""
    monkeypatch.setattr(check, "CGROUP", tmp_path)
    free, total = check._memory_of(CPU)
    assert 1e6 < free <= total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 200000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert check._memory_of(CPU)[1] == total
    (tmp_path / "memory.max").write_text("1000000\n")
    assert check._memory_of(CPU) == (500000, 1000000)
