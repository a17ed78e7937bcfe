"""Do the mixture of experts and multi-token prediction (MTP) pay at this size?

The paper: with MTP in training, a mixture of 15.7B rises from 25.4 to 31.4 on GSM8K
(V3 Table 4; the MTP module is dropped for the test).

    python r1mini.py study parts

Three bases take equally many FLOPs in matrix products: 6 per token and parameter in use,
MTP's parameters included. The dense base's feed-forward layers are as wide as the experts
that one token uses. The base without MTP saves FLOPs, so it trains for more steps.
"""
from statistics import fmean

from engine.folder import read_log
from tools.compare import HOLDS, OPEN, REVERSED, compare
from tools.flops import flops_by_stage
from tools.study import test_record
from tools.tables import cell, table

# {name in the table: (name in keys and folders, settings)}
PARTS = {"mixture and MTP": ("both", "model.n_mtp_layers=1"),
         "mixture alone": ("mixture", "model.n_mtp_layers=0 base.steps=1486"),
         "dense, and MTP": ("dense", "model.n_dense_layers=3")}
DIFFERENCES = {"mtp.loss": ("mixture.loss", "both.loss"),    # what MTP gains
               "mtp.pass@1": ("both.pass@1", "mixture.pass@1"),
               "mixture_of_experts.loss": ("dense.loss", "both.loss"),
               "mixture_of_experts.pass@1": ("both.pass@1", "dense.pass@1")}
RUNS = [(f"parts-{name}-{{seed}}", f"base --set {settings}")
        for name, settings in PARTS.values()]


def numbers(seed, at="runs/"):
    """The numbers of each base of a seed, by key such as dense.pass@1.

    `loss` is the mean of the last hundred steps. Their documents were never read before.
    """
    numbers = {}
    for name, _ in PARTS.values():
        folder = f"{at}parts-{name}-{seed}"
        log, test = read_log(folder), test_record(folder, "base")
        steps = [r for r in log if r["kind"] == "base"]
        tokens = sum(r["tokens"] for r in steps)
        numbers |= {
            f"{name}.loss": fmean(r["loss"] for r in steps[-100:]),
            f"{name}.pass@1": test["pass@1"],
            f"{name}.cons": test[f"cons@{test['samples']}"],
            f"{name}.steps": len(steps),
            f"{name}.reflection": test["reflection"],
            f"{name}.tokens": tokens,
            f"{name}.tflop": flops_by_stage(log)["base"],
        }
    return numbers


def page(rows, notes):
    """The lines of the report: a table of the bases, and whether each part pays."""
    columns = ("loss", "pass@1", "cons", "reflection", "tflop", "tokens", "steps")
    body = [[text, *(cell(rows, f"{name}.{key}") for key in columns)]
            for text, (name, _) in PARTS.items()]
    lines = table(["base", *columns], body)
    for part, without_part in (("MTP", "mixture"), ("the mixture", "dense")):
        lines += ["", _gain_of(rows, part, without_part, "loss", True)]
        lines += ["", _gain_of(rows, part, without_part, "pass@1", False)]
    return [*lines, "",
            "TFLOP: 6 times the tokens read, times the parameters in matrix products. MTP's "
            "parameters are included, the embedding's are not."]


PAYS = {HOLDS: "pays", REVERSED: "costs", OPEN: "may pay or cost: it cannot be told"}


def _gain_of(rows, part, without_part, key, smaller_is_better):
    """The line that says what a part gains by one number."""
    worse, better = f"{without_part}.{key}", f"both.{key}"
    if smaller_is_better:
        worse, better = better, worse
    comparison = compare(rows, worse, better)
    return f"- By {key}, {part} {PAYS[comparison.verdict]}; gain {comparison.text()}."
