"""Tests of tools/figures.py: which numbers are drawn, and the files where matplotlib is there."""
import importlib
import json
import math
import re
import struct
import sys

import pytest

import tasks
from tools import figures, report, tables
from tools.figures import STAGES, STUDENTS, Line, _values_at, by_step, curves_of_runs, draw

OKABE_ITO = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}


def curves_of_two_seeds():
    """Curves of two seeds of Zero, of one seed of Dev2, and of one run without the language
    reward."""
    def curves(stage, seed):
        return {name: [[stage, step, step + seed / 2] for step in range(3)]
                for name in (*tables.DEV_METRICS, *report.STEP_METRICS)} | {
            "loads": [[s, step, [[0.5, 1.5], [2.0, 0.0]]] for s in ("base", stage)
                      for step in (1, 2)]}
    return {"grpo-seed0": curves("zero", 0), "grpo-seed1": curves("zero", 1),
            "grpo-seed2": {"language": [["dev2", 0, 0.5]]},
            "no_language_reward-seed0": curves("dev2", 0)}


class Plot:
    """Replaces matplotlib's Axes and keeps every call."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **options: self.calls.append((name, args, options))

    def arguments_of(self, name):
        """The arguments of the calls of a method."""
        return [args for called, args, _ in self.calls if called == name]


def committed(name, kind):
    """A file of numbers in results/."""
    return json.loads((figures.ROOT / "results" / name / f"{kind}.json").read_text("utf-8"))


def titles(picture):
    """The titles of a picture's panels, each on one line."""
    return [panel.title.replace("\n", " ") for panel in picture.panels]


def test_figures_line_is_the_mean_and_band_the_range():
    """For two seeds 0.5 apart, the line is their mean, the band reaches from one to the other, and
    points of another stage are left out. A label stands at its point, below or above all of the
    band that it is beside."""
    runs = curves_of_runs(curves_of_two_seeds(), "grpo")
    assert _values_at(runs, "zero", "language") == {0: [0, 0.5], 1: [1, 1.5], 2: [2, 2.5]}
    assert _values_at(runs, "dev2", "language") == {0: [0.5]}
    assert by_step(runs, "zero", ("length", "none")) == {
        step: {"length": step + 0.25} for step in range(3)}
    plot = Plot()
    figures._draw_lines(plot, "zero", Line(runs, "length", "a"), Line(runs, "pass@1", "b", "above"))
    assert plot.arguments_of("plot")[0][:2] == ([0, 1, 2], [0.25, 1.25, 2.25])
    assert plot.arguments_of("fill_between")[0] == ([0, 1, 2], [0, 1, 2], [0.5, 1.5, 2.5])
    assert len(plot.arguments_of("plot")) == 2
    assert plot.arguments_of("annotate") == [("a", (1, 1)), ("b", (1, 2.5))]  # below, above


def test_figures_load_map_has_a_row_for_every_expert():
    """Two mixtures of two experts at two steps give four rows, written by hand, with an empty row
    between the mixtures, from the first run that kept its loads. Loads below 1/4 are drawn as 1/4.
    """
    runs = [{}, {"loads": [["base", 30, [[1, 2], [3, 0]]], ["zero", 1, [[0, 0]]],
                           ["base", 60, [[5, 6], [7, 8]]]]}]
    loads = figures._loads_of(runs, "base")
    assert loads == {30: [[1, 2], [3, 0]], 60: [[5, 6], [7, 8]]}
    assert figures._loads_of(runs, "base", until=30) == {30: [[1, 2], [3, 0]]}
    assert figures._loads_of(runs, "dev2") == {} == figures._loads_of(
        [{"loads": [["base", 30, []]]}], "base")  # a dense model has empty loads
    plot = Plot()
    figures._draw_loads(plot, loads, ["layer 2", "MTP"])
    [(steps, row_numbers, rows)] = plot.arguments_of("pcolormesh")
    assert steps == [30, 60] and list(row_numbers) == [0, 1, 2, 3, 4]
    assert rows[:2] == [(1, 5), (2, 6)] and rows[3:] == [(3, 7), (0.25, 8)]
    assert all(map(math.isnan, rows[2]))
    assert plot.arguments_of("set_yticks") == [([0.5, 3.5], ["layer 2", "MTP"])]


def test_figures_bars_show_stages_with_numbers_only():
    """A bar shows mean and standard deviation of a stage that has the number, and its label is in
    percent. Without both stages of its title there is no picture."""
    rows = {f"{stage}.mixing": {"mean": x, "std": 0.01}
            for stage, x in (("zero", 0.6), ("r1", 0.1))}
    plot = Plot()
    figures._draw_bars(plot, rows, STAGES, "mixing", hatched=("r1",))
    assert plot.arguments_of("bar") == [(["Zero", "R1"], [0.6, 0.1])]
    [(_, _, options)] = [call for call in plot.calls if call[0] == "bar"]
    assert options["yerr"] == [0.01, 0.01] and options["hatch"] == ["", "//"]
    assert [args[2] for args in plot.arguments_of("text")] == ["60%", "10%"]
    assert titles(figures._mixing({}, rows)) == ["Zero mixes languages in 60% of its answers, "
                                                 "R1 in 10%"]
    del rows["r1.mixing"]
    assert figures._mixing({}, rows) is None


def test_figures_threshold_joins_pairs_and_shades_where_rl_fails():
    """Of three students, sorted by their bases, each pair is joined. Bases from 0 to the middle
    between the last failure of RL and the next base are shaded."""
    values = {"a": (0.04, 0.1, 0.7), "b": (0.08, 0.8, 0.9), "c": (0.12, 0.95, 0.9)}
    rows = {f"{name}.{fate}": {"per_seed": {"0": x}} for name, found in reversed(values.items())
            for fate, x in zip(("base", "RL", "distilled"), found)}
    picture = figures.threshold_picture(rows)
    assert titles(picture) == ["RL fails from bases up to 4%, and beats distillation above 8%"]
    plot = Plot()
    picture.panels[0].draw(plot)
    assert plot.arguments_of("vlines") == [((0.04, 0.08, 0.12), (0.1, 0.8, 0.95), (0.7, 0.9, 0.9))]
    assert plot.arguments_of("axvspan") == [(0, pytest.approx(0.06))]
    assert {"RL fails", "no change"} <= {word for name in ("text", "annotate")
                                         for args in plot.arguments_of(name) for word in args
                                         if isinstance(word, str)}


def test_figures_arms_have_a_dot_for_each_seed():
    """Each arm has a row: a dot for each seed, and a line at their mean. An arm without the metric
    has none."""
    rows = {"a.x": {"mean": 0.5, "per_seed": {"0": 0.4, "1": 0.6}},
            "c.x": {"mean": 0.9, "per_seed": {"0": 0.9}}}
    plot = Plot()
    figures.arms_panel("title", rows, {"a": "first", "b": "second", "c": "third"}, "x").draw(plot)
    assert plot.arguments_of("scatter") == [([0.4, 0.6], [0, 0]), ([0.9], [1])]
    assert [args[0] for args in plot.arguments_of("vlines")] == [0.5, 0.9]
    assert [list(args[1]) for args in plot.arguments_of("set_yticks")] == [["first", "third"]]


def test_figures_lines_of_arms():
    """A line has the mean at each number on the axis, in their order, and a band from the lowest
    seed to the highest. A number that a seed lacks, and an arm without the metric, are left out."""
    def row(*seeds):
        return {"mean": sum(seeds) / len(seeds), "per_seed": dict(enumerate(seeds))}

    rows = {"a.x.10": row(0.2, 0.4), "a.x.9": row(0.5, 0.7), "a.x.11": row(0.1), "a.x.most": row(9),
            "a.x.y.9": row(8), "c.x.9": row(1.0, 1.0)}
    plot = Plot()
    figures.lines_panel("title", rows, {"a": "first", "b": "second", "c": "third"}, "x", "across",
                        "up").draw(plot)
    assert plot.arguments_of("plot") == [([9, 10], [pytest.approx(0.6), pytest.approx(0.3)]),
                                         ([9], [1.0])]
    assert plot.arguments_of("fill_between") == [([9, 10], [0.5, 0.2], [0.7, 0.4]),
                                                 ([9], [1.0], [1.0])]


def test_figures_titles_have_the_numbers_of_the_committed_data():
    """The numbers in the titles of results/r1 are those of curves.json and summary.json, looked up
    here without the functions of figures.py."""
    curves, rows = committed("r1", "curves"), committed("r1", "summary")["metrics"]

    def at(metric, stage, step, name="grpo"):
        values = [value for seed in range(6) for s, i, value in curves[f"{name}-seed{seed}"][metric]
                  if (s, i) == (stage, step)]
        assert len(values) == 6
        return sum(values) / 6
    pictures = {name: titles(make(curves, rows)) for name, make in figures.PICTURES.items()}
    assert pictures["figure1"] == [
        f"RL alone: {at('pass@1', 'zero', 0):.0%} to {at('pass@1', 'zero', 24):.0%} correct",
        f"Answers grow: {at('length', 'zero', 0):.0f} to {at('length', 'zero', 24):.0f} tokens"]
    checks = [at("reflection", "zero", step) for step in (0, 24)]
    assert f"from {checks[0]:.0%} to {checks[1]:.0%}" in pictures["reflection"][0]
    assert checks[1] < 0.995  # above, the title would say "over 99%"
    half = int(pictures["entropy"][1].rpartition(" ")[2])
    assert at("dead_groups", "zero", half) >= 0.5
    assert all(at("dead_groups", "zero", step) < 0.5 for step in range(1, half))
    assert pictures["entropy"][0] == (f"Entropy falls from {at('entropy', 'zero', 1):.2f} to "
                                      f"{at('entropy', 'zero', 24):.2f} nats")
    loads = {step: max(map(max, mixtures))
             for stage, step, mixtures in curves["grpo-seed0"]["loads"] if stage == "base"}
    assert f"{loads[30]:.1f} to {loads[figures.CROP]:.1f}" in pictures["expert_loads"][0]
    assert [f"{at('language', 'dev2', 14, name):.0%}" in pictures["language"][0]
            for name in ("grpo", "no_language_reward")] == [True, True]
    for name, keys in (("mixing", ("zero.mixing", "r1.mixing")),
                       ("distillation", ("student.rl.pass@1", "student.distill.pass@1"))):
        assert all(f"{rows[key]['mean']:.0%}" in pictures[name][0] for key in keys)


def test_figures_threshold_title_holds_for_the_committed_data():
    """RL stays below one half up to the first base that the title names, and distillation is ahead
    up to the second one, on every student."""
    rows = committed("threshold", "summary")["metrics"]
    low, high = map(int, re.findall(r"(\d+)%", titles(figures.threshold_picture(rows))[0]))
    for name in ("48-250", "default", "64-500", "64-800"):
        for seed in "012":
            base, by_rl, distilled = (rows[f"{name}.{fate}"]["per_seed"][seed]
                                      for fate in ("base", "RL", "distilled"))
            assert (by_rl < 0.5) == (round(100 * base) <= low)
            assert (by_rl > distilled) == (round(100 * base) > high)


def test_figures_titles_do_not_claim_what_did_not_happen():
    """With all curves reversed, no title says that answers grew, checks spread, entropy fell or
    loads evened out. A curve that was not measured is left out."""
    curves = committed("r1", "curves")
    for run in curves.values():
        for name in ("cons@4", "cons@16"):
            del run[name]
        for metric, points in run.items():
            run[metric] = [[stage, -step, value] for stage, step, value in points
                           if (metric, stage) != ("loads", "base") or step <= figures.CROP]
    figure1, reflection, entropy, loads = (figures.PICTURES[name](curves, {}) for name in (
        "figure1", "reflection", "entropy", "expert_loads"))
    assert re.fullmatch("Answers do not grow: [78]. to 3. tokens", titles(figure1)[1])
    assert titles(reflection)[0].startswith("Checking does not spread: from 99% to 2")
    assert titles(entropy)[0].startswith("Entropy rises from 0.0")
    assert "Loads do not even out" in titles(loads)[0]
    plot = Plot()
    plot.transAxes = None
    figure1.panels[0].draw(plot)
    assert len(plot.arguments_of("plot")) == 1


@pytest.mark.parametrize("share, text", [
    (0.171, "17%"), (0.004, "0%"), (0.994, "99%"), (0.996, "over 99%"), (1.0, "100%")])
def test_figures_percent_never_claims_all(share, text):
    """A share is rounded to percent, but 100% is written for all of them only."""
    assert figures._percent_text(share) == text


def test_figures_question_is_read_from_samples():
    """From a page of samples: the last answer of each stage, its steps, and its verdict."""
    samples = ("## Compute 1+2-1 (answer 2)\n\n- **zero, step 0**, wrong: `<answer>9</answer>`\n"
               "- **zero, step 5**, right: `<think>1+2=3 check 3-2=1正确3-1=2检查2+1=3 ok </think>"
               "<answer>2</answer>`\n\n## Compute 1+2 (answer 3)\n\n- **r1, step 1**, wrong: `x`\n")
    answer, answers = figures._read_answers(samples, "Compute 1+2-1")
    problem = tasks.Problem("Compute 1+2-1", answer, "")
    assert answer == "2" and list(answers) == ["zero"]
    steps = figures._solution_steps(tasks.parse(answers["zero"])[0])
    assert steps == ["1+2=3 check 3-2=1正确", "3-1=2检查2+1=3 ok"]
    assert figures._translate_in_brackets(steps[1]) == "3-1=2 [check] 2+1=3 ok"
    assert figures._verdict(answers["zero"], problem)[1] == "✓ correct, two languages"
    assert figures._verdict("<think></think><answer>2</answer>", problem)[1] == (
        "✓ correct, one language")  # a number alone mixes nothing
    assert figures._verdict("<think></think><answer>3</answer>", problem)[1] == "✗ wrong"


@pytest.mark.parametrize("font", ["DejaVu Sans", None])
def test_figures_readme_picture_has_the_committed_answers(tmp_path, monkeypatch, font):
    """Every answer to the README's question is drawn whole, with the training curve's numbers in
    the title; without a font for Chinese no Chinese character is drawn."""
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(figures, "_chinese_font", lambda: font)
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    samples = (figures.ROOT / "results/r1/samples.md").read_text("utf-8")
    curves, rows = committed("r1", "curves"), committed("r1", "summary")["metrics"]
    figures._draw_readme(tmp_path / "x.png", curves, rows, samples)
    curve, question = drawn[0].axes
    assert curve.get_title("left") == titles(figures._figure1(curves, rows))[0]
    text = "".join(piece.get_text() for piece in question.texts)
    _, answers = figures._read_answers(samples, figures.QUESTION)
    for stage in figures.MODELS:
        for step in figures._solution_steps(tasks.parse(answers[stage])[0]):
            assert (step if font else figures._translate_in_brackets(step)) in text
    assert ("正确" in text) == (font is not None)
    assert [words for words in ("✗ wrong", "✓ correct, two languages", "✓ correct, one language")
            if words in text] == ["✗ wrong", "✓ correct, two languages", "✓ correct, one language"]
    lowest = max(piece.get_position()[1] for piece in question.texts)
    assert lowest < question.get_ylim()[0]  # the boxes fit on the page


def test_figures_colours_and_dashes_differ():
    """All colours are of the palette of Okabe and Ito, and no two lines share a colour, a dash or a
    marker."""
    for values in zip(*figures.STYLES):
        assert len(set(values)) == len(figures.STYLES)
    assert {figures.BLUE, figures.ORANGE, figures.GREEN} <= OKABE_ITO
    assert {colour for colour, _, _ in figures.STYLES} <= OKABE_ITO


def test_figures_without_matplotlib_is_one_sentence(tmp_path, monkeypatch):
    """Without matplotlib, draw() makes no file and returns one sentence."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    [sentence] = draw(tmp_path, curves_of_two_seeds(), {})
    assert "matplotlib was not installed" in sentence and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        figures.main()


def test_figures_are_drawn_at_slide_size(tmp_path):
    """All seven pictures are 1120 x 630 pixels, and nothing is drawn without numbers."""
    pytest.importorskip("matplotlib")
    rows = {f"{stage}.{name}": {"mean": 0.5, "std": 0.1} for names, name in (
        (STAGES, "mixing"), (STUDENTS, "pass@1")) for stage in names}
    shown = draw(tmp_path, curves_of_two_seeds(), rows)
    names = ["figure1", "reflection", "entropy", "expert_loads", "language", "mixing",
             "distillation"]
    assert [line.partition("](figures/")[2] for line in shown] == [f"{name}.png)" for name in names]
    for name in names:
        head = (tmp_path / "figures" / f"{name}.png").read_bytes()[:24]
        assert struct.unpack(">II", head[16:]) == (1120, 630)
    assert draw(tmp_path / "none", {}, {}) == [] and not (tmp_path / "none").exists()


@pytest.mark.parametrize("path", ["docs/picture.png", "results/threshold/figures/threshold.png",
                                  *(f"results/r1/figures/{name}.png" for name in figures.PICTURES)])
def test_figures_committed_pictures_are_small(path):
    """Every picture is there, and under 120 KB."""
    assert 0 < (figures.ROOT / path).stat().st_size < 120_000


# The studies with results that have a picture.
PICTURED = [path.stem for path in sorted((figures.ROOT / "studies").glob("*.py"))
            if "def picture(" in path.read_text("utf-8")
            and (figures.ROOT / "results" / path.stem / "summary.json").exists()]


@pytest.mark.parametrize("name", PICTURED)
def test_figures_titles_and_labels_of_studies_are_not_cut_off(name, tmp_path, monkeypatch):
    """All text of a study's picture is within the picture."""
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    study = importlib.import_module(f"studies.{name}")
    picture = study.picture(committed(name, "summary")["metrics"])
    if picture is None:
        pytest.skip("the committed results have no numbers for it")
    figures.write_picture(tmp_path, name, picture)
    [figure] = drawn
    figure.canvas.draw()
    right = figure.bbox.x1
    for plot in figure.axes:
        for text in (plot._left_title, plot.xaxis.label, plot.yaxis.label):
            assert text.get_window_extent().x1 <= right, text.get_text()
