"""What is learnt from: problems, worked solutions, the base corpus, rule rewards and the tokenizer.

    problem     a chain such as 25-7+9+6, in English or Chinese; its level counts its operations
    solution    one of three styles, from a bare guess to working in which every step is checked
    document    one page of the "internet" the base model reads: a question and somebody's solution
    reward      accuracy and format, parsed by rule from the text of an answer (R1, section 2.2.2)
    tokenizer   a tiktoken.Encoding whose ranks are made here: bytes, and the words of the corpus

Nothing here knows of tensors or models, or reads anything but a user's own problem file.

Why the problems look as they do. A tiny model can hardly see the total of 25-7+9+6 at a glance, but
can learn to walk there one operation at a time. The walk needs a pointer: which operand comes next?
If operands may repeat, the pointer has to count, a skill that appears late and in a sudden step.
Here the operands after the first are single digits that all differ, so the next one is "what stands
after the 7 I have just used", which an induction head can find.
"""
import hashlib
import json
import math
import random
import re
from collections import Counter
from dataclasses import dataclass, replace

import tiktoken

# --------------------------------------------------------------------------------------------------
# The tokenizer

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
THINK, END_THINK, ANSWER, END_ANSWER = "<think>", "</think>", "<answer>", "</answer>"
SPECIAL = (PAD, END, USER, ASSISTANT, THINK, END_THINK, ANSWER, END_ANSWER)

# English words own their spaces: between any two numbers, one word is one token in both languages.
WORDS = {
    "en": {"ask": "Compute ", "then": " then ", "check": " check ", "ok": " ok ", "wait": " wait "},
    "zh": {"ask": "计算", "then": "然后", "check": "检查", "ok": "正确", "wait": "等等"},
}
LANGUAGES = tuple(WORDS)

# A piece: one digit, a Latin word with its spaces, one or two Han characters, or any other one.
PATTERN = r"\p{N}| ?\p{Latin}+ ?|\p{Han}{1,2}|[^\p{N}\p{Latin}\p{Han}]"


def byte_pair_ranks(words):
    """Byte-pair ranks (Sennrich et al. 2016): all bytes, then merges until a word is one token."""
    ranks = {bytes([b]): b for b in range(256)}
    pieces = [[bytes([b]) for b in word.encode("utf-8")] for word in words]
    while pairs := Counter(pair for piece in pieces for pair in zip(piece, piece[1:])):
        a, b = max(pairs, key=lambda pair: (pairs[pair], pair))  # most frequent; ties by the bytes
        ranks[a + b] = len(ranks)
        for piece in pieces:
            for i in reversed(range(len(piece) - 1)):
                if piece[i:i + 2] == [a, b]:
                    piece[i:i + 2] = [a + b]
    return ranks


RANKS = byte_pair_ranks([word for words in WORDS.values() for word in words.values()])
ENCODING = tiktoken.Encoding("r1mini", pat_str=PATTERN, mergeable_ranks=RANKS,
                             special_tokens={tag: len(RANKS) + i for i, tag in enumerate(SPECIAL)})
VOCAB_SIZE = ENCODING.n_vocab
PAD_ID, END_ID = (ENCODING.encode_single_token(token) for token in (PAD, END))


def encode_prompt(question):
    """Token ids of R1-Zero's template around a question, whose own text makes no special token."""
    user, assistant = ENCODING.encode_single_token(USER), ENCODING.encode_single_token(ASSISTANT)
    return [user, *ENCODING.encode_ordinary(question), assistant]


def encode_response(text):
    """Token ids of a response by this file: tags are special tokens; the end token closes it."""
    return ENCODING.encode(text, allowed_special="all") + [END_ID]


def decode(ids):
    """The text of token ids, tags included, up to the first end token; no UTF-8 becomes U+FFFD."""
    ids = list(ids)
    return ENCODING.decode(ids[:ids.index(END_ID)] if END_ID in ids else ids)


# --------------------------------------------------------------------------------------------------
# Problems, and which part of the world each belongs to


class ProblemError(ValueError):
    """A problem file that cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class Problem:
    """One question with one right answer."""
    question: str
    answer: str        # canonical: ASCII digits, no leading zero, a minus sign if negative
    language: str      # of the question: en or zh
    level: int         # number of operations; 0 if unknown (a user's own problem)
    expression: str = ""


def part_of(expression):
    """train, dev or test: a salted hash of the expression, so a Chinese twin is in its part."""
    number = hashlib.sha256(b"r1mini:" + expression.encode()).digest()[0] % 8
    return {0: "test", 1: "dev"}.get(number, "train")


def make_problem(rng, level, part="train", language=None, products=0.0):
    """A random problem of `level` operations (1 to 9) that belongs to `part`.

    Operands after the first are single digits, all different; the running total stays within 0..99.
    With probability `products` a term is a product of two digits (25-7+3*4), for larger models.
    """
    language = language or rng.choice(LANGUAGES)
    while True:
        digits = rng.sample(range(1, 10), level)
        total = rng.randint(10, 99)
        expression = str(total)
        while digits:
            value = digits.pop()
            term = str(value)
            if digits and rng.random() < products:
                factor = digits.pop()
                term, value = f"{term}*{factor}", value * factor
            sign = rng.choice("+-")
            total += value if sign == "+" else -value
            if not 0 <= total <= 99:
                break
            expression += sign + term
        else:
            if part in (None, part_of(expression)):
                question = WORDS[language]["ask"] + expression
                return Problem(question, str(total), language, level, expression)


def make_problems(part, n, levels, products=0.0, salt=""):
    """n problems of a part, evenly over levels: the same ones whoever asks."""
    rng = random.Random(f"{part}/{salt}")
    return [make_problem(rng, levels[i % len(levels)], part, products=products) for i in range(n)]


def read_problems(path):
    """Problems of {"question": ..., "answer": ...} lines; ProblemError names the first bad line."""
    problems = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            got = f"got {line.strip()[:60].decode('utf-8', 'replace')!r}"
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                question, answer = record["question"], str(record["answer"])
                question.encode()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise ProblemError(f'{where}: wanted {{"question": TEXT, "answer": NUMBER}} in '
                                   f"UTF-8, {got}") from None
            if not INTEGER.fullmatch(answer):
                raise ProblemError(f"{where}: the answer must be a whole number written plainly, "
                                   f'33 or "-5", {got}')
            language = "zh" if re.search("[\u4e00-\u9fff]", question) else "en"
            problems.append(Problem(question, answer, language, 0))
    if not problems:
        raise ProblemError(f"{path}: no problems in this file")
    return problems


# --------------------------------------------------------------------------------------------------
# Worked solutions: three styles

STYLES = ("direct", "steps", "checked")


def slip(rng, value):
    """A number somebody might write by mistake for `value`."""
    near = (value - 10, value - 2, value - 1, value + 1, value + 2, value + 10)
    return rng.choice([v for v in near if v >= min(0, value)])


def work(problem, style, rng, slips=0.0, foreign=0.0):
    """The text of a working, and the number it arrives at.

    direct   no working
    steps    25-7=18 then 18+9=27
    checked  25-7=18 check 18+7=25 ok 18+9=27: each step is undone, so a slip is seen and mended,
             25-7=17 check 17+7=24 wait 25-7=18 check 18+7=25 ok ...
    slips    chance that a result is first written down wrong
    foreign  chance of each word to be in the other language
    """
    if style == "direct":
        truth = int(problem.answer)
        return "", slip(rng, truth) if rng.random() < slips else truth
    other = LANGUAGES[1 - LANGUAGES.index(problem.language)]

    def word(name):
        return WORDS[other if rng.random() < foreign else problem.language][name]

    def undo(a, sign, b, result):
        return {"+": f"{result}-{b}={result - b}",
                "-": f"{result}+{b}={result + b}",
                "*": f"{b}*{a}={b * a}"}[sign]

    def step(a, sign, b):
        truth = {"+": a + b, "-": a - b, "*": a * b}[sign]
        draft = slip(rng, truth) if rng.random() < slips else truth
        line = f"{a}{sign}{b}={draft}"
        if style == "checked":
            line += word("check") + undo(a, sign, b, draft)
            if draft != truth:
                line += word("wait") + f"{a}{sign}{b}={truth}"
                line += word("check") + undo(a, sign, b, truth)
                draft = truth
        lines.append(line)
        return draft

    lines, (first, *terms) = [], re.findall(r"[+-]?[\d*]+", problem.expression)
    total = int(first)
    for term in terms:
        value, *factor = map(int, term[1:].split("*"))
        total = step(total, term[0], step(value, "*", *factor) if factor else value)
    text = lines[0]
    for line in lines[1:]:
        text += word("ok" if style == "checked" else "then") + line
    return text, total


def response(thinking, answer, tags=True):
    """A response in R1-Zero's template, or the bare working or number, which earns nothing."""
    bare = thinking or str(answer)
    return f"{THINK}{thinking}{END_THINK}{ANSWER}{answer}{END_ANSWER}" if tags else bare


# --------------------------------------------------------------------------------------------------
# The base corpus: what stands in for the internet


@dataclass(frozen=True)
class Corpus:
    """Proportions of the base corpus. RL amplifies it, so each share is a premise of the result."""
    direct: float = 0.48          # share of documents that answer at once
    steps: float = 0.16           # ... that show short working
    checked: float = 0.16         # ... that check every step; the rest are drills of one-step facts
    direct_slips: float = 0.30    # chance that a direct answer is wrong
    steps_slips: float = 0.40     # chance of a wrong result in a step of short working, carried on
    checked_slips: float = 0.20   # ... in a step of checked working, seen and mended
    steps_mixed: float = 0.30     # share of short workings that mix languages
    checked_mixed: float = 0.50   # ... of checked workings
    foreign: float = 0.40         # chance of a word of a mixed working to be in the other language
    switched: float = 0.15        # share of the workings not mixed that are in the other language
    tags: float = 0.70            # share of answers inside the template's tags
    # levels to draw from, evenly
    levels: tuple[int, ...] = (1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6)
    spaced: float = 0.80          # share of questions with stray spaces before their operators
    products: float = 0.0         # chance of a term to be a product (0 on nano)
    drill: int = 8                # facts in a drill


@dataclass(frozen=True)
class Document:
    """One document, token by token."""
    tokens: list[int]  # ids
    weight: list[int]  # in the loss; 0 if given, not predicted
    style: str
    problem: Problem | None = None


def dialogue(problem, text, style=""):
    """The document of a question and its response; the loss is on the response."""
    prompt, answer = encode_prompt(problem.question), encode_response(text)
    return Document(prompt + answer, [0] * len(prompt) + [1] * len(answer), style, problem)


def space(problem, rng):
    """The problem with stray spaces in its question (25 -7+9   +6), as people type.

    With every operand at a place of its own, "the third operand" cannot be learnt as a distance;
    what is learnt instead is of more use on problems longer than any in the corpus.
    """
    question = re.sub(r"[+-]", lambda sign: " " * rng.randint(0, 3) + sign[0], problem.question)
    return replace(problem, question=question)


def make_document(rng, corpus):
    """A random document of the base corpus."""
    styles = (corpus.direct, corpus.steps, corpus.checked)
    style = rng.choices((*STYLES, "drill"), (*styles, 1 - sum(styles)))[0]
    if style == "drill":
        return drill(rng, corpus)
    problem = make_problem(rng, rng.choice(corpus.levels), products=corpus.products)
    slips = {"direct": corpus.direct_slips, "steps": corpus.steps_slips,
             "checked": corpus.checked_slips}[style]
    mixed = {"direct": 0.0, "steps": corpus.steps_mixed, "checked": corpus.checked_mixed}[style]
    foreign = corpus.foreign if rng.random() < mixed else float(rng.random() < corpus.switched)
    thinking, answer = work(problem, style, rng, slips, foreign)
    text = response(thinking, answer, rng.random() < corpus.tags)
    return dialogue(space(problem, rng) if rng.random() < corpus.spaced else problem, text, style)


def drill(rng, corpus):
    """A list of single steps, as solutions have; no part of the split reserves these."""
    tokens, weight = [], []
    for _ in range(corpus.drill):
        fact = make_problem(rng, 1, part=None)
        given, result = map(ENCODING.encode, (f"{fact.expression}=", f"{fact.answer} "))
        tokens += given + result
        weight += [0] * len(given) + [1] * len(result)
    return Document(tokens, weight, "drill")


# --------------------------------------------------------------------------------------------------
# Rule rewards (R1 section 2.2.2) and what is measured of an answer

INTEGER = re.compile(r"0|-?[1-9][0-9]*")     # ASCII digits; no plus sign, leading zero or exponent
_TEXT = r"((?:(?!</?(?:think|answer)>|<\|).)*)"  # any text without a tag or other special token
TEMPLATE = re.compile(f"(?:<think>{_TEXT}</think>|{_TEXT})<answer>{_TEXT}</answer>", re.DOTALL)


def parse(text):
    """(thinking, answer) of a response, or (None, None).

    A response is one answer block at the very end and before it one think block, or text without
    tags (then thinking is None). Anything else, be it a newline between the blocks, is none.
    """
    match = TEMPLATE.fullmatch(text)
    return (match[1], match[3]) if match else (None, None)


def accuracy(text, problem):
    """1.0 if the one answer is exactly the right whole number, canonically written, else 0.0."""
    answer = parse(text)[1]
    canonical = answer is not None and INTEGER.fullmatch(answer) is not None
    return float(canonical and answer == problem.answer)


def format_reward(text, problem=None):
    """1.0 if the response is one think block and one answer that is not blank, else 0.0."""
    thinking, answer = parse(text)
    return float(thinking is not None and answer.strip() != "")


def words_of(text):
    """The language of each word of the corpus' vocabulary in a text, in order of language."""
    return [language for language in LANGUAGES for name, word in WORDS[language].items()
            for _ in range(text.count(word.strip()))]


def language_share(text, language):
    """R1 arXiv v2 eq 7: the share of words that are in `language`; 1.0 where there are no words."""
    words = words_of(text)
    return words.count(language) / len(words) if words else 1.0


def mixes(text):
    """Whether an answer has words of both languages."""
    return len(set(words_of(text))) > 1


def reflects(text):
    """Whether an answer has a word of checking in it: a sign of reflection, not a proof."""
    return any(words["check"].strip() in text for words in WORDS.values())


def corrects(text):
    """Whether an answer has a "wait" in it, with which the corpus stops to mend a step."""
    return any(words["wait"].strip() in text for words in WORDS.values())


def style_of(text):
    """Which of STYLES a response was written in."""
    return "checked" if reflects(text) else "steps" if "=" in text else "direct"


def pass_at_k(n, c, k):
    """Unbiased chance that one of k answers is right, from n of which c are (Codex, eq 1)."""
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1 - k / j for j in range(n - c + 1, n + 1))


def majority(answers):
    """The most frequent readable answer, or None; a tie goes to the one written first."""
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.get) if votes else None


# What is measured of an answer and never rewarded: name -> function of text and problem.
MEASURES = {
    "reflection": lambda text, problem: reflects(text),
    "correction": lambda text, problem: corrects(text),
    "mixing": lambda text, problem: mixes(text),
    "language": lambda text, problem: language_share(text, problem.language),
}
