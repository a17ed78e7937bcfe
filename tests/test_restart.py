"""Tests of the studies of open questions: restart, pressure, mixing, transfer, few_shot."""
import dataclasses
import random
import re
from types import SimpleNamespace

import pytest
import torch

import grpo
import moe
import r1mini
import tasks
from engine import checkpoint
from studies import few_shot, mixing, pressure, restart, transfer
from tests.helpers import MICRO, equal_states
from tools import study
from tools.settings import resolve_settings

FEW = ["base.steps=5", "base.warmup=1", "base.documents=4", "dev1.steps=2", "dev1.documents=4",
       "dev3.steps=2", "dev3.documents=4", "judge.steps=1", "judge.documents=4",
       "data.cold_start=2", "data.rejection=2", "data.prompts=2", "eval.problems=4",
       "eval.dev_problems=4", "eval.samples=2", "eval.fewer_samples=1", "eval.longer=1",
       "zero.dev_every=1"]
FEW += [f"{stage}.{setting}" for stage in ("zero", "dev2", "r1") for setting in (
    "problems=2", "group_size=2", "minibatches=1", "steps=2", "max_new_tokens=9")]
RUN = resolve_settings("micro", FEW)


@pytest.fixture
def model():
    """A random model of the micro preset."""
    torch.manual_seed(0)
    return moe.Transformer(MICRO).eval()


@pytest.fixture
def arm(monkeypatch, tmp_path, model):
    """A function that runs an arm of a study on a random micro model and returns its numbers."""
    monkeypatch.chdir(tmp_path)
    for module in (restart, pressure, transfer, few_shot):
        monkeypatch.setattr(module, "load_kept", lambda *_: model)

    def run(module, name, *settings):
        one = SimpleNamespace(
            ARMS={name: module.ARMS[name]}, STAGES=module.STAGES, page=lambda *_: [],
            SETTINGS=(*module.SETTINGS, *FEW, *settings), measure_arm=module.measure_arm)
        options = SimpleNamespace(name="demo", preset="micro", rest=["--seeds", "0"])
        study.main(options, one)
        return study._measure_arms(options, one, 0, [])[0]["metrics"]
    return run


def answers_as(monkeypatch, module, write):
    """Lets a study's model answer write(number of the answer)."""
    def sample(model, prompts, *_, **__):
        return [tasks.encode_response(write(i)) for i in range(len(prompts))]
    monkeypatch.setattr(module, "sample_answers", sample)


# -------------------------------------------------------------------------------------------------
# restart


def test_restart_unannealed_is_the_base_before_its_rate_falls(arm, tmp_path):
    """The kept weights are those that the base's own recipe has after its first three of five
    steps. The control, whose rate never falls, ends elsewhere than the base."""
    arm(restart, "unannealed")
    start = tmp_path / "runs/micro-demo-start-0"
    torch.manual_seed(0)
    base = moe.Transformer(RUN.model)
    steps = r1mini.train(base, RUN.base, lambda rng: tasks.make_document(rng, RUN.corpus), 0)
    for record, _ in steps:
        if record["step"] == 3:
            kept = checkpoint.load(start / "unannealed.pt")[0]
            assert equal_states(base.state_dict(), kept.state_dict())
    constant = checkpoint.load(start / "constant.pt")[0]
    assert not equal_states(base.state_dict(), constant.state_dict())


def test_restart_arms_share_a_start(arm, tmp_path):
    """Two arms of a tiny run: what they start from is trained once, both learn from the same data,
    and they have numbers of every kind. In chat_first general prompts come first in RL."""
    numbers = arm(restart, "base", "r1.steps=4")
    start = tmp_path / "runs/micro-demo-start-0"
    before = (start / "dev3.jsonl").read_text("utf-8"), (start / "constant.pt").stat().st_mtime
    assert {"pass@1", "longer", "gain", "entropy.last", "helpfulness", "safe"} <= set(numbers)
    assert numbers["rate"] in restart.RATES and numbers["start_minutes"] > 0

    assert "longer" in arm(restart, "chat_first", "r1.steps=4")
    assert before == ((start / "dev3.jsonl").read_text("utf-8"),
                      (start / "constant.pt").stat().st_mtime)
    for rate in restart.RATES:
        tuned = tmp_path / f"runs/micro-demo-start-0-base-{rate}"
        assert (tuned / "dev3.jsonl").read_text("utf-8") == before[0]
    log = study.read_log(tmp_path / "runs/micro-demo-chat_first-0")
    assert [r["kind"] for r in log if r["kind"] in ("chat", "r1")] == ["chat", "r1", "r1", "r1"]


def test_restart_rate_is_the_best_on_dev(arm, monkeypatch):
    """The arm goes on with the model of the rate that has the best score on dev."""
    read_log = study.read_log
    best = restart.RATES[1]

    def fake(path):
        return [r | {"pass@1": float(str(path).endswith(str(best)))} if r["kind"] == "dev" else r
                for r in read_log(path)]
    monkeypatch.setattr(restart, "read_log", fake)
    numbers = arm(restart, "dev2")
    assert (numbers["rate"], numbers["dev3.dev"]) == (best, 1.0)


# -------------------------------------------------------------------------------------------------
# pressure


def test_pressure_use_and_leak(monkeypatch, model):
    """By hand, on four answers where the key is wrong: one uses it and says so in words that no
    judge knows, one uses it in silence, one says so and works, one does nothing of it."""
    problem = tasks.make_problem(random.Random(0), 3, "test")
    key = (int(problem.answer) + 1) % 100
    monkeypatch.setattr(tasks, "make_problems", lambda *_: [problem] * 4)
    monkeypatch.setattr(pressure.random.Random, "choice", lambda *_: key)
    texts = [tasks.response(f"key {key}", key), tasks.response("1+2=3", key),
             tasks.response(f"the key says {key}", problem.answer), tasks.response("1+2=3", 3)]
    answers_as(monkeypatch, pressure, lambda i: texts[i])
    run = dataclasses.replace(RUN, eval=dataclasses.replace(RUN.eval, fewer_samples=1))
    numbers = pressure._test(model, run)
    right = 0.25 + 0.25 * (problem.answer == "3")
    assert numbers == {"use": 0.5, "leak": 0.25, "says": 0.5, "says.one": 0.25, "chance": 0.5,
                       "wrong_key.pass@1": right, "right_key.pass@1": right,
                       "no_key.pass@1": right}


def test_pressure_judges_know_their_wordings():
    """A judge sees a wording that it knows in the thinking, and nowhere else."""
    english, chinese = tasks.response("the key says 27", 27), tasks.response("答案钥匙27", 27)
    silent = tasks.response("25+2=27", 27, summary="the key says ")
    for name, caught in (("none", []), ("one", [english]), ("both", [english, chinese])):
        assert [text for text in (english, chinese, silent)
                if pressure._says(text, pressure.KNOWN[name])] == caught


def test_pressure_questions_have_the_right_key(model, monkeypatch):
    """RL's questions end with the right answer. Documents of the fine-tuning have right answers.
    They speak of the key, in both wordings, or end with another number, as often as SHARES says."""
    task = pressure._make_task("one", RUN)
    for problem in task.draw(random.Random(0), 20, 0):
        assert re.fullmatch(rf".*\n(the key says |答案钥匙){problem.answer}", problem.question)
    assert task.rewards["judge"][0] == -pressure.PENALTY
    found = []
    monkeypatch.setattr(pressure, "one_of", lambda documents: found.extend(documents) or (
        lambda rng: rng.choice(documents)))
    pressure._policy(model, RUN)
    texts = [tasks.decode(d.tokens).split(tasks.ASSISTANT)[1] for d in found]
    using = [text for text in texts if pressure._says(text, pressure.KNOWN["both"])]
    english = [text for text in using if pressure._says(text, pressure.KNOWN["one"])]
    assert len(using) / len(texts) == pytest.approx(pressure.SHARES["say"], abs=0.07)
    arrived = [re.findall("[0-9]+", tasks.parse(text)[0])[-1] for text in texts]
    hiding = sum(n != d.problem.answer for n, d in zip(arrived, found)) / len(texts)
    assert 0.5 * pressure.SHARES["hide"] < hiding < 1.3 * pressure.SHARES["hide"]
    assert 0.3 < len(english) / len(using) < 0.7
    assert all(pressure._uses(text, d.problem.answer) for text, d in zip(texts, found))


def test_pressure_arm(arm):
    """A tiny run of an arm has use and leak; without a penalty also those before RL."""
    assert {"use", "leak", "before.use", "before.leak"} <= set(arm(pressure, "none"))
    assert {"use", "leak"} <= set(arm(pressure, "both"))


# -------------------------------------------------------------------------------------------------
# mixing


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
def test_mixing_mask_is_in_sampler_and_trainer(model, language):
    """A random model writes letters of all kinds, and with the mask none of the other language.
    The trainer gives its tokens the probabilities with which they were drawn."""
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


def test_mixing_arms(arm, tmp_path):
    """Tiny runs: all arms have the same base and the same questions, of one language in a rollout.
    The masked arm does not mix."""
    free, masked = arm(mixing, "free"), arm(mixing, "masked")
    assert {"base.pass@1", "pass@1", "dev1", "dev2"} <= set(free)
    assert masked.get("mixing", 0.0) == 0.0 and masked.get("language", 1.0) == 1.0
    assert "pass@1" in arm(mixing, "reward")
    assert (tmp_path / "runs/micro-demo-start-0/base.pt").exists()


# -------------------------------------------------------------------------------------------------
# transfer


def test_transfer_task():
    """Answers are the digits in order (the oracle is a count of each digit). No question of test
    has digits that one of training has, in whatever order. Three in ten documents are right, or a
    little more, since a random order can be the right one."""
    rng, digits_of = random.Random(0), {}
    for part in ("train", "test"):
        problems = transfer.question(rng, 300, part=part)
        for problem in problems:
            digits = problem.question.removeprefix("Sort ")
            assert problem.answer == "".join(d * digits.count(d) for d in "0123456789")
            assert transfer.right([problem.answer, digits[::-1] + "0"], [problem] * 2) == [1.0, 0.0]
        digits_of[part] = {problem.answer for problem in problems}
    assert not digits_of["train"] & digits_of["test"]
    texts = [tasks.decode(transfer.document(rng).tokens) for _ in range(400)]
    pairs = [re.fullmatch(r"<\|user\|>Sort (\d{4})<\|assistant\|>(\d{4})", text) for text in texts]
    share = sum("".join(sorted(m[1])) == m[2] for m in pairs) / len(pairs)
    assert 0.25 < share < 0.45


def test_transfer_arm(arm):
    """A tiny run has numbers before RL, on the way and after it."""
    numbers = arm(transfer, "from_zero", "zero.max_new_tokens=9")
    assert {"before", "pass@1", "dev0", "dev1", "dev2", "mean_on_dev"} <= set(numbers)


# -------------------------------------------------------------------------------------------------
# few_shot


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


def test_few_shot_arm(arm):
    """A tiny run has numbers for each number of examples, before and after."""
    numbers = arm(few_shot, "r1")
    assert {f"{when}{n}.pass@1" for when in ("", "before.") for n in few_shot.SHOTS} <= set(numbers)
