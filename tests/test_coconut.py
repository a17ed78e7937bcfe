"""Tests of the study of latent thoughts: passes, gradients, the curriculum, graphs."""
import random
from types import SimpleNamespace

import pytest
import torch

import moe
import tasks
from studies import coconut
from tests.helpers import MICRO, run_arm, use_random_micro
from tools.settings import resolve_settings

THOUGHT, START, END = coconut.THOUGHT, coconut.START, coconut.END


@pytest.fixture
def model():
    """A random micro model without experts, whose routing would jump. Its weights are large, so
    that thoughts matter."""
    torch.manual_seed(0)
    config = {**vars(MICRO), "n_dense_layers": MICRO.n_layers, "init_std": 0.2}
    return moe.Transformer(moe.Config(**config)).eval()


# -------------------------------------------------------------------------------------------------
# Latent thoughts

ROWS = [[3, 5, START, THOUGHT, THOUGHT, THOUGHT, END, 7],
        [3, 5, 9, 4, START, THOUGHT, THOUGHT, THOUGHT, END, 8, 2], [1, 2, START, END, 9]]


def padded(rows):
    """(tokens, real) of rows, padded on the right."""
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [tasks.PAD_ID] * (longest - len(row)) for row in rows])
    return tokens, torch.tensor([[t < len(row) for t in range(longest)] for row in rows])


def test_coconut_without_thoughts_is_the_plain_model(model):
    """Bit for bit; and the model keeps no hook."""
    tokens, real = padded([[3, 5, START, END, 7], [4, START, END]])
    assert torch.equal(coconut._think(model, tokens, real).logits, model(tokens, real).logits)
    tokens, real = padded(ROWS)
    coconut._think(model, tokens, real)
    assert not model.embed._forward_hooks


def test_coconut_thoughts_against_a_slow_loop(model):
    """Row by row and position by position, without padding: each input is a token's embedding, or
    the hidden state of the position before."""
    tokens, real = padded(ROWS)
    logits = coconut._think(model, tokens, real).logits
    with torch.no_grad():
        for i, row in enumerate(ROWS):
            inputs, output = torch.zeros(1, 0, MICRO.dim), None
            for t, token in enumerate(row):
                new = model.embed(torch.tensor([[token]]))
                if token == THOUGHT:
                    new = output.hidden[:, -1:]
                inputs = torch.cat((inputs, new), 1)
                output = coconut._forward(model, torch.tensor([row[:t + 1]]), inputs)
            assert torch.allclose(logits[i, :len(row)], output.logits[0], atol=1e-4)
    assert not torch.allclose(logits, model(tokens, real).logits, atol=0.1)


def test_coconut_load_counts_each_token_once():
    """In training the experts' load is that of one pass over the real tokens, however many passes
    the thoughts take."""
    torch.manual_seed(0)
    model = moe.Transformer(MICRO).train()
    tokens, real = padded(ROWS)
    coconut._think(model, tokens, real)
    mixtures = [layer.ffn for layer in model.layers if isinstance(layer.ffn, moe.MoE)]
    assert mixtures
    for mixture in mixtures:
        assert float(mixture.router.load.sum()) == MICRO.n_activated_experts * int(real.sum())


def test_coconut_gradients_flow_through_all_thoughts(model):
    """Finite differences: the loss is read behind three thoughts, and what is changed is the
    embedding of the mark, which the first thought is made of. If one thought were cut off, the
    slope would be another."""
    tokens = torch.tensor([ROWS[0]])
    torch.manual_seed(1)
    direction, weight = torch.randn(MICRO.dim), torch.randn(MICRO.vocab_size)

    def loss():
        return (coconut._think(model, tokens).logits[0, -1] * weight).sum()

    loss().backward()
    slope = float(model.embed.weight.grad[START] @ direction)
    step, start = 1e-3, model.embed.weight.detach()[START].clone()
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            model.embed.weight[START] = start + sign * step * direction
            values.append(float(loss()))
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=0.02)


def test_coconut_sampling_is_the_training_pass(model):
    """With the cache, the thoughts and the logits behind them are those of _think(), whatever the
    lengths of the prompts. Pauses are those of the plain model."""
    prompts = [[3, 5], [3, 5, 9, 4], [7]]
    for feeds_back, run in ((True, coconut._think), (False, model)):
        cache = coconut._read(model, prompts, 3, feeds_back, 1)
        fed = torch.full((3, 1), END)
        with torch.no_grad():
            cached = model(fed, cache=cache).logits[:, -1]
        for row, prompt in zip(cached, prompts):
            tokens = torch.tensor([[*prompt, START, THOUGHT, THOUGHT, THOUGHT, END]])
            assert torch.allclose(run(model, tokens).logits[0, -1] if feeds_back
                                  else run(tokens).logits[0, -1], row, atol=1e-4)
    answers = coconut._answers(model, prompts, 3, True)
    tokens = [*prompts[0], START, THOUGHT, THOUGHT, THOUGHT, END]
    for token in answers[0][:4]:  # greedy, token by token
        assert token == int(coconut._think(model, torch.tensor([tokens])).logits[0, -1].argmax())
        tokens.append(token)


# -------------------------------------------------------------------------------------------------
# The curriculum


def test_coconut_documents_by_hand():
    """Stage by stage: the first steps go, thoughts take their place, and only what is written is
    learnt."""
    problem = tasks.Problem("Compute 9-4+3", "8", "en", 2, "9-4+3")
    steps = ["9-4=5", "5+3=8"]
    written = ["<think>9-4=5 then 5+3=8</think><answer>8</answer>",
               "<think>5+3=8</think><answer>8</answer>", "<think></think><answer>8</answer>"]
    question = tasks.encode_prompt(problem.question)
    for stage, text in zip(coconut._stages("latent", 2), written):
        example = coconut._document(problem, steps, *stage)
        given = [*question, START, *[THOUGHT] * stage[1], END]
        assert example.tokens == given + tasks.encode_response(text)
        assert example.weight == [0] * len(given) + [1] * len(tasks.encode_response(text))
    assert coconut._stages("pause", 2) == coconut._stages("latent", 2) == [(0, 0), (1, 1), (2, 2)]
    assert coconut._stages("stages", 2) == [(0, 0), (1, 0), (2, 0)]
    assert coconut._stages("written", 2) == [(0, 0)] and coconut._stages("none", 2) == [(2, 0)]


def test_coconut_loss_is_the_mean_over_what_is_written(model):
    """By a slow loop over the written tokens. Thoughts and pauses differ."""
    rng = random.Random(0)
    examples = [coconut._document(*coconut._make_sum(rng), 2, 2) for _ in range(3)]
    total, n = 0.0, 0
    for x in examples:
        logits = coconut._think(model, torch.tensor([x.tokens])).logits[0].detach()
        logp = logits.log_softmax(-1)
        for t, weight in enumerate(x.weight):
            if weight:
                total, n = total - float(logp[t - 1, x.tokens[t]]), n + 1
    loss, _ = coconut._loss(True)(model, examples, examples)
    assert float(loss.detach()) == pytest.approx(total / n, rel=1e-4)
    _, paused = coconut._loss(False)(model, examples, examples)
    assert abs(float(paused - loss.detach())) > 1e-3


def test_coconut_arms_have_equal_positions(monkeypatch, model):
    """The positions of all documents of all stages are POSITIONS, within 2%, in every arm. The last
    stage has half of them, and the rate falls in it alone."""
    run = resolve_settings("micro", [*coconut.SETTINGS])
    monkeypatch.setattr(coconut, "POSITIONS", 200_000)
    for arm in coconut.ARMS:
        parts, decays = [], []

        def count(model, s, draw, seed, loss, parts=parts, decays=decays):
            rng = random.Random(seed)
            decays.append(s.decay)
            mean = sum(len(draw(rng).tokens) for _ in range(200)) / 200
            parts.append(s.steps * s.documents * mean)
            return []

        monkeypatch.setattr(coconut, "train", count)
        coconut._train(arm, model, run)
        assert sum(parts) == pytest.approx(coconut.POSITIONS, rel=0.02)
        assert decays == [0.0] * (len(parts) - 1) + [run.dev1.decay] and run.dev1.decay > 0
        assert len(parts) == 1 or parts[-1] == pytest.approx(0.5 * sum(parts), rel=0.05)


@pytest.mark.parametrize("arm", list(coconut.ARMS))
def test_coconut_arms_that_feed_back(arm, monkeypatch, model):
    """Only latent and graph feed the hidden state back, in training and in the test. An answer is
    tested after as many thoughts as the last stage has. Seeds share no documents."""
    examples = [coconut._document(*coconut._make_sum(random.Random(0)), 2, 2)]
    losses = {coconut._loss(x)(model, examples, examples)[1].item(): x for x in (True, False)}
    assert len(losses) == 2
    trained, tested, seeds = [], [], []

    def train(model, s, draw, seed, loss):
        trained.append(losses[loss(model, examples, examples)[1].item()])
        seeds.append(seed)
        return []

    def answers(model, prompts, thoughts, feeds_back):
        tested.append((thoughts, feeds_back))
        return [[tasks.END_ID]] * len(prompts)

    monkeypatch.setattr(coconut, "train", train)
    monkeypatch.setattr(coconut, "_answers", answers)
    monkeypatch.setattr(coconut, "load_kept", lambda *_: model)
    for seed in (0, 1):
        run = resolve_settings("micro", [*coconut.SETTINGS, "eval.problems=2"], seed=seed)
        coconut.measure_arm(arm, SimpleNamespace(run=run))
    feeds_back = arm in ("latent", "graph")
    thoughts = {"latent": 3, "pause": 3, "graph": 3, "graph_pause": 3}.get(arm, 0)
    assert set(trained) == {feeds_back} and tested == [(thoughts, feeds_back)] * 2
    assert len(set(seeds)) == len(seeds)


# -------------------------------------------------------------------------------------------------
# Graphs


def test_coconut_graphs():
    """By powers of the adjacency matrix: the goal is DEPTH steps away, the other node cannot be
    reached, and the written path is made of edges. The question has whole words. Both goals are
    reached from their roots in the same number of steps, so that no count of edges tells them
    apart."""
    rng, guessed = random.Random(0), 0
    for _ in range(200):
        problem, steps = coconut._make_graph(rng)
        edges = [tuple(map(int, edge.split(">"))) for edge in problem.expression.split(",")]
        A = torch.zeros(10, 10)
        for a, b in edges:
            A[a, b] = 1
        start = int(problem.question.split("\n")[1][-1])
        goals = [int(goal) for goal in problem.question[6:9].split(",")]
        powers = [torch.linalg.matrix_power(A, k) for k in range(10)]
        ways = [power[start] for power in powers]
        goal, = (node for node in goals if any(way[node] for way in ways))
        assert str(goal) == problem.answer
        assert [bool(way[goal]) for way in ways].index(True) == coconut.DEPTH
        assert int((ways[1] > 0).sum()) == 2
        roots = [node for node in range(10) if not A[:, node].any()]
        other, = set(roots) - {start}
        wrong, = set(goals) - {goal}
        assert [bool(power[other, wrong]) for power in powers].index(True) == coconut.DEPTH
        path = [tuple(map(int, step.split(">"))) for step in steps]
        assert set(path) <= set(edges) and len(path) == coconut.DEPTH
        assert path[0][0] == start and path[-1][1] == goal
        assert all(a[1] == b[0] for a, b in zip(path, path[1:]))
        assert len(tasks.ENCODING.encode_ordinary(problem.question)) == 4 * len(edges) + 7
        scores = {node: 2 * A[:, node].sum() - A[node].sum() + 0.1 * rng.random() for node in goals}
        guessed += max(scores, key=scores.get) == goal
    assert 70 < guessed < 130


def test_coconut_picture_by_hand(monkeypatch):
    """0>1, 0>2, 1>3, 3>4, 2>5: two nodes are one step away, one of them on the path to 4."""
    problem = tasks.Problem("Reach 4,9\nfrom 0\n0>1,0>2,1>3,3>4,2>5,8>9", "4", "en", 3,
                            "0>1,0>2,1>3,3>4,2>5,8>9")
    p = torch.zeros(3, 1, 10)
    p[0, 0, 0], p[1, 0, 1], p[1, 0, 2], p[2, 0, 3], p[2, 0, 9] = 1.0, 0.5, 0.5, 0.75, 0.25
    monkeypatch.setattr(coconut, "_next_nodes", lambda model, prompts, k, feeds_back: p[k])
    numbers = coconut._next_steps(None, [problem], True)
    assert [numbers[f"depth.{k}"] for k in range(3)] == [1.0, 1.0, 0.75]
    assert [numbers[f"path.{k}"] for k in range(3)] == [1.0, 0.5, 0.75]
    assert [numbers[f"near.{k}"] for k in range(3)] == [1, 2, 2]
    assert [numbers[f"considered.{k}"] for k in range(2)] == pytest.approx([1.0, 2.0], abs=1e-4)
    assert [numbers[f"chance.{k}"] for k in range(3)] == [1.0, 0.5, 0.5]
    assert numbers["steps.2"] == "3*: 0.75, 5: 0.00"


@pytest.mark.parametrize("arm", list(coconut.ARMS))
def test_coconut_arm(arm, monkeypatch, tmp_path):
    """A tiny run of each arm has its numbers."""
    use_random_micro(coconut, monkeypatch, tmp_path)
    monkeypatch.setattr(coconut, "POSITIONS", 1500)
    few = ["eval.problems=3", "dev1.documents=4"]
    numbers = run_arm(coconut, arm, *few)
    thoughts = {"latent": 3, "pause": 3, "graph": 3, "graph_pause": 3}.get(arm, 0)
    assert numbers["passes"] == numbers["length"] + thoughts and 0 <= numbers["pass@1"] <= 1
    assert ("considered.2" in numbers) == (arm in coconut.GRAPHS)
