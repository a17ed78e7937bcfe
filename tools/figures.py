"""figures: the pictures of the README and of results/, drawn from the committed numbers.

    python -m tools.figures

A report draws the same pictures of a run (`python r1mini.py report runs/nano`). Without matplotlib
there are no pictures, and nothing else needs matplotlib.

    numbers     curves.json {run: {metric: [[stage, step, value]]}}, summary.json, samples.md
    Picture     panels, and a note that names runs and data; one function for each picture
    title       says the finding; its numbers are computed from the numbers that are drawn
    sheet       writes a Picture to FOLDER/figures/NAME.png

The colours are Okabe and Ito's, which colour-blind readers can tell apart. Lines also differ in
dashes and markers, bars in hatching.
"""
import importlib
import io
import json
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import tasks
from grpo import RL
from moe import Config
from tools import cli

ROOT = Path(__file__).resolve().parent.parent
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
BLACK, GREY = "#000000", "0.45"
# (colour, dashes, marker) of a panel's first line, its second one, and so on.
STYLES = ((BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, "-.", "^"), (PURPLE, ":", "D"),
          (BLACK, (0, (1, 2)), "v"))
STYLE = {"font.size": 14, "axes.titlesize": 14.5, "axes.titleweight": "bold",
         "axes.titlelocation": "left", "axes.titlepad": 12,
         "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
         "axes.grid": True, "axes.grid.axis": "y", "grid.color": "0.9", "legend.frameon": False,
         "hatch.linewidth": 3}
SIZE, DPI = (8, 4.5), 140  # inches, pixels per inch: a slide of 1120 x 630

STAGES = {"base": "base", "zero": "Zero", "dev1": "Dev1", "dev2": "Dev2",
          "no_language_reward": "Dev2, no\nlanguage\nreward", "dev3": "Dev3", "r1": "R1"}
STUDENTS = {"student.base": "base", "student.rl": "RL",
            "student.rl_no_format": "RL, no\nformat\nreward", "student.distill": "distilled",
            "student.distill_logits": "distilled\nby logits",
            "student.distill_rl": "distilled,\nthen RL"}
STUDENT_COLOURS = {"student.base": "0.6", "student.rl": BLUE, "student.rl_no_format": BLUE}
PAPER = "15.6% to 77.9%"  # R1-Zero on AIME 2024, pass@1 (Nature, Fig 1)
CROP = 210                # steps of pretraining in the map of the experts' loads; one in 30 is kept
QUESTION = "Compute 90-1-2-8+3+7"                         # of the README's picture, from samples.md
MODELS = {"base": "base", "zero": "R1-Zero", "r1": "R1"}  # whose answers it shows
CHINESE_FONTS = ("NotoSansCJK-Regular", "NotoSansSC", "SourceHanSans", "wqy-microhei", "PingFang",
                 "msyh", "simhei")  # how the files of fonts with Chinese characters are named

# --------------------------------------------------------------------------------------------------
# Numbers


def curves_of_runs(curves, name):
    """The curves of the runs of a name (an objective's, or a study's), one for each seed."""
    return [curve for label, curve in curves.items() if label.startswith(f"{name}-seed")]


def _values_at(runs, stage, metric):
    """{step: [a value for each run]} of one metric in one stage."""
    values = {}
    for run in runs:
        for point_stage, step, value in run.get(metric, ()):
            if point_stage == stage:
                values.setdefault(step, []).append(value)
    return dict(sorted(values.items()))


def _mean_curve(runs, stage, metric):
    """{step: mean over the runs} of one metric in one stage."""
    return {step: fmean(values) for step, values in _values_at(runs, stage, metric).items()}


def by_step(runs, stage, metrics):
    """{step: {metric: mean over the runs}} of several metrics in one stage."""
    rows = {}
    for metric in metrics:
        for step, value in _mean_curve(runs, stage, metric).items():
            rows.setdefault(step, {})[metric] = value
    return dict(sorted(rows.items()))


def _curve_ends(curve):
    """The first and the last value of a curve {step: value}."""
    values = list(curve.values())
    return values[0], values[-1]


def _loads_of(runs, stage, until=None):
    """{step: loads} of the first run that kept loads in this stage. loads[i][j] is the load of
    expert j of mixture i, divided by the mean of its mixture. The loads of a dense model are empty.
    """
    for run in runs:
        loads = {}
        for point_stage, step, mixtures in run.get("loads", ()):
            if point_stage == stage and mixtures and (until is None or step <= until):
                loads[step] = mixtures
        if loads:
            return dict(sorted(loads.items()))
    return {}


def _busiest(mixtures):
    """The largest load of any expert of some mixtures."""
    return max(max(loads) for loads in mixtures)


def _percent_text(share):
    """0.171 is "17%"; 0.996 is "over 99%", since 100% would be wrong."""
    text = f"{share:.0%}"
    return "over 99%" if text == "100%" and share < 1 else text


def _curve_rises(curve):
    """Whether the last value of a curve {step: value} is above the first one. A title that says so
    must be true of every run that a report may be about."""
    first, last = _curve_ends(curve)
    return last > first


def _seeds_note(runs):
    """Says over how many seeds a line is a mean."""
    if len(runs) == 1:
        return "one seed"
    return f"mean of {len(runs)} seeds, band from lowest to highest"


# --------------------------------------------------------------------------------------------------
# Panels: each function draws on `plot`, matplotlib's Axes


@dataclass
class Line:
    """One line of a panel: a metric of some runs. Its label is written beside its point number
    `label_point`, above the band or below it."""
    runs: list
    metric: str
    label: str = ""
    side: str = "below"
    label_point: int = 1


def _majority_line(runs):
    """The Line of the majority vote on dev, cons@K. The label gives K, the number of answers."""
    name = next((name for run in runs for name in run if name.startswith("cons@")), "cons@K")
    return Line(runs, name, f"majority of {name.removeprefix('cons@')}", "above")


@dataclass
class Panel:
    """One plot of a picture. draw(plot) draws it. The axes named in `percent` are in percent."""
    title: str
    draw: Callable
    percent: str = ""  # "y" or "xy"


@dataclass
class Picture:
    """Panels beside each other, and a note below them."""
    panels: list
    note: str


def _draw_lines(plot, stage, *series, ylabel="", ylim=None, markers=True):
    """Draws each Line: the mean over its runs against the step, in a band from the lowest run to
    the highest. A Line without values is left out. ylim starts at 0 unless given."""
    top = 0.0
    for line, (colour, dash, marker) in zip(series, STYLES):
        values = _values_at(line.runs, stage, line.metric)
        if not values:
            continue
        steps = list(values)
        low = [min(v) for v in values.values()]
        high = [max(v) for v in values.values()]
        plot.plot(steps, [fmean(v) for v in values.values()], dash, color=colour, lw=3,
                  marker=marker if markers else None, ms=8)
        plot.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)
        if line.label:
            point = min(line.label_point, len(steps) - 1)
            above = line.side == "above"
            beside = slice(point, point + 3)  # a label is about as wide as three points
            height = max(high[beside]) if above else min(low[beside])
            plot.annotate(line.label, (steps[point], height),
                          xytext=(8, 8 if above else -8), textcoords="offset points",
                          va="bottom" if above else "top", color=colour, weight="bold")
        top = max([top, *high])
    plot.set(xlabel=f"RL step of {STAGES[stage]}", ylabel=ylabel, ylim=ylim or (0, 1.1 * top or 1))


def _draw_bars(plot, rows, names, metric, ylabel="", colours=None, hatched=()):
    """Draws a metric of some stages: bars are means over seeds, whiskers standard deviations.
    names: {key of a stage: label}; colours: {key: colour}, blue unless given. Stages without this
    metric are left out. The number stands in a tall bar, and above a short or hatched one."""
    keys = [key for key in names if f"{key}.{metric}" in rows]
    means = [rows[f"{key}.{metric}"]["mean"] for key in keys]
    stds = [rows[f"{key}.{metric}"]["std"] for key in keys]
    top = max(mean + std for mean, std in zip(means, stds))
    colour_of = {key: (colours or {}).get(key, BLUE) for key in keys}
    plot.bar([names[key] for key in keys], means, yerr=stds, capsize=4, width=0.65, lw=1.5,
             color=["white" if key in hatched else colour_of[key] for key in keys],
             edgecolor=[colour_of[key] for key in keys],
             hatch=["//" if key in hatched else "" for key in keys])
    for x, (key, mean, std) in enumerate(zip(keys, means, stds)):
        inside = mean - std > 0.25 * top and key not in hatched
        y = mean - std - 0.02 * top if inside else mean + std + 0.01 * top
        plot.text(x, y, _percent_text(mean), ha="center", va="top" if inside else "bottom",
                  color="white" if inside else "black", weight="bold")
    plot.set(ylabel=ylabel, ylim=(0, 1.12 * top or 1))
    plot.tick_params(axis="x", length=0)


def _draw_loads(plot, loads, labels, xlabel=""):
    """Draws the load of each expert against the step: one row for each expert, mixture below
    mixture, an empty row between two mixtures. White is the mean of the mixture, purple is less and
    orange is more, on a log scale. labels: the names of all mixtures; `loads` may have the first
    ones only. Returns what a colour bar needs."""
    steps = list(loads)
    experts = len(_curve_ends(loads)[0][0])
    columns = []
    for mixtures in loads.values():
        column = []
        for mixture in mixtures:
            column += [max(load, 0.25) for load in mixture] + [float("nan")]
        columns.append(column[:-1])
    rows = list(zip(*columns))
    image = plot.pcolormesh(steps, range(len(rows)), rows, shading="nearest", cmap="PuOr_r",
                            norm="log", vmin=0.25, vmax=4)
    centres = [i * (experts + 1) + (experts - 1) / 2 for i in range(len(labels))]
    plot.set_yticks(centres, labels)
    plot.set(xlabel=xlabel, ylim=(len(labels) * (experts + 1) - 1.5, -0.5))
    plot.tick_params(axis="y", length=0)
    plot.grid(False)
    for centre, label in list(zip(centres, labels))[len(_curve_ends(loads)[0]):]:
        plot.text(fmean((steps[0], steps[-1])), centre, f"{label} is not used in RL", ha="center",
                  va="center", color=GREY)
    return image


def _draw_students(plot, students, failing):
    """Draws what RL and distillation made of each student, against its base, joined by a line.
    students: [(base, RL, distilled)], all pass@1. Bases up to `failing` are shaded, if it is above
    0; the dotted line is where training changes nothing."""
    bases, by_rl, distilled = zip(*sorted(students))
    if failing:
        plot.axvspan(0, failing, color="0.93", zorder=0)
        plot.text(failing / 2, 0.99, "RL fails", ha="center", va="top", color=GREY)
    plot.vlines(bases, by_rl, distilled, color="0.6", lw=1.5, zorder=1)
    for label, values, (colour, _, marker) in (
            ("RL", by_rl, STYLES[0]), ("distilled", distilled, STYLES[1])):
        plot.scatter(bases, values, color=colour, marker=marker, s=90, label=label, zorder=2)
    right = 1.06 * bases[-1]
    plot.plot([0, right], [0, right], ":", color=GREY, lw=2, zorder=1)
    plot.annotate("no change", (right, right), xytext=(-4, 6), textcoords="offset points",
                  ha="right", va="bottom", color=GREY)
    plot.set(xlabel="correct answers of the base", ylabel="correct after training",
             xlim=(0, right), ylim=(0, 1.04))
    plot.legend(loc="lower right", bbox_to_anchor=(1, 0.25))


def arms_panel(title, rows, names, metric, xlabel="", percent=True):
    """A panel of a study's arms: a row for each arm, a dot for each seed, a line at the mean.
    rows: the metrics of summary.json. names: {arm: label}; arms without the metric are left out."""
    arms = [arm for arm in names if f"{arm}.{metric}" in rows]

    def draw(plot):
        for y, arm in enumerate(arms):
            row = rows[f"{arm}.{metric}"]
            values = list(row["per_seed"].values())
            plot.scatter(values, [y] * len(values), color=BLUE, alpha=0.45, s=70, lw=0)
            plot.vlines(row["mean"], y - 0.32, y + 0.32, color=ORANGE, lw=3)
        plot.set_yticks(range(len(arms)), [textwrap.fill(names[arm], 24) for arm in arms])
        plot.set(xlabel=xlabel, ylim=(len(arms) - 0.5, -0.5))
        plot.tick_params(axis="y", length=0)
        plot.grid(axis="x")

    return Panel(title, draw, "x" if percent else "")


def lines_panel(title, rows, names, metric, xlabel, ylabel, percent="y"):
    """A panel with a line for each arm of a study: its mean over the seeds, in a band from the
    lowest seed to the highest.

    rows: the metrics of summary.json. Those of an arm are ARM.METRIC.X, where X is a whole number
    on the horizontal axis. A point that a seed lacks is left out. names: {arm: label}; arms without
    the metric are left out. percent: the axes in percent, as in Panel.
    """
    lines = {}  # {label: {x: the row}}
    for arm, label in names.items():
        begin = f"{arm}.{metric}."
        points = {int(key.removeprefix(begin)): row for key, row in rows.items()
                  if key.startswith(begin) and key.removeprefix(begin).isdigit()}
        seeds = max((len(row["per_seed"]) for row in points.values()), default=0)
        if points:
            lines[label] = {x: row for x, row in sorted(points.items())
                            if len(row["per_seed"]) == seeds}

    def draw(plot):
        for (label, line), (colour, dash, marker) in zip(lines.items(), STYLES):
            seeds = [list(row["per_seed"].values()) for row in line.values()]
            plot.plot(list(line), [row["mean"] for row in line.values()], linestyle=dash,
                      color=colour, marker=marker, lw=2.5, ms=6, label=label)
            plot.fill_between(list(line), [min(x) for x in seeds], [max(x) for x in seeds],
                              color=colour, alpha=0.15, lw=0)
        plot.set(xlabel=xlabel, ylabel=ylabel)
        plot.locator_params(axis="x", integer=True)
        plot.set_ylim(bottom=0)
        plot.legend(fontsize=11)

    return Panel(title, draw, percent)


# --------------------------------------------------------------------------------------------------
# The pictures of a report: each function takes curves.json and the metrics of summary.json, and
# returns a Picture, or None if its numbers are not there


def _figure1(curves, rows):
    """Nature, Fig 1: accuracy and length of R1-Zero's answers during RL."""
    runs = curves_of_runs(curves, RL.objective)
    accuracy, length = (_mean_curve(runs, "zero", metric) for metric in ("pass@1", "length"))
    if not accuracy:
        return None
    before, after = _curve_ends(accuracy)
    tokens_before, tokens_after = _curve_ends(length)
    trend = "grow" if _curve_rises(length) else "do not grow"

    def accuracy_panel(plot):
        _draw_lines(plot, "zero", Line(runs, "pass@1", "one answer"),
                    _majority_line(runs), ylabel="correct answers",
                    ylim=(0, 1.1))
        plot.text(1, 0.04, f"the paper, on AIME 2024:\n{PAPER}", transform=plot.transAxes,
                  ha="right", color=GREY, fontsize=12)
    return Picture([
        Panel(f"RL alone:\n{_percent_text(before)} to {_percent_text(after)} correct",
              accuracy_panel, "y"),
        Panel(f"Answers {trend}:\n{tokens_before:.0f} to {tokens_after:.0f} tokens",
              lambda plot: _draw_lines(plot, "zero", Line(runs, "length"),
                                       ylabel="tokens in an answer"))],
        f"dev problems, temperature 1; {_seeds_note(runs)}")


def _reflection(curves, rows):
    """Answers that check a step, and answers that stop and correct one."""
    runs = curves_of_runs(curves, RL.objective)
    checks = _mean_curve(runs, "zero", "reflection")
    if not checks:
        return None
    before, after = _curve_ends(checks)
    trend = "spreads" if _curve_rises(checks) else "does not spread:"
    return Picture([Panel(
        f"Checking {trend} from {_percent_text(before)} to {_percent_text(after)} of the answers",
        lambda plot: _draw_lines(
            plot, "zero", Line(runs, "reflection", "check a step"),
            Line(runs, "correction", "stop and correct a step", "above", 2),
            ylabel="share of answers", ylim=(0, 1.1)), "y")],
        f"dev problems, temperature 1; {_seeds_note(runs)}")


def _entropy(curves, rows):
    """The entropy of a token, and the share of groups whose answers all have the same reward."""
    runs = curves_of_runs(curves, RL.objective)
    nats, equal = (_mean_curve(runs, "zero", metric) for metric in ("entropy", "dead_groups"))
    if not nats or not equal:
        return None
    before, after = _curve_ends(nats)
    trend = "rises" if _curve_rises(nats) else "falls"
    half = [step for step, share in equal.items() if share >= 0.5]
    if half:
        finding = f"Half of the groups teach\nnothing by step {half[0]}"
    else:
        share = _percent_text(_curve_ends(equal)[1])
        finding = f"{share} of the groups teach\nnothing by step {list(equal)[-1]}"
    return Picture([
        Panel(f"Entropy {trend} from {before:.2f}\nto {after:.2f} nats", lambda plot: _draw_lines(
            plot, "zero", Line(runs, "entropy"), ylabel="entropy of a token, in nats",
            markers=False)),
        Panel(finding, lambda plot: _draw_lines(
            plot, "zero", Line(runs, "dead_groups"), ylabel="groups with equal rewards",
            markers=False), "y")],
        f"training problems, temperature 1; {_seeds_note(runs)}")


def _expert_loads(curves, rows):
    """The load of each expert at the start of pretraining and during RL."""
    runs = curves_of_runs(curves, RL.objective)
    early, during_rl = _loads_of(runs, "base", CROP), _loads_of(runs, "zero")
    if not early or not during_rl:
        return None
    first, last = (_busiest(mixtures) for mixtures in _curve_ends(early))
    trend = "even out early" if last < first else "do not even out"
    largest = max(_busiest(mixtures) for mixtures in during_rl.values())
    in_layers = len(_curve_ends(during_rl)[0])
    in_all = len(_curve_ends(early)[0])  # with MTP's mixture
    labels = [f"layer {Config.n_dense_layers + 1 + i}" for i in range(in_layers)]
    labels += ["MTP"] * (in_all - in_layers)

    def rl_panel(plot):
        image = _draw_loads(plot, during_rl, labels, f"RL step of {STAGES['zero']}")
        plot.set_yticks([])
        bar = plot.figure.colorbar(image, ax=plot, ticks=[0.25, 0.5, 1, 2, 4])
        bar.ax.set_yticklabels(["≤ ¼", "½", "1", "2", "4"])
        bar.ax.minorticks_off()
        bar.set_label("load / mean load")
    return Picture([
        Panel(f"Loads {trend}:\nbusiest expert {first:.1f} to {last:.1f}",
              lambda plot: _draw_loads(plot, early, labels, "step of pretraining")),
        Panel(f"In RL, on sums only:\nup to {largest:.1f}", rl_panel)],
        "the first seed; a row is an expert; its load is divided by the mean of its layer")


def _language(curves, rows):
    """Words in the question's language, with the language reward and without it."""
    rewarded = curves_of_runs(curves, RL.objective)
    not_rewarded = curves_of_runs(curves, "no_language_reward")
    ending = []
    for runs in (rewarded, not_rewarded):
        curve = _mean_curve(runs, "dev2", "language")
        if not curve:
            return None
        ending.append(_percent_text(_curve_ends(curve)[1]))
    return Picture([Panel(
        f"With the language reward {ending[0]} of the words are\nin the question's language, "
        f"without it {ending[1]}", lambda plot: _draw_lines(
            plot, "dev2", Line(rewarded, "language", "with the reward", label_point=2),
            Line(not_rewarded, "language", "without it"),
            ylabel="words in the\nquestion's language", ylim=(0.7, 1.01)), "y")],
        f"dev problems, temperature 1; {_seeds_note(rewarded)}; the axis starts at 70%")


def _mixing(curves, rows):
    """Answers that mix languages, by stage."""
    if not {"zero.mixing", "r1.mixing"} <= set(rows):
        return None
    before, after = (_percent_text(rows[f"{stage}.mixing"]["mean"]) for stage in ("zero", "r1"))
    return Picture([Panel(
        f"Zero mixes languages in {before} of its answers, R1 in {after}",
        lambda plot: _draw_bars(plot, rows, STAGES, "mixing", "answers that mix languages",
                                hatched=("no_language_reward",)), "y")],
        "test problems, temperature 1; mean and std over seeds; hatched: an ablation")


def _distillation(curves, rows):
    """What RL and distillation make of the small student, and its teacher."""
    if not {"student.rl.pass@1", "student.distill.pass@1"} <= set(rows):
        return None
    by_rl, distilled = (
        _percent_text(rows[f"student.{how}.pass@1"]["mean"]) for how in ("rl", "distill"))

    def panel(plot):
        _draw_bars(plot, rows, STUDENTS, "pass@1", "correct at the first try",
                   {key: STUDENT_COLOURS.get(key, ORANGE) for key in STUDENTS})
        if "r1.pass@1" in rows:
            teacher = rows["r1.pass@1"]["mean"]
            plot.axhline(teacher, color=GREEN, lw=3, ls="--")
            plot.text(-0.4, teacher + 0.02, f"the teacher, R1: {_percent_text(teacher)}",
                      color=GREEN,
                      va="bottom", weight="bold")
            plot.set(ylim=(0, 1.1))
    return Picture([Panel(f"A small student: {by_rl} correct by RL, {distilled} distilled", panel,
                          "y")],
                   "test problems, temperature 1; mean and std over seeds")


PICTURES = {"figure1": _figure1, "reflection": _reflection, "entropy": _entropy,
            "expert_loads": _expert_loads, "language": _language, "mixing": _mixing,
            "distillation": _distillation}


def threshold_picture(rows):
    """What RL and distillation made of students of several bases: the Picture of study threshold.
    rows: its metrics, NAME.base, NAME.RL and NAME.distilled for each student."""
    students = []
    for key in rows:
        if key.endswith(".base"):
            name = key.removesuffix(".base")
            fates = [rows[f"{name}.{fate}"]["per_seed"] for fate in ("base", "RL", "distilled")]
            students += [tuple(fate[seed] for fate in fates) for seed in fates[0]]
    failed = max((base for base, by_rl, _ in students if by_rl < 0.5), default=0.0)
    behind = max((base for base, by_rl, distilled in students if by_rl < distilled), default=0.0)
    worked = [base for base, by_rl, _ in students if base > failed]
    title = "RL works from all bases"
    if failed:
        title = f"RL fails from bases up to {_percent_text(failed)}"
    if any(base > behind for base, _, _ in students):
        title += f",\nand beats distillation above {_percent_text(behind)}"
    shaded = fmean((failed, min(worked))) if failed and worked else failed
    return Picture([Panel(title, lambda plot: _draw_students(plot, students, shaded), "xy")],
                   "test problems, temperature 1; a pair is one student; RL fails: below 50%")


# --------------------------------------------------------------------------------------------------
# Files


def _has_matplotlib():
    """Whether matplotlib is installed."""
    try:
        importlib.import_module("matplotlib")
        return True
    except ImportError:
        return False


def _save(figure, path):
    """Writes a figure as a PNG with 256 colours, a third of the size of one with all colours."""
    image = importlib.import_module("PIL.Image")  # matplotlib needs it too
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI)
    image.open(buffer).convert("RGB").quantize(256).save(path, optimize=True)


def write_picture(folder, name, picture):
    """Writes a Picture to FOLDER/figures/NAME.png. Returns the Markdown that shows it, in a list;
    the list is empty if there is no Picture or no matplotlib."""
    if picture is None or not _has_matplotlib():
        return []
    matplotlib = importlib.import_module("matplotlib")
    Figure = importlib.import_module("matplotlib.figure").Figure
    ticker = importlib.import_module("matplotlib.ticker")
    with matplotlib.rc_context(STYLE):
        figure = Figure(SIZE, layout="constrained")
        figure.get_layout_engine().set(wspace=0.06)
        plots = figure.subplots(1, len(picture.panels), squeeze=False)[0]
        for plot, panel in zip(plots, picture.panels):
            plot.set_title(panel.title)
            for axis in panel.percent:
                getattr(plot, f"{axis}axis").set_major_formatter(ticker.PercentFormatter(1, 0))
            panel.draw(plot)
        source = "/".join(Path(folder).parts[-2:])
        figure.supxlabel(f"{source}: {picture.note}", x=0.01, ha="left", fontsize=10, color=GREY)
        target = Path(folder) / "figures"
        target.mkdir(parents=True, exist_ok=True)
        _save(figure, target / f"{name}.png")
    titles = "; ".join(panel.title.replace("\n", " ") for panel in picture.panels)
    return [f"![{titles}](figures/{name}.png)"]


def draw(folder, curves, rows):
    """Draws the pictures of a report. Returns them in Markdown, or the reason why there are none.
    """
    if not _has_matplotlib():
        return ["Not drawn: matplotlib was not installed where this report was made."]
    shown = []
    for name, picture in PICTURES.items():
        shown += write_picture(folder, name, picture(curves, rows))
    return shown


# --------------------------------------------------------------------------------------------------
# The README's picture: the training curve beside one question


def _read_answers(samples, question):
    """(the right answer, {stage: its last answer}) of one question of samples.md."""
    section = re.search(rf"^## {re.escape(question)} \(answer (\S+)\)\n(.*?)(?=^## |\Z)", samples,
                        re.MULTILINE | re.DOTALL)
    answers = {}
    for stage, text in re.findall(r"^- \*\*(\w+), step \d+\*\*.*?: `(.*)`$", section[2],
                                  re.MULTILINE):
        answers[stage] = text  # a later step replaces an earlier one
    return section[1], answers


def _solution_steps(thinking):
    """The steps of a checked working, each with the "ok" that ends it."""
    endings = "|".join(f"(?<={words['ok']})" for words in tasks.WORDS.values())
    return [step.strip() for step in re.split(endings, thinking) if step.strip()]


def _verdict(text, problem):
    """(colour, words) of an answer: whether it is correct, and whether it mixes languages."""
    if not tasks.accuracy(text, problem):
        return ORANGE, "✗ wrong"
    mixed = tasks.MEASURES["mixing"]([text], [problem]) == 1  # nan: it has no words
    return GREEN, "✓ correct, " + ("two languages" if mixed else "one language")


def _chinese_font():
    """The name of an installed font with Chinese characters, or None."""
    manager = importlib.import_module("matplotlib.font_manager")
    paths = sorted(manager.findSystemFonts())
    for part in CHINESE_FONTS:
        for path in paths:
            if part.lower() in Path(path).name.lower():
                manager.fontManager.addfont(path)
                return manager.FontProperties(fname=path).get_name()
    return None


def _translate_in_brackets(text):
    """A line of an answer with English words in brackets instead of its Chinese words."""
    for name, word in tasks.WORDS["zh"].items():
        text = text.replace(word, f" [{tasks.WORDS['en'][name].strip()}] ")
    return text


def _draw_answer(plot, top, name, text, problem, font):
    """Draws a box: a model's name, the verdict, and the answer, one step a line. The axes of `plot`
    are in points, and y grows downwards. font: one with Chinese characters, or None; then English
    words in brackets stand for Chinese words. Returns the lower end of the box."""
    size, line_height, left = 14.5, 20.5, 14
    width = plot.get_xlim()[1]
    lines = _solution_steps(tasks.parse(text)[0]) or ["(no thinking)"]
    lines.append(tasks.TAG.sub("", tasks.shown_part(text)))
    bottom = top + (1 + len(lines)) * line_height + 12
    colour, words = _verdict(text, problem)
    plot.fill_between([0, width], top, bottom, color="0.955", lw=0)
    plot.fill_between([0, 5], top, bottom, color=colour, lw=0)
    y = top + 20
    plot.text(left, y, name, weight="bold", size=16)
    plot.text(width - 8, y, words, ha="right", weight="bold", size=14, color=colour)
    for line in lines:
        x, y = left, y + line_height
        shown = line if font else _translate_in_brackets(line)
        for piece in re.split(r"([^\x00-\x7f]+|\[\w+\])", shown):  # Chinese words are blue
            chinese = re.match(r"[^\x00-\x7f]|\[", piece) is not None
            plot.text(x, y, piece, family=[font] if chinese and font else ["DejaVu Sans Mono"],
                      size=size, color=BLUE if chinese else "black",
                      weight="bold" if line is lines[-1] else "normal")
            x += size * sum(0.602 if c.isascii() else 1 for c in piece)  # the font is monospaced
    return bottom


def _draw_question(plot, samples):
    """Draws QUESTION and the answers of MODELS to it. The axes of `plot` are in points."""
    right_answer, answers = _read_answers(samples, QUESTION)
    problem = tasks.Problem(QUESTION, right_answer, "")
    font = _chinese_font()
    top = 0
    for stage, name in MODELS.items():
        top = 9 + _draw_answer(plot, top, name, answers[stage], problem, font)
    plot.set_title(f"{QUESTION} (answer: {right_answer})")
    plot.axis("off")


def _draw_readme(target, curves, rows, samples):
    """Writes the README's picture to `target`: the training curve of R1-Zero, beside one question
    that base, R1-Zero and R1 have answered. samples: the text of samples.md."""
    matplotlib = importlib.import_module("matplotlib")
    Figure = importlib.import_module("matplotlib.figure").Figure
    ticker = importlib.import_module("matplotlib.ticker")
    runs = curves_of_runs(curves, RL.objective)
    before, after = _curve_ends(_mean_curve(runs, "zero", "pass@1"))
    tested = [_percent_text(rows[f"{stage}.pass@1"]["mean"]) for stage in ("base", "zero")]
    width, height = 9, 6.3  # inches
    with matplotlib.rc_context(STYLE):
        figure = Figure((width, height))
        curve = figure.add_axes([0.09, 0.19, 0.385, 0.72])
        _draw_lines(curve, "zero", Line(runs, "pass@1", "one answer"),
                    _majority_line(runs), ylim=(0, 1.1))
        curve.set_xlabel("RL step")
        curve.set_title(f"RL alone: {_percent_text(before)} to {_percent_text(after)} correct")
        curve.yaxis.set_major_formatter(ticker.PercentFormatter(1, 0))
        left, bottom, right, top = 0.515, 0.02, 0.99, 0.91
        answers = figure.add_axes([left, bottom, right - left, top - bottom])
        answers.set(xlim=(0, 72 * width * (right - left)), ylim=(72 * height * (top - bottom), 0))
        _draw_question(answers, samples)
        figure.text(0.01, 0.02, f"held-out dev problems, temperature 1, {len(runs)} seeds\n"
                    f"(held-out test problems: {tested[0]} to {tested[1]})", size=12, color=GREY)
        _save(figure, target)


def main():
    """Draws all pictures anew from the committed numbers."""
    if not _has_matplotlib():
        raise SystemExit("no pictures without matplotlib: pip install matplotlib")
    if not _chinese_font():
        print("No font with Chinese characters is installed: in docs/picture.png, English words in "
              "brackets stand for Chinese words. On Debian: apt-get install fonts-noto-cjk")
    results = ROOT / "results"
    curves = json.loads((results / "r1" / "curves.json").read_text("utf-8"))
    samples = (results / "r1" / "samples.md").read_text("utf-8")
    for name, study in cli.all_studies().items():
        summary = results / name / "summary.json"
        if not summary.exists():
            continue
        rows = json.loads(summary.read_text("utf-8"))["metrics"]
        if name == "r1":
            print(*draw(summary.parent, curves, rows), sep="\n")
            _draw_readme(ROOT / "docs" / "picture.png", curves, rows, samples)
        elif hasattr(study, "picture"):
            print(*write_picture(summary.parent, name, study.picture(rows)), sep="\n")


if __name__ == "__main__":
    main()
