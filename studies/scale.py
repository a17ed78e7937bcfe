"""What must hold however often it is tried.

    python r1mini.py study scale

    hostile   a million texts made to deceive the rewards: none raises, none is paid falsely, none
              takes long. What may be paid is told by rules of their own, written apart from tasks
    kills     a run on micro, of one process, killed at random moments (SIGKILL) and started again
              each time, ends in the weights and the log of a run left alone, to the bit
    layouts   the same steps however processes share them: how far apart they end (layouts.py)
    rates     tokens a second of one process of all threads, and of two that share them
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
from tools.study import once
from tools.tables import table

SEEDS = (0,)
SETTINGS, NEEDS, STAGES = (), (), ()
HOSTILE, KILLS = 1_000_000, 100

# -------------------------------------------------------------------------------------------------
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


def digits(zero):
    """A disguise in the digits of another script, which begin at the character `zero`."""
    return lambda right: "".join(chr(ord(zero) + int(c)) if c.isdecimal() else c for c in right)


# What a right answer is made to look like; some are right all the same.
FORMS = (
    "{0}", "+{0}", "0{0}", "-{0}", "--{0}", "{0}.0", "{0}e0", "{0} ", " {0}", "{0}\n", "{0}\0",
    "({0})", "\ufeff{0}", "\u202e{0}", "{0}\u20e3", "{0}={0}", "{0}+0", "0+{0}", "1*{0}", "{0}**1",
    "{0}//1", "int('{0}')", "eval('{0}')", "\\boxed{{{0}}}", "{0}{0}", "{0} {0}", "{0} or 7",
    "[{0}]", "{0}%", "'{0}'", "{0}#", "{0};{0}", "{0} if 1 else 0", "=", "", "0" * 5000 + "{0}",
    "{0}" + "0" * 5000)
SCRIPTS = (
    digits("０"), digits("٠"), digits("𝟘"), "\u200b".join, "_".join, " ".join, ",".join, str.upper,
    lambda right: right.translate(dict(zip(b"0123456789", "〇一二三四五六七八九"))),
    lambda right: right.replace("-", "−"), lambda right: right[::-1], lambda right: right[:-1])


def soup(rng, right):
    """Anything in any order."""
    return "".join(rng.choices((*ATOMS, right), k=rng.randint(0, 12)))


def shuffled(rng, right):
    """The parts of a right response, some twice, some not there, in any order."""
    parts = (*TAGS, *TAGS[2:], right, right, rng.choice(THOUGHTS), rng.choice(SUMMARIES))
    return "".join(rng.sample(parts, rng.randint(2, len(parts))))


def disguised(rng, right):
    """The right response, the answer in it made up."""
    look = rng.choice((str, rng.choice(SCRIPTS)))
    return tasks.response(rng.choice(THOUGHTS), rng.choice(FORMS).format(look(right)),
                          summary=rng.choice(SUMMARIES))


def damaged(rng, right):
    """A right response with up to three changes."""
    text = tasks.response(rng.choice(THOUGHTS), right, summary=rng.choice(SUMMARIES[:3]))
    for _ in range(rng.randint(0, 3)):
        i, j = sorted(rng.choices(range(len(text) + 1), k=2))
        text = text[:i] + rng.choice(("", rng.choice(ATOMS), text[i:j] * 2, right)) + \
            text[rng.choice((i, j)):]
    return text


def long(rng, right):
    """A right response, or its beginning, with thousands of something somewhere."""
    text = tasks.response(rng.choice(THOUGHTS), right)
    i = rng.choice([m.end() for m in re.finditer("^|>", text)])
    end = text[i:] if rng.random() < 0.5 else ""
    return text[:i] + rng.choice((*ATOMS, right)) * rng.randint(100, 10_000) + end


RECIPES = {soup: 25, shuffled: 25, disguised: 25, damaged: 25, long: 0.5}

# -------------------------------------------------------------------------------------------------
# What may be paid


def answered(text):
    """(whether there is a thinking block, the text of the answer) of a response in the right form,
    else (False, None): the tags in their order and nothing outside, but a summary of 40 characters
    without digit, newline or angle bracket; or, without tags before it, an answer at the end."""
    parts = re.split("(</?(?:think|answer)>)", text)
    between, tags = parts[::2], tuple(parts[1::2])
    if "<|" in text or between[-1] or tags not in (TAGS, TAGS[2:]):
        return False, None
    if tags == TAGS and (between[0] or len(between[2]) > 40 or any(
            c.isdecimal() or c in "<>\n" for c in between[2])):
        return False, None
    return tags == TAGS, between[-2]


def share_of_words(text, language):
    """The share of runs of letters, or pairs in a run of Han characters, that are in `language`."""
    text = "".join(re.split("(</?(?:think|answer)>)", text)[::2])
    kinds = [(c.isascii() and c.isalpha(), "一" <= c <= "鿿") for c in text]
    runs = [(kind, len(list(run))) for kind, run in itertools.groupby(kinds)]
    count = {"en": sum(latin for (latin, _), _ in runs),
             "zh": sum((n + 1) // 2 for (_, han), n in runs if han)}
    return count[language] / sum(count.values()) if sum(count.values()) else 1.0


def worth(text, x):
    """The value of a sum of products of whole numbers, x and brackets; None if it is none."""
    tokens = re.findall("[0-9]+|[^ ]", text) + [""]

    def factor():
        token = tokens.pop(0)
        if token == "-":
            return -factor()
        if token == "(":
            value = total()
            return value if tokens.pop(0) == ")" else 1 / 0
        return x if token == "x" else int(token) if token.isdecimal() and token.isascii() else 1 / 0

    def product():
        value = factor()
        while tokens[0] == "*":
            tokens.pop(0)
            value *= factor()
        return value

    def total():
        value = product()
        while tokens[0] in ("+", "-"):
            value += product() if tokens.pop(0) == "+" else -product()
        return value
    try:
        value = total() if len(text) <= 60 else None
        return value if tokens == [""] else None
    except (ZeroDivisionError, IndexError):
        return None


def due(text, p, line):
    """{reward: the most that it may pay} for a text, as answer to a sum p and to a program."""
    thinking, answer = answered(text)
    slope, intercept = map(int, line.answer.split("*x+"))
    right = [answer is not None and worth(answer, x) == slope * x + intercept for x in range(4)]
    return {"accuracy": float(answer == p.answer), "accuracy of a program": 0.0,
            "format": float(thinking and answer.strip() != ""),
            "language": share_of_words(text, p.language),
            "tests": sum(right) / 4, "all tests": float(all(right))}


def paid(text, p, line):
    """{reward: what it pays}."""
    return {"accuracy": tasks.accuracy(text, p),
            "accuracy of a program": tasks.accuracy(text, line),
            "format": tasks.format_reward(text, p),
            "language": tasks.language_share(text, p.language),
            "tests": program.tests_passed(text, line), "all tests": program.all_passed(text, line)}


def hostile(n, seed=0):
    """n texts, judged: {figure: number}, and the first offender, if there is one, as a note."""
    rng, found = random.Random(f"{seed}/hostile"), dict.fromkeys(
        ("tried", "raised", "paid", "earned", "withheld", "slowest_ms"), 0)
    for _ in tqdm(range(n), "hostile", mininterval=1):
        number = str(rng.choice((rng.randint(0, 99), -rng.randint(1, 99), 0, 10 ** 30)))
        p = tasks.Problem("", number, rng.choice(tasks.LANGUAGES))
        line = rng.choice(program.PROGRAMS["train"])
        recipe = rng.choices(list(RECIPES), RECIPES.values())[0]
        text = recipe(rng, line.answer if rng.random() < 0.25 else number)
        wrong, began, given = [], time.thread_time(), {}
        try:
            given = paid(text, p, line)
        except Exception as error:  # whatever it is, it must not be
            found["raised"] += 1
            wrong = [f"{type(error).__name__}"]
        spent, most = time.thread_time() - began, due(text, p, line)
        found["tried"] += 1
        found["slowest_ms"] = max(found["slowest_ms"], round(1000 * spent, 3))
        found["earned"] += most["accuracy"] == 1
        found["withheld"] += any(given.get(key, 1) < most[key] for key in ("accuracy", "format"))
        wrong += [name for name, x in given.items() if not x <= most[name]]
        found["paid"] += bool(given and wrong)
        if wrong:
            found.setdefault("offender", f"{wrong[0]}: {ascii(text[:200])}")
    return {f"hostile.{key}": x for key, x in found.items()}


# -------------------------------------------------------------------------------------------------
# Killed at any moment

WORDS = (*"zero --preset micro --device cpu --threads 1 --processes 1 --save-every 2 --set "
         "base.steps=10 base.documents=4 base.dev_every=6 zero.steps=3 zero.max_new_tokens=16 "
         "eval.problems=2 eval.longer=1 eval.samples=2 eval.dev_problems=2 data.prompts=1".split(),
         "--out")


def command(words):
    """Runs one command in a process of its own, without what it prints."""
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    tqdm.set_lock(threading.RLock())  # its own, for many processes, outlives a kill
    sys.exit(cli.main(list(words)))


def same(one, other):
    """Whether two run folders hold the same weights and log, to the bit, and nothing half done."""
    logs = [(folder / "log.jsonl").read_bytes() for folder in (one, other)]
    names = [sorted(f.name for f in folder.iterdir()) for folder in (one, other)]
    weights = [[checkpoint.load(folder / f"{stage}.pt")[0].state_dict()
                for stage in ("base", "zero")] for folder in (one, other)]
    return logs[0] == logs[1] and names[0] == names[1] and all(
        torch.equal(a[key], b[key]) for a, b in zip(*weights) for key in a)


def kills(path, n, seed=0):
    """{figure: number} of n kills in runs below a folder. Each run is started again until it ends,
    then compared with one left alone; a server that has imported everything forks each start."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        raise UserError("study scale: this system cannot fork, so a kill would take minutes")
    context, rng = multiprocessing.get_context("forkserver"), random.Random(f"{seed}/kills")
    context.set_forkserver_preload(["studies.scale", "tools.report",
                                    "torch._dynamo"])  # torch imports it late, and slowly
    shutil.rmtree(path, ignore_errors=True)

    def start(*words):
        process = context.Process(target=command, args=(words,))
        process.start()
        return process
    start("cost", "--preset", "micro").join()  # the server is up
    began, tried, here, survived = time.monotonic(), 0, 0, 0
    start(*WORDS, str(path / "whole")).join()
    span = time.monotonic() - began
    with tqdm(total=n, desc="kills") as bar:
        while tried < n or here:
            process = start(*WORDS, str(path / "killed"))
            process.join(rng.uniform(0, span / 2) if tried < n else None)
            process.kill()
            process.join()
            if process.exitcode < 0:
                tried, here = tried + 1, here + 1
                bar.update()
                continue
            survived += here * (process.exitcode == 0 and same(path / "whole", path / "killed"))
            here = 0
            shutil.rmtree(path / "killed")
    return {"kills.tried": tried, "kills.survived": survived}


# -------------------------------------------------------------------------------------------------


def rates(folder):
    """Tokens a second of pretraining and of a GRPO step, by processes."""
    found = {}
    for count in (1, 2):
        figures = bench.benched(folder, "--processes", str(count))
        found[f"rates.{count}.pretraining"] = figures["documents"]
        found[f"rates.{count}.step"] = (
            bench.QUESTIONS * bench.GROUP * bench.ANSWER / figures["step.whole"])
    return found


def measure(folder):
    """The figures of one seed."""
    seed = folder.run.seed
    return (once(folder, "hostile", lambda: hostile(HOSTILE, seed))
            | once(folder, "kills", lambda: kills(Path(folder.path) / "kills", KILLS, seed))
            | layouts.measure(folder)
            | once(folder, "rates", lambda: rates(folder)))


def page(rows, notes):
    """The lines of the report."""
    f = {key: row["mean"] for key, row in rows.items()}
    return [
        f"Hostile texts: {f['hostile.tried']:,.0f}, of which {f['hostile.earned']:,.0f} are right "
        f"in earnest. Rewards paid falsely: {f['hostile.paid']:.0f}; withheld from a right one: "
        f"{f['hostile.withheld']:.0f}; exceptions: {f['hostile.raised']:.0f}. The slowest text "
        f"took {f['hostile.slowest_ms']:.0f} ms, all rewards together.",
        *(f"- `{text}`" for text in notes.get("hostile.offender", {}).values()), "",
        f"Kills: {f['kills.tried']:.0f} at random moments of a run on micro, after "
        f"{f['kills.survived']:.0f} of which it came to the weights and the log of a run left "
        "alone, to the bit.", "", *layouts.page(rows), "",
        *table(["tokens a second", "one process", "two"], [
            [text, *(f"{f[f'rates.{count}.{key}']:,.0f}" for count in (1, 2))] for text, key in (
                ("pretraining, on documents", "pretraining"),
                ("a GRPO step, of answers", "step"))])]
