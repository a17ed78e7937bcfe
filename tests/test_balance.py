"""Tests of studies/balance.py: load, what experts learn, and a tiny run."""
import json
import math
import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import moe
import tasks
from r1mini import pack
from studies import balance
from tests.helpers import MICRO
from tools import study
from tools.settings import resolve_settings

FEW = ("base.steps=3", "base.documents=8", "eval.problems=4", "eval.fewer_samples=1",
       "zero.max_new_tokens=9")


def test_balance_max_violation_by_hand():
    """0 if all have as much; 3 if two of eight experts have all."""
    assert balance._max_violation([5, 5, 5]) == 0
    assert balance._max_violation([6, 3, 3]) == pytest.approx(0.5)
    assert balance._max_violation([9, 9, 0, 0, 0, 0, 0, 0]) == pytest.approx(3)


def test_balance_information_by_hand():
    """1 bit if the expert tells one of two equally frequent kinds, 0 if it tells nothing. Else it
    is H(kind) - H(kind | expert), by hand."""
    assert balance._information(Counter({(0, "digit"): 8, (1, "sign"): 8})) == pytest.approx(1)
    even = Counter({(e, kind): n for e in range(3) for kind, n in (("digit", 6), ("sign", 2))})
    assert balance._information(even) == pytest.approx(0)
    counts = Counter({(0, "digit"): 3, (0, "sign"): 1, (1, "sign"): 4})
    entropy = -(3 / 8 * math.log2(3 / 8) + 5 / 8 * math.log2(5 / 8))
    in_expert_0 = -(3 / 4 * math.log2(3 / 4) + 1 / 4 * math.log2(1 / 4))
    assert balance._information(counts) == pytest.approx(entropy - in_expert_0 / 2)
    assert balance._entropy_of_experts(counts) == pytest.approx(1)  # four tokens each
    assert balance._entropy_of_experts(even) == pytest.approx(math.log2(3))
    assert balance._favourites(counts, 3) == "0 digit 2.0x, 1 sign 1.6x, 2 idle"


def test_balance_kinds_of_tokens():
    """By hand; every token of the vocabulary has a kind."""
    words = {"7": "digit", "+": "sign", "=": "sign", " then ": "English", "检查": "Chinese",
             " ": "other"}
    for text, kind in words.items():
        (token_id,) = tasks.ENCODING.encode_ordinary(text)
        assert balance._kind_of(token_id) == kind
    assert balance._kind_of(tasks.END_ID) == "special"
    found = Counter(balance._kind_of(i) for i in range(tasks.VOCAB_SIZE))
    assert set(found) == set(balance.KINDS) and found["digit"] == 10
    assert found["sign"] == 5 and found["special"] == len(tasks.SPECIAL)


def test_balance_counts_are_the_routers_choices():
    """The experts of each token, one document at a time and without padding."""
    torch.manual_seed(0)
    model = moe.Transformer(MICRO).eval()
    rng = random.Random(0)
    documents = [tasks.make_document(rng, tasks.Corpus()) for _ in range(6)]
    counts = balance._count_choices(model, pack(documents, 128))
    router, seen = model.layers[1].ffn.router, []
    handle = router.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[2]))
    expected = Counter()
    for document in documents:
        model(torch.tensor([document.tokens]))
        for token_id, experts in zip(document.tokens, seen.pop().tolist()):
            expected.update((expert, balance._kind_of(token_id)) for expert in experts)
    handle.remove()
    assert counts == [expected]
    assert not router._forward_hooks


def test_balance_arms():
    """Nothing balances in the first arm, and one thing in each of the others, with the papers'
    numbers or ten times these. No other setting differs."""
    runs = [resolve_settings("nano", settings.split()) for settings in balance.ARMS.values()]
    assert [(r.model.balance_alpha, r.model.bias_speed) for r in runs] == [
        (0, 0), (1e-3, 0), (1e-2, 0), (0, 1e-3), (0, 1e-2)]
    for r in runs:
        assert replace(r, model=replace(r.model, balance_alpha=0, bias_speed=0)) == runs[0]


def test_balance_numbers_of_training(monkeypatch):
    """Loss and MaxVio are means over the last 100 steps and over the layers. MTP's mixture, the
    last of a step, does not count. What is read afterwards was not trained on."""
    trained, read = [], []

    def fake_train(model, s, draw, seed):
        trained.extend(tuple(draw(random.Random(f"{seed}/train/{step}")).tokens)
                       for step in range(150))
        for step in range(150):
            is_last = step >= 50
            loads = [[1, 1, 1, 1], [4, 0, 0, 0]]  # MaxVio 0, and 3 of MTP
            if is_last:
                loads[0] = [2, 1, 1, 0]           # MaxVio 1
            yield {"loss": 0.5 if is_last else 9.0, "loads": loads}, None

    def keep_rows(documents, row_tokens):
        read.extend(tuple(d.tokens) for d in documents)
        return pack(documents, row_tokens)

    monkeypatch.setattr(balance, "train", fake_train)
    monkeypatch.setattr(balance, "pack", keep_rows)
    monkeypatch.setattr(balance, "DOCUMENTS", 20)
    monkeypatch.setattr(balance, "test_numbers", lambda *_: {"pass@1": 0.25})
    run = resolve_settings("micro", [])
    numbers = balance.measure_arm("none", SimpleNamespace(run=run, place=lambda model: model))
    assert (numbers["loss"], numbers["maxvio_batch"], numbers["pass@1"]) == (0.5, 1.0, 0.25)
    assert len(read) == 20 and not set(read) & set(trained)


def test_balance_runs(monkeypatch, tmp_path):
    """A tiny run of all arms: the keys, and lines for the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(balance, "SETTINGS", (*balance.SETTINGS, *FEW))
    monkeypatch.setattr(balance, "DOCUMENTS", 8)
    study.main(SimpleNamespace(name="balance", preset="micro", rest=["--seeds", "0"]), balance)
    summary = json.loads((tmp_path / "results/balance-micro/summary.json").read_text("utf-8"))
    for arm in balance.ARMS:
        # Two of four experts of a token: the busiest has at most twice the mean.
        assert 0 <= summary["metrics"][f"balance.{arm}.maxvio"]["mean"] <= 1
        assert summary["metrics"][f"{arm}.loss"]["mean"] < 8
        assert summary["notes"][f"{arm}.experts"]["0"].startswith("0 ")
    metrics = summary["metrics"]
    assert metrics["balance.bias_minus_none.loss"]["mean"] == pytest.approx(
        metrics["bias.loss"]["mean"] - metrics["none.loss"]["mean"])
