"""Tests of tools/cost.py: counted parameters beside published numbers and real models."""
import dataclasses

import pytest
import torch

import moe
import r1mini
from tools import cli, cost

V3 = r1mini.PRESETS["v3"]


def test_cost_parts_of_v3_equal_hand_count():
    """Every part of V3's 671,026,404,352 parameters equals a hand count from its sizes (V3 section
    4.2). Active a token are 37.55B with embedding and head, 36.63B with the head only, 35.70B with
    neither. MTP has 11.61B of its own, and the checkpoint with its copies of embedding and head
    684.49B (V3's README_WEIGHTS: 685B)."""
    total, active = cost.count_parts(V3, mtp=False)
    assert total == {
        "embedding": 926_679_040, "head": 926_679_040, "attention": 61 * 187_107_328,
        "routed experts": 58 * 256 * 44_040_192, "shared experts": 58 * 44_040_192,
        "gates": 58 * 1_835_008, "dense feed-forward": 3 * 396_361_728,
        "norms": (61 * 2 + 1) * 7168}
    ends = active["embedding"], active["head"]
    assert [round(active.total() / 1e9, 2), round((active.total() - ends[0]) / 1e9, 2),
            round((active.total() - sum(ends)) / 1e9, 2)] == [37.55, 36.63, 35.70]
    mtp = cost.count_parts(V3)[0].total() - total.total()
    layer = 187_107_328 + 257 * 44_040_192 + 1_835_008 + 2 * 7168
    assert mtp == layer + 2 * 7168 ** 2 + 3 * 7168
    assert round((total.total() + mtp + sum(ends)) / 1e9, 2) == 684.49


@pytest.mark.parametrize("preset", ["nano", "student", "node"])
def test_cost_parts_sum_to_a_real_model(preset):
    """The parts sum to all parameters of a model that is built, and the active ones to all but the
    idle experts. count_parameters leaves out MTP."""
    c = dataclasses.replace(r1mini.PRESETS[preset], n_layers=3, n_dense_layers=1)
    model = moe.Transformer(c)
    experts = [m for m in model.modules() if isinstance(m, moe.Experts)]
    idle = sum(len(m.w2) - c.n_activated_experts for m in experts) * 3 * c.dim * c.moe_inter_dim
    count = sum(p.numel() for p in model.parameters())
    assert [x.total() for x in cost.count_parts(c)] == [count, count - idle]
    assert cost.count_parameters(dataclasses.replace(c, n_mtp_layers=0)) == \
        cost.count_parameters(c)


def test_cost_prints_published_numbers_of_v3(capsys):
    """cost prints V3's 671B parameters, its 37B active ones (V3 abstract) and a cache of 35,136
    numbers a token: 61 layers of 512 + 64 (V3 section 4.2)."""
    assert cli.main(["cost", "--preset", "v3"]) == 0
    out = capsys.readouterr().out
    assert "671,026,404,352" in out and "37,552,282,624" in out and "35,136" in out


@pytest.mark.parametrize("option", ["--tokens", "--mfu", "--dollars-per-hour"])
def test_cost_options_of_training_need_gpus(option, capsys):
    """Without --gpus, an option of training is refused by one line and exit code 2."""
    assert cli.main(["cost", "--preset", "micro", option, "1"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and "go with --gpus" in error and error.count("\n") == 1


def test_cost_experts_touched_as_the_router_chooses():
    """The mean over 2,000 batches that a real router routes, within five standard errors. The
    scores of its experts are random and independent; tokens may use 2 groups of 4."""
    config = moe.Config(dim=16, n_routed_experts=16, n_activated_experts=3, n_expert_groups=4,
                        n_limited_groups=2)
    torch.manual_seed(0)
    router = moe.Router(config)
    router.weight.data = torch.eye(16)
    for batch in (1, 2, 5, 12, 40):
        expert_ids = router(torch.randn(2000 * batch, 16))[2].view(2000, -1)
        touched = torch.tensor([len(ids.unique()) for ids in expert_ids], dtype=torch.float64)
        error = max(float(touched.std()) / 2000 ** 0.5, 1e-9)
        assert abs(float(touched.mean()) - cost._experts_touched(config, batch)) < 5 * error


def test_cost_bytes_read_by_adding_up_weights():
    """The bytes that a batch reads, by adding up the weights of a real model: all but the
    embedding and idle experts, once. One token reads all active weights; a huge batch all."""
    config = dataclasses.replace(r1mini.PRESETS["micro"], n_mtp_layers=0, n_layers=3)
    model = moe.Transformer(config)
    E, K, batch, trials = config.n_routed_experts, config.n_activated_experts, 3, 2000
    generator = torch.Generator().manual_seed(0)
    others = sum(p.numel() for name, p in model.named_parameters()
                 if ".experts." not in name and not name.startswith("embed."))
    stacks = [p for name, p in model.named_parameters() if ".experts." in name]
    read = []
    for _ in range(trials):
        chosen = torch.rand(batch, E, generator=generator).topk(K).indices.unique()
        read.append(2 * (others + sum(stack[chosen].numel() for stack in stacks)) / batch)
    read = torch.tensor(read)
    error = float(read.std()) / trials ** 0.5
    assert abs(float(read.mean()) - cost._bytes_read(config, batch)) < 5 * error
    total, active = (x.total() - x["embedding"] for x in cost.count_parts(config))
    assert cost._bytes_read(config, 1) == pytest.approx(2 * active)
    assert cost._bytes_read(config, 4096) == pytest.approx(2 * total / 4096)


def test_cost_prints_what_decoding_reads(capsys):
    """V3 by hand: one answer reads 2 bytes of 36.63B active weights (V3's README_WEIGHTS, without
    the embedding); 8 of 256 experts; 2 bytes of 35,136 cached numbers. A dense model has no such
    table."""
    assert cli.main(["cost", "--preset", "v3"]) == 0
    out = capsys.readouterr().out
    assert "| 1 | 8.0 of 256 | 0.03 | 73,251 | 73,251 | 1,340,199 |" in out
    assert "| 4,096 | 256.0 of 256 | 128.00 | 327 |" in out
    assert "\n32 times as many answers" in out and "70,272 bytes" in out
    assert cli.main(["cost", "--preset", "student"]) == 0
    assert "experts" not in capsys.readouterr().out
