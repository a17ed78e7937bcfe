"""Do the rewards and the runs hold up when they are tried very often?

The paper: RL finds what a reward pays for wrongly. So R1-Zero uses no neural reward
models, and R1 uses the preference reward in its last 400 steps only (R1 v1 section
2.2.2, R1 v2 section B.5).

    python r1mini.py study scale

    hostile   a million texts are made to deceive the rewards. No reward may raise an
              error, pay for a wrong text, withhold from a right one, or take long. The
              judge is a second set of rules, which is written apart from tasks.py
    kills     a run on micro, of one process, is killed at random moments (SIGKILL) and
              started again each time. It must end with the weights and the log of an
              undisturbed run, to the bit
    layouts   the same steps, shared by processes in several ways (layouts.py): how far
              apart the results are
    rates     tokens per second of one process that has all threads, and of two that
              share them
"""
import itertools
import multiprocessing
import os
import random
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

import tasks
from engine import checkpoint
from engine.errors import UserError
from studies import layouts, program
from tools import bench, cli
from tools.study import measure_once
from tools.tables import table

SEEDS = (0,)
SETTINGS, NEEDS, STAGES = (), (), ()
HOSTILE, KILLS = 1_000_000, 100

# ------------------------------------------------------------------------------
# Texts made to deceive

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
ATOMS = (*TAGS, *TAGS, *map(str.upper, TAGS), "< answer>", "<answer >", "<answer/>", "＜answer＞",
         "&lt;answer&gt;", "<answer", "answer>", "<", ">", "</", "<|", "<|end|>", "<|pad|>", "\0",
         "\n", "\r", " ", "\t", "\x1c", "\x85", "\u2028", "\u200b", "\ufeff", "\u202e", "\ud800",
         "e\u0301", "３", "٣", "²", "Ⅷ", "三十三", "〇", "−", "+", "-", "=", "*", "(", ")",
         "0", "7", "x", "_", ".", ",", "1e9", "0x21", "9**9**9", "__import__('os')", "lambda: 0",
         "\\boxed{", "check", "wait", "等等", "the answer is ", "答案就是",
         "25-7=18 then 18+9=27", "🙂")
THOUGHTS = ("", "25-7=18 then 18+9=27", "25-7=18然后18+9=27", "25-7=17 check 17+7=24 wait", " ")
SUMMARIES = ("", "the answer is ", "答案就是", "x" * 40, "x" * 41)


def _digits(zero):
    """A function that writes numbers in the digits of another script. `zero` is its 0."""
    def disguise(right):
        return "".join(chr(ord(zero) + int(c)) if c.isdecimal() else c for c in right)
    return disguise


# What a right answer is made to look like. Some of these are still right.
FORMS = (
    "{0}", "+{0}", "0{0}", "-{0}", "--{0}", "{0}.0", "{0}e0", "{0} ", " {0}", "{0}\n", "{0}\0",
    "({0})", "\ufeff{0}", "\u202e{0}", "{0}\u20e3", "{0}={0}", "{0}+0", "0+{0}", "1*{0}", "{0}**1",
    "{0}//1", "int('{0}')", "eval('{0}')", "\\boxed{{{0}}}", "{0}{0}", "{0} {0}", "{0} or 7",
    "[{0}]", "{0}%", "'{0}'", "{0}#", "{0};{0}", "{0} if 1 else 0", "=", "", "0" * 5000 + "{0}",
    "{0}" + "0" * 5000)
SCRIPTS = (
    _digits("０"), _digits("٠"), _digits("𝟘"), "\u200b".join, "_".join, " ".join, ",".join,
    str.upper,
    lambda right: right.translate(dict(zip(b"0123456789", "〇一二三四五六七八九"))),
    lambda right: right.replace("-", "−"), lambda right: right[::-1], lambda right: right[:-1])


# Each recipe makes a text around a right answer.


def _soup(rng, right):
    """Pieces of all kinds in any order."""
    return "".join(rng.choices((*ATOMS, right), k=rng.randint(0, 12)))


def _shuffled(rng, right):
    """Parts of a right response in any order. Some are there twice, others are missing."""
    parts = (*TAGS, *TAGS[2:], right, right, rng.choice(THOUGHTS), rng.choice(SUMMARIES))
    return "".join(rng.sample(parts, rng.randint(2, len(parts))))


def _disguised(rng, right):
    """A right response whose answer is disguised."""
    script = rng.choice((str, rng.choice(SCRIPTS)))
    return tasks.response(rng.choice(THOUGHTS), rng.choice(FORMS).format(script(right)),
                          summary=rng.choice(SUMMARIES))


def _damaged(rng, right):
    """A right response with up to three changes."""
    text = tasks.response(rng.choice(THOUGHTS), right, summary=rng.choice(SUMMARIES[:3]))
    for _ in range(rng.randint(0, 3)):
        i, j = sorted(rng.choices(range(len(text) + 1), k=2))
        inserted = rng.choice(("", rng.choice(ATOMS), text[i:j] * 2, right))
        rest = text[rng.choice((i, j)):]
        text = text[:i] + inserted + rest
    return text


def _long(rng, right):
    """A right response, or its beginning, with one piece that is repeated thousands of
    times."""
    text = tasks.response(rng.choice(THOUGHTS), right)
    i = rng.choice([match.end() for match in re.finditer("^|>", text)])
    rest = text[i:] if rng.random() < 0.5 else ""
    return text[:i] + rng.choice((*ATOMS, right)) * rng.randint(100, 10_000) + rest


# {recipe: its weight}
RECIPES = {_soup: 25, _shuffled: 25, _disguised: 25, _damaged: 25, _long: 0.5}

# ------------------------------------------------------------------------------
# What the rewards may pay: a second set of rules


def _split_at_tags(text):
    """(the texts between tags, the tags) of a text."""
    pieces = re.split("(</?(?:think|answer)>)", text)
    return pieces[::2], tuple(pieces[1::2])


def _answered(text):
    """(whether there is a thinking block, the text of the answer) of a response in the
    right form; of any other text (False, None).

    There are two right forms. With thinking: all tags in their order, nothing outside of
    them, and between the blocks a summary of up to 40 characters without digits, newlines
    and angle brackets. Without thinking: any text without tags, then the answer.
    """
    between, tags = _split_at_tags(text)
    if "<|" in text or between[-1]:
        return False, None
    if tags == TAGS[2:]:
        return False, between[-2]
    if tags != TAGS:
        return False, None
    before, _, summary, answer, _ = between
    allowed = not any(c.isdecimal() or c in "<>\n" for c in summary)
    if before or len(summary) > 40 or not allowed:
        return False, None
    return True, answer


def _share_of_words(text, language):
    """The share of words in `language`. A word is a run of letters, or a pair in a run
    of Han characters."""
    text = "".join(_split_at_tags(text)[0])
    kinds = [(c.isascii() and c.isalpha(), "一" <= c <= "鿿") for c in text]
    words = {"en": 0, "zh": 0}
    for (is_latin, is_han), run in itertools.groupby(kinds):
        length = len(list(run))
        if is_latin:
            words["en"] += 1
        if is_han:
            words["zh"] += (length + 1) // 2
    total = sum(words.values())
    return words[language] / total if total else 1.0


def _worth(text, x):
    """The value of an expression of whole numbers, x, + - * and brackets. None if the
    text is none, or has more than 60 characters.

    A parser by recursive descent: a total is a sum of products, a product is made of
    factors.
    """
    tokens = re.findall("[0-9]+|[^ ]", text) + [""]

    def factor():
        token = tokens.pop(0)
        if token == "-":
            return -factor()
        if token == "(":
            value = total()
            if tokens.pop(0) != ")":
                raise ValueError
            return value
        if token == "x":
            return x
        if token.isdecimal() and token.isascii():
            return int(token)
        raise ValueError

    def product():
        value = factor()
        while tokens[0] == "*":
            tokens.pop(0)
            value *= factor()
        return value

    def total():
        value = product()
        while tokens[0] in ("+", "-"):
            sign = tokens.pop(0)
            value += product() if sign == "+" else -product()
        return value

    if len(text) > 60:
        return None
    try:
        value = total()
    except (ValueError, IndexError):
        return None
    return value if tokens == [""] else None


def _due(text, problem, line):
    """{reward: the most that it may pay} for a text, as an answer to a sum and to the
    program of a line."""
    thinking, answer = _answered(text)
    slope, intercept = map(int, line.answer.split("*x+"))
    passed = [answer is not None and _worth(answer, x) == slope * x + intercept for x in range(4)]
    return {"accuracy": float(answer == problem.answer), "accuracy of a program": 0.0,
            "format": float(thinking and answer.strip() != ""),
            "language": _share_of_words(text, problem.language),
            "tests": sum(passed) / 4, "all tests": float(all(passed))}


def _paid(text, problem, line):
    """{reward: what it pays} for the same."""
    return {"accuracy": tasks.accuracy(text, problem),
            "accuracy of a program": tasks.accuracy(text, line),
            "format": tasks.format_reward(text, problem),
            "language": tasks.language_share(text, problem.language),
            "tests": program.tests_passed(text, line),
            "all tests": program.all_passed(text, line)}


def _hostile(n, seed=0):
    """Judges the rewards of n texts. Returns {key: number}, and the first text at fault
    as a note, if there is one.

    tried        texts
    raised       texts for which a reward raised an error
    paid         texts for which a reward paid more than is due
    earned       texts that are right
    withheld     texts for which accuracy or format paid less than is due
    slowest_ms   the longest time of all rewards of one text
    """
    rng = random.Random(f"{seed}/hostile")
    counts = dict.fromkeys(("tried", "raised", "paid", "earned", "withheld", "slowest_ms"), 0)
    for _ in tqdm(range(n), "hostile", mininterval=1):
        number = str(rng.choice((rng.randint(0, 99), -rng.randint(1, 99), 0, 10 ** 30)))
        problem = tasks.Problem("", number, rng.choice(tasks.LANGUAGES))
        line = rng.choice(program.PROGRAMS["train"])
        recipe = rng.choices(list(RECIPES), RECIPES.values())[0]
        text = recipe(rng, line.answer if rng.random() < 0.25 else number)

        payments, faults = {}, []
        began = time.thread_time()
        try:
            payments = _paid(text, problem, line)
        except Exception as error:  # a reward must never raise an error, of whatever kind
            counts["raised"] += 1
            faults.append(type(error).__name__)
        milliseconds = 1000 * (time.thread_time() - began)

        most = _due(text, problem, line)
        overpaid = [name for name, x in payments.items() if not x <= most[name]]  # nan is too much
        faults += overpaid
        counts["tried"] += 1
        counts["slowest_ms"] = max(counts["slowest_ms"], round(milliseconds, 3))
        if most["accuracy"] == 1:
            counts["earned"] += 1
        if any(payments.get(key, 1) < most[key] for key in ("accuracy", "format")):
            counts["withheld"] += 1
        if overpaid:
            counts["paid"] += 1
        if faults:
            counts.setdefault("offender", f"{faults[0]}: {ascii(text[:200])}")
    return {f"hostile.{key}": x for key, x in counts.items()}


# ------------------------------------------------------------------------------
# Killed at any moment

COMMAND = (*"zero --preset micro --device cpu --threads 1 --processes 1 --save-every 2 --set "
           "base.steps=10 base.documents=4 base.dev_every=6 zero.steps=3 zero.max_new_tokens=16 "
           "eval.problems=2 eval.longer=1 eval.samples=2 eval.dev_problems=2 "
           "data.prompts=1".split(), "--out")


def _run_silently(words):
    """Runs one command in a process of its own. Its output is thrown away."""
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    # tqdm's own lock is for several processes, and would stay locked after a kill.
    tqdm.set_lock(threading.RLock())
    sys.exit(cli.main(list(words)))


def _same(folder, other):
    """Whether two run folders have the same weights and log, to the bit, and the same
    files (so that nothing half done is left)."""
    if (folder / "log.jsonl").read_bytes() != (other / "log.jsonl").read_bytes():
        return False
    if sorted(f.name for f in folder.iterdir()) != sorted(f.name for f in other.iterdir()):
        return False
    for stage in ("base", "zero"):
        weights = checkpoint.load(folder / f"{stage}.pt")[0].state_dict()
        other_weights = checkpoint.load(other / f"{stage}.pt")[0].state_dict()
        if not all(torch.equal(x, other_weights[key]) for key, x in weights.items()):
            return False
    return True


def _kills(path, n, seed=0):
    """Kills runs below a folder n times. Returns {key: number}.

    Each run is started again after every kill until it ends. It is then compared with
    an undisturbed run, and all its kills count as survived if the two are the same. A
    start is quick, because it is forked from a server that has imported everything.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        raise UserError("study scale: this system cannot fork, so each kill would take minutes")
    context, rng = multiprocessing.get_context("forkserver"), random.Random(f"{seed}/kills")
    # torch would import torch._dynamo late, and slowly.
    context.set_forkserver_preload(["studies.scale", "tools.report", "torch._dynamo"])
    shutil.rmtree(path, ignore_errors=True)

    def start(*words):
        process = context.Process(target=_run_silently, args=(words,))
        process.start()
        return process

    start("cost", "--preset", "micro").join()  # waits until the server is up
    began = time.monotonic()
    start(*COMMAND, str(path / "whole")).join()
    seconds_of_run = time.monotonic() - began

    killed = survived = 0
    killed_in_this_run = 0
    with tqdm(total=n, desc="kills") as bar:
        while killed < n or killed_in_this_run:
            process = start(*COMMAND, str(path / "killed"))
            process.join(rng.uniform(0, seconds_of_run / 2) if killed < n else None)
            process.kill()
            process.join()
            if process.exitcode < 0:  # the kill came before its end
                killed += 1
                killed_in_this_run += 1
                bar.update()
                continue
            if process.exitcode == 0 and _same(path / "whole", path / "killed"):
                survived += killed_in_this_run
            killed_in_this_run = 0
            shutil.rmtree(path / "killed")
    return {"kills.tried": killed, "kills.survived": survived}


# ------------------------------------------------------------------------------
# The study


def _rates(folder):
    """Tokens per second of pretraining and of a GRPO step, with one process and with two."""
    numbers = {}
    answer_tokens = bench.QUESTIONS * bench.GROUP * bench.ANSWER
    for count in (1, 2):
        measured = bench.run_bench(folder, "--processes", str(count))
        numbers[f"rates.{count}.pretraining"] = measured["documents"]
        numbers[f"rates.{count}.step"] = answer_tokens / measured["step.whole"]
    return numbers


def measure(folder):
    """The numbers of one seed."""
    seed = folder.run.seed
    scratch = Path(folder.path) / "kills"
    return (measure_once(folder, "hostile", lambda: _hostile(HOSTILE, seed))
            | measure_once(folder, "kills", lambda: _kills(scratch, KILLS, seed))
            | layouts.measure(folder)
            | measure_once(folder, "rates", lambda: _rates(folder)))


def page(rows, notes):
    """The lines of the report."""
    x = {key: row["mean"] for key, row in rows.items()}
    offenders = notes.get("hostile.offender", {}).values()
    speeds = [[text, *(f"{x[f'rates.{count}.{key}']:,.0f}" for count in (1, 2))]
              for text, key in (("pretraining, on documents", "pretraining"),
                                ("a GRPO step, of answers", "step"))]
    return [
        f"Hostile texts: {x['hostile.tried']:,.0f}, of which {x['hostile.earned']:,.0f} are "
        f"right. Paid wrongly: {x['hostile.paid']:.0f}; withheld from a right text: "
        f"{x['hostile.withheld']:.0f}; errors: {x['hostile.raised']:.0f}. All rewards of the "
        f"slowest text took {x['hostile.slowest_ms']:.0f} ms together.",
        *(f"- `{text}`" for text in offenders), "",
        f"Kills: {x['kills.tried']:.0f} at random moments of runs on micro. After "
        f"{x['kills.survived']:.0f} of them the run ended with the weights and the log of an "
        "undisturbed run, to the bit.", "",
        *layouts.page(rows), "",
        *table(["tokens per second", "one process", "two"], speeds)]
