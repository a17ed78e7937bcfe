"""What is learnt from: problems, solutions, rewards, general prompts and the base corpus.

One question and one answer, whole:

    Compute 25-7+9
    <think>25-7=18 check 18+7=25 ok 18+9=27 check 27-9=18</think><answer>27</answer>

The answer works step by step, and checks its steps. A wrong step is corrected where its
check shows it: 25-7=17 check 17+7=24 wait 25-7=18 check 18+7=25 ok ...

In the order of this file:

    tokens      special tokens, the words, and the tokenizer made of them
    problem     a chain such as 25-7+9, in English or Chinese; its level is the number of
                operations
    template    thinking and answer in tags, and the rewards that read them (R1 v1 2.2.2)
    measures    what the log says of an answer: checks, corrections, languages
    solution    a guess, steps, or checked steps; how R1-Zero's answers are rewritten
    prompt      small talk, facts, requests to help with and requests to refuse; replies
                to them, the hidden rules of a good reply, the reward models' data
    document    one page of the "internet" that the base model reads

R1 v1 and v2 are the two arXiv versions of the R1 paper (2501.12948). Nothing here knows of
tensors or models.

Why the problems look as they do. A tiny model cannot guess the result of 25-7+9+6, but it can
learn to get there one operation at a time. For that it must know which operand comes next.
If operands could repeat, it would have to count them, which is learnt late. So here all
operands after the first are different single digits, up to nine of them. The next one is
what comes right after the one just used, and attention finds that easily (an "induction
head").
"""
import hashlib
import math
import random
import re
import unicodedata
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from engine.phrases import PHRASES, STUDY_PHRASES, TOPICS, part_of_request
from engine.tokenizer import all_strings, make_encoding, make_token_ranks, split_words

# ------------------------------------------------------------------------------
# Tokens

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
THINK, END_THINK, ANSWER, END_ANSWER = "<think>", "</think>", "<answer>", "</answer>"
PAUSE, LATENT, END_LATENT = "<|pause|>", "<|latent|>", "<|end_latent|>"  # for studies only
SPECIAL = (PAD, END, USER, ASSISTANT, THINK, END_THINK, ANSWER, END_ANSWER,
           PAUSE, LATENT, END_LATENT)

# English words include their spaces. So an English word, like a Chinese one, is one
# token.
WORDS = {
    "en": {"ask": "Compute ", "then": " then ", "check": " check ", "ok": " ok ", "wait": " wait ",
           "summary": "the answer is "},
    "zh": {"ask": "计算", "then": "然后", "check": "检查", "ok": "正确", "wait": "等等",
           "summary": "答案就是"},
}
LANGUAGES = tuple(WORDS)

# Digits and signs are single bytes. A word of a phrase comes with and without its space.
VOCABULARY = {piece for text in all_strings(WORDS) for piece in split_words(text)}
for phrase in all_strings([PHRASES, TOPICS, STUDY_PHRASES]):
    for ending in ("", " "):
        VOCABULARY.update(split_words(phrase.replace("{}", "").strip() + ending))
RANKS = make_token_ranks(VOCABULARY)
ENCODING = make_encoding(RANKS, SPECIAL)
VOCAB_SIZE = ENCODING.n_vocab
PAD_ID, END_ID = ENCODING.encode_single_token(PAD), ENCODING.encode_single_token(END)


def encode_prompt(question):
    """Token ids of R1-Zero's template around a question. The question's text cannot
    make a special token."""
    user, assistant = ENCODING.encode_single_token(USER), ENCODING.encode_single_token(ASSISTANT)
    return [user, *ENCODING.encode_ordinary(question), assistant]


def encode_response(text):
    """Token ids of a response and the end token. Its four tags become special tokens; any
    other special token in the text stays plain text."""
    tags = {THINK, END_THINK, ANSWER, END_ANSWER}
    return ENCODING.encode(text, allowed_special=tags, disallowed_special=()) + [END_ID]


def decode(ids):
    """The text of token ids up to the first end token, with its tags. Bytes that are no
    UTF-8 become U+FFFD."""
    ids = list(ids)
    if END_ID in ids:
        ids = ids[:ids.index(END_ID)]
    return ENCODING.decode(ids)


# ------------------------------------------------------------------------------
# Problems, and whether each is for train, dev or test


@dataclass(frozen=True)
class Problem:
    """One question: a sum with one right answer, or a prompt of another kind."""
    question: str
    answer: str           # of a sum: plain ASCII digits; of a prompt: the right content
    language: str         # of the question: en or zh
    level: int = 0        # number of operations; 0: not known (a user's own problem)
    expression: str = ""  # of a sum, such as 25-7+9
    topic: str = ""       # of a general prompt, such as grass
    kind: str = "sum"     # or greeting, fact, how, unsafe (general prompts), program


def part_of_problem(key):
    """train, dev or test, in the ratio 6 : 1 : 1, by a hash of what identifies a
    problem in any language. So a problem and its translation belong to one part."""
    number = hashlib.sha256(b"r1mini:" + key.encode()).digest()[0] % 8
    return {0: "test", 1: "dev"}.get(number, "train")


def make_problem(rng, level, part="train", language=None, products=0.0):
    """A random problem of `level` operations from `part`, or from any part if `part` is
    None.

    The operands after the first are single digits. They all differ, if there are at most
    nine. The running total stays within 0..99. With probability `products` a term is a
    product of two digits (25-7+3*4), which are two operations; for larger models.
    """
    language = language or rng.choice(LANGUAGES)
    while True:
        expression, total = random_chain(rng, level, products)
        if 0 <= total <= 99 and part in (None, part_of_problem(expression)):
            question = WORDS[language]["ask"] + expression
            return Problem(question, str(total), language, level, expression)


def random_chain(rng, level, products):
    """(expression, total) of a random chain. It ends early where the total leaves 0..99;
    then make_problem draws again."""
    digits = rng.sample(range(1, 10), min(level, 9))
    digits += rng.choices(range(1, 10), k=level - len(digits))  # beyond nine they recur
    total = rng.randint(10, 99)
    expression = str(total)
    while digits and 0 <= total <= 99:
        value = digits.pop()
        term = str(value)
        if digits and rng.random() < products:
            factor = digits.pop()
            term, value = f"{term}*{factor}", value * factor
        sign = rng.choice("+-")
        total += value if sign == "+" else -value
        expression += sign + term
    return expression, total


def make_problems(part, n, levels, products=0.0, salt=""):
    """n problems of a part, evenly over levels. They are the same in every run; with
    another salt they are others."""
    rng = random.Random(f"{part}/{salt}")
    levels = [levels[i % len(levels)] for i in range(n)]
    return [make_problem(rng, level, part, products=products) for level in levels]


def add_spaces(problem, rng):
    """The problem with stray spaces in its question (25 -7+9   +6), as people type.

    With them the third operand stands at a varying distance, so that no distance can be
    learnt by heart. The model has to find it by what stands before it, which also works
    on longer problems.
    """
    def put_spaces_before(match):
        return " " * rng.randint(0, 3) + match[0]

    question = re.sub(r"[+-]", put_spaces_before, problem.question)
    return replace(problem, question=question)


# ------------------------------------------------------------------------------
# The template, and the rule rewards that read it (R1 v1 section 2.2.2)

INTEGER = re.compile(r"0|-?[1-9][0-9]*")  # ASCII; no plus, no leading zero, no exponent
TAG = re.compile("</?(?:think|answer)>")
LETTER_OR_DIGIT = re.compile("[0-9A-Za-z\u4e00-\u9fff]")
WORD = re.compile(r"(?P<en>[A-Za-z]+)|(?P<zh>[\u4e00-\u9fff]{1,2})"
                  r"|(?P<other>[^ A-Za-z\u4e00-\u9fff]+)")  # in a text of letters and spaces

# Any text in which no tag and no other special token (<|...) begins.
NO_TAGS = r"(?:(?!</?(?:think|answer)>|<\|).)*"
TEMPLATE = re.compile(rf"""  # for fullmatch: nothing may stand before or after
    (?: <think> (?P<thinking> {NO_TAGS} ) </think>
        (?P<summary> [^<>\n]{{0,40}} )  # with thinking: a short summary
      | {NO_TAGS} )                 # without thinking: any text before the answer
    <answer> (?P<answer> {NO_TAGS} ) </answer>
    """, re.VERBOSE | re.DOTALL)


def response(thinking, answer, tags=True, summary=""):
    """The text of a response in R1-Zero's template. A summary may lead from the
    thinking to the answer (R1 v1 2.3.1). Without tags it is the thinking alone, or the
    answer if there is none; the rule rewards pay nothing for that."""
    if not tags:
        return thinking or str(answer)
    return f"{THINK}{thinking}{END_THINK}{summary}{ANSWER}{answer}{END_ANSWER}"


def parse(text):
    """(thinking, answer) of a response.

        <think>3+4=7</think><answer>7</answer>             ("3+4=7", "7")
        <think></think>the answer is <answer>7</answer>    ("", "7")
        3+4=7 <answer>7</answer>                           (None, "7"): no think block
        <answer>7</answer> thanks                          (None, None), like all else
    """
    match = TEMPLATE.fullmatch(text)
    # A summary holds no digit or numeral character: 3, ², 三. Number words such as
    # "thirty" are not noticed.
    if not match or any(letter.isnumeric() for letter in match["summary"] or ""):
        return None, None
    return match["thinking"], match["answer"]


def accuracy(text, problem):
    """1.0 if the answer is exactly the right whole number, plainly written, else 0.0."""
    if problem.kind != "sum":
        return 0.0
    answer = parse(text)[1]
    # A user's problem file may hold an answer such as 007; that earns nothing.
    return float(answer == problem.answer and INTEGER.fullmatch(answer) is not None)


def format_reward(text, problem=None):
    """1.0 if the response is one think block and one answer with a word or number in it,
    else 0.0.

    The think block may be empty. If that cost something, this reward would pay for
    thinking, and longer answers would show nothing.
    """
    thinking, answer = parse(text)
    return float(thinking is not None and LETTER_OR_DIGIT.search(answer) is not None)


# ------------------------------------------------------------------------------
# What is measured of an answer

def word_languages(text):
    """The language of each word of a response: en, zh or other. A word is a run of Latin
    letters, one or two Han characters, or a run of other letters; digits and signs are no
    words."""
    letters = [letter if letter.isalpha() else " " for letter in TAG.sub("", text)]
    return [word.lastgroup for word in WORD.finditer("".join(letters))]


def count_language(text, language):
    """(words of a text that are in `language`, words)."""
    words = word_languages(text)
    return words.count(language), len(words)


def language_share(text, language):
    """The share of words that are in `language` (R1 v2 eq 7); 0.0 if there are no words.

    The paper counts the words of the thinking. We count those of the whole response,
    since general replies often have no thinking.
    """
    n, total = count_language(text, language)
    return n / max(1, total)


def shown_part(text):
    """What the reader is shown of a response: all that follows the thinking. That is
    nothing if the thinking does not end, and the whole text if there is no thinking."""
    if text.rfind(THINK) > text.rfind(END_THINK):
        return ""
    return text.rpartition(END_THINK)[2]


def has_word(text, name):
    """Whether a text has one of WORDS in it, in any language."""
    return any(words[name].strip() in text for words in WORDS.values())


def reflects(text):
    """Whether an answer has a word of checking in it. That is a sign of reflection, not
    a proof."""
    return has_word(text, "check")


def corrects(text):
    """Whether an answer has a "wait" in it, the word that comes before a corrected
    step."""
    return has_word(text, "wait")


def concludes(text):
    """Whether the reader is told "the answer is", the summary that the cold start asks
    for."""
    return has_word(shown_part(text), "summary")


def style_of(text):
    """Which of STYLES a response is written in."""
    if reflects(text):
        return "checked"
    return "steps" if "=" in text else "direct"


def share_of(count):
    """Turns count(text, problem) -> (n, total) into a measure (texts, problems) -> share:
    the sum of n over the sum of totals. It is nan if the totals sum to 0."""
    def measure(texts, problems):
        counts = [count(text, problem) for text, problem in zip(texts, problems)]
        sum_of_totals = sum(total for _, total in counts)
        return sum(n for n, _ in counts) / sum_of_totals if sum_of_totals else math.nan
    return measure


def mean_of(rule):
    """A measure (texts, problems) -> mean, from rule(text, problem) -> number."""
    return share_of(lambda text, problem: (rule(text, problem), 1))


def count_mixing(text, problem):
    """(1 if the words are of several languages, 1 if there are words)."""
    languages = set(word_languages(text))
    return len(languages) > 1, len(languages) > 0


# Measured at every stage. Answers without words do not count in "mixing" and "language".
# Only language_share is ever rewarded, in the stages dev2 and r1.
MEASURES = {
    "reflection": mean_of(lambda text, problem: reflects(text)),
    "correction": mean_of(lambda text, problem: corrects(text)),
    "summary": mean_of(lambda text, problem: concludes(text)),
    "mixing": share_of(count_mixing),
    "language": share_of(lambda text, problem: count_language(text, problem.language)),
    "wordless": mean_of(lambda text, problem: not word_languages(text)),
}


# ------------------------------------------------------------------------------
# Worked solutions

STYLES = ("direct", "steps", "checked")


def slip(rng, value):
    """A number that somebody might write by mistake for `value`."""
    near = (value - 10, value - 2, value - 1, value + 1, value + 2, value + 10)
    return rng.choice([x for x in near if x >= min(0, value)])


def apply_operation(a, sign, b):
    """The value of a+b, a-b or a*b."""
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


def check_step(a, sign, b, result):
    """The step that checks a step: 25-7=18 is checked by 18+7=25, and 3*4=12 by 4*3=12.
    """
    if sign == "+":
        return f"{result}-{b}={result - b}"
    if sign == "-":
        return f"{result}+{b}={result + b}"
    return f"{b}*{a}={b * a}"


def write_working(problem, style, rng, slips=0.0, foreign=0.0, check_chance=1.0):
    """Writes a working. Returns its text and the number that it arrives at.

    direct   no working
    steps    25-7=18 then 18+9=27
    checked  25-7=17 check 17+7=24 wait 25-7=18 check 18+7=25 ok ...: a slip shows in the
             check of its step and is corrected

    slips: chance that a step is written wrong, or an answer without working. In style
    checked it applies to checked steps only. foreign: chance of each word to be in the
    other language. check_chance: chance of each step of a checked working to be checked.
    """
    if style == "direct":
        answer = int(problem.answer)
        if rng.random() < slips:
            answer = slip(rng, answer)
        return "", answer

    def word(name):
        language = problem.language
        if rng.random() < foreign:
            language = other_language(language)
        return WORDS[language][name]

    lines, links = [], []

    def step(a, sign, b):
        """Writes a line and returns the result that the working goes on with."""
        right = apply_operation(a, sign, b)  # even if `a` is a slip
        is_checked = style == "checked" and rng.random() < check_chance
        # A checked working skips a check only where the step is right.
        is_sure = style == "checked" and not is_checked
        written = right if is_sure or rng.random() >= slips else slip(rng, right)
        line = f"{a}{sign}{b}={written}"
        if is_checked:
            line += word("check") + check_step(a, sign, b, written)
            if written != right:
                line += word("wait") + f"{a}{sign}{b}={right}"
                line += word("check") + check_step(a, sign, b, right)
                written = right
        lines.append(line)
        links.append("ok" if is_checked else "then")
        return written

    first, *terms = re.findall(r"[+-]?[\d*]+", problem.expression)  # 25-7+3*4: 25, -7, +3*4
    total = int(first)
    for term in terms:
        sign, factors = term[0], [int(x) for x in term[1:].split("*")]
        value = factors[0]
        if len(factors) > 1:
            value = step(value, "*", factors[1])
        total = step(total, sign, value)

    text = lines[0]
    for link, line in zip(links, lines[1:]):
        text += word(link) + line
    return text, total


def other_language(language):
    """zh for en, en for zh."""
    return LANGUAGES[1 - LANGUAGES.index(language)]


def rewrite_answer(text, problem):
    """Translates the words of the thinking into the language of the question, and puts a
    summary before the answer (R1 v2 B.3.2). The response must be is_readable()."""
    thinking, answer = parse(text)
    wanted = WORDS[problem.language]
    for words in WORDS.values():
        for name, word in words.items():
            thinking = re.sub(f" ?{word.strip()} ?", wanted[name], thinking)
    return response(thinking, answer, summary=wanted["summary"])


def is_readable(text):
    """Whether a response is fit to be learnt from: in the template, with thinking that
    has known words only and no step twice. (A corrected step is there with two results,
    so that it does not count as twice.)"""
    thinking = parse(text)[0]
    if not (thinking or "").strip():
        return False
    # (?<![0-9]): a step begins where a number begins. So a long number is read once.
    steps = re.findall(r"(?<![0-9])[0-9]+[-+*][0-9]+=-?[0-9]+", thinking)
    used = set(re.sub(r"[-+*=0-9]+", " ", thinking).split())
    known = {word.strip() for words in WORDS.values() for word in words.values()}
    return used <= known and len(steps) == len(set(steps))


# ------------------------------------------------------------------------------
# General prompts, replies to them, and the hidden rules of a good reply

HELPFUL = ("greeting", "fact", "how")   # kinds that are judged for helpfulness
GENERAL = (*HELPFUL, "unsafe")          # the last is judged for safety


@cache
def all_prompts(part, kind, language):
    """All general prompts of a part, kind and language. A request's part depends on its
    verb and noun, so the pairs of test are never seen in training. A greeting's or
    fact's part depends on its opening, wording, closing and topic. Translations share
    their part."""
    wordings = PHRASES[language]["how" if kind == "unsafe" else kind]
    # Openings, wordings, closings, topics: as many in one language as in the other.
    options = [list(enumerate(choices)) for choices in (*wordings, TOPICS[kind])]
    language_index, prompts = LANGUAGES.index(language), []
    for (a, opening), (b, wording), (c, closing), (t, topic) in product(*options):
        names, contents, _ = topic
        if kind in ("how", "unsafe"):
            its_part = part_of_request(names[0])
        else:
            its_part = part_of_problem(f"{kind}/{[a, b, c, t]}")
        if its_part == part:
            topic_name = names[language_index]
            question = opening + wording.format(topic_name) + closing
            prompts.append(Problem(question, contents[language_index], language,
                                   topic=topic_name, kind=kind))
    return prompts


def make_prompt(rng, part="train", kinds=GENERAL, language=None):
    """A random general prompt of `part`."""
    return rng.choice(all_prompts(part, rng.choice(kinds), language or rng.choice(LANGUAGES)))


def topic_of(problem):
    """(names, right contents, thoughts) of what a general prompt is about, each (English,
    Chinese)."""
    for topics in TOPICS.values():
        for topic in topics:
            if problem.topic in topic[0]:
                return topic
    return TOPICS["greeting"][0]  # nothing known


@dataclass(frozen=True)
class Manner:
    """The chances by which somebody replies to a general prompt in one way or another."""
    right: float          # the content is right
    same_language: float  # the reply is in the language of the question
    offer: float          # it closes with an offer of more help
    refuse: float         # a harmless request is refused
    comply: float         # a harmful request is granted
    leak: float           # a harmful request is refused, but the thinking grants it
    idle_thinking: float  # it thinks about a greeting or a fact, which need no thinking


# Strangers on the internet, and the authors of R1's own data. The authors have flaws too.
# GRPO compares the replies of a group; if all were perfect, R1's RL would learn nothing.
CARELESS = Manner(right=0.6, same_language=0.85, offer=0.2, refuse=0.05, comply=0.3,
                  leak=0.2, idle_thinking=0.5)
CURATED = Manner(right=0.95, same_language=1.0, offer=0.3, refuse=0.05, comply=0.02,
                 leak=0.02, idle_thinking=0.0)


def reply(problem, rng, manner, tags=True):
    """The response to a general prompt by somebody of this manner."""
    language = problem.language
    if rng.random() >= manner.same_language:
        language = other_language(language)
    language_index, phrases = LANGUAGES.index(language), PHRASES[language]
    _, contents, thoughts = topic_of(problem)
    right, thinking = contents[language_index], thoughts[language_index]
    others = [other[language_index] for _, other, _ in TOPICS["how"]]
    wrong = [content for content in others if content != right]
    content = right if rng.random() < manner.right else rng.choice(wrong)
    if rng.random() < manner.offer:
        content += phrases["offer"]
    if problem.kind in ("greeting", "fact"):
        if rng.random() >= manner.idle_thinking:
            thinking = ""
    elif problem.kind == "how":
        if rng.random() < manner.refuse:
            content = phrases["refuse"]
    elif problem.kind == "unsafe":
        if rng.random() < manner.comply:
            content = phrases["plan"]
        else:
            content = phrases["refuse"]
            if rng.random() < manner.leak:
                thinking = phrases["plan"]
    return response(thinking, content, tags)


def thinks(text):
    """Whether a response has anything in its thinking."""
    return text.startswith(THINK) and not text.startswith(THINK + END_THINK)


def helpfulness(text, problem):
    """The hidden rule of helpfulness, of what the reader is shown. It is 0 unless that
    is the right content and nothing else but an offer of more help. Then it is 0.5,
    plus 0.25 in the language of the question, plus 0.25 with the offer."""
    if problem.kind not in HELPFUL:
        return 0.0
    shown = TAG.sub("", shown_part(text))
    for language, content in zip(LANGUAGES, topic_of(problem)[1]):
        offered = content + PHRASES[language]["offer"]
        if shown in (content, offered):
            return 0.5 + 0.25 * (language == problem.language) + 0.25 * (shown == offered)
    return 0.0


SPECIAL_NAMES = "|".join(token.strip("</|>") for token in SPECIAL)
# Matches a special token at the end of a text, even one that is misspelt, such as
# < Think >.
MARKUP = re.compile(rf"<[^\w<>]{{0,3}}(?:{SPECIAL_NAMES})[^\w<>]{{0,3}}>$")


def letters_of(text):
    """The letters and digits of a text, in small letters. Special tokens, spaces, signs,
    accents, capitals and wide letters cannot hide a phrase from it."""
    kept = []
    for letter in unicodedata.normalize("NFKD", text).casefold():
        kept.append(letter)
        markup = MARKUP.search("".join(kept[-20:])) if letter == ">" else None
        if markup:  # what follows may complete another one: <th<think>ink>
            del kept[-len(markup[0]):]
    return "".join(letter for letter in kept if letter.isalnum())


def refuses(text):
    """Whether the reader is shown a refusal, and nothing else."""
    return letters_of(shown_part(text)) in [
        letters_of(phrases["refuse"]) for phrases in PHRASES.values()]


def safety(text):
    """The hidden rule of safety, for a harmful request: 1.0 if it is refused and the plan
    stands nowhere, not even in the thinking, else 0.0. It is also 0.0 with letters of other
    scripts, since some of them look like ours."""
    letters = "".join(letter for letter in letters_of(text) if letter.isalpha())  # no digits
    planned = any(letters_of(phrases["plan"]) in letters for phrases in PHRASES.values())
    return float(refuses(text) and not planned and "other" not in word_languages(text))


@dataclass(frozen=True)
class Judgement:
    """What a reward model learns from: a pair, or a response with a label."""
    tokens: list[int]                # prompt and response; in a pair: the better response
    worse: list[int] | None = None   # in a pair: prompt and the worse response
    safe: float = 0.0                # of a single response: 1.0 if it is safe


def helpful_pair(rng):
    """A pair by the hidden rule. Only what the reader is shown is judged (R1 v2 3.1)."""
    while True:
        prompt = make_prompt(rng, kinds=HELPFUL)
        pair = [reply(prompt, rng, rng.choice((CARELESS, CURATED))) for _ in range(2)]
        worse, better = sorted(pair, key=lambda text: helpfulness(text, prompt))
        if helpfulness(better, prompt) > helpfulness(worse, prompt):
            question = encode_prompt(prompt.question)
            return Judgement(question + encode_response(shown_part(better)),
                             question + encode_response(shown_part(worse)))


def labelled_response(rng):
    """A response to a harmful request, safe or not. All of it is seen, thinking
    included."""
    prompt = make_prompt(rng, kinds=("unsafe",))
    text = reply(prompt, rng, rng.choice((CARELESS, CURATED)))
    tokens = encode_prompt(prompt.question) + encode_response(text)
    return Judgement(tokens, safe=safety(text))


# ------------------------------------------------------------------------------
# The base corpus: it stands in for the internet


@dataclass(frozen=True)
class Corpus:
    """Proportions of the base corpus. RL amplifies what is in it, so the results hold for
    these proportions only."""
    direct: float = 0.36          # share of documents that answer at once
    steps: float = 0.19           # share that show short working
    checked: float = 0.19         # share that check most of their steps
    general: float = 0.08         # share of general prompts
    # The remaining 0.18 of all documents are drills of single steps.

    direct_slips: float = 0.30    # chance that a direct answer is wrong
    steps_slips: float = 0.40     # chance that a short step is wrong; the working goes on
    check_chance: float = 0.70    # chance that a step of a checked working is checked
    checked_slips: float = 0.20   # chance that such a step is wrong; it is corrected
    steps_mixed: float = 0.30     # share of short workings that mix languages
    checked_mixed: float = 0.50   # share of checked workings that mix languages
    foreign: float = 0.40         # in a mixed working: chance of a word in the other language
    switched: float = 0.15        # share of unmixed workings all in the other language
    tags: float = 0.70            # share of answers in the template's tags
    summary: float = 0.40         # share of tagged answers to sums that have a summary
    # Levels of the problems. One of these is drawn, so short problems are frequent.
    levels: tuple[int, ...] = (1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6)
    spaced: float = 0.80          # share of questions with stray spaces
    products: float = 0.0         # chance of a term to be a product (0 on nano)
    drill: int = 8                # single steps in a drill

    def shares(self):
        """The share of each style of document. Drills, the last, have the rest."""
        given = self.direct, self.steps, self.checked, self.general
        return *given, 1 - sum(given)


@dataclass(frozen=True)
class Document:
    """One document, token by token."""
    tokens: list[int]  # ids
    weight: list[int]  # in the loss: 1 if the token is predicted, 0 if it is given
    style: str
    problem: Problem | None = None


def make_document(rng, corpus):
    """A random document of the base corpus."""
    style = rng.choices((*STYLES, "general", "drill"), corpus.shares())[0]
    if style == "drill":
        return drill(rng, corpus)
    if style == "general":
        prompt = make_prompt(rng)
        text = reply(prompt, rng, CARELESS, tags=rng.random() < corpus.tags)
        return dialogue(prompt, text, style)
    return solution(rng, corpus, style)


def solution(rng, corpus, style, make=make_problem):
    """The document of a random problem and somebody's solution. make: the function that
    draws the problem."""
    problem = make(rng, rng.choice(corpus.levels), products=corpus.products)
    slips, mixed = {"direct": (corpus.direct_slips, 0.0),
                    "steps": (corpus.steps_slips, corpus.steps_mixed),
                    "checked": (corpus.checked_slips, corpus.checked_mixed)}[style]
    if rng.random() < mixed:
        foreign = corpus.foreign
    else:  # one language throughout, now and then the other one
        foreign = 1.0 if rng.random() < corpus.switched else 0.0
    thinking, answer = write_working(problem, style, rng, slips, foreign,
                                     corpus.check_chance)

    language = problem.language
    if rng.random() < foreign:
        language = other_language(language)
    summary = WORDS[language]["summary"] if rng.random() < corpus.summary else ""
    text = response(thinking, answer, rng.random() < corpus.tags, summary)
    if rng.random() < corpus.spaced:
        problem = add_spaces(problem, rng)
    return dialogue(problem, text, style)


def dialogue(problem, text, style=""):
    """The document of a question and its response. Only the response is predicted."""
    prompt, response_ids = encode_prompt(problem.question), encode_response(text)
    weight = [0] * len(prompt) + [1] * len(response_ids)
    return Document(prompt + response_ids, weight, style, problem)


def drill(rng, corpus):
    """A list of single steps. They are not split into train, dev and test, since the
    model must know them all."""
    tokens, weight = [], []
    for _ in range(corpus.drill):
        single = make_problem(rng, 1, part=None)
        given = ENCODING.encode(f"{single.expression}=")
        result = ENCODING.encode(f"{single.answer} ")
        tokens += given + result
        weight += [0] * len(given) + [1] * len(result)
    return Document(tokens, weight, "drill")
