"""The tests of the plots: what is drawn, from which numbers; drawing itself where there is
matplotlib."""
import struct

import pytest

from tools import figures, report, tables
from tools.figures import STAGES, STUDENTS, bars, by_step, draw, lines, runs_named, values_at

OKABE_ITO = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}


def curves_of_two():
    """Curves of two seeds of Zero and of Dev2, and of one without the language reward."""
    def of(stage, seed):
        return {name: [[stage, step, step + seed / 2] for step in range(3)]
                for name in (*tables.CURVES, *report.UPDATES)} | {
            "loads": [[s, step, [[0.5, 1.5], [2.0, 0.0]]] for s in ("base", stage)
                      for step in (1, 2)]}
    return {"grpo-seed0": of("zero", 0), "grpo-seed1": of("zero", 1),
            "grpo-seed2": {"language": [["dev2", 0, 0.5]]},
            "no_language_reward-seed0": of("dev2", 0)}


class Plot:
    """Stands in for matplotlib's Axes: remembers what it is asked to draw."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **options: self.calls.append((name, args, options))

    def asked(self, name):
        """The arguments of the calls of a method."""
        return [args for called, args, _ in self.calls if called == name]


def test_means_and_bands_by_hand():
    """Two seeds, 0.5 apart: the line is between them, the band from one to the other; the other
    stage's points are not in it."""
    runs = runs_named(curves_of_two(), "grpo")
    assert values_at(runs, "zero", "language") == {0: [0, 0.5], 1: [1, 1.5], 2: [2, 2.5]}
    assert values_at(runs, "dev2", "language") == {0: [0.5]}
    assert by_step(runs, "zero", ("length", "none")) == {
        step: {"length": step + 0.25} for step in range(3)}
    plot = Plot()
    assert lines(plot, "zero", (runs, "length", "a"), (runs, "pass@1", "b"))
    assert plot.asked("plot")[0][:2] == ([0, 1, 2], [0.25, 1.25, 2.25])
    assert plot.asked("fill_between")[0] == ([0, 1, 2], [0, 1, 2], [0.5, 1.5, 2.5])
    assert len(plot.asked("plot")) == 2 and len(plot.asked("legend")) == 1
    assert not lines(Plot(), "zero", (runs, "length", "a"), ([], "length", "b"))


def test_a_heat_map_has_a_row_an_expert():
    """By hand: two mixtures of two experts at two steps, of the first run that kept loads."""
    plot, runs = Plot(), [{}, {"loads": [["base", 30, [[1, 2], [3, 4]]], ["zero", 1, [[0, 0]]],
                                         ["base", 60, [[5, 6], [7, 8]]]]}]
    assert figures.heat(plot, runs, "base", bar=False)
    [(steps, experts, rows)] = plot.asked("pcolormesh")
    assert steps == (30, 60) and list(experts) == [0, 1, 2, 3]
    assert rows == [(1, 5), (2, 6), (3, 7), (4, 8)]
    assert not figures.heat(Plot(), runs, "dev2", bar=False)
    assert not figures.heat(Plot(), [{"loads": [["base", 30, []]]}], "base", bar=False)


def test_bars_are_of_the_stages_that_are_there():
    """Mean, deviation and the number above; one bar alone is no comparison."""
    rows = {f"{stage}.mixing": {"mean": x, "std": 0.01}
            for stage, x in (("zero", 0.6), ("r1", 0.1))}
    plot = Plot()
    assert bars(plot, rows, STAGES, "mixing")
    assert plot.asked("bar") == [(["Zero", "R1"], [0.6, 0.1])]
    assert [args[2] for args in plot.asked("text")] == ["0.60", "0.10"]
    assert not bars(Plot(), rows, {"zero": "Zero"}, "mixing")


def test_colours_are_told_apart():
    """All are Okabe and Ito's, and no two lines of a plot share a colour or a dash."""
    colours, dashes = zip(*figures.STYLES)
    assert set(colours) <= OKABE_ITO and len(set(colours)) == len(set(dashes)) == len(colours)


def test_steps_between_evaluations_stay_out_of_the_climb():
    """Figures of RL's own steps are for plots; the table of dev has rows of evaluations only."""
    curves = {"grpo-seed0": {"pass@1": [["zero", 0, 0.1], ["zero", 5, 0.2]],
                             "entropy": [["zero", step, 0.3] for step in range(1, 6)]}}
    assert [line.split("|")[1].strip() for line in tables.climb(curves)[2:]] == ["0", "5"]


def test_a_report_without_matplotlib_says_so(tmp_path, monkeypatch):
    """No figure, no folder, one sentence."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    [sentence] = draw(tmp_path, curves_of_two(), {})
    assert "matplotlib was not installed" in sentence and not list(tmp_path.iterdir())


def test_every_sheet_is_drawn_for_a_slide(tmp_path):
    """All ten, wide enough for a projector; and none where there is nothing to draw."""
    pytest.importorskip("matplotlib")
    rows = {f"{stage}.{name}": {"mean": 0.5, "std": 0.1} for names, name in (
        (STAGES, "mixing"), (STUDENTS, "pass@1")) for stage in names}
    shown = draw(tmp_path, curves_of_two(), rows)
    names = ["figure1", "length", "reflection", "entropy", "dead_groups", "expert_load",
             "expert_loads", "language", "mixing", "distillation"]
    assert [line.partition("/")[2] for line in shown[:10]] == [f"{name}.png)" for name in names]
    for name in names:
        head = (tmp_path / "figures" / f"{name}.png").read_bytes()[:24]
        assert struct.unpack(">II", head[16:]) == (1280, 720)
    assert draw(tmp_path / "none", {}, {}) == [] and not (tmp_path / "none").exists()
