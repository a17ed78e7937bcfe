"""Tests of studies/mixing.py: the mask of a language, and the arms."""
import dataclasses
import random
import re

import pytest
import torch

import grpo
import r1mini
import tasks
from engine.devices import copy_model
from studies import mixing
from tests.helpers import FEW_OF_STUDY, equal_states, random_micro, run_arm
from tools.settings import resolve_settings

RUN = resolve_settings("micro", FEW_OF_STUDY)


def test_mixing_mask_takes_the_letters_of_the_other_language():
    """Of all tokens, the mask of English questions takes those whose text is not ASCII, and the
    mask of Chinese ones those with Latin letters. Digits, signs and tags stay."""
    mask = mixing.Mask()
    for token, i in tasks.RANKS.items():
        text = token.decode("utf-8", errors="replace")
        assert (i in mask.forbidden["en"]) == (not text.isascii())
        assert (i in mask.forbidden["zh"]) == (re.search("[A-Za-z]", text) is not None)
    ids = set(tasks.encode_response("<think>25-7=18\n</think><answer>18</answer>"))
    for forbidden in mask.forbidden.values():
        assert not ids & set(forbidden.tolist())


@pytest.mark.parametrize("language", tasks.LANGUAGES)
def test_mixing_mask_is_in_sampler_and_trainer(language):
    """A random model writes letters of all kinds, and with the mask none of the other language.
    The trainer gives its tokens the probabilities with which they were drawn."""
    model = random_micro()
    problems = [p for p in tasks.make_problems("dev", 8, (3,)) if p.language == language]
    s = dataclasses.replace(RUN.zero, problems=len(problems), max_new_tokens=40)
    task = r1mini.make_task(RUN, s, r1mini.rule_rewards(s))
    task = dataclasses.replace(task, draw=lambda *_: problems)
    mask, other = mixing.Mask(), tasks.other_language(language)
    free = grpo.make_rollout(model, task, s, random.Random(0))
    mask.language = language
    model.head.register_forward_hook(mask)
    masked = grpo.make_rollout(model, task, s, random.Random(0))
    for rollout, wanted in ((free, True), (masked, False)):
        # Special tokens such as <|pause|>, which only a random model writes, are no words.
        text = re.sub(r"<\|\w+\|>", "", " ".join(rollout.texts))
        assert (other in tasks.word_languages(text)) == wanted
    samples = masked.samples
    column = torch.arange(samples.tokens.size(1))
    last = samples.answer.cumsum(1).argmax(1, keepdim=True)
    new, entropy = grpo.logprobs(model, samples.tokens, samples.answer, column <= last)
    assert torch.allclose(new, samples.logprobs, atol=1e-4)
    assert entropy.isfinite().all()


def test_mixing_tasks_of_the_arms():
    """zero is Zero's RL, unchanged. The other arms draw the same questions, of one language in a
    rollout, the languages in turn. They differ from each other in the language reward, or in the
    mask, which knows the language of the questions."""
    settings = {arm: mixing._settings(arm, RUN) for arm in mixing.ARMS}
    assert settings["zero"] == RUN.zero
    assert settings["free"] == settings["masked"] == dataclasses.replace(RUN.zero, beta=0.0)
    assert settings["reward"] == dataclasses.replace(
        settings["free"], language_weight=RUN.dev2.language_weight)
    mask, drawn = mixing.Mask(), {}
    for arm, s in settings.items():
        task = mixing._make_task(arm, RUN, s, mask if arm == "masked" else None)
        drawn[arm] = [task.draw(random.Random(step), 12, step) for step in range(2)]
        assert ("language_reward" in task.rewards) == (arm == "reward")
    assert drawn["free"] == drawn["masked"] == drawn["reward"]
    for problems, language in zip(drawn["free"], tasks.LANGUAGES):
        assert {p.language for p in problems} == {language}
    assert mask.language == tasks.LANGUAGES[1]
    usual = r1mini.make_task(RUN, RUN.zero, {}).draw
    assert drawn["zero"] == [usual(random.Random(step), 12, step) for step in range(2)]


def test_mixing_arms(monkeypatch, tmp_path):
    """Tiny runs: all arms start from the same base, whose numbers zero has. The masked arm does not
    mix."""
    monkeypatch.chdir(tmp_path)
    started, tested, test_model = [], [], mixing._test
    monkeypatch.setattr(mixing, "_test", lambda model, mask, *rest, **seed: (
        tested.append(mask is not None) or test_model(model, mask, *rest, **seed)))
    monkeypatch.setattr(mixing, "copy_model", lambda model: started.append(
        {key: weight.clone() for key, weight in model.state_dict().items()}) or copy_model(model))
    numbers = {arm: run_arm(mixing, arm, *FEW_OF_STUDY) for arm in mixing.ARMS}
    # On dev twice and on test; zero also tests the base, free and zero also with a mask.
    assert tested == [*[False] * 4, True, *[False] * 3, True, *[True] * 3, *[False] * 3]
    for weights in started:
        assert equal_states(started[0], weights)
    assert {"base.pass@1", "base.mask_at_test.pass@1"} <= set(numbers["zero"])
    assert "mask_at_test.pass@1" in numbers["free"] and "base.pass@1" not in numbers["free"]
    for found in numbers.values():
        assert {"pass@1", "dev1", "dev2"} <= set(found)
    masked = numbers["masked"]
    assert masked.get("mixing", 0.0) == 0.0 and masked.get("language", 1.0) == 1.0
    assert len(started) == len(mixing.ARMS) + 1  # and the base that is tested with a mask
