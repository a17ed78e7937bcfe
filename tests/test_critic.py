"""Tests of the study critic: values, GAE, PPO's updates, what corrected steps get."""
import dataclasses
from types import SimpleNamespace

import pytest
import torch

import grpo
import moe
import tasks
from engine.sampling import Samples
from studies import critic
from tests.helpers import MICRO, equal_states
from tools import study
from tools.settings import resolve_settings

RUN = resolve_settings("micro", ["zero.problems=2", "zero.group_size=3", "zero.minibatches=2",
                                 "zero.max_new_tokens=9", "zero.beta=0.1"])
FOLDER = SimpleNamespace(place=lambda model: model)


@pytest.fixture
def model():
    """A random model of the micro preset."""
    torch.manual_seed(0)
    return moe.Transformer(MICRO).eval()


@pytest.fixture
def network(model):
    """A value network whose head is random."""
    network = critic._value_network(FOLDER, model)
    torch.nn.init.normal_(network.head.weight)
    return network.eval()


@pytest.fixture
def rollout(model):
    """A rollout of the random model, with rewards that differ."""
    rewards = {"accuracy": (1.0, lambda texts, problems: [len(text) % 3 / 2 for text in texts])}
    task = dataclasses.replace(critic.make_task(RUN, RUN.zero, rewards), measures={})
    return grpo.make_rollout(model, task, RUN.zero, critic.random.Random(0))


def test_critic_gae_by_hand():
    """Three tokens behind a prompt of one, a reward of 1 at the end, values .5, .7, .2."""
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0]])
    values = torch.tensor([[0.0, 0.5, 0.7, 0.2, 0.0]])
    answer = torch.tensor([[False, True, True, True, False]])
    # deltas: .7 - .5 = .2; .2 - .7 = -.5; 1 - .2 = .8
    expected = {1.0: [0.5, 0.3, 0.8], 0.5: [0.2 - 0.25 + 0.2, -0.5 + 0.4, 0.8],
                0.0: [0.2, -0.5, 0.8]}
    for lam, A in expected.items():
        found = critic._gae(rewards, values, answer, lam)
        assert torch.allclose(found, torch.tensor([[0.0, *A, 0.0]])), lam


def test_critic_gae_equals_the_slow_sum():
    """The definition, a sum over all later tokens of an answer. With lambda 1 it is the reward that
    follows, minus the value."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 4, 9, generator=generator)
    begin, end = (2, 0, 5, 8), (9, 4, 6, 9)
    column = torch.arange(9)
    answer = (column >= torch.tensor(begin)[:, None]) & (column < torch.tensor(end)[:, None])
    rewards, values = rewards * answer, values * answer
    for lam in (0.0, 0.95, 1.0):
        found = critic._gae(rewards, values, answer, lam)
        expected = torch.zeros(4, 9)
        for n in range(4):
            def value(t, n=n):
                return float(values[n, t]) if t < end[n] else 0.0
            for t in range(begin[n], end[n]):
                expected[n, t] = sum(
                    lam ** (u - t) * (float(rewards[n, u]) + value(u + 1) - value(u))
                    for u in range(t, end[n]))
        assert torch.allclose(found, expected, atol=1e-5), lam
    to_go = rewards.flip(1).cumsum(1).flip(1)
    assert torch.allclose(found, (to_go - values) * answer, atol=1e-5)


def test_critic_rewards_of_tokens():
    """The reward comes at an answer's last token, and the KL costs something at each token."""
    answer = torch.tensor([[False, True, True, False], [True, True, True, True]])
    old, reference = torch.full((2, 4), -1.0), torch.tensor([[-9.0, -3, -1, -9], [-1, -1, -2, -1]])
    found = critic._token_rewards(torch.tensor([1.2, 0.2]), old, reference, answer, 0.1)
    assert torch.allclose(found, torch.tensor([[0, -0.2, 1.2, 0], [0, 0, -0.1, 0.2]]))


def test_critic_values_read_only_what_came_before(network, rollout):
    """The value of a token does not depend on it or on later ones, but on the token before it. The
    network starts as the base, and its values as 0."""
    tokens, answer = rollout.samples.tokens, rollout.samples.answer
    real = torch.ones_like(answer)
    values = critic._values(network, tokens, answer, real)
    assert values[~answer].eq(0).all()
    begin = int(answer[0].int().argmax())
    for place in (begin - 1, begin, begin + 2):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % 100
        others = critic._values(network, changed, answer, real)
        same = torch.isclose(others[0], values[0], atol=1e-6)
        assert same[begin:place + 1].all() and not same[max(begin, place + 1)], place


def test_critic_starts_from_the_base(model):
    """All weights but the head are the base's, and the first values are 0."""
    network = critic._value_network(FOLDER, model)
    state, base = network.state_dict(), model.state_dict()
    assert all(torch.equal(x, base[name]) for name, x in state.items() if name != "head.weight")
    tokens, answer = torch.randint(1, 99, (2, 7)), torch.arange(7).expand(2, 7) > 2
    assert critic._values(network, tokens, answer, torch.ones_like(answer)).eq(0).all()


@pytest.mark.parametrize("limit", [30, 2048])
def test_critic_update_descends_the_two_losses(monkeypatch, model, network, rollout, limit):
    """The gradients of one update are those of the losses written out for the whole minibatch,
    however it is cut into passes. In the warm-up the policy stays."""
    s = dataclasses.replace(RUN.zero, minibatches=1, micro_tokens=limit)
    judged = critic._judge(rollout, network, model, s)
    before = model.state_dict()["head.weight"].clone()
    grads, rates = {}, []

    def no_update(m, optimizers, factor=1.0):
        rates.append(factor)
        grads[m.config.n_outputs] = {name: p.grad.clone() for name, p in m.named_parameters()
                                     if p.grad is not None}
        m.zero_grad()
    monkeypatch.setattr(critic, "optimizer_update", no_update)
    rng = critic.random.Random(0)
    critic._improve("gae095", model, network, ({}, {}), rollout, judged, s, rng, 0, learnt=-1)
    assert list(grads) == [1]
    grads_of_warm_up = grads[1]
    critic._improve("gae095", model, network, ({}, {}), rollout, judged, s, rng, 0, learnt=0)
    # The rate of the policy rises over its first updates; that of the values is constant.
    assert rates == [1.0, 1.0, pytest.approx(1 / (s.warmup + 1))] and s.warmup > 0

    samples = rollout.samples
    answer, n = samples.answer, samples.answer.sum()
    real = torch.arange(answer.size(1)) < torch.tensor(critic._lengths(samples)).unsqueeze(1)
    for name, found in (("gae1", grads_of_warm_up), ("gae095", grads[1])):
        network.zero_grad()
        values = critic._values(network, samples.tokens, answer, real)
        (0.5 * ((values - judged.targets[name])[answer] ** 2).sum() / n).backward()
        for weight, grad in found.items():
            wanted = dict(network.named_parameters())[weight].grad
            assert torch.allclose(grad, wanted, atol=2e-5), (name, weight)
    new, _ = grpo.logprobs(model, samples.tokens, answer, real)
    # At the weights that sampled, the ratio is 1 and nothing is clipped.
    (-(new * judged.advantages["gae095"])[answer].sum() / n).backward()
    for name, grad in grads[0].items():
        wanted = dict(model.named_parameters())[name].grad
        assert torch.allclose(grad, wanted, atol=2e-5), name
    assert torch.equal(before, model.state_dict()["head.weight"])


def test_critic_advantages_are_normalised(model, network, rollout):
    """Mean 0 and standard deviation 1 over the answer tokens, and the targets of lambda 1 are the
    rewards that follow, whatever the values are."""
    judged = critic._judge(rollout, network, model, RUN.zero)
    answer = rollout.samples.answer
    for advantages in judged.advantages.values():
        assert advantages[answer].mean() == pytest.approx(0, abs=1e-5)
        assert advantages[answer].std() == pytest.approx(1, abs=1e-4)
        assert advantages[~answer].eq(0).all()
    # The reference is the policy, so there is no KL, and each token is followed by the reward.
    rewards = rollout.rewards.flatten().unsqueeze(1).expand_as(answer)
    assert torch.allclose(judged.targets["gae1"][answer], rewards[answer], atol=1e-3)


def test_critic_reward_less_its_kl(model, network, rollout):
    """Where the reference is another model, lambda 1's target before a token is the reward minus
    beta times the log-ratios from this token on."""
    torch.manual_seed(1)
    reference = moe.Transformer(MICRO).eval()
    s = dataclasses.replace(RUN.zero, beta=0.5)
    judged = critic._judge(rollout, network, reference, s)
    samples = rollout.samples
    real = torch.arange(samples.answer.size(1)) < torch.tensor(
        critic._lengths(samples)).unsqueeze(1)
    reference_logp, _ = grpo.logprobs(reference, samples.tokens, samples.answer, real)
    log_ratio = (samples.logprobs - reference_logp) * samples.answer
    kl_to_go = log_ratio.flip(1).cumsum(1).flip(1)
    expected = rollout.rewards.flatten().unsqueeze(1) - 0.5 * kl_to_go
    answer = samples.answer
    assert log_ratio.abs().max() > 0.05
    assert torch.allclose(judged.targets["gae1"][answer], expected[answer], atol=1e-3)


def test_critic_activations(model, network, rollout):
    """What a linear layer keeps is its input, and each tensor counts once. Passes of policy and
    value network follow each other, so PPO keeps no more than GRPO."""
    layer, x = torch.nn.Linear(5, 7), torch.randn(3, 5)

    def forward(network, *_):
        return layer(x) + layer(x[1:]).sum()
    part = SimpleNamespace(tokens=None, mask=None, real=None)
    assert critic._kept_bytes(forward, layer, part) == x.numel() * 4
    of_grpo = critic._megabytes(rollout, [model, model], [], RUN.zero)
    of_ppo = critic._megabytes(rollout, [model, model, network], [], RUN.zero)
    assert of_ppo["mb.activations"] == of_grpo["mb.activations"] > 0
    assert of_ppo["mb.weights"] > of_grpo["mb.weights"]


def test_critic_finds_corrected_steps():
    """By hand, in both languages. A wrong step that is not corrected, or is corrected wrongly, is
    neither. So are checks and corrections."""
    def results(text):
        wrong, right = critic._result_spans(text)
        return [text[low:high] for low, high in wrong], [text[low:high] for low, high in right]

    text = ("<think>25-7=17 check 17+7=24 wait 25-7=18 check 18+7=25 ok 18+9=28 then 28-1=27"
            "</think><answer>27</answer>")
    assert results(text) == (["17"], ["27"])
    assert results("25-7=17检查17+7=24等等25-7=18") == (["17"], [])
    assert results("25-7=17 check 17+7=24 wait 25-7=19") == ([], [])
    assert results("25-7=18 check 18+7=25 ok 18+9=27") == ([], ["18", "27"])
    assert results("25-7=17 check 17+7=24 ok 17+9=26") == ([], ["26"])
    assert results("25-7=17 check 17+7=24 wait 30-12=18") == ([], [])


def test_critic_credit(model):
    """By hand: the advantage at the tokens of the wrong 17 and of the right 27 of one right answer;
    and the change of the value over the 17."""
    text = "<think>25-7=17 check 17+7=24 wait 25-7=18 ok 18+9=27</think><answer>27</answer>"
    ids = tasks.encode_response(text)
    T = 2 + len(ids)
    tokens = torch.tensor([[1, 1, *ids]] * 2)
    answer = (torch.arange(T) >= 2).expand(2, T)
    samples = Samples(tokens, answer, torch.zeros(2, T), torch.ones(2).bool())
    rollout = grpo.Rollout([None], samples, [text] * 2, {"accuracy": torch.tensor([1.0, 0.0])},
                           None, torch.tensor([[0.7, -0.7]]))
    ramp = torch.arange(T).float().expand(2, T)
    judged = critic.Judged(ramp ** 2, None, {"gae1": ramp, "gae095": -ramp})
    credit = critic.Credit()
    credit.add(rollout, judged)
    means = credit.means()

    def place(nth):  # of the nth "=" in the text, counted from 1
        equals = tasks.ENCODING.encode("=")[0]
        return [i for i, x in enumerate([0, 0, *ids]) if x == equals][nth - 1]
    wrong = place(1) + 1.5
    right = place(4) + 1.5
    assert means["credit.steps"] == 1
    assert means["credit.wrong.grpo"] == means["credit.right.grpo"] == pytest.approx(0.7)
    assert means["credit.wrong.gae1"] == wrong and means["credit.wrong.gae095"] == -wrong
    assert means["credit.right.gae1"] == right
    begin = place(1) + 1
    assert means["credit.wrong.value_change"] == (begin + 2) ** 2 - begin ** 2


@pytest.fixture
def run_arm(monkeypatch, tmp_path, model):
    """A function that runs an arm with a budget of tokens, and returns its numbers and whether the
    model is still the kept one."""
    monkeypatch.chdir(tmp_path)
    kept = {key: x.clone() for key, x in model.state_dict().items()}
    monkeypatch.setattr(critic, "load_kept", lambda *_: model)
    few = ["zero.problems=4", "zero.group_size=2", "zero.minibatches=2", "zero.max_new_tokens=9",
           "eval.problems=4", "eval.dev_problems=4", "eval.samples=2", "eval.fewer_samples=1"]

    def run(name, budget):
        monkeypatch.setattr(critic, "BUDGET", budget)
        one = SimpleNamespace(ARMS={name: ""}, STAGES=(), page=lambda *_: [],
                              SETTINGS=(*critic.SETTINGS, *few), measure_arm=critic.measure_arm)
        options = SimpleNamespace(name="demo", preset="micro", rest=["--seeds", "0"])
        study.main(options, one)
        numbers = study._measure_arms(options, one, 0, [])[0]["metrics"]
        return numbers, equal_states(model.state_dict(), kept)
    return run


@pytest.mark.parametrize("name", critic.ARMS)
def test_critic_arm(run_arm, name):
    """A tiny run of an arm: it ends with its budget, and PPO has more weights than GRPO."""
    numbers, is_kept = run_arm(name, 300)
    assert 300 <= numbers["generated"] < 300 + 4 * 2 * 9 and numbers["rollouts"] == 5
    one_model = sum(x.numel() for x in moe.Transformer(MICRO).parameters()) * 4 / 1e6
    extra = numbers["mb.weights"] - 2 * one_model
    assert (0 < extra < one_model) if name != "grpo" else extra == pytest.approx(0)
    assert numbers["mb.activations"] > 0 and numbers["reaches_85"] == 0
    assert ("credit.steps" in numbers) == (name != "grpo")
    # A random model is never right: for GRPO all groups are dead, but values differ by chance.
    assert is_kept == (name == "grpo")
    if name != "grpo":  # AdamW keeps two numbers for each weight; MTP is not trained
        assert one_model < numbers["mb.optimizer"] <= 2.01 * (one_model + extra)


def test_critic_warm_up_leaves_the_policy(run_arm):
    """In the first rollouts the value network alone learns."""
    numbers, is_kept = run_arm("gae1", 10)
    assert numbers["rollouts"] == 1 and is_kept and numbers["mb.optimizer"] > 0


def test_critic_page():
    """The tables have the numbers of all arms, and cells without a number are empty."""
    rows = {f"{arm}.{key}": {"mean": x, "std": 0.0, "per_seed": {"0": x}}
            for arm in critic.ARMS for key, x in (("pass@1", 0.5), ("dev2", 0.25), ("dev4", 0.75))}
    text = "\n".join(critic.page(rows, {}))
    assert "| PPO, lambda 0.95 | 0.250 | 0.750 |" in text
