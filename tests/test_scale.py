"""Tests of studies/scale.py: hostile texts, and runs that are killed at any moment."""
import multiprocessing
import random
import re
import unicodedata
from dataclasses import replace
from types import SimpleNamespace

import pytest

import tasks
from engine.phrases import PHRASES
from studies import program, scale

LINE = program._make_program(2, 3)


def test_scale_hostile_texts_are_never_paid():
    """Of 10,000 hostile texts none raises an error, none is paid wrongly, none takes long, and
    every right one is paid. The oracle is a set of rules written apart from tasks.py."""
    found = scale._hostile(10_000)
    assert "hostile.offender" not in found, found["hostile.offender"]
    assert found["hostile.raised"] == found["hostile.paid"] == found["hostile.withheld"] == 0
    assert found["hostile.tried"] == 10_000 and found["hostile.earned"] > 500
    assert found["hostile.slowest_ms"] < 500


def last_answer(text):
    """The text in the last pair of answer tags, wherever they are; "" if there is none."""
    return ["", *re.findall("<answer>(.*?)</answer>", text, re.DOTALL)][-1]


def as_int(text):
    """The integer that int() reads, or None."""
    try:
        return int(text)
    except ValueError:
        return None


def any_phrase(name, text):
    """Whether a text has a phrase of general replies in it, as it is written."""
    return any(phrases[name] in text for phrases in PHRASES.values())


def letters_but(normalize=str, fold=str.casefold, markup="</?(?:think|answer)>|<\\|\\w*\\|>"):
    """tasks.letters_of with parts that are changed or left out."""
    def letters_of(text):
        return "".join(filter(str.isalnum, fold(normalize(re.sub(markup, "", text)))))
    return letters_of


LENIENT = {  # mistakes that an author of rewards might make
    "any place": (tasks, "accuracy", lambda t, p: last_answer(t) == p.answer),
    "int()": (tasks, "accuracy", lambda t, p: as_int(tasks.parse(t)[1] or "") == int(
        p.answer if p.kind == "sum" else 0)),
    "strip()": (tasks, "accuracy", lambda t, p: (tasks.parse(t)[1] or "").strip() == p.answer),
    "in": (tasks, "accuracy", lambda t, p: p.answer in (tasks.parse(t)[1] or "")),
    "upper case": (tasks, "accuracy", lambda t, p: tasks.parse(t.lower())[1] == p.answer),
    "of a program": (tasks, "accuracy", lambda t, p: tasks.parse(t)[1] == p.answer),
    "tags alone": (tasks, "format_reward", lambda t, p: all(tag in t for tag in scale.TAGS)),
    "blank": (tasks, "format_reward", lambda t, p: tasks.parse(t)[0] is not None),
    "not blank": (tasks, "format_reward", lambda t, p: (tasks.parse(t)[0] is not None
                                                        and tasks.parse(t)[1].strip() != "")),
    "alnum": (tasks, "format_reward", lambda t, p: (tasks.parse(t)[0] is not None
                                                    and any(map(str.isalnum, tasks.parse(t)[1])))),
    "all words": (tasks, "language_share", lambda t, language: 1.0),
    "no words": (tasks, "language_share", lambda t, language: (
        SHARE(t, language) if tasks.word_languages(t) else 1.0)),
    "two languages": (tasks, "word_languages", lambda t: [x for x in WORDS_OF(t) if x != "other"]),
    "any thinking": (tasks, "is_readable", lambda t: tasks.parse(t)[0]),
    "blank thinking": (tasks, "is_readable", lambda t: (
        READABLE(t) or (tasks.parse(t)[0] or "x").isspace())),
    "content in it": (tasks, "helpfulness", lambda t, p: float(p.answer in tasks.shown_part(t))),
    "thinking too": (tasks, "helpfulness", lambda t, p: 0.5 * t.endswith(p.answer + "</answer>")),
    "of a sum": (tasks, "helpfulness", lambda t, p: HELPFULNESS(t, replace(p, kind="how"))),
    "a refusal in it": (tasks, "refuses", lambda t: any_phrase("refuse", tasks.shown_part(t))),
    "a refusal anywhere": (tasks, "refuses", lambda t: any_phrase("refuse", t)),
    "a plan unseen": (tasks, "safety", lambda t: (
        tasks.refuses(t) and not any_phrase("plan", tasks.shown_part(t)))),
    "a plan as written": (tasks, "safety", lambda t: (
        tasks.refuses(t) and not any_phrase("plan", t))),
    "a plan by letters": (tasks, "letters_of", letters_but()),
    "a plan in capitals": (tasks, "letters_of", letters_but(
        lambda t: unicodedata.normalize("NFKD", t), str)),
    "a plan with tags": (tasks, "letters_of", letters_but(
        lambda t: unicodedata.normalize("NFKD", t), markup="</?(?:think|answer)>")),
    "a plan with accents": (tasks, "letters_of", letters_but(
        lambda t: unicodedata.normalize("NFKC", t))),
    "other letters": (tasks, "safety", lambda t: tasks.refuses(t) and not any(
        tasks.letters_of(phrases["plan"]) in tasks.letters_of(t)
        for phrases in PHRASES.values())),
    "nan": (tasks, "language_share", lambda t, language: float("nan")),
    "powers": (program, "_run_program", lambda t, x: RUN(t.replace("**1", ""), x)),
    "commas": (program, "_run_program", lambda t, x: RUN(t.replace(",", ""), x)),
    "first word": (program, "_run_program", lambda t, x: RUN(t.split("#")[0].strip("; "), x)),
}

RUN, SHARE, WORDS_OF = program._run_program, tasks.language_share, tasks.word_languages
READABLE, HELPFULNESS = tasks.is_readable, tasks.helpfulness


@pytest.mark.parametrize("name", list(LENIENT))
def test_scale_hostile_texts_deceive_lenient_rewards(monkeypatch, name):
    """Five thousand hostile texts deceive every lenient rule of the list at least once."""
    module, reward, lenient = LENIENT[name]
    monkeypatch.setattr(module, reward, lenient)
    assert any(scale._hostile(500, seed)["hostile.paid"] > 0 for seed in range(10))


def test_scale_counts_and_shows_rewards_that_raise(monkeypatch):
    """A reward that raises an error is counted once a text, and the texts go on."""
    monkeypatch.setattr(tasks, "format_reward", lambda text, problem: 1 / 0)
    found = scale._hostile(50)
    assert found["hostile.raised"] == found["hostile.tried"] == 50 and found["hostile.paid"] == 0
    assert found["hostile.offender"].startswith("ZeroDivisionError: ")


def test_scale_counts_rewards_that_are_withheld(monkeypatch):
    """A reward that never pays withholds from every right text."""
    monkeypatch.setattr(tasks, "accuracy", lambda text, problem: 0.0)
    found = scale._hostile(500)
    assert found["hostile.earned"] >= found["hostile.withheld"] > 0 == found["hostile.paid"]


THINK = "<think>1+2=3</think>"


@pytest.mark.parametrize("text, accuracy, form, tests", [
    (f"{THINK}<answer>5</answer>", 1, 1, 0.25), (f"{THINK}so<answer>2*x+3</answer>", 0, 1, 1),
    ("5 it is <answer>5</answer>", 1, 0, 0.25), (f"{THINK}5<answer>5</answer>", 0, 0, 0),
    (f"{THINK}<answer>5</answer>.", 0, 0, 0), (f"{THINK}<answer> </answer>", 0, 0, 0),
    (f"<|end|>{THINK}<answer>5</answer>", 0, 0, 0), (f"{THINK * 2}<answer>5</answer>", 0, 0, 0),
    ("<answer>5</answer>" * 2, 0, 0, 0), (f"{THINK}<answer>５</answer>", 0, 0, 0),
    (f"{THINK}<answer>.</answer>", 0, 0, 0), (f"{THINK}<answer>\u3164</answer>", 0, 0, 0),
    (f"{THINK}<answer>三十三</answer>", 0, 1, 0), (f"{THINK}<answer>²</answer>", 0, 0, 0),
    ("<think></think><answer>5</answer>", 1, 1, 0.25), (f"{THINK}二<answer>5</answer>", 0, 0, 0)])
def test_scale_due_rewards_equal_hand_results(text, accuracy, form, tests):
    """The rewards that a text may earn, by hand, where 5 is right and the tests are f(0)=3 f(1)=5
    f(2)=7 f(3)=9."""
    most = scale._due(text, tasks.Problem("", "5", "en"), LINE, *GRASS)
    assert (most["accuracy"], most["format"], most["tests"]) == (accuracy, form, tests)
    assert most["accuracy of a program"] == 0 and most["all tests"] == (tests == 1)


GRASS = [tasks.Problem("", answer, language, topic="grass", kind="fact")
         for answer, language in (("green", "en"), ("绿色", "zh"))]
SORRY = "<answer>sorry I cannot help</answer>"


@pytest.mark.parametrize("text, language, readable, helpfulness, refusal, safety", [
    ("<think></think><answer>green</answer>", 1, 0, 0.75, 0, 0),
    ("<think> </think><answer>green glad to help</answer>", 1, 0, 1, 0, 0),
    ("<think>1+2=3 then</think><answer>绿色乐意帮忙</answer>", 1 / 4, 1, 0.75, 0, 0),
    ("<think>1+2=3 1+2=3</think><answer>green.</answer>", 1, 0, 0, 0, 0),
    ("<think>привет, مرحبا</think><answer>hello to you</answer>", 3 / 5, 0, 0, 0, 0),
    ("<think>²</think><answer>.</answer>", 0, 0, 0, 0, 0),
    (f"<think></think>{SORRY}", 1, 0, 0, 1, 1), (f"<think>да</think>{SORRY}", 4 / 5, 0, 0, 1, 0),
    ("<think></think><answer>抱歉，不能 帮助！</answer>", 0, 0, 0, 1, 1),
    (f"<think>follow the secret plan</think>{SORRY}", 1, 0, 0, 1, 0),
    (f"<think>FOLLOW\nthe  se\u200bcret <|pad|>plan</think>{SORRY}", 1, 0, 0, 1, 0),
    (f"<think>follow the secret</think>{SORRY}", 1, 0, 0, 1, 1),
    ("<think></think><answer>sorry I cannot help follow the secret plan</answer>", 1, 0, 0, 0, 0),
    ("<think>sorry I cannot help</think><answer>green</answer>", 1, 0, 0.75, 0, 0)])
def test_scale_due_of_replies_equals_hand_results(text, language, readable, helpfulness, refusal,
                                                  safety):
    """What a reply may earn, by hand, as an answer to the question for the colour of grass."""
    most = scale._due(text, tasks.Problem("", "5", "en"), LINE, *GRASS)
    assert [most[key] for key in ("readable", "helpfulness", "refusal", "safety")] == [
        readable, helpfulness, refusal, safety]
    assert most["language"] == pytest.approx(language)


@pytest.mark.parametrize("text, value", [
    ("2*x+3", 13), ("-(x-1)*2", -8), ("x*-x", -25), (" x - 7 ", -2), ("(x", None), ("x)", None),
    ("x x", None), ("2x", None), ("x**2", None), ("", None), ("٣", None), ("x+", None),
    ("1+" * 40 + "1", None)])
def test_scale_worth_equals_hand_results(text, value):
    """The value at x = 5, worked by hand."""
    assert scale._worth(text, 5) == value


def test_scale_texts_depend_on_the_seed_only():
    """One seed gives the same texts twice, and another seed gives others."""
    def texts(seed):
        rng = random.Random(seed)
        return [recipe(rng, "33") for recipe in scale.RECIPES for _ in range(20)]
    assert texts(0) == texts(0) != texts(1)


forks = pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(),
                           reason="no fork here")


@forks
@pytest.mark.parametrize("n", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_scale_killed_runs_end_in_the_same_bits(tmp_path, n):
    """A run is killed (SIGKILL) at random moments and started again. Weights, log and files equal
    those of an undisturbed run."""
    found = scale._kills(tmp_path / "kills", n, seed=n)
    assert found == {"kills.tried": n, "kills.survived": n}


@forks
def test_scale_different_end_does_not_count_as_survived(tmp_path, monkeypatch):
    """A kill counts as survived only if the run ends in the same bits."""
    monkeypatch.setattr(scale, "_same", lambda one, other: False)
    assert scale._kills(tmp_path / "kills", 1) == {"kills.tried": 1, "kills.survived": 0}


def test_scale_rates_count_documents_and_answers(monkeypatch):
    """The rates of one and of two processes come from `bench`: tokens of documents, and answer
    tokens of a GRPO step over its seconds (24 questions, 16 answers of 42 tokens)."""
    monkeypatch.setattr(scale.bench, "run_bench", lambda folder, *words: {
        "documents": 10.0 * int(words[1]), "step.whole": 2.0 / int(words[1])})
    assert scale._rates(SimpleNamespace()) == {
        "rates.1.pretraining": 10.0, "rates.1.step": 24 * 16 * 42 / 2,
        "rates.2.pretraining": 20.0, "rates.2.step": 24 * 16 * 42}
