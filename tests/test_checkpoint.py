"""The tests of engine/checkpoint.py."""
import pytest
import torch

from engine import checkpoint
from engine.errors import UserError
from tests.helpers import make


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
