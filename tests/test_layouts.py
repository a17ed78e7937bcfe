"""Tests of studies/layouts.py and engine/devices.py with real processes (gloo) beside one."""
import dataclasses
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import moe
import r1mini
import tasks
from engine import checkpoint, devices
from engine.folder import Folder
from studies import layouts
from tests.helpers import MICRO
from tools import cli

TWO, FOUR = ([layouts._name_of(layout) for layout in layouts.LAYOUTS[n]] for n in (2, 4))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder with what one process made."""
    folder = tmp_path_factory.mktemp("layouts")
    layouts._launch(1, folder)
    return folder


@pytest.fixture(scope="module")
def two(one):
    """The folder, after two processes added theirs."""
    layouts._launch(2, one)
    return one


@pytest.fixture(scope="module")
def four(one):
    """The folder, after four processes added theirs."""
    layouts._launch(4, one)
    return one


def layout_named(name):
    """The layout with this name."""
    return next(x for many in layouts.LAYOUTS.values() for x in many
                if layouts._name_of(x) == name)


def test_layouts_recompute_changes_no_bit(one):
    """Recomputed activations give the same bits, and expert loads that are counted twice move the
    routing bias as often as once."""
    assert set(layouts._compare(layouts.LAYOUTS[1][1], one).values()) == {0.0}


@pytest.mark.parametrize("name", TWO)
def test_layouts_two_processes_equal_one(two, name):
    """In every layout two processes reach the weights, figures and answers of one process within
    1e-4, and each resumes from the other's checkpoint. AdamW divides a gradient by its size, so
    where one is nearly 0 its rounding shows: in one weight of 20,000, above 1e-5."""
    found = layouts._compare(layout_named(name), two)
    assert max(found.values()) < 1e-4, found


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_layouts_four_processes_equal_one(four, name):
    """In every layout four processes reach the weights, figures and answers of one process within
    1e-4."""
    found = layouts._compare(layout_named(name), four)
    assert max(found.values()) < 1e-4, found


def test_layouts_page_names_the_largest_difference():
    """The page has a row for every layout but one process, and the largest difference."""
    names = [layouts._name_of(x) for many in layouts.LAYOUTS.values() for x in many][1:]
    rows = {f"{name}.base": {"mean": 1e-7 * i} for i, name in enumerate(names, 1)}
    rows["layouts.max_relative_difference"] = {"mean": 1e-7 * len(names)}
    lines = layouts.page(rows)
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")] == [
        "| layout", *(f"| {name}" for name in names)]
    assert lines[-1] == f"The largest: {1e-7 * len(names):.1e}."


@pytest.mark.parametrize("name", ["next_token_loss", "pairwise_loss", "pointwise_loss"])
def test_layouts_process_without_examples_adds_nothing(name):
    """Without examples a loss makes a whole pass and has value 0, zero gradients and no expert
    load, so no bias moves."""
    config = MICRO
    if name != "next_token_loss":
        config = dataclasses.replace(config, n_outputs=1, n_mtp_layers=0)
    model = moe.Transformer(config)
    draw = {"next_token_loss": lambda rng: tasks.make_document(rng, tasks.Corpus()),
            "pairwise_loss": tasks.helpful_pair,
            "pointwise_loss": tasks.labelled_response}[name]
    loss, logged = getattr(r1mini, name)(model, [], [draw(random.Random(0))])
    loss.backward()
    assert loss.item() == float(logged) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert not any(m.load.any() for m in model.modules() if isinstance(m, moe.Router))


@pytest.mark.slow
def test_layouts_run_resumes_in_another_layout(tmp_path):
    """Pretraining and GRPO run by FSDP with shared experts, are stopped, and end on one process
    with the weights of one process. There are few updates, because AdamW turns rounding of
    gradients near 0 into steps."""
    common = ["--preset", "micro", "--set", "base.steps=4", "zero.steps=3", "zero.minibatches=2",
              "eval.dev_problems=2", "--save-every", "1"]
    spread = ["--processes", "2", "--parallel", "fsdp", "--expert-parallel", "2"]
    assert cli.main(["zero", *common, "--out", str(tmp_path / "one")]) == 0
    clock = Folder.clock

    def stop(self, stage, step, *rest):
        clock(self, stage, step, *rest)
        self.stop = (stage, step) == ("zero", 1) or self.stop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "clock", stop)
        assert cli.main(["zero", *common, *spread, "--out", str(tmp_path / "two")]) == 130
    assert (tmp_path / "two/zero.partial.pt").exists()
    assert cli.main(["zero", *common, "--out", str(tmp_path / "two")]) == 0
    for stage in ("base", "zero"):
        paths = [tmp_path / run / f"{stage}.pt" for run in ("one", "two")]
        assert layouts._weight_difference(*paths) < 1e-5


@pytest.mark.parametrize("world, seen", [("1", False), ("2", True)])
def test_layouts_restart_ignores_keys_of_the_last_start(monkeypatch, world, seen):
    """A restart by torchrun sees no key of the last start in the store. With several machines,
    whose restart counts differ, all see the same keys."""
    kept = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(kept.port), "RANK": "0",
            "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    stores = []
    monkeypatch.setattr(dist, "init_process_group", lambda *_, store, **__: stores.append(store))
    for start in ("0", "1"):
        for name, value in (environment | {"TORCHELASTIC_RESTART_COUNT": start}).items():
            monkeypatch.setenv(name, value)
        with devices.processes(torch.device("cpu"), 1, []):
            pass
    stores[0].set("address", "of the dead")
    stores[0].get("address")  # set() returns before the server has the key
    assert stores[1].check(["address"]) == seen


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in /proc")
@pytest.mark.parametrize("machines", [1, 2])
def test_layouts_torchrun_restarts_after_a_kill(tmp_path, machines):
    """One process of two is killed (SIGKILL). With --max-restarts, torchrun continues from the last
    save to the weights and the log of an undisturbed run, to the bit, on one machine and on two
    (here two torchruns with the options of a Slurm job)."""
    words = ["base", "--preset", "micro", "--device", "cpu", "--threads", "1", "--save-every", "5",
             "--set", "base.steps=60", "--out"]
    assert cli.main([*words, str(tmp_path / "undisturbed"), "--processes", "2"]) == 0
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
    assert log.read_bytes() == (tmp_path / "undisturbed" / "log.jsonl").read_bytes()
    one, two = (checkpoint.load(folder / "base.pt")[0].state_dict()
                for folder in (tmp_path / "undisturbed", log.parent))
    assert all(torch.equal(x, two[name]) for name, x in one.items())
