"""Tests of tools/report.py: numbers over seeds, from logs and by hand."""
import dataclasses
import json
import os

import pytest
import torch

import moe
import r1mini
from tests.helpers import FEW, micro_run
from tools import cli, report
from tools.cost import count_parameters


def test_report_summary_has_mean_std_and_seeds(tmp_path, capsys):
    """summary.json has the command, and for every number the mean, the standard deviation and the
    value of each seed. The seeds of two real runs are compared by hand."""
    first, other = micro_run(), tmp_path / "seed1"
    assert cli.main(["zero", *FEW, "--seed", "1", "--out", str(other)]) == 0
    assert cli.main(["report", str(first), str(other), "--to", str(tmp_path / "kept")]) == 0
    summary = json.loads((tmp_path / "kept" / "summary.json").read_text("utf-8"))
    assert summary["seeds"] == [0, 1] and "report" in summary["command"]
    assert (tmp_path / "kept" / "samples.md").read_bytes() == (first / "samples.md").read_bytes()
    length = summary["metrics"]["zero.length"]
    one, two = length["per_seed"]["0"], length["per_seed"]["1"]
    assert length["mean"] == pytest.approx((one + two) / 2, abs=1e-4)
    assert length["std"] == pytest.approx(abs(one - two) / 2 ** 0.5, abs=1e-4)
    keys = {"base.pass@1", "zero.pass@1", "zero.eval.longer.pass@1", "zero.length_ratio",
            "zero.mixing", "zero.reflection_ratio", "base.mixing", "minutes", "peak_gib",
            "objective.grpo.pass@1"}
    assert keys - {"minutes"} <= set(summary["metrics"])
    alone = torch.get_num_threads() == os.cpu_count()
    assert ("minutes" in summary["metrics"]) == alone


def test_report_tie_is_half_a_win():
    """By hand: scores 1, 0, 1 against 0, 0, 1 win 2 of 3. The folder of an ablation beside
    that of a complete run does not remove the minutes."""
    def account(stages, minutes, scores):
        return report.Account("", "", "0", {}, {}, stages, scores, {}, minutes, 1.0)
    complete = account(["zero", "r1"], 9.0, {"dev1": [0, 0, 1], "r1": [1, 0, 1]})
    rows = report.over_seeds([complete, account(["student_rl_no_format"], None, {})])
    assert rows["r1.win_rate_dev1"]["mean"] == pytest.approx(2 / 3, abs=1e-6)
    assert rows["minutes"]["mean"] == 9.0


def test_report_differences_of_stages_equal_hand_results():
    """By hand: how far R1 is behind Zero, how much more is mixed without the language reward, and
    RL's FLOPs over distillation's."""
    a = report.Account("", "", "0", {}, {"zero.pass@1": 0.9, "r1.pass@1": 0.88, "dev2.mixing": 0.1,
                       "no_language_reward.mixing": 0.4, "flops.student_rl": 3.0,
                       "flops.distill": 2.0, "flops.distill_logits": 4.0}, [], {}, {}, None, 1.0)
    out = report.of_seed([a], set())
    assert {key: out[key] for key in ("r1.behind_zero", "no_language_reward.ratio",
                                      "flops.rl_to_distill", "flops.rl_to_logits")} == {
        "r1.behind_zero": pytest.approx(0.02), "no_language_reward.ratio": pytest.approx(4.0),
        "flops.rl_to_distill": 1.5, "flops.rl_to_logits": 0.75}


def test_report_flops_equal_hand_count():
    """By hand, with N parameters in products, the embedding left out: RL takes 2 N FLOPs for every
    token, and for a token of a live group 6 N to learn and 2 N for the reference. A supervised
    stage takes 6 N, a teacher's with MTP. Collected samples take 2 N of the teacher."""
    run = r1mini.Run()
    N, small = (count_parameters(c)[1] - c.vocab_size * c.dim for c in (run.model, run.student))
    log = [{"kind": "config"} | dataclasses.asdict(run),
           {"kind": "zero", "tokens": 700, "prompt_tokens": 300, "learnt_tokens": 400},
           {"kind": "base", "tokens": 50}, {"kind": "distill", "tokens": 50},
           {"kind": "collected", "stage": "distill", "tokens": 9},
           {"kind": "distill_logits", "tokens": 5}]
    model = moe.Transformer(run.model)
    mtp = model.head.weight.numel() + sum(  # MTP uses the head and 2 of 8 experts
        p.numel() // (4 if ".experts." in name else 1) for name, p in model.mtp.named_parameters())
    expected = {"zero": (2 * 1000 + 8 * 400) * N, "base": 300 * (N + mtp), "distill": 300 * small,
            "collect_distill": 18 * N, "distill_logits": 30 * small + 10 * N}
    assert report.of_flops(log) == pytest.approx({k: x / 1e12 for k, x in expected.items()})
    log[0]["zero"] = {"beta": 0}
    assert report.of_flops(log)["zero"] == pytest.approx((2 * 1000 + 6 * 400) * N / 1e12)


def test_report_contains_the_pages_of_studies(tmp_path):
    """A study's page stands in the report beside it: without its title, with headings one level
    down, and with paths of pictures that lead there."""
    (tmp_path / "compute").mkdir()
    (tmp_path / "compute" / "report.md").write_text(
        "# compute\n\n`the command`\n\n## More\n\n![x](figures/x.png)\n", "utf-8")
    (tmp_path / "compute" / "summary.json").write_text('{"seeds": [0, 2], "commit": "abc"}')
    assert report.studied(tmp_path / "r1") == {"Test-time compute": [
        "`the command`", "", "Seeds 0, 2, commit abc.", "", "### More", "",
        "![x](../compute/figures/x.png)"]}
