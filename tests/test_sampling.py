"""The tests of engine/sampling.py: answers written with the cache, and drafts."""
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import grpo
import tasks
from engine import sampling
from moe import make_cache
from tests.helpers import PROMPTS, make


def policy_by_loop(logits, temperature, top_p):
    """The sampling policy's probabilities at one position, by numpy and a loop."""
    p = np.exp(np.asarray(logits, np.float64) / temperature)
    p, kept, mass = p / p.sum(), np.zeros(len(p)), 0.0
    for token in np.argsort(-p):
        if mass < top_p:
            kept[token] = p[token]
        mass += p[token]
    return kept / kept.sum()


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 0.95), (1.5, 0.3), (1.0, 1e-6)])
def test_sampling_logprobs_equal_a_loop(temperature, top_p):
    """Logits are divided by the temperature first; then the smallest set of tokens whose
    probability reaches top_p is kept."""
    logits = 2 * torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    got = sampling.sampling_logprobs(logits, temperature, top_p).exp().numpy()
    want = np.stack([policy_by_loop(row, temperature, top_p) for row in logits.numpy()])
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("temperature", [1e-7, 1e-40, 5e-324])
def test_sampling_at_a_tiny_temperature_is_greedy(temperature):
    """Below COLDEST, where logits / temperature would overflow, answers and log-probabilities are
    those of temperature 0, with and without drafts."""
    model = make(init_std=0.3)
    for write in (sampling.generate, lambda *a, **k: sampling.speculate(*a, **k)[0]):
        want, got = (write(model, PROMPTS, 9, -1, 0, temperature=t) for t in (0, temperature))
        assert got.answers() == want.answers() and torch.equal(got.logprobs, want.logprobs)


@pytest.mark.parametrize("temperature", [sampling.COLDEST, 1.0, 1e30, 1e300])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 1e-40])
def test_sampling_logprobs_are_a_distribution_at_the_extremes(temperature, top_p):
    """The probabilities of every row add up to 1 at the lowest temperature that divides, at huge
    ones, and at a tiny top-p."""
    logits = 30 * torch.randn(20, tasks.VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    policy = sampling.sampling_logprobs(logits, temperature, top_p)
    torch.testing.assert_close(policy.exp().sum(-1), torch.ones(20))


@torch.no_grad()
def test_generate_greedy_equals_a_slow_loop():
    """At temperature 0 each answer is the argmax of uncached forward passes over its prompt
    alone."""
    model, end, endings = make(2, init_std=0.2), 23, []
    got = sampling.generate(model, PROMPTS, 20, end, 0, temperature=0).answers()
    for prompt, answer in zip(PROMPTS, got):
        want = []
        while len(want) < 20 and end not in want:
            want.append(int(model(torch.tensor([prompt + want])).logits[0, -1].argmax()))
        assert answer == want
        endings.append(end in want)
    assert any(endings) and not all(endings)


def test_generate_draws_tokens_as_often_as_the_policy_says():
    """A chi-square test compares the first tokens of 4000 answers with the policy's
    probabilities."""
    model = make(vocab_size=8, init_std=0.3)
    samples = sampling.generate(model, [[3, 1]] * 4000, 1, -1, 0, temperature=0.8, top_p=0.9)
    drawn = samples.tokens[:, 2]
    logits = model(torch.tensor([[3, 1]])).logits[0, -1].detach()
    want, got = 4000 * policy_by_loop(logits, 0.8, 0.9), np.bincount(drawn, minlength=8)
    assert (got > 0).tolist() == (want > 0).tolist() and (want > 0).sum() == 5
    # With 5 kept tokens 18.5 is exceeded by chance once in 1000 trials.
    assert ((got - want)[want > 0] ** 2 / want[want > 0]).sum() < 18.5


def test_generate_logprobs_equal_the_trainers():
    """The cached sampler reports for its tokens the log-probabilities that grpo.logprobs computes
    for them."""
    model = make()
    samples = sampling.generate(model, PROMPTS * 4, 30, 8, 0)
    want, _ = grpo.logprobs(model, samples.tokens, samples.answer)
    assert samples.finished.any() and not samples.finished.all()
    assert torch.quantile((samples.logprobs - want).abs(), 0.999) < 1e-4


def test_generate_rows_are_prompt_then_answer_then_padding():
    """A row is the prompt, the answer up to its end token, and padding; the mask covers the answer
    alone."""
    samples = sampling.generate(make(), PROMPTS * 4, 30, end_id=8, pad_id=0)
    rows = zip(PROMPTS * 4, samples.answers(), samples.tokens.tolist(), samples.finished)
    for prompt, answer, row, finished in rows:
        assert row == prompt + answer + [0] * (len(row) - len(prompt) - len(answer))
        assert finished == (answer[-1] == 8) and 8 not in answer[:-1]
        assert finished or len(answer) == 30


def test_generate_answers_do_not_depend_on_the_other_prompts():
    """Rows 6 and 7 get the same answers when the other prompts differ, end at other times or are
    absent."""
    model, answers = make(init_std=0.3), []
    for before, after in ((PROMPTS, []), ([[8] * 20] * 6, PROMPTS), ([[1, 2]] * 6, [[7]])):
        samples = sampling.generate(model, before + PROMPTS[:2] + after, 30, 8, 0, seed=5)
        answers.append(samples.answers()[6:8])
    assert answers[0] == answers[1] == answers[2]


def test_generate_computes_logits_of_a_prompts_last_token_only():
    """Reading the prompts computes logits for their last tokens alone, from which the first tokens
    are drawn."""
    model, seen = make(), []
    model.head.register_forward_hook(lambda module, inputs, out: seen.append(out.numel() // 24))
    sampling.generate(model, PROMPTS, 3, -1, 0)
    assert seen == [len(PROMPTS)] * 3


def tokens_of_reading(model):
    """A list to which each pass that reads prompts adds its number of tokens, padding included."""
    counts = []

    def count(module, inputs):
        if len(inputs) > 1:  # a pass that writes is given one argument by position
            counts.append(inputs[0].numel())

    model.register_forward_pre_hook(count)
    return counts


@pytest.mark.parametrize("limit, n_passes, tokens", [(2 ** 16, 1, 96), (20, 6, 16), (5, 12, 8)])
def test_generate_reads_prompts_in_passes(monkeypatch, limit, n_passes, tokens):
    """Twelve prompts of 8 tokens, padding included, are read in passes of at most `limit` tokens,
    or of one prompt. The answers, their log-probabilities and the drafts' are those of one pass."""
    model = make(init_std=0.3)
    prompts = [[*prompt, i] for i in (2, 3) for prompt in PROMPTS]
    prompts = [prompt[-8:] for prompt in prompts]
    want = [sampling.generate(model, prompts, 6, -1, 0, seed=4),
            sampling.speculate(model, prompts, 6, -1, 0, seed=4)[0]]
    counts = tokens_of_reading(model)
    monkeypatch.setattr(sampling, "PASS_TOKENS", limit)
    got = [sampling.generate(model, prompts, 6, -1, 0, seed=4),
           sampling.speculate(model, prompts, 6, -1, 0, seed=4)[0]]
    assert counts == 2 * n_passes * [tokens]
    for one_pass, several in zip(want, got):
        assert several.answers() == one_pass.answers()
        torch.testing.assert_close(several.logprobs, one_pass.logprobs)


@torch.no_grad()
def test_read_prompts_keeps_pace_with_other_processes():
    """A process that has read its prompts makes the passes that others still need, and keeps its
    own cache and logits."""
    model, (tokens, real), read = make(), sampling.pad_left(PROMPTS, 0, "cpu"), []
    counts = tokens_of_reading(model)
    for others in (0, 2):
        cache, more = make_cache(model, 6, 8), iter([True] * others + [False])
        logits = sampling.read_prompts(model, tokens, real, cache,
                                       lambda has_more: has_more or next(more))
        read.append((logits, cache.latent, cache.real))
        assert cache.length == 8
    assert counts == [48, 48, 8, 8]
    assert all(torch.equal(a, b) for a, b in zip(*read))


@given(st.lists(st.integers(1, 40), max_size=20), st.integers(1, 100))
def test_passes_of_keep_order_and_limit(lengths, limit):
    """Passes have all lists in their order. Each is within the limit, padding included, or has one
    list; and the next list would not have fitted."""
    lists = [[i] * n for i, n in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "PASS_TOKENS", limit)
        passes = sampling.reading_passes(lists)
    assert [ids for part in passes for ids in part] == lists and all(passes)
    for part, following in zip(passes, [*passes[1:], None]):
        assert len(part) == 1 or len(part) * max(map(len, part)) <= limit
        assert not following or (len(part) + 1) * max(map(len, [*part, following[0]])) > limit


def test_generate_allows_a_process_without_the_longest_prompt(monkeypatch):
    """The second of two processes, whose prompts are all shorter than the longest one, writes the
    answers that one process writes."""
    model, prompts = make(), [[5, 6, 7, 8, 9, 3], [4], [2, 2], [3, 3]]
    want = sampling.generate(model, prompts, 5, -1, 0).answers()
    monkeypatch.setattr(sampling, "rank_and_size", lambda: (1, 2))
    monkeypatch.setattr(sampling, "process_share", lambda items: items[1::2])
    monkeypatch.setattr(sampling, "gather_from_processes",
                        lambda part: part.repeat_interleave(2, 0))
    assert sampling.generate(model, prompts, 5, -1, 0).answers()[1::2] == want[1::2]


def test_generate_refuses_a_prompt_that_is_too_long():
    """A prompt and its answer may fill max_seq_len (64) and not exceed it."""
    model = make()
    assert len(sampling.generate(model, [[5] * 60], 4, -1, 0).answers()[0]) == 4
    with pytest.raises(ValueError, match="max_seq_len of 64"):
        sampling.generate(model, [[5], [5] * 61], 4, -1, 0)


def test_lay_out_equals_rows_worked_by_hand():
    """Four answers are laid out by hand: they end at the first token, at the last one or never, and
    one goes on after its end."""
    prompts, ids = [[5, 9, 5], [6], [7, 8]], [[9, 3, 9], [1, 2, 9], [1, 9, 4]]
    ids.append([1, 2, 3])
    prompts.append([4, 4])
    logp = -torch.arange(1.0, 13).view(4, 3)
    got = sampling.lay_out_samples(prompts, torch.tensor(ids), logp, 9, 0)
    assert got.tokens.tolist() == [[5, 9, 5, 9, 0], [6, 1, 2, 9, 0], [7, 8, 1, 9, 0],
                                   [4, 4, 1, 2, 3]]
    assert got.logprobs.tolist() == [[0, 0, 0, -1, 0], [0, -4, -5, -6, 0], [0, 0, -7, -8, 0],
                                     [0, 0, -10, -11, -12]]
    assert got.answers() == [[9], [1, 2, 9], [1, 9], [1, 2, 3]]
    assert got.finished.tolist() == [True, True, True, False]


# -------------------------------------------------------------------------------------------------
# Drafts


def test_speculate_greedy_equals_generate():
    """At temperature 0 speculative decoding writes what generate writes, with some drafts accepted
    and some rejected."""
    model = make()
    with torch.no_grad():
        model.head.weight *= 8.0  # so that some drafts are right
    want = sampling.generate(model, PROMPTS, 12, 5, 0, temperature=0)
    got, accepted = sampling.speculate(model, PROMPTS, 12, 5, 0, temperature=0)
    assert got.answers() == want.answers() and 0 < accepted < 1
    assert torch.equal(got.finished, want.finished)
    torch.testing.assert_close(got.logprobs[got.answer], want.logprobs[want.answer])


@torch.no_grad()
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_speculate_keeps_the_distribution(top_p):
    """A chi-square test compares 6000 answers of three tokens with their exact probabilities
    (Leviathan et al. 2023)."""
    model, prompt, n = make(vocab_size=6), [4, 3, 1], 6000
    model.head.weight *= 3.0
    exact = {(): 1.0}
    for _ in range(3):
        longer = {}
        for row in exact:
            logits = model(torch.tensor([[*prompt, *row]])).logits[:, -1]
            policy = sampling.sampling_logprobs(logits, 1.0, top_p)[0].exp()
            for token, p in enumerate(policy.tolist()):
                longer[(*row, token)] = exact[row] * p
        exact = longer
    samples, accepted = sampling.speculate(model, [prompt] * n, 3, -1, 0, top_p=top_p, seed=3)
    assert 0.1 < accepted < 0.9  # drafts were both accepted and rejected
    counts = Counter(map(tuple, samples.answers()))
    often = {row: n * p for row, p in exact.items() if n * p > 8}
    others = n - sum(often.values())
    chi = sum((counts[row] - want) ** 2 / want for row, want in often.items())
    chi += (n - sum(counts[row] for row in often) - others) ** 2 / max(others, 1.0)
    assert len(often) > 20 and chi < len(often) + 4 * (2 * len(often)) ** 0.5
    for row, logp, answer in zip(samples.answers()[:20], samples.logprobs, samples.answer):
        p = math.exp(float(logp[answer].sum()))
        assert p == pytest.approx(exact[tuple(row)], rel=1e-3)
