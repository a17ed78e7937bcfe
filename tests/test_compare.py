"""Tests of tools/compare.py: intervals against published values, verdicts worked by hand."""
import math
import random
from statistics import fmean, stdev

import pytest

from tools import compare
from tools.compare import HOLDS, OPEN, REVERSED, summarise


@pytest.mark.parametrize("freedom, confidence, t", [
    (1, 0.95, 12.706), (2, 0.95, 4.303), (3, 0.95, 3.182), (4, 0.95, 2.776), (5, 0.95, 2.571),
    (9, 0.95, 2.262), (10, 0.95, 2.228), (30, 0.95, 2.042), (120, 0.95, 1.980),
    (1, 0.99, 63.657), (6, 0.99, 3.707), (7, 0.9, 1.895)])
def test_compare_t_quantile_equals_published_tables(freedom, confidence, t):
    """Student's t of printed tables, to their three decimals."""
    assert compare._t_quantile(freedom, confidence) == pytest.approx(t, abs=5e-4)


def test_compare_interval_covers_the_mean_as_often_as_it_says():
    """The means of 4 normal numbers lie within the interval in 95% of 4000 samples. With the normal
    distribution's 1.96 in place of t it would be 86%."""
    rng, covered = random.Random(0), 0
    for _ in range(4000):
        found = compare._interval([rng.gauss(3, 2) for _ in range(4)])
        covered += found["low"] < 3 < found["high"]
    assert covered / 4000 == pytest.approx(0.95, abs=0.01)


def test_compare_difference_is_paired_by_seed():
    """By hand: seeds that both arms have, in any order; 0.1, 0.2, 0.3 have mean 0.2, standard
    deviation 0.1 and a half width of 4.303 * 0.1 / sqrt(3). One seed has no interval."""
    ours = {"2": 0.9, "0": 0.5, "1": 0.4, "7": 0.0}
    others = {"0": 0.4, "1": 0.2, "2": 0.6, "9": 1.0}
    found = compare.paired_difference(ours, others)
    half_width = 4.3027 * 0.1 / math.sqrt(3)
    assert found["per_seed"] == pytest.approx({"2": 0.3, "0": 0.1, "1": 0.2})
    assert found["n"] == 3
    assert (found["mean"], found["std"]) == (pytest.approx(0.2), pytest.approx(0.1))
    assert found["low"] == pytest.approx(0.2 - half_width, abs=1e-5)
    assert found["high"] == pytest.approx(0.2 + half_width, abs=1e-5)
    assert compare.paired_difference({"0": 2.0}, {"0": 0.5}) == {
        "mean": 1.5, "std": 0.0, "per_seed": {"0": 1.5}, "low": None, "high": None, "n": 1}


def arms(low, high):
    """Metrics of two arms from their values by seed."""
    return {name: summarise({str(seed): x for seed, x in enumerate(values)})
            for name, values in (("low", low), ("high", high))}


@pytest.mark.parametrize("differences, verdict, on_every_seed", [
    ([0.10, 0.11, 0.12], HOLDS, True), ([-0.10, -0.11, -0.12], REVERSED, True),
    ([0.01, 0.11, 0.12], OPEN, True),                      # three seeds agree, and do not suffice
    ([0.1] * 9 + [-0.01], HOLDS, False),                   # one seed of ten disagrees
    ([0.1, -0.1, 0.0], OPEN, False), ([0.0, 0.0], OPEN, False),
    ([0.1], HOLDS, True), ([-0.1], REVERSED, True), ([0.0], OPEN, False)])
def test_compare_verdict_needs_an_interval_without_0(differences, verdict, on_every_seed):
    """By hand. "On every seed" is said if and only if all seeds agree."""
    low = [0.3 + 0.05 * i for i in range(len(differences))]
    found = compare.compare(arms(low, [a + d for a, d in zip(low, differences)]), "low", "high")
    assert (found.verdict, found.on_every_seed) == (verdict, on_every_seed)
    assert found.holds == (verdict == HOLDS)
    several = len(differences) > 1
    assert ("on every seed" in found.text()) == (several and on_every_seed)
    assert ("one seed" in found.text(), "interval" in found.text()) == (not several, several)
    if several and verdict != OPEN:  # the oracle: the t statistic beyond the printed quantile
        t = fmean(differences) / (stdev(differences) / math.sqrt(len(differences)))
        assert abs(t) > {3: 4.303, 10: 2.262}[len(differences)]


@pytest.mark.parametrize("low, high, verdict", [
    ("high", 0.02, HOLDS), (0.0, "high", OPEN), (0.01, "high", REVERSED)])
def test_compare_with_a_limit(low, high, verdict):
    """The values of three seeds against a limit."""
    metrics = {"high": summarise({"0": 0.001, "1": 0.002, "2": 0.0005})}
    assert compare.compare(metrics, low, high).verdict == verdict


def test_compare_allows_the_limit_itself():
    """A share that is 1 on every seed is at least 1, but it is not above another share of 1."""
    metrics = arms([1.0, 1.0], [1.0, 1.0])
    found = compare.compare(metrics, 1, "high")
    assert found.verdict == HOLDS and found.on_every_seed
    assert compare.compare(metrics, "low", "high").verdict == OPEN


def test_compare_of_what_was_not_measured_is_none():
    """A key that is missing, or no seed in common."""
    metrics = arms([1.0], [2.0])
    metrics["other"] = summarise({"5": 1.0})
    assert compare.compare(metrics, "low", "none") is None
    assert compare.compare(metrics, "low", "other") is None


def test_compare_text_is_worked_by_hand():
    """0.1, 0.2 and 0.3 above: 0.2 ± 0.1, and 4.303 * 0.1 / sqrt(3) = 0.248 to each side."""
    found = compare.compare(arms([0.5, 0.5, 0.5], [0.6, 0.7, 0.8]), "low", "high")
    assert found.text() == (
        "+0.2 ± 0.1, 95% interval -0.0484 to +0.448, 3 seeds, on every seed")
    assert found.text(points=True) == (
        "+20.0 ± 10.0 points, 95% interval -4.8 to +44.8, 3 seeds, on every seed")
    one = compare.compare(arms([0.5], [0.25]), "low", "high")
    assert (one.text(), one.text(points=True)) == ("-0.25, one seed", "-25.0 points, one seed")
