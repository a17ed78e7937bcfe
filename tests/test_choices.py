"""The tests of study choices and study schedules."""
import dataclasses
import itertools
import json
import random
from types import SimpleNamespace

import pytest
import torch

import moe
import tasks
from r1mini import train
from studies import choices
from tools import cli, study
from tools.cost import in_products
from tools.study import runs


def write(folder, stages, reached):
    """A log of two pretraining steps and twenty of RL, right on 90% of dev from `reached` on."""
    folder.mkdir(parents=True)
    lines = [{"kind": "config"} | dataclasses.asdict(cli.resolve("nano", (
        "zero.beta=0",) * (folder.name == "choices-dr_grpo-0")))]
    if "base" in stages:
        lines += [{"kind": "base", "step": i, "tokens": 1000} for i in (1, 2)]
    for step in range(0, 21):
        if step:
            lines.append({"kind": "zero", "step": step, "tokens": 10, "prompt_tokens": 5,
                          "learnt_tokens": 20})
        if step % 5 == 0:
            lines.append({"kind": "dev", "stage": "zero", "step": step,
                          "pass@1": 0.9 if step >= reached else 0.1})
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))


def test_operations_to_85_percent(tmp_path):
    """By hand: 6 N tokens to pretrain, MTP's among them; each step of RL up to the one in
    question 2 N of what is sampled and 8 N of what is learnt from. What never comes there has no
    figure."""
    write(tmp_path / "r1-0", ("base", "zero"), 10)
    for recipes in (choices.BASES, choices.REINFORCED):
        for name, _ in recipes.values():
            stages = ("base", "zero") if recipes is choices.BASES else ("zero",)
            write(tmp_path / f"choices-{name}-0", stages, 99 if name == "adamw" else 5)
    found = choices.measure(0, f"{tmp_path}/")
    model = cli.resolve("nano", ()).model
    base = 6 * 2000 * in_products(model) / in_products(model, mtp=False)
    step = 2 * 15 + 8 * 20
    ratio = found["as it is.tflop"] / found["as it is.base_tflop"]
    assert ratio == pytest.approx((base + 10 * step) / base)
    ratio = found["Dr. GRPO.tflop"] / found["Dr. GRPO.base_tflop"]
    assert ratio == pytest.approx((base + 5 * (step - 2 * 20)) / base)  # it has no reference
    assert found["as it is.steps"] == 10 and found["AdamW, no Muon.base"] == 0.1
    assert "AdamW, no Muon.tflop" not in found


def test_each_recipe_is_the_default_with_a_change():
    """Its words are understood, and what they say is not what the default says."""
    default = cli.resolve("nano", ["eval.longer=1"])
    for _, command in runs("choices", 0):
        command = [w for w in command if w != "--from" and not w.endswith("base.pt")]
        assert cli.resolve("nano", cli.parse(command).set) != default
    assert len(study.runs("choices", 0)) == len(choices.BASES) + len(choices.REINFORCED)


def weights_after(loop, steps, state=None, weights=None):
    """(weights after so many steps of a loop, the state to go on from, documents of each step)."""
    torch.manual_seed(0)
    run, read = cli.resolve("micro", ["base.steps=6", "base.documents=4"]), []
    model = moe.Transformer(run.model)
    if weights:
        model.load_state_dict(weights)

    def draw(rng):
        read[-1] += 1
        return tasks.make_document(rng, run.corpus)
    read.append(0)
    for record, snapshot in itertools.islice(loop(model, run.base, draw, 0, state), steps):
        read.append(0)
        last = snapshot()
    return {k: x.clone() for k, x in model.state_dict().items()}, last, read[:steps]


def same(a, b):
    """Whether two states are the same to the bit."""
    return all(torch.equal(a[key], b[key]) for key in a)


def test_growing_is_training_with_other_batches(monkeypatch):
    """Half, all and half as many again, in thirds; stopped anywhere it goes on to the same bits;
    where nothing grows it is the supervised loop itself."""
    whole, _, read = weights_after(choices.growing, 6)
    assert read == [2, 2, 4, 4, 6, 6] and sum(read) == 6 * 4
    for n in (1, 2, 3, 5):
        weights, state, _ = weights_after(choices.growing, n)
        again, _, read = weights_after(choices.growing, 6 - n, state, weights)
        assert same(again, whole) and read == [2, 2, 4, 4, 6, 6][n:]
    monkeypatch.setattr(choices, "GROWTH", (1, 1, 1))
    plain, _, _ = weights_after(train, 6)
    assert same(weights_after(choices.growing, 6)[0], plain) and not same(plain, whole)


def test_the_curriculum_asks_what_is_not_known(tmp_path):
    """By hand: of two levels, one always right and one right in one answer of ten, the second is
    drawn 19 times as often; it is the last dev up to the step that counts."""
    records = [{"kind": "dev", "stage": "curriculum", "step": step, "by_level": {"3": a, "6": b}}
               for step, a, b in ((0, 1.0, 1.0), (5, 1.0, 0.1), (10, 0.1, 1.0))]
    records.insert(0, {"kind": "config"})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    run = cli.resolve("micro", ["zero.levels=3,6"])
    task = choices.by_success(SimpleNamespace(path=tmp_path, run=run), run.zero)
    for step, share in ((4, 0.5), (5, 0.95), (9, 0.95), (10, 0.05)):
        asked = task.sample(random.Random(0), 2000, step)
        assert sum(p.level == 6 for p in asked) / 2000 == pytest.approx(share, abs=0.03)


def test_a_log_by_other_names():
    """The configuration stays, other stages go."""
    log = [{"kind": "config"}, {"kind": "grown", "step": 1}, {"kind": "curriculum", "step": 1},
           {"kind": "dev", "stage": "grown", "step": 1}, {"kind": "test", "stage": "growing"}]
    assert choices.called(log, grown="zero") == [
        {"kind": "config"}, {"kind": "zero", "step": 1},
        {"kind": "dev", "stage": "zero", "step": 1}]
