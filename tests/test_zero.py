"""workshop/zero.py: equations as in grpo.py, sampling as without a cache, and it learns."""
import random
import tokenize

import pytest
import torch

import grpo
from studies import zero_one_file
from workshop import zero


def grpo_module_loss(new, old, reference, A, mask):
    """grpo.py's loss of the same tensors."""
    settings = grpo.RL(clip_low=zero.CLIP, clip_high=zero.CLIP, beta=zero.BETA)
    batch = grpo.Batch(answers=len(new), tokens=int(mask.sum()))
    J, _ = grpo.grpo(new, old, reference, A.squeeze(1), mask.float(), batch, settings)
    return -J


@pytest.fixture
def rollout():
    """Random log-probabilities (N, T) near each other, advantages (N, 1) and a mask (N, T)."""
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(12, 9, generator=generator)
    new = old + 0.3 * torch.randn(12, 9, generator=generator)
    reference = old + 0.3 * torch.randn(12, 9, generator=generator)
    A = torch.randn(12, 1, generator=generator)
    lengths = torch.randint(1, 10, (12, 1), generator=generator)
    return new.requires_grad_(), old, reference, A, torch.arange(9) < lengths


@pytest.fixture
def model():
    random.seed(0)
    torch.manual_seed(0)
    return zero.Transformer()


@pytest.fixture
def questions():
    random.seed(0)
    return [zero.draw_problem(4)[0] for _ in range(40)]


def test_zero_file_is_short():
    lines = zero_one_file.FILE.read_text("utf-8").splitlines()
    assert len(lines) <= 220 and max(map(len, lines)) <= 92
    with tokenize.open(zero_one_file.FILE) as file:
        assert ";" not in [token.string for token in tokenize.generate_tokens(file.readline)]


def test_zero_advantages_equal_grpo_module():
    rewards = torch.tensor([[1.1, 0.1, 0.1, 0.0], [1.1, 1.1, 1.1, 1.1], [0.1, 0.1, 0.1, 0.1],
                            [1.1, 1.1, 1.1, 0.0]])
    torch.testing.assert_close(zero.advantages(rewards), grpo.advantages(rewards))


def test_zero_advantages_of_equal_rewards_are_zero():
    for value in (0.0, 0.1, 1.1):
        assert (zero.advantages(torch.full((3, 16), value)) == 0).all()


def test_zero_advantages_by_hand():
    rewards = torch.tensor([[1.0] + 15 * [0.0]])
    expected = torch.tensor([[3.75] + 15 * [-0.25]])  # by hand: G = 16, one right
    torch.testing.assert_close(zero.advantages(rewards), expected)


def test_zero_loss_equals_grpo_module(rollout):
    torch.testing.assert_close(zero.grpo_loss(*rollout), grpo_module_loss(*rollout))


def test_zero_gradient_equals_grpo_module(rollout):
    zero_gradient, = torch.autograd.grad(zero.grpo_loss(*rollout), rollout[0])
    grpo_gradient, = torch.autograd.grad(grpo_module_loss(*rollout), rollout[0])
    torch.testing.assert_close(zero_gradient, grpo_gradient)


@pytest.mark.parametrize("advantage, ratio, moves", [(1.0, 1.3, False), (1.0, 0.7, True),
                                                     (-1.0, 1.3, True), (-1.0, 0.7, False)])
def test_zero_clip_stops_only_what_has_gone_far_enough(advantage, ratio, moves):
    old = torch.tensor([[-1.0]])
    new = (old + torch.tensor(ratio).log()).requires_grad_()
    A, mask = torch.tensor([[advantage]]), torch.tensor([[True]])
    loss = zero.grpo_loss(new, old, new.detach(), A, mask)
    gradient, = torch.autograd.grad(loss, new)  # the reference equals the policy: no KL gradient
    assert (gradient.abs().item() > 1e-6) == moves


def test_zero_padding_has_no_gradient(rollout):
    gradient, = torch.autograd.grad(zero.grpo_loss(*rollout), rollout[0])
    assert (gradient[~rollout[4]] == 0).all()
    assert (gradient[rollout[4]] != 0).any()


def test_zero_cached_sampling_equals_uncached_model(model, questions):
    _, tokens, logprobs, mask = zero.sample(model, questions)
    with torch.no_grad():
        uncached = zero.answer_logprobs(model, tokens, mask.size(1))
    torch.testing.assert_close(logprobs[mask], uncached[mask])


def test_zero_model_is_causal_and_knows_positions(model):
    """A later token changes nothing before it. Exchanging two earlier ones changes what follows,
    even with one block: without positions that would see a set of tokens."""
    model.blocks = model.blocks[:1]
    tokens = zero.encode(["25-7+9=<>27."])
    changed, exchanged = tokens.clone(), tokens.clone()
    changed[0, 8] = 1
    exchanged[0, [0, 1]] = tokens[0, [1, 0]]
    with torch.no_grad():
        a, b, c = (model(x, [[]]) for x in (tokens, changed, exchanged))
    torch.testing.assert_close(a[:, :8], b[:, :8])
    assert (a[:, -1] - c[:, -1]).abs().max() > 1e-4


def test_zero_mask_ends_with_the_full_stop(model, questions):
    texts, tokens, _, mask = zero.sample(model, questions)
    ended = 0
    for ids, real, text in zip(tokens[:, -mask.size(1):].tolist(), mask.tolist(), texts):
        written = "".join(zero.CHARACTERS[i] for i in ids)
        length = written.index(".") + 1 if "." in written else len(written)
        assert text == written[:length]
        assert real == [True] * length + [False] * (len(written) - length)
        ended += text.endswith(".")
    assert ended > 0  # an untrained model draws the full stop often


@pytest.mark.parametrize("answer, expected", [
    ("<25-7=18;18+9=27;27+6=33>33.", 1.1), ("<>33.", 1.1), ("<>34.", 0.1), ("<>33", 0.0),
    ("<>033.", 0.1), (">33.", 0.0), ("<33.", 0.0), ("<>.", 0.0), ("", 0.0), ("<>3>33.", 0.0)])
def test_zero_reward_reads_form_and_result(answer, expected):
    assert zero.reward(answer, [25, -7, 9, 6]) == expected


def test_zero_documents_are_sums_with_mistakes():
    """Most answers are guesses. Of the steps one in five is wrong, and mistakes are carried on."""
    random.seed(0)
    documents = [zero.write_document() for _ in range(2000)]
    steps, wrong = 0, 0
    for question, answer in documents:
        total = None
        for step in zero.re.findall(r"\d+[+-]\d=\d+", answer):
            left, result = step.split("=")
            before, number = zero.re.fullmatch(r"(\d+)([+-]\d)", left).groups()
            assert total in (None, int(before))
            total = int(result)
            steps += 1
            wrong += int(before) + int(number) != total
        assert total is None or answer.endswith(f">{total}.")
        assert zero.re.fullmatch(r"\d\d([+-]\d)+=", question)
    assert 0.57 < sum("<>" in answer for _, answer in documents) / len(documents) < 0.63
    assert 0.17 < wrong / steps < 0.23


@pytest.fixture
def drawn(monkeypatch):
    """The problems that are drawn: {held_out: questions}."""
    questions = {True: set(), False: set()}
    draw_problem = zero.draw_problem

    def recorded(operations, held_out=False):
        problem = draw_problem(operations, held_out)
        questions[held_out].add(problem[0])
        return problem
    monkeypatch.setattr(zero, "draw_problem", recorded)
    for name, value in {"STEPS": 2, "ROLLOUTS": 5, "P": 4, "G": 4}.items():
        monkeypatch.setattr(zero, name, value)
    return questions


def test_zero_trains_on_no_held_out_problem(drawn, capsys):
    """The whole run: 500 problems are held out for the test, and no training problem is of their
    class."""
    result = zero.main(seed=3)
    assert set(result) == {"base.pass@1", "zero.pass@1", "length_ratio", "seconds"}
    assert len(drawn[True]) > 490 and len(drawn[False]) > 150
    assert all(sum(question.encode()) % 8 == 0 for question in drawn[True])
    assert all(sum(question.encode()) % 8 != 0 for question in drawn[False])
    printed = capsys.readouterr().out
    assert printed.count("    base ") == printed.count("    zero ") == 3


def test_zero_pretraining_learns_answers_only(model, monkeypatch):
    """The loss of answers falls. Questions and padding are no targets, so they stay unlearnt."""
    random.seed(1)
    documents = [zero.write_document() for _ in range(64)]
    tokens = zero.encode([question + answer for question, answer in documents])
    width = tokens.size(1)
    answer = torch.tensor([[len(q) <= i < len(q + a) for i in range(1, width)]
                           for q, a in documents])
    others = torch.tensor([[i < len(q) for i in range(1, width)] for q, _ in documents])
    padding = ~(answer | others)

    def losses():
        with torch.no_grad():
            logprobs = zero.answer_logprobs(model, tokens, width - 1)
        return [-logprobs[kind].mean() for kind in (answer, others, padding)]
    before = losses()
    monkeypatch.setattr(zero, "STEPS", 25)
    zero.pretrain(model)
    after = losses()
    assert after[0] < 0.8 * before[0]
    assert after[1] > 0.95 * before[1] and after[2] > 0.95 * before[2]


def test_zero_reinforcement_learns(model, questions, monkeypatch):
    """Paid for the share of 7 in an answer, an untrained model comes to write more of them."""
    def share_of_7():
        torch.manual_seed(1)
        texts = zero.sample(model, questions)[0]
        return sum(text.count("7") for text in texts) / sum(map(len, texts))
    monkeypatch.setattr(zero, "reward", lambda answer, numbers: answer.count("7") / len(answer))
    monkeypatch.setattr(zero, "ROLLOUTS", 10)
    monkeypatch.setattr(zero, "P", 4)
    before = share_of_7()
    zero.reinforce(model)
    assert share_of_7() > 3 * before


def test_zero_groups_hold_one_question(model, monkeypatch):
    """A row of the rewards (P, G) has the answers to one question. Here the reward is the
    question's first number."""
    seen = []
    monkeypatch.setattr(zero, "reward", lambda answer, numbers: float(numbers[0]))
    monkeypatch.setattr(zero, "advantages", lambda rewards: seen.append(rewards) or rewards * 0)
    for name, value in {"ROLLOUTS": 1, "P": 6, "G": 3}.items():
        monkeypatch.setattr(zero, name, value)
    zero.reinforce(model)
    assert seen[0].shape == (6, 3)
    assert (seen[0] == seen[0][:, :1]).all() and len(set(seen[0][:, 0].tolist())) > 1


def test_zero_study_reads_the_last_line(tmp_path, monkeypatch):
    """The study runs the file with the seed as its only argument and reads the dict it prints."""
    file = tmp_path / "zero.py"
    file.write_text("import sys\nprint('rollout 5')\n"
                    "print({'base.pass@1': 0.2, 'seconds': float(sys.argv[1])})\n", "utf-8")
    monkeypatch.setattr(zero_one_file, "FILE", file)
    assert zero_one_file._run(7) == {"base.pass@1": 0.2, "seconds": 7.0}
    file.write_text("raise SystemExit(3)", "utf-8")
    with pytest.raises(zero_one_file.UserError, match="exit code 3"):
        zero_one_file._run(7)


def test_zero_study_page_names_the_worst_seed():
    values = {"base.pass@1": (0.2, 0.3), "zero.pass@1": (0.8, 0.9), "length_ratio": (2.0, 2.2),
              "seconds": (150, 160)}
    rows = {f"one.{key}": {"mean": sum(pair) / 2, "std": 0.0,
                           "per_seed": {"0": pair[0], "1": pair[1]}}
            for key, pair in values.items()}
    text = "\n".join(zero_one_file.page(rows, {}))
    assert "from 25.0% to 85.0% (the worst seed: 80.0%)" in text and "2.1 times" in text
