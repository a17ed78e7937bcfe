"""workshop/zero.py: equations as in grpo.py, sampling as without a cache, and it learns."""
import random

import pytest
import torch

import grpo
from workshop import zero


@pytest.fixture
def rollout():
    """Random log-probabilities (N, T) near each other, advantages (N, 1) and a mask (N, T)."""
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(12, 9, generator=generator)
    new = old + 0.3 * torch.randn(12, 9, generator=generator)
    reference = old + 0.3 * torch.randn(12, 9, generator=generator)
    advantage = torch.randn(12, 1, generator=generator)
    lengths = torch.randint(1, 10, (12, 1), generator=generator)
    return new.requires_grad_(), old, reference, advantage, torch.arange(9) < lengths


def loss_of_grpo_module(new, old, reference, advantage, mask):
    """grpo.py's loss of the same tensors."""
    settings = grpo.RL(clip_low=zero.CLIP, clip_high=zero.CLIP, beta=zero.BETA)
    batch = grpo.Batch(answers=len(new), tokens=int(mask.sum()))
    return -grpo.grpo(new, old, reference, advantage.squeeze(1), mask, batch, settings)[0]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return zero.Transformer()


@pytest.fixture
def questions():
    random.seed(0)
    return [zero.draw_problem(4)[0] for _ in range(40)]


def test_zero_advantages_equal_grpo_module():
    rewards = torch.tensor([[1.1, 0.1, 0.1, 0.0], [1.1, 1.1, 1.1, 1.1], [0.1, 0.1, 0.1, 0.1],
                            [1.1, 1.1, 1.1, 0.0]])
    torch.testing.assert_close(zero.advantages(rewards), grpo.advantages(rewards))


def test_zero_advantages_by_hand():
    """One right answer of 16: 15/16 above the mean, and the standard deviation is 1/4."""
    rewards = torch.tensor([[1.0] + 15 * [0.0]])
    expected = torch.tensor([[3.75] + 15 * [-0.25]])
    torch.testing.assert_close(zero.advantages(rewards), expected)


def test_zero_loss_and_gradient_equal_grpo_module(rollout):
    ours, theirs = zero.grpo_loss(*rollout), loss_of_grpo_module(*rollout)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, rollout[0]),
                               torch.autograd.grad(theirs, rollout[0]))


def test_zero_tokens_behind_the_answer_have_no_gradient(rollout):
    gradient, = torch.autograd.grad(zero.grpo_loss(*rollout), rollout[0])
    assert (gradient[~rollout[4]] == 0).all() and (gradient[rollout[4]] != 0).any()


def test_zero_cached_sampling_equals_uncached_model(model, questions):
    _, tokens, logprobs, mask = zero.sample(model, questions)
    with torch.no_grad():
        uncached = zero.answer_logprobs(model, tokens, mask.size(1))
    torch.testing.assert_close(logprobs[mask], uncached[mask])


def test_zero_mask_ends_with_the_full_stop(model, questions):
    texts, tokens, _, mask = zero.sample(model, questions)
    ended = 0
    for text, ids, real in zip(texts, tokens[:, -mask.size(1):].tolist(), mask.tolist()):
        whole = "".join(zero.CHARACTERS[i] for i in ids)
        length = whole.index(".") + 1 if "." in whole else len(whole)
        assert text == whole[:length]
        assert real == [True] * length + [False] * (len(ids) - length)
        ended += text.endswith(".")
    assert ended > 0  # an untrained model draws the full stop often


@pytest.mark.parametrize("answer, expected", [
    ("<25-7=18;18+9=27;27+6=33>33.", 1.1), ("<>33.", 1.1), ("<>34.", 0.1), ("<>33", 0.0),
    ("<>033.", 0.1), (">33.", 0.0), ("<33.", 0.0), ("<>.", 0.0), ("", 0.0), ("<>3>33.", 0.0)])
def test_zero_reward_reads_form_and_result(answer, expected):
    assert zero.reward(answer, [25, -7, 9, 6]) == expected


def test_zero_worked_documents_are_right_without_slips(monkeypatch):
    """A worked answer's steps follow the question, and its result is that of Python."""
    monkeypatch.setattr(zero, "slip", lambda number, chance: number)
    random.seed(0)
    worked = 0
    for question, answer in (zero.write_document() for _ in range(300)):
        thinking, result = answer[1:-1].split(">")
        total = sum(int(n) for n in zero.re.findall(r"[+-]?\d+", question[:-1]))
        assert int(result) == total and zero.reward(answer, [total]) == 1.1
        for step in filter(None, thinking.split(";")):
            left, right = step.split("=")
            assert sum(int(n) for n in zero.re.findall(r"[+-]?\d+", left)) == int(right)
            worked += 1
    assert worked > 100


def test_zero_trains_on_no_held_out_problem(monkeypatch, model):
    """Training asks draw_problem only. The two kinds of questions share none."""
    trained_on, draw_problem = set(), zero.draw_problem

    def recorded(operations, held_out=False):
        assert not held_out
        problem = draw_problem(operations)
        trained_on.add(problem[0])
        return problem
    monkeypatch.setattr(zero, "draw_problem", recorded)
    for name, value in {"STEPS": 3, "ROLLOUTS": 2, "G": 2}.items():
        monkeypatch.setattr(zero, name, value)
    random.seed(0)
    zero.pretrain(model)
    zero.reinforce(model)
    held_out = {draw_problem(n, held_out=True)[0] for n in range(1, 6)
                for _ in range(400)}
    assert len(trained_on) > 200 and not trained_on & held_out


def test_zero_pretraining_learns(monkeypatch, model):
    def loss():
        random.seed(1)
        documents = [zero.write_document() for _ in range(64)]
        tokens = zero.encode([question + answer for question, answer in documents])
        targets = zero.encode([" " * len(question) + answer for question, answer in documents])
        with torch.no_grad():
            logits = model(tokens[:, :-1], [[], [], []]).flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, targets[:, 1:].flatten(), ignore_index=0)
    before = loss()
    monkeypatch.setattr(zero, "STEPS", 20)
    zero.pretrain(model)
    assert loss() < 0.7 * before


def test_zero_reinforcement_learns(monkeypatch, model, questions):
    """Paid for the share of 7 in an answer, an untrained model comes to write more of them."""
    def share_of_7():
        torch.manual_seed(1)
        texts = "".join(zero.sample(model, questions)[0])
        return texts.count("7") / len(texts)
    monkeypatch.setattr(zero, "reward", lambda answer, _: answer.count("7") / len(answer))
    before = share_of_7()
    for name, value in {"ROLLOUTS": 8, "P": 6}.items():
        monkeypatch.setattr(zero, name, value)
    zero.reinforce(model)
    assert share_of_7() > 2 * before


def test_zero_main_measures_and_shows_held_out_problems(monkeypatch, capsys):
    for name, value in {"STEPS": 2, "ROLLOUTS": 1, "P": 2}.items():
        monkeypatch.setattr(zero, name, value)
    result = zero.main(3)
    assert set(result) == {"base.pass@1", "zero.pass@1", "length_ratio", "seconds"}
    printed = capsys.readouterr().out
    assert printed.count("    base ") == 3 == printed.count("    zero ")
