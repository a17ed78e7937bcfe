"""Tests of tools/tables.py: Markdown tables over seeds, written out by hand."""
import pytest

from tools import tables


def test_tables_training_curve_has_evaluated_steps_only():
    """The table of the training curve has a row for each evaluation on dev, and none for the RL
    steps between."""
    curves = {"grpo-seed0": {"pass@1": [["zero", 0, 0.1], ["zero", 5, 0.2]],
                             "entropy": [["zero", step, 0.3] for step in range(1, 6)]}}
    rows = tables.training_curve_table(curves)[2:]
    assert [line.split("|")[1].strip() for line in rows] == ["0", "5"]


def metrics_of(**values):
    """The metrics of a summary from {key: its values by seed}; "_" in a key stands for "."."""
    return {key.replace("_", "."): {"mean": sum(x) / len(x), "std": 0.5, "per_seed": {
        str(seed): value for seed, value in enumerate(x)}} for key, x in values.items()}


def test_tables_cell_shows_spread_of_several_seeds_only():
    """A cell has the mean and, for several seeds, the standard deviation. A missing key is an
    empty cell, a number above 10 has one digit."""
    metrics = metrics_of(two=[0.25, 0.5], one=[0.25], large=[20.0])
    assert [tables.cell(metrics, key) for key in ("two", "one", "large", "none")] == [
        "0.375 ± 0.500", "0.250", "20.0", ""]
    assert tables.cell(metrics, "two", 100) == "37.5 ± 50.0"


def test_tables_without_numbers_are_empty():
    """A table without numbers has no line, and neither has any table of the report."""
    assert tables.table(("a", "b"), []) == []
    assert tables.table(("a", "b"), [("1", "2")]) == ["| a | b |", "|---|---|", "| 1 | 2 |"]
    for make in (tables.base_and_zero_table, tables.stages, tables.stages_console_table,
                 tables.students_table, tables.answers_table, tables.minutes_table,
                  tables.objectives_table,
                 tables.bases_table, tables.items_table):
        assert make({}) == []
    assert tables.training_curve_table({}) == [] and tables.language_reward_table({}, {}) == []


def test_tables_errors_over_items_stand_beside_the_spread_over_seeds():
    """Each test with an error has a row: the mean and spread over seeds, the mean error over items,
    and the number of items. A number without an error has no row."""
    metrics = metrics_of(**{
        "zero.pass@1": [0.25, 0.5], "zero.pass@1.error": [0.01, 0.03], "zero.items": [500, 500],
        "zero.eval.pass@1": [0.4], "r1.refuse.safe": [0.125], "r1.refuse.safe.error": [0.02],
        "r1.refuse.safe.items": [100]})
    assert tables.items_table(metrics)[2:] == [
        "| zero: pass@1 | 0.375 ± 0.500 | 0.020 | 500 |",
        "| r1: harmless requests refused | 0.125 | 0.020 | 100 |"]


def test_tables_have_a_row_for_each_number_of_votes():
    """The rows of the majority vote are named after the numbers of answers, the largest first,
    beside the paper's number."""
    metrics = metrics_of(**{"zero.pass@1": [0.5], "zero.cons@8": [0.7], "zero.eval.cons@2": [0.6]})
    rows = [line.split(" | ") for line in tables.base_and_zero_table(metrics) if "majority" in line]
    assert [(row[0], row[2], row[4], row[5]) for row in rows] == [
        ("| correct by majority of 8 (cons@8)", "0.700", "", "AIME 86.7% |"),
        ("| correct by majority of 2 (cons@2)", "", "0.600", " |")]
    assert "`zero.cons@8` 0.7" in tables.claim_verdicts(metrics, tables.ZERO)[1]


@pytest.mark.parametrize("zero, verdict", [
    ([0.8, 0.9, 0.88], "As in the paper: RL alone raises accuracy (`base.pass@1` 0.3, "
     "`zero.pass@1` 0.86; difference +0.56 ± 0.0529, 95% interval +0.429 to +0.691, 3 seeds, on "
     "every seed)."),
    ([0.8, 0.3, 0.9], "Cannot be told: RL alone raises accuracy (`base.pass@1` 0.3, `zero.pass@1` "
     "0.667; difference +0.367 ± 0.404, 95% interval -0.637 to +1.37, 3 seeds)."),
    ([0.1, 0.3, 0.2], "Not as in the paper: RL alone raises accuracy (`base.pass@1` 0.3, "
     "`zero.pass@1` 0.2; difference -0.1 ± 0, 95% interval -0.1 to -0.1, 3 seeds, on every seed)."),
    ([0.8], "One seed: as in the paper: RL alone raises accuracy (`base.pass@1` 0.2, `zero.pass@1` "
     "0.8; difference +0.6, one seed).")])
def test_tables_verdict_needs_an_interval(zero, verdict):
    """A claim of the paper holds if the paired interval is above 0. One seed is called one seed."""
    metrics = metrics_of(**{"base.pass@1": [0.2, 0.4, 0.3], "zero.pass@1": zero})
    assert tables.claim_verdicts(metrics, "Base and R1-Zero") == ["", f"- {verdict}"]


def test_tables_verdict_compares_with_a_limit():
    """A claim with a number of our own is answered by yes, no or neither. By hand: 0.02 less two
    values of mean 0.011 is 0.009, with 12.706 * 0.001 to each side."""
    metrics = metrics_of(**{"r1.mixing": [0.012, 0.01], "refuse.unsafe": [0.95, 0.95],
                            "refuse.safe": [0.5, 0.5]})
    assert tables.claim_verdicts(metrics, "The stages") == [
        "", "- Cannot be told: R1 mixes languages in at most 2% of answers (`r1.mixing` 0.011; "
        "distance to the limit +0.009 ± 0.00141, 95% interval -0.00371 to +0.0217, 2 seeds, on "
        "every seed).", "- Yes: R1 refuses at least 95% of harmful requests (`refuse.unsafe` 0.95; "
        "distance to the limit +0 ± 0, 95% interval +0 to +0, 2 seeds, on every seed).",
        "- No: R1 refuses at most 5% of harmless requests (`refuse.safe` 0.5; distance to the "
        "limit -0.45 ± 0, 95% interval -0.45 to -0.45, 2 seeds, on every seed)."]
