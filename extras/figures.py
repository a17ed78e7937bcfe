"""figures: the plots of a report, where matplotlib is installed; nothing else needs it.

Everything is drawn from what a report keeps: curves.json, {run: {name: [[stage, step, value]]}},
and the metrics of summary.json. The colours are Okabe and Ito's, which colour-blind readers tell
apart; lines differ in their dashes too.
"""
import importlib
from pathlib import Path

from grpo import RL

STYLES = (("#0072B2", "-"), ("#D55E00", "--"))
STAGES = {"base": "base", "zero": "Zero", "dev1": "Dev1", "dev2": "Dev2",
          "no_language_reward": "Dev2, no\nreward", "dev3": "Dev3", "r1": "R1"}
STUDENTS = {"student.base": "base", "student.rl": "RL", "student.rl_no_format": "RL, no\nformat",
            "student.distill": "distilled", "student.distill_logits": "distilled\nby logits",
            "student.distill_rl": "distilled,\nthen RL"}


def runs_named(curves, name):
    """The curves of the runs of a name (an objective's, or a study's), one a seed."""
    return [curve for label, curve in curves.items() if label.startswith(f"{name}-seed")]


def by_step(curves, stage):
    """{step: {name: mean over the runs}} of a stage's evaluations on dev."""
    columns = {}
    for curve in curves:
        for name, points in curve.items():
            for of, step, value in points:
                if of == stage:
                    columns.setdefault(step, {}).setdefault(name, []).append(value)
    return {step: {name: sum(v) / len(v) for name, v in columns[step].items()}
            for step in sorted(columns)}


def lines(plot, stage, *series):
    """Means over seeds against the step, and each seed as a thin line; series: (runs, name, label).
    Returns whether each has something to draw."""
    top = 0.0
    for (runs, name, label), (colour, dash) in zip(series, STYLES):
        means = {step: row[name] for step, row in by_step(runs, stage).items() if name in row}
        if not means:
            return False
        plot.plot(list(means), list(means.values()), dash, color=colour, lw=2.2, label=label)
        for curve in runs:
            points = [point[1:] for point in curve.get(name, ()) if point[0] == stage]
            plot.plot(*zip(*points) if points else ((), ()), color=colour, alpha=0.25, lw=1)
            top = max(top, *(value for _, value in points), 0.0)
    plot.set(xlabel="RL step", ylim=(0, 1.1 * top or 1))
    if len(series) > 1:
        plot.legend(frameon=False)
    return True


def bars(plot, rows, names, metric):
    """A metric of some stages, mean and deviation; returns whether there are two of them."""
    found = {label: rows[f"{stage}.{metric}"] for stage, label in names.items()
             if f"{stage}.{metric}" in rows}
    plot.bar(list(found), [r["mean"] for r in found.values()], color=STYLES[0][0], width=0.6,
             yerr=[r["std"] for r in found.values()], capsize=3)
    for i, r in enumerate(found.values()):
        plot.text(i, r["mean"] + r["std"], f"{r['mean']:.2f}", ha="center", va="bottom")
    plot.set(ylim=(0, 1.1 * max([r["mean"] + r["std"] for r in found.values()], default=0) or 1))
    return len(found) > 1


def scatter(plot, x_label, series):
    """Points {label: [(x, y)]} beside the line on which nothing changes; returns whether any."""
    for (label, points), (colour, _), marker in zip(series.items(), STYLES, "ox"):
        plot.scatter(*zip(*points), color=colour, marker=marker, label=label)
    plot.plot((0.01, 0.3), (0.01, 0.3), ":", color="0.6", lw=1)
    plot.set(xlabel=x_label, xscale="log", ylim=(0, 1))
    plot.legend(frameon=False)
    return bool(series)


def sheet(folder, name, label, kind, *what):
    """Draws kind(plot, *what), whose axis says label, into FOLDER/figures/NAME.png where matplotlib
    is installed and there is something to draw. Returns the Markdown that shows it, in a list."""
    try:
        page = importlib.import_module("matplotlib.figure").Figure((6.4, 3.6), layout="constrained")
    except ImportError:
        return []
    plot = page.subplots()
    plot.set_ylabel(label)
    plot.spines[["top", "right"]].set_visible(False)
    if not kind(plot, *what):
        return []
    target = Path(folder) / "figures"
    target.mkdir(parents=True, exist_ok=True)
    page.savefig(target / f"{name}.png", dpi=120)
    return [f"![{label}](figures/{name}.png)"]


def draw(folder, curves, rows):
    """The sheets of a report, in Markdown; or the reason why there are none."""
    own, without = (runs_named(curves, name) for name in (RL.objective, "no_language_reward"))
    plans = (  # file, what its axis says, how it is drawn
        ("accuracy", "right answers on dev", lines, "zero", (own, "pass@1", "pass@1"),
         (own, "cons@16", "majority of 16")),
        ("length", "tokens in an answer", lines, "zero", (own, "length", "")),
        ("reflection", "answers that check themselves", lines, "zero", (own, "reflection", "")),
        ("language", "language consistency", lines, "dev2", (own, "language", "with its reward"),
         (without, "language", "without")),
        ("mixing", "answers that mix languages", bars, rows, STAGES, "mixing"),
        ("distillation", "pass@1 of the student", bars, rows, STUDENTS, "pass@1"))
    shown = [line for plan in plans for line in sheet(folder, *plan)]
    return shown or ["Not drawn: matplotlib was not installed where this report was made."]
