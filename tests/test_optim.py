"""The tests of engine/optim.py: Muon, the learning rate, one update."""
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import optim
from tests.helpers import make, make_batch


def test_muon_equals_torchs_muon_on_each_matrix():
    """Three steps on a stack of matrices equal the steps of torch.optim.Muon on each matrix
    alone."""
    stack = torch.nn.Parameter(torch.zeros(3, 32, 8))
    alone = [torch.nn.Parameter(torch.zeros(32, 8)) for _ in range(3)]
    ours, theirs = optim.Muon([stack], 0.1), torch.optim.Muon(alone, 0.1, weight_decay=0.0)
    for step in range(3):
        stack.grad = torch.randn(stack.shape, generator=torch.Generator().manual_seed(step))
        for p, grad in zip(alone, stack.grad):
            p.grad = grad.clone()
        ours.step(), theirs.step()
    torch.testing.assert_close(stack, torch.stack(list(alone)), atol=1e-2, rtol=0)  # theirs: bf16


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16), (5, 32, 12)])
def test_orthogonalize_is_nearly_the_polar_factor(shape):
    """Between the singular vectors of x the result is diagonal, with values near one."""
    torch.manual_seed(0)
    x = torch.randn(shape) * 100 ** torch.randn(*shape[:-2], 1, 1)  # slices of any scale
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    core = u.mT @ optim.orthogonalize(x) @ vh.mT
    values = core.diagonal(dim1=-2, dim2=-1)
    assert (core - values.diag_embed()).abs().max() < 1e-3
    assert values.min() > 0.6 and values.max() < 1.3


def test_learning_rate_at_equals_hand_worked_points():
    """The factor warms up over 9 steps, stays at 1, and falls to 0 over the last fifth of 100
    steps."""
    points = {0: 0.1, 4: 0.5, 9: 1.0, 50: 1.0, 80: 1.0, 90: 0.5, 99: 0.05}
    got = {step: optim.learning_rate_at(step, 100, 9, 0.2) for step in points}
    assert got == pytest.approx(points)
    assert [optim.learning_rate_at(step, 100, 0, 0.0) for step in (0, 99)] == [1.0, 1.0]


def test_update_clips_gradients_to_max_norm():
    """A step of plain gradient descent has length max_norm * lr * factor, and the reported norm is
    the unclipped one."""
    model = make()
    for p in model.parameters():
        p.grad = 100 * torch.randn_like(p)
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    before = torch.nn.utils.parameters_to_vector(model.parameters())
    optimizer = torch.optim.SGD([{"params": model.parameters(), "initial_lr": 0.5}], lr=0.5)
    info = optim.optimizer_update(model, [optimizer], factor=0.5, max_norm=2.0)
    after = torch.nn.utils.parameters_to_vector(model.parameters())
    assert info["grad_norm"] == pytest.approx(float(torch.linalg.norm(flat)), rel=1e-5)
    assert (after - before).norm().item() == pytest.approx(0.5 * 0.5 * 2.0, rel=1e-4)


def test_update_skips_a_gradient_that_is_not_finite():
    """One NaN among the gradients leaves all weights as they are; it is counted, and the gradients
    are cleared."""
    model = make()
    optimizers = optim.make_optimizers(model, 0.1, muon_lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.norm.weight.grad[3] = math.nan
    assert optim.optimizer_update(model, optimizers)["skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_update_skipped_moves_no_routing_bias():
    """A skipped update leaves the routing biases as they are and clears the expert load."""
    model, (tokens, real, _) = make().train(), make_batch()
    model(tokens, real)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    optim.optimizer_update(model, optim.make_optimizers(model, 0.1))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.layers[1].ffn.router.load.sum() == 0


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 5), st.integers(1, 120))
def test_optim_micro_batches_give_all_processes_equal_passes(lengths, count, limit):
    """For rows dealt to 1 to 5 processes: every row is dealt once, all processes have equally many
    lists, only the last list may be empty, and a list is within the limit or has one row."""
    dealt = []
    for number in range(count):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optim, "rank_and_size", lambda: (number, count))
            dealt.append(list(optim.micro_batches(lengths, range(len(lengths)), limit)))
    assert len({len(lists) for lists in dealt}) == 1
    assert Counter(row for lists in dealt for rows in lists for row in rows) == Counter(
        range(len(lengths)))
    for lists in dealt:
        assert all(lists[:-1])
        assert all(len(rows) <= 1 or len(rows) * max(lengths[r] for r in rows) <= limit
                   for rows in lists)


def test_optim_micro_batches_deal_long_rows_in_turn(monkeypatch):
    """Rows of 1 to 8 tokens, one a list, are dealt to and fro by hand: 1, 4, 5 and 8 to one
    process, 2, 3, 6 and 7 to the other."""
    dealt = []
    for number in range(2):
        monkeypatch.setattr(optim, "rank_and_size", lambda: (number, 2))
        dealt.append(optim.micro_batches(range(1, 9), range(8), 1))
    assert dealt == [[[0], [3], [4], [7]], [[1], [2], [5], [6]]]
