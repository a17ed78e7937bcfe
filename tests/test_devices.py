"""The tests of engine/devices.py in which all processes hold the same model.

(test_layouts.py compares every other layout with one process.)
"""
import subprocess
from types import SimpleNamespace

import pytest

from engine import checkpoint, devices, folder
from tests.helpers import FEW, same_weights
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

    monkeypatch.setattr(devices, "subprocess", SimpleNamespace(Popen=start))
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
