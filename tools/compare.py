"""compare: the one rule for what may be said of numbers over seeds.

    a number        mean ± standard deviation over seeds: summarise()
    a difference    of two arms, paired by seed, with its 95% t interval: paired_difference()
    a claim         "the first is below the second": compare()

    the interval of second minus first     verdict
    is above 0                             holds
    is below 0                             is reversed
    contains 0                             cannot be told
    there is one seed                      holds or is reversed, on one seed; 0 cannot be told

"On every seed" is said only if the differences of all seeds have the sign of their mean.
"""
import math
from dataclasses import dataclass
from statistics import fmean, stdev

HOLDS, REVERSED, OPEN = "holds", "is reversed", "cannot be told"


def summarise(value_of_seed):
    """Mean and standard deviation of {seed: value}. One value has the standard deviation 0."""
    values = list(value_of_seed.values())
    std = round(stdev(values), 9) if len(values) > 1 else 0.0
    return {"mean": round(fmean(values), 9), "std": std, "per_seed": value_of_seed}


def paired_difference(values, others):
    """values minus others, both {seed: value}, over the seeds that both have: {"mean", "std",
    "per_seed", "low", "high", "n"}.

    low and high are the ends of the 95% interval, mean ± t std / sqrt(n), where t has n - 1
    degrees of freedom. They are None if there is one seed.
    """
    differences = {seed: values[seed] - others[seed] for seed in values if seed in others}
    return summarise(differences) | _interval(list(differences.values()))


def _interval(values):
    """{"low", "high", "n"}: the 95% t interval of the mean of values. None without an interval."""
    n = len(values)
    if n < 2:
        return {"low": None, "high": None, "n": n}
    mean, error = fmean(values), stdev(values) / math.sqrt(n)
    half_width = _t_quantile(n - 1) * error
    return {"low": round(mean - half_width, 9), "high": round(mean + half_width, 9), "n": n}


def _t_quantile(freedom, confidence=0.95):
    """The t with which mean ± t standard errors has this confidence. freedom: degrees of freedom, a
    whole number."""
    low, high = 0.0, 1e6
    for _ in range(100):  # halves the bracket
        middle = (low + high) / 2
        if _t_probability(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return high


def _t_probability(t, freedom):
    """The probability that Student's t lies within -t and t (Abramowitz and Stegun, eq 26.7.3 and
    26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cos_squared = math.cos(angle) ** 2
    is_odd = freedom % 2 == 1
    # The series begins with cos for odd degrees of freedom, and with 1 for even ones. Each term is
    # the one before it, times cos^2 k / (k + 1).
    term = math.cos(angle) if is_odd else 1.0
    total = 0.0
    for k in range(2 if is_odd else 1, freedom, 2):
        total += term
        term *= cos_squared * k / (k + 1)
    if is_odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


@dataclass
class Comparison:
    """What compare() finds."""
    verdict: str      # HOLDS, REVERSED or OPEN
    on_every_seed: bool
    difference: dict  # second minus first, as of paired_difference()

    @property
    def holds(self):
        """Whether the claim may be made."""
        return self.verdict == HOLDS

    def text(self, points=False):
        """The difference in words, such as "+0.100 ± 0.010, 95% interval +0.075 to +0.125, 3 seeds,
        on every seed". points: in percentage points."""
        d = self.difference

        def number(x, sign="+"):
            return f"{100 * x:{sign}.1f}" if points else f"{x:{sign}.3g}"

        unit = " points" if points else ""
        if d["n"] == 1:
            return f"{number(d['mean'])}{unit}, one seed"
        words = (f"{number(d['mean'])} ± {number(d['std'], '')}{unit}, 95% interval "
                 f"{number(d['low'])} to {number(d['high'])}, {d['n']} seeds")
        return f"{words}, on every seed" if self.on_every_seed else words


def compare(metrics, low, high):
    """The Comparison for the claim that `low` is below `high`, over the seeds that both have; None
    if there are none. "On every seed" is said only if both have the same seeds.

    metrics: as in summary.json. low and high: keys, or one of them a number that is a limit. A
    value may be equal to its limit.
    """
    keys = [side for side in (low, high) if isinstance(side, str)]
    if any(key not in metrics for key in keys):
        return None
    seeds = [seed for seed in metrics[keys[0]]["per_seed"]
             if all(seed in metrics[key]["per_seed"] for key in keys)]
    if not seeds:
        return None
    values_of_low, values_of_high = (
        metrics[side]["per_seed"] if isinstance(side, str) else dict.fromkeys(seeds, side)
        for side in (low, high))
    difference = paired_difference(values_of_high, values_of_low)
    comparison = _judge(difference, has_limit=len(keys) == 1)
    if any(len(metrics[key]["per_seed"]) > len(seeds) for key in keys):
        comparison.on_every_seed = False
    return comparison


def _judge(difference, has_limit):
    """The Comparison of a paired difference."""
    lowest = difference["low"] if difference["n"] > 1 else difference["mean"]
    highest = difference["high"] if difference["n"] > 1 else difference["mean"]
    if lowest > 0 or (has_limit and lowest == 0):
        verdict = HOLDS
    elif highest < 0:
        verdict = REVERSED
    else:
        verdict = OPEN
    of_seeds = difference["per_seed"].values()
    sign = 1 if difference["mean"] > 0 else -1
    is_zero_allowed = has_limit and verdict == HOLDS
    on_every_seed = all(sign * x > 0 or (is_zero_allowed and x == 0) for x in of_seeds)
    return Comparison(verdict, on_every_seed, difference)
