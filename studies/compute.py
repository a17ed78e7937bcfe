"""What does more computing at the time of the answer buy, and do checks matter?

    more samples     pass@k, the majority vote, and the most central answer (Smoothie) among k
    a limit          thinking is cut after so many tokens, and the model has to answer
    the aha moment   wrong steps that are caught and mended; and accuracy with "wait" forbidden

    python r1mini.py study compute

All on held-out problems, at temperature 1, of a run's base, zero and r1.
"""
import contextlib
import math
import operator
import re
from collections import Counter
from pathlib import Path

import torch

import tasks
from engine import checkpoint
from engine.evaluate import embeddings, prompts_of, sample_answers, selection
from tools.study import once
from tools.tables import cell, table

SETTINGS = ("eval.problems=100", "eval.samples=64")
NEEDS, STAGES = ("base.pt", "zero.pt", "r1.pt"), ()
MODELS = ("base", "zero", "r1")
LIMITS = (0, 10, 20, 40, 60, 80, 120)  # tokens of thinking
FEW = 16                               # answers a problem, for limits and bans
THINK, END_THINK, ANSWER = (tasks.ENCODING.encode_single_token(tag) for tag in
                            (tasks.THINK, tasks.END_THINK, tasks.ANSWER))


# -------------------------------------------------------------------------------------------------
# A limit on thinking


def cut(answer, limit):
    """The token ids of an answer that thinks for more than `limit` tokens, cut there and bidden to
    answer; None if it does not think that long. Cut, it is in the template, whatever it was."""
    body = answer[1:] if answer[:1] == [THINK] else answer
    length = next((i for i, t in enumerate(body) if t in (END_THINK, ANSWER, tasks.END_ID)),
                  len(body))
    return [THINK, *body[:limit], END_THINK, ANSWER] if length > limit else None


def limited(model, prompts, answers, limit, rows):
    """Texts of the answers, those cut at the limit as the model finishes them."""
    texts, begun = [tasks.decode(ids) for ids in answers], {}
    for i, ids in enumerate(answers):
        if (start := cut(ids, limit)) is not None:
            begun[i] = start
    cuts = [prompts[i] + start for i, start in begun.items()]
    ends = sample_answers(model, cuts, 8, rows, seed=1)
    for (i, start), end in zip(begun.items(), ends):
        texts[i] = tasks.decode(start + end)
    return texts


# -------------------------------------------------------------------------------------------------
# Is the aha moment real?

NAMES = {words[name].strip(): name for words in tasks.WORDS.values() for name in words}
STEP = re.compile(r"([^-+*=0-9]*)(-?[0-9]+)([-+*])([0-9]+)=(-?[0-9]+)")
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def steps(text):
    """What became of each step of a working: wrong as first written, caught ("wait" came before the
    next step), mended (the same operation with its true value stood there last)."""
    found = []
    for word, a, sign, b, result in STEP.findall(text.partition(tasks.END_THINK)[0]):
        name, true = NAMES.get(word.strip()), SIGNS[sign](int(a), int(b)) == int(result)
        if name == "wait" and found:
            found[-1] |= {"caught": True, "mended": true and found[-1]["step"] == (a, sign, b)}
        elif name != "check":
            found.append({"step": (a, sign, b), "wrong": not true, "caught": False,
                          "mended": False})
    return found


def share(values):
    """The mean of truth values; None of none."""
    values = list(values)
    return sum(map(float, values)) / len(values) if values else None


def working(texts, asked):
    """What becomes of wrong steps, counted over texts."""
    each = [(steps(text), tasks.accuracy(text, p)) for text, p in zip(texts, asked)]
    every = [step for found, _ in each for step in found]
    wrong = [step for step in every if step["wrong"]]
    slipped = [(all(s["mended"] for s in found if s["wrong"]), right) for found, right in each
               if any(s["wrong"] for s in found)]
    return {"wrong_steps": share(s["wrong"] for s in every),
            "caught": share(s["caught"] for s in wrong),
            "mended": share(s["mended"] for s in wrong),
            "false_alarms": share(s["caught"] for s in every if not s["wrong"]),
            "slipped": len(slipped) / len(each),
            "slipped_mended": share(mended for mended, _ in slipped),
            "slipped_right": share(right for _, right in slipped),
            "mended_right": share(right for mended, right in slipped if mended),
            "unmended_right": share(right for mended, right in slipped if not mended)}


def tokens_of(name, languages=tasks.LANGUAGES):
    """The tokens of one of tasks.WORDS."""
    return [token for language in languages
            for token in tasks.ENCODING.encode_ordinary(tasks.WORDS[language][name])]


def neutral(answers, name):
    """The token, of words that judge nothing, whose frequency in answers is nearest that of a word
    of tasks.WORDS. In one language only, so that the other's can stand in for it."""
    counts = Counter(token for ids in answers for token in ids)
    wanted = sum(counts[token] for token in tokens_of(name))
    known = [token for name in ("then", "ok") for token in tokens_of(name)]
    return min(known, key=lambda token: abs(math.log((counts[token] + 1) / (wanted + 1))))


@contextlib.contextmanager
def banned(model, tokens):
    """While this lasts, the model cannot write these tokens: the head gives them -inf."""
    def forbid(head, inputs, logits):
        chosen = torch.tensor(tokens, dtype=torch.long, device=logits.device)
        return logits.index_fill(-1, chosen, -math.inf)
    hook = model.head.register_forward_hook(forbid)
    try:
        yield
    finally:
        hook.remove()


def bans(model, prompts, asked, limit, rows, frequent, each=FEW):
    """Accuracy with words forbidden, on the same problems with the same random numbers. effect:
    the difference that makes; error: its standard error over problems. `each` answers a problem."""
    plans, record, rights = {"nothing": []}, {}, {}
    for name in ("wait", "check"):
        word = neutral(frequent, name)
        plans |= {name: tokens_of(name), f"{name}'s neutral": [word]}
        record[f"ban.{name}'s neutral.word"] = tasks.ENCODING.decode([word])
    for name, tokens in plans.items():
        with banned(model, tokens):
            answers = sample_answers(model, prompts, limit, rows, seed=2)
        right = torch.tensor([tasks.accuracy(tasks.decode(ids), p) for ids, p in zip(
            answers, asked)]).view(-1, each).mean(1)  # (P,)
        rights[name] = right
        record |= {f"ban.{name}.pass@1": float(right.mean()),
                   f"ban.{name}.effect": float((right - rights["nothing"]).mean()),
                   f"ban.{name}.error": standard_error(right - rights["nothing"]),
                   f"ban.{name}.length": sum(map(len, answers)) / len(answers),
                   f"ban.{name}.frequency": sum(ids.count(token) for ids in frequent
                                                for token in tokens) / len(frequent)}
    for name in ("wait", "check"):
        gap = rights[name] - rights[f"{name}'s neutral"]
        record |= {f"ban.{name}.gap": float(gap.mean()),
                   f"ban.{name}.gap.error": standard_error(gap)}
    return record


def standard_error(x):
    """Of the mean of x (P,), over problems."""
    return float(x.std()) / len(x) ** 0.5


# -------------------------------------------------------------------------------------------------
# The study


def of_model(path, run, options, reasons):
    """All figures of one model; what became of its wrong steps only if it reasons."""
    model, s = checkpoint.load(path, options.device, options.dtype)[0].eval(), run.eval
    problems = tasks.make_problems("test", s.problems, run.zero.levels, run.corpus.products)
    asked = [p for p in problems for _ in range(s.samples)]
    prompts = prompts_of(asked)
    answers = sample_answers(model, prompts, run.zero.max_new_tokens, s.rows, seed=1)
    texts = [tasks.decode(ids) for ids in answers]
    record = selection(texts, problems, embeddings(model, prompts, answers, s.rows))
    few = [i for i in range(len(asked)) if i % s.samples < FEW]
    prompts, asked, some = ([x[i] for i in few] for x in (prompts, asked, answers))
    for limit in (*LIMITS, run.zero.max_new_tokens):
        name = "none" if limit == run.zero.max_new_tokens else limit
        record[f"limit_{name}"] = share(map(tasks.accuracy, limited(
            model, prompts, some, limit, s.rows), asked))
    if reasons:
        record |= working(texts, [p for p in problems for _ in range(s.samples)])
        record |= bans(model, prompts, asked, run.zero.max_new_tokens, s.rows, answers,
                       min(FEW, s.samples))
    return record


def measure(folder):
    """The figures of a run's models, by key such as zero.cons@16."""
    return {f"{name}.{key}": value for name in MODELS for key, value in once(
        folder, name, lambda: of_model(Path(folder.run.start).parent / f"{name}.pt", folder.run,
                                       folder.options, name != "base")).items()}


ROWS = {"wrong_steps": "steps that are wrong as first written",
        "caught": "of these, caught by a check",
        "mended": "of these, caught and mended",
        "false_alarms": "right steps that are called in question",
        "slipped": "answers with a wrong step",
        "slipped_mended": "of these, with all wrong steps mended",
        "slipped_right": "of answers with a wrong step, right in the end",
        "mended_right": "with all wrong steps mended, right in the end",
        "unmended_right": "with one not mended, right in the end"}
PLANS = ("nothing", "wait", "wait's neutral", "check", "check's neutral")


def verdict(rows, notes, stage, name):
    """What forbidding a word did, beside forbidding a neutral one, in a sentence."""
    def of(plan):  # effect and standard error, both in points
        errors = rows[f"{stage}.ban.{plan}.error"]["per_seed"].values()
        return (100 * rows[f"{stage}.ban.{plan}.effect"]["mean"],
                100 * math.hypot(*errors) / len(errors))
    (own, error), (other, other_error) = of(name), of(f"{name}'s neutral")
    words = sorted({f"'{w.strip()}'" for w in notes[f"{stage}.ban.{name}'s neutral.word"].values()})
    gap = 100 * rows[f"{stage}.ban.{name}.gap"]["mean"]
    errors = rows[f"{stage}.ban.{name}.gap.error"]["per_seed"].values()
    doubt = 200 * math.hypot(*errors) / len(errors)
    if abs(gap) <= doubt:
        meaning = "no effect of the word can be told from that of the neutral one"
    elif gap < 0:
        meaning = f"the word does work: {-gap:.1f} points hang on it beyond the neutral one's"
    elif own < 0:
        meaning = (f"the neutral word's ban costs {gap:.1f} points more, so nothing can be told of "
                   "this word's own work")
    else:
        meaning = f"the word does harm: {gap:.1f} points are won beside the neutral one's"
    often = [rows[f"{stage}.ban.{plan}.frequency"]["mean"] for plan in (name, f"{name}'s neutral")]
    return (f"- {stage}: with '{name}' ({often[0]:.3f} an answer) forbidden accuracy changes by "
            f"{own:+.1f} ± {error:.1f} points, with the neutral {', '.join(words)} "
            f"({often[1]:.3f} an answer) by {other:+.1f} ± {other_error:.1f}; {meaning} "
            f"(twice the standard error of the difference: {doubt:.1f}).")


def page(rows, notes):
    """The tables of the report."""
    ks = sorted(int(key.split("@")[1]) for key in rows if key.startswith("base.cons@"))
    kinds = {"pass": "one right", "cons": "vote", "central": "central"}
    heads = ("frequency", "pass@1", "effect", "length")
    reason = [m for m in MODELS if f"{m}.slipped" in rows]
    samples = table(["k", *(f"{m}: {text}" for m in MODELS for text in kinds.values())], [
        [str(k), *(cell(rows, f"{m}.{kind}@{k}") for m in MODELS for kind in kinds)] for k in ks])
    limits = table(["tokens", *MODELS], [
        [str(n), *(cell(rows, f"{m}.limit_{n}") for m in MODELS)] for n in (*LIMITS, "none")])
    mended = table(["share", *reason], [
        [text, *(cell(rows, f"{m}.{key}") for m in reason)] for key, text in ROWS.items()])
    forbidden = table(["forbidden", *(f"{m}: {head}" for m in reason for head in heads)], [
        [plan, *(cell(rows, f"{m}.ban.{plan}.{head}") for m in reason for head in heads)]
        for plan in PLANS])
    return ["## More samples", "", *samples, "",
            "The paper, R1 on AIME 2024: pass@1 79.8, majority 86.7, pass@64 90.0 (R1 v2 E.4).", "",
            "## A limit on thinking", "", f"Accuracy, {FEW} answers a problem. A cut answer is in "
            "the template, which the base by itself often misses.", "", *limits, "",
            "## Is the aha moment real?", "", *mended, "", *forbidden, "",
            "frequency: how often an answer has the word, where nothing is forbidden. The neutral "
            "word is forbidden in one language only; its twin may stand in, so it is the milder "
            "ban.", "",
            *(verdict(rows, notes, m, name) for m in reason for name in ("wait", "check"))]
