"""Draws curves: of an experiment beside another run, or of a whole class with its spread."""
from tools.compare import summarise
from tools.figures import BLUE, GREEN, GREY, ORANGE, Panel

LINES = ((BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, ":", "^"), (GREY, "-.", "D"))
MANY = 20  # points; a line of more has no markers
SHARES = ("pass@1", "reflection", "mixing", "language", "format", "cut_off", "dead_groups", "clip")
NAMES = {"pass@1": "right answers", "length": "tokens of an answer", "format": "in the format",
         "cut_off": "answers that do not end", "language": "words in the question's language",
         "dead_groups": "groups of equal rewards", "clip": "tokens that the clip stops",
         "expert_load": "load of the busiest expert"}


def curves_panel(title, key, runs_of_line):
    """The Panel of one quantity. runs_of_line: {line: {seed: {step: value}}}. A line is the
    mean over its seeds, in a band of one standard deviation."""
    def draw(plot):
        for (name, runs), (colour, dash, marker) in zip(runs_of_line.items(), LINES):
            at = summarise_steps(runs)
            means = [x["mean"] for x in at.values()]
            plot.plot(list(at), means, dash, color=colour, lw=3, ms=8, label=name,
                      marker=marker if len(at) < MANY else None)
            if len(runs) > 1:
                low, high = ([x["mean"] + sign * x["std"] for x in at.values()]
                             for sign in (-1, 1))
                plot.fill_between(list(at), low, high, color=colour, alpha=0.2, lw=0)
        plot.set(xlabel="step", ylabel=NAMES.get(key, key))
        plot.set_ylim(bottom=0)
        plot.xaxis.get_major_locator().set_params(integer=True)
        if len(runs_of_line) > 1:
            plot.legend()
    return Panel(title, draw, "y" if key in SHARES else "")


def summarise_steps(runs):
    """{step: {"mean", "std", "per_seed"}} of {seed: {step: value}}."""
    steps = sorted({step for values in runs.values() for step in values})
    return {step: summarise({seed: values[step] for seed, values in runs.items()
                             if step in values}) for step in steps}
