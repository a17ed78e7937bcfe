"""figures: the plots of a report, where matplotlib is installed; nothing else needs it.

Everything is drawn from what a report keeps: curves.json, {run: {name: [[stage, step, value]]}},
and the metrics of summary.json. Each sheet is made to be shown on a slide. The colours are Okabe
and Ito's, which colour-blind readers tell apart; lines differ in their dashes too.
"""
import importlib
from pathlib import Path
from statistics import fmean

from grpo import RL

STYLES = (("#0072B2", "-"), ("#D55E00", "--"))
SLIDE = {"font.size": 15, "axes.titlesize": 16, "axes.titlelocation": "left",
         "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
         "axes.grid": True, "axes.grid.axis": "y", "grid.color": "0.9", "legend.frameon": False}
STAGES = {"base": "base", "zero": "Zero", "dev1": "Dev1", "dev2": "Dev2",
          "no_language_reward": "Dev2, no\nreward", "dev3": "Dev3", "r1": "R1"}
STUDENTS = {"student.base": "base", "student.rl": "RL", "student.rl_no_format": "RL, no\nformat",
            "student.distill": "distilled", "student.distill_logits": "distilled\nby logits",
            "student.distill_rl": "distilled,\nthen RL"}


def runs_named(curves, name):
    """The curves of the runs of a name (an objective's, or a study's), one a seed."""
    return [curve for label, curve in curves.items() if label.startswith(f"{name}-seed")]


def values_at(curves, stage, name):
    """{step: the values of the runs} of one curve of a stage."""
    found = {}
    for curve in curves:
        for of, step, value in curve.get(name, ()):
            if of == stage:
                found.setdefault(step, []).append(value)
    return dict(sorted(found.items()))


def by_step(curves, stage, names):
    """{step: {name: mean over the runs}} of some curves of a stage."""
    columns = {name: values_at(curves, stage, name) for name in names}
    return {step: {name: fmean(at[step]) for name, at in columns.items() if step in at}
            for step in sorted(set().union(*columns.values()))}


def lines(plot, stage, *series):
    """Means over seeds against the step, each in a band from the lowest seed to the highest;
    series: (runs, name, label). Returns whether each has something to draw."""
    top = 0.0
    for (runs, name, label), (colour, dash) in zip(series, STYLES):
        if not (found := values_at(runs, stage, name)):
            return False
        low, high = ([edge(values) for values in found.values()] for edge in (min, max))
        plot.plot(list(found), list(map(fmean, found.values())), dash, color=colour, lw=3,
                  label=label)
        plot.fill_between(list(found), low, high, color=colour, alpha=0.2, lw=0)
        top = max(top, *high)
    plot.set(xlabel=f"RL step of {STAGES[stage]}", ylim=(0, 1.1 * top or 1))
    if len(series) > 1:
        plot.legend()
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


def heat(plot, runs, stage, bar):
    """Each expert's load over the mean against the step, in the first run that kept it: a row an
    expert, mixture above mixture. Returns whether one did."""
    points = next((found for run in runs if (
        found := [(step, loads) for of, step, loads in run.get("loads", ())
                  if of == stage and loads])), [])  # a dense model's are empty
    if not points:
        return False
    steps, columns = zip(*((step, sum(loads, [])) for step, loads in points))
    image = plot.pcolormesh(steps, range(len(columns[0])), list(zip(*columns)), shading="nearest",
                            cmap="cividis", vmin=0, vmax=2)  # cividis: for all eyes
    plot.set(xlabel=f"step of {STAGES[stage]}", ylabel="" if bar else "expert")
    if bar:
        plot.figure.colorbar(image, ax=plot)
    return True


def scatter(plot, x_label, series):
    """Points {label: [(x, y)]} beside the line on which nothing changes; returns whether any."""
    for (label, points), (colour, _), marker in zip(series.items(), STYLES, "ox"):
        plot.scatter(*zip(*points), color=colour, marker=marker, label=label)
    plot.axline((0, 0), slope=1, ls=":", color="0.6", lw=1)
    plot.set(xlabel=x_label, xlim=(0, None), ylim=(0, 1))
    plot.legend()
    return bool(series)


def sheet(folder, name, *panels):
    """Draws panels beside each other, each (title, kind, *what) by kind(plot, *what), into
    FOLDER/figures/NAME.png, where matplotlib is installed and all of them have something to draw.
    Returns the Markdown that shows it, in a list."""
    try:
        matplotlib = importlib.import_module("matplotlib")
        figure = importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        return []
    with matplotlib.rc_context(SLIDE):
        page = figure((8, 4.5), layout="constrained")
        for plot, (title, kind, *what) in zip(page.subplots(1, len(panels), squeeze=False)[0],
                                              panels):
            plot.set_title(title)
            if not kind(plot, *what):
                return []
        target = Path(folder) / "figures"
        target.mkdir(parents=True, exist_ok=True)
        page.savefig(target / f"{name}.png", dpi=160)
    return [f"![{'; '.join(title for title, *_ in panels)}](figures/{name}.png)"]


def draw(folder, curves, rows):
    """The sheets of a report, in Markdown; or the reason why there are none."""
    own, without = (runs_named(curves, name) for name in (RL.objective, "no_language_reward"))

    def climb(title, *pairs):  # of Zero; (name, label) of each line
        return title, lines, "zero", *((own, name, label) for name, label in pairs)
    length = climb("tokens in an answer", ("length", ""))
    plans = (  # file, panels
        ("figure1", climb("right answers, on dev", ("pass@1", "pass@1"),
                          ("cons@16", "majority of 16")), length),  # Nature Fig 1
        ("length", length),
        ("reflection", climb("share of answers, on dev", ("reflection", "check themselves"),
                             ("correction", "stop and mend a step"))),
        ("entropy", climb("entropy of a token, in nats", ("entropy", ""))),
        ("dead_groups", climb("groups whose answers all score the same", ("dead_groups", ""))),
        ("expert_load", climb("load of the busiest expert; the mean is 1", ("expert_load", ""))),
        ("expert_loads", ("load of each expert", heat, own, "base", False),
         ("the mean is 1", heat, own, "zero", True)),
        ("language", ("words in the question's language", lines, "dev2",
                      (own, "language", "with the language reward"),
                      (without, "language", "without"))),
        ("mixing", ("answers that mix languages", bars, rows, STAGES, "mixing")),
        ("distillation", ("right at the first try: the student", bars, rows, STUDENTS, "pass@1")))
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        return ["Not drawn: matplotlib was not installed where this report was made."]
    shown = [line for plan in plans for line in sheet(folder, *plan)]
    return shown and [*shown, "", "Lines and bars are means over seeds; bands reach from the lowest"
                      " seed to the highest, whiskers a deviation up and down."]
