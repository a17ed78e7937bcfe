"""The tests of sampling in fixed shapes: against grpo.generate, on the CPU, without a graph."""
import dataclasses
from types import SimpleNamespace

import pytest
import torch

import grpo
import moe
from extras import graphs

MICRO = dataclasses.replace(moe.PRESETS["micro"], vocab_size=40, init_std=0.2, max_seq_len=64)


def make(seed=0, **sizes):
    """A small model of random weights."""
    torch.manual_seed(seed)
    return moe.Transformer(dataclasses.replace(MICRO, **sizes)).eval()


PROMPTS = [[5, 6, 7], [8] * 9, [3, 4], [3, 4], [9, 1, 2, 30, 31]]


def test_what_cuda_can_record(monkeypatch):
    """bfloat16 from Hopper on; by a GPU that is not there."""
    def model(kind, dtype):
        weight = SimpleNamespace(device=torch.device(kind))
        return SimpleNamespace(head=SimpleNamespace(weight=weight), compute_dtype=dtype)
    for capability, hopper in (((9, 0), True), ((8, 9), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        assert graphs.recordable(model("cuda", torch.bfloat16)) == hopper
        assert not graphs.recordable(model("cuda", torch.float32))
        assert not graphs.recordable(model("cpu", torch.bfloat16))


@pytest.mark.parametrize("ends, temperature", [(False, 1.0), (True, 1.0), (True, 0.0), (True, 0.6)])
def test_the_same_tokens_as_generate(ends, temperature):
    """Prompts of all lengths, ends at different times or never, to the last log-probability."""
    model, end = make(), -1
    if ends:
        end = grpo.generate(model, PROMPTS, 40, -1, 0, temperature, seed=3).answers()[0][5]
    want = grpo.generate(model, PROMPTS, 40, end, 0, temperature, seed=3)
    got = graphs.generate(model, PROMPTS, 40, end, 0, temperature, seed=3)
    assert got.answers() == want.answers() and torch.equal(got.finished, want.finished)
    for name in ("tokens", "answer"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    torch.testing.assert_close(got.logprobs, want.logprobs, atol=1e-5, rtol=0)
    assert bool(want.finished.any()) == ends


def test_what_is_not_filled_is_not_seen():
    """Garbage in the columns to come changes nothing."""
    model, fed = make(1), torch.tensor([[5], [6]])
    read, outs = moe.make_cache(model, 2, 3), []
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3], [4, 5, 6]]), None, read)
        for garbage in (0.0, 1e3):
            cache = graphs.Static(model, 2, 8)
            cache.latent.fill_(garbage)
            cache.take(read)
            outs.append(model(fed, None, cache).logits)
            cache.settle()
            outs.append(model(fed, None, cache).logits)
    assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[3])
    assert not torch.allclose(outs[0], outs[1])


def test_shapes_and_addresses_stay():
    """What a graph needs: each step finds its tensors where the last one did."""
    model, seen = make(2), []
    hook = model.layers[1].attn.register_forward_hook(
        lambda module, inputs, out: seen.append((inputs[2].data_ptr(), inputs[2].shape)))
    graphs.generate(model, PROMPTS, 12, -1, 0)
    hook.remove()
    assert len(seen) == 12 and len(set(seen[1:])) == 1


def test_a_prompt_too_long_is_said():
    """As generate says it."""
    with pytest.raises(moe.UserError, match="exceed the model's max_seq_len of 64"):
        graphs.generate(make(), [[1] * 60], 12, -1, 0)
