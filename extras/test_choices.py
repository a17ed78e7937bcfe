"""The tests of study choices: what it counts, from a log made by hand."""
import dataclasses
import json

import pytest

from extras import choices, options as words, study
from extras.cost import in_products
from extras.study import runs


def write(folder, stages, reached):
    """A log of two pretraining steps and twenty of RL, right on 90% of dev from `reached` on."""
    folder.mkdir(parents=True)
    lines = [{"kind": "config"} | dataclasses.asdict(words.resolve("nano", (
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
    model = words.resolve("nano", ()).model
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
    default = words.resolve("nano", ["eval.longer=1"])
    for _, command in runs("choices", 0):
        command = [w for w in command if w != "--from" and not w.endswith("base.pt")]
        assert words.resolve("nano", words.parse(command).set) != default
    assert len(study.runs("choices", 0)) == len(choices.BASES) + len(choices.REINFORCED)
