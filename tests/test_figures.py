"""Tests of tools/figures.py: which numbers are drawn, and the files where matplotlib is there."""
import struct
import sys

import pytest

from tools import figures, report, tables
from tools.figures import STAGES, STUDENTS, bars, by_step, draw, lines, runs_named, values_at

OKABE_ITO = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}


def curves_of_two_seeds():
    """Curves of two seeds of Zero, of one seed of Dev2, and of one run without the language
    reward."""
    def curves(stage, seed):
        return {name: [[stage, step, step + seed / 2] for step in range(3)]
                for name in (*tables.CURVES, *report.UPDATES)} | {
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


def test_figures_line_is_the_mean_and_band_the_range():
    """For two seeds 0.5 apart, the line is their mean, the band reaches from one to the other, and
    points of another stage are left out."""
    runs = runs_named(curves_of_two_seeds(), "grpo")
    assert values_at(runs, "zero", "language") == {0: [0, 0.5], 1: [1, 1.5], 2: [2, 2.5]}
    assert values_at(runs, "dev2", "language") == {0: [0.5]}
    assert by_step(runs, "zero", ("length", "none")) == {
        step: {"length": step + 0.25} for step in range(3)}
    plot = Plot()
    assert lines(plot, "zero", (runs, "length", "a"), (runs, "pass@1", "b"))
    assert plot.arguments_of("plot")[0][:2] == ([0, 1, 2], [0.25, 1.25, 2.25])
    assert plot.arguments_of("fill_between")[0] == ([0, 1, 2], [0, 1, 2], [0.5, 1.5, 2.5])
    assert len(plot.arguments_of("plot")) == 2 and len(plot.arguments_of("legend")) == 1
    assert not lines(Plot(), "zero", (runs, "length", "a"), ([], "length", "b"))


def test_figures_heat_map_has_a_row_for_every_expert():
    """Two mixtures of two experts at two steps give four rows, written by hand, from the first run
    that kept its loads."""
    plot, runs = Plot(), [{}, {"loads": [["base", 30, [[1, 2], [3, 4]]], ["zero", 1, [[0, 0]]],
                                         ["base", 60, [[5, 6], [7, 8]]]]}]
    assert figures.heat(plot, runs, "base", bar=False)
    [(steps, experts, rows)] = plot.arguments_of("pcolormesh")
    assert steps == (30, 60) and list(experts) == [0, 1, 2, 3]
    assert rows == [(1, 5), (2, 6), (3, 7), (4, 8)]
    assert not figures.heat(Plot(), runs, "dev2", bar=False)
    assert not figures.heat(Plot(), [{"loads": [["base", 30, []]]}], "base", bar=False)


def test_figures_bars_show_stages_with_numbers_only():
    """A bar shows mean and standard deviation of a stage that has the number. A single bar is not
    drawn."""
    rows = {f"{stage}.mixing": {"mean": x, "std": 0.01}
            for stage, x in (("zero", 0.6), ("r1", 0.1))}
    plot = Plot()
    assert bars(plot, rows, STAGES, "mixing")
    assert plot.arguments_of("bar") == [(["Zero", "R1"], [0.6, 0.1])]
    assert [args[2] for args in plot.arguments_of("text")] == ["0.60", "0.10"]
    assert not bars(Plot(), rows, {"zero": "Zero"}, "mixing")


def test_figures_colours_and_dashes_differ():
    """All colours are of the palette of Okabe and Ito, and no two lines share a colour or a
    dash."""
    colours, dashes = zip(*figures.STYLES)
    assert set(colours) <= OKABE_ITO and len(set(colours)) == len(set(dashes)) == len(colours)


def test_figures_without_matplotlib_is_one_sentence(tmp_path, monkeypatch):
    """Without matplotlib, draw() makes no file and returns one sentence."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    [sentence] = draw(tmp_path, curves_of_two_seeds(), {})
    assert "matplotlib was not installed" in sentence and not list(tmp_path.iterdir())


def test_figures_are_drawn_at_slide_size(tmp_path):
    """All ten pictures are 1280 x 720 pixels, and nothing is drawn without numbers."""
    pytest.importorskip("matplotlib")
    rows = {f"{stage}.{name}": {"mean": 0.5, "std": 0.1} for names, name in (
        (STAGES, "mixing"), (STUDENTS, "pass@1")) for stage in names}
    shown = draw(tmp_path, curves_of_two_seeds(), rows)
    names = ["figure1", "length", "reflection", "entropy", "dead_groups", "expert_load",
             "expert_loads", "language", "mixing", "distillation"]
    assert [line.partition("/")[2] for line in shown[:10]] == [f"{name}.png)" for name in names]
    for name in names:
        head = (tmp_path / "figures" / f"{name}.png").read_bytes()[:24]
        assert struct.unpack(">II", head[16:]) == (1280, 720)
    assert draw(tmp_path / "none", {}, {}) == [] and not (tmp_path / "none").exists()
