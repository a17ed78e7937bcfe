"""Tests of tools/eval.py: a checkpoint on a user's problems and on held-out ones."""
import json

import pytest

from tests.helpers import json_lines, micro_run
from tools import cli


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
