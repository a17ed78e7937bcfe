"""Tests of studies/restart.py: other models and another order for Dev3 and R1's RL."""
from pathlib import Path

import pytest
import torch

import moe
import r1mini
import tasks
from engine import checkpoint
from engine.folder import read_log
from studies import restart
from tests.helpers import FEW_OF_STUDY, equal_states, random_micro, run_arm, use_random_micro
from tools.settings import resolve_settings

RUN = resolve_settings("micro", FEW_OF_STUDY)


@pytest.fixture
def arm(monkeypatch, tmp_path):
    """A function that runs an arm of the study on a random micro model and returns its numbers."""
    use_random_micro(restart, monkeypatch, tmp_path)
    return lambda arm, *settings: run_arm(restart, arm, *FEW_OF_STUDY, *settings)


def test_restart_unannealed_is_the_base_before_its_rate_falls(arm, tmp_path):
    """The kept weights are those that the base's own recipe has after its first three of five
    steps. The control, whose rate never falls, ends elsewhere than the base."""
    arm("unannealed")
    start = tmp_path / "runs/micro-demo-start-0"
    torch.manual_seed(0)
    base = moe.Transformer(RUN.model)
    steps = r1mini.train(base, RUN.base, lambda rng: tasks.make_document(rng, RUN.corpus), 0)
    for record, _ in steps:
        if record["step"] == 3:
            kept = checkpoint.load(start / "unannealed.pt")[0]
            assert equal_states(base.state_dict(), kept.state_dict())
    constant = checkpoint.load(start / "constant.pt")[0]
    assert not equal_states(base.state_dict(), constant.state_dict())


def test_restart_arms_share_a_start(arm, tmp_path):
    """Two arms of a tiny run: what they start from is trained once, both learn from the same data,
    and they have numbers of every kind. In R1's order general prompts come last, in chat_first they
    come first. Entropy is that of rollouts without general prompts."""
    numbers = arm("base", "r1.steps=4", "r1.problems=6")
    start = tmp_path / "runs/micro-demo-start-0"
    before = (start / "dev3.jsonl").read_text("utf-8"), (start / "constant.pt").stat().st_mtime
    assert {"pass@1", "longer", "gain", "entropy.last", "helpfulness", "safe"} <= set(numbers)
    assert numbers["rate"] in restart.RATES and numbers["start_minutes"] > 0

    assert "longer" in arm("chat_first", "r1.steps=4", "r1.problems=6")
    assert before == ((start / "dev3.jsonl").read_text("utf-8"),
                      (start / "constant.pt").stat().st_mtime)
    for rate in restart.RATES:
        tuned = tmp_path / f"runs/micro-demo-start-0-base-{rate}"
        assert (tuned / "dev3.jsonl").read_text("utf-8") == before[0]

    def rollouts(arm):
        """The records of RL, and whether each rollout has general prompts."""
        records = [r for r in read_log(tmp_path / f"runs/micro-demo-{arm}-0")
                   if r["kind"] in ("chat", "r1")]
        return records, [r["preference"] is not None for r in records]
    records, general = rollouts("base")
    assert general == [False, False, False, True]
    assert (numbers["entropy.first"], numbers["entropy.last"]) == (
        records[0]["entropy"], records[2]["entropy"])
    records, general = rollouts("chat_first")
    assert [r["kind"] for r in records] == ["chat", "r1", "r1", "r1"]
    assert general == [True, False, False, False]


def test_restart_rate_is_the_best_on_dev(arm, monkeypatch):
    """The arm goes on with the model of the rate that has the best score on dev."""
    best = restart.RATES[1]

    def fake(path):
        return [r | {"pass@1": float(str(path).endswith(str(best)))} if r["kind"] == "dev" else r
                for r in read_log(path)]
    monkeypatch.setattr(restart, "read_log", fake)
    numbers = arm("dev2")
    assert (numbers["rate"], numbers["dev3.dev"]) == (best, 1.0)


@pytest.mark.parametrize("name", ["base", "dev1", "dev2", "unannealed", "constant"])
def test_restart_arm_is_fine_tuned_from_its_model(arm, monkeypatch, name):
    """Dev3 starts from the model that the arm is named after, once with each learning rate."""
    started = []
    dev3 = r1mini.dev3

    def watch(folder, models):
        if folder.path.name != "micro-demo-start-0":
            started.append((folder, models["base"]))
        return dev3(folder, models)
    monkeypatch.setattr(r1mini, "dev3", watch)
    monkeypatch.setattr(restart, "_reinforce", lambda *_: 1 / 0)  # the rest is not needed
    with pytest.raises(ZeroDivisionError):
        arm(name)
    start = Path("runs/micro-demo-start-0")
    wanted = random_micro() if name == "base" else checkpoint.load(start / f"{name}.pt")[0]
    assert len(started) == len(restart.RATES)
    for folder, model in started:
        assert equal_states(model.state_dict(), wanted.state_dict())
    assert [folder.run.dev3.lr for folder, _ in started] == list(restart.RATES)
