"""Tests of tools/flops.py: torch's counter on real models, and hand counts of logs."""
import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import moe
import r1mini
from engine import kernels
from tools.flops import flops_by_stage, flops_per_token

B, T = 2, 12
CONFIGS = {
    "nano": r1mini.PRESETS["nano"], "student": r1mini.PRESETS["student"],
    "dense with MTP": dataclasses.replace(r1mini.PRESETS["student"], n_mtp_layers=1),
    "V3 in small": dataclasses.replace(
        moe.V3, vocab_size=97, dim=32, inter_dim=48, moe_inter_dim=24, n_layers=4, n_heads=3,
        n_routed_experts=16, q_lora_rank=20, kv_lora_rank=12, qk_nope_head_dim=10,
        qk_rope_head_dim=6, v_head_dim=14, max_seq_len=64)}


@pytest.fixture(autouse=True)
def products_that_torch_counts(monkeypatch):
    """torch's counter knows neither the grouped product nor the fused attention of a CPU. So the
    model takes its other path: the loop over experts, and written-out attention."""
    monkeypatch.setattr(kernels, "has_grouped_product", lambda x: False)
    monkeypatch.setattr(kernels, "fused_attention_is_slow", lambda q: True)


def counted(call):
    """FLOPs that torch counts in a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def model_and_tokens(config):
    """A model, and a batch of random tokens."""
    torch.manual_seed(0)
    return moe.Transformer(config), torch.randint(config.vocab_size, (B, T))


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_to_read_and_to_learn_equal_torch(name):
    """A forward pass, and a forward and backward pass, take what torch counts, to the last product.
    torch counts the whole square of attention scores, so each token sees all T."""
    config = CONFIGS[name]
    model, tokens = model_and_tokens(config)
    assert counted(lambda: model(tokens)) == B * T * flops_per_token(config, "read", seen=T)
    assert counted(lambda: model(tokens).logits.sum().backward()) == (
        B * T * flops_per_token(config, "learn", seen=T))


@pytest.mark.parametrize("name", [name for name, c in CONFIGS.items() if c.n_mtp_layers])
def test_flops_to_learn_with_mtp_equal_torch(name):
    """V3's training loss on whole rows takes what torch counts. MTP reads T - 1 tokens. The next
    token is predicted at T - 1 positions, and the one after it at T - 2, so each use of the head
    has one token less."""
    config = CONFIGS[name]
    model, tokens = model_and_tokens(config)
    ones = torch.ones_like(tokens)

    def step():
        loss, _ = moe.supervised_loss(model, tokens, ones, ones.float(), B * (T - 1), B)
        loss.backward()

    main = T * flops_per_token(config, "learn", seen=T)
    mtp = flops_per_token(config, "learn", mtp=True, seen=T - 1) - flops_per_token(
        config, "learn", seen=T - 1)
    head = 6 * config.vocab_size * config.dim
    assert counted(step) == B * (main + (T - 1) * mtp - 2 * head)


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_to_write_equal_torch(name):
    """One token after T others in the cache takes what torch counts. It sees T + 1 tokens."""
    config = CONFIGS[name]
    model, tokens = model_and_tokens(config)
    cache = moe.make_cache(model.eval(), B, T + 1)
    with torch.no_grad():
        model(tokens, cache=cache)
        new = counted(lambda: model(tokens[:, :1], cache=cache))
    assert new == B * flops_per_token(config, "write", seen=T + 1)


def test_flops_by_stage_equal_hand_count():
    """By hand, with N weights in products. Each kind of record: a supervised step (6 N, MTP's N
    included), RL (2 N to write; 2 N to read each prompt once for its group of 16; 6 N and the
    reference's 2 N to learn), samples, distillation, a reward model with a head of one output."""
    run = r1mini.Run()
    N, small = (sum(p.numel() // (4 if ".experts." in name else 1)  # a token uses 2 of 8
                    for name, p in moe.Transformer(c).named_parameters()
                    if p.dim() > 1 and not name.startswith(("mtp.", "embed.")))
                for c in (run.model, run.student))
    head = run.model.vocab_size * run.model.dim
    model = moe.Transformer(run.model)
    mtp = head + sum(p.numel() // (4 if ".experts." in name else 1)
                     for name, p in model.mtp.named_parameters() if p.dim() > 1)
    log = [{"kind": "config"} | dataclasses.asdict(run),
           {"kind": "zero", "tokens": 700, "prompt_tokens": 320, "learnt_tokens": 400},
           {"kind": "base", "tokens": 50}, {"kind": "base", "tokens": 30}, {"kind": "dev"},
           {"kind": "sft", "tokens": 7}, {"kind": "helpful", "tokens": 11},
           {"kind": "student_rl_no_format", "tokens": 10, "prompt_tokens": 0, "learnt_tokens": 10},
           {"kind": "distill", "tokens": 50}, {"kind": "distill_logits", "tokens": 5},
           {"kind": "collected", "stage": "distill", "tokens": 9, "prompt_tokens": 6}]
    expected = {"zero": (2 * 700 + 2 * 320 / 16 + 8 * 400) * N, "base": 6 * 80 * (N + mtp),
                "sft": 6 * 7 * (N + mtp), "helpful": 6 * 11 * (N - head + run.model.dim),
                "student_rl_no_format": (2 * 10 + 8 * 10) * small,
                "distill": 6 * 50 * small, "distill_logits": 5 * (6 * small + 2 * N),
                "collect_distill": 2 * (9 + 6 / 2) * N}
    assert flops_by_stage(log) == pytest.approx({k: x / 1e12 for k, x in expected.items()})
    log[0]["zero"]["beta"] = 0.0
    assert flops_by_stage(log)["zero"] == pytest.approx(
        (2 * 700 + 2 * 320 / 16 + 6 * 400) * N / 1e12)
    log[0]["model"]["mtp_weight"] = 0.0  # supervised_loss then leaves MTP out
    assert flops_by_stage(log)["base"] == pytest.approx(6 * 80 * N / 1e12)
