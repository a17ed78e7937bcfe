"""Does R1-Zero fit into one file? workshop/zero.py: a base that mostly guesses, then RL from a
reward for the result and the form.

    python r1mini.py study zero_one_file

The paper: on AIME 2024, R1-Zero went from 15.6% to 71.0% (v1), and its answers grew from hundreds
to thousands of tokens. Ours: 500 held-out sums of four operations, one answer each, at temperature
1. The seconds are those of the whole file. They mean something only if the machine has nothing else
to do.
"""
import ast
import subprocess
import sys
from pathlib import Path

from engine.errors import UserError
from tools.study import measure_once
from tools.tables import cell, table

SEEDS = (0, 1, 2)
SETTINGS, NEEDS, STAGES = (), (), ()
FILE = Path(__file__).parent.parent / "workshop" / "zero.py"
ROWS = {"one.base.pass@1": "base, right", "one.zero.pass@1": "Zero, right",
        "one.length_ratio": "length of Zero's answers, divided by the base's",
        "one.seconds": "seconds in all"}


def _run(seed):
    """What workshop/zero.py prints last: its dict of results. UserError if it fails."""
    done = subprocess.run([sys.executable, str(FILE), str(seed)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"workshop/zero.py {seed} failed with exit code {done.returncode}")
    return ast.literal_eval(done.stdout.splitlines()[-1])


def measure(folder):
    """The results of a seed, by key such as one.zero.pass@1."""
    found = measure_once(folder, "one", lambda: _run(folder.run.seed))
    return {f"one.{key}": value for key, value in found.items()}


def page(rows, notes):
    """One table, and the finding in a sentence."""
    base, zero = (rows[f"one.{name}.pass@1"]["mean"] for name in ("base", "zero"))
    ratio = rows["one.length_ratio"]["mean"]
    worst = min(rows["one.zero.pass@1"]["per_seed"].values())
    return [*table(["", "mean ± std"], [[text, cell(rows, key)] for key, text in ROWS.items()]), "",
            f"A right result earns 1 and the form 0.1; length and steps earn nothing. The model "
            f"goes from {base:.1%} to {zero:.1%} (the worst seed: {worst:.1%}), and its answers "
            f"become {ratio:.1f} times as long.", "",
            "The paper, R1-Zero on AIME 2024: 15.6% to 71.0% (R1 v1, Table 2 and Figure 2), and "
            "answers that grow from hundreds to thousands of tokens (Figure 3)."]
