"""Tests of tools/report.py: numbers over seeds, from logs and by hand."""
import json
import os
import shutil

import pytest
import torch

import tasks
from engine.errors import UserError
from engine.folder import read_log
from tests.helpers import FEW, micro_run
from tests.refusing import contents, refused
from tools import cli, report
from workshop import measure


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


def test_report_leaves_out_what_no_answer_shows(tmp_path, monkeypatch):
    """A run whose answers have no words has no number and no curve of languages, and all others."""
    monkeypatch.setattr(tasks, "word_languages", lambda text: [])
    run, kept = tmp_path / "run", tmp_path / "kept"
    assert cli.main(["zero", *FEW, "--out", str(run)]) == 0
    assert cli.main(["report", str(run), "--to", str(kept)]) == 0
    metrics = json.loads((kept / "summary.json").read_text("utf-8"))["metrics"]
    assert {"zero.pass@1", "zero.general_format", "base.reflection"} <= set(metrics)
    assert not any("mixing" in key or "language" in key for key in metrics)
    [curves] = json.loads((kept / "curves.json").read_text("utf-8")).values()
    assert curves["length"] and not curves["mixing"] and not curves["language"]
    rl = [r for r in read_log(run) if r["kind"] != "base"]
    monkeypatch.setattr(measure, "read_log", lambda path: rl)
    curves = measure._curves(run)["dev"]
    assert curves["length"] and not curves["mixing"] and not curves["language"]


def test_report_tie_is_half_a_win():
    """By hand: scores 1, 0, 1 against 0, 0, 1 win 2 of 3. The folder of an ablation beside
    that of a complete run does not remove the minutes."""
    def numbers_of(stages, minutes, scores):
        return report.RunNumbers("", "", "0", {}, {}, stages, scores, {}, minutes, 1.0)
    complete = numbers_of(["zero", "r1"], 9.0, {"dev1": [0, 0, 1], "r1": [1, 0, 1]})
    metrics = report._metrics_over_seeds([complete, numbers_of(["student_rl_no_format"], None, {})])
    assert metrics["r1.win_rate_dev1"]["mean"] == pytest.approx(2 / 3, abs=1e-6)
    assert metrics["minutes"]["mean"] == 9.0


def test_report_differences_of_stages_equal_hand_results():
    """By hand: how far R1 is behind Zero, how much more is mixed without the language reward, and
    RL's FLOPs over distillation's."""
    numbers = {"zero.pass@1": 0.9, "r1.pass@1": 0.88, "dev2.mixing": 0.1,
               "no_language_reward.mixing": 0.4, "flops.student_rl": 3.0,
               "flops.distill": 2.0, "flops.distill_logits": 4.0}
    run = report.RunNumbers("", "", "0", {}, numbers, [], {}, {}, None, 1.0)
    found = report._seed_numbers([run], set())
    assert {key: found[key] for key in ("r1.behind_zero", "no_language_reward.ratio",
                                      "flops.rl_to_distill", "flops.rl_to_logits")} == {
        "r1.behind_zero": pytest.approx(0.02), "no_language_reward.ratio": pytest.approx(4.0),
        "flops.rl_to_distill": 1.5, "flops.rl_to_logits": 0.75}


def test_report_to_a_folder_writes_no_page(tmp_path, capsys):
    """A run's own folder gets report.md. With --to only the numbers and the samples are written,
    since the page of results/NAME is written by hand; the run's report.md stays as it was."""
    run, kept = tmp_path / "run", tmp_path / "kept"
    shutil.copytree(micro_run(), run)
    (run / "report.md").unlink()
    assert cli.main(["report", str(run)]) == 0
    page = (run / "report.md").read_text("utf-8")
    for title in ("Base and R1-Zero", "The stages", "How exact the tests are", "All numbers"):
        assert f"## {title}\n" in page
    tests = [r for r in read_log(run) if r["kind"] == "test" and r["stage"] == "zero"]
    for row, r in zip(("pass@1", "pass@1, T 0.6", "pass@1, T 0.6, longer"), tests, strict=True):
        cells = f"{r['pass@1']:.3f} | {r['pass@1.error']:.3f} | {r['items']}"
        assert f"| zero: {row} | {cells} |" in page
    general = [r for r in read_log(run) if r["kind"] == "general" and r["stage"] == "r1"][0]
    items = sum(general[f"{kind}.items"] for kind in ("greeting", "fact", "how"))
    assert f"| {general['helpfulness.error']:.3f} | {items} |" in page
    assert f"more: {run / 'report.md'}" in capsys.readouterr().out
    assert cli.main(["report", str(run), "--to", str(kept)]) == 0
    names = {path.name for path in kept.iterdir()} - {"figures"}  # these need matplotlib
    assert names == {"summary.json", "curves.json", "samples.md"}
    assert (run / "report.md").read_text("utf-8") == page


def copy_with(folder, log_changes):
    """A copy of the micro run whose log and config.json have other settings."""
    shutil.copytree(micro_run(), folder, ignore=shutil.ignore_patterns("*.pt"))
    first, *rest = (folder / "log.jsonl").read_text("utf-8").splitlines(keepends=True)
    record = json.loads(first)
    for key, value in log_changes.items():
        part, _, field = key.rpartition(".")
        (record[part] if part else record)[field] = value
    (folder / "log.jsonl").write_text(json.dumps(record) + "\n" + "".join(rest), "utf-8")
    return str(folder)


def test_report_of_seeds_one_by_one_is_that_of_all(tmp_path):
    """numbers_of_seed() of each seed gives what report() gives of all seeds together: the same
    value for each key and seed, and the same curves."""
    runs = [copy_with(tmp_path / f"seed{seed}", {"seed": seed}) for seed in (0, 1)]
    report.report(runs, tmp_path / "kept")
    metrics = json.loads((tmp_path / "kept" / "summary.json").read_text("utf-8"))["metrics"]
    curves, values = {}, {}
    for seed, run in enumerate(runs):
        found = report.numbers_of_seed([run])
        curves |= found["curves"]
        for key, value in found["metrics"].items():
            values.setdefault(key, {})[str(seed)] = value
    assert values == {key: metric["per_seed"] for key, metric in metrics.items()}
    assert curves == json.loads((tmp_path / "kept" / "curves.json").read_text("utf-8"))
    with pytest.raises(UserError, match="two of these runs have a number"):
        report.numbers_of_seed([runs[0], runs[0]])


def test_report_names_the_commit_of_the_runs(tmp_path):
    """summary.json has the commits that the runs' own files name, not the one that reports. A run
    continued at another commit counts as of the last one. Seconds are added up by hand."""
    runs = [copy_with(tmp_path / f"seed{seed}", {"seed": seed}) for seed in (0, 1)]
    for run, commits in zip(runs, (["bbb"], ["ccc", "aaa"])):
        records = [json.loads(line) for line in open(f"{run}/timing.jsonl", encoding="utf-8")]
        machine = next(r for r in records if "machine" in r)
        records = [r for r in records if "machine" not in r]
        for commit in reversed(commits):
            records.insert(0, machine | {"commit": commit})
        with open(f"{run}/timing.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(r) + "\n" for r in records)
    report.report(runs, tmp_path / "kept")
    summary = json.loads((tmp_path / "kept" / "summary.json").read_text("utf-8"))
    assert summary["commit"] == "aaa, bbb"
    with open(f"{runs[0]}/timing.jsonl", "w", encoding="utf-8") as file:
        file.write('{"machine": "x"}\n{"seconds": 2.5}\n{"seconds": 1}\n{"seconds": 100')
    assert report.seconds_of(runs[0]) == 3.5


@pytest.mark.parametrize("changes, named", [
    ({"seed": 1, "preset": "nano", "model.dim": 96}, "(preset)"),
    ({"seed": 1, "zero.lr": 0.5, "data_file": "x/mine.jsonl"}, "(data_file, zero.lr)"),
    ({"zero.lr": 0.5}, "(zero.lr)")])
def test_report_refuses_runs_with_different_settings(changes, named, tmp_path, capsys):
    """Two runs with other settings are no seeds of one another: they are refused by one line that
    names the settings, and nothing is written. Under a NAME both are reported."""
    other, before = copy_with(tmp_path / "other", changes), contents(tmp_path)
    line = refused(["report", str(micro_run()), other, "--to", str(tmp_path / "kept")], capsys)
    assert f"different settings {named}" in line and f"NAME={other}" in line
    assert {path.name for path in tmp_path.iterdir()} == {"other"}
    assert contents(tmp_path) == before | contents(tmp_path / "other")
    assert cli.main(["report", str(micro_run()), f"mine-2={other}"]) == 0


def test_report_seeds_may_start_from_other_folders(tmp_path, capsys):
    """The seed, the start and the folder of the data may differ between the runs of a mean."""
    data = {"start": "runs/r1-{}/base.pt", "data_file": "runs/r1-{}/distill.jsonl"}
    runs = [copy_with(tmp_path / str(seed), {"seed": seed} | {
        key: path.format(seed) for key, path in data.items()}) for seed in (0, 1)]
    assert cli.main(["report", *runs]) == 0
    assert "±" in capsys.readouterr().out


def test_report_words_are_paths_or_names(tmp_path, monkeypatch):
    """A folder is a PATH, also with "=" in its name. Otherwise NAME ends at the first "="."""
    monkeypatch.chdir(tmp_path)
    for folder in ("lr=1e-3", "runs/a=b"):
        (tmp_path / folder).mkdir(parents=True)
    words = {"lr=1e-3": ("", "lr=1e-3"), "runs/a=b": ("", "runs/a=b"), "runs/y": ("", "runs/y"),
             "lr=./1e-3": ("lr", "./1e-3"), "no-lang=runs/y": ("no-lang", "runs/y"),
             "X=lr=1e-3": ("X", "lr=1e-3")}
    assert {word: report.name_and_path(word) for word in words} == words
    for word in ("runs/lr=2", "no lang=runs/y", "=runs/y", "name="):
        with pytest.raises(UserError, match="there is no such folder. If NAME=PATH is meant"):
            report.name_and_path(word)


@pytest.mark.parametrize("target, message", [
    ("file", "is a file; --to names a folder"), ("file/inside", "is a file; --to names a folder"),
    ("run", "holds a run"), ("run/inside", "holds a run")])
def test_report_to_a_wrong_folder_writes_nothing(target, message, tmp_path, capsys):
    """--to a file, a run's folder or a folder inside it is refused before anything is written."""
    (tmp_path / "file").write_text("mine")
    run = copy_with(tmp_path / "run", {})
    before = contents(tmp_path)
    assert message in refused(["report", run, "--to", str(tmp_path / target)], capsys)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\n", b"[1]\n", b'{"stage": "zero"}\n', b"{\n"])
def test_report_names_a_damaged_timing_file(content, tmp_path, capsys):
    """A timing.jsonl that is empty, not UTF-8 or not ours is named by one line."""
    run = copy_with(tmp_path / "run", {})
    (tmp_path / "run" / "timing.jsonl").write_bytes(content)
    assert "timing.jsonl is damaged" in refused(["report", run], capsys)


def test_report_majority_is_named_after_the_answers(tmp_path, capsys):
    """A run that asks each problem 4 times has a majority of 4 in its table, its curves and its
    claims, and no empty row of another number."""
    run = copy_with(tmp_path / "run", {})
    assert cli.main(["report", run, "--to", str(tmp_path / "kept")]) == 0
    assert "majority of 4 (cons@4)" in capsys.readouterr().out
    curves = json.loads((tmp_path / "kept" / "curves.json").read_text("utf-8"))["grpo-seed0"]
    assert curves["cons@4"] and not any(name.startswith("cons@1") for name in curves)
    assert cli.main(["report", run]) == 0
    page = (tmp_path / "run" / "report.md").read_text("utf-8")
    assert "| cons@4 |" in page and "`zero.cons@4`" in page and "of 16" not in page
