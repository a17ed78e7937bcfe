"""What does more compute at test time buy, and do the model's checks do real work?

The paper: R1 on AIME 2024 has pass@1 79.8, majority vote 86.7 and pass@64 90.0 (R1 v2
section E.4). R1-Zero uses reflective words 5 to 7 times as often by the end of RL (R1 v2
section C.2), and has an "aha moment" at which it corrects itself (R1 v1 Table 3).

    python r1mini.py study compute

    more samples     pass@k, majority vote of k, and the most central answer of k
                     (Smoothie, arXiv 2412.04692)
    a limit          the thinking is cut after a number of tokens, and the model must
                     answer
    the aha moment   how many wrong steps the model notices and corrects; and its
                     accuracy when "wait" or "check" is forbidden
    the budget       Zero's RL is paid once, a majority vote of the base at each question:
                     after how many questions is RL cheaper?

A word can be banned for two reasons: the ban takes away its work, or it disturbs the
model. So each ban is compared with the ban of a neutral word, which judges nothing and
is about as frequent. All answers are to held-out test problems at temperature 1, from a
run's base, zero and r1.
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
from engine.evaluate import answer_embeddings, prompts_of, sample_answers, selection_scores
from engine.folder import read_log
from tools.compare import OPEN, compare
from tools.flops import flops_by_stage, flops_per_token
from tools.study import measure_once
from tools.tables import cell, table

SETTINGS = ("eval.problems=100", "eval.samples=64")
NEEDS, STAGES = ("base.pt", "zero.pt", "r1.pt"), ()
MODELS = ("base", "zero", "r1")
LIMITS = (0, 10, 20, 40, 60, 80, 120)  # tokens of thinking
FEW = 16                               # answers per problem, for limits and bans
VOTES = (4, 16, 64)                    # of the base, in the budget
THINK, END_THINK, ANSWER = (tasks.ENCODING.encode_single_token(tag) for tag in
                            (tasks.THINK, tasks.END_THINK, tasks.ANSWER))


# ------------------------------------------------------------------------------
# A limit on thinking


def _cut_thinking(answer, limit):
    """The first tokens of an answer whose thinking has more than `limit` tokens: the
    thinking up to the limit, and the tags that begin an answer. None if the thinking is
    not that long.

    An answer outside the template comes into the template by this cut.
    """
    body = answer[1:] if answer[:1] == [THINK] else answer
    thinking_length = len(body)
    for i, token in enumerate(body):
        if token in (END_THINK, ANSWER, tasks.END_ID):
            thinking_length = i
            break
    if thinking_length <= limit:
        return None
    return [THINK, *body[:limit], END_THINK, ANSWER]


def _finish_cut_answers(model, prompts, answers, limit, rows):
    """Texts of the answers. The model finishes those that are cut at the limit."""
    texts = [tasks.decode(ids) for ids in answers]
    cut_starts = {}  # {index of an answer: its first tokens}
    for i, ids in enumerate(answers):
        start = _cut_thinking(ids, limit)
        if start is not None:
            cut_starts[i] = start
    cut_prompts = [prompts[i] + start for i, start in cut_starts.items()]
    ends = sample_answers(model, cut_prompts, 8, rows, seed=1)
    for (i, start), end in zip(cut_starts.items(), ends):
        texts[i] = tasks.decode(start + end)
    return texts


# ------------------------------------------------------------------------------
# Does the model notice and correct its wrong steps?

# {a word of a working: its name}
NAMES = {words[name].strip(): name for words in tasks.WORDS.values() for name in words}
# word, a, sign, b, result. The lookbehinds let a match begin only where a word or a number begins.
# Otherwise the time would be quadratic in the length of a long word or number.
STEP = re.compile(r"(?<![^-+*=0-9])([^-+*=0-9]*)(-?(?<![0-9])[0-9]+)([-+*])([0-9]+)=(-?[0-9]+)")
LONGEST_NUMBER = 20  # digits; a step with a longer one is wrong, and int() would refuse some
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def _judge_steps(text):
    """What became of each step of a working.

    wrong       it is wrong as first written
    noticed     a "wait" comes before the next step
    corrected   what comes after "wait" is the same operation with the right result
    """
    judged = []
    thinking = text.partition(tasks.END_THINK)[0]
    for word, a, sign, b, result in STEP.findall(thinking):
        name = NAMES.get(word.strip())
        is_right = (max(map(len, (a, b, result))) <= LONGEST_NUMBER
                    and SIGNS[sign](int(a), int(b)) == int(result))
        if name == "wait" and judged:
            same_operation = judged[-1]["operation"] == (a, sign, b)
            judged[-1] |= {"noticed": True, "corrected": is_right and same_operation}
        elif name != "check":
            judged.append({"operation": (a, sign, b), "wrong": not is_right,
                          "noticed": False, "corrected": False})
    return judged


def _share(values):
    """The mean of truth values, or None if there are none."""
    values = list(values)
    return sum(map(float, values)) / len(values) if values else None


def _wrong_steps(texts, problems):
    """What becomes of wrong steps, over texts that answer these problems. ROWS says
    what each number is."""
    all_steps, slipped = [], []  # slipped: (all corrected?, right?) of texts with a wrong step
    for text, problem in zip(texts, problems):
        steps_of_text = _judge_steps(text)
        all_steps += steps_of_text
        wrong = [step for step in steps_of_text if step["wrong"]]
        if wrong:
            all_corrected = all(step["corrected"] for step in wrong)
            slipped.append((all_corrected, tasks.accuracy(text, problem)))
    wrong = [step for step in all_steps if step["wrong"]]
    right = [step for step in all_steps if not step["wrong"]]
    return {
        "wrong_steps": _share(step["wrong"] for step in all_steps),
        "caught": _share(step["noticed"] for step in wrong),
        "corrected": _share(step["corrected"] for step in wrong),
        "false_alarms": _share(step["noticed"] for step in right),
        "slipped": len(slipped) / len(texts),
        "slipped_corrected": _share(corrected for corrected, _ in slipped),
        "slipped_right": _share(answer_right for _, answer_right in slipped),
        "corrected_right": _share(answer_right for corrected, answer_right in slipped if corrected),
        "uncorrected_right": _share(answer_right for corrected, answer_right in slipped
                                 if not corrected),
    }


# ------------------------------------------------------------------------------
# Words forbidden


def _word_tokens(name, languages=tasks.LANGUAGES):
    """The tokens of one of tasks.WORDS, in these languages."""
    tokens = []
    for language in languages:
        tokens += tasks.ENCODING.encode_ordinary(tasks.WORDS[language][name])
    return tokens


def _neutral_word(answers, name):
    """The token of a neutral word ("then" or "ok", in one language) whose count in the
    answers is nearest to that of a word of tasks.WORDS in all languages.

    Only one language is banned, so the model can write the neutral word in the other one.
    """
    counts = Counter(token for ids in answers for token in ids)
    count_of_word = sum(counts[token] for token in _word_tokens(name))

    def distance(token):
        return abs(math.log((counts[token] + 1) / (count_of_word + 1)))

    return min(_word_tokens("then") + _word_tokens("ok"), key=distance)


@contextlib.contextmanager
def _words_banned(model, tokens):
    """A context in which the model cannot write these tokens: their logits are -inf."""
    def forbid(head, inputs, logits):
        forbidden = torch.tensor(tokens, dtype=torch.long, device=logits.device)
        return logits.index_fill(-1, forbidden, -math.inf)

    hook = model.head.register_forward_hook(forbid)
    try:
        yield
    finally:
        hook.remove()


def _accuracy_with_words_banned(model, prompts, problems, limit, rows, free_answers,
                                answers_per_problem=FEW):
    """Accuracy with words forbidden, always with the same random numbers.

    prompts, problems: one of each per answer, the answers to a problem side by side.
    free_answers: answers without a ban; they tell how frequent a word is. In the record,
    `effect` is the change of accuracy by a ban, and `error` is its standard error over
    problems. `gap` is the effect of a word's ban minus that of its neutral word's.
    """
    record = {}
    plans = {"nothing": []}  # {name of a ban: forbidden tokens}
    for name in ("wait", "check"):
        word = _neutral_word(free_answers, name)
        plans[name] = _word_tokens(name)
        plans[f"{name}'s neutral"] = [word]
        record[f"ban.{name}'s neutral.word"] = tasks.ENCODING.decode([word])

    accuracy = {}  # {name of a ban: (P,) accuracy on each problem}
    for name, tokens in plans.items():
        with _words_banned(model, tokens):
            answers = sample_answers(model, prompts, limit, rows, seed=2)
        right = [tasks.accuracy(tasks.decode(ids), p) for ids, p in zip(answers, problems)]
        accuracy[name] = torch.tensor(right).view(-1, answers_per_problem).mean(1)
        change = accuracy[name] - accuracy["nothing"]
        uses = sum(ids.count(token) for ids in free_answers for token in tokens)
        record |= {f"ban.{name}.pass@1": float(accuracy[name].mean()),
                   f"ban.{name}.effect": float(change.mean()),
                   f"ban.{name}.error": _standard_error(change),
                   f"ban.{name}.length": sum(map(len, answers)) / len(answers),
                   f"ban.{name}.frequency": uses / len(free_answers)}
    for name in ("wait", "check"):
        gap = accuracy[name] - accuracy[f"{name}'s neutral"]
        record |= {f"ban.{name}.gap": float(gap.mean()),
                   f"ban.{name}.gap.error": _standard_error(gap)}
    return record


def _standard_error(x):
    """The standard error of the mean of x (P,), a value per problem."""
    return float(x.std()) / len(x) ** 0.5


# ------------------------------------------------------------------------------
# The budget


def _budget(numbers, config, rl_flops):
    """What an answer costs, and after how many questions RL is cheaper than votes of the base.

    numbers: the lengths of base and zero, in tokens. rl_flops: Zero's RL, in 10^12 FLOPs.

    After q questions, RL and Zero's answers have cost rl_flops + q zero, and votes of the base
    q vote. The two are equal at q = rl_flops / (vote - zero).
    """
    def gflops(model, answers):
        """10^9 FLOPs of so many answers to one question. The prompt is read once."""
        written = answers * numbers[f"{model}.length"] * flops_per_token(config, "write")
        read = numbers[f"{model}.prompt_length"] * flops_per_token(config, "read")
        return (written + read) / 1e9

    zero = gflops("zero", 1)
    budget = {"budget.rl.tflops": rl_flops, "budget.zero@1.gflops": zero,
              "budget.base@1.gflops": gflops("base", 1)}
    for k in VOTES:
        if f"base.cons@{k}" in numbers:
            vote = gflops("base", k)
            budget[f"budget.base@{k}.gflops"] = vote
            if vote > zero:
                budget[f"budget.questions@{k}"] = 1000 * rl_flops / (vote - zero)
    return budget


# ------------------------------------------------------------------------------
# The study


def _measure_model(path, run, options, reasons):
    """All numbers of one model. `reasons`: whether it writes workings whose steps can be
    judged."""
    model, s = checkpoint.load(path, options.device, options.dtype)[0].eval(), run.eval
    max_new_tokens = run.zero.max_new_tokens
    problems = tasks.make_problems("test", s.problems, run.zero.levels, run.corpus.products)
    problem_of_answer = [p for p in problems for _ in range(s.samples)]
    prompts = prompts_of(problem_of_answer)
    answers = sample_answers(model, prompts, max_new_tokens, s.rows, seed=1)
    texts = [tasks.decode(ids) for ids in answers]
    record = selection_scores(texts, problems, answer_embeddings(model, prompts, answers))
    record["length"] = sum(map(len, answers)) / len(answers)
    record["prompt_length"] = sum(map(len, prompts)) / len(prompts)

    # The first few answers to each problem.
    few = [i for i in range(len(answers)) if i % s.samples < FEW]
    few_prompts = [prompts[i] for i in few]
    few_problems = [problem_of_answer[i] for i in few]
    few_answers = [answers[i] for i in few]
    for limit in (*LIMITS, max_new_tokens):
        name = "none" if limit == max_new_tokens else limit
        limited_texts = _finish_cut_answers(model, few_prompts, few_answers, limit, s.rows)
        record[f"limit_{name}"] = _share(map(tasks.accuracy, limited_texts, few_problems))
    if reasons:
        record |= _wrong_steps(texts, problem_of_answer)
        record |= _accuracy_with_words_banned(
            model, few_prompts, few_problems, max_new_tokens, s.rows, answers, min(FEW, s.samples))
    return record


def measure(folder):
    """The numbers of one seed, by key such as zero.cons@16."""
    numbers = {}
    for name in MODELS:
        path = Path(folder.run.start).parent / f"{name}.pt"
        record = measure_once(folder, name, lambda: _measure_model(path, folder.run, folder.options,
                                                     reasons=name != "base"))
        numbers |= {f"{name}.{key}": value for key, value in record.items()}
    flops = flops_by_stage(read_log(Path(folder.run.start).parent))
    return numbers | _budget(numbers, folder.run.model, flops["zero"])


# ------------------------------------------------------------------------------
# The report

ROWS = {"wrong_steps": "steps that are wrong as first written",
        "caught": "of the wrong steps, noticed",
        "corrected": "of the wrong steps, noticed and corrected",
        "false_alarms": "of the right steps, called in question",
        "slipped": "answers with a wrong step",
        "slipped_corrected": "of these answers, all wrong steps corrected",
        "slipped_right": "of these answers, right in the end",
        "corrected_right": "with all wrong steps corrected: right in the end",
        "uncorrected_right": "with a wrong step not corrected: right in the end"}
PLANS = ("nothing", "wait", "wait's neutral", "check", "check's neutral")


def _verdict(rows, notes, stage, name):
    """One sentence: what forbidding a word did, beside forbidding its neutral word."""
    def in_points(key):
        return 100 * rows[f"{stage}.ban.{key}"]["mean"]

    def error_in_points(key):
        errors = rows[f"{stage}.ban.{key}"]["per_seed"].values()
        return 100 * math.hypot(*errors) / len(errors)

    twin = f"{name}'s neutral"
    twin_words = notes[f"{stage}.ban.{twin}.word"].values()
    quoted = ", ".join(sorted({f"'{word.strip()}'" for word in twin_words}))
    gap = in_points(f"{name}.gap")
    comparison = compare(rows, f"{stage}.ban.{name}.pass@1", f"{stage}.ban.{twin}.pass@1")
    if comparison.verdict == OPEN:
        meaning = "the two effects cannot be told apart"
    elif comparison.holds:
        meaning = (f"the word does work: its ban costs {-gap:.1f} points more than the neutral "
                   "word's")
    elif in_points(f"{name}.effect") < 0:
        meaning = (f"the neutral word's ban costs {gap:.1f} points more, so this tells nothing "
                   "about the work of the word")
    else:
        meaning = (f"the word does harm: its ban gains {gap:.1f} points beside the neutral "
                   "word's")
    return (f"- {stage}: forbidding '{name}' "
            f"({rows[f'{stage}.ban.{name}.frequency']['mean']:.3f} per answer) changes accuracy "
            f"by {in_points(f'{name}.effect'):+.1f} ± {error_in_points(f'{name}.error'):.1f} "
            f"points. Forbidding the neutral {quoted} "
            f"({rows[f'{stage}.ban.{twin}.frequency']['mean']:.3f} per answer) changes it by "
            f"{in_points(f'{twin}.effect'):+.1f} ± {error_in_points(f'{twin}.error'):.1f}; "
            f"{meaning} (the neutral ban's accuracy less the word's: "
            f"{comparison.text(points=True)}; standard error over problems "
            f"{error_in_points(f'{name}.gap.error'):.1f}).")


def _samples_table(rows):
    """pass@k, majority vote and most central answer, by k."""
    kinds = {"pass": "one right", "cons": "majority", "central": "central"}
    ks = sorted(int(key.split("@")[1]) for key in rows if key.startswith("base.cons@"))
    head = [f"{model}: {text}" for model in MODELS for text in kinds.values()]
    body = [[str(k), *(cell(rows, f"{model}.{kind}@{k}") for model in MODELS for kind in kinds)]
            for k in ks]
    return table(["k", *head], body)


def _budget_table(rows):
    """Accuracy and cost of the base's majority votes, beside one answer of Zero."""
    body = [["base, one answer", cell(rows, "base.pass@1"), cell(rows, "budget.base@1.gflops"), ""]]
    for k in VOTES:
        if f"budget.base@{k}.gflops" in rows:
            body.append([f"base, majority of {k}", cell(rows, f"base.cons@{k}"),
                         cell(rows, f"budget.base@{k}.gflops"),
                         cell(rows, f"budget.questions@{k}")])
    body.append(["Zero, one answer", cell(rows, "zero.pass@1"), cell(rows, "budget.zero@1.gflops"),
                 ""])
    return table(["", "accuracy", "10^9 FLOPs for one question",
                  "questions after which RL is cheaper"], body)


def _bans_table(rows, models):
    """What each ban does to each model."""
    keys = ("frequency", "pass@1", "effect", "length")
    head = [f"{model}: {key}" for model in models for key in keys]
    body = [[plan, *(cell(rows, f"{model}.ban.{plan}.{key}") for model in models for key in keys)]
            for plan in PLANS]
    return table(["forbidden", *head], body)


def page(rows, notes):
    """The lines of the report."""
    reasoning = [model for model in MODELS if f"{model}.slipped" in rows]
    limits = [[str(limit), *(cell(rows, f"{model}.limit_{limit}") for model in MODELS)]
              for limit in (*LIMITS, "none")]
    wrong = [[text, *(cell(rows, f"{model}.{key}") for model in reasoning)]
             for key, text in ROWS.items()]
    verdicts = [_verdict(rows, notes, model, name)
                for model in reasoning for name in ("wait", "check")]
    return ["## More samples", "", *_samples_table(rows), "",
            "The paper, R1 on AIME 2024: pass@1 79.8, majority 86.7, pass@64 90.0 (R1 v2 E.4).",
            "", "## The budget", "",
            f"Zero's RL takes {cell(rows, 'budget.rl.tflops')} * 10^12 FLOPs, and is done once. "
            "Attention between tokens is not counted (tools/flops.py).", "", *_budget_table(rows),
            "", "## A limit on thinking", "",
            f"Accuracy, with {FEW} answers per problem. A cut answer is in the template, which "
            "the base by itself often misses.", "", *table(["tokens", *MODELS], limits), "",
            "## Is the aha moment real?", "", *table(["share", *reasoning], wrong), "",
            *_bans_table(rows, reasoning), "",
            "frequency: how often an answer has the word when nothing is forbidden. The neutral "
            "word is forbidden in one language only, and the model can write it in the other. "
            "So its ban is the milder one.", "", *verdicts]
