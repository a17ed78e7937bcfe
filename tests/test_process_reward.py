"""Tests of the study of process rewards: steps, labels, advantages, shared prefixes, the budget."""
import random
from types import SimpleNamespace

import pytest
import torch

import grpo
import tasks
from engine.sampling import lay_out_samples, pad_right
from studies import process_reward
from tests.helpers import make_judge, run_arm, use_random_micro
from tools.settings import resolve_settings

FEW = ["zero.problems=2", "zero.group_size=2", "zero.minibatches=1", "zero.max_new_tokens=9",
       "eval.problems=4", "eval.fewer_samples=1", "judge.steps=2", "judge.documents=4"]
RUN = resolve_settings("micro", FEW)
PROBLEM = tasks.Problem("Compute 25-7+9", "27", "en", 2, "25-7+9")
CHECKED = "<think>25-7=18 check 18+7=25 ok 18+9=27 check 27-9=18</think><answer>27</answer>"


@pytest.fixture
def model(monkeypatch, tmp_path):
    """The random model that the study takes for the kept one."""
    return use_random_micro(process_reward, monkeypatch, tmp_path)


def ids_of(text):
    """The token ids of a response."""
    return tasks.encode_response(text)


@pytest.mark.parametrize("text, rewards", [
    (CHECKED, [1, 1, 1]),
    ("<think>25-7=18 then 18+9=27</think><answer>27</answer>", [1, 1, 1]),
    ("<think>25-7=18然后18+9=27</think>答案就是<answer>27</answer>", [1, 1, 1]),
    ("<think>25-7=17 check 17+7=24 wait 25-7=18 check 18+7=25 ok 18+9=27</think>"
     "<answer>27</answer>", [1, 1, 1]),
    ("<think>25-7=17检查17+7=24等等25-7=18正确18+9=27</think><answer>27</answer>", [1, 1, 1]),
    ("<think>25-7=17 then 17+9=26</think><answer>26</answer>", [0, 0, 0]),
    ("<think>25-7=17 then 18+9=27</think><answer>27</answer>", [0, 1, 1]),
    ("<think>25-7=18 then 25-7=18 then 18+9=27</think><answer>27</answer>", [1, 0, 0, 1]),
    ("<think>25-7=18 then 18+9=27 then 27+0=27</think><answer>27</answer>", [1, 1, 0, 1]),
    ("<think>25-7=18 check 18+7=25</think><answer>18</answer>", [1, 0]),
    ("<think></think><answer>27</answer>", [0, 1]),
    ("<answer>27</answer>", [1]),
    ("25-7=18 then 18+9=27 then ", [1, 1, 0])])
def test_process_reward_right_steps(text, rewards):
    """By hand: a step for each link, one for the end of the thinking, and one for the answer."""
    assert process_reward._right_steps(ids_of(text), PROBLEM) == rewards
    assert len(process_reward._step_ends(ids_of(text))) == len(rewards)


def test_process_reward_steps_of_workings():
    """All steps of a worked solution are right, whatever slips it corrects."""
    rng = random.Random(0)
    for problem in tasks.make_problems("train", 40, (3, 4, 5, 6)):
        for style in ("steps", "checked"):
            slips = 0.5 if style == "checked" else 0.0
            thinking, answer = tasks.write_working(problem, style, rng, slips, foreign=0.3)
            rewards = process_reward._right_steps(ids_of(tasks.response(thinking, answer)), problem)
            assert rewards == [1.0] * (problem.level + 1)


def test_process_reward_advantages_by_a_slow_loop():
    """DeepSeekMath 4.1.3, token by token. Nothing before the answers has an advantage."""
    rewards, ends = [[1.0, 0.5], [0.0], [1.0, 1.0, 0.25]], [[1, 4], [2], [0, 3, 5]]
    found = process_reward._process_advantages(rewards, ends, first=2, T=9)
    flat = torch.tensor(sum(rewards, []))
    for i in range(3):
        for t in range(9):
            later = [r for r, end in zip(rewards[i], ends[i]) if 2 <= t <= end + 2]
            expected = sum((r - float(flat.mean())) / float(flat.std()) for r in later)
            assert float(found[i, t]) == pytest.approx(expected, abs=1e-6)
    assert not process_reward._process_advantages([[0.3], [0.3, 0.3]], [[1], [0, 1]], 0, 3).any()


def test_process_reward_of_one_step_is_the_outcomes():
    """With one reward an answer, each of its tokens has GRPO's advantage."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5])
    found = process_reward._process_advantages([[r] for r in rewards.tolist()],
                                               [[3], [1], [2], [3], [0]], 0, 4)
    assert torch.allclose(found[:, 0], grpo.advantages(rewards.unsqueeze(0))[0])
    assert torch.equal(found[0], found[0, :1].expand(4)) and found[4, 1] == 0


def test_process_reward_token_objective_is_grpo_for_equal_tokens():
    """With the same advantage at all tokens of an answer it is grpo.grpo; padded columns do not
    count."""
    torch.manual_seed(1)
    new, old, reference = torch.randn(3, 4, 6)
    mask = (torch.arange(6) < torch.tensor([[6], [2], [5], [4]])).float()
    A, batch = torch.randn(4), grpo.Batch(8, 17)
    expected, info = grpo.grpo(new, old, reference, A, mask, batch, RUN.zero)
    found, found_info = process_reward._token_grpo(
        new, old, reference, A.unsqueeze(1).expand(4, 9), mask, batch, RUN.zero)
    assert torch.allclose(found, expected)
    assert all(torch.equal(info[key], found_info[key]) for key in info)


def prefix_groups():
    """Tokens and answers (5, 7) of a group behind a prompt of two tokens, with common prefixes."""
    rows = [[1, 1, 4, 5, 6, 7, 2], [1, 1, 4, 5, 6, 8, 2], [1, 1, 4, 5, 9, 7, 2],
            [1, 1, 4, 5, 6, 7, 2], [1, 1, 3, 5, 6, 7, 2]]
    tokens = torch.tensor(rows)
    return tokens, (torch.arange(7) >= 2).expand(5, 7)


def test_process_reward_shared_prefixes_by_a_slow_loop():
    """Each pair of answers, token by token. Answers may end early."""
    tokens, answer = prefix_groups()
    answer = answer.clone()
    answer[1, 5:] = answer[2, 6:] = False
    found = process_reward._sharing_answers(tokens, answer)
    for i in range(5):
        for t in range(7):
            count = sum(bool(answer[i, t] and answer[j, t]
                             and torch.equal(tokens[i, :t + 1], tokens[j, :t + 1]))
                        for j in range(5))
            assert found[i, t] == count


def test_process_reward_that_grpo_contains():
    """GRPO's gradient is that of the mean advantage of all answers that share a token's prefix
    (arXiv 2509.21154, Theorem 1): here in a table of bigrams, for answers of one length."""
    tokens, answer = prefix_groups()
    advantage = grpo.advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0]]))[0]
    mean = torch.zeros(5, 7)
    for i in range(5):
        for t in range(2, 7):
            mean[i, t] = advantage[[j for j in range(5) if torch.equal(
                tokens[i, :t + 1], tokens[j, :t + 1])]].mean()
    gradients = []
    for A in (advantage.unsqueeze(1).expand(5, 7), mean):
        table = torch.randn(10, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
        logp = table.log_softmax(-1)[tokens.roll(1, 1), tokens]
        J, _ = process_reward._token_grpo(logp, logp.detach(), logp.detach(), A, answer.float(),
                                         grpo.Batch(5, 25), RUN.zero)
        J.backward()
        gradients.append(table.grad)
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().max() > 0.01
    assert not torch.allclose(mean, advantage.unsqueeze(1).expand(5, 7))


def test_process_reward_judge_reads_all_steps_at_once():
    """The scores of one pass are those of each prefix alone."""
    judge = make_judge(0)
    answers = [ids_of(CHECKED), ids_of("<answer>27</answer>")]
    prompts = [tasks.encode_prompt("Compute 25-7+9"), tasks.encode_prompt("计算1+2")]
    found = process_reward._judge_steps(judge, prompts, answers)
    for prompt, ids, scores in zip(prompts, answers, found):
        prefixes = [prompt + ids[:end + 1] for end in process_reward._step_ends(ids)]
        expected = grpo.judge_scores(judge, prefixes, tasks.PAD_ID).sigmoid()
        assert scores == pytest.approx(expected.tolist(), abs=0.006)
    assert len(set(found[0])) > 1


def test_process_reward_labels_by_hand(monkeypatch):
    """Half of all answers from a prefix are right, so its label is a half. Whole answers have the
    label of their own accuracy. What was written and read is counted."""
    wrong = CHECKED.replace("<answer>27", "<answer>28")
    calls = []

    def sample(model, prompts, *_, **__):
        calls.append(prompts)
        if len(calls) == 1:
            return [ids_of(text) for text in (CHECKED, wrong)]
        rests = []
        for i, prompt in enumerate(prompts):
            begin = prompt[len(tasks.encode_prompt(PROBLEM.question)):]
            rests.append(ids_of(CHECKED if i % 2 else wrong)[len(begin):])
        return rests

    for name, value in (("LABELLED", 1), ("TRIES", 2), ("PREFIXES", 2), ("GO_ON", 4)):
        monkeypatch.setattr(process_reward, name, value)
    monkeypatch.setattr(process_reward, "draw_problem", lambda *_: PROBLEM)
    monkeypatch.setattr(process_reward, "sample_answers", sample)
    labels = process_reward._label_prefixes(None, RUN)
    assert [x.safe for x in labels.examples] == [1.0, 0.0] + [0.5] * 4
    prompt = len(tasks.encode_prompt(PROBLEM.question))
    begins = [len(x.tokens) for x in labels.examples[2:]]
    whole = prompt + len(ids_of(CHECKED))
    assert labels.prompts == prompt + sum(begins)
    assert labels.tokens == 2 * (whole - prompt) + 4 * sum(whole - n for n in begins)


@pytest.mark.parametrize("name", process_reward.ARMS)
def test_process_reward_arm(model, monkeypatch, name):
    """A tiny run of each arm ends with its budget, and has numbers of every kind."""
    for key, value in (("LABELLED", 2), ("GO_ON", 2), ("RERANKED", 2), ("SAMPLES", 4)):
        monkeypatch.setattr(process_reward, key, value)
    monkeypatch.setattr(process_reward, "BUDGET", 2e8)
    numbers = run_arm(process_reward, name, *FEW)
    assert numbers["rollouts"] >= 1 and 0 <= numbers["pass@1"] <= 1
    assert {"rerank", "rerank.cons@4", "judge_flops"} <= set(numbers) or name != "model"


def test_process_reward_overpaid():
    """By hand. In the first group the mean step reward is 0.5: the right answers earn 0.4 and 0, c
    earns 0.3. d has the largest sum of rewards, but its steps are worse than the mean, and it
    earns -0.7. The second group has no right answer."""
    rollout = SimpleNamespace(
        reward_parts={"accuracy": torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])},
        rewards=torch.zeros(2, 4), problems=[PROBLEM, PROBLEM], texts=list("abcdefgh"))
    rewards = [[0.9], [0.5], [0.8], [0.4, 0.4, 0.4, 0.4, 0.2], [9.0], [0.0], [1.0], [2.0]]
    assert process_reward._overpaid(rollout, rewards) == ["25-7+9: c (0.30, right ones 0.20)"]


def rollout_of(texts, problem=PROBLEM):
    """A Rollout with one group of these answers."""
    prompt = tasks.encode_prompt(problem.question)
    rows = [ids_of(text) for text in texts]
    ids = pad_right(rows, tasks.PAD_ID)
    samples = lay_out_samples([prompt] * len(texts), ids, torch.zeros(ids.shape), tasks.END_ID,
                              tasks.PAD_ID)
    right = torch.tensor([tasks.accuracy(text, problem) for text in texts])
    return grpo.Rollout([problem], samples, texts, {"accuracy": right}, right.view(1, -1),
                        torch.zeros(1, len(texts)))


def test_process_reward_advantages_of_arms():
    """Each arm's step rewards, and the advantages that follow from them. Nothing but the answers
    has an advantage."""
    texts = [CHECKED, CHECKED.replace("<answer>27", "<answer>28"), "<answer>27</answer>"]
    right_steps = [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0]]
    judge = make_judge(0)
    prompt = tasks.encode_prompt(PROBLEM.question)
    answers = [ids_of(text) for text in texts]
    scores = [[round(score, 2) for score in of_answer] for of_answer in
              process_reward._judge_steps(judge, [prompt] * 3, answers)]
    of_answers = [[1.0], [0.0], [1.0]]
    expected = {"outcome": of_answers, "rule": right_steps, "model": scores,
                "prefixes": of_answers}
    ends = [process_reward._step_ends(ids) for ids in answers]
    for arm, rewards in expected.items():
        rollout = rollout_of(texts)
        assert process_reward._give_advantages(arm, rollout, judge) == rewards
        last_ends = ends if arm in ("rule", "model") else [of_answer[-1:] for of_answer in ends]
        A = process_reward._process_advantages(rewards, last_ends, len(prompt),
                                               rollout.samples.tokens.size(1))
        shared = process_reward._sharing_answers(rollout.samples.tokens, rollout.samples.answer)
        if arm == "prefixes":
            assert shared.max() == 2
            A = A / shared.clamp(min=1)
        assert torch.equal(rollout.advantages, A.unsqueeze(0))
        assert not rollout.advantages[0][~rollout.samples.answer].any()


def test_process_reward_learns_from_groups_of_equal_sums():
    """Two answers with the same sum of step rewards: their first tokens have no advantage, but the
    steps after them do. A group without any advantage is left out."""
    texts = ["<think>25-7=17 then 18+9=27</think><answer>27</answer>",
             "<think>25-7=18 then 18+9=28</think><answer>27</answer>"]
    rollout = rollout_of(texts)
    rewards = process_reward._give_advantages("rule", rollout, None)
    assert rewards == [[0, 1, 1], [1, 0, 1]]
    begin = len(tasks.encode_prompt(PROBLEM.question))
    assert rollout.advantages[0, :, begin].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert grpo.live_groups(rollout).tolist() == [True]
    process_reward._give_advantages("outcome", rollout, None)  # both are right
    assert grpo.live_groups(rollout).tolist() == [False]


def test_process_reward_reranks_by_the_worst_step(monkeypatch):
    """Two problems, three answers each. The best worst step is right in one of them, the best last
    step in none. Three more answers to each are right: they make a majority with one of the
    first."""
    right, wrong = CHECKED, CHECKED.replace("<answer>27", "<answer>28")
    texts = [right, wrong, wrong, right, wrong, wrong]
    scores = [[0.5, 0.6], [0.4, 0.9], [0.1, 0.2], [0.2, 0.8], [0.3, 0.9], [0.1, 0.1]]
    monkeypatch.setattr(process_reward, "SAMPLES", 3)
    monkeypatch.setattr(process_reward.tasks, "make_problems", lambda *_: [PROBLEM] * 2)
    monkeypatch.setattr(process_reward, "sample_answers", lambda *_, seed: [
        *map(ids_of, texts if seed == 1 else [right] * 6)])
    monkeypatch.setattr(process_reward, "_judge_steps", lambda *_: scores)
    monkeypatch.setattr(process_reward, "selection_scores", lambda of, problems: {
        f"{name}@{k}": of.count(right) / len(of) for name in ("pass", "cons") for k in (1, 3, 6)})
    numbers = process_reward._rerank(None, None, RUN)
    assert numbers["rerank"] == 0.5 and numbers["rerank.last"] == 0.0
    assert numbers["rerank.cons@3"] == 1 / 3 and numbers["rerank.cons@6"] == 4 / 6


@pytest.mark.parametrize("arm", ["outcome", "model"])
def test_process_reward_budget(model, monkeypatch, arm):
    """By hand: prompts are read once for a problem, answers are written, rows are learnt from, by
    the policy and the reference; and the reward model reads each prompt and answer. An arm ends
    after the rollout that spends the rest of the budget."""
    judge, costs = make_judge(0), []
    N, N_judge = (process_reward.flops_per_token(m.config, "read") for m in (model, judge))
    improve = process_reward.improve

    def count(policy, reference, optimizers, rollout, s, rng, step):
        log = improve(policy, reference, optimizers, rollout, s, rng, step)
        prompts = [len(tasks.encode_prompt(problem.question)) for problem in rollout.problems]
        written = sum(map(len, rollout.samples.answers()))
        cost = N * (written + sum(prompts)) + (3 * N + N) * log["learnt_tokens"]
        if arm == "model":
            cost += N_judge * (written + s.group_size * sum(prompts))
        costs.append(cost)
        return log

    monkeypatch.setattr(process_reward, "improve", count)
    monkeypatch.setattr(process_reward, "BUDGET", 4e8)
    folder = SimpleNamespace(run=resolve_settings("micro", [*process_reward.SETTINGS, *FEW]))
    before = 1e8 if arm == "model" else 0.0
    _, numbers, _ = process_reward._train_policy(arm, folder, model, judge, before)
    assert numbers["rollouts"] == len(costs) > 1
    assert before + sum(costs[:-1]) < 4e8 <= before + sum(costs)
