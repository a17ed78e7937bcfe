"""How much of a difference does the bias of the router make?

The papers: V3 balances its experts with a bias that only chooses (V3 section 2.1.2), not with
a loss that pulls on what is learnt. At 1B parameters, the bias in place of the loss lowers
MaxVio from 0.72 to 0.04 and perplexity from 9.56 to 9.50 (arXiv 2408.15664, Table 2).

    python r1mini.py study balance

A base of nano in three arms, from the same weights and on the same documents:

    none         nothing balances the experts
    auxiliary    V3's sequence-wise loss alone (V3 eq 17-20), with the weight of the 1B model
    bias         the bias alone, at V3's speed

MaxVio = (load of the busiest expert - mean load) / mean load, the mean over layers. It is 0
if all experts have as much, and 3 if two of eight have all. Once it is of fresh documents
together (MaxVio_global), once of each training step. What experts learn is the mutual
information of a token's kind (digit, sign, word, ...) and its expert: 0 bits if every expert
gets the same mix of kinds.
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
from tools.study import test_numbers
from tools.tables import cell, table

# 900 steps and not 1,000: a seed has to end within 15 minutes.
SETTINGS, STAGES = ("base.steps=900",), ()
ARMS = {"none": "model.balance_alpha=0 model.bias_speed=0",
        "auxiliary": "model.balance_alpha=1e-3 model.bias_speed=0",
        "bias": "model.balance_alpha=0 model.bias_speed=1e-3"}
PAIRS = (("auxiliary", "none"), ("bias", "none"), ("bias", "auxiliary"))
DIFFERENCES = {f"balance.{arm}_minus_{other}.{key}": (f"{arm}.{key}", f"{other}.{key}")
               for arm, other in PAIRS for key in ("loss", "pass@1", "maxvio", "information")}
LAST = 100       # steps that loss and MaxVio of training are means of
DOCUMENTS = 400  # fresh ones, about 18,000 tokens

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
    """[Counter of (expert, kind of token)] for each mixture, over the real tokens of rows."""
    choices = []  # (N, K) of each mixture

    def keep(router, inputs, outputs):
        choices.append(outputs[2])

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
        experts = expert_ids_NK[document.flatten() > 0].tolist()
        counts.append(Counter((expert, kind) for of_token, kind in zip(experts, kinds)
                              for expert in of_token))
    return counts


def _max_violation(loads):
    """MaxVio of the loads of a mixture (arXiv 2408.15664, eq 4)."""
    return max(loads) / fmean(loads) - 1


def _information(counts):
    """The mutual information of expert and kind, in bits."""
    of_expert, of_kind, total = Counter(), Counter(), sum(counts.values())
    for (expert, kind), n in counts.items():
        of_expert[expert] += n
        of_kind[kind] += n
    return sum(n / total * log2(n * total / (of_expert[expert] * of_kind[kind]))
               for (expert, kind), n in counts.items())


def _favourites(counts, n_experts):
    """What each expert takes more of than the others, as text: "0 digit 1.8x, ..." says that
    digits are 1.8 times as frequent among expert 0's tokens as among all."""
    of_kind, total = Counter(), sum(counts.values())
    for (_, kind), n in counts.items():
        of_kind[kind] += n
    words = []
    for expert in range(n_experts):
        load = sum(counts[expert, kind] for kind in KINDS)
        if load == 0:
            words.append(f"{expert} idle")
            continue
        times = {kind: counts[expert, kind] / load / (of_kind[kind] / total)
                 for kind in KINDS if of_kind[kind]}
        kind = max(times, key=times.get)
        words.append(f"{expert} {kind} {times[kind]:.1f}x")
    return ", ".join(words)


def measure_arm(arm, folder):
    """The numbers of an arm: of its last training steps, on fresh documents, and on test."""
    run, E = folder.run, folder.run.model.n_routed_experts
    torch.manual_seed(run.seed)
    model = folder.place(moe.Transformer(run.model))

    def draw(rng):
        return tasks.make_document(rng, run.corpus)

    records = [record for record, _ in tqdm(train(model, run.base, draw, run.seed), arm,
                                            run.base.steps)]
    last, mixtures = records[-LAST:], run.model.n_layers - run.model.n_dense_layers
    numbers = {"loss": fmean(r["loss"] for r in last),  # the last of loads is MTP's
               "maxvio_batch": fmean(_max_violation(loads) for r in last
                                     for loads in r["loads"][:mixtures])}

    rng = random.Random(f"{run.seed}/balance")
    counts = _count_choices(model, pack([draw(rng) for _ in range(DOCUMENTS)],
                                        run.base.row_tokens))
    loads = [[sum(of_layer[expert, kind] for kind in KINDS) for expert in range(E)]
             for of_layer in counts]
    numbers |= {"maxvio": fmean(map(_max_violation, loads)),
                "idle": fmean(sum(x < 0.1 * fmean(of_layer) for x in of_layer)
                              for of_layer in loads),
                "information": fmean(map(_information, counts)),
                "experts": _favourites(counts[-1], E)}
    return numbers | {"pass@1": test_numbers(model, run)["pass@1"]}


def combine(numbers):
    """MaxVio of each arm."""
    return {f"balance.{arm}.maxvio": numbers[f"{arm}.maxvio"] for arm in ARMS}


def page(rows, notes):
    """The lines of the report: the arms, their differences, and what experts learn."""
    columns = {"loss": "loss", "pass@1": "pass@1", "maxvio": "MaxVio, fresh documents",
               "maxvio_batch": "MaxVio, a step", "idle": "experts under a tenth of the mean",
               "information": "bits of a token's kind in its expert"}
    body = [[arm, *(cell(rows, f"{arm}.{key}") for key in columns)] for arm in ARMS]
    lines = [*table(["arm", *columns.values()], body), ""]
    for arm, other in PAIRS:
        for key in ("loss", "pass@1", "information"):
            comparison = compare(rows, f"{other}.{key}", f"{arm}.{key}")
            if comparison:
                lines.append(f"- {key}, {arm} minus {other}: "
                             f"{comparison.text(points=key == 'pass@1')}")
    for arm in ARMS:
        for seed, text in notes.get(f"{arm}.experts", {}).items():
            lines.append(f"- what experts of the last layer prefer, {arm}, seed {seed}: {text}")
    return lines
