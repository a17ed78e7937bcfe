"""Tests of tools/eval.py: a checkpoint on a user's problems and on held-out ones, also against
another checkpoint."""
import json
from statistics import fmean, stdev
from types import SimpleNamespace

import pytest

from tests.helpers import json_lines, micro_run
from tools import cli, eval


@pytest.fixture(scope="module")
def zero():
    """The path of the zero checkpoint of a finished run."""
    return str(micro_run() / "zero.pt")


def test_eval_reports_problems_in_file_order(zero, tmp_path, capsys):
    """eval --problems --json prints one object with every problem in the order of the file, and
    pass@1 is the mean over them."""
    file = tmp_path / "problems.jsonl"
    file.write_text(json_lines({"question": "Compute 12+3", "answer": 15},
                               {"question": "计算9-4 <think>", "answer": "5"}), "utf-8")
    assert cli.main(["eval", zero, "--problems", str(file), "--samples",
                     "4", "--json"]) == 0
    r = json.loads(capsys.readouterr().out)
    assert [p["question"] for p in r["by_problem"]] == ["Compute 12+3", "计算9-4 <think>"]
    assert r["pass@1"] == pytest.approx(sum(p["right"] for p in r["by_problem"]) / 8)
    assert {"pass@4", "cons@4", "length", "mixing"} <= set(r)


def test_eval_of_a_problem_does_not_depend_on_its_place(zero, tmp_path, capsys):
    """A problem gets the same answers in any order of the file, with any other problems in it, and
    in whatever lots they are asked. Its answers differ from each other."""
    lines = [{"question": question, "answer": 8}
             for question in ("1+2", "good evening", "Compute 3+4-5+6", "计算 12+3", "1+3")]
    found = {}
    for name, chosen, rows in (("all", lines, 64), ("reversed", lines[::-1], 64),
                               ("lots", lines, 3), ("last", lines[-1:], 64)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json_lines(*chosen), "utf-8")
        assert cli.main(["eval", zero, "--problems", str(file), "--samples", "8", "--json", "--set",
                         f"eval.rows={rows}"]) == 0
        records = json.loads(capsys.readouterr().out)["by_problem"]
        found[name] = {r["question"]: (r["vote"], r["length"]) for r in records}
    assert found["all"] == found["reversed"] == found["lots"]
    assert found["last"]["1+3"] == found["all"]["1+3"]


def test_eval_votes_beyond_16_samples(zero, tmp_path, capsys):
    """Above 16 samples eval adds the vote and the most central answer of k for each power of 2.
    The answers are those of the first pass, so pass@1 is the mean over problems all the same."""
    file = tmp_path / "problems.jsonl"
    file.write_text(json_lines({"question": "Compute 12+3", "answer": 15}), "utf-8")
    assert cli.main(["eval", zero, "--problems", str(file), "--samples",
                     "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for kind, least in (("pass", 1), ("cons", 1), ("central", 4)):  # two answers have no center
        assert {f"{kind}@{k}" for k in (1, 2, 4, 8, 16, 32) if k >= least} <= set(found)
    assert found["pass@1"] == pytest.approx(found["by_problem"][0]["right"] / 32)


def test_eval_without_json_prints_a_line_for_every_number(zero, capsys):
    """Without --json eval prints a line for every mean and for every level of held-out problems."""
    assert cli.main(["eval", zero, "--samples", "2"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"pass@1", "cons@2", "length", "mixing"} <= set(names) and names.count("level") > 1


def test_eval_against_is_paired_by_problem(zero, tmp_path, capsys, monkeypatch):
    """The difference is the mean over problems of one share less the other, with the t interval of
    four degrees of freedom. The other checkpoint gets the answers that it gives when it is asked
    alone. Here an answer with an even number of letters counts as right."""
    monkeypatch.setattr("engine.evaluate.tasks.accuracy", lambda text, _: float(len(text) % 2 == 0))
    file, dev3 = tmp_path / "problems.jsonl", zero.replace("zero.pt", "dev3.pt")
    file.write_text(json_lines(*({"question": f"Compute 12+{i}", "answer": 1} for i in range(5))))
    found = []
    for words in ([zero, "--against", dev3], [dev3]):
        assert cli.main(["eval", *words, "--problems", str(file), "--samples", "8", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    pair, alone = found
    assert pair["against"] == alone
    gaps = [(a["right"] - b["right"]) / 8
            for a, b in zip(pair["by_problem"], pair["against"]["by_problem"])]
    half_width = 2.7764 * stdev(gaps) / 5 ** 0.5  # t of four degrees of freedom, from a table
    assert half_width > 0
    assert pair["difference"] == pytest.approx({
        "mean": fmean(gaps), "low": fmean(gaps) - half_width, "high": fmean(gaps) + half_width,
        "n": 5}, abs=1e-4)


def test_eval_difference_counts_a_question_once():
    """By hand: of three problems two are one question, so there are two differences, 0.5 and -0.5.
    Their t interval has one degree of freedom: 12.706 standard errors of 0.5."""
    records = [{"question": q, "right": right} for q, right in (("a", 4), ("a", 2), ("b", 1))]
    others = [{"question": q, "right": right} for q, right in (("a", 1), ("a", 1), ("b", 3))]
    found = eval._difference(records, others, 4)
    assert found == pytest.approx({"mean": 0.0, "low": -6.353, "high": 6.353, "n": 2}, abs=1e-3)


@pytest.mark.parametrize("low, high, verdict", [
    (0.01, 0.03, "new.pt is better"), (-0.03, -0.01, "old.pt is better"),
    (-0.01, 0.01, "which is better cannot be told"), (0.0, 0.0, "which is better cannot be told")])
def test_eval_verdict_is_by_the_interval(low, high, verdict):
    """One line says which is better, if the interval does not contain 0."""
    options = SimpleNamespace(checkpoint="new.pt", against="old.pt")
    line = eval._verdict({"mean": (low + high) / 2, "low": low, "high": high, "n": 9}, options)
    assert line.startswith("new.pt minus old.pt: ") and line.endswith(f", 9 problems: {verdict}")


def test_eval_against_prints_both(zero, capsys):
    """Both checkpoints' numbers come under their names, and the verdict is the last line."""
    base = zero.replace("zero.pt", "base.pt")
    assert cli.main(["eval", zero, "--against", base, "--samples", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith(".pt:")] == [f"{base}:", f"{zero}:"]
    assert sum(line.startswith("pass@1 ") for line in lines) == 2
    assert lines[-1].startswith(f"{zero} minus {base}: ")
