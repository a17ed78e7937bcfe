"""Tests of models spread over processes: real ones, with gloo, against one process."""
import dataclasses
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, strategies as st

import grpo
import moe
import r1mini
import tasks
from engine import checkpoint, devices, folder, optim
from studies import layouts
from tools import cli

TWO, FOUR = ([layouts.name_of(layout) for layout in layouts.LAYOUTS[n]] for n in (2, 4))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A folder with what one process made."""
    folder = tmp_path_factory.mktemp("layouts")
    layouts.launch(1, folder)
    return folder


@pytest.fixture(scope="module")
def two(one):
    """The folder, with what two processes made."""
    layouts.launch(2, one)
    return one


@pytest.fixture(scope="module")
def four(one):
    """The folder, with what four processes made."""
    layouts.launch(4, one)
    return one


def layout_named(name):
    """The layout of a name."""
    return next(x for some in layouts.LAYOUTS.values() for x in some if layouts.name_of(x) == name)


def test_recomputing_changes_no_bit(one):
    """Activations thrown away and computed again are the same, and loads counted twice move the
    routing bias as once."""
    assert set(layouts.compare(layouts.LAYOUTS[1][1], one).values()) == {0.0}


@pytest.mark.parametrize("name", TWO)
def test_two_processes_take_the_steps_of_one_in_every_layout(two, name):
    """Weights after pretraining and GRPO, figures, answers, checkpoints there and back: 1e-5."""
    found = layouts.compare(layout_named(name), two)
    assert max(found.values()) < 1e-5, found


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_processes_take_the_steps_of_one_in_every_layout(four, name):
    """The same of four."""
    found = layouts.compare(layout_named(name), four)
    assert max(found.values()) < 1e-5, found


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 5), st.integers(1, 120))
def test_all_processes_make_as_many_passes(lengths, count, limit):
    """Of rows dealt to 1..5 processes each goes once, every process has as many lists, none but the
    last is without a row, and each is within the limit or of one row."""
    dealt = []
    for number in range(count):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(moe, "world", lambda: (number, count))
            patch.setattr(grpo, "world", lambda: (number, count))
            dealt.append(list(optim.micro_batches(lengths, range(len(lengths)), limit)))
    assert len({len(lists) for lists in dealt}) == 1
    assert Counter(row for lists in dealt for rows in lists for row in rows) == Counter(
        range(len(lengths)))
    for lists in dealt:
        assert all(lists[:-1])
        assert all(len(rows) <= 1 or len(rows) * max(lengths[r] for r in rows) <= limit
                   for rows in lists)


def test_long_rows_fall_to_each_process_in_turn(monkeypatch):
    """Rows of 1 to 8 tokens, a list each: 1, 4, 5 and 8 to one, 2, 3, 6 and 7 to the other."""
    dealt = []
    for number in range(2):
        monkeypatch.setattr(grpo, "world", lambda: (number, 2))
        dealt.append(optim.micro_batches(range(1, 9), range(8), 1))
    assert dealt == [[[0], [3], [4], [7]], [[1], [2], [5], [6]]]


@pytest.mark.parametrize("name", ["next_token", "pairwise", "pointwise"])
def test_a_process_without_work_adds_nothing(name):
    """No examples: a whole pass, a loss and gradients of 0, no load, so no bias moves."""
    config = dataclasses.replace(r1mini.PRESETS["micro"], vocab_size=tasks.VOCAB_SIZE)
    if name != "next_token":
        config = dataclasses.replace(config, n_outputs=1, n_mtp_layers=0)
    model = moe.Transformer(config)
    draw = {"next_token": lambda rng: tasks.make_document(rng, tasks.Corpus()),
            "pairwise": tasks.helpful_pair, "pointwise": tasks.labelled_response}[name]
    loss, logged = getattr(r1mini, name)(model, [], [draw(random.Random(0))])
    loss.backward()
    assert loss.item() == float(logged) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert not any(m.load.any() for m in model.modules() if isinstance(m, moe.Router))


@pytest.mark.slow
def test_a_run_begun_in_one_layout_ends_in_another(tmp_path):
    """Pretraining and GRPO by FSDP with shared experts, stopped on the way and ended by one
    process: weights of one process alone. Few updates, for AdamW makes steps of the rounding of
    gradients near 0."""
    common = ["--preset", "micro", "--set", "base.steps=4", "zero.steps=3", "zero.minibatches=2",
              "eval.dev_problems=2", "--save-every", "1"]
    spread = ["--processes", "2", "--parallel", "fsdp", "--expert-parallel", "2"]
    assert cli.main(["zero", *common, "--out", str(tmp_path / "one")]) == 0
    clock = folder.Folder.clock

    def stop(self, stage, step, *rest):
        clock(self, stage, step, *rest)
        self.stop = (stage, step) == ("zero", 1) or self.stop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder.Folder, "clock", stop)
        assert cli.main(["zero", *common, *spread, "--out", str(tmp_path / "two")]) == 130
    assert (tmp_path / "two/zero.partial.pt").exists()
    assert cli.main(["zero", *common, "--out", str(tmp_path / "two")]) == 0
    for stage in ("base", "zero"):
        assert layouts.apart(*(tmp_path / run / f"{stage}.pt" for run in ("one", "two"))) < 1e-5


@pytest.mark.parametrize("words, said", [
    ("--parallel fsdp --processes 1", "--parallel fsdp spreads the weights"),
    ("--parallel none --processes 2", "--parallel none is for one process, here are 2"),
    ("--expert-parallel 2 --processes 3", "must divide the number of processes, 3"),
    ("--expert-parallel 0", "must divide the number of processes, 1"),
    ("--expert-parallel 3 --processes 3", "must divide model.n_routed_experts, 4")])
def test_layouts_that_make_no_sense_are_one_clear_line(tmp_path, capsys, words, said):
    """Exit code 2, one line that says what is wrong, and no folder."""
    out = tmp_path / "run"
    assert cli.main(["base", "--preset", "micro", *words.split(), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize("world, seen", [("1", False), ("2", True)])
def test_a_start_does_not_see_what_the_last_one_left(monkeypatch, world, seen):
    """In torchrun's store; of several machines, whose counts differ, all see the same keys."""
    kept = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    said = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(kept.port), "RANK": "0",
            "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    stores = []
    monkeypatch.setattr(dist, "init_process_group", lambda *_, store, **__: stores.append(store))
    for start in ("0", "1"):
        for name, value in (said | {"TORCHELASTIC_RESTART_COUNT": start}).items():
            monkeypatch.setenv(name, value)
        with devices.processes(torch.device("cpu"), 1, []):
            pass
    stores[0].set("address", "of the dead")
    stores[0].get("address")  # set() does not wait until the server has it
    assert stores[1].check(["address"]) == seen


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in /proc")
@pytest.mark.parametrize("machines", [1, 2])
def test_torchrun_starts_again_what_was_killed(tmp_path, machines):
    """A process of two is killed (SIGKILL) on the way; --max-restarts goes on from the last save,
    to the weights and the log of two left alone, to the bit: on one machine, and on two (here two
    torchruns) by the words of the README's Slurm job."""
    words = ["base", "--preset", "micro", "--device", "cpu", "--threads", "1", "--save-every", "5",
             "--set", "base.steps=60", "--out"]
    assert cli.main([*words, str(tmp_path / "whole"), "--processes", "2"]) == 0
    log = tmp_path / "killed" / "log.jsonl"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = ["--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{free.getsockname()[1]}"]
    meet = [f"--nnodes={machines}", *meet] if machines > 1 else []
    runs = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *meet, "--max-restarts=1",
         f"--nproc_per_node={2 // machines}", r1mini.__file__, *words, str(log.parent)],
        env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": str(machines - 1)})
        for _ in range(machines)]
    deadline = time.monotonic() + 120
    while not log.exists() or log.read_text().count('"loss"') < 20:
        assert runs[0].poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    agent = runs[0].pid
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert [run.wait(timeout=120) for run in runs] == [0] * machines
    assert log.read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    one, two = (checkpoint.load(folder / "base.pt")[0].state_dict()
                for folder in (tmp_path / "whole", log.parent))
    assert all(torch.equal(x, two[name]) for name, x in one.items())
