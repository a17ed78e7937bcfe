"""Tests of studies/restart.py: other models and another order for Dev3 and R1's RL."""
from pathlib import Path

import pytest
import torch

import moe
import r1mini
import tasks
from engine import checkpoint
from engine.folder import read_log
from engine.sampling import generate
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
    come first."""
    numbers = arm("base", "r1.steps=4", "r1.problems=6")
    start = tmp_path / "runs/micro-demo-start-0"
    before = (start / "dev3.jsonl").read_text("utf-8"), (start / "constant.pt").stat().st_mtime
    assert {"pass@1", "longer", "gain", "entropy", "helpfulness", "safe"} <= set(numbers)
    assert numbers["start_minutes"] > 0
    assert "longer" in arm("chat_first", "r1.steps=4", "r1.problems=6")
    assert before == ((start / "dev3.jsonl").read_text("utf-8"),
                      (start / "constant.pt").stat().st_mtime)

    def general_prompts(arm):
        """(stage of RL, whether the rollout has general prompts) of each rollout."""
        return [(r["kind"], r["preference"] is not None)
                for r in read_log(tmp_path / f"runs/micro-demo-{arm}-0")
                if r["kind"] in ("chat", "r1")]
    assert general_prompts("base") == [("r1", False)] * 3 + [("r1", True)]
    assert general_prompts("chat_first") == [("chat", True)] + [("r1", False)] * 3


def test_restart_entropy_by_a_slow_loop():
    """Answer by answer, without the cache and without padding."""
    model, total, n = random_micro().eval(), 0.0, 0
    problems = tasks.make_problems("dev", RUN.eval.dev_problems, RUN.r1.levels)
    prompts = [tasks.encode_prompt(problem.question) for problem in problems]
    answers = generate(model, prompts, RUN.r1.max_new_tokens, tasks.END_ID, tasks.PAD_ID).answers()
    for prompt, ids in zip(prompts, answers):
        p = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1].detach().softmax(-1)
        total -= float((p * p.log()).sum())
        n += len(ids)
    assert restart._entropy(model, RUN) == pytest.approx(total / n, rel=1e-4)


@pytest.mark.parametrize("name", restart.ARMS)
def test_restart_arm_is_fine_tuned_from_its_model(arm, monkeypatch, name):
    """Dev3 starts from the model that the arm is named after, with the arm's learning rate, on the
    answers that all arms share. The base's Dev3 is the one that is trained for all arms."""
    started, goes_on = [], []
    dev3 = r1mini.dev3

    def watch(folder, models):
        data = (folder.path / "dev3.jsonl").exists()
        started.append((folder.path.name, folder.run.dev3.lr, models["base"], data))
        return dev3(folder, models)

    def reinforce(arm, folder, models):
        goes_on.append(models["dev3"])
        raise ZeroDivisionError  # the rest is not needed

    monkeypatch.setattr(r1mini, "dev3", watch)
    monkeypatch.setitem(r1mini.STAGES, "dev3", watch)
    monkeypatch.setattr(restart, "_reinforce", reinforce)
    with pytest.raises(ZeroDivisionError):
        arm(name)
    start = Path("runs/micro-demo-start-0")
    of_all, *of_arm = started
    assert of_all[0] == start.name and equal_states(of_all[2].state_dict(),
                                                    random_micro().state_dict())
    if name in restart.RATES:
        [(folder, rate, model, has_data)] = of_arm
        assert has_data and rate == restart.RATES[name]
        wanted = checkpoint.load(start / f"{name}.pt")[0]
        assert equal_states(model.state_dict(), wanted.state_dict())
        path = start.with_name(folder) / "dev3.pt"
    else:
        assert not of_arm
        path = start / "dev3.pt"
    assert equal_states(goes_on[0].state_dict(), checkpoint.load(path)[0].state_dict())
