"""The tests of engine/checkpoint.py."""
import errno
import os
import subprocess
import sys

import pytest
import torch

import moe
import tasks
from engine import checkpoint
from engine.errors import UserError
from tests.helpers import MICRO, ROOT, make


def test_load_returns_what_save_was_given(tmp_path):
    """The configuration, the weights, the routing biases and all extra values come back."""
    model = make()
    checkpoint.save(tmp_path / "a.pt", model, step=7, seen=torch.arange(3))
    loaded, extra = checkpoint.load(tmp_path / "a.pt")
    assert loaded.config == model.config
    assert extra["step"] == 7 and extra["seen"].tolist() == [0, 1, 2]
    state = loaded.state_dict()
    assert "layers.1.ffn.router.bias" in state
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_load_returns_no_other_extra_values(tmp_path):
    """load returns exactly the extra values that save was given, and none of its own."""
    checkpoint.save(tmp_path / "a.pt", make(), step=7)
    assert checkpoint.load(tmp_path / "a.pt")[1] == {"step": 7}


@pytest.mark.parametrize("damage", ["truncated", "text", "list", "weights", "format"])
def test_load_refuses_a_bad_checkpoint_in_one_line(tmp_path, damage):
    """Every kind of damage becomes a UserError that names the file in one line."""
    path = tmp_path / "a.pt"
    checkpoint.save(path, make())
    content, record = path.read_bytes(), torch.load(path, weights_only=True)
    {"truncated": lambda: path.write_bytes(content[:len(content) // 2]),
     "text": lambda: path.write_text("no model\n" * 99),
     "list": lambda: torch.save([1, 2], path),
     "weights": lambda: torch.save({**record, "model": {}}, path),
     "format": lambda: torch.save({**record, "format": checkpoint.FORMAT + 1}, path)}[damage]()
    with pytest.raises(UserError, match="a.pt: ") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory."),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
                 "allocate memory: you tried to allocate 9 bytes. Error code 12")])
def test_load_without_memory_does_not_call_the_file_damaged(tmp_path, monkeypatch, error):
    """When the memory does not suffice, the line says so, and does not advise to delete a good
    checkpoint."""
    def load(*_, **__):
        raise error
    checkpoint.save(tmp_path / "a.pt", make())
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(UserError, match="a.pt: out of memory") as caught:
        checkpoint.load(tmp_path / "a.pt")
    assert "damaged" not in str(caught.value) and "delete" not in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space")
def test_load_under_a_real_limit_of_memory(tmp_path):
    """torch's own error is recognized: a process with 20 MiB left loads a checkpoint of 33."""
    sizes = dict(vocab_size=24, inter_dim=40000, n_layers=4)
    checkpoint.save(tmp_path / "a.pt", moe.Transformer(moe.Config(**sizes)))
    code = ("import resource, sys; sys.path.insert(0, sys.argv[1]); "
            "from engine import checkpoint, errors\n"
            "pages = int(open('/proc/self/statm').read().split()[0])\n"
            "limit = pages * resource.getpagesize() + 20 * 2 ** 20\n"
            "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
            "try: checkpoint.load(sys.argv[2])\n"
            "except errors.UserError as error: print(error)")
    run = subprocess.run([sys.executable, "-c", code, str(ROOT), str(tmp_path / "a.pt")],
                         capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert "out of memory" in run.stdout and "damaged" not in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize("change", ["words", "special"])
def test_load_refuses_another_vocabulary(tmp_path, monkeypatch, change):
    """A checkpoint that was saved with other tokens is refused by one line, even if there are as
    many of them. One without a fingerprint is loaded."""
    checkpoint.save(tmp_path / "a.pt", moe.Transformer(MICRO))
    checkpoint.save(tmp_path / "imported.pt", make())
    record = torch.load(tmp_path / "a.pt", weights_only=True)
    del record["vocabulary"]
    torch.save(record, tmp_path / "older.pt")
    first, second, *rest = tasks.RANKS.items()
    if change == "words":
        monkeypatch.setattr(tasks, "RANKS", dict([(first[0], second[1]), (second[0], first[1]),
                                                  *rest]))
    else:
        monkeypatch.setattr(tasks, "SPECIAL", tasks.SPECIAL[::-1])
    with pytest.raises(UserError, match="a.pt has another vocabulary") as caught:
        checkpoint.load(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)
    assert checkpoint.load(tmp_path / "older.pt")[1] == {}
    assert checkpoint.load(tmp_path / "imported.pt")[1] == {}


def test_checkpoints_of_older_versions_load(tmp_path):
    """The kept base loads, also without a fingerprint, as older versions wrote it."""
    kept = ROOT / "results/checkpoints/0/base.pt"
    record = torch.load(kept, weights_only=True)
    assert record.pop("vocabulary")
    torch.save(record, tmp_path / "old.pt")
    for path in (kept, tmp_path / "old.pt"):
        assert checkpoint.load(path)[0].config.vocab_size == tasks.VOCAB_SIZE


def test_load_names_a_missing_checkpoint(tmp_path):
    """A missing file raises FileNotFoundError with the path; it is not called damaged."""
    with pytest.raises(FileNotFoundError, match="a.pt"):
        checkpoint.load(tmp_path / "a.pt")


def test_load_executes_nothing(tmp_path):
    """A pickle that would create a file is refused, and the file is not created."""
    path, mark = tmp_path / "a.pt", tmp_path / "mark"
    evil = type("Evil", (), {"__reduce__": lambda self: (open, (str(mark), "w"))})()
    torch.save({"format": checkpoint.FORMAT, "model": evil}, path)
    with pytest.raises(UserError):
        checkpoint.load(path)
    assert not mark.exists()


def test_save_keeps_the_old_checkpoint_when_the_disk_is_full(tmp_path, monkeypatch):
    """A write that fails half-way leaves the old file as it was, and no temporary file."""
    def full_disk(record, file):
        file.write(b"half")
        raise OSError("No space left on device")

    checkpoint.save(tmp_path / "a.pt", make())
    before = (tmp_path / "a.pt").read_bytes()
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path / "a.pt", make(1))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    assert (tmp_path / "a.pt").read_bytes() == before
