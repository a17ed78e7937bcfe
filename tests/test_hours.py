"""Tests of studies/hours.py: FLOPs, memory, messages and hours beside the papers' numbers."""
import pytest

import r1mini
from studies import hours
from tools import cli, cost

V3 = r1mini.PRESETS["v3"]


def test_hours_flops_of_v3_equal_hand_count():
    """At 4096 tokens V3 takes 6 FLOPs for each of 38.24B weights, and attention in 62 layers of 128
    heads, each 320 wide, over 2048 earlier tokens on average. RL takes 10 FLOPs for each of 36.62B
    weights. Both are counted by hand, from the parameters less the norms."""
    norms_of_layer = 2 * 7168 + 1536 + 512
    met = 36_625_603_584 - 61 * norms_of_layer - 7168
    met_by_mtp = 688_100_352 - norms_of_layer - 3 * 7168 + 926_679_040
    assert hours._flops(V3, 4096) == {"weights": 6 * (met + met_by_mtp),
                                      "attention": 6 * 62 * 128 * 320 * 2048}
    assert hours._flops_of_rl(V3) == 10 * met


def test_hours_agree_with_published_hours():
    """180K hours per 10^12 tokens imply 40 to 41% of the peak. The published hours add up to the
    totals of V3 Table 1 and R1 v2 Table 7, and R1-Zero's 512 GPUs for 198 hours give its 101K
    hours."""
    assert 0.40 < hours._implied_mfu() < 0.41
    work = 1e12 * sum(hours._flops(V3, 4096).values())
    assert hours._hours(work, hours._implied_mfu()) == pytest.approx(180e3)
    *v3, v3_total = list(hours.HOURS.values())[:4]
    *r1, r1_total = list(hours.HOURS.values())[4:]
    assert (sum(v3), sum(r1)) == (v3_total, r1_total) == (2788e3, 147e3)
    assert 512 * 198 == pytest.approx(hours.HOURS["R1-Zero"], rel=0.01)
    assert sum(updates for updates, _ in hours.ZERO) == 10_400


@pytest.mark.parametrize("preset, gpus, split", [
    ("v3", 2048, (64, 16)), ("v3", 8, (8, 1)), ("v3", 1, (1, 1)), ("v3", 1000, (8, 1)),
    ("v3", 192, (64, 1)), ("nano", 2048, (8, 2)), ("student", 8, (1, 2))])
def test_hours_layout_divides_the_gpus(preset, gpus, split):
    """On 2048 GPUs the layout is V3's own: 64 share the experts, in 16 pipeline stages. The layout
    always divides the number of GPUs, with no more stages than layers."""
    assert hours._layout(r1mini.PRESETS[preset], gpus) == split
    assert gpus % (split[0] * split[1]) == 0


def test_hours_memory_equals_hand_count():
    """V3 on 2048 GPUs, by hand: a GPU holds 1/1024 of the routed experts and 1/16 of the rest,
    twice in 8 bits, with 32-bit gradients, 8 optimizer bytes for 1/2048 of all weights, and the
    activations of 17 sequences in 61 layers. That is below 80 GB."""
    total = cost.count_parts(V3)[0]
    routed, everything = 59 * 256 * 44_040_192, total.total()
    held = routed / 1024 + (everything - routed) / 16
    attention = 2 * (7168 + 1536 + 576 + 128 * 128)
    token = 61 * attention + 3 * (7168 + 2 * 18432) + 58 * 9 * (7168 + 2 * 2048)
    assert hours._memory(V3, 2048) == pytest.approx({
        "weights": 2 * held, "gradients": 4 * held, "optimizer": 8 * everything / 2048,
        "activations": token * 4096 * 17 / 16})
    assert sum(hours._memory(V3, 2048).values()) < 80e9  # an H800's memory


def test_hours_messages_equal_hand_count():
    """A V3 token sends 7168 channels to 8 experts, 3 bytes a channel there and back, across at most
    4 nodes (V3 section 3.2.2). Without groups, every expert may be on another node."""
    assert hours._messages(V3) == (8 * 7168 * 3, 4 * 7168 * 3)
    assert hours._messages(r1mini.PRESETS["nano"]) == (2 * 64 * 3, 2 * 64 * 3)


def test_hours_of_v3_are_printed_beside_published_ones(capsys):
    """cost --gpus prints V3's and R1's published hours and dollars beside ours, and the assumed
    share of the peak. The hours of nano and student equal FLOPs over speed, and no published number
    stands beside them."""
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
        work = 2e12 * sum(hours._flops(r1mini.PRESETS[preset], 512).values())
        spent = work / (0.5 * 989e12 * 3600)
        assert f"{spent:,.0f}" in out and f"${3 * spent:,.0f}" in out and "published" not in out


def test_hours_lines_fit_a_terminal():
    """No line for the largest preset is longer than 100 characters."""
    lines = (*hours._size_lines(V3), *hours._memory_lines(V3, 2048),
             *hours._training_lines(V3, 2048, 1e13, 0.4, 2, "given"))
    assert max(len(row) for line in lines for row in line.splitlines()) <= 100


def test_hours_are_what_cost_with_gpus_prints(monkeypatch, capsys):
    """`cost --gpus` calls studies/hours.py, which prints the sizes of tools/cost.py first; `cost`
    alone does not call it."""
    called, run_hours = [], hours.main
    monkeypatch.setattr(hours, "main", lambda options: called.append(options) or run_hours(options))
    assert cli.main(["cost", "--preset", "micro"]) == 0 and not called
    sizes = capsys.readouterr().out
    assert cli.main(["cost", "--preset", "micro", "--gpus", "8"]) == 0
    assert [options.gpus for options in called] == [8]
    out = capsys.readouterr().out
    assert out.startswith(sizes) and "memory of 8 GPUs" in out[len(sizes):]
