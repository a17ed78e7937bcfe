"""How much of a difference does the bias of the router make?

The papers: V3 balances its experts with a bias that is used only to choose them, and that no
gradient reaches (V3 section 2.1.2). A loss that balances has a gradient, which disturbs what is
learnt. At 1B parameters, the bias in place of a loss lowers MaxVio from 0.72 to 0.04 and
perplexity from 9.56 to 9.50 (arXiv 2408.15664, Table 2). In V3's own comparison, also at 1B, the
validation loss is 2.258 with the sequence-wise loss and 2.253 with the bias (section 4.5.3).

    python r1mini.py study balance

A base of nano in five arms, from the same weights and on the same documents:

    none         nothing balances the experts
    auxiliary    V3's sequence-wise loss alone (V3 eq 17-20), with alpha 0.001 as in that Table 2
    strong       the same with alpha 0.01
    bias         the bias alone, with V3's gamma of 0.001
    fast         the same with gamma 0.01

The papers' values are for hundreds of thousands of steps, a base of nano has hundreds. So each of
the two methods has an arm that acts ten times as strongly. V3 itself has the bias and this loss,
with alpha 0.0001. Here a "sequence" of the loss is a packed row.

    MaxVio = (load of the busiest expert - mean load) / mean load        (2408.15664, eq 4)

We report its mean over the layers. It is 0 if all experts have equal loads, and 3 if two of eight
experts have all tokens. It is measured on fresh documents taken together, as MaxVio_global in the
paper, and on each training step.

What experts learn is measured by the mutual information of a token's kind (digit, sign, word, ...)
and its expert. It is 0 bits if every expert gets the same mix of kinds. It cannot exceed the
entropy of the experts, which is low where few experts have all tokens. So we also report their
ratio.
"""
import random
from collections import Counter
from math import log2
from statistics import fmean

import torch
from tqdm import tqdm

import moe
import tasks
from r1mini import batch_of, pack, train
from tools.compare import compare
from tools.figures import Picture, arms_panel
from tools.study import test_numbers
from tools.tables import cell, table

# 500 steps and not 1,000: a seed has to end within 15 minutes.
SEEDS, SETTINGS, STAGES = range(6), ("base.steps=500",), ()
STRENGTHS = {"none": (0, 0), "auxiliary": (1e-3, 0), "strong": (1e-2, 0), "bias": (0, 1e-3),
             "fast": (0, 1e-2)}  # alpha, gamma
ARMS = {arm: f"model.balance_alpha={alpha} model.bias_speed={gamma}"
        for arm, (alpha, gamma) in STRENGTHS.items()}
PAIRS = (("auxiliary", "none"), ("strong", "none"), ("bias", "none"), ("fast", "none"),
         ("bias", "auxiliary"), ("fast", "strong"))
DIFFERENCES = {f"balance.{arm}_minus_{other}.{key}": (f"{arm}.{key}", f"{other}.{key}")
               for arm, other in PAIRS for key in ("loss", "pass@1", "maxvio", "information")}
LAST = 100       # the last steps of training, for the means of loss and MaxVio
DOCUMENTS = 400  # fresh documents, about 18,000 tokens

KINDS = ("digit", "sign", "English", "Chinese", "special", "other")


def _kind_of(token_id):
    """Which of KINDS a token is."""
    text = tasks.ENCODING.decode([token_id])
    if text in tasks.SPECIAL:
        return "special"
    if text.isdecimal():
        return "digit"
    if text in ("+", "-", "*", "/", "="):
        return "sign"
    words = tasks.word_languages(text)
    return {"en": "English", "zh": "Chinese"}.get(words[0], "other") if words else "other"


@torch.no_grad()
def _count_choices(model, rows):
    """For each mixture, a Counter of (expert, kind of token) over the real tokens of rows."""
    choices = []  # expert_ids_NK of each mixture

    def keep(router, inputs, outputs):
        _, _, expert_ids_NK = outputs
        choices.append(expert_ids_NK)

    mixtures = [layer.ffn for layer in model.layers if isinstance(layer.ffn, moe.MoE)]
    hooks = [mixture.router.register_forward_hook(keep) for mixture in mixtures]
    model.eval()
    tokens, document, _ = batch_of(model, rows)
    model(tokens, document > 0, document=document)
    for hook in hooks:
        hook.remove()
    kinds = [_kind_of(i) for i in tokens[document > 0].tolist()]
    counts = []
    for expert_ids_NK in choices:
        count = Counter()
        for expert_ids, kind in zip(expert_ids_NK[document.flatten() > 0].tolist(), kinds):
            count.update((expert, kind) for expert in expert_ids)
        counts.append(count)
    return counts


def _max_violation(loads):
    """MaxVio of the loads of a mixture's experts (arXiv 2408.15664, eq 4)."""
    return max(loads) / fmean(loads) - 1


def _information(counts):
    """The mutual information of expert and kind in bits: the sum over both of
    p(expert, kind) log2 (p(expert, kind) / (p(expert) p(kind)))."""
    count_of_expert, count_of_kind, total = Counter(), Counter(), counts.total()
    for (expert, kind), n in counts.items():
        count_of_expert[expert] += n
        count_of_kind[kind] += n
    return sum(n / total * log2(n * total / (count_of_expert[expert] * count_of_kind[kind]))
               for (expert, kind), n in counts.items())


def _entropy_of_experts(counts):
    """The entropy of the expert of a token, in bits: the most that _information can be."""
    count_of_expert, total = Counter(), counts.total()
    for (expert, _), n in counts.items():
        count_of_expert[expert] += n
    return -sum(n / total * log2(n / total) for n in count_of_expert.values())


def _favourites(counts, n_experts):
    """The kind that each expert prefers, as text. "0 digit 1.8x, ..." says that digits are 1.8
    times as frequent among expert 0's tokens as among all tokens."""
    count_of_kind, total = Counter(), counts.total()
    for (_, kind), n in counts.items():
        count_of_kind[kind] += n
    words = []
    for expert in range(n_experts):
        load = sum(counts[expert, kind] for kind in KINDS)
        if load == 0:
            words.append(f"{expert} idle")
            continue
        ratios = {kind: counts[expert, kind] / load / (count_of_kind[kind] / total)
                  for kind in KINDS if count_of_kind[kind]}
        favourite = max(ratios, key=ratios.get)
        words.append(f"{expert} {favourite} {ratios[favourite]:.1f}x")
    return ", ".join(words)


def measure_arm(arm, folder):
    """The numbers of an arm: in its last training steps, on fresh documents, and on test."""
    run = folder.run
    torch.manual_seed(run.seed)
    model = folder.place(moe.Transformer(run.model))

    def draw(rng):
        return tasks.make_document(rng, run.corpus)

    records = [record for record, _ in tqdm(train(model, run.base, draw, run.seed), arm,
                                            run.base.steps)]
    last = records[-LAST:]
    mixtures = run.model.n_layers - run.model.n_dense_layers  # a step has their loads, then MTP's
    numbers = {"loss": fmean(r["loss"] for r in last),  # of the next token alone
               "maxvio_batch": fmean(_max_violation(loads) for r in last
                                     for loads in r["loads"][:mixtures])}

    rng = random.Random(f"{run.seed}/balance")
    fresh = [draw(rng) for _ in range(DOCUMENTS)]
    counts = _count_choices(model, pack(fresh, run.base.row_tokens))
    experts = range(run.model.n_routed_experts)
    loads_of_layer = [[sum(count[expert, kind] for kind in KINDS) for expert in experts]
                      for count in counts]
    numbers |= {"maxvio": fmean(map(_max_violation, loads_of_layer)),
                "idle": fmean(sum(load < 0.1 * fmean(loads) for load in loads)
                              for loads in loads_of_layer),
                "information": fmean(map(_information, counts)),
                "information_share": fmean(_information(count) / _entropy_of_experts(count)
                                           for count in counts),
                "experts": _favourites(counts[-1], len(experts))}
    return numbers | {"pass@1": test_numbers(model, run)["pass@1"]}


def combine(numbers):
    """MaxVio of each arm."""
    return {f"balance.{arm}.maxvio": numbers[f"{arm}.maxvio"] for arm in ARMS}


NAMES = {"none": "none", "auxiliary": "loss, 0.001", "strong": "loss, 0.01",
         "bias": "bias, 0.001", "fast": "bias, 0.01"}


def picture(rows):
    """MaxVio and the loss of each arm."""
    none, bias = (rows[f"{arm}.maxvio"]["mean"] for arm in ("none", "bias"))
    change = 100 * (rows["bias.loss"]["mean"] / rows["none.loss"]["mean"] - 1)
    return Picture([arms_panel(f"With the bias, MaxVio is\n{bias:.2f} instead of {none:.2f},",
                               rows, NAMES, "maxvio", "MaxVio", percent=False),
                    arms_panel(f"and the loss\nchanges by {change:+.1f}%", rows, NAMES, "loss",
                               "loss", percent=False)],
                   "fresh documents; a dot is a seed, a line the mean")


def page(rows, notes):
    """The lines of the report: the arms, their differences, and what experts learn."""
    columns = {"loss": "loss", "pass@1": "pass@1", "maxvio": "MaxVio, fresh documents",
               "maxvio_batch": "MaxVio, a step",
               "idle": "experts with less than a tenth of the mean load",
               "information": "bits of a token's kind in its expert",
               "information_share": "as a share of the experts' entropy"}
    body = [[NAMES[arm], *(cell(rows, f"{arm}.{key}") for key in columns)] for arm in ARMS]
    lines = [*table(["arm", *columns.values()], body), ""]
    for arm, other in PAIRS:
        for key in ("loss", "pass@1", "maxvio", "information"):
            comparison = compare(rows, f"{other}.{key}", f"{arm}.{key}")
            if comparison:
                lines.append(f"- {key}, {arm} minus {other}: "
                             f"{comparison.text(points=key == 'pass@1')}")
    for arm in ARMS:
        for seed, text in notes.get(f"{arm}.experts", {}).items():
            lines.append(f"- what experts of the last layer prefer, {arm}, seed {seed}: {text}")
    return lines
