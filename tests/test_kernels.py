"""The tests of engine/kernels.py: each workaround gives the numbers of the plain form."""
import pytest
import torch
import torch.nn.functional as F

import grpo
import moe
from engine import devices, kernels, sampling
from tests.helpers import PROMPTS, TINY, make, make_batch


def test_kernels_in_bfloat16_are_near_float32():
    """Loss and log-probabilities in bfloat16 are near those in float32, and the samples are valid
    tokens."""
    model, (tokens, real, weight) = make(n_expert_groups=1, n_limited_groups=1), make_batch()

    def losses():
        loss = moe.supervised_loss(model, tokens, real.long(), weight, 31.0, 6)[0]
        return torch.stack([loss, -grpo.logprobs(model, tokens, weight > 0, real)[0].mean()])

    exact = losses()
    model = devices.place_model(model, "cpu", torch.bfloat16)
    torch.testing.assert_close(losses(), exact, rtol=0.05, atol=0.05)
    losses()[0].backward()
    samples = sampling.generate(model, PROMPTS, 5, -1, 0)
    assert samples.logprobs[samples.answer].isfinite().all() and samples.tokens.max() < 24


@torch.no_grad()
def test_attention_in_bfloat16_equals_the_float32_kernel():
    """The attention that is written out for bfloat16 on a CPU equals the float32 kernel up to
    rounding, and never reads the future."""
    mla, (B, T) = make().layers[0].attn, (3, 11)
    shapes = (B, T, mla.heads, mla.nope_dim), (B, T, mla.heads, mla.rope_dim), (B, T, mla.rank), (
        B, T, 1, mla.rope_dim)
    inputs = [torch.randn(shape).bfloat16() for shape in shapes]
    exact = mla.attend(*(x.float() for x in inputs))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = mla.attend(*inputs)
        for x in inputs:
            x[:, -1] = 9.0
        torch.testing.assert_close(mla.attend(*inputs)[:, :-1], rounded[:, :-1], atol=0, rtol=0)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.01, rtol=0.02)


@torch.no_grad()
def test_fused_attention_equals_two_visible_sums(monkeypatch):
    """The fused kernel of the training form equals the written-out form in float32: the scores of
    content and position, added up (V3 eq 10)."""
    mla, (B, T) = make().layers[0].attn, (3, 11)
    inputs = (torch.randn(B, T, mla.heads, mla.nope_dim),
              torch.randn(B, T, mla.heads, mla.rope_dim),
              torch.randn(B, T, mla.rank), torch.randn(B, T, 1, mla.rope_dim))
    fused = mla.attend(*inputs)
    monkeypatch.setattr(kernels, "fused_attention_is_slow", lambda q: True)
    torch.testing.assert_close(mla.attend(*inputs), fused)


@torch.no_grad()
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attend_to_one_key_head_fused_equals_products(monkeypatch, dtype, near):
    """The fused form, which CUDA takes, gives the logits of the plain products, for left-padded
    prompts and for the tokens after them."""
    model, outs = make().eval(), []
    model.compute_dtype = dtype
    for form in (kernels.attend_to_one_key_head, kernels.attend_to_one_key_head_fused):
        monkeypatch.setattr(kernels, "attend_to_one_key_head", form)
        (left, real), cache = sampling.pad_left(PROMPTS, 0, "cpu"), moe.make_cache(model, 6, 12)
        of_prompts = model(left, real, cache).logits[real]
        of_next = [model(left[:, :1], cache=cache).logits[:, 0] for _ in range(2)]
        outs.append(torch.cat((of_prompts, *of_next)))
    torch.testing.assert_close(*outs, atol=near, rtol=near)


def test_sort_by_expert_pads_rows_and_changes_no_result(monkeypatch):
    """In bfloat16 each expert's rows are filled up to a multiple of 64, and outputs and gradients
    stay those of float32 up to rounding."""
    experts, product, ends = make().layers[1].ffn.experts, F.grouped_mm, []
    monkeypatch.setattr(F, "grouped_mm", lambda a, b, offs: (
        ends.append(offs.tolist()), product(a, b, offs=offs))[1])
    expert = torch.arange(8).repeat_interleave(torch.tensor([3, 0, 64, 1, 70, 2, 0, 4]))
    chosen = expert[torch.randperm(144)].view(36, 4)
    x, direction = torch.randn(36, TINY.dim, requires_grad=True), torch.randn(36, TINY.dim)
    gates = torch.rand(36, 4, requires_grad=True)
    results = []
    for low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            y = experts(x, gates, chosen)
        results.append([y, *torch.autograd.grad((y * direction).sum(), (
            x, gates, experts.w13, experts.w2))])
    assert ends == 2 * [[3, 3, 67, 68, 138, 140, 140, 144]] + 2 * [
        [64, 64, 128, 192, 320, 384, 384, 448]]
    for exact, near in zip(*results):
        assert (near - exact).norm() < 0.02 * exact.norm()


def test_cross_entropy_sum_in_parts_has_the_gradient_of_smaller_passes():
    """One pass of 60 rows, whose logits are computed in parts, has the gradient of three passes of
    20 rows."""
    model, tokens = make(balance_alpha=0.0).train(), torch.randint(24, (60, 24))  # 1,380 targets
    document, weight = torch.ones_like(tokens), torch.rand(60, 24)

    def gradient(size):
        model.zero_grad()
        for rows in torch.arange(60).split(size):
            loss, _ = moe.supervised_loss(
                model, tokens[rows], document[rows], weight[rows], 100.0, 60)
            loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    at_once = gradient(60)
    assert at_once.abs().max() > 0.01 and (at_once - gradient(20)).abs().max() < 1e-5
