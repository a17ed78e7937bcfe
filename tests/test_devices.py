"""The tests of engine/devices.py in which all processes hold the same model.

(test_layouts.py compares every other layout with one process.)
"""
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from engine import checkpoint, devices, folder
from engine.errors import UserError
from tests.helpers import FEW, ROOT, same_weights
from tools import cli


def largest_difference(a, b):
    """The largest difference between two checkpoints' weights, relative to each tensor's largest
    weight."""
    one, two = (checkpoint.load(path)[0].state_dict() for path in (a, b))
    return max(float((one[k] - two[k]).abs().max() / one[k].abs().max().clamp(min=1e-2))
               for k in one)


def test_two_processes_take_the_steps_of_one(tmp_path, monkeypatch, capsys):
    """Two processes that halve each step of pretraining, its evaluation and GRPO reach the weights
    and the log of one process up to rounding, and after one is killed the same command reaches the
    bits of two processes left alone."""
    started, clock = [], folder.Folder.clock

    def start(*args, **more):
        started.append(subprocess.Popen(*args, **more))
        return started[-1]

    monkeypatch.setattr(devices, "subprocess", SimpleNamespace(
        Popen=start, PIPE=subprocess.PIPE))
    command = ["zero", *FEW, "base.steps=4", "zero.steps=3", "--save-every", "1", "--out"]
    assert cli.main([*command, str(tmp_path / "one")]) == 0 and not started
    two_processes = ["zero", "--processes", "2", "--threads", "2", *command[1:]]
    assert cli.main([*two_processes, str(tmp_path / "two")]) == 0 and len(started) == 1
    for stage in ("base", "zero"):
        assert largest_difference(tmp_path / f"one/{stage}.pt", tmp_path / f"two/{stage}.pt") < 1e-5
    for record, other in zip(*(folder.read_log(tmp_path / run) for run in ("one", "two"))):
        for key in {"loss", "pass@1", "accuracy", "length", "tokens", "kl"} & record.keys():
            want = pytest.approx(record[key], rel=1e-5, abs=1e-6)
            assert other[key] == want, (record["kind"], key)

    def kill(self, name, step, *rest):
        if (name, step) == ("zero", 1) and len(started) == 2:
            started[-1].kill()
        return clock(self, name, step, *rest)

    monkeypatch.setattr(folder.Folder, "clock", kill)
    assert cli.main([*two_processes, str(tmp_path / "killed")]) == 2
    assert "another process of this run is gone" in capsys.readouterr().err
    assert cli.main([*two_processes, str(tmp_path / "killed")]) == 0 and len(started) == 3
    for stage in ("base", "zero"):
        assert same_weights(tmp_path / f"two/{stage}.pt", tmp_path / f"killed/{stage}.pt")
    assert (tmp_path / "two/log.jsonl").read_bytes() == (
        tmp_path / "killed/log.jsonl").read_bytes()
    assert all(child.poll() is not None for child in started)


# The start of a process that refuses to make a TCPStore and to gather pickled objects.
STRICT = """
import sys
import torch.distributed as dist
def refuse(*_, **__):
    raise AssertionError("a port for others, or a pickle")
dist.TCPStore = dist.rendezvous.__globals__["TCPStore"] = refuse
dist.all_gather_object = dist.broadcast_object_list = refuse
sys.path.insert(0, sys.argv.pop(1))
"""


def listening(pids):
    """The addresses, as /proc/net/tcp writes them, at which processes wait for connections."""
    sockets = set()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").iterdir():
            try:
                sockets.add(os.readlink(file))
            except FileNotFoundError:  # it was closed meanwhile
                pass
    addresses = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                addresses.append(fields[1].partition(":")[0])
    return addresses


def test_local_process_that_ends_at_its_start_is_noticed():
    """If another process ends before it joins, one line says so at once, and nobody waits."""
    command = [sys.executable, "-c", "raise SystemExit(7)"]
    with pytest.raises(UserError, match="exit code 7"):
        with devices.processes(torch.device("cpu"), 2, command):
            pass


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="sockets are listed in /proc")
def test_local_processes_open_no_port_to_others(tmp_path, monkeypatch):
    """Two local processes make no TCPStore, gather no pickled objects, listen on the loopback
    interface alone, and meet in a folder with mode 0700 that is gone afterwards. Rollouts are
    gathered in this command."""
    def start(command, env, **more):
        stores.append(Path(env[devices.STORE]))
        code = STRICT + "from tools.cli import main\nsys.exit(main(sys.argv[1:]))"
        started.append(subprocess.Popen([sys.executable, "-c", code, str(ROOT), *command[2:]],
                                        env=env, **more))
        return started[-1]

    def look(self, *rest):
        addresses.extend(listening([os.getpid(), started[0].pid]))
        modes.append(stat.S_IMODE(stores[0].parent.stat().st_mode))
        return clock(self, *rest)

    def refuse(*_, **__):
        raise AssertionError("a port for others, or a pickle")

    started, stores, addresses, modes, clock = [], [], [], [], folder.Folder.clock
    monkeypatch.setattr(devices, "subprocess", SimpleNamespace(Popen=start, PIPE=subprocess.PIPE))
    monkeypatch.setattr(folder.Folder, "clock", look)
    for name in ("TCPStore", "all_gather_object", "broadcast_object_list"):
        monkeypatch.setattr(dist, name, refuse)
    monkeypatch.setitem(dist.rendezvous.__globals__, "TCPStore", refuse)
    command = ["zero", "--processes", "2", "--threads", "2", *FEW, "base.steps=1", "zero.steps=1"]
    assert cli.main([*command, "--out", str(tmp_path / "run")]) == 0
    assert set(addresses) == {"0100007F"}  # 127.0.0.1
    assert set(modes) == {0o700} and not stores[0].parent.exists()


def test_local_processes_ignore_the_users_interface(monkeypatch):
    """gloo and NCCL listen on the loopback interface even if the environment names another one,
    and the environment is afterwards what it was."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    before = dict(os.environ)
    with devices.loopback_only():
        assert os.environ["GLOO_SOCKET_IFNAME"] in devices.LOOPBACK
        assert os.environ["NCCL_SOCKET_IFNAME"] in devices.LOOPBACK
    assert dict(os.environ) == before


def test_local_processes_end_with_the_first(tmp_path):
    """A process that waits for the first one, which was killed before they met, ends too. A file
    says nothing of that: without care it would wait for half an hour."""
    store = tmp_path / "store"
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import torch; from engine import devices;"
            "print('here', flush=True);"
            "devices.processes(torch.device('cpu'), 2, []).__enter__()")
    env = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1",
                        devices.STORE: str(store)}
    waiting = subprocess.Popen([sys.executable, "-c", code, str(ROOT)], env=env,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert waiting.stdout.readline() == b"here\n"
    time.sleep(1)
    assert waiting.poll() is None
    waiting.stdin.close()  # as the system does when the first process is killed
    assert waiting.wait(timeout=30) == 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16])
def test_gather_undoes_share(monkeypatch, dtype):
    """gather_from_processes() lays the rows of three processes, whose parts differ in length, in
    their old order.
    The messages of three processes are played by one."""
    rows = (torch.arange(35).view(7, 5) % 3).to(dtype)
    parts = [rows[rank::3] for rank in range(3)]

    def all_gather(received, sent):
        assert all(x.dtype == torch.uint8 and x.shape == sent.shape for x in received)
        for x, part in zip(received, parts):
            padded = torch.cat([part, part.new_zeros(3 - len(part), 5)])
            x.copy_(padded.flatten().view(torch.uint8))

    monkeypatch.setattr(devices, "all_sum", lambda x: x.copy_(torch.tensor([3, 2, 2])))
    monkeypatch.setattr(dist, "all_gather", all_gather)
    for rank in range(3):
        monkeypatch.setattr(devices, "rank_and_size", lambda rank=rank: (rank, 3))
        assert torch.equal(devices.gather_from_processes(parts[rank]), rows)
