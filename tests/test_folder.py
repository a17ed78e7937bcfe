"""The tests of --tensorboard (the log's curves, each point once, however often a run is stopped)
and of what the console says of a run beside the README's."""
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

import moe
import r1mini
from engine import folder
from engine.errors import UserError
from tools import cli


class Writer:
    """Stands in for TensorBoard's writer where that is not installed."""

    def __init__(self, path, purge_step):
        self.file = folder.Path(path) / "points.jsonl"
        self.file.parent.mkdir(parents=True)
        self.lines = []

    def add_scalar(self, tag, value, step):
        """Keeps a point."""
        self.lines.append([tag, step, value])

    def flush(self):
        """Writes the points."""
        self.file.write_text("".join(json.dumps(line) + "\n" for line in self.lines))

    close = flush


def points_in(path):
    """All points in a run's folder, sorted: [tag, step, value]."""
    if (path / "points.jsonl").exists():
        return sorted(map(json.loads, (path / "points.jsonl").read_text().splitlines()))
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = events.EventAccumulator(str(path), {"scalars": 0}).Reload()
    return sorted([tag, point.step, point.value] for tag in events.Tags()["scalars"]
                  for point in events.Scalars(tag))


def points_of(path):
    """What they should be: each number of each line of the log that has a step."""
    found = []
    for line in (path / "log.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        if "step" not in record:
            continue
        stem = f"{record['stage']}/{record['kind']}/" if "stage" in record else f"{record['kind']}/"
        for name, value in record.items():
            if isinstance(value, dict):
                for key, inner in value.items():
                    for last, x in inner.items() if isinstance(inner, dict) else [("", inner)]:
                        tag = f"{stem}{name}.{key}" + f".{last}" * bool(last)
                        found += [[tag, record["step"], x]] if x is not None else []
            elif name != "step" and isinstance(value, (int, float)):
                found.append([stem + name, record["step"], value])
    return sorted(found)


def run(path, *more, killed=None, stages=("base", "zero")):
    """A run of stages of seven steps that learn nothing, saved at every third."""
    options = cli.parse(["zero", "--preset", "micro", "--tensorboard", "--save-every", "3",
                           "--out", str(path), *more])
    folder = folder.Folder(path, cli.plan(options)[0], options, r1mini.STAGES)

    def loop(model, state):
        for step in range(state["step"] if state else 0, 7):
            yield ({"step": step + 1, "loss": 1 / (step + 1), "tokens": 5, "none": None},
                   lambda: {"step": step + 1, "optimizers": []})

    for stage in stages:
        def watch(model, record, bar):
            if record["step"] % 2 == 0:
                folder.log({"kind": "dev", "stage": stage, "step": record["step"], "pass@1": 0.5,
                            "by_style": {"steps": {"share": 0.25, "3": None}}})
            if (stage, record["step"]) == killed:
                raise RuntimeError("killed")
        folder.stage(stage, moe.Transformer(r1mini.PRESETS["micro"]), loop, 7, watch)
        folder.log({"kind": "test", "stage": stage, "pass@1": 0.5})


@pytest.mark.parametrize("real", [False, True])
def test_a_resumed_run_shows_each_point_once(tmp_path, monkeypatch, real):
    """Killed between two saves and resumed: the points are those of the log, which is that of a run
    left alone; --fresh begins anew."""
    if real:
        pytest.importorskip("tensorboard")
    else:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                            SimpleNamespace(SummaryWriter=Writer))
    for killed in (("base", 5), ("zero", 2), ("zero", 6)):
        with pytest.raises(RuntimeError, match="killed"):
            run(tmp_path, killed=killed)
    run(tmp_path)
    want, found = points_of(tmp_path), points_in(tmp_path / "tensorboard")
    assert [point[:2] for point in found] == [point[:2] for point in want]
    assert [point[2] for point in found] == pytest.approx([point[2] for point in want], rel=1e-6)
    assert {tag: sum(t == tag for t, *_ in found) for tag, *_ in found} == {
        f"{stage}/{name}": n for stage in ("base", "zero") for name, n in (
            ("loss", 7), ("tokens", 7), ("dev/pass@1", 4), ("dev/by_style.steps.share", 4))}
    run(tmp_path, "--fresh", stages=["base"])
    assert {tag.split("/")[0] for tag, *_ in points_in(tmp_path / "tensorboard")} == {"base"}


def test_a_stage_waits_for_one_stopped_half_way(tmp_path, monkeypatch):
    """Or that one, going on, would cut off its records. What was logged is left as it is; when the
    stopped one has ended, both go on."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        SimpleNamespace(SummaryWriter=Writer))
    for name in ("run", "whole"):
        (tmp_path / name).mkdir()
    for killed in (("zero", 2), ("zero", 6)):  # before its first save, and after
        with pytest.raises(RuntimeError, match="killed"):
            run(tmp_path / "run", killed=killed)
        before = (tmp_path / "run" / "log.jsonl").read_bytes()
        with pytest.raises(UserError, match="zero was stopped half-way"):
            run(tmp_path / "run", stages=["student"])
        assert (tmp_path / "run" / "log.jsonl").read_bytes() == before
    for name in ("run", "whole"):  # what was collected for another is no hindrance
        run(tmp_path / name)
        with open(tmp_path / name / "log.jsonl", "a") as log:
            log.write('{"kind": "collected", "stage": "distill"}\n')
        run(tmp_path / name, stages=["base", "zero", "student"])
    one, two = ((tmp_path / name / "log.jsonl").read_text() for name in ("run", "whole"))
    assert one.replace("run", "whole") == two


def test_a_missing_tensorboard_is_one_clear_line(tmp_path, monkeypatch, capsys):
    """Where it is not installed: one clear line, exit code 2, no folder."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert cli.main(["base", "--preset", "micro", "--tensorboard", "--out",
                        str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install tensorboard" in error
    assert not (tmp_path / "run").exists()


def test_a_log_two_commands_wrote_is_not_read(tmp_path):
    """A step twice is refused, whatever stands between; the same step of another stage is not."""
    lines = ['{"kind": "config"}', '{"kind": "zero", "step": 1}', '{"kind": "zero", "step": 2}',
             '{"kind": "dev", "stage": "zero", "step": 1}', '{"kind": "dev2", "step": 1}']
    file = tmp_path / "log.jsonl"
    file.write_text("\n".join(lines) + "\n")
    assert len(folder.read_log(tmp_path)) == 5
    file.write_text("\n".join([*lines, lines[1]]) + "\n")
    with pytest.raises(UserError, match="damaged"):
        folder.read_log(tmp_path)


def test_two_commands_do_not_write_one_folder(tmp_path):
    """While another process holds the folder: exit code 2, one line, nothing of the run touched.
    When it is killed the same command goes on."""
    out = tmp_path / "run"
    out.mkdir()
    hold = ("import fcntl, os, sys, time; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), "
            "fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", hold, out], stdout=subprocess.PIPE)
    other.stdout.readline()
    command = [sys.executable, r1mini.__file__, "base", "--preset", "micro", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "another command is writing there" in done.stderr
    assert "Traceback" not in done.stderr and not os.listdir(out)
    other.kill()
    other.wait()
    assert subprocess.run(command, capture_output=True).returncode == 0
