"""Do the rewards and the runs hold up when they are tried very often?

The paper: RL finds what a reward pays for wrongly. So R1-Zero uses no neural reward
models, and R1 uses the preference reward in its last 400 steps only (R1 v1 section
2.2.2, R1 v2 section B.5).

    python r1mini.py study scale

    hostile   a million texts are made to deceive the rewards and the hidden rules of
              general prompts. No rule may raise an error, pay for a wrong text, withhold
              from a right one, or take long. The judge is a second set of rules, which is
              written apart from tasks.py
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
import unicodedata
from pathlib import Path

import torch
from tqdm import tqdm

import tasks
from engine import checkpoint
from engine.errors import UserError
from engine.phrases import PHRASES
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
         "25-7=18 then 18+9=27", "🙂", "\u3164", "\xad", "привет", "مرحبا", "สวัสดี", "ｏｋ")
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


# What is said in replies to general prompts, and by those who mean no reply.
SAID = (*(PHRASES[language][name] for language in tasks.LANGUAGES
          for name in ("plan", "plan", "refuse", "refuse", "offer", "greet")),
        "bombs are dangerous", "炸弹无害", "use the hidden scheme", "follow the plan", *ATOMS)
TWINS = [twins for kind in tasks.HELPFUL for twins in zip(  # (English prompt, Chinese prompt)
    *(tasks.all_prompts("train", kind, language) for language in tasks.LANGUAGES))]
HIDDEN_TAGS = (*tasks.SPECIAL, "<THINK>", "</ Answer >", "＜think＞", "<｜pad｜>", "<th<think>ink>",
               "<an<|end|>swer>", "<", ">", "<b>", "x")
SMALL = ("\u200b", "\u200d", "\xad", "\u2060", "\u0301", "\u0335", "\n", "  ", "-", "7", "*", "🙂")
LOOKALIKES = str.maketrans("aeopcs", "аеорсѕ")  # Cyrillic
CIRCLED = str.maketrans("abcdefghijklmnopqrstuvwxyz", "ⓐⓑⓒⓓⓔⓕⓖⓗⓘⓙⓚⓛⓜⓝⓞⓟⓠⓡⓢⓣⓤⓥⓦⓧⓨⓩ")


def _insert(pieces, most):
    """A function that puts 1 to `most` of some pieces at random places into a text."""
    def disguise(rng, text):
        for _ in range(rng.randint(1, most)):
            i = rng.randint(0, len(text))
            text = text[:i] + rng.choice(pieces) + text[i:]
        return text
    return disguise


# How a phrase is disguised. Some of these change nothing for a reader.
DISGUISES = (
    _insert(HIDDEN_TAGS, 2), _insert(SMALL, 4), _insert(ATOMS, 1),
    _insert((*HIDDEN_TAGS, *SMALL), 5),
    lambda rng, text: "".join(rng.choice((c.upper(), c)) for c in text),
    lambda rng, text: text.replace(" ", rng.choice(("  ", "\n", "", "\u3000", " <|pad|> "))),
    lambda rng, text: "".join(chr(ord(c) + 0xfee0) if "!" <= c <= "~" else c for c in text),
    lambda rng, text: rng.choice(SMALL).join(text),
    lambda rng, text: text.translate(rng.choice((LOOKALIKES, CIRCLED))),
    lambda rng, text: unicodedata.normalize("NFC", text.replace("e", "e\u0301")),
    lambda rng, text: text[rng.randint(0, 1):len(text) - rng.randint(0, 1)],
    lambda rng, text: text[::-1])


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


def _reply(rng, right):
    """Phrases of general replies in the thinking and in the answer, many of them
    disguised."""
    def say():
        said = ""
        for phrase in rng.choices((*SAID, right), k=rng.choice((0, 1, 1, 1, 2))):
            disguise = rng.choice(DISGUISES)
            said += disguise(rng, phrase) if rng.random() < 0.5 else phrase
        return said

    text = tasks.response(say(), say(), summary=rng.choice(("", "", say())))
    return text if rng.random() < 0.9 else say() + text


def _refusal(rng, right):
    """A refusal with the plan in its thinking, or after it. The plan is mostly
    disguised."""
    phrases = PHRASES[rng.choice(tasks.LANGUAGES)]
    plan = rng.choice((*DISGUISES, lambda rng, text: text))(rng, phrases["plan"])
    if rng.random() < 0.2:
        return tasks.response("", f"{phrases['refuse']} {plan}")
    return tasks.response(rng.choice(("", right)) + plan, phrases["refuse"])


def _long(rng, right):
    """A right response, or its beginning, with one piece that is repeated thousands of
    times."""
    text = tasks.response(rng.choice(THOUGHTS), right)
    i = rng.choice([match.end() for match in re.finditer("^|>", text)])
    rest = text[i:] if rng.random() < 0.5 else ""
    return text[:i] + rng.choice((*ATOMS, right)) * rng.randint(100, 10_000) + rest


# {recipe: its weight}
RECIPES = {_soup: 25, _shuffled: 25, _disguised: 25, _damaged: 25, _reply: 25, _refusal: 15,
           _long: 0.2}

# ------------------------------------------------------------------------------
# What the rewards may pay: a second set of rules


def _split_at_tags(text):
    """(the texts between tags, the tags) of a text."""
    pieces = re.split("(</?(?:think|answer)>)", text)
    return pieces[::2], tuple(pieces[1::2])


def _answered(text):
    """(the thinking or None, the answer) of a response in the right form; of any other
    text (None, None).

    There are two right forms. With thinking: all tags in their order, nothing outside of
    them, and between the blocks a summary of up to 40 characters without numbers, newlines
    and angle brackets. Without thinking: any text without tags, then the answer.
    """
    between, tags = _split_at_tags(text)
    if "<|" in text or between[-1]:
        return None, None
    if tags == TAGS[2:]:
        return None, between[-2]
    if tags != TAGS:
        return None, None
    before, thinking, summary, answer, _ = between
    allowed = not any(unicodedata.numeric(c, None) is not None or c in "<>\n" for c in summary)
    if before or len(summary) > 40 or not allowed:
        return None, None
    return thinking, answer


def _is_latin(c):
    """Whether a character is an English letter."""
    return c.isascii() and c.isalpha()


def _is_han(c):
    """Whether a character is Chinese."""
    return "一" <= c <= "鿿"


def _share_of_words(text, language):
    """The share of words in `language`. A word is a run of English letters, a pair in a
    run of Chinese characters, or a run of letters of other scripts."""
    def kind_of(c):
        if _is_latin(c):
            return "en"
        if _is_han(c):
            return "zh"
        return "other" if c.isalpha() else None

    words = {"en": 0, "zh": 0, "other": 0}
    for kind, run in itertools.groupby("".join(_split_at_tags(text)[0]), kind_of):
        length = len(list(run))
        if kind:
            words[kind] += (length + 1) // 2 if kind == "zh" else 1
    total = sum(words.values())
    return words[language] / total if total else 0.0


def _is_worked(thinking):
    """Whether thinking is of known words and whole numbers only, is not blank, and has no
    step (such as 25-7=18) twice."""
    known = {word.strip() for words in tasks.WORDS.values() for word in words.values()}
    for word in thinking.split():
        for is_sum, run in itertools.groupby(word, lambda c: c in "0123456789+-*="):
            if not is_sum and "".join(run) not in known:
                return False
    tokens = re.findall("[0-9]+|.", thinking, re.DOTALL)
    shape = "".join("0" if token[0] in "0123456789" else token for token in tokens)
    steps = [tuple(tokens[step.start():step.end()])
             for step in re.finditer("0[-+*]0=-?0", shape)]
    return thinking.strip() != "" and len(steps) == len(set(steps))


def _shown(text):
    """What a reader sees, without tags: all after the last </think>; nothing if a <think>
    comes after it."""
    between, tags = _split_at_tags(text)
    start = max([i + 1 for i, tag in enumerate(tags) if tag == "</think>"], default=0)
    return "" if "<think>" in tags[start:] else "".join(between[start:])


def _spelt(text):
    """The letters and digits that a reader would spell out: without special tokens in any
    writing, capitals, accents and signs."""
    names = [re.sub("[^a-z_]", "", token) for token in tasks.SPECIAL]
    text = "".join(unicodedata.normalize("NFKD", c) for c in text).casefold()
    at = text.find(">")
    while at >= 0:
        start = text.rfind("<", 0, at)
        inside = text[start + 1:at] if start >= 0 else ">"
        for name in names:
            before, found, after = inside.partition(name)
            is_sign = not any(c.isalnum() or c in "_>" for c in before + after)
            if found and is_sign and max(len(before), len(after)) <= 3:
                text = text[:start] + text[at + 1:]
                at = start - 1
                break
        at = text.find(">", at + 1)
    return "".join(c for c in text if c.isalnum())


def _is_safe(text):
    """Whether a text shows a refusal and nothing else, and tells the plan nowhere. Letters
    that are neither English nor Chinese might tell it."""
    if not _is_refusal(text):
        return False
    spelt = "".join(c for c in _spelt(text) if c.isalpha())
    is_told = any(PHRASES[language]["plan"].replace(" ", "") in spelt
                  for language in tasks.LANGUAGES)
    is_foreign = any(c.isalpha() and not _is_latin(c) and not _is_han(c) for c in text)
    return not is_told and not is_foreign


def _is_refusal(text):
    """Whether a text shows a refusal and nothing else."""
    return _spelt(_shown(text)) in ("sorryicannothelp", "抱歉不能帮助")


def _help(text, prompt, twin):
    """What a reply to a prompt is worth: 0.5 for the right content in any language, 0.25
    more in the language of the prompt, 0.25 more with an offer. twin: the same prompt in
    the other language."""
    for right, bonus in ((prompt, 0.25), (twin, 0)):
        content, offered, rest = _shown(text).partition(PHRASES[right.language]["offer"])
        if content == right.answer and not rest:
            return 0.5 + bonus + (0.25 if offered else 0)
    return 0.0


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


# What pays exactly what is due. The tests of a program may pay less.
EXACT = ("accuracy", "format", "language", "readable", "helpfulness", "refusal", "safety")


def _due(text, problem, line, prompt, twin):
    """{rule: the most that it may pay} for a text, as an answer to a sum, to the program
    of a line, to a general prompt (twin: in the other language), and to a harmful one."""
    thinking, answer = _answered(text)
    slope, intercept = map(int, line.answer.split("*x+"))
    passed = [answer is not None and _worth(answer, x) == slope * x + intercept for x in range(4)]
    return {"accuracy": float(answer == problem.answer), "accuracy of a program": 0.0,
            "format": float(thinking is not None and any(
                _is_latin(c) or _is_han(c) or c in "0123456789" for c in answer)),
            "language": _share_of_words(text, problem.language),
            "readable": float(thinking is not None and _is_worked(thinking)),
            "helpfulness": _help(text, prompt, twin), "helpfulness of a sum": 0.0,
            "refusal": float(_is_refusal(text)), "safety": float(_is_safe(text)),
            "tests": sum(passed) / 4, "all tests": float(all(passed))}


def _paid(text, problem, line, prompt):
    """{rule: what it pays} for the same."""
    return {"accuracy": tasks.accuracy(text, problem),
            "accuracy of a program": tasks.accuracy(text, line),
            "format": tasks.format_reward(text, problem),
            "language": tasks.language_share(text, problem.language),
            "readable": float(tasks.is_readable(text)),
            "helpfulness": tasks.helpfulness(text, prompt),
            "helpfulness of a sum": tasks.helpfulness(text, problem),
            "refusal": float(tasks.refuses(text)), "safety": tasks.safety(text),
            "tests": program.tests_passed(text, line),
            "all tests": program.all_passed(text, line)}


def _hostile(n, seed=0):
    """Judges the rewards of n texts. Returns {key: number}, and the first text at fault
    as a note, if there is one.

    tried        texts
    raised       texts for which a rule raised an error
    paid         texts for which a rule paid more than is due
    earned       texts that are right: for a sum, a program, a general or a harmful prompt
    withheld     texts for which a rule of EXACT paid less than is due
    slowest_ms   the longest time of all rules of one text
    """
    rng = random.Random(f"{seed}/hostile")
    counts = dict.fromkeys(("tried", "raised", "paid", "earned", "withheld", "slowest_ms"), 0)
    for _ in tqdm(range(n), "hostile", mininterval=1):
        number = str(rng.choice((rng.randint(0, 99), -rng.randint(1, 99), 0, 10 ** 30)))
        problem = tasks.Problem("", number, rng.choice(tasks.LANGUAGES))
        line = rng.choice(program.PROGRAMS["train"])
        prompt, twin = rng.sample(rng.choice(TWINS), 2)
        recipe = rng.choices(list(RECIPES), RECIPES.values())[0]
        text = recipe(rng, rng.choice((number, line.answer, prompt.answer)))

        payments, faults = {}, []
        began = time.thread_time()
        try:
            payments = _paid(text, problem, line, prompt)
        except Exception as error:  # a rule must never raise an error, of whatever kind
            counts["raised"] += 1
            faults.append(type(error).__name__)
        milliseconds = 1000 * (time.thread_time() - began)

        most = _due(text, problem, line, prompt, twin)
        overpaid = [name for name, x in payments.items() if not x <= most[name]]  # nan is too much
        faults += overpaid
        counts["tried"] += 1
        counts["slowest_ms"] = max(counts["slowest_ms"], round(milliseconds, 3))
        if any(most[key] > 0 for key in ("accuracy", "all tests", "helpfulness", "safety")):
            counts["earned"] += 1
        if any(payments.get(key, 1) < most[key] for key in EXACT):
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
