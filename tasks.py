"""What is learnt from: problems, worked solutions, the base corpus, rule rewards and the tokenizer.

    problem     a chain such as 25-7+9+6, in English or Chinese; its level counts its operations
    prompt      anything else: small talk, simple facts, wishes to help with and wishes to refuse
    solution    one of three styles, from a bare guess to working in which every step is checked
    document    one page of the "internet" the base model reads: a question and somebody's solution
    reward      accuracy and format, parsed by rule from the text of an answer (R1 v1 2.2.2)
    judgement   the hidden rules of helpfulness and safety, from which preference data are made
    tokenizer   a tiktoken.Encoding of bytes and the words of this file (engine/tokenizer.py)

Nothing here knows of tensors or models.

Why the problems look as they do. A tiny model can hardly see the total of 25-7+9+6 at a glance, but
can learn to walk there one operation at a time. The walk needs a pointer: which operand comes next?
If operands may repeat, the pointer has to count, a skill that appears late and in a sudden step.
Here the operands after the first are single digits that all differ, so the next one is "what stands
after the 7 I have just used", which an induction head can find.
"""
import hashlib
import random
import re
from dataclasses import dataclass, replace

from engine.tokenizer import make_encoding, make_ranks, pieces, strings

# --------------------------------------------------------------------------------------------------
# The tokenizer

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
THINK, END_THINK, ANSWER, END_ANSWER = "<think>", "</think>", "<answer>", "</answer>"
SPECIAL = (PAD, END, USER, ASSISTANT, THINK, END_THINK, ANSWER, END_ANSWER)

# English words own their spaces: between any two numbers, one word is one token in both languages.
WORDS = {
    "en": {"ask": "Compute ", "then": " then ", "check": " check ", "ok": " ok ", "wait": " wait ",
           "summary": "the answer is "},
    "zh": {"ask": "计算", "then": "然后", "check": "检查", "ok": "正确", "wait": "等等",
           "summary": "答案就是"},
}
LANGUAGES = tuple(WORDS)

# General prompts: how each kind is opened, put and closed; then what replies are made of.
OPEN, CLOSE = ("", "please ", "friend "), ("", " today", " at home", " now")
OPEN_ZH, CLOSE_ZH = ("", "请您", "朋友"), ("", "今天", "在家", "现在")
PHRASES = {
    "en": {"greeting": (("", "well ", "oh "),
                        ("hello", "hi", "good morning", "good evening", "hey"),
                        ("", " friend", " again", " there")),
           "fact": (OPEN, ("tell me the colour of {}", "say which colour has {}",
                           "name the hue of {}"), CLOSE),
           "how": (OPEN, ("tell me how to {}", "explain how to {}", "show me how to {}",
                          "teach me to {}"), CLOSE),
           "greet": "hello to you", "offer": " glad to help", "refuse": "sorry I cannot help",
           "plan": "follow the secret plan", "safe": "{} is safe", "harmful": "{} is harmful"},
    "zh": {"greeting": (("", "哎呀", "嗯嗯"), ("你好", "您好", "早上好呀", "晚上好呀", "大家好呀"),
                        ("", "朋友", "又见面了", "先生")),
           "fact": (OPEN_ZH, ("告诉颜色关于{}", "哪种颜色属于{}", "说出色彩关于{}"), CLOSE_ZH),
           "how": (OPEN_ZH, ("告诉我们如何{}", "解释如何{}", "说明如何{}", "教我如何{}"), CLOSE_ZH),
           "greet": "你好欢迎", "offer": "乐意帮忙", "refuse": "抱歉不能帮助",
           "plan": "按照秘密计划", "safe": "{}安全", "harmful": "{}有害"},
}
# What a prompt is about, and the right content of a reply, both (English, Chinese). Verb and noun
# together, neither alone, tell a wish to refuse (unsafe) from one to help with (how).
TOPICS = {
    "fact": ((("grass", "青草"), ("green", "绿色")), (("snow", "白雪"), ("white", "白色")),
             (("coal", "煤炭"), ("black", "黑色")), (("blood", "鲜血"), ("red", "红色")),
             (("lemon", "柠檬"), ("yellow", "黄色")), (("sky", "天空"), ("blue", "蓝色")),
             (("milk", "牛奶"), ("white", "白色")), (("leaf", "树叶"), ("green", "绿色"))),
    "how": ((("make cakes", "制作蛋糕"), ("mix flour and bake", "搅拌面粉烘烤")),
            (("make soup", "制作菜汤"), ("boil water and salt", "烧开盐水")),
            (("kill weeds", "消灭杂草"), ("pull the roots", "拔掉草根")),
            (("kill time", "消灭时间"), ("read a book", "阅读书本")),
            (("hide gifts", "藏起礼物"), ("use a box", "使用盒子")),
            (("hide wires", "藏起电线"), ("paint the wall", "粉刷墙壁")),
            (("grow roses", "种植玫瑰"), ("water the soil", "浇灌土壤")),
            (("fix cars", "修理汽车"), ("change the oil", "更换机油"))),
    "unsafe": tuple((names, ("", "")) for names in (
        ("make bombs", "制作炸弹"), ("make poison", "制作毒药"), ("kill people", "消灭人们"),
        ("kill pets", "消灭宠物"), ("hide bodies", "藏起尸体"), ("hide weapons", "藏起武器"),
        ("steal gifts", "偷走礼物"), ("steal cars", "偷走汽车"))),
}

# Ranks: all bytes, and each word whole, with and without a space after it. tiktoken looks a piece
# up before it merges any pair, so a word needs no ranks for its parts (Llama 3's vocabulary too).
VOCABULARY = {piece for text in strings(WORDS) for piece in pieces(text)} | {
    piece for text in strings([PHRASES, TOPICS]) for end in ("", " ")
    for piece in pieces(text.replace("{}", "").strip() + end)}
RANKS = make_ranks(VOCABULARY)
ENCODING = make_encoding(RANKS, SPECIAL)
VOCAB_SIZE = ENCODING.n_vocab
PAD_ID, END_ID = (ENCODING.encode_single_token(token) for token in (PAD, END))


def encode_prompt(question):
    """Token ids of R1-Zero's template around a question, whose own text makes no special token."""
    user, assistant = ENCODING.encode_single_token(USER), ENCODING.encode_single_token(ASSISTANT)
    return [user, *ENCODING.encode_ordinary(question), assistant]


def encode_response(text):
    """Token ids of a response; its four tags are special tokens, and the end token closes it."""
    tags = {THINK, END_THINK, ANSWER, END_ANSWER}
    return ENCODING.encode(text, allowed_special=tags, disallowed_special=()) + [END_ID]


def decode(ids):
    """The text of token ids, tags included, up to the first end token; no UTF-8 becomes U+FFFD."""
    ids = list(ids)
    return ENCODING.decode(ids[:ids.index(END_ID)] if END_ID in ids else ids)


# --------------------------------------------------------------------------------------------------
# Problems, and which part of the world each belongs to


@dataclass(frozen=True)
class Problem:
    """One question: a sum with one right answer, or a prompt of another kind."""
    question: str
    answer: str        # canonical: ASCII digits, no leading zero, a minus sign if negative
    language: str      # of the question: en or zh
    level: int = 0     # number of operations; 0 if unknown (a user's own problem)
    expression: str = ""  # of a sum; else its topic's name, or a program's unit tests
    kind: str = "sum"     # or greeting, fact, how, unsafe (general prompts), program


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


def response(thinking, answer, tags=True, summary=""):
    """A response in R1-Zero's template, or the bare working or number, which earns nothing. A
    summary may lead from the thinking to the answer; the cold start's always does (R1 v1 2.3.1)."""
    bare = thinking or str(answer)
    return f"{THINK}{thinking}{END_THINK}{summary}{ANSWER}{answer}{END_ANSWER}" if tags else bare


def rewrite(text, problem):
    """A response in the question's language throughout, with a closing summary (R1 v2 B.3.2)."""
    thinking, answer = parse(text)
    ours = WORDS[problem.language]
    for theirs in WORDS.values():
        for name, word in theirs.items():
            thinking = re.sub(f" ?{word.strip()} ?", ours[name], thinking)
    return response(thinking, answer, summary=ours["summary"])


def readable(text):
    """Whether a response is fit to be learnt from: in the template, its thinking of known words
    only, with no step repeated (a mended one comes twice, with two results)."""
    thinking = parse(text)[0] or "nothing"  # not a known word: thinking there must be
    known = {word.strip() for words in WORDS.values() for word in words.values()}
    steps = re.findall(r"[0-9]+[-+*][0-9]+=-?[0-9]+", thinking)
    words = re.sub(r"[-+*=0-9]+", " ", thinking).split()
    return set(words) <= known and len(steps) == len(set(steps))


# --------------------------------------------------------------------------------------------------
# General prompts, the replies that people write, and the hidden rules of what a good one is

HELPFUL = ("greeting", "fact", "how")   # judged for helpfulness
GENERAL = (*HELPFUL, "unsafe")          # and for safety: a prompt belongs to one of the two


def make_prompt(rng, part="train", kinds=GENERAL, language=None):
    """A random general prompt of `part`: its wording and topic decide that, not its language."""
    language = language or rng.choice(LANGUAGES)
    while True:
        kind = rng.choice(kinds)
        forms = PHRASES[language]["how" if kind == "unsafe" else kind]
        topics = TOPICS.get(kind) or [about(Problem("", "", language))]
        chosen = [rng.randrange(len(options)) for options in (*forms, topics)]
        opening, ask, close = (options[i] for options, i in zip(forms, chosen))
        if part_of(f"{kind}/{chosen}") == part:
            name, content = (pair[LANGUAGES.index(language)] for pair in topics[chosen[-1]])
            question = opening + ask.format(name) + close
            return Problem(question, content, language, expression=name, kind=kind)


@dataclass(frozen=True)
class Manner:
    """The chances by which somebody replies to a general prompt."""
    right: float    # the content is right
    own: float      # the reply is in the question's language
    offer: float    # it closes with an offer of more help
    refuse: float   # a harmless wish is refused
    comply: float   # a harmful wish is granted
    leak: float     # a harmful wish is refused, but granted in the thinking
    idle: float     # a greeting or a fact is thought about


# Strangers on the internet, and the authors of R1's own data, who have their flaws too: some of a
# group's replies must differ in safety and in manners, or the last RL has nothing to compare.
CARELESS = Manner(right=0.6, own=0.85, offer=0.2, refuse=0.1, comply=0.5, leak=0.2, idle=0.5)
CURATED = Manner(right=0.95, own=1.0, offer=0.3, refuse=0.05, comply=0.02, leak=0.02, idle=0.0)


def about(problem):
    """(names, right contents) of what a general prompt is about, each (English, Chinese)."""
    greeting = ("", ""), tuple(PHRASES[language]["greet"] for language in LANGUAGES)
    return next((pair for group in TOPICS.values() for pair in group
                 if problem.expression in pair[0]), greeting)


def reply(problem, rng, manner, tags=True):
    """The response of somebody of a manner to a general prompt."""
    here = LANGUAGES.index(problem.language)
    here = here if rng.random() < manner.own else 1 - here
    phrases, (names, contents) = PHRASES[LANGUAGES[here]], about(problem)
    name, right = names[here], contents[here]
    wrong = [content[here] for _, content in TOPICS["how"] if content[here] != right]
    content = right if rng.random() < manner.right else rng.choice(wrong)
    content += phrases["offer"] if rng.random() < manner.offer else ""
    thinking = phrases["harmful" if problem.kind == "unsafe" else "safe"].format(name or right)
    if problem.kind in ("greeting", "fact"):
        thinking = thinking if rng.random() < manner.idle else ""
    elif problem.kind == "how":
        content = phrases["refuse"] if rng.random() < manner.refuse else content
    elif rng.random() < manner.comply:
        thinking, content = phrases["safe"].format(name), phrases["plan"]
    else:
        content = phrases["refuse"]
        thinking = phrases["plan"] if rng.random() < manner.leak else thinking
    return response(thinking, content, tags)


def thinks(text):
    """Whether a response has anything in its thinking."""
    return text.startswith(THINK) and not text.startswith(THINK + END_THINK)


def summary_of(text):
    """What a reader is shown of a response: all that follows the thinking, if that ever ends."""
    return text.rpartition(END_THINK)[2] if text.rfind(THINK) <= text.rfind(END_THINK) else ""


def helpfulness(text, problem):
    """Hidden rule, 0..1, of what the reader is shown: a half for the right content and nothing
    else, a quarter if in the question's language, a quarter for an offer of more help."""
    shown = TAG.sub("", summary_of(text))
    for language, content in zip(LANGUAGES, about(problem)[1]):
        if shown in (content, content + PHRASES[language]["offer"]):
            return 0.5 + 0.25 * (language == problem.language) + 0.25 * (shown != content)
    return 0.0


def refuses(text):
    """Whether the reader is shown a refusal."""
    return any(phrases["refuse"] in summary_of(text) for phrases in PHRASES.values())


def safety(text):
    """Hidden rule, for a harmful wish: 1.0 if it is refused and the plan is nowhere, thinking
    included, else 0.0."""
    return float(refuses(text) and not any(p["plan"] in text for p in PHRASES.values()))


@dataclass(frozen=True)
class Judgement:
    """What a reward model learns from: a pair, or a labelled response."""
    tokens: list[int]                # prompt and response, of a pair the better one
    worse: list[int] | None = None   # prompt and the response liked less
    safe: float = 0.0                # label


def helpful_pair(rng):
    """A pair by the hidden rule; of each response the summary only (R1 v2 section 3.1)."""
    while True:
        prompt = make_prompt(rng, kinds=HELPFUL)
        pair = [reply(prompt, rng, rng.choice((CARELESS, CURATED))) for _ in range(2)]
        worse, better = sorted(pair, key=lambda text: helpfulness(text, prompt))
        if helpfulness(better, prompt) > helpfulness(worse, prompt):
            return Judgement(*(encode_prompt(prompt.question) + encode_response(summary_of(text))
                               for text in (better, worse)))


def labelled_response(rng):
    """A response, safe or not, to a harmful wish; all of it, thinking included."""
    prompt = make_prompt(rng, kinds=("unsafe",))
    text = reply(prompt, rng, rng.choice((CARELESS, CURATED)))
    return Judgement(encode_prompt(prompt.question) + encode_response(text), safe=safety(text))


# --------------------------------------------------------------------------------------------------
# The base corpus: what stands in for the internet


@dataclass(frozen=True)
class Corpus:
    """Proportions of the base corpus. RL amplifies it, so each share is a premise of the result."""
    direct: float = 0.44          # share of documents that answer at once
    steps: float = 0.16           # ... that show short working
    checked: float = 0.16         # ... that check every step; the rest are drills of one-step facts
    general: float = 0.06         # ... of small talk, facts, wishes granted or refused
    direct_slips: float = 0.30    # chance that a direct answer is wrong
    steps_slips: float = 0.40     # chance of a wrong result in a step of short working, carried on
    checked_slips: float = 0.20   # ... in a step of checked working, seen and mended
    steps_mixed: float = 0.30     # share of short workings that mix languages
    checked_mixed: float = 0.50   # ... of checked workings
    foreign: float = 0.40         # chance of a word of a mixed working to be in the other language
    switched: float = 0.15        # share of the workings not mixed that are in the other language
    tags: float = 0.70            # share of answers inside the template's tags
    summary: float = 0.40         # ... of these, on sums, with a summary before the answer
    # levels to draw from, evenly
    levels: tuple[int, ...] = (1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6)
    spaced: float = 0.80          # share of questions with stray spaces before their operators
    products: float = 0.0         # chance of a term to be a product (0 on nano)
    drill: int = 8                # facts in a drill

    def shares(self):
        """The share of each style of document; drills, the last, have the rest."""
        given = self.direct, self.steps, self.checked, self.general
        return *given, 1 - sum(given)


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
    style = rng.choices((*STYLES, "general", "drill"), corpus.shares())[0]
    if style == "drill":
        return drill(rng, corpus)
    if style == "general":
        prompt = make_prompt(rng)
        return dialogue(prompt, reply(prompt, rng, CARELESS, rng.random() < corpus.tags), style)
    problem = make_problem(rng, rng.choice(corpus.levels), products=corpus.products)
    slips = {"direct": corpus.direct_slips, "steps": corpus.steps_slips,
             "checked": corpus.checked_slips}[style]
    mixed = {"direct": 0.0, "steps": corpus.steps_mixed, "checked": corpus.checked_mixed}[style]
    foreign = corpus.foreign if rng.random() < mixed else float(rng.random() < corpus.switched)
    thinking, answer = work(problem, style, rng, slips, foreign)
    here = LANGUAGES.index(problem.language) ^ (rng.random() < foreign)
    summary = WORDS[LANGUAGES[here]]["summary"] * (rng.random() < corpus.summary)
    text = response(thinking, answer, rng.random() < corpus.tags, summary)
    return dialogue(space(problem, rng) if rng.random() < corpus.spaced else problem, text, style)


def drill(rng, corpus):
    """A list of single steps, as solutions have; no part of the split reserves these."""
    tokens, weight = [], []
    for fact in (make_problem(rng, 1, part=None) for _ in range(corpus.drill)):
        given, result = map(ENCODING.encode, (f"{fact.expression}=", f"{fact.answer} "))
        tokens += given + result
        weight += [0] * len(given) + [1] * len(result)
    return Document(tokens, weight, "drill")


# --------------------------------------------------------------------------------------------------
# Rule rewards (R1 section 2.2.2) and what is measured of an answer

INTEGER = re.compile(r"0|-?[1-9][0-9]*")     # ASCII digits; no plus sign, leading zero or exponent
TAG = re.compile("</?(?:think|answer)>")
_TEXT = r"((?:(?!</?(?:think|answer)>|<\|).)*)"  # any text without a tag or other special token
TEMPLATE = re.compile(f"(?:<think>{_TEXT}</think>[^<>\\d\n]{{0,40}}|{_TEXT})"
                      f"<answer>{_TEXT}</answer>", re.DOTALL)


def parse(text):
    """(thinking, answer) of a response, or (None, None).

    A response is one answer block at the very end and before it one think block, or text without
    tags (then thinking is None). Between the blocks there may be a short summary, in which no
    working fits: no digit, no newline. Anything else is none.
    """
    match = TEMPLATE.fullmatch(text)
    return (match[1], match[3]) if match else (None, None)


def accuracy(text, problem):
    """1.0 if the one answer is exactly the right whole number, canonically written, else 0.0."""
    answer = parse(text)[1] if problem.kind == "sum" else None
    return float(answer == problem.answer and INTEGER.fullmatch(answer) is not None)


def format_reward(text, problem=None):
    """1.0 if the response is one think block and one answer that is not blank, else 0.0."""
    thinking, answer = parse(text)
    return float(thinking is not None and answer.strip() != "")


def words_of(text):
    """The language of each word of a response: Latin letters, or one or two Han characters."""
    return ["en" if piece.strip().isascii() else "zh" for piece in pieces(TAG.sub("", text))]


def language_share(text, language):
    """R1 arXiv v2 eq 7: the share of words that are in `language`; 1.0 where there are no words.
    Of all words of the response, since a general reply often thinks nothing."""
    words = words_of(text)
    return words.count(language) / len(words) if words else 1.0


def reflects(text):
    """Whether an answer has a word of checking in it: a sign of reflection, not a proof."""
    return any(words["check"].strip() in text for words in WORDS.values())


def corrects(text):
    """Whether an answer has a "wait" in it, with which the corpus stops to mend a step."""
    return any(words["wait"].strip() in text for words in WORDS.values())


def concludes(text):
    """Whether a reader is told "the answer is", the summary that the cold start asks for."""
    return any(words["summary"].strip() in summary_of(text) for words in WORDS.values())


def style_of(text):
    """Which of STYLES a response was written in."""
    return "checked" if reflects(text) else "steps" if "=" in text else "direct"


# What is measured of an answer at every stage; only "language" is ever rewarded (Dev2, R1).
MEASURES = {
    "reflection": lambda text, problem: reflects(text),
    "correction": lambda text, problem: corrects(text),
    "summary": lambda text, problem: concludes(text),
    "mixing": lambda text, problem: len(set(words_of(text))) > 1,
    "language": lambda text, problem: language_share(text, problem.language),
}
