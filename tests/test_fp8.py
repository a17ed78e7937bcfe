"""Tests of studies/fp8.py: rounding and products beside slow loops, and a tiny run."""
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import moe
import r1mini
from engine.devices import copy_model
from studies import fp8
from tests.helpers import MICRO, make, make_batch
from tools import study
from tools.settings import resolve_settings

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E4M3 = E4M3[E4M3.isfinite()].unique()  # all its numbers
FEW = ("base.steps=3", "base.documents=8", "eval.problems=4", "eval.fewer_samples=1",
       "zero.max_new_tokens=9")


def slow_round(x, rows, columns):
    """Each number replaced by the nearest of E4M3's, tile by tile."""
    x = x.double()
    y = torch.empty_like(x)
    for top in range(0, len(x), rows):
        for left in range(0, x.size(1), columns):
            tile = x[top:top + rows, left:left + columns]
            scale = max(float(tile.abs().max()), 1e-30) / 448
            nearest = (tile.unsqueeze(-1) / scale - E4M3).abs().argmin(-1)
            y[top:top + rows, left:left + columns] = E4M3[nearest] * scale
    return y


@pytest.mark.parametrize("rows, columns", [(1, 16), (16, 1), (16, 16), (5, 37), (2, 64)])
def test_fp8_rounding_is_to_the_nearest(rows, columns):
    """Of all numbers of E4M3, in each tile; also where tiles do not fit, over ten orders of
    magnitude, and for zeros."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(21, 37, generator=generator)
    x = x * 10 ** (10 * torch.rand(21, 37, generator=generator) - 12)
    x[:5] = 0
    expected = slow_round(x, rows, columns)
    assert torch.allclose(fp8._round_e4m3(x, rows, columns).double(), expected, rtol=1e-6, atol=0)
    stack = torch.stack([x, 3 * x])
    assert torch.equal(fp8._round_e4m3(stack, rows, columns)[0], fp8._round_e4m3(x, rows, columns))
    assert fp8._round_e4m3(x[:0], rows, columns).shape == (0, 37)


def test_fp8_four_bits_by_hand():
    """Whole numbers from -7 to 7, times the scale of each tile of two."""
    x = torch.tensor([[7.0, 3.4, -14.0, 3.1], [0.0, 0.0, -0.7, 0.14]])
    expected = torch.tensor([[7.0, 3.0, -14.0, 4.0], [0.0, 0.0, -0.7, 0.1]])
    assert torch.allclose(fp8._round_four_bits(x, 2), expected)


def test_fp8_product_and_gradients_by_slow_rounding():
    """Three products of rounded numbers: tiles along what is summed, blocks of weights, and x
    rounded twice for dw."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(21, 32, generator=generator, requires_grad=True)
    w = torch.randn(48, 32, generator=generator, requires_grad=True)
    dy = torch.randn(21, 48, generator=generator)
    y = fp8.Product.apply(x, w, 16)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    x8, w8 = slow_round(x.detach(), 1, 16), slow_round(w.detach(), 16, 16)
    x_again = slow_round(x8, 16, 1)
    assert not torch.allclose(x_again, x8, rtol=1e-3)
    for found, expected in ((y, x8 @ w8.T), (dx, slow_round(dy, 1, 16) @ w8),
                            (dw, slow_round(dy, 16, 1).T @ x_again)):
        assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_fp8_exact_products_change_nothing():
    """With an exact product, the replaced layers give the usual loss and gradients."""
    tokens, real, weight = make_batch()
    found, model = [], make().train()
    for m in (model, fp8._replace_products(copy_model(model), lambda x, w: x @ w.T)):
        loss, _ = moe.supervised_loss(m, tokens, real.long(), weight, weight.sum(), len(tokens))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in m.parameters())])
    for usual, replaced in zip(*found):
        assert torch.allclose(usual, replaced, atol=1e-5)


@pytest.mark.parametrize("has_grouped_product", [True, False])
def test_fp8_of_all_products_but_head_and_router(monkeypatch, has_grouped_product):
    """The weights that go through the product are all matrices but those of embedding, head and
    router, on any device. Of stacks of experts each matrix comes alone."""
    monkeypatch.setattr(moe.kernels, "has_grouped_product", lambda x: has_grouped_product)
    seen, model = set(), make().train()

    def product(x, w):
        seen.add(w.data_ptr())
        return x @ w.T

    tokens, real, weight = make_batch()
    fp8._replace_products(model, product)
    moe.supervised_loss(model, tokens, real.long(), weight, weight.sum(), len(tokens))
    expected = set()
    for name, p in model.named_parameters():
        if p.dim() > 1 and not name.startswith(("embed.", "head.")) and "router" not in name:
            expected |= {x.data_ptr() for x in (p if p.dim() == 3 else [p])}
    assert seen == expected


def test_fp8_measured_product_is_exact_and_finds_errors():
    """It gives the gradients of x w^T. Powers of 2 have no error; random numbers have those of the
    slow rounding."""
    generator = torch.Generator().manual_seed(2)
    for exact in (True, False):
        x, w, dy = (torch.randn(shape, generator=generator) for shape in
                    ((12, 20), (8, 20), (12, 8)))
        if exact:
            x, w, dy = (7 * 2.0 ** v.round().clamp(-2, 2) for v in (x, w, dy))
        x.requires_grad_(), w.requires_grad_()
        found = []
        dx, dw = torch.autograd.grad(fp8.Measured.apply(x, w, found), (x, w), dy)
        assert torch.allclose(dx, dy @ w) and torch.allclose(dw, dy.T @ x)
        assert len(found) == 18
        errors = {(rule, product): error for rule, product, error in found}
        x, w = x.detach(), w.detach()
        if exact:
            assert max(errors.values()) < 1e-6
            continue
        y = x.double() @ w.double().T
        for rule, x8, w8 in (("tensor", slow_round(x, 12, 20), slow_round(w, 8, 20)),
                             ("tile", slow_round(x, 1, 128), slow_round(w, 128, 128))):
            expected = float((x8 @ w8.T - y).norm() / y.norm())
            assert errors[rule, "y"] == pytest.approx(expected, rel=1e-3)
            of_rows = [float(row.norm() / exact_row.norm())
                       for row, exact_row in zip(x8 @ w8.T - y, y)]
            assert errors[rule, "y.rows"] == pytest.approx(sum(of_rows) / 12, rel=1e-3)
        x_again = slow_round(slow_round(x, 1, 128).T, 1, 128).T
        dw = dy.double().T @ x.double()
        expected = slow_round(dy.T, 1, 128) @ x_again - dw
        assert errors["tile", "dw"] == pytest.approx(float(expected.norm() / dw.norm()), rel=1e-3)
        assert 1e-4 < errors["bfloat16", "y"] < 4e-3 < errors["tile", "y"] < 0.1


def test_fp8_few_bits_round_the_linear_layers_alone(monkeypatch):
    """The tested weights: 15 values at most in 16 weights of a row in 4 bits; embedding, head and
    router as they were. The model itself is not changed."""
    torch.manual_seed(0)
    model, tested = moe.Transformer(MICRO), []
    before = {name: x.clone() for name, x in model.state_dict().items()}
    monkeypatch.setattr(fp8, "_test", lambda m, run: tested.append(m) or {"pass@1": 0.5})
    assert set(fp8._test_low_bits(model, None)) == {"zero.pass@1", "fp8.pass@1", "pass@1"}
    usual, in_fp8, in_four_bits = (dict(m.named_parameters()) for m in tested)
    for name, p in usual.items():
        assert torch.equal(p, before[name])
        if p.dim() < 2 or name.startswith(("embed.", "head.")) or "router" in name:
            assert torch.equal(in_fp8[name], p) and torch.equal(in_four_bits[name], p)
            continue
        assert torch.equal(in_fp8[name], fp8._round_e4m3(p, 16, 16))
        assert torch.equal(in_four_bits[name], fp8._round_four_bits(p, 16))
        assert not torch.equal(in_four_bits[name], p)


def test_fp8_models_are_tested_in_float32(monkeypatch):
    """Whatever a base was trained with, its test has the usual layers, and float32 products if no
    others are asked for."""
    tested = []
    monkeypatch.setattr(fp8, "test_numbers", lambda m, run: tested.append(m) or {"pass@1": 0.5})
    model = make()
    model.compute_dtype = torch.bfloat16
    fp8._replace_products(model, lambda x, w: x @ w.T)
    assert fp8._test(model, None) == fp8._test(model, None, torch.bfloat16) == 0.5
    assert [m.compute_dtype for m in tested] == [torch.float32, torch.bfloat16]
    assert model.compute_dtype == torch.bfloat16
    assert {type(m) for m in tested[0].modules()} == {type(m) for m in make().modules()}


def test_fp8_arms():
    """The control has smaller passes; no other setting of an arm differs."""
    runs = [resolve_settings("nano", settings.split()) for settings in fp8.ARMS.values()]
    assert [r.base.micro_tokens for r in runs] == [2048, 2048, 1024, 2048, 2048, 2048]
    for r in runs:
        assert replace(r, base=replace(r.base, micro_tokens=2048)) == runs[0]


def test_fp8_runs(monkeypatch, tmp_path):
    """A tiny run of all arms: the issue's keys, the differences, and lines for the page."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = moe.Transformer(MICRO)
    monkeypatch.setattr(fp8, "load_kept", lambda *_: model)
    monkeypatch.setattr(fp8, "SETTINGS", (*fp8.SETTINGS, *FEW))
    monkeypatch.setattr(fp8, "SIZES", {"micro": {}, "nano": {"n_layers": 2}})
    monkeypatch.setattr(fp8, "SHORT", r1mini.Train(steps=2, documents=4))
    study.main(SimpleNamespace(name="fp8", preset="micro", rest=["--seeds", "0"]), fp8)
    summary = json.loads((tmp_path / "results/fp8-micro/summary.json").read_text("utf-8"))
    metrics = {key: x["mean"] for key, x in summary["metrics"].items()}
    assert 0.005 < metrics["fp8.error.tile"] < 0.1
    assert 0.005 < metrics["fp8.error.tensor"] < 0.1
    assert metrics["fp8.error.bfloat16"] < 0.005
    for arm, most in (("passes", 1e-4), ("bfloat16", 0.1), ("fp8", 0.1)):
        difference = metrics[f"{arm}.minus_float32.loss"]
        assert difference == pytest.approx(metrics[f"{arm}.loss"] - metrics["float32.loss"])
        assert abs(difference) < most
    assert len({metrics[f"{arm}.loss"] for arm in ("float32", "bfloat16", "fp8")}) == 3
    assert metrics["fp8.relative"] == pytest.approx(
        metrics["fp8.loss"] / metrics["float32.loss"] - 1)
