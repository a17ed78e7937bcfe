"""Tests of studies/few_shot.py: prompts with worked examples, and fine-tuning on them."""
import dataclasses
import random
from collections import Counter

import moe
import tasks
from studies import few_shot
from tests.helpers import FEW_OF_STUDY, random_micro, run_arm, use_random_micro
from tools.settings import resolve_settings

RUN = resolve_settings("micro", FEW_OF_STUDY)


def test_few_shot_prompts():
    """A prompt is whole dialogues, right and in the question's language, and then the question."""
    rng = random.Random(0)
    for problem in tasks.make_problems("test", 20, (6,)):
        assert few_shot._with_examples(problem, 0, rng) == tasks.encode_prompt(problem.question)
        ids = few_shot._with_examples(problem, 2, rng)
        assert len(ids) + 200 <= moe.NANO.max_seq_len
        text = tasks.ENCODING.decode(ids)
        *examples, last = text.split(tasks.END)
        assert last == f"{tasks.USER}{problem.question}{tasks.ASSISTANT}" and len(examples) == 2
        for example in examples:
            question, answer = example.removeprefix(tasks.USER).split(tasks.ASSISTANT)
            ask = tasks.WORDS[problem.language]["ask"]
            assert str(eval(question.removeprefix(ask))) == tasks.parse(answer)[1]
            assert set(tasks.word_languages(answer)) <= {problem.language}


def test_few_shot_padding_is_as_long_as_examples():
    """General dialogues, and then the question. The prompt is as long as the one with examples, or
    longer by one dialogue at most."""
    rng = random.Random(0)
    for problem in tasks.make_problems("test", 20, (6,)):
        length = len(few_shot._with_examples(problem, 2, rng))
        ids = few_shot._with_padding(problem, length, rng)
        assert length <= len(ids) <= length + 60
        assert len(ids) + 200 <= moe.NANO.max_seq_len
        *dialogues, last = tasks.ENCODING.decode(ids).split(tasks.END)
        assert last == f"{tasks.USER}{problem.question}{tasks.ASSISTANT}"
        asked = [text.removeprefix(tasks.USER).split(tasks.ASSISTANT)[0] for text in dialogues]
        prompts = {prompt.question for kind in tasks.GENERAL
                   for prompt in tasks.all_prompts("train", kind, problem.language)}
        assert asked and set(asked) <= prompts


def test_few_shot_documents_are_own_right_answers(monkeypatch):
    """By hand: every second answer of a model is right. It learns from these alone, and the prompt
    with its examples is not predicted. 0, 1 and 2 examples and padding are about equally
    frequent."""
    documents = []

    def sample(model, prompts, *_, **__):
        answers = []
        for i, prompt in enumerate(prompts):
            asked = tasks.ENCODING.decode(prompt)
            total = eval("".join(c for c in asked if c in "0123456789+-"))  # our own text
            answers.append(tasks.encode_response(tasks.response("1+2=3", total + i % 2)))
        return answers
    monkeypatch.setattr(few_shot, "sample_answers", sample)
    monkeypatch.setattr(few_shot, "one_of", documents.extend)
    monkeypatch.setattr(few_shot, "train", lambda *_: ())
    run = dataclasses.replace(RUN, data=dataclasses.replace(RUN.data, stand_in=False))
    _, n_documents = few_shot._fine_tune(random_micro(), run)
    assert len(documents) == n_documents == few_shot.QUESTIONS * run.data.tries / 2
    counts = Counter()
    for document in documents:
        first = document.weight.index(1)
        assert document.weight == [0] * first + [1] * (len(document.tokens) - first)
        prompt = tasks.ENCODING.decode(document.tokens[:first])
        *examples, question = prompt.split(tasks.END)
        total = eval("".join(c for c in question if c in "0123456789+-"))
        assert tasks.decode(document.tokens[first:]) == tasks.response("1+2=3", total)
        asks = tuple(tasks.USER + words["ask"] for words in tasks.WORDS.values())
        are_sums = all(example.startswith(asks) for example in examples)
        counts[len(examples) if are_sums else few_shot.PADDING] += 1
    assert set(counts) == {*few_shot.SHOTS, few_shot.PADDING}
    assert min(counts.values()) > 0.18 * len(documents)


def test_few_shot_arm(monkeypatch, tmp_path):
    """A tiny run has numbers for each number of examples, before and after fine-tuning."""
    use_random_micro(few_shot, monkeypatch, tmp_path)
    numbers = run_arm(few_shot, "r1", *FEW_OF_STUDY)
    wanted = {f"{when}{kind}.pass@1" for when in ("", "before.") for kind in few_shot.KINDS}
    assert wanted <= set(numbers)
