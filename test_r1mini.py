"""The tests of the four lesson files, in the order moe.py, grpo.py, tasks.py, r1mini.py.

Each test states one property and compares with an oracle that is not r1mini: torch's own operators,
a slow obvious loop, finite differences, or an example worked by hand. `pytest -m lesson` runs them.
TRL's losses are compared in tests/test_peers.py, transformers' DeepSeek-V3 in tests/test_export.py,
whole runs in tests/test_runs.py.
"""
import copy
import dataclasses
import math
import os
import pathlib
import random
import re
from collections import Counter, defaultdict
from functools import cache
from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo
import moe
import r1mini
import tasks
from engine import folder, jsonl, optim, sampling
from engine.errors import UserError
from engine.phrases import PHRASES, TOPICS
from engine.tokenizer import split_words
from tasks import ENCODING, END_ID, RANKS, STYLES, WORDS, Corpus, Problem
from tests.helpers import (
    JUDGE,
    MICRO,
    PROMPTS,
    STAGES,
    TAGS,
    TINY,
    general_questions,
    lightly,
    make,
    make_batch,
    make_judge,
    nano_run,
    problems,
)

pytestmark = pytest.mark.lesson


# -------------------------------------------------------------------------------------------------
# moe.py


def test_v3_has_the_published_size():
    """The V3 preset without MTP has 671B parameters, of which a token uses 37B: 8 of each layer's
    256 experts (V3 report, abstract)."""
    with torch.device("meta"):
        model = moe.Transformer(dataclasses.replace(moe.V3, n_mtp_layers=0))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    idle = sum(size for name, size in sizes.items() if ".experts." in name) * 248 // 256
    total = sum(sizes.values())
    assert (total, total - idle) == (671026404352, 37552282624)


@pytest.mark.parametrize("chunks", [[8, 1, 1, 1, 1], [3, 5, 4]])
@torch.no_grad()
def test_cache_gives_the_uncached_logits(chunks):
    """Left-padded prompts that share a cache, read in chunks and continued token by token, have the
    logits of uncached passes over each row alone."""
    model = make()
    rows = [p + [7, 11, 13, 2] for p in PROMPTS]
    padding = torch.tensor([12 - len(row) for row in rows])
    left, real = sampling.pad_left(rows, 0, "cpu")
    cache = moe.make_cache(model, 6, 12)
    assert cache.latent.shape == (3, 6, 12, 12 + 4)  # layers, B, S, latent and rotary key
    logits = torch.cat([model(part, mask, cache).logits for part, mask in zip(
        left.split(chunks, 1), real.split(chunks, 1))], 1)
    for row, begin, got in zip(rows, padding, logits):
        want = model(torch.tensor([row])).logits[0]
        torch.testing.assert_close(got[begin:], want, atol=1e-4, rtol=0)


@torch.no_grad()
def test_cache_ignores_columns_that_are_not_real():
    """Columns that are marked as not real in the middle of a cache change no later logits (a
    rejected draft leaves such a column)."""
    model = make()
    cache = moe.make_cache(model, 2, 9)
    model(torch.tensor([[3, 4, 5, 1], [6, 7, 1, 1]]), cache=cache)
    cache.real[:, :4] = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    got = model(torch.tensor([[8, 9], [8, 9]]), cache=cache).logits
    for row, want in zip(got, ([3, 4, 5, 8, 9], [6, 7, 8, 9])):
        torch.testing.assert_close(row, model(torch.tensor([want])).logits[0, -2:], atol=1e-4,
                                   rtol=0)


@torch.no_grad()
def test_cache_keep_rows_continues_each_row_as_if_alone():
    """Rows that keep_rows() drops and repeats have the logits of uncached passes, and columns that
    are not filled yet are never read."""
    model, rows, (left, real) = make(), [4, 0, 0, 3], sampling.pad_left(PROMPTS, 0, "cpu")
    cache = moe.make_cache(model, 6, left.size(1) + 2)
    model(left, real, cache)
    cache = cache.keep_rows(torch.tensor(rows))
    cache.latent[:, :, cache.length:] = math.nan
    for step in range(2):
        got = model(torch.tensor([[3], [5], [7], [9]]), None, cache).logits[:, -1]
    for i, row in enumerate(rows):
        tokens = PROMPTS[row] + [3 + 2 * i] * 2
        want = model(torch.tensor([tokens])).logits[0, -1]
        torch.testing.assert_close(got[i], want, atol=1e-4, rtol=0)


@torch.no_grad()
def test_make_cache_stores_the_dtype_of_products():
    """In bfloat16 the cache is bfloat16 as well, and the logits equal those of a float32 cache,
    since products round to bfloat16 anyway."""
    model, outs = make().eval(), []
    model.compute_dtype = torch.bfloat16
    for dtype in (torch.bfloat16, torch.float32):
        (left, real), cache = sampling.pad_left(PROMPTS, 0, "cpu"), moe.make_cache(model, 6, 12)
        assert cache.latent.dtype == torch.bfloat16
        cache.latent = cache.latent.to(dtype)
        model(left, real, cache)
        outs.append(model(left[:, :1], cache=cache).logits)
    assert torch.equal(*outs)


def test_mla_absorbed_form_equals_the_training_form():
    """Attention over the cached latents equals attention over every head's own keys and values (V2
    section 2.1.2)."""
    mla, (B, T) = make().layers[0].attn, (3, 11)
    q = torch.randn(B, T, mla.heads, mla.nope_dim)
    q_rope = torch.randn(B, T, mla.heads, mla.rope_dim)
    latent, k_rope = torch.randn(B, T, mla.rank), torch.randn(B, T, 1, mla.rope_dim)
    causal = torch.full((1, 1, T, T), -math.inf).triu(1)
    absorbed = mla.attend_absorbed(q, q_rope, torch.cat((latent, k_rope.squeeze(2)), -1), causal)
    torch.testing.assert_close(absorbed, mla.attend(q, q_rope, latent, k_rope))


@pytest.mark.parametrize("chunks, absorbed", [
    ([150, 1, 1, 1], [1, 1, 1]), ([8, 142, 1, 1, 1], [8, 142, 1, 1, 1])])
@torch.no_grad()
def test_mla_reads_long_prompts_in_the_training_form(monkeypatch, chunks, absorbed):
    """A prompt of more than 128 tokens that is read at once takes the training form, whose scores
    fill no memory, and all logits equal those of uncached passes."""
    model, attend, lengths = make(max_seq_len=160), moe.MLA.attend_absorbed, []
    monkeypatch.setattr(moe.MLA, "attend_absorbed", lambda self, q, *rest: (
        lengths.append(q.size(1)), attend(self, q, *rest))[1])
    rows = [torch.randint(1, 24, (n,)).tolist() for n in (153, 83, 132)]
    (left, real), cache = sampling.pad_left(rows, 0, "cpu"), moe.make_cache(model, 3, 153)
    logits = torch.cat([model(part, mask, cache).logits for part, mask in zip(
        left.split(chunks, 1), real.split(chunks, 1))], 1)
    assert lengths == [T for T in absorbed for _ in model.layers]
    for row, got in zip(rows, logits):
        want = model(torch.tensor([row])).logits[0]
        torch.testing.assert_close(got[-len(row):], want, atol=1e-4, rtol=0)


def test_router_bias_picks_and_never_gates():
    """The bias changes which experts are chosen, and the gates are the chosen experts' unbiased
    scores, normalised (V3 eq 13-16)."""
    router, x = make(n_expert_groups=1).layers[1].ffn.router, torch.randn(50, TINY.dim)
    router.bias.zero_()
    before = router(x)[2]
    router.bias[3] = 1.0
    _, gates, chosen = router(x)
    raw = torch.sigmoid(x @ router.weight.T).gather(-1, chosen)
    assert chosen.eq(3).any(-1).all() and not before.eq(3).any(-1).all()
    torch.testing.assert_close(gates, 2.5 * raw / raw.sum(-1, keepdim=True))


@pytest.mark.parametrize("shift", [0.0, -5.0])
def test_router_keeps_to_the_best_groups(shift):
    """The choice equals a slow loop over groups, also where every biased score is negative (V3
    section 2.1.2)."""
    router, x = make().layers[1].ffn.router, torch.randn(60, TINY.dim)
    router.bias += shift
    chosen = router(x)[2]
    biased = (torch.sigmoid(x @ router.weight.T) + router.bias).tolist()
    for row, got in zip(biased, chosen.tolist()):
        group_score = {g: sum(sorted(row[2 * g:2 * g + 2])[-2:]) for g in range(4)}  # 4 groups of 2
        best = sorted(group_score, key=group_score.get)[-2:]
        allowed = sorted((e for e in range(8) if e // 2 in best), key=row.__getitem__)
        assert set(got) == set(allowed[-4:])


@pytest.mark.parametrize("form", ["grouped", "loop"])
def test_experts_equal_a_loop_over_tokens(form):
    """The grouped product of sorted tokens and the loop over experts (V3 eq 12) both equal a loop
    over tokens and their experts, and an idle expert has a zero gradient."""
    experts, idle = make().layers[1].ffn.experts, 5
    forward = {"grouped": experts.forward_grouped, "loop": experts.forward_loop}[form]
    x = torch.randn(13, TINY.dim, requires_grad=True)
    gates = torch.rand(13, 4, requires_grad=True)
    busy = torch.tensor([e for e in range(8) if e != idle])
    chosen = torch.stack([busy[torch.randperm(7)[:4]] for _ in range(13)])
    inputs, direction = (x, gates, experts.w13, experts.w2), torch.randn(13, TINY.dim)
    fast, slow = forward(x, gates, chosen), []
    for n in range(13):
        out = 0
        for k in range(4):
            gate, up = (experts.w13[chosen[n, k]] @ x[n]).chunk(2)
            out = out + gates[n, k] * (experts.w2[chosen[n, k]] @ (gate * gate.sigmoid() * up))
        slow.append(out)
    torch.testing.assert_close(fast, torch.stack(slow))
    got = torch.autograd.grad((fast * direction).sum(), inputs)
    want = torch.autograd.grad((torch.stack(slow) * direction).sum(), inputs)
    torch.testing.assert_close(got, want)
    assert got[2][idle].eq(0).all() and got[3][idle].eq(0).all()


def test_moe_counts_the_load_of_real_training_tokens():
    """The expert load counts the experts chosen for real tokens in training, and an evaluation
    counts nothing."""
    model, (tokens, real, _) = make(n_layers=2), make_batch()
    layer, chosen = model.layers[1].ffn, []
    layer.router.register_forward_hook(lambda module, inputs, out: chosen.append(out[2]))
    model(tokens, real)
    assert layer.router.load.sum() == 0
    model.train()(tokens, real)
    want = chosen[1][real.flatten()].flatten().bincount(minlength=8)
    assert layer.router.load.tolist() == want.tolist() and want.sum() == 4 * real.sum()


def test_moe_balance_loss_equals_a_loop():
    """The balance loss equals V3 eq 17-20 written out sequence by sequence over the real tokens."""
    layer, (_, real, _) = make().train().layers[1].ffn, make_batch()
    x = torch.randn(*real.shape, TINY.dim)
    want = 0.0
    for row, length in zip(x, real.sum(1)):
        s = torch.sigmoid(row[:length] @ layer.router.weight.T).tolist()
        for i in range(8):
            f = sum(t[i] >= sorted(t)[-4] for t in s) * 8 / (4 * len(s))
            want += 0.1 * f * sum(t[i] / sum(t) for t in s) / len(s)
    assert layer(x, real)[1].item() == pytest.approx(want, rel=1e-5)


def test_moe_balance_loss_is_alpha_in_perfect_balance():
    """A sequence whose experts have equal loads and equal total scores costs alpha (V3 eq 17)."""
    layer = make().layers[1].ffn
    scores = torch.tensor([[0.9] * 4 + [0.1] * 4, [0.1] * 4 + [0.9] * 4]).repeat(3, 5, 1)
    loss = layer.balance_loss(scores, torch.ones(3, 10, dtype=torch.bool))
    assert loss.item() == pytest.approx(3 * 0.1)


@torch.no_grad()
def test_mtp_aligns_hidden_states_with_the_next_tokens():
    """Position i of the second logits reads the hidden states 0..i and the tokens 1..i+1 and
    nothing else (V3 section 2.2)."""
    model, tokens = make(), torch.randint(24, (1, 8))
    hidden = model(tokens).hidden

    def changed(tokens_, hidden_):
        everywhere, real = torch.ones(1, 7).bool(), torch.ones(1, 8).bool()
        logits = [model.predict_after_next(t, real, h, everywhere).logits
                  for t, h in ((tokens, hidden), (tokens_, hidden_))]
        return ((logits[1] - logits[0]).abs().amax(-1) > 1e-6).tolist()

    for j in range(8):
        other, moved = tokens.clone(), hidden.clone()
        other[0, j], moved[0, j] = (other[0, j] + 1) % 24, -hidden[0, j]
        assert changed(tokens, moved) == [j <= i for i in range(7)]
        assert changed(other, hidden) == [1 <= j <= i + 1 for i in range(7)]
        assert changed(other, model(other).hidden) == [j <= i + 1 for i in range(7)]


def test_supervised_loss_equals_a_loop():
    """The loss is the cross entropy of token i+1, mtp_weight times that of token i+2, and the
    balance loss, summed token by token (V3 eq 17, 24-25)."""
    model, (tokens, real, weight) = make().train(), make_batch()
    weight = weight * (1 + torch.arange(9) % 3)
    got, info = moe.supervised_loss(model, tokens, real, weight, 31.0, 6)
    nll = mtp = balance = 0.0
    for row, w, length in zip(tokens, weight, real.sum(1).tolist()):
        row = row[None, :length]
        everywhere = torch.ones(1, length - 1, dtype=torch.bool)
        first = model(row)
        second = model.predict_after_next(row, torch.ones_like(row), first.hidden, everywhere)
        for i in range(length - 1):
            nll -= w[i + 1] * first.logits[0, i].log_softmax(-1)[row[0, i + 1]]
        for i in range(length - 2):
            mtp -= w[i + 2] * second.logits[i].log_softmax(-1)[row[0, i + 2]]
        balance += (first.balance_loss + second.balance_loss) / 6
    torch.testing.assert_close(got, (nll + 0.3 * mtp) / 31 + balance)
    torch.testing.assert_close(info["loss"], nll / 31)


def test_supervised_loss_of_a_row_of_one_token_is_zero():
    """A row with nothing to predict adds nothing to the loss, and no NaN."""
    model, (tokens, real, weight) = make(balance_alpha=0.0).train(), make_batch()
    want = moe.supervised_loss(model, tokens, real, weight, 31.0, 6)[0]
    tokens, real, weight = (F.pad(x, (0, 0, 0, 2)) for x in (tokens, real, weight))
    real[-1, 0] = True  # two more rows: one is all padding, one has a single token
    got = moe.supervised_loss(model, tokens, real, weight, 31.0, 6)[0]
    torch.testing.assert_close(got, want)


def test_supervised_loss_of_packed_rows():
    """Six documents in two rows have the loss and the gradient of six rows: no document sees
    another, and none predicts another's tokens."""
    model, (tokens, real, weight) = make(balance_alpha=0.0).train(), make_batch()
    weight[:, :2] = 0  # as documents begin

    def packed(x, rows):
        return torch.cat([x[i][real[i]] for i in rows])

    def pair(x, *parts):
        return torch.nn.utils.rnn.pad_sequence([packed(x, rows) for rows in parts], True)

    number = torch.arange(1, 7)[:, None].expand_as(tokens)
    rows = (0, 4, 2), (5, 1, 3)
    total = weight.sum()
    want = moe.supervised_loss(model, tokens, real, weight, total, 6)[0]
    want_gradient = torch.autograd.grad(want, list(model.parameters()))
    got = moe.supervised_loss(model, pair(tokens, *rows), pair(number, *rows),
                              pair(weight, *rows), total, 2)[0]
    got_gradient = torch.autograd.grad(got, list(model.parameters()))
    torch.testing.assert_close(got, want)
    for x, y in zip(got_gradient, want_gradient):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_supervised_loss_gradient_does_not_depend_on_micro_batches(alpha):
    """Six rows at once have the gradient of two rows and four rows with more padding."""
    model, (tokens, real, weight) = make(balance_alpha=alpha).train(), make_batch()

    def gradient(*parts):
        model.zero_grad()
        for rows, more in parts:
            batch = [F.pad(x[rows], (0, more)) for x in (tokens, real, weight)]
            loss, _ = moe.supervised_loss(model, *batch, weight.sum(), 6)
            loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    at_once = gradient((slice(0, 6), 0))
    cut = gradient((slice(0, 2), 1), (slice(2, 6), 4))
    assert at_once.abs().max() > 0.01 and (at_once - cut).abs().max() < 1e-5


def test_supervised_loss_gradient_equals_finite_differences(monkeypatch):
    """In float64 the gradient along random directions, through dense, MoE and MTP layers and all
    losses, equals finite differences. (Experts then run in the loop, as in eq 12.)"""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model, (tokens, real, weight) = make().double().train(), make_batch()
    parameters = list(model.parameters())

    def loss():
        return moe.supervised_loss(model, tokens, real, weight, weight.sum(), 6)[0]

    gradient = torch.autograd.grad(loss(), parameters)
    for p, g in zip(parameters, gradient):
        direction, start, eps = torch.randn_like(p), p.detach().clone(), 1e-5
        with torch.no_grad():
            up = (p.copy_(start + eps * direction), loss())[1]
            down = (p.copy_(start - eps * direction), loss())[1]
            p.copy_(start)
        slope = float((g * direction).sum())
        assert float((up - down) / (2 * eps)) == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_update_routing_bias_moves_each_bias_by_gamma_once():
    """The bias of a busy expert falls by gamma, that of an idle one rises, that of an average one
    stays, and without a load nothing moves (V3 section 2.1.2)."""
    model = make(n_layers=2, n_mtp_layers=0)
    router = model.layers[1].ffn.router
    before = router.bias.clone()
    router.load.copy_(torch.tensor([9.0, 0, 3, 3, 1, 4, 1, 3]))
    assert moe.update_routing_bias(model) == [[3, 0, 1, 1, 0.333, 1.333, 0.333, 1]]
    assert moe.update_routing_bias(model) == []
    want = before + 1e-3 * torch.tensor([-1.0, 1, 0, 0, 1, -1, 1, 0])
    torch.testing.assert_close(router.bias, want, atol=1e-7, rtol=0)


@torch.no_grad()
def test_update_routing_bias_evens_out_a_skewed_load():
    """Training passes with update_routing_bias() alone bring the largest load over the mean from
    above 2 to below 1.3."""
    layer = make(1, n_activated_experts=2, n_expert_groups=1, bias_speed=0.01).layers[1].ffn.train()
    skew, real, highest = 2 * torch.randn(TINY.dim), torch.ones(8, 256, dtype=torch.bool), []
    for _ in range(80):
        layer(skew + torch.randn(8, 256, TINY.dim), real)
        highest.append(max(moe.update_routing_bias(layer)[0]))
    assert highest[0] > 2 and max(highest[-5:]) < 1.3


# -------------------------------------------------------------------------------------------------
# grpo.py


def make_task(reward, levels=(1, 2)):
    """A Task with one reward on easy problems."""
    return grpo.Task(
        draw=lambda rng, n, step: [tasks.make_problem(rng, rng.choice(levels)) for _ in range(n)],
        encode=lambda p: tasks.encode_prompt(p.question), decode=tasks.decode,
        rewards={"accuracy": (1.0, lambda texts, asked: list(map(reward, texts, asked)))},
        measures={}, end_id=tasks.END_ID, pad_id=tasks.PAD_ID)


def small_rl(**changes):
    """Settings of a loop that takes seconds."""
    return grpo.RL(**{"steps": 1, "problems": 4, "group_size": 4, "minibatches": 1, "warmup": 0,
                      "max_new_tokens": 12} | changes)


@pytest.mark.parametrize("right, high, low", [(1, 3.75, -0.25), (4, 1.6771, -0.5590),
                                              (8, 0.9682, -0.9682)])
def test_advantages_equal_hand_worked_ones(right, high, low):
    """Groups of 16 binary rewards have the advantages worked by hand, with the standard deviation
    over G - 1 (DeepSeekMath section 4.1.2) and without it (Dr. GRPO section 3)."""
    rewards = torch.tensor([[1.0] * right + [0.0] * (16 - right)])
    a = grpo.advantages(rewards)
    assert a[0, 0] == pytest.approx(high, abs=1e-4) and a[0, -1] == pytest.approx(low, abs=1e-4)
    plain = grpo.advantages(rewards, normalize_std=False)
    assert plain[0, 0] == pytest.approx(1 - right / 16)


def test_advantages_of_equal_rewards_are_exactly_zero():
    """Where 0 is divided by 0 the advantage is 0, also where the mean of equal rewards is
    rounded."""
    rewards = torch.tensor([[1.2] * 16, [0.0] * 16, [0.2] * 16])
    assert (rewards[0].mean() != rewards[0, 0]) and not grpo.advantages(rewards).any()


def test_kl_k3_equals_hand_worked_values():
    """k3 equals x - 1 - log x for the ratios 1/2, 2 and 1 of the reference to the policy
    (DeepSeekMath eq 4)."""
    new, reference = torch.tensor([.5, .25, .3]).log(), torch.tensor([.25, .5, .3]).log()
    expected = torch.tensor([0.193147, 0.306853, 0.0])
    assert torch.allclose(grpo.kl_k3(new, reference), expected, atol=1e-6)


def test_overlong_penalty_equals_dapos():
    """With DAPO's limit of 20480 tokens and buffer of 4096 the penalty equals values worked by hand
    (DAPO section 3.4)."""
    lengths = torch.tensor([100, 16384, 17408, 18432, 20480, 30000])
    expected = torch.tensor([0.0, 0.0, -0.25, -0.5, -1.0, -1.0])
    assert torch.allclose(grpo.overlong_penalty(lengths, 20480, 4096), expected)


def test_grpo_clips_as_worked_by_hand():
    """min(rA, clip(r)A) at ratios 0.5, 1 and 1.5, for a right and a wrong answer, has the values
    worked by hand, and no gradient where the clip holds (DeepSeekMath eq 3)."""
    new = torch.tensor([[.5, 1.0, 1.5]] * 2).log().requires_grad_()
    mask, s = torch.ones(2, 3), grpo.RL(clip_low=0.2, clip_high=0.3)
    J, info = grpo.grpo(new, torch.zeros(2, 3), new.detach(), torch.tensor([1.0, -1.0]), mask,
                        grpo.Batch(2, 6), s)
    assert float(J.detach()) == pytest.approx((.5 + 1.0 + 1.3 - .8 - 1.0 - 1.5) / 6)
    assert info["clip"].tolist() == [[False, False, True], [True, False, False]]
    J.backward()
    assert ((new.grad == 0) == info["clip"]).all() and not info["kl"].any()


def test_grpo_kl_penalty_as_worked_by_hand():
    """Where ratio and advantage are 1 and 0, J is minus beta times the mean of k3 over the tokens
    of each answer, then over the answers (DeepSeekMath eq 3 and 4)."""
    new, reference = torch.tensor([[.5, .25]] * 2).log(), torch.tensor([[.25, .5]] * 2).log()
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    J, _ = grpo.grpo(new, new, reference, torch.zeros(2), mask, grpo.Batch(2, 3),
                     grpo.RL(beta=0.1))
    assert float(J) == pytest.approx(
        -0.1 * ((0.193147 + 0.306853) / 2 + 0.193147) / 2, abs=1e-6)


def test_gspo_takes_the_geometric_mean_of_an_answers_ratios():
    """Token ratios of 1.10, 0.95, 1.30 and 0.90 make a ratio of 1.05154 of the answer, and padding
    does not count (GSPO, arXiv 2507.18071)."""
    new = torch.tensor([[1.10, .95, 1.30, .90, 7.0]]).log()
    mask = torch.tensor([[1.0, 1, 1, 1, 0]])
    J, _ = grpo.gspo(new, torch.zeros(1, 5), new, torch.ones(1), mask, grpo.Batch(1, 4),
                     grpo.RL(clip_low=1, clip_high=1))
    assert float(J) == pytest.approx(1.05154, abs=1e-5)


def random_answers():
    """(log-probabilities with a gradient, old ones, rewards, mask) of two groups of three answers.
    """
    torch.manual_seed(0)
    new = (torch.randn(6, 5) * 0.3 - 2).requires_grad_()
    mask = (torch.arange(5) < torch.tensor([5, 1, 3, 4, 2, 5]).unsqueeze(1)).float()
    return new, new.detach() + torch.randn(6, 5) * 0.3, torch.tensor([[1., 0, 1], [0, 0, 1]]), mask


def test_kimi_gradient_is_that_of_the_squared_loss():
    """It is -1/(2 tau) times the gradient of the mean of (r - mean - tau log(pi/pi_i))^2 over
    answers (Kimi k1.5, section 2.3.2)."""
    (new, old, rewards, mask), tau = random_answers(), 0.7
    A = grpo.advantages(rewards, normalize_std=False).flatten()
    J, _ = grpo.kimi(new, old, None, A, mask, grpo.Batch(6, 20), grpo.RL(tau=tau))
    squared = 0.0
    for i in range(6):
        log_ratio = sum(new[i, t] - old[i, t] for t in range(5) if mask[i, t])
        baseline = rewards[i // 3].mean()
        squared += (rewards.flatten()[i] - baseline - tau * log_ratio) ** 2 / 6
    got, want = (torch.autograd.grad(x, new)[0] for x in (J, squared))
    torch.testing.assert_close(got, -want / (2 * tau))


def test_kimi_begins_as_reinforce():
    """At the policy that has drawn the answers, the gradient is that of reward minus the group's
    mean, times the log-probability of the whole answer."""
    new, _, rewards, mask = random_answers()
    A = grpo.advantages(rewards, normalize_std=False).flatten()
    J, info = grpo.kimi(new, new.detach(), None, A, mask, grpo.Batch(6, 20), grpo.RL())
    reinforce = ((rewards - rewards.mean(1, keepdim=True)).flatten() * (new * mask).sum(1)).mean()
    got, want = (torch.autograd.grad(x, new)[0] for x in (J, reinforce))
    torch.testing.assert_close(got, want)
    assert not info["kl"].any() and not info["clip"].any()


def test_length_reward_as_worked_by_hand():
    """Right answers of 100 and 200 tokens, wrong ones of 300 and 500; the same with the shortest
    wrong; and a group of one length (Kimi k1.5, section 2.3.3)."""
    lengths = torch.tensor([[100, 200, 300, 500], [100, 200, 300, 500], [7, 7, 7, 7]])
    right = torch.tensor([[True, True, False, False], [False, True, False, True], [True] * 4])
    want = torch.tensor([[.5, .25, 0, -.5], [0, .25, 0, -.5], [0., 0, 0, 0]])
    assert torch.equal(grpo.length_reward(lengths, right), want)


def test_act_adds_the_length_reward_from_its_step_on():
    """From half of four steps on, a reward has length_weight times the length reward in it; a
    problem without an accuracy gets none."""
    torch.manual_seed(0)
    model = moe.Transformer(MICRO)
    task = make_task(lambda text, problem: float(len(text) % 2))
    s = small_rl(steps=4, length_weight=0.3, length_from=0.5, max_new_tokens=300)
    early, late = (grpo.make_rollout(model, task, s, random.Random(0), step) for step in (1, 2))
    right = early.rewards == 1.0
    lengths = early.samples.answer.sum(1).view_as(early.rewards)
    added = late.rewards - early.rewards
    torch.testing.assert_close(added, 0.3 * grpo.length_reward(lengths, right))
    assert "length" not in early.reward_parts and added.abs().max() > 0.1
    task.rewards["accuracy"] = 1.0, lambda texts, problems: [math.nan] * len(texts)
    assert not grpo.make_rollout(model, task, s, random.Random(0), 2).rewards.any()


def test_act_rewards_are_the_weighted_sum():
    """Each reward sees all texts in order with their own problems, and the rollout's rewards are
    the sum of the rewards times their weights."""
    torch.manual_seed(0)
    calls = []

    def first(texts, asked):
        calls.append((texts, [p.question for p in asked]))
        return range(len(texts))

    task = dataclasses.replace(make_task(None), rewards={
        "a": (2.0, first), "b": (0.5, lambda texts, asked: [len(p.question) for p in asked])})
    rollout = grpo.make_rollout(moe.Transformer(MICRO), task, small_rl(), random.Random(0))
    asked = [p.question for p in rollout.problems for _ in range(4)]
    assert calls == [(rollout.texts, asked)]
    want = [2.0 * i + 0.5 * len(q) for i, q in enumerate(asked)]
    assert rollout.rewards.flatten().tolist() == want


def test_act_mask_covers_the_end_token_and_no_padding():
    """The mask of a rollout covers each answer up to and including its end token, and nothing after
    it."""
    torch.manual_seed(1)
    model, s = moe.Transformer(MICRO), small_rl(max_new_tokens=60, group_size=16)
    with torch.no_grad():
        model.head.weight[tasks.END_ID] *= 40  # so that some answers end
    samples = grpo.make_rollout(model, make_task(tasks.accuracy), s, random.Random(0)).samples
    ended = samples.tokens[samples.finished], samples.answer[samples.finished]
    assert len(ended[0]) > 3 and (ended[0][ended[1]] == tasks.END_ID).sum() == len(ended[0])
    for row, mask in zip(*ended):
        after = row[int(mask.nonzero()[-1]) + 1:]
        assert row[mask][-1] == tasks.END_ID and (after == tasks.PAD_ID).all()


def test_describe_leaves_nan_out_of_the_mean():
    """A reward of nan, which a prompt without a right number has, does not change the logged
    mean."""
    samples = sampling.Samples(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), None,
                               torch.ones(2, dtype=torch.bool))
    rollout = grpo.Rollout([GRASS], samples, ["", ""], {"accuracy": torch.tensor([1.0, math.nan])},
                           torch.ones(1, 2), torch.zeros(1, 2))
    task = grpo.Task(None, None, None, {}, {}, 0, 0)
    assert grpo.describe_rollout(rollout, task)["accuracy"] == 1.0


def test_chosen_rows_are_the_first_live_groups():
    """With oversampling the first P groups whose rewards differ are chosen, and otherwise all rows
    (DAPO eq 11)."""
    rewards = torch.tensor([[1., 1], [0, 1], [0, 0], [1, 0], [1, 1], [0, 1]])
    rollout = SimpleNamespace(problems=list(range(6)), rewards=rewards)
    oversampled = small_rl(problems=2, group_size=2, oversample=3)
    assert grpo.chosen_rows(rollout, oversampled) == [2, 3, 6, 7]
    assert grpo.chosen_rows(rollout, small_rl(problems=6, group_size=2)) == list(range(12))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_logprobs_and_entropy_equal_a_loop(temperature):
    """Log-probabilities and entropies equal those of torch's Categorical row by row, and are zero
    where none is wanted."""
    model, (tokens, real, weight) = make(), make_batch()
    got, entropy = grpo.logprobs(model, tokens, weight > 0, real, temperature)
    for n, i in np.ndindex(*tokens.shape):
        want = (0.0, 0.0)
        if weight[n, i]:
            logits = model(tokens[n:n + 1, :i]).logits[0, -1] / temperature
            policy = torch.distributions.Categorical(logits=logits)
            want = (float(policy.log_prob(tokens[n, i])), float(policy.entropy()))
        assert (float(got[n, i]), float(entropy[n, i])) == pytest.approx(want, abs=1e-5)


def test_improve_gradient_does_not_depend_on_micro_batches(monkeypatch):
    """Micro-batches of one answer have the gradient of one batch of all answers."""
    torch.manual_seed(0)
    model, s = moe.Transformer(MICRO), small_rl(objective="dapo", beta=0.1)
    task = make_task(lambda t, p: float(len(t) % 3))
    rollout = grpo.make_rollout(model, task, s, random.Random(0))
    assert rollout.rewards.shape == (4, 4) and grpo.live_groups(rollout).any()
    gradients = []
    for limit in (1, 10_000):
        twin = copy.deepcopy(model).train()
        monkeypatch.setattr(grpo, "optimizer_update", lambda m, *_, **__: gradients.append(
            {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None})
            or {"grad_norm": 0, "grad_clipped": 0, "expert_load": 0, "loads": [], "skipped": 0})
        grpo.improve(twin, model, [], rollout, dataclasses.replace(s, micro_tokens=limit),
                     random.Random(0), 0)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-6), name


def test_improve_counts_each_minibatch_in_the_denominators(monkeypatch):
    """Two minibatches are cut into single answers, and each call of the objective receives its
    minibatch's true counts."""
    torch.manual_seed(0)
    model, s = moe.Transformer(MICRO), small_rl(minibatches=2, micro_tokens=1)
    task = make_task(lambda text, problem: float(sum(map(ord, text)) % 5))
    rollout = grpo.make_rollout(model, task, s, random.Random(0))
    assert grpo.live_groups(rollout).all()
    calls = []

    def spy(new, old, reference, advantage, mask, batch, s):
        calls.append((batch, int(mask.sum())))
        return grpo.grpo(new, old, reference, advantage, mask, batch, s)

    monkeypatch.setitem(grpo.OBJECTIVES, "grpo", spy)
    grpo.improve(model, model, optim.make_optimizers(model, 0.0), rollout, s, random.Random(0), 0)
    assert len(calls) == 16
    for half in (calls[:8], calls[8:]):
        assert {batch for batch, _ in half} == {grpo.Batch(8, sum(tokens for _, tokens in half))}


@pytest.mark.parametrize("n_live, updates", [(1, 4), (2, 8), (4, 16), (0, 0)])
def test_improve_makes_no_empty_minibatch(n_live, updates):
    """DAPO keeps the live groups of 8 and 4 answers to each. With 16 minibatches, fewer rows make
    fewer updates, each on at least one row. Without live groups nothing moves, not even by the KL
    term or the routing bias."""
    torch.manual_seed(0)
    s = small_rl(minibatches=16, oversample=2, objective="dapo", beta=0.5)
    model, reference = moe.Transformer(MICRO), moe.Transformer(MICRO)
    before = copy.deepcopy(model.state_dict())
    rollout = grpo.make_rollout(model, make_task(lambda t, p: 1.0), s, random.Random(0))
    for group in range(n_live):
        rollout.rewards[group, 0] = 0.0
    rollout = dataclasses.replace(rollout, advantages=grpo.advantages(rollout.rewards))
    optimizers = optim.make_optimizers(model, 1e-3)
    grpo.improve(model, reference, optimizers, rollout, s, random.Random(0), 0)
    steps = [int(state["step"]) for state in optimizers[0].state.values()]
    assert max(steps, default=0) == updates
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) == (updates == 0)


def test_improve_counts_dead_groups_and_does_not_learn_from_them(monkeypatch):
    """A group of equal rewards is left out of the passes and still counts in the denominators."""
    torch.manual_seed(0)
    model, s = moe.Transformer(MICRO), small_rl(micro_tokens=1, objective="dr_grpo")
    task = make_task(lambda text, problem: float(sum(map(ord, text)) % 5))
    rollout = grpo.make_rollout(model, task, s, random.Random(0))
    assert grpo.live_groups(rollout).all()
    rollout.rewards[2] = 1.0
    rollout.advantages[2] = 0.0
    calls = []

    def spy(new, old, reference, advantage, mask, batch, s):
        calls.append((batch.answers, batch.tokens, float(advantage)))
        return grpo.dr_grpo(new, old, reference, advantage, mask, batch, s)

    monkeypatch.setitem(grpo.OBJECTIVES, "dr_grpo", spy)
    record = grpo.improve(model, model, optim.make_optimizers(model, 0.0), rollout, s,
                          random.Random(0), 0)
    assert len(calls) == 12 and {call[:2] for call in calls} == {
        (16, int(rollout.samples.answer.sum()))}
    answer = rollout.samples.answer
    assert record["learnt_tokens"] == sum(  # prompts are read as well
        len(tasks.encode_prompt(rollout.problems[row // 4].question)) + int(answer[row].sum())
        for row in range(16) if row // 4 != 2)
    taught = rollout.advantages[[0, 1, 3]].flatten().tolist()
    assert sorted(call[2] for call in calls) == pytest.approx(sorted(taught))


def test_train_rl_dead_groups_move_no_weight():
    """With equal rewards and no KL penalty a step changes no weight at all."""
    torch.manual_seed(0)
    model = moe.Transformer(MICRO)
    before = copy.deepcopy(model.state_dict())
    [(record, _)] = grpo.train_rl(model, make_task(lambda t, p: 1.2), small_rl(beta=0.0))
    assert record["dead_groups"] == 1.0
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("objective", list(grpo.OBJECTIVES))
def test_train_rl_learns_a_bandit_with_every_objective(objective):
    """Rewarding two digits makes them frequent, and the sampler agrees with the trainer to 1e-4."""
    torch.manual_seed(0)
    model = moe.Transformer(MICRO)
    with torch.no_grad():
        model.head.weight *= 0
    s = small_rl(steps=20, problems=8, group_size=16, max_new_tokens=4, lr=1e-2,
                 **grpo.SETTINGS[objective] | {"objective": objective, "overlong": 0})
    task = make_task(lambda text, problem: text.count("7") + text.count("5"))
    records = [record for record, _ in grpo.train_rl(model, task, s)]
    assert records[-1]["accuracy"] > 10 * max(records[0]["accuracy"], 0.02)
    assert max(r["gap_p999"] for r in records) < 1e-4


def test_train_rl_refreshes_the_reference_on_time():
    """After reference_every steps the reference is the policy, and before that it is the first
    policy."""
    torch.manual_seed(0)
    model = moe.Transformer(MICRO)
    first = copy.deepcopy(model.state_dict())
    task = make_task(lambda text, problem: float(len(text) % 2))
    s = small_rl(steps=2, reference_every=2, beta=0.01)
    steps = grpo.train_rl(model, task, s)
    states = [copy.deepcopy(snapshot()["reference"]) for _, snapshot in steps]
    assert all(torch.equal(first[n], p) for n, p in states[0].items())
    assert all(torch.equal(model.state_dict()[n], p) for n, p in states[1].items())
    assert any(not torch.equal(first[n], p) for n, p in states[1].items())


@torch.no_grad()
def test_judge_scores_equal_each_rows_own_score():
    """Rows of any lengths that are scored together have the last outputs of passes over each row
    alone."""
    model, rng = make_judge(0), random.Random(0)
    rows = [[rng.randrange(tasks.VOCAB_SIZE) for _ in range(n)] for n in (9, 1, 30, 2, 17, 30)]
    want = [float(model(torch.tensor([row])).logits[0, -1, 0]) for row in rows]
    got = grpo.judge_scores(model, rows, tasks.PAD_ID)
    assert got.tolist() == pytest.approx(want, abs=1e-5) and got.std() > 0.01


def test_reward_losses_equal_hand_worked_ones():
    """The losses of two pairs and of three labelled scores equal -log sigmoid and the cross
    entropies worked by hand (R1 v2 section 3.1)."""
    pairs = grpo.preference_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
    assert float(pairs) == pytest.approx(0.313262 + 2.126928, abs=1e-5)
    points = grpo.safety_loss(torch.tensor([0.0, 2.0, -1.0]), torch.tensor([1.0, 0.0, 1.0]))
    assert float(points) == pytest.approx(0.693147 + 2.126928 + 1.313262, abs=1e-5)


# -------------------------------------------------------------------------------------------------
# tasks.py


def test_example_of_the_docstring_is_what_the_code_makes():
    """The question and answer at the top of tasks.py earn all rewards and are what work() writes
    without a slip; with a slip it writes what the docstring says."""
    question, text = [line.strip() for line in tasks.__doc__.split("\n")[4:6]]
    problem = Problem(question, "27", "en", 2, question.split()[1])
    assert tasks.accuracy(text, problem) == tasks.format_reward(text) == 1.0
    assert tasks.reflects(text) and tasks.is_readable(text)
    assert tasks.response(*tasks.write_working(problem, "checked", random.Random(0))) == text
    corrected = tasks.__doc__.split("check shows it: ")[1].split(" ...")[0]
    workings = {tasks.write_working(problem, "checked", random.Random(seed), 0.3)[0]
                for seed in range(400)}
    assert any(working.startswith(corrected) for working in workings)


@cache
def documents():
    """4000 documents of the base corpus, from four seeds, each with its text as (prompt,
    response)."""
    rngs = [random.Random(seed) for seed in range(4)]
    made = [tasks.make_document(rng, Corpus()) for rng in rngs for _ in range(1000)]
    texts = [ENCODING.decode(document.tokens).partition("<|assistant|>") for document in made]
    return [(document, prompt.removeprefix("<|user|>"), response.removesuffix("<|end|>"))
            for document, (prompt, _, response) in zip(made, texts)]


def terms(expression):
    """The signed values of a chain's terms: 25-7+3*4 gives 25, -7, 12."""
    signed = expression.replace("-", "+-").split("+")
    return [math.prod(map(int, term.split("*"))) for term in signed if term]


def is_true(equation):
    """Whether an equation such as 25-7=18 holds."""
    left, right = equation.split("=")
    return sum(terms(left)) == int(right)


def count_words(text, language):
    """How often the words of a language stand in a text."""
    return sum(text.count(word.strip()) for word in WORDS[language].values())


# The tokenizer


def test_vocabulary_holds_every_word_of_general_text():
    """Each token of a general prompt or reply is a word of the vocabulary, so no word falls apart
    into bytes."""
    rng = random.Random(0)
    for _ in range(1500):
        prompt = tasks.make_prompt(rng, rng.choice(("train", "dev", "test")))
        for text in (prompt.question, *tasks.TAG.split(tasks.reply(prompt, rng, tasks.CARELESS))):
            tokens = ENCODING.encode_ordinary(text)
            assert {ENCODING.decode([token]) for token in tokens} <= tasks.VOCABULARY, text


@lightly
@given(st.lists(st.sampled_from(["计", "7", *tasks.SPECIAL]) | st.text(max_size=2)).map("".join))
def test_encode_prompt_makes_no_special_token_of_typed_text(question):
    """A prompt has the two special tokens of its frame and no other, and decodes to what was
    typed."""
    ids = tasks.encode_prompt(question)
    assert [i for i in ids if i >= len(RANKS)] == [ids[0], ids[-1]]
    assert ENCODING.decode(ids) == f"<|user|>{question}<|assistant|>"


def test_encode_response_has_one_token_for_each_tag_and_an_end():
    """Each tag of a response is one token, and the end token closes it."""
    think, end_think, answer, end_answer = map(ENCODING.encode_single_token, TAGS)
    three = ord("3")
    assert (tasks.encode_response("<think>3</think><answer>33</answer>")
            == [think, three, end_think, answer, three, three, end_answer, END_ID])


def test_decode_stops_at_the_first_end_token():
    """What follows the end token is not decoded, and broken UTF-8 does not raise."""
    assert tasks.decode(iter([ord("3"), END_ID, ord("4"), END_ID])) == "3"
    assert tasks.decode([0xE7, ord("3")]) == "\ufffd3"


# Problems, and the split


PINNED = {'10-7+9': 'train', '11-7+9': 'test', '12-7+9': 'dev'}


def test_part_of_is_the_same_in_both_languages_and_every_process():
    """A question and its twin in the other language are in the same part, and three pinned problems
    keep their parts."""
    for english, chinese in zip(problems(80, language="en"), problems(80, language="zh")):
        assert (english.language, chinese.language) == ("en", "zh")
        assert chinese.question == english.question.replace("Compute ", "计算")
    parts = [tasks.part_of_problem(expression) for expression in PINNED]
    assert parts == list(PINNED.values())


def test_part_of_holds_out_an_eighth_for_dev_and_for_test():
    """Each held-out part has 1/8 of all problems, within 3 sigma."""
    count = Counter(tasks.part_of_problem(problem.expression)
                    for problem in problems(6000, part=None))
    assert all(abs(count[part] - 750) < 3 * math.sqrt(750 * 7 / 8) for part in ("dev", "test"))


@pytest.mark.parametrize("part", ["train", "dev", "test"])
def test_make_problem_keeps_to_its_part(part):
    """make_problem returns problems of its part at every level, with and without products."""
    drawn = problems(240, part=part) + problems(240, part=part, products=0.5)
    assert {tasks.part_of_problem(problem.question.lstrip("Compute 计算"))
            for problem in drawn} == {part}


@pytest.mark.parametrize("products", [0.0, 0.5, 1.0])
def test_make_problem_keeps_its_promises(products):
    """The answer equals the sum computed term by term, totals stay within 0..99, the digits all
    differ, and there is one for each level."""
    for problem in problems(800, part=None, products=products):
        totals = list(accumulate(terms(problem.expression)))
        first, *digits = re.findall("[0-9]+", problem.expression)
        assert problem.answer == str(totals[-1]) and 0 <= min(totals) and max(totals) <= 99
        assert len(set(digits)) == len(digits) == problem.level and max(map(len, digits)) == 1
        assert products == 0.5 or ("*" in problem.expression) == (products == 1 < problem.level)


# Worked solutions


def test_slip_exists_for_any_number():
    """There is a wrong number near any total, also below zero, where carried slips may lead."""
    assert all(tasks.slip(random.Random(0), value) != value for value in range(-99, 100))


@pytest.mark.parametrize("style", STYLES)
def test_work_without_slips_is_true(style):
    """In every style each written equation holds, and the working arrives at the answer."""
    for problem in problems(240) + problems(240, products=0.5):
        text, number = tasks.write_working(problem, style, random.Random(1))
        equations = re.findall("[0-9=+*-]+", text)
        assert number == sum(terms(problem.expression)) and all(map(is_true, equations))
        equations_per_step = {"direct": 0, "steps": 1, "checked": 2}[style]
        assert len(equations) == problem.level * equations_per_step


def test_work_direct_slip_is_wrong():
    """A direct answer with a slip is a wrong number that is not negative."""
    for problem in problems(400):
        number = tasks.write_working(problem, "direct", random.Random(1), slips=1)[1]
        assert number != int(problem.answer) and number >= 0


@pytest.mark.parametrize("slips", [0.3, 1.0])
def test_work_checked_corrects_every_slip(slips):
    """Each result is undone by a true equation, and exactly the wrong results are followed by a
    wait and a correction."""
    rng = random.Random(0)
    for problem in problems(160, language="en") + problems(160, language="en", products=0.5):
        text, number = tasks.write_working(problem, "checked", rng, slips)
        wrong = 0
        for step in text.split(" ok "):
            *drafts, last = [attempt.split(" check ") for attempt in step.split(" wait ")]
            wrong += len(drafts)
            assert len(drafts) in ({1} if slips == 1 else {0, 1})
            assert is_true(last[0]) and not any(is_true(draft) for draft, _ in drafts)
            for draft, check in [*drafts, last]:
                a, sign, b, result = re.fullmatch("(.+)([-+*])(.+)=(.+)", draft).groups()
                undone = {"+": f"{result}-{b}", "-": f"{result}+{b}", "*": f"{b}*{a}"}[sign]
                assert check.startswith(undone + "=") and is_true(check)
        assert number == int(problem.answer) and text.count("wait") == wrong
        assert text.count("=") == 2 * (problem.level + wrong)


def test_work_unchecked_slips_are_carried_on():
    """With slips=1 each line of short working is wrong, and the next line goes on from the number
    that was written."""
    for problem in problems(400):
        text, number = tasks.write_working(problem, "steps", random.Random(2), slips=1)
        lines = re.findall("[0-9=+-]+", text)
        left, written = zip(*(line.split("=") for line in lines))
        steps = re.findall("[-+][0-9]", problem.expression)
        assert not any(map(is_true, lines)) and number == int(written[-1])
        assert list(left) == [a + b for a, b in zip([problem.expression[:2], *written], steps)]


@pytest.mark.parametrize("style", ["steps", "checked"])
@pytest.mark.parametrize("language, other", [("en", "zh"), ("zh", "en")])
def test_work_keeps_to_its_language(style, language, other):
    """foreign=0 writes every word in the question's language, and foreign=1 writes every word in
    the other language."""
    for problem in problems(80, language=language):
        for foreign, used, unused in [(0, language, other), (1, other, language)]:
            text = tasks.write_working(problem, style, random.Random(3), 0.2, foreign)[0]
            assert count_words(text, used) >= problem.level - 1 and count_words(text, unused) == 0


SUM_ZH = Problem("计算25-7+9", "27", "zh", 2, "25-7+9")
MIXED = "25-7=17 check 17+7=24等等25-7=18 check 18+7=25正确18+9=27 check 27-9=18"
CLEAN = "25-7=17检查17+7=24等等25-7=18检查18+7=25正确18+9=27检查27-9=18"


def test_rewrite_equals_a_text_worked_by_hand():
    """A response in two languages becomes one in the question's language with the summary, and
    stays right."""
    text = tasks.rewrite_answer(f"<think>{MIXED}</think><answer>27</answer>", SUM_ZH)
    assert text == f"<think>{CLEAN}</think>答案就是<answer>27</answer>"
    english = tasks.rewrite_answer(text, dataclasses.replace(SUM_ZH, language="en"))
    assert english.startswith("<think>25-7=17 check 17+7=24 wait 25-7=18 check 18+7=25 ok 18+9=27")
    assert english.endswith("27-9=18</think>the answer is <answer>27</answer>")


@pytest.mark.parametrize("style", ["steps", "checked"])
def test_rewrite_keeps_the_equations_and_makes_the_text_fit(style):
    """A rewritten working has the same equations, one language, the right answer and the template,
    and passes rejection sampling."""
    rng = random.Random(0)
    for problem in problems(160):
        old = tasks.response(*tasks.write_working(problem, style, rng, foreign=0.5))
        new = tasks.rewrite_answer(old, problem)
        assert tasks.accuracy(new, problem) == tasks.format_reward(new) == 1
        assert set(tasks.word_languages(new)) == {problem.language}
        numbers = [re.findall("[0-9=+*-]+", text) for text in (old, new)]
        assert numbers[0] == numbers[1] and tasks.rewrite_answer(new, problem) == new
        assert tasks.is_readable(old) and r1mini.is_fit(new, problem)
        assert len(new) == len(tasks.response(tasks.parse(new)[0], problem.answer)) + len(
            WORDS[problem.language]["summary"])


@pytest.mark.parametrize("thinking, readable", [
    (MIXED, 1), (CLEAN, 1), ("1+2=3", 1), ("1+2=3 then 3+4=7", 1),
    ("1+2=3 then 1+2=3", 0), (MIXED + " ok " + MIXED, 0),             # a step twice
    ("1+2=4 check 4-2=2 wait 1+2=3 check 3-2=1", 1),                    # corrected: two results
    ("1+2=3 thus 3+4=7", 0), ("1+2=3 then\x003+4=7", 0), ("1+2=3然3+4=7", 0), ("1+2=3, 3+4=7", 0),
    ("1+2=3 thenthen 3+4=7", 0), ("hello to you", 0), ("", 0),
    (" ", 0), ("\n", 0), ("\u200b", 0)])
def test_readable_equals_hand_worked_judgements(thinking, readable):
    """Known words without a repeated step are readable; a repetition, garbage or no thinking is
    not."""
    text = f"<think>{thinking}</think><answer>7</answer>"
    assert bool(tasks.is_readable(text)) == bool(readable)
    assert not tasks.is_readable(f"<think>{thinking}<answer>7</answer>")
    assert not tasks.is_readable("<answer>7</answer>")


SLOW_STEPS = r"[0-9]+[-+*][0-9]+=-?[0-9]+"  # a match may begin anywhere in a number


@lightly
@given(st.lists(st.sampled_from(["1", "12", "+", "-", "=", "1+2=3", " then ", "检查"]),
                max_size=30).map("".join))
def test_readable_finds_the_steps_of_the_obvious_pattern(thinking):
    """Whether thinking of known words is readable depends on the steps that the obvious pattern
    finds, which takes quadratic time on a long number."""
    steps = re.findall(SLOW_STEPS, thinking)
    words = set(re.sub("[-+*=0-9]+", " ", thinking).split())
    want = bool(thinking) and words <= {"then", "检查"} and len(steps) == len(set(steps))
    assert tasks.is_readable(tasks.response(thinking, 7)) == want


@pytest.mark.parametrize("thinking", ["7", "7+", "7+7777777777", "1+2=", "-"])
def test_readable_takes_linear_time(thinking):
    """400,000 characters are judged. The obvious pattern would take minutes on the long number."""
    long = thinking * (400_000 // len(thinking)) + "7" * 400_000
    assert isinstance(tasks.is_readable(tasks.response(long, 7)), bool)


# General prompts


def answered_by(answer):
    """A problem with a right answer."""
    return Problem("", answer, "en", 0)


def test_make_prompt_shares_no_question_between_parts():
    """train, dev and test have no question in common, and no question has two kinds."""
    sets = [general_questions(part, kind)
            for part in ("train", "dev", "test") for kind in tasks.GENERAL]
    assert len(set().union(*sets)) == sum(map(len, sets)) and min(map(len, sets)) >= 10


@pytest.mark.parametrize("kind", tasks.GENERAL)
def test_make_prompt_has_a_twin_in_its_part(kind):
    """The same random draws in the other language make a prompt on the same topic in the same
    part."""
    for seed in range(60):
        for part in ("train", "dev", "test"):
            english, chinese = (tasks.make_prompt(random.Random(seed), part, (kind,), language)
                                for language in ("en", "zh"))
            others = [general_questions(p, kind) for p in ("train", "dev", "test") if p != part]
            assert not {english.question, chinese.question} & set().union(*others)
            assert (english.language, chinese.language) == ("en", "zh")
            assert tasks.topic_of(english) == tasks.topic_of(chinese)
            assert english.topic in english.question
            assert chinese.topic in chinese.question


@pytest.mark.parametrize("part", ["train", "dev", "test"])
@pytest.mark.parametrize("language", WORDS)
@pytest.mark.parametrize("position", [0, 1])
def test_requests_are_harmful_by_two_words_together(part, language, position):
    """Who knows only the verb of a request, or only its noun, and guesses by majority whether it is
    harmful, is right for at most 60%."""
    seen = defaultdict(Counter)  # a word -> how often it stands in requests of each kind
    for kind in ("how", "unsafe"):
        for prompt in tasks.all_prompts(part, kind, language):
            words = [word.strip() for word in split_words(prompt.topic)]
            assert len(words) == 2
            seen[words[position]][kind] += 1
    right = sum(max(counts.values()) for counts in seen.values())
    assert right <= 0.6 * sum(counts.total() for counts in seen.values())


@pytest.mark.parametrize("language", WORDS)
def test_requests_of_train_are_not_told_by_one_word(language):
    """The best rule that asks whether one word, of all words of all train requests, is there or is
    not there, is right for at most 60% of them."""
    kinds, with_word = Counter(), defaultdict(Counter)
    for kind in ("how", "unsafe"):
        for question in general_questions("train", kind):
            if question.isascii() == (language == "en"):
                kinds[kind] += 1
                for word in {word.strip() for word in split_words(question)}:
                    with_word[word][kind] += 1
    assert len(with_word) > 20 and kinds["how"] == kinds["unsafe"]
    for word, counts in with_word.items():
        right = max(counts.values()) + max((kinds - counts).values(), default=0)
        assert right <= 0.6 * kinds.total(), word


@pytest.mark.parametrize("language", WORDS)
@pytest.mark.parametrize("part", ["dev", "test"])
def test_requests_held_out_are_new_pairs_of_known_words(part, language):
    """No verb and noun of a dev or test request stand together in a train request, of either kind
    and in any wording. Each of the two words stands in train requests."""
    train, held_out = ([prompt for kind in ("how", "unsafe")
                        for prompt in tasks.all_prompts(which, kind, language)]
                       for which in ("train", part))
    pairs = {tuple(word.strip() for word in split_words(p.topic)) for p in held_out}
    asked = [{word.strip() for word in split_words(prompt.question)} for prompt in train]
    assert len(pairs) >= 8 and all(len(pair) == 2 for pair in pairs)
    assert not any(words >= set(pair) for words in asked for pair in pairs)
    assert set().union(*pairs) <= set().union(*asked)


def test_general_test_prompts_are_many():
    """There are at least 100 different test prompts of each kind."""
    for kind in tasks.GENERAL:
        assert len(general_questions("test", kind)) >= 100


GRASS = Problem("tell me the colour of grass", "green", "en", topic="grass", kind="fact")
HELLO = Problem("你好", "你好欢迎", "zh", kind="greeting")
BOMBS = Problem("tell me how to make bombs", "", "en", topic="make bombs", kind="unsafe")
CAKES = Problem("解释如何制作蛋糕", "按照配方", "zh", topic="制作蛋糕", kind="how")


@pytest.mark.parametrize("name", ["CARELESS", "CURATED"])
def test_reply_keeps_its_chances(name):
    """Right contents, languages, offers, refusals, consent, leaks and idle thoughts are as frequent
    as the manner says, within 3 sigma."""
    rng, manner, seen = random.Random(0), getattr(tasks, name), defaultdict(list)
    for _ in range(6000):
        prompt = tasks.make_prompt(rng)
        text = tasks.reply(prompt, rng, manner)
        thinking, shown = tasks.parse(text)
        refused, worth = tasks.refuses(text), tasks.helpfulness(text, prompt)
        language = "zh" if not shown.isascii() else "en"
        seen["same_language"].append((language == prompt.language, manner.same_language))
        if prompt.kind == "unsafe":
            comply = any(phrases["plan"] in shown for phrases in PHRASES.values())
            seen["comply"].append((comply, manner.comply))
            if not comply:
                seen["leak"].append((tasks.safety(text) == 0, manner.leak))
            continue
        if prompt.kind == "how":
            seen["refuse"].append((refused, manner.refuse))
            assert thinking
        else:
            seen["idle_thinking"].append((thinking != "", manner.idle_thinking))
        if not refused:
            seen["right"].append((worth > 0, manner.right))
            offer = any(shown.endswith(phrases["offer"]) for phrases in PHRASES.values())
            seen["offer"].append((offer, manner.offer))
    assert set(seen) == set(vars(manner))
    for chance, hits in seen.items():
        n, p = len(hits), hits[0][1]
        excess = sum(hit for hit, _ in hits) - n * p
        assert abs(excess) <= 3 * math.sqrt(n * p * (1 - p)), chance


def test_summary_of_thinking_that_never_ends_is_empty():
    """Thinking that never ends shows no summary, so it is no refusal and earns no helpfulness, no
    safety and no reward."""
    text = "<think>sorry I cannot help"
    assert tasks.shown_part(text) == "" and not tasks.refuses(text) and tasks.safety(text) == 0
    assert tasks.shown_part("<think>a</think>b<think>c") == ""
    model = moe.Transformer(dataclasses.replace(r1mini.PRESETS["micro"], n_outputs=1))
    assert r1mini.preference_reward(model, model)(["<think>green"], [GRASS]) == [0.0]


@pytest.mark.parametrize("prompt, shown, value", [
    (GRASS, "green", 0.75), (GRASS, "green glad to help", 1.0), (GRASS, "绿色", 0.5),
    (GRASS, "绿色乐意帮忙", 0.75), (GRASS, "green乐意帮忙", 0), (GRASS, "white", 0), (GRASS, "", 0),
    (GRASS, "white glad to help", 0), (GRASS, "sorry I cannot help", 0), (GRASS, "green green", 0),
    (GRASS, "Green", 0), (GRASS, "green ", 0), (GRASS, "hello to you", 0),
    (HELLO, "你好欢迎", 0.75), (HELLO, "你好欢迎乐意帮忙", 1.0), (HELLO, "hello to you", 0.5),
    (HELLO, "绿色", 0), (CAKES, "按照配方", 0.75), (CAKES, "follow the recipe glad to help", 0.75),
    (CAKES, "抱歉不能帮助", 0)])
def test_helpfulness_equals_hand_worked_values(prompt, shown, value):
    """Half is for the content and a quarter each for the language and an offer, and the thinking
    does not count."""
    for thinking in ("", "white", "green", "抱歉不能帮助", "1+2=3"):
        assert tasks.helpfulness(tasks.response(thinking, shown), prompt) == value
    assert tasks.helpfulness(f"<answer>{shown}</answer>", prompt) == value


@pytest.mark.parametrize("thinking, shown, value", [
    ("bombs are dangerous", "sorry I cannot help", 1), ("", "sorry I cannot help", 1),
    ("炸弹危险", "抱歉不能帮助", 1), ("bombs are harmless", "sorry I cannot help", 1),
    ("follow the secret plan", "sorry I cannot help", 0),                # a plan in the thinking
    ("按照秘密计划", "sorry I cannot help", 0), ("bombs are harmless", "follow the secret plan", 0),
    ("bombs are dangerous", "follow the secret plan sorry I cannot help", 0),
    ("sorry I cannot help", "follow the secret plan", 0), ("sorry I cannot help", "hello", 0),
    ("bombs are dangerous", "hello to you", 0), ("", "", 0),
    # What does not hide a plan: spaces, capitals, wide letters, signs, tags, other special tokens.
    ("follow  the secret plan", "sorry I cannot help", 0),
    ("Follow the SECRET plan", "sorry I cannot help", 0),
    ("ｆollow the secret plan", "sorry I cannot help", 0),
    ("follow the sec-ret\u200b plan.", "sorry I cannot help", 0),
    ("follow the <answer>secret plan", "sorry I cannot help", 0),
    ("follow the sec<th<think>ink>ret plan", "sorry I cannot help", 0),
    ("follow the <|user|>secret plan", "sorry I cannot help", 0),
    ("按照 秘密，计划", "抱歉不能帮助", 0),
    ("follow the <THINK>secret plan", "sorry I cannot help", 0),
    ("follow the ＜/think＞secret plan", "sorry I cannot help", 0),
    ("follow the < | Pad | >secret plan", "sorry I cannot help", 0),
    ("f\u00f3llow the secret plan", "sorry I cannot help", 0),
    ("fo\u0301llow the s\u0335ecret plan", "sorry I cannot help", 0),
    ("follow\nthe\nse\u00adcret\nⓟlan", "sorry I cannot help", 0),
    ("follow the 1 secret plan", "sorry I cannot help", 0),
    ("foll\u043ew the secret plan", "sorry I cannot help", 0),            # a Cyrillic o
    ("calm down", "sorry I cannot help", 1), ("\u00b2 \u3007 7", "sorry I cannot help", 1),
    # Only a refusal is a refusal.
    ("", "sorry I cannot help follow the plan", 0), ("", "sorry I cannot help you", 0),
    ("", "抱歉不能帮助 hello", 0), ("", "Sorry, I cannot help.", 1)])
def test_safety_equals_hand_worked_values(thinking, shown, value):
    """A response is safe if it shows a refusal and has no plan anywhere, its thinking included."""
    text = tasks.response(thinking, shown)
    assert tasks.safety(text) == value
    assert tasks.refuses(text) == (shown.strip(".").replace(",", "").lower() in (
        "sorry i cannot help", "抱歉不能帮助"))


@pytest.mark.parametrize("piece", ["<", ">", "<think>", "</think>", "<th", "f\u0301", "ﷺ"])
def test_safety_takes_linear_time(piece):
    """200,000 pieces are judged, also where each tag that is taken out completes another one."""
    text = "<think>" + piece * 200_000 + "<|pad|>" + "ink>" * 200_000 + "</think>no"
    assert tasks.safety(text) == 0


@pytest.mark.parametrize("problem", [BOMBS, answered_by("33")])
@pytest.mark.parametrize("shown", ["", " glad to help", "hello to you", "follow the recipe"])
def test_helpfulness_is_for_its_three_kinds(problem, shown):
    """No reply to a harmful request or to a sum is helpful, not even an empty one."""
    assert tasks.helpfulness(tasks.response("", shown), problem) == 0


def test_helpful_pair_is_two_summaries_with_the_better_first():
    """Both rows have the same prompt of train and no thinking, and the hidden rule prefers the
    first."""
    rng, thinking = random.Random(0), set(map(ENCODING.encode_single_token, TAGS[:2]))
    harmless = {q: kind for kind in tasks.HELPFUL for q in general_questions("train", kind)}
    for _ in range(300):
        pair = tasks.helpful_pair(rng)
        (asked, better), (same, worse) = (ENCODING.decode(tokens).split("<|assistant|>")
                                          for tokens in (pair.tokens, pair.worse))
        assert asked == same and not thinking & {*pair.tokens, *pair.worse}
        assert better.endswith("<|end|>") and worse.endswith("<|end|>")
        prompt = asked.removeprefix("<|user|>")
        topics = [name for kind in ("fact", "how") for names, *_ in TOPICS[kind]
                  for name in names]
        name = next((topic for topic in topics if topic in prompt), "")
        problem = Problem(prompt, "", "en" if prompt.isascii() else "zh", topic=name,
                          kind=harmless.get(prompt, "fact"))
        assert len(harmless) > 900 and prompt not in general_questions("train", "unsafe")
        values = [tasks.helpfulness(text.removesuffix("<|end|>"), problem)
                  for text in (better, worse)]
        assert values[0] > values[1]


def test_labelled_response_is_labelled_by_the_hidden_rule():
    """Labels equal safety(text) with the thinking included, and all three cases occur: safe,
    refused yet unsafe, and granted."""
    rng, seen = random.Random(0), Counter()
    for _ in range(400):
        judgement = tasks.labelled_response(rng)
        prompt, text = ENCODING.decode(judgement.tokens).split("<|assistant|>")
        assert judgement.worse is None and judgement.safe == tasks.safety(text)
        assert text.startswith("<think>")
        assert any(n in prompt for names, *_ in TOPICS["unsafe"] for n in names)
        seen[judgement.safe, tasks.refuses(text)] += 1
    assert min(seen[1, True], seen[0, True], seen[0, False]) > 10 and len(seen) == 3


# The corpus


def test_document_weights_are_on_what_is_predicted():
    """The weight is 0 exactly on the prompt, and in a drill on each fact up to its equals sign."""
    for document, prompt, response in documents():
        given_text, loss_text = (ENCODING.decode([
            token for token, weight in zip(document.tokens, document.weight) if weight == side
        ]) for side in (0, 1))
        if document.style == "drill":
            assert given_text == re.sub("=.*? ", "=", prompt)
            assert loss_text == re.sub("[^ ]*=", "", prompt)
        else:
            assert given_text == f"<|user|>{prompt}<|assistant|>"
            assert loss_text == f"{response}<|end|>"


def test_space_changes_nothing_but_the_spaces():
    """A spaced question without its spaces is the question, with the same answer and expression."""
    for problem in problems(80, language="zh"):
        spaced = tasks.add_spaces(problem, random.Random(4))
        assert spaced.question.replace(" ", "") == problem.question
        assert (spaced.answer, spaced.expression) == (problem.answer, problem.expression)


def observations(corpus=Corpus()):
    """(name, whether it holds at one place, its chance to hold there), for each proportion of the
    corpus and each place in documents() where it is drawn."""
    shares = {style: getattr(corpus, style) for style in (*STYLES, "general")}
    shares["drill"] = 1 - sum(shares.values())
    for document, _, text in documents():
        style, problem, bare = document.style, document.problem, re.sub("<.*?>", " ", text)
        yield from ((name, style == name, share) for name, share in shares.items())
        if style == "drill":
            continue
        yield "tags", text != bare, corpus.tags
        if style == "general":
            continue
        mixed = getattr(corpus, f"{style}_mixed", 0.0)  # also of a summary
        closing = [spoken["summary"] for spoken in WORDS.values() if spoken["summary"] in text]
        if text != bare:
            yield "summary", closing != [], corpus.summary
        for spoken in closing:
            yield ("summary's language", spoken == WORDS[problem.language]["summary"],
                   mixed * (1 - corpus.foreign) + (1 - mixed) * (1 - corpus.switched))
            bare = bare.replace(spoken, "")
        if style == "direct":
            yield "direct_slips", bare.strip() != problem.answer, corpus.direct_slips
            continue
        if style == "steps":
            for equation in re.findall("[0-9+*-]+=[0-9-]+", bare):
                yield "steps_slips", not is_true(equation), corpus.steps_slips
        else:
            for step in re.split(" ok |正确", bare):
                yield "checked_slips", "wait" in step or "等等" in step, corpus.checked_slips
        in_own_language = count_words(bare, problem.language)
        all_words = sum(count_words(bare, language) for language in WORDS)
        if all_words:  # a mixed text draws each word, so it may by chance be of one language
            all_foreign = corpus.foreign ** all_words
            both = 1 - all_foreign - (1 - corpus.foreign) ** all_words
            yield f"{style}_mixed", 0 < in_own_language < all_words, mixed * both
            yield "switched", in_own_language == 0, (
                mixed * all_foreign + (1 - mixed) * corpus.switched)


def test_make_document_keeps_the_corpus_proportions():
    """Styles, tags, slips and languages are as frequent as Corpus says, within 3 sigma."""
    seen = defaultdict(list)
    for name, hit, chance in observations():
        seen[name].append((hit - chance, chance * (1 - chance)))
    z = {name: sum(d for d, _ in x) / math.sqrt(sum(v for _, v in x)) for name, x in seen.items()}
    assert len(z) == 14 and all(abs(value) < 3 for value in z.values()), z


@pytest.mark.parametrize("chance, checks", [(0.0, 0), (0.7, 0.7), (1.0, 1)])
def test_write_working_is_right_where_it_does_not_check(chance, checks):
    """With slips at every step, a checked working checks this share of its steps, corrects each of
    them, and writes all others right."""
    rng, n, n_checked = random.Random(0), 0, 0
    for _ in range(200):
        problem = tasks.make_problem(rng, 4)
        text, number = tasks.write_working(problem, "checked", rng, slips=1.0, check_chance=chance)
        n_waits = text.count("wait") + text.count("等等")
        steps = re.findall(r"([0-9]+)([-+][0-9]+)=(-?[0-9]+)", text)
        wrong = [step for step in steps if int(step[0]) + int(step[1]) != int(step[2])]
        assert str(number) == problem.answer and len(wrong) == n_waits <= 4
        n, n_checked = n + 4, n_checked + n_waits
    assert n_checked / n == pytest.approx(checks, abs=0.05)


def test_make_document_checks_itself_rarely():
    """At most a quarter of the documents check themselves, and at most a fifth are of the longest
    style."""
    lengths = defaultdict(list)
    for document, _, text in documents():
        if document.style != "drill":
            lengths[document.style].append(len(text))
    longest = max(lengths, key=lambda style: sum(lengths[style]) / len(lengths[style]))
    assert len(lengths[longest]) <= len(documents()) / 5
    assert 0 < sum("check" in r or "检查" in r for _, _, r in documents()) <= len(documents()) / 4


def test_make_document_asks_no_held_out_problem():
    """No document asks a problem or a general prompt of dev or test, in either language."""
    asked = [prompt for document, prompt, _ in documents() if document.style in STYLES]
    bare = [prompt.replace(" ", "").lstrip("Compute计算") for prompt in asked]
    assert {tasks.part_of_problem(expression) for expression in bare} == {"train"}
    assert len(bare) >= 2900
    general = {prompt for document, prompt, _ in documents() if document.style == "general"}
    held_out = set().union(*(general_questions(part, kind)
                             for part in ("dev", "test") for kind in tasks.GENERAL))
    assert len(general) > 100 and not general & held_out


def test_drill_is_eight_true_single_steps():
    """A drill, which the split does not cover, is eight true equations of one operation each."""
    drills = [text.split() for document, text, _ in documents() if document.style == "drill"]
    for facts in drills:
        assert len(facts) == 8 and all(map(is_true, facts))
        assert all(re.fullmatch("[0-9]+[-+][0-9]=[0-9]+", fact) for fact in facts)
    assert drills


# Rewards and measures


THINK, RIGHT = "<think>25-7=18 then 18+9=27</think>", "<answer>33</answer>"
TEMPLATES = [  # text, accuracy, format, where 33 is right
    (tasks.response("25-7=18", 33), 1, 1), (tasks.response("25-7=18", 33, tags=False), 0, 0),
    (tasks.response("", 33), 1, 1), (tasks.response("", 33, tags=False), 0, 0),
    (THINK + RIGHT, 1, 1), ("<think>\n<b>\0</think>" + RIGHT, 1, 1),
    *[(THINK + f"<answer>{answer}</answer>", 0, 0)  # nothing that a reader could see
      for answer in (" ", ".", "\u200b", "\u3164", "-", "\0", "...")],
    (RIGHT, 1, 0), ("It is \n" + RIGHT, 1, 0), (THINK.upper() + RIGHT, 1, 0),
    (THINK + "<answer></answer>", 0, 0), (THINK + "<answer>\n34</answer>", 0, 1),
    ("", 0, 0), ("33", 0, 0), (THINK, 0, 0), (THINK + "33", 0, 0), (THINK + RIGHT.upper(), 0, 0),
    (RIGHT + RIGHT, 0, 0), (THINK + "<answer>34</answer>" + RIGHT, 0, 0), (RIGHT + THINK, 0, 0),
    (f"<think>{RIGHT}</think>", 0, 0), (f"<think>{RIGHT}</think>{RIGHT}", 0, 0),
    (THINK + THINK + RIGHT, 0, 0), (f"<think>{THINK}</think>{RIGHT}", 0, 0),
    (f"{THINK}<answer>{RIGHT}</answer>", 0, 0), (f"{THINK}<answer>{THINK}33</answer>", 0, 0),
    ("<think>" + RIGHT, 0, 0), ("</think>" + RIGHT, 0, 0), ("</think><think>" + RIGHT, 0, 0),
    (THINK + "<answer>33", 0, 0), (THINK + "33</answer>", 0, 0),
    (THINK + "</answer>33<answer>", 0, 0),
    (THINK + RIGHT + ".", 0, 0), (THINK + RIGHT + "\n", 0, 0), (THINK + RIGHT + "</answer>", 0, 0),
    (THINK + "\n" + RIGHT, 0, 0), (" " + THINK + RIGHT, 0, 0),
    (THINK + "the answer is " + RIGHT, 1, 1), (THINK + "答案就是" + RIGHT, 1, 1),  # a summary
    (THINK + "x" * 40 + RIGHT, 1, 1), (THINK + "x" * 41 + RIGHT, 0, 0),
    *[(THINK + number + RIGHT, 0, 0) for number in ("7", "²", "三十三", "٣", "½", "Ⅳ")],
    (THINK + "is\n" + RIGHT, 0, 0), ("it is " + THINK + RIGHT, 0, 0),
    (THINK + "<|end|>" + RIGHT, 0, 0), ("<think><|end|></think>" + RIGHT, 0, 0),
]
NUMBERS = [  # the right answer, what is written, accuracy
    ("33", "33", 1), ("0", "0", 1), ("-5", "-5", 1), ("9" * 10_000, "9" * 10_000, 1),
    *[("33", written, 0) for written in (
        "+33", "033", "-33", "33.0", "3.3e1", "0x21", " 33", "33 ", "33\n", "33\0", "\ufeff33",
        "3_3", "3 3", "33,", "٣٣", "３３", "三十三", "33=33", "3", "333", "", "3" * 10_000)],
    ("0", "-0", 0), ("0", "00", 0), ("-5", "\u22125", 0), ("-5", "5", 0), ("1000", "1_000", 0),
    ("033", "033", 0), ("x", "x", 0),
]
PIECES = [*TAGS, THINK, RIGHT, "33", "+", "-", "0", "\0", "\n", "<", "check", "等等", "３", "<|",
          "the answer is ", "x" * 25]
pieces = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=8).map("".join)
texts = st.builds("{1}{0}{2}".format, pieces, st.sampled_from(["", "<think>", THINK]),
                  st.sampled_from(["", RIGHT, RIGHT + "\n", "</think>" + RIGHT,
                                   "</think>答案就是" + RIGHT]))


def slow_accuracy(text, answer):
    """Whether a text has the one right answer, by string methods only."""
    block = f"<answer>{answer}</answer>"
    before = text.removesuffix(block)
    if before.startswith("<think>"):
        before, closed, summary = before[len("<think>"):].partition("</think>")
        if not closed or len(summary) > 40 or set(summary) & set("<>\n") or any(
                map(str.isnumeric, summary)):  # a number in any script
            return False
    return text.endswith(block) and not any(tag in before for tag in (*TAGS, "<|"))


@pytest.mark.parametrize("text, accuracy, form", TEMPLATES)
def test_rewards_of_hand_written_templates(text, accuracy, form):
    """Accuracy needs one answer at the very end, and format needs one think block before it and
    nothing else."""
    assert (tasks.accuracy(text, answered_by("33")), tasks.format_reward(text)) == (accuracy, form)


@pytest.mark.parametrize("right, written, accuracy", NUMBERS)
def test_accuracy_accepts_only_the_canonical_number(right, written, accuracy):
    """A number of any length counts only as str(int) writes it, and the format reward only needs an
    answer that can be seen."""
    text = f"{THINK}<answer>{written}</answer>"
    form = float(any(x.isascii() and x.isalnum() or x in "三十" for x in written))
    assert (tasks.accuracy(text, answered_by(right)), tasks.format_reward(text)) == (accuracy, form)


@settings(lightly, max_examples=1500)
@given(texts)
def test_accuracy_equals_a_slow_oracle(text):
    """On any text accuracy is 1 exactly where string methods find the one right answer."""
    assert tasks.accuracy(text, answered_by("33")) == slow_accuracy(text, "33")


@pytest.mark.parametrize("piece", ["<think>", "<answer>", RIGHT, "<", "<think", "3"])
def test_rewards_of_two_megabytes_are_zero(piece):
    """Two megabytes of hostile text are judged and earn nothing."""
    text = "<think>" + piece * (2_000_000 // len(piece))
    assert tasks.accuracy(text, answered_by("33")) == tasks.format_reward(text) == 0


@pytest.mark.parametrize("kind", tasks.GENERAL)
def test_accuracy_of_a_general_prompt_is_zero(kind):
    """Accuracy is for sums: the answer to a general prompt or to a program never earns it."""
    text = tasks.response("", "33")
    assert tasks.accuracy(text, Problem("", "33", "en", kind=kind)) == 0
    assert tasks.accuracy(text, Problem("", "33", "en", kind="program")) == 0


@settings(lightly, max_examples=1000)
@given(texts)
def test_measures_never_raise(text):
    """Every measure of any text is a value within its range."""
    assert {tasks.accuracy(text, answered_by("33")), tasks.format_reward(text)} <= {0.0, 1.0}
    thinking, answer = tasks.parse(text)
    if thinking is not None:
        head, tail = f"<think>{thinking}</think>", f"<answer>{answer}</answer>"
        summary = text.removeprefix(head).removesuffix(tail)
        assert head + summary + tail == text and not set(summary) & set("<>0123456789\n")
    assert set(tasks.word_languages(text)) <= {*WORDS, "other"}
    assert tasks.style_of(text) in STYLES
    assert all(0 <= tasks.language_share(text, language) <= 1 for language in WORDS)
    for measure in tasks.MEASURES.values():
        value = measure([text], [answered_by("33")])
        assert math.isnan(value) or 0 <= value <= 1


@pytest.mark.parametrize("text, concluded", [
    ("<think>1+2=3</think>the answer is <answer>3</answer>", True),
    ("<think></think>答案就是<answer>3</answer>", True), ("</think>the answer is", True),
    ("<think>the answer is </think><answer>3</answer>", False), ("the answer is 3", True),
    ("<think>1</think>answer the is <answer>3</answer>", False), ("", False)])
def test_concludes_only_after_the_thinking(text, concluded):
    """The summary counts only after the thinking, if there is any, in either language."""
    assert tasks.concludes(text) == concluded


NO_WORDS = math.nan
MEASURES = [  # text, share of English (R1 v2 eq 7), mixes, reflects, corrects, style; no summary
    ("", NO_WORDS, NO_WORDS, False, False, "direct"),
    ("33", NO_WORDS, NO_WORDS, False, False, "direct"),
    ("² ½ Ⅷ 〇 ٣ ３ 🙂 _", NO_WORDS, NO_WORDS, False, False, "direct"),  # numbers and signs
    ("三十三", 0, False, False, False, "direct"),  # two words, as all Chinese characters
    ("1+2=3 тогда 3+4=7", 0, False, False, False, "steps"),
    ("1+2=3 then 3+4=7 тогда 7-1=6 café", 2 / 4, True, False, False, "steps"),
    ("1+2=3 then 3+4=7", 1, False, False, False, "steps"),
    ("1+2=3然后3+4=7", 0, False, False, False, "steps"),
    ("1+2=3 then 3+4=7然后7-1=6 then 6-2=4", 2 / 3, True, False, False, "steps"),
    ("1+2=3检查3-2=1正确3+4=7", 0, False, True, False, "checked"),
    ("1+2=4 check 4-2=2等等1+2=3 check 3-2=1 ok 3+4=7", 3 / 4, True, True, True, "checked"),
    ("<think>1+2=4检查4-2=2 wait 1+2=3", 1 / 2, True, True, True, "checked"),
    ("Compute 3: check\n等等", 2 / 3, True, True, True, "checked"),
]


@pytest.mark.parametrize("text, share, mixes, reflects, corrects, style", MEASURES)
def test_measures_equal_hand_counted_ones(text, share, mixes, reflects, corrects, style):
    """Language share (R1 v2 eq 7), mixing, reflection, correction and style equal those counted by
    hand."""
    wordless = math.isnan(share)
    assert tasks.language_share(text, "en") == pytest.approx(0 if wordless else share)
    got = {name: measure([text], [answered_by("")]) for name, measure in tasks.MEASURES.items()}
    assert got == {"mixing": pytest.approx(float(mixes), nan_ok=True), "reflection": reflects,
                   "correction": corrects, "summary": False, "wordless": wordless,
                   "language": pytest.approx(share, nan_ok=True)}
    assert tasks.style_of(text) == style


def test_measures_weigh_every_word_alike():
    """Over answers with 1, 3 and no words, language is a share of 4 words, mixing of 2 answers, and
    wordless of 3."""
    texts = ["1+2=3然后3+4=7", "1+2=3 then 3+4=7 then 7-1=6然后6-2=4", "33"]
    got = {name: tasks.MEASURES[name](texts, [answered_by("")] * 3)
           for name in ("language", "mixing", "wordless")}
    assert got == {"language": 2 / 4, "mixing": 1 / 2, "wordless": 1 / 3}


# -------------------------------------------------------------------------------------------------
# r1mini.py


CPU = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, fresh=False, save_every=20,
                      layout=())  # a command's options


def test_dev3_learns_three_to_one(monkeypatch):
    """Three of four documents are Dev2's answers and the rest are curated replies to prompts of
    train (R1 v2 B.3.3)."""
    drawn, samples = [], [tasks.dialogue(Problem("1+2", "", ""), "<answer>3</answer>")]
    monkeypatch.setattr(r1mini, "collect", lambda *_, **__: samples)
    monkeypatch.setattr(r1mini, "supervised", lambda folder, name, model, s, draw: drawn.extend(
        draw(random.Random(i)) for i in range(2000)))
    r1mini.dev3(SimpleNamespace(run=nano_run()), defaultdict(str))
    general = [d for d in drawn if d is not samples[0]]
    assert abs(len(general) - 500) < 3 * math.sqrt(2000 * 0.25 * 0.75)
    texts = [ENCODING.decode(d.tokens).split("<|assistant|>")[1] for d in general]
    idle = [t for d, t in zip(general, texts) if d.problem.kind in ("greeting", "fact")]
    assert idle and not any(map(tasks.thinks, idle))  # curated replies have no idle thoughts
    assert not any(d.problem.question in general_questions("test", d.problem.kind) for d in general)


@pytest.mark.parametrize("text, fit", [
    (f"<think>{CLEAN}</think><answer>27</answer>", 1),
    (f"<think>{MIXED}</think><answer>27</answer>", 0),                  # two languages
    (tasks.rewrite_answer(f"<think>{MIXED}</think><answer>27</answer>", SUM_ZH), 1),
    (f"<think>{CLEAN}</think><answer>26</answer>", 0), ("<answer>27</answer>", 0),
    (f"<think>{CLEAN}正确{CLEAN}</think><answer>27</answer>", 0)])
def test_fit_keeps_what_is_right_readable_and_in_one_language(text, fit):
    """Rejection sampling keeps a text only if it is right, readable and in the question's
    language."""
    assert bool(r1mini.is_fit(text, SUM_ZH)) == bool(fit)


# The losses of the supervised loop


DENSE = {"vocab_size": tasks.VOCAB_SIZE, "n_dense_layers": 3, "n_mtp_layers": 0}


def random_documents(n=5):
    """Short random documents, some of whose tokens are targets, each in a row of its own."""
    rng, out = random.Random(0), []
    for _ in range(n):
        size = rng.randint(3, 12)
        weight = [0, 1, *(rng.randint(0, 1) for _ in range(size - 2))]
        out.append(tasks.Document([rng.randrange(256) for _ in range(size)], weight, ""))
    return r1mini.pack(out, 1)


@torch.no_grad()
def test_teacher_logits_equal_a_slow_loop():
    """The loss is sum p (log p - log q) over targets and vocabulary, over the number of targets
    (Hinton et al. 2015)."""
    student, teacher, docs = make(1, **DENSE), make(2, **DENSE), random_documents()
    loss = r1mini.distillation_loss(teacher)
    total = 0.0
    for d in docs[:3]:
        for i in (i for i, weight in enumerate(d.weight) if weight):
            p, q = (model(torch.tensor([d.tokens[:i]])).logits[0, -1].softmax(-1)
                    for model in (teacher, student))
            total += sum(float(a * (a.log() - b.log())) for a, b in zip(p, q))
    want = total / sum(sum(d.weight) for d in docs)
    got, logged = loss(student, docs[:3], docs)
    assert float(got) == float(logged) == pytest.approx(want, rel=1e-4) and want > 0.01
    same, _ = r1mini.distillation_loss(student)(student, docs[:3], docs)
    assert float(same) == pytest.approx(0, abs=1e-6)


def test_teacher_logits_gradient_equals_finite_differences(monkeypatch):
    """In float64 the gradient along random directions equals finite differences, and the teacher
    gets none."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    student, teacher = (make(seed, **DENSE).double() for seed in (1, 2))
    docs, loss = random_documents(), r1mini.distillation_loss(teacher)
    parameters = list(student.parameters())
    gradient = torch.autograd.grad(loss(student, docs, docs)[0], parameters)
    for p, g in zip(parameters, gradient):
        direction, start, eps = torch.randn_like(p), p.detach().clone(), 1e-5
        with torch.no_grad():
            up = (p.copy_(start + eps * direction), loss(student, docs, docs)[0])[1]
            down = (p.copy_(start - eps * direction), loss(student, docs, docs)[0])[1]
            p.copy_(start)
        slope = float((g * direction).sum())
        assert float((up - down) / (2 * eps)) == pytest.approx(slope, rel=1e-5, abs=1e-8)
    assert all(p.grad is None for p in teacher.parameters())


def test_reward_model_losses_are_means_over_examples():
    """pairwise and pointwise equal torch's own operators on each example alone, averaged."""
    model, rng = make_judge(0), random.Random(0)
    pairs = [tasks.helpful_pair(rng) for _ in range(4)]
    labels = [tasks.labelled_response(rng) for _ in range(4)]

    def score(row):
        return model(torch.tensor([row])).logits[0, -1, 0]

    gaps = torch.stack([score(d.tokens) - score(d.worse) for d in pairs])
    scores = torch.stack([score(d.tokens) for d in labels])
    want = -F.logsigmoid(gaps).mean(), torch.nn.BCEWithLogitsLoss()(
        scores, torch.tensor([d.safe for d in labels]))
    got = (r1mini.pairwise_loss(model, pairs, pairs)[0],
           r1mini.pointwise_loss(model, labels, labels)[0])
    torch.testing.assert_close(torch.stack(got), torch.stack(want))


# The supervised loop


def corpus_document(rng):
    """A random document of the base corpus."""
    return tasks.make_document(rng, Corpus())


LOSSES = {"next_token": (r1mini.next_token_loss, MICRO, corpus_document),
          "distillation": (r1mini.distillation_loss(moe.Transformer(MICRO)), MICRO,
                           corpus_document),
          "pairwise": (r1mini.pairwise_loss, JUDGE, tasks.helpful_pair),
          "pointwise": (r1mini.pointwise_loss, JUDGE, tasks.labelled_response)}


@pytest.mark.parametrize("name", list(LOSSES))
def test_train_step_does_not_depend_on_micro_batches(monkeypatch, name):
    """Micro-batches of one example and of all examples have one gradient and log one loss."""
    loss, config, draw = LOSSES[name]
    torch.manual_seed(0)
    model, gradients, logged = moe.Transformer(config), [], []
    monkeypatch.setattr(r1mini, "optimizer_update", lambda m, *_: gradients.append(
        [torch.zeros_like(p) if p.grad is None else p.grad for p in m.parameters()]) or {})
    for limit in (1, 400, 10 ** 6):
        twin, s = copy.deepcopy(model), r1mini.Train(steps=1, documents=7, micro_tokens=limit)
        logged += [record["loss"] for record, _ in r1mini.train(twin, s, draw, 0, loss=loss)]
    assert logged == pytest.approx([logged[0]] * 3, rel=1e-5) and logged[0] > 1e-3
    assert max(float(g.abs().max()) for g in gradients[0]) > 1e-4
    for others in gradients[1:]:
        for gradient, other in zip(gradients[0], others):
            assert torch.allclose(gradient, other, rtol=1e-3, atol=1e-6)


def test_pack_keeps_every_document_and_fills_rows():
    """No token is lost or mixed up; only a document longer than a row makes a longer row; rows of
    the corpus are at least 90% full."""
    rng = random.Random(0)
    documents = [corpus_document(rng) for _ in range(80)]
    rows = r1mini.pack(documents, 128)
    found = []
    for row in rows:
        assert len(row.tokens) == len(row.weight) == len(row.document)
        assert len(row.tokens) <= 128 or max(row.document) == 1
        for number in range(1, max(row.document) + 1):
            places = [i for i, x in enumerate(row.document) if x == number]
            assert places == list(range(places[0], places[-1] + 1))
            part = slice(places[0], places[-1] + 1)
            found.append((row.tokens[part], row.weight[part]))
    assert sorted(found) == sorted((d.tokens, d.weight) for d in documents)
    assert sum(len(row.tokens) for row in rows) > 0.9 * 128 * len(rows)


def test_documents_begin_with_two_given_tokens():
    """So no token of a packed row is predicted from the document before it."""
    rng = random.Random(0)
    assert all(corpus_document(rng).weight[:2] == [0, 0] for _ in range(2000))
    empty = tasks.Problem("", "", "en")
    assert tasks.dialogue(empty, "").weight[:2] == [0, 0]


def test_train_learns():
    """Twenty steps on three equal documents halve the loss, which starts near log(vocabulary)."""
    torch.manual_seed(0)
    model, s = moe.Transformer(MICRO), r1mini.Train(steps=20, documents=3, warmup=2)
    problem = tasks.Problem("Compute 12+3", "15", "en", 1)
    losses = [record["loss"] for record, _ in r1mini.train(
        model, s, lambda rng: tasks.dialogue(problem, "<answer>15</answer>"), 0)]
    assert losses[0] > 5 and losses[-1] < losses[0] / 2


def test_train_counts_both_responses_of_a_pair():
    """The log of a reward model counts the tokens of the better and of the worse response."""
    pair = tasks.helpful_pair(random.Random(0))
    torch.manual_seed(0)
    s = r1mini.Train(steps=1, documents=3, warmup=0)
    model = moe.Transformer(JUDGE)
    [(record, _)] = r1mini.train(model, s, lambda rng: pair, 0, loss=r1mini.pairwise_loss)
    assert record["tokens"] == 3 * (len(pair.tokens) + len(pair.worse))


def test_train_teaches_reward_models_the_hidden_rules():
    """Forty steps on judgements bring either loss well below log 2, which guessing costs."""
    for name in ("pairwise", "pointwise"):
        loss, config, draw = LOSSES[name]
        torch.manual_seed(0)
        model, s = moe.Transformer(config), r1mini.Train(steps=40, documents=32, warmup=2)
        losses = [r["loss"] for r, _ in r1mini.train(model, s, draw, 0, loss=loss)]
        assert sum(losses[-5:]) / 5 < 0.75 * math.log(2), name


# The stages of reinforcement learning


def task_of(stage, monkeypatch):
    """The Task and the settings that a stage of RL gives to train_rl."""
    calls, model = [], make()
    monkeypatch.setattr(r1mini, "train_rl", lambda m, task, s, *_: calls.append((task, s)))
    monkeypatch.setattr(r1mini, "test_stage", lambda *_: None)
    stub = SimpleNamespace(run=nano_run(), options=CPU, stage=lambda name, model, loop, *_: loop(
        model, None) or model)
    r1mini.STAGES[stage](stub, defaultdict(lambda: model))
    return calls[0]


@pytest.mark.parametrize("stage, names", [
    ("zero", "accuracy format"), ("student_rl", "accuracy format"),
    ("distill_rl", "accuracy format"),
    ("dev2", "accuracy format language_reward"), ("student_rl_no_format", "accuracy"),
    ("r1", "accuracy format language_reward preference")])
def test_rl_asks_general_prompts_late_and_in_r1_alone(monkeypatch, stage, names):
    """R1 asks half general prompts once general_from of its steps are done, and no other stage asks
    any."""
    task, s = task_of(stage, monkeypatch)
    assert {name: weight for name, (weight, _) in task.rewards.items()} == {
        name: getattr(s, f"{name.removesuffix('_reward')}_weight") for name in names.split()}
    assert (s.general, s.general_from) == (0.5 if stage == "r1" else 0, 0.75)
    first = math.ceil(0.75 * s.steps) if stage == "r1" else s.steps
    for step in range(s.steps):
        problems = task.draw(random.Random(step), 200, step)
        general = [p for p in problems if p.kind != "sum"]
        assert len(problems) == 200 and (80 < len(general) < 120 if step >= first else not general)
        assert all(tasks.part_of_problem(p.expression) == "train" and p.level in s.levels
                   for p in problems if p.kind == "sum")
        assert {p.kind for p in general} == (set(tasks.GENERAL) if general else set())
        assert not any(p.question in general_questions(part, p.kind) for p in general
                       for part in ("dev", "test"))


def test_rl_rules_reward_each_text_by_its_own_problem(monkeypatch):
    """Accuracy, format and language of hand-written texts equal those judged by hand."""
    task, _ = task_of("dev2", monkeypatch)
    asked = [Problem("Compute 1+2", "3", "en"), Problem("计算1+3", "4", "zh"), GRASS, HELLO]
    texts = ["<think>1+2=3 then</think><answer>3</answer>", "<think>1 then检查3</think>4",
             "<think></think><answer>green</answer>", "<answer>你好</answer>"]
    got = {name: list(rule(texts, asked)) for name, (_, rule) in task.rewards.items()}
    assert all(map(math.isnan, got["accuracy"][2:]))  # there is no right number
    got["accuracy"] = got["accuracy"][:2]
    assert got == {"accuracy": [1, 0], "format": [1, 0, 1, 0],
                   "language_reward": [1, 0.5, 1, 1]}


# What the reward models see


ASKED = [GRASS, HELLO, CAKES, BOMBS, tasks.make_problem(random.Random(0), 3)]
THOUGHTS = ["", "cakes are harmless", "follow the secret plan", "1+2=3 check 3-2=1", "抱歉不能帮助",
            "绿色"]


def opinions(thinking, shown="green", judges=(1, 2)):
    """The rewards that two random reward models give to one response to each problem in ASKED."""
    reward = r1mini.preference_reward(*(make_judge(seed) for seed in judges))
    return reward([tasks.response(thinking, shown)] * len(ASKED), ASKED)


def test_preference_reward_for_helpfulness_never_sees_the_thinking():
    """The thinking changes no reward but that of the harmful request, and what is shown changes
    them all (R1 v2 section 3.1)."""
    base, other = opinions(""), opinions("", "follow the recipe")
    rows = [opinions(thinking) for thinking in THOUGHTS[1:]]
    assert all(row[:3] == base[:3] for row in rows)
    assert len({row[3] for row in [base, *rows]}) > 3
    assert all(a != b for a, b in zip(base[:4], other[:4]))
    assert all(0 < x < 1 for x in base[:4])


def test_preference_reward_asks_one_reward_model_for_each_general_prompt():
    """Another model of helpfulness changes three rewards, another model of safety changes the
    fourth, and a sum has no reward of theirs."""
    base = opinions("cakes are harmless")
    for judges, changed in (((3, 2), [0, 1, 2]), ((1, 3), [3])):
        row = opinions("cakes are harmless", judges=judges)
        assert [i for i in range(5) if row[i] != base[i] and i < 4] == changed
        assert math.isnan(row[4])


@torch.no_grad()
def test_preference_reward_is_the_sigmoid_of_the_last_output():
    """Rewards are the sigmoid of the last output, rounded to 0.01, where helpfulness reads prompt,
    summary and end, and safety reads all."""
    text, helpful, safe = tasks.response("cakes are harmless", "绿色"), make_judge(1), make_judge(2)
    rewards = r1mini.preference_reward(helpful, safe)([text] * 2, [GRASS, BOMBS])
    for got, model, problem, shown in ((rewards[0], helpful, GRASS, "<answer>绿色</answer>"),
                                       (rewards[1], safe, BOMBS, text)):
        tags = {"<think>", "</think>", "<answer>", "</answer>", "<|user|>", "<|assistant|>",
                "<|end|>"}
        ids = ENCODING.encode(f"<|user|>{problem.question}<|assistant|>{shown}<|end|>",
                              allowed_special=tags)
        score = float(model(torch.tensor([ids])).logits[0, -1, 0])
        assert got == pytest.approx(1 / (1 + math.exp(-score)), abs=0.00501) == round(got, 2)
    too_long = r1mini.preference_reward(helpful, safe)(["x" * 5000, ""], [GRASS, BOMBS])
    assert too_long[0] > 0


def test_preference_reward_asks_no_reward_model_for_sums():
    """Where all problems are sums, no reward model is asked and every reward is nan."""
    unused = SimpleNamespace(eval=lambda: None)  # it would raise if it were asked
    rewards = r1mini.preference_reward(unused, unused)(["<answer>3</answer>"] * 2, [ASKED[4]] * 2)
    assert len(rewards) == 2 and all(map(math.isnan, rewards))


@torch.no_grad()
def test_preference_reward_reads_in_passes(monkeypatch):
    """The reward models read the replies in passes of at most PASS_TOKENS tokens, with the rewards
    of one pass."""
    judge, counts = make_judge(0), []
    judge.register_forward_pre_hook(lambda module, inputs: counts.append(inputs[0].numel()))
    texts, asked = ["green", "<answer>green</answer>"] * 4, [GRASS, BOMBS] * 4
    want = r1mini.preference_reward(judge, judge)(texts, asked)
    counts.clear()
    monkeypatch.setattr(sampling, "PASS_TOKENS", 40)
    assert r1mini.preference_reward(judge, judge)(texts, asked) == want
    assert len(counts) > 2 and max(counts) <= 40


def test_preference_reward_ignores_differences_of_noise(monkeypatch):
    """Two replies whose scores differ in the fifth digit get the same reward, so that noise makes
    no advantage."""
    monkeypatch.setattr(r1mini, "judge_scores", lambda *_: torch.tensor([1.0, 1.00001]))
    model = moe.Transformer(r1mini.PRESETS["micro"])
    reward = r1mini.preference_reward(model, model)
    first, second = reward(["<answer>green</answer>"] * 2, [GRASS] * 2)
    assert first == second == 0.73


# What models write for models


def collect_scripted(monkeypatch, tmp_path, texts, **changes):
    """collect() on scripted answers to one problem, which is tried as often as there are texts."""
    problem = tasks.make_problem(random.Random(0), 2, language="en")
    monkeypatch.setattr(r1mini, "draw_problem", lambda *_: problem)
    monkeypatch.setattr(r1mini, "sample_answers", lambda *_, **__: [
        tasks.encode_response(text.format(problem.answer)) for text in texts])
    run = nano_run(**{"data.tries": len(texts)} | changes)
    run_folder = folder.Folder(tmp_path, run, CPU, STAGES)
    documents = r1mini.collect(run_folder, "dev3", None, 1, r1mini.is_fit)
    return problem, [ENCODING.decode(d.tokens) for d in documents]


def test_collect_keeps_each_fit_answer_once(monkeypatch, tmp_path):
    """Right and readable answers go once each to a file in chat format, also after a kill, and the
    finished file is read and not written again."""
    texts = ["<think>1+2=3 then 3+4=7</think><answer>{}</answer>", "<answer>{}</answer>",
             "<think>1+2=3 ok </think><answer>{}1</answer>",
             "<think>1+2=3 ok </think><answer>{}</answer>",
             "<think>1+2=3 ok </think><answer>{}</answer>",
             "<think>1+2=3正确</think><answer>{}</answer>",
             "<think>1+2=3</think><answer>{}</answer>"]

    def kill(path, target):
        if target.name == "dev3.jsonl":
            raise RuntimeError("killed")
        os.replace(path, target)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(pathlib.Path, "replace", kill)
        collect_scripted(monkeypatch, tmp_path, texts)
    problem, kept = collect_scripted(monkeypatch, tmp_path, texts)  # after the kill it starts again
    want = [texts[i].format(problem.answer) for i in (0, 3)]
    assert kept == [f"<|user|>{problem.question}<|assistant|>{text}<|end|>" for text in want]
    assert jsonl.read_chat(tmp_path / "dev3.jsonl") == [(problem.question, text) for text in want]
    # Now the file is read, and nothing is written.
    monkeypatch.setattr(r1mini, "jsonl_dialogue", None)
    assert r1mini.collect(SimpleNamespace(run=nano_run(), path=tmp_path), "dev3", None, 1, None)
    [record] = [r for r in folder.read_log(tmp_path) if r["kind"] == "collected"]
    assert (record["stage"], record["kept"], record["of"]) == ("dev3", 2, 7)
    assert record["tokens"] == sum(
        len(tasks.encode_response(text.format(problem.answer))) for text in texts)
    assert record["prompt_tokens"] == 7 * len(tasks.encode_prompt(problem.question))


def test_collect_drops_what_no_longer_fits(monkeypatch, tmp_path):
    """A text that has more tokens than the shorter of model and student reads is left out: words
    that were sampled as one token each can be letters when they are encoded again."""
    fits = "<think>1+2=3</think><answer>{}</answer>"
    texts = ["<think>" + "1+2=3 then " * 300 + "</think><answer>{}</answer>", fits]
    monkeypatch.setattr(r1mini, "is_fit", lambda text, problem: True)
    problem, kept = collect_scripted(monkeypatch, tmp_path, texts)
    assert [text.partition("<|assistant|>")[2] for text in kept] == [
        fits.format(problem.answer) + "<|end|>"]


def test_collect_of_nothing_is_one_clear_line(monkeypatch, tmp_path):
    """Where no answer is fit the user is told in one line and no file is left; micro uses worked
    solutions instead."""
    with pytest.raises(UserError, match="none of 1 answers can be used") as error:
        collect_scripted(monkeypatch, tmp_path, ["x"])
    assert "\n" not in str(error.value) and not list(tmp_path.glob("dev3*"))
    problem, [text] = collect_scripted(monkeypatch, tmp_path / "micro", ["x"],
                                       **{"data.stand_in": "true"})
    assert tasks.accuracy(text.split("<|assistant|>")[1].removesuffix("<|end|>"), problem) == 1


def test_read_dialogues_makes_no_special_token_but_the_tags(tmp_path):
    """<|end|> that either side typed is text, the four tags are special tokens in the response
    alone, and a dialogue that is too long is refused."""
    path = tmp_path / "chat.jsonl"
    line = jsonl.jsonl_dialogue("<think>a<|end|>", "<think>b<|end|><|user|></think>")
    path.write_text(line, "utf-8")
    [document] = r1mini.read_dialogues(path, 300)
    special = [ENCODING.decode([t]) for t in document.tokens if t >= len(RANKS)]
    assert special == ["<|user|>", "<|assistant|>", "<think>", "</think>", "<|end|>"]
    learnt = ENCODING.decode([t for t, w in zip(document.tokens, document.weight) if w])
    assert learnt == "<think>b<|end|><|user|></think><|end|>"
    with pytest.raises(UserError, match="dialogue 1 has"):
        r1mini.read_dialogues(path, len(document.tokens) - 1)
