"""Do the mixture and MTP pay at this size? Each is taken away at equal work.

    python r1mini.py study parts
"""
from statistics import fmean

import moe
from engine.folder import read_log
from tools.cost import in_products
from tools.study import tested
from tools.tables import cell, table

# Bases that take the same products, 6 a parameter in use and token, MTP's included. A dense layer
# is as wide as the experts a token uses; without MTP more is read.
PARTS = {"mixture and MTP": ("both", "model.n_mtp_layers=1"),
         "mixture alone": ("mixture", "model.n_mtp_layers=0 base.steps=1325"),
         "dense, and MTP": ("dense", "model.n_dense_layers=3")}
RUNS = [(f"parts-{name}-{{seed}}", f"base --set {words}") for name, words in PARTS.values()]


def numbers(seed, at="runs/"):
    """What became of each base of a seed, by key such as dense.pass@1; loss is the mean of the
    last hundred steps, all of documents never read before."""
    found = {}
    for name, _ in PARTS.values():
        folder = f"{at}parts-{name}-{seed}"
        log, test = read_log(folder), tested(folder, "base")
        steps = [r for r in log if r["kind"] == "base"]
        tokens = sum(r["tokens"] for r in steps)
        work = 6 * in_products(moe.Config(**log[0]["model"])) * tokens / 1e12
        values = {"loss": fmean(r["loss"] for r in steps[-100:]), "pass@1": test["pass@1"],
                  "cons": test[f"cons@{test['samples']}"], "steps": len(steps),
                  "reflection": test["reflection"], "tokens": tokens, "tflop": work}
        found |= {f"{name}.{key}": x for key, x in values.items()}
    return found


def page(rows, notes):
    """Do the mixture and MTP pay at this size? Each is taken away at equal work."""
    columns = ("loss", "pass@1", "cons", "reflection", "tflop", "tokens", "steps")
    lines = table(["base", *columns], [[text, *(cell(rows, f"{name}.{key}") for key in columns)]
                                       for text, (name, _) in PARTS.items()])
    for text, other in (("MTP", "mixture"), ("the mixture", "dense")):
        for key, better in (("loss", -1), ("pass@1", 1)):
            both, without = (rows[f"{name}.{key}"]["per_seed"] for name in ("both", other))
            gains = [better * (both[seed] - without[seed]) for seed in both]
            wins = sum(gain > 0 for gain in gains)
            lines += ["", f"- By {key}, {text} pays on {wins} of {len(gains)} seeds; gain "
                      f"{fmean(gains):+.3f} ({', '.join(f'{gain:+.3f}' for gain in gains)})."]
    return [*lines, "", "TFLOP: 6 times the parameters in products, MTP's included, the "
            "embedding's not, and tokens read."]
