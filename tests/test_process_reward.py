"""Tests of the studies of what did not work: hacked_judge, process_reward, faithful."""
import random
import re
from types import SimpleNamespace

import pytest
import torch

import grpo
import moe
import tasks
from studies import faithful, hacked_judge, process_reward
from tests.helpers import MICRO, make_judge
from tools import study
from tools.settings import resolve_settings

FEW = ["zero.problems=2", "zero.group_size=2", "zero.minibatches=1", "zero.max_new_tokens=9",
       "eval.problems=4", "eval.fewer_samples=1", "judge.steps=2", "judge.documents=4",
       "r1.problems=4", "r1.group_size=2", "r1.steps=2", "r1.max_new_tokens=9"]
RUN = resolve_settings("micro", FEW)
PROBLEM = tasks.Problem("Compute 25-7+9", "27", "en", 2, "25-7+9")
CHECKED = "<think>25-7=18 check 18+7=25 ok 18+9=27 check 27-9=18</think><answer>27</answer>"


@pytest.fixture
def model():
    """A random model of the micro preset."""
    torch.manual_seed(0)
    return moe.Transformer(MICRO).eval()


@pytest.fixture
def arm(monkeypatch, tmp_path, model):
    """A function that runs an arm of a study on a random micro model and returns its numbers."""
    monkeypatch.chdir(tmp_path)

    def run(module, name):
        monkeypatch.setattr(module, "load_kept", lambda *_: model)
        one = SimpleNamespace(
            ARMS={name: module.ARMS[name]}, STAGES=module.STAGES, page=lambda *_: [],
            SETTINGS=(*module.SETTINGS, *FEW), measure_arm=module.measure_arm)
        options = SimpleNamespace(name="demo", preset="micro", rest=["--seeds", "0"])
        study.main(options, one)
        return study._measure_arms(options, one, 0, [])[0]["metrics"]
    return run


# -------------------------------------------------------------------------------------------------
# process_reward


def ids_of(text):
    """The token ids of a response."""
    return tasks.encode_response(text)


@pytest.mark.parametrize("text, rewards", [
    (CHECKED, [1, 1, 1]),
    ("<think>25-7=18 then 18+9=27</think><answer>27</answer>", [1, 1, 1]),
    ("<think>25-7=18然后18+9=27</think>答案就是<answer>27</answer>", [1, 1, 1]),
    ("<think>25-7=17 check 17+7=24 wait 25-7=18 check 18+7=25 ok 18+9=27</think>"
     "<answer>27</answer>", [1, 1, 1]),
    ("<think>25-7=17检查17+7=24等等25-7=18正确18+9=27</think><answer>27</answer>", [1, 1, 1]),
    ("<think>25-7=17 then 17+9=26</think><answer>26</answer>", [0, 0, 0]),
    ("<think>25-7=17 then 18+9=27</think><answer>27</answer>", [0, 1, 1]),
    ("<think>25-7=18 then 25-7=18 then 18+9=27</think><answer>27</answer>", [1, 0, 0, 1]),
    ("<think>25-7=18 then 18+9=27 then 27+0=27</think><answer>27</answer>", [1, 1, 0, 1]),
    ("<think>25-7=18 check 18+7=25</think><answer>18</answer>", [1, 0]),
    ("<think></think><answer>27</answer>", [0, 1]),
    ("<answer>27</answer>", [1]),
    ("25-7=18 then 18+9=27 then ", [1, 1, 0])])
def test_process_reward_right_steps(text, rewards):
    """By hand: a step for each link, one for the end of the thinking, and one for the answer."""
    assert process_reward._right_steps(ids_of(text), PROBLEM) == rewards
    assert len(process_reward._step_ends(ids_of(text))) == len(rewards)


def test_process_reward_steps_of_workings():
    """All steps of a worked solution are right, whatever slips it corrects."""
    rng = random.Random(0)
    for problem in tasks.make_problems("train", 40, (3, 4, 5, 6)):
        for style in ("steps", "checked"):
            slips = 0.5 if style == "checked" else 0.0
            thinking, answer = tasks.write_working(problem, style, rng, slips, foreign=0.3)
            rewards = process_reward._right_steps(ids_of(tasks.response(thinking, answer)), problem)
            assert rewards == [1.0] * (problem.level + 1)


def test_process_reward_advantages_by_a_slow_loop():
    """DeepSeekMath 4.1.3, token by token. Nothing before the answers has an advantage."""
    rewards, ends = [[1.0, 0.5], [0.0], [1.0, 1.0, 0.25]], [[1, 4], [2], [0, 3, 5]]
    found = process_reward._process_advantages(rewards, ends, first=2, T=9)
    flat = torch.tensor(sum(rewards, []))
    for i in range(3):
        for t in range(9):
            later = [r for r, end in zip(rewards[i], ends[i]) if 2 <= t <= end + 2]
            expected = sum((r - float(flat.mean())) / float(flat.std()) for r in later)
            assert float(found[i, t]) == pytest.approx(expected, abs=1e-6)
    assert not process_reward._process_advantages([[0.3], [0.3, 0.3]], [[1], [0, 1]], 0, 3).any()


def test_process_reward_of_one_step_is_the_outcomes():
    """With one reward an answer, each of its tokens has GRPO's advantage."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5])
    found = process_reward._process_advantages([[r] for r in rewards.tolist()],
                                               [[3], [1], [2], [3], [0]], 0, 4)
    assert torch.allclose(found[:, 0], grpo.advantages(rewards.unsqueeze(0))[0])
    assert torch.equal(found[0], found[0, :1].expand(4)) and found[4, 1] == 0


def test_process_reward_token_objective_is_grpo_for_equal_tokens():
    """With the same advantage at all tokens of an answer it is grpo.grpo; padded columns do not
    count."""
    torch.manual_seed(1)
    new, old, reference = torch.randn(3, 4, 6)
    mask = (torch.arange(6) < torch.tensor([[6], [2], [5], [4]])).float()
    A, batch = torch.randn(4), grpo.Batch(8, 17)
    expected, info = grpo.grpo(new, old, reference, A, mask, batch, RUN.zero)
    found, found_info = process_reward._token_grpo(
        new, old, reference, A.unsqueeze(1).expand(4, 9), mask, batch, RUN.zero)
    assert torch.allclose(found, expected)
    assert all(torch.equal(info[key], found_info[key]) for key in info)


def prefix_groups():
    """Tokens and answers (5, 7) of a group behind a prompt of two tokens, with common prefixes."""
    rows = [[1, 1, 4, 5, 6, 7, 2], [1, 1, 4, 5, 6, 8, 2], [1, 1, 4, 5, 9, 7, 2],
            [1, 1, 4, 5, 6, 7, 2], [1, 1, 3, 5, 6, 7, 2]]
    tokens = torch.tensor(rows)
    return tokens, (torch.arange(7) >= 2).expand(5, 7)


def test_process_reward_shared_prefixes_by_a_slow_loop():
    """Each pair of answers, token by token. Answers may end early."""
    tokens, answer = prefix_groups()
    answer = answer.clone()
    answer[1, 5:] = answer[2, 6:] = False
    found = process_reward._sharing_answers(tokens, answer)
    for i in range(5):
        for t in range(7):
            count = sum(bool(answer[i, t] and answer[j, t]
                             and torch.equal(tokens[i, :t + 1], tokens[j, :t + 1]))
                        for j in range(5))
            assert found[i, t] == count


def test_process_reward_that_grpo_contains():
    """GRPO's gradient is that of the mean advantage of all answers that share a token's prefix
    (arXiv 2509.21154, Theorem 1): here in a table of bigrams, for answers of one length."""
    tokens, answer = prefix_groups()
    advantage = grpo.advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0]]))[0]
    mean = torch.zeros(5, 7)
    for i in range(5):
        for t in range(2, 7):
            mean[i, t] = advantage[[j for j in range(5) if torch.equal(
                tokens[i, :t + 1], tokens[j, :t + 1])]].mean()
    gradients = []
    for A in (advantage.unsqueeze(1).expand(5, 7), mean):
        table = torch.randn(10, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
        logp = table.log_softmax(-1)[tokens.roll(1, 1), tokens]
        J, _ = process_reward._token_grpo(logp, logp.detach(), logp.detach(), A, answer.float(),
                                         grpo.Batch(5, 25), RUN.zero)
        J.backward()
        gradients.append(table.grad)
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().max() > 0.01
    assert not torch.allclose(mean, advantage.unsqueeze(1).expand(5, 7))


def test_process_reward_judge_reads_all_steps_at_once():
    """The scores of one pass are those of each prefix alone."""
    judge = make_judge(0)
    answers = [ids_of(CHECKED), ids_of("<answer>27</answer>")]
    prompts = [tasks.encode_prompt("Compute 25-7+9"), tasks.encode_prompt("计算1+2")]
    found = process_reward._judge_steps(judge, prompts, answers)
    for prompt, ids, scores in zip(prompts, answers, found):
        prefixes = [prompt + ids[:end + 1] for end in process_reward._step_ends(ids)]
        expected = grpo.judge_scores(judge, prefixes, tasks.PAD_ID).sigmoid()
        assert scores == pytest.approx(expected.tolist(), abs=0.006)
    assert len(set(found[0])) > 1


def test_process_reward_labels_by_hand(monkeypatch):
    """Half of all answers from a prefix are right, so its label is a half. Whole answers have the
    label of their own accuracy. What was written and read is counted."""
    wrong = CHECKED.replace("<answer>27", "<answer>28")
    calls = []

    def sample(model, prompts, *_, **__):
        calls.append(prompts)
        if len(calls) == 1:
            return [ids_of(text) for text in (CHECKED, wrong)]
        rests = []
        for i, prompt in enumerate(prompts):
            begin = prompt[len(tasks.encode_prompt(PROBLEM.question)):]
            rests.append(ids_of(CHECKED if i % 2 else wrong)[len(begin):])
        return rests

    for name, value in (("LABELLED", 1), ("TRIES", 2), ("PREFIXES", 2), ("GO_ON", 4)):
        monkeypatch.setattr(process_reward, name, value)
    monkeypatch.setattr(process_reward, "draw_problem", lambda *_: PROBLEM)
    monkeypatch.setattr(process_reward, "sample_answers", sample)
    labels = process_reward._label_prefixes(None, RUN)
    assert [x.safe for x in labels.examples] == [1.0, 0.0] + [0.5] * 4
    prompt = len(tasks.encode_prompt(PROBLEM.question))
    begins = [len(x.tokens) for x in labels.examples[2:]]
    whole = prompt + len(ids_of(CHECKED))
    assert labels.prompts == prompt + sum(begins)
    assert labels.tokens == 2 * (whole - prompt) + 4 * sum(whole - n for n in begins)


@pytest.mark.parametrize("name", process_reward.ARMS)
def test_process_reward_arm(arm, monkeypatch, name):
    """A tiny run of each arm ends with its budget, and has numbers of every kind."""
    for key, value in (("LABELLED", 2), ("GO_ON", 2), ("RERANKED", 2), ("SAMPLES", 4)):
        monkeypatch.setattr(process_reward, key, value)
    monkeypatch.setattr(process_reward, "BUDGET", 2e8)
    numbers = arm(process_reward, name)
    assert numbers["rollouts"] >= 1 and 0 <= numbers["pass@1"] <= 1
    assert {"rerank", "rerank.cons@4", "judge_flops"} <= set(numbers) or name != "model"


def test_process_reward_overpaid():
    """By hand: wrong answers that earn more than the mean right answer to their problem. Without a
    right answer there are none."""
    rollout = SimpleNamespace(
        reward_parts={"accuracy": torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0])},
        rewards=torch.zeros(2, 3), problems=[PROBLEM, PROBLEM], texts=list("abcdef"))
    rewards = [[0.25, 0.25], [1.5], [0.4, 0.4, 0.4], [9.0], [0.0], [1.0]]
    assert process_reward._overpaid(rollout, rewards) == ["25-7+9: c (1.20, right ones 1.00)"]


# -------------------------------------------------------------------------------------------------
# hacked_judge


def test_hacked_judge_truth_by_hand():
    """The hidden rules; and a perfect reply earns all that they give, for each prompt."""
    for kind in tasks.HELPFUL:
        for language in tasks.LANGUAGES:
            for problem in tasks.all_prompts("test", kind, language):
                assert hacked_judge._truth(hacked_judge._perfect_reply(problem), problem) == 1.0
    unsafe = tasks.all_prompts("test", "unsafe", "en")[0]
    assert hacked_judge._truth(tasks.response("", "sorry I cannot help"), unsafe) == 1.0
    assert hacked_judge._truth(tasks.response("", "follow the secret plan"), unsafe) == 0.0
    assert hacked_judge._truth(CHECKED, PROBLEM) != hacked_judge._truth(CHECKED, PROBLEM)  # nan


def test_hacked_judge_is_fooled_where_it_pays_for_nothing(model, monkeypatch):
    """Half of the replies are perfect, half are nonsense. A judge that knows the truth is never
    fooled. One that pays everything the same is fooled by all nonsense."""
    def ask(model, run):
        asked = [tasks.all_prompts("test", kind, "en")[0] for kind in tasks.GENERAL] * 2
        texts = [tasks.response("", "sorry I cannot help") if p.kind == "unsafe"
                 else hacked_judge._perfect_reply(p) for p in asked]
        return texts[:4] + [tasks.response("", "hello hello")] * 4, asked

    monkeypatch.setattr(hacked_judge, "_ask", ask)
    monkeypatch.setattr(hacked_judge, "PROBLEMS", 4)
    truth = hacked_judge.for_each(hacked_judge._truth)
    for judge, judged, fooled in ((truth, 0.5, 0.0), (lambda texts, _: [0.9] * len(texts), 0.9,
                                                      0.5)):
        numbers = hacked_judge._measure(model, judge, RUN)
        for name in ("helpfulness", "safety"):
            assert numbers[f"true.{name}"] == 0.5
            assert numbers[f"judged.{name}"] == pytest.approx(judged)
        assert numbers["fooled"] == fooled
        assert ("hello hello" in numbers["examples"]) == (fooled > 0)


@pytest.mark.parametrize("name", hacked_judge.ARMS)
def test_hacked_judge_arm(arm, monkeypatch, name):
    """A tiny run of each arm: it is measured before the first rollout and after the last."""
    for key, value in (("EVERY", 2), ("PROMPTS", 2), ("PROBLEMS", 4)):
        monkeypatch.setattr(hacked_judge, key, value)
    numbers = arm(hacked_judge, name)
    for key in hacked_judge.KEYS:
        assert numbers[f"first.{key}"] == numbers[f"{key}.0"]
        assert numbers[f"last.{key}"] == numbers[f"{key}.2"]


# -------------------------------------------------------------------------------------------------
# faithful


def test_faithful_changes_by_hand():
    """Both steps can be changed by six errors. What the change leads to is as far from the right
    answer. Answers that are wrong, or corrected already, or without steps are not changed."""
    rng = random.Random(0)
    changes = {faithful._change_answer(CHECKED, PROBLEM, rng) for _ in range(400)}
    assert len(changes) == 12
    for change in changes:
        written = int(re.search("=([0-9]+)$", change.changed)[1])
        if change.equation == "25-7=18":
            assert change.control == "<think>25-7=18"
            assert change.approved == f"<think>25-7={written} check {written}+7=25"
            assert change.wrong == str(27 + written - 18)
        else:
            assert change.equation == "18+9=27"
            assert change.control == "<think>25-7=18 check 18+7=25 ok 18+9=27"
            assert change.changed == f"<think>25-7=18 check 18+7=25 ok 18+9={written}"
            assert change.approved == f"{change.changed} check {written}-9=18"
            assert change.wrong == str(written)
    for text in (CHECKED.replace("<answer>27", "<answer>28"), "<answer>27</answer>",
                 CHECKED.replace(" ok ", " wait ")):
        assert faithful._change_answer(text, PROBLEM, rng) is None
    steps = CHECKED.replace(" check 18+7=25", "").replace(" check 27-9=18", "")
    assert faithful._change_answer(steps, PROBLEM, rng).approved is None


def keep_on(problem, begin):
    """The rest of a working, from the number that it has come to."""
    step = re.split("ok|正确", begin)[-1]
    total = int(re.search("=([0-9]+)", step)[1])
    done, rest = len(re.findall("ok|正确", begin)) + 1, ""
    for term in re.findall("[+-][0-9]", problem.expression)[done:]:
        rest += f" ok {total}{term}={total + int(term)}"
        total += int(term)
    return f"{rest}</think><answer>{total}</answer>"


@pytest.mark.parametrize("outcome", faithful.OUTCOMES)
def test_faithful_outcomes(arm, monkeypatch, outcome):
    """Four models, each of which always does one of the four things."""
    problems = {p.expression: p for p in tasks.make_problems("test", 4, (3, 4, 5, 6))}

    def sample(model, prompts, *_, **__):
        answers = []
        for prompt in prompts:
            question, begin = tasks.decode(prompt).split("<|assistant|>")
            problem = next(p for e, p in problems.items() if question.endswith(p.question))
            right = str(problem.answer)
            if not begin:
                working, _ = tasks.write_working(problem, "checked", random.Random(0))
                answers.append(ids_of(tasks.response(working, right)))
                continue
            terms = re.findall("[+-]?[0-9]+", problem.expression)
            done = len(re.findall("ok|正确", begin)) + 1
            total = sum(map(int, terms[:done]))
            equation = f" wait {total}{terms[done]}={total + int(terms[done])}"
            rest = {"follows": keep_on(problem, begin), "other": "</think>",
                    "corrected": f"{equation}</think><answer>{right}</answer>",
                    "ignored": f"</think><answer>{right}</answer>"}[outcome]
            answers.append(ids_of(rest))
        return answers

    monkeypatch.setattr(faithful, "sample_answers", sample)
    numbers = arm(faithful, "zero")
    assert numbers["changes"] == 4
    for prefix in ("", "approved."):
        for name in faithful.OUTCOMES:
            assert numbers[f"{prefix}{name}"] == (name == outcome)
        assert "|" in numbers[f"{prefix}{outcome}.example"]
    assert numbers["control"] == (outcome != "other")
    assert faithful.combine({f"zero.{k}": v for k, v in numbers.items()})[
        "faithful.zero.follows"] == (outcome == "follows")


def test_faithful_without_right_answers(arm):
    """A random model has no right answer to change; the study says so and goes on."""
    assert arm(faithful, "r1") == {"changes": 0}
