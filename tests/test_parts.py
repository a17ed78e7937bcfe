"""Tests of studies/parts.py: the bases take equal work, and the page says what pays."""

import pytest

from studies import parts
from tests.helpers import nano_run
from tools import cli, study
from tools.flops import flops_per_token


def products(config):
    """Weights in products, counted from the sizes: attention, feed-forward and router of each
    block, head, MTP."""
    c, heads = config, config.n_heads
    attention = (c.dim * heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
                 + c.dim * (c.kv_lora_rank + c.qk_rope_head_dim)
                 + c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
                 + heads * c.v_head_dim * c.dim)
    dense = 3 * c.dim * c.inter_dim
    mixture = 3 * c.dim * c.moe_inter_dim * (c.n_activated_experts + c.n_shared_experts) \
        + c.dim * c.n_routed_experts
    layers = [dense] * c.n_dense_layers + [mixture] * (c.n_layers - c.n_dense_layers)
    mtp = c.n_mtp_layers * (attention + layers[-1] + 2 * c.dim ** 2 + c.vocab_size * c.dim)
    return sum(attention + layer for layer in layers) + c.vocab_size * c.dim + mtp


def settings(name):
    """(model sizes, steps) of one of the study's bases."""
    command = next(c for folder, c in study._study_runs(parts, 0) if folder.endswith(f"{name}-0"))
    run = cli.resolve_settings("nano", cli.parse_arguments(list(command)).set)
    return run.model, run.base.steps


@pytest.mark.parametrize("name", [name for name, _ in parts.PARTS.values()])
def test_parts_bases_take_equal_work(name):
    """All bases take the same products within 0.6%, by a count from the sizes. The `both` base is
    the nano preset. The dense one has no router, which explains the tolerance."""
    both, steps = settings("both")
    assert both == nano_run().model
    model, steps_here = settings(name)
    assert flops_per_token(model, "learn", mtp=True) == 6 * products(model)
    assert steps_here * products(model) == pytest.approx(steps * products(both), rel=0.006)


def test_parts_page_says_what_pays():
    """By hand: MTP raises the loss alike on both seeds, and gains in pass@1. The mixture lowers the
    loss on one seed of two."""
    columns = ("loss", "pass@1", "cons", "reflection", "tflop", "tokens", "steps")
    values = {"both": (0.5, 0.6), "mixture": (0.4, 0.5), "dense": (0.7, 0.5)}
    rows = {f"{name}.{key}": {"mean": sum(x) / 2, "std": 0.0, "per_seed": dict(zip("01", x))}
            for name, x in values.items() for key in columns}
    text = "\n".join(parts.page(rows, {}))
    assert "By loss, MTP costs; gain -0.1 ± 0, 95% interval -0.1 to -0.1, 2 seeds, on" in text
    assert ("By loss, the mixture may pay or cost: it cannot be told; gain +0.05 ± 0.212, 95% "
            "interval -1.86 to +1.96, 2 seeds.") in text  # 0.15 * 12.706 to each side
    assert "By pass@1, MTP pays; gain +0.1 ± 0" in text
    assert "| mixture alone | 0.450" in text
