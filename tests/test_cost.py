"""The tests of cost: against numbers that the papers print, or that were worked by hand."""
import dataclasses

import pytest

import moe
import r1mini
from studies import hours
from tools import cli, cost

V3 = r1mini.PRESETS["v3"]


def test_parts_of_v3_are_the_hand_counted_ones():
    """PAPERS 1.8: each part of 671,026,404,352; what is active with and without the embedding and
    the head; MTP's own 11.61B, and the checkpoint's 684.49B with its copies of both."""
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
def test_parts_are_those_of_a_model_that_exists(preset):
    """Their sums: all the parameters of a real model, idle experts' apart; MTP is left out of
    count_parameters alone."""
    c = dataclasses.replace(r1mini.PRESETS[preset], n_layers=3, n_dense_layers=1)
    model = moe.Transformer(c)
    experts = [m for m in model.modules() if isinstance(m, moe.Experts)]
    idle = sum(len(m.w2) - c.n_activated_experts for m in experts) * 3 * c.dim * c.moe_inter_dim
    count = sum(p.numel() for p in model.parameters())
    assert [x.total() for x in cost.count_parts(c)] == [count, count - idle]
    assert cost.count_parameters(dataclasses.replace(c, n_mtp_layers=0)) == \
        cost.count_parameters(c)


def test_flops_by_hand():
    """V3 at 4096 tokens: 6 for each of 38.24B weights, and 62 layers of 128 heads, each 320 wide,
    on average 2048 tokens back; RL's 10 for each of 36.63B."""
    met = 36_625_603_584 + 688_100_352 + 926_679_040
    assert hours.flops(V3, 4096) == {"weights": 6 * met, "attention": 6 * 62 * 128 * 320 * 2048}
    assert hours.flops_of_rl(V3) == 10 * 36_625_603_584


def test_hours_are_the_papers():
    """At the share of the peak that its 180K hours per 10^12 tokens imply, between 40 and 41%;
    sums of Table 1 and Table 7; 512 GPUs for 198 hours."""
    assert 0.40 < hours.implied_mfu() < 0.41
    work = 1e12 * sum(hours.flops(V3, 4096).values())
    assert hours.hours(work, hours.implied_mfu()) == pytest.approx(180e3)
    *v3, whole = list(hours.HOURS.values())[:4]
    *r1, both = list(hours.HOURS.values())[4:]
    assert (sum(v3), sum(r1)) == (whole, both) == (2788e3, 147e3)
    assert 512 * 198 == pytest.approx(hours.HOURS["R1-Zero"], rel=0.01)
    assert sum(updates for updates, _ in hours.ZERO) == 10_400


@pytest.mark.parametrize("preset, gpus, split", [
    ("v3", 2048, (64, 16)), ("v3", 8, (8, 1)), ("v3", 1, (1, 1)), ("v3", 1000, (8, 1)),
    ("v3", 192, (64, 1)), ("nano", 2048, (8, 2)), ("student", 8, (1, 2))])
def test_a_layout_divides_the_gpus(preset, gpus, split):
    """V3's own 64 and 16 on 2048; never more stages than layers, nor a part of an expert."""
    assert hours.layout(r1mini.PRESETS[preset], gpus) == split and gpus % (split[0] * split[1]) == 0


def test_memory_by_hand():
    """V3 on 2048: a 1024th of the routed experts and a 16th of the rest, two copies of 8 bits,
    gradients of 32; 8 bytes of optimizer for a 2048th; 17 sequences' bytes of 61 layers."""
    total = cost.count_parts(V3)[0]
    routed, whole = 59 * 256 * 44_040_192, total.total()
    held = routed / 1024 + (whole - routed) / 16
    attention = 2 * (7168 + 1536 + 576 + 128 * 128)
    token = 61 * attention + 3 * (7168 + 2 * 18432) + 58 * 9 * (7168 + 2 * 2048)
    assert hours.memory(V3, 2048) == pytest.approx({
        "weights": 2 * held, "gradients": 4 * held, "optimizer": 8 * whole / 2048,
        "activations": token * 4096 * 17 / 16})
    assert sum(hours.memory(V3, 2048).values()) < 80e9  # it did fit


def test_messages_by_hand():
    """V3: 8 experts of 7168 channels, 3 bytes each there and back; at most 4 nodes. Without groups
    every expert may be on a node of its own."""
    assert hours.messages(V3) == (8 * 7168 * 3, 4 * 7168 * 3)
    assert hours.messages(r1mini.PRESETS["nano"]) == (2 * 64 * 3, 2 * 64 * 3)


def test_v3_stands_beside_the_papers(capsys):
    """Its hours and dollars, and R1's; what is assumed is said. A smaller preset has no paper."""
    assert cli.main(["cost", "--preset", "v3", "--gpus", "2048"]) == 0
    out = capsys.readouterr().out
    rows = {line[:22].strip(): line[22:].split() for line in out.splitlines()}
    assert rows["V3"] == ["2,788,000", "$5,576,000"] and rows["R1"] == ["147,000", "$294,000"]
    assert rows["pre-training"] == ["2,664,000", "2,664,000", "$5,328,000"]
    assert rows["training"] == ["2,664,000", "$5,328,000", "54.2"]
    assert rows["from node to node"][0] == "86,016" and "assumed: 40.7% of 989" in out
    words = ["--gpus", "4", "--tokens", "2e12", "--mfu", "0.5", "--dollars-per-hour", "3"]
    for preset in ("nano", "student"):
        assert cli.main(["cost", "--preset", preset, *words]) == 0
        out = capsys.readouterr().out
        spent = 2e12 * sum(hours.flops(r1mini.PRESETS[preset], 512).values()) / (0.5 * 989e12 * 3600)
        assert f"{spent:,.0f}" in out and f"${3 * spent:,.0f}" in out and "published" not in out


def test_lines_fit_a_terminal():
    """Those of the largest preset."""
    lines = (*hours.sizes(V3), *hours.room(V3, 2048), *hours.effort(V3, 2048, 1e13, 0.4, 2, "given"))
    assert max(len(row) for line in lines for row in line.splitlines()) <= 100
