"""Tests of studies/choices.py: the cost of each recipe, growing batches and the curriculum."""
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
from tools.flops import flops_per_token


def write_log(folder, stages, reached):
    """Writes a log of two pretraining steps and 20 RL steps. From step `reached` on, pass@1 on dev
    is 0.9."""
    folder.mkdir(parents=True)
    changes = ("zero.beta=0",) if folder.name == "choices-dr_grpo-0" else ()
    lines = [{"kind": "config"} | dataclasses.asdict(cli.resolve_settings("nano", changes))]
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


def test_choices_flops_to_85_percent_equal_hand_count(tmp_path):
    """A hand count: pretraining takes 6 N FLOPs a token, MTP's N included. Each RL step, up to the
    one that reaches 85% on dev, takes 2 N a token of an answer and of a prompt, which 16 answers
    share, and 8 N a learnt token (6 N without a reference). A recipe that never reaches 85% has no
    figure."""
    write_log(tmp_path / "r1-0", ("base", "zero"), 10)
    for recipes in (choices.BASES, choices.REINFORCED):
        for name, _ in recipes.values():
            stages = ("base", "zero") if recipes is choices.BASES else ("zero",)
            write_log(tmp_path / f"choices-{name}-0", stages, 99 if name == "adamw" else 5)
    found = choices.numbers(0, f"{tmp_path}/")
    model = cli.resolve_settings("nano", ()).model
    base = 2000 * flops_per_token(model, "learn", mtp=True) / (flops_per_token(model, "read") / 2)
    step = 2 * (10 + 5 / 16) + 8 * 20
    ratio = found["as it is.tflop"] / found["as it is.base_tflop"]
    assert ratio == pytest.approx((base + 10 * step) / base)
    ratio = found["Dr. GRPO.tflop"] / found["Dr. GRPO.base_tflop"]
    assert ratio == pytest.approx((base + 5 * (step - 2 * 20)) / base)  # no reference
    assert found["as it is.steps"] == 10 and found["AdamW, no Muon.base"] == 0.1
    assert "AdamW, no Muon.tflop" not in found


def test_choices_every_recipe_changes_a_setting():
    """The command of each recipe is understood and resolves to settings that differ from the
    default's."""
    default = cli.resolve_settings("nano", ["eval.longer=1"])
    for _, command in study._study_runs(choices, 0):
        command = [w for w in command if w != "--from" and not w.endswith("base.pt")]
        assert cli.resolve_settings("nano", cli.parse_arguments(command).set) != default
    assert len(study._study_runs(choices, 0)) == len(choices.BASES) + len(choices.REINFORCED)


def weights_after(loop, steps, state=None, weights=None):
    """Takes `steps` steps of a training loop. Returns (weights, state to resume from, documents of
    each step)."""
    torch.manual_seed(0)
    run, read = cli.resolve_settings("micro", ["base.steps=6", "base.documents=4"]), []
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
    """Whether two state dicts are equal to the bit."""
    return all(torch.equal(a[key], b[key]) for key in a)


def test_choices_growing_reads_more_documents_by_thirds(monkeypatch):
    """The thirds of `growing` read 0.5, 1 and 1.5 times the documents a step. Stopped after any
    step it resumes to the same bits, and with factors of 1 it equals r1mini.train."""
    grown, _, read = weights_after(choices._train_longer_and_longer, 6)
    assert read == [2, 2, 4, 4, 6, 6] and sum(read) == 6 * 4
    for n in (1, 2, 3, 5):
        weights, state, _ = weights_after(choices._train_longer_and_longer, n)
        resumed, _, read = weights_after(choices._train_longer_and_longer, 6 - n, state, weights)
        assert same(resumed, grown) and read == [2, 2, 4, 4, 6, 6][n:]
    monkeypatch.setattr(choices, "GROWTH", (1, 1, 1))
    plain, _, _ = weights_after(train, 6)
    assert same(weights_after(choices._train_longer_and_longer, 6)[0], plain)
    assert not same(plain, grown)


def test_choices_curriculum_draws_weak_levels_more_often(tmp_path):
    """With accuracies of 1.0 and 0.1, the curriculum draws the second level 19 times as often (a
    hand count of the weights). It uses the last dev record up to the current step."""
    records = [{"kind": "dev", "stage": "curriculum", "step": step, "by_level": {"3": a, "6": b}}
               for step, a, b in ((0, 1.0, 1.0), (5, 1.0, 0.1), (10, 0.1, 1.0))]
    records.insert(0, {"kind": "config"})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    run = cli.resolve_settings("micro", ["zero.levels=3,6"])
    task = choices._levels_by_success(SimpleNamespace(path=tmp_path, run=run), run.zero)
    for step, share in ((4, 0.5), (5, 0.95), (9, 0.95), (10, 0.05)):
        problems = task.draw(random.Random(0), 2000, step)
        assert sum(p.level == 6 for p in problems) / 2000 == pytest.approx(share, abs=0.03)


def test_choices_renamed_renames_stages_of_a_log():
    """`_rename_stages` keeps the configuration, renames the given stages and drops all others."""
    log = [{"kind": "config"}, {"kind": "grown", "step": 1}, {"kind": "curriculum", "step": 1},
           {"kind": "dev", "stage": "grown", "step": 1}, {"kind": "test", "stage": "growing"}]
    assert choices._rename_stages(log, grown="zero") == [
        {"kind": "config"}, {"kind": "zero", "step": 1},
        {"kind": "dev", "stage": "zero", "step": 1}]


def test_choices_measure_counts_both_schedules(tmp_path, monkeypatch):
    """measure() counts `grown` from the records of growing and grown, and `curriculum` from the
    usual base and its own RL. The training is replaced by written logs; the oracle is
    training_curve()."""
    write_log(tmp_path / "r1-0", ("base", "zero"), 10)
    usual = [json.loads(line) for line in (tmp_path / "r1-0" / "log.jsonl").open()]
    ours = tmp_path / "choices-0"
    ours.mkdir()
    records = choices._rename_stages(usual, base="growing")
    records += choices._rename_stages(usual, zero="grown")[1:]
    late = [r | {"pass@1": 0.9 if r["step"] >= 20 else 0.1} if r["kind"] == "dev" else r
            for r in choices._rename_stages(usual, zero="curriculum")[1:]]
    (ours / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records + late))
    run = cli.resolve_settings("micro", [], start=str(tmp_path / "r1-0" / "r1.pt"))
    folder = SimpleNamespace(
        path=ours, run=run, options=SimpleNamespace(device="cpu", dtype=torch.float32),
        place=lambda model: model, stage=lambda name, model, *rest: model)
    monkeypatch.setattr(choices, "rl", lambda *_: None)
    monkeypatch.setattr(choices.checkpoint, "load", lambda *_: (None, {}))
    found = choices.measure(folder)
    for name, steps in zip(choices.SCHEDULES, (10, 20)):
        assert found[f"{name}.steps"] == steps
    expected = choices._training_curve(usual, usual)
    assert {key.partition(".")[2]: x for key, x in found.items()
            if key.startswith(choices.SCHEDULES[0])} == expected


def test_choices_page_shows_every_recipe_and_schedule():
    """The page has a row for each recipe and schedule, and the number of seeds that reached 85%."""
    names = [*choices._recipe_folders(0, ""), *choices.SCHEDULES]
    rows = {f"{name}.base": {"mean": 0.2, "std": 0.0, "per_seed": {"0": 0.1, "1": 0.3}}
            for name in names}
    for name, tflop in zip(names, (5.0, 4.0)):
        rows[f"{name}.tflop"] = {"mean": tflop, "std": 0.0, "per_seed": {"1": tflop}}
    cells = [line.split(" | ") for line in choices.page(rows, {}) if line.startswith("| ")][1:]
    assert [row[0].removeprefix("| ") for row in cells] == names
    assert [row[-2] for row in cells] == ["1 of 2", "1 of 2"] + ["0 of 2"] * (len(names) - 2)
    # The second recipe is 1 TFLOP below the default. The default has no difference from itself.
    assert [row[-1].removesuffix(" |") for row in cells] == ["", "-1, one seed"] + [""] * (
        len(names) - 2)
