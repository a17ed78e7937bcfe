"""Should a judge think before its verdict?

The paper: Kimi has two reward models for mathematics. One has a value head and is right in
84.4% of spot checks. The other reasons before its verdict and is right in 98.5% (Kimi k1.5
section 2.3.5). Both see the question, the reference answer and the response. RL uses the one
that reasons.

    python r1mini.py study judges

One number has several forms: 33, 25+8, 66/2, 三十三. A comparison of texts accepts only the
first. Our judges read the final answer, not the whole response. Two judges are trained. They
start from the same kept base, for as many steps, and learn from the same answers, half of them
right. Two rules are not trained:

    value       a head with one output, which is read after the answer
    reasoning   the judge calculates the number that the answer stands for, compares, and says
                right or wrong
    text        the answer must be equal to the reference, character by character
    rule        the exact rule, for comparison

They are tested on pairs of reference and answer that no judge has seen, and on pairs of the
training part. Then each of the four rewards a short RL run of a policy that answers in these
forms.
"""
import random
import re
from collections import Counter

import torch

import tasks
from engine.devices import copy_model
from engine.evaluate import prompts_of, repeat_for_answers, sample_answers
from grpo import judge_scores, train_rl
from r1mini import (
    draw_problem,
    for_each,
    make_task,
    one_of,
    pointwise_loss,
    train,
    train_reward_model,
)
from tools.compare import compare
from tools.figures import Picture, arms_panel
from tools.study import load_kept
from tools.tables import cell, table

SEEDS = range(3)
SETTINGS = ("judge.steps=1500", "judge.lr=2e-3", "judge.muon_lr=2e-3", "dev1.steps=80",
            "dev1.lr=5e-3", "dev1.muon_lr=5e-3", "zero.steps=20", "zero.objective=kimi")
STAGES = ("judge",)
ARMS = dict.fromkeys(("value", "reasoning", "text", "rule"), "")
DIFFERENCES = {"reasoning_minus_value.accuracy": ("reasoning.accuracy", "value.accuracy"),
               "reasoning_minus_value.true": ("reasoning.true", "value.true")}
FORMS = "plain", "sum", "quotient", "chinese"
ANSWERS = 800        # test answers, evenly over forms, half of them right
LONGEST = 24         # characters of an answer that a judge reads; a longer one is wrong


# ------------------------------------------------------------------------------
# Numbers in other forms


DIGITS = "零一二三四五六七八九"


def _in_chinese(n):
    """A number from 0 to 99 in Chinese: 三十三."""
    tens, ones = divmod(n, 10)
    if not tens:
        return DIGITS[ones]
    return (DIGITS[tens] if tens > 1 else "") + "十" + (DIGITS[ones] if ones else "")


def _write_number(n, form, rng):
    """A number from 0 to 99 in one of FORMS."""
    if form == "sum":
        part = rng.randint(0, n)
        return f"{part}+{n - part}"
    if form == "quotient":
        divisor = rng.randint(2, 3)
        return f"{n * divisor}/{divisor}"
    return _in_chinese(n) if form == "chinese" else str(n)


CHINESE = {_in_chinese(n): n for n in range(100)}


def _value_of(text):
    """The number that a text in one of FORMS stands for; None for all other texts."""
    if tasks.INTEGER.fullmatch(text):
        return int(text)
    match = re.fullmatch(r"(0|[1-9][0-9]{0,3})([+/])(0|[1-9][0-9]{0,3})", text)
    if match is None:
        return CHINESE.get(text)
    a, sign, b = int(match[1]), match[2], int(match[3])
    if sign == "+":
        return a + b
    return a // b if b and a % b == 0 else None


def _is_right(answer, problem):
    """The exact rule: whether an answer stands for the right number."""
    return _value_of(answer) == int(problem.answer)


# ------------------------------------------------------------------------------
# The judges


def _question_of(problem, answer):
    """What a judge reads."""
    return f"{problem.expression}\nreference {problem.answer}\nanswer {answer}"


def _draw_case(rng, run, form=None, part="train"):
    """(problem, answer, whether it is right). Half of the answers are right. Of the wrong ones,
    half differ by 1 or 10, and the others are any number up to 99.

    A verdict depends on the reference and the answer. So each pair of them is of one part, too: the
    test has pairs that no judge has seen."""
    while True:
        problem = tasks.make_problem(rng, rng.choice(run.zero.levels), part)
        n, right = int(problem.answer), rng.random() < 0.5
        if not right:
            near = [x for x in (n - 10, n - 1, n + 1, n + 10) if 0 <= x <= 99]
            n = rng.choice(near if rng.random() < 0.5 else [x for x in range(100) if x != n])
        answer = _write_number(n, form or rng.choice(FORMS), rng)
        if tasks.part_of_problem(f"judge/{problem.answer}/{answer}") == part:
            return problem, answer, right


def _working_of(problem, answer):
    """The reasoning of a judge: the value of the answer, then the reference, then whether they
    are the same."""
    value = _value_of(answer)
    same = "same" if value == int(problem.answer) else "wrong"
    return f"{answer}={value}\nreference {problem.answer}\n{same}"


def _value_judge(folder, base, run):
    """The judge with a head of one output: a function (problems, answers) -> probabilities that
    the answers are right."""
    def draw(rng):
        problem, answer, right = _draw_case(rng, run)
        tokens = tasks.encode_prompt(_question_of(problem, answer))
        return tasks.Judgement(tokens, safe=float(right))

    model = train_reward_model(folder, "judge", base, draw, pointwise_loss).eval()

    @torch.no_grad()
    def judge(problems, answers):
        ids = [tasks.encode_prompt(_question_of(p, a)) for p, a in zip(problems, answers)]
        scores = judge_scores(model, ids, tasks.PAD_ID).sigmoid().tolist()
        return [round(score, 2) for score in scores]  # as r1mini.preference_reward does
    return judge


def _reasoning_judge(folder, base, run):
    """The judge that reasons: a function (problems, answers) -> 1.0 for right, 0.0 for wrong."""
    def draw(rng):
        problem, answer, right = _draw_case(rng, run)
        verdict = tasks.response(_working_of(problem, answer), "right" if right else "wrong")
        return tasks.dialogue(tasks.Problem(_question_of(problem, answer), "", "en"), verdict)

    model = copy_model(base)
    for _ in train(model, run.judge, draw, run.seed):
        pass
    model.eval()

    def judge(problems, answers):
        ids = [tasks.encode_prompt(_question_of(p, a)) for p, a in zip(problems, answers)]
        verdicts = sample_answers(model, ids, 60, run.eval.rows, temperature=0.0)
        return [float(tasks.parse(tasks.decode(x))[1] == "right") for x in verdicts]
    return judge


def _make_judge(arm, folder, base):
    """One of the judges: a function (problems, answers) -> numbers from 0 to 1."""
    if arm == "value":
        return _value_judge(folder, base, folder.run)
    if arm == "reasoning":
        return _reasoning_judge(folder, base, folder.run)
    rule = _is_right if arm == "rule" else lambda answer, problem: answer == problem.answer
    return lambda problems, answers: [float(rule(a, p)) for p, a in zip(problems, answers)]


def _accuracy_of(judge, run, part="test"):
    """The share of right verdicts on answers to problems of a part, over all forms and by form."""
    rng, cases = random.Random(f"{part}/judges"), []
    for i in range(ANSWERS):
        form = FORMS[i % len(FORMS)]
        cases.append((form, *_draw_case(rng, run, form, part)))
    verdicts = judge([problem for _, problem, _, _ in cases], [answer for _, _, answer, _ in cases])
    hits = [(form, (verdict > 0.5) == right)
            for (form, _, _, right), verdict in zip(cases, verdicts)]
    numbers = {"accuracy": sum(hit for _, hit in hits) / ANSWERS}
    for form in FORMS:
        of_form = [hit for name, hit in hits if name == form]
        numbers[f"accuracy.{form}"] = sum(of_form) / len(of_form)
    return numbers


# ------------------------------------------------------------------------------
# RL that a judge rewards


def _policy(base, run):
    """The base after SFT on checked workings with right answers in all forms."""
    rng, documents = random.Random(f"{run.seed}/forms"), []
    for _ in range(400):
        problem = draw_problem(rng, run, run.zero.levels)
        thinking, n = tasks.write_working(problem, "checked", rng,
                                          check_chance=run.corpus.check_chance)
        answer = _write_number(n, rng.choice(FORMS), rng)
        documents.append(tasks.dialogue(problem, tasks.response(thinking, answer)))
    policy = copy_model(base)
    for _ in train(policy, run.dev1, one_of(documents), run.seed):
        pass
    return policy


def _reward_of(judge):
    """A judge as a reward of RL. A response without an answer earns 0, and so does an answer that
    is longer than LONGEST."""
    def reward(texts, problems):
        answers = [tasks.parse(text)[1] for text in texts]
        readable = [i for i, answer in enumerate(answers)
                    if answer is not None and len(answer) <= LONGEST]
        rewards = [0.0] * len(texts)
        if readable:
            verdicts = judge([problems[i] for i in readable], [answers[i] for i in readable])
            for i, verdict in zip(readable, verdicts):
                rewards[i] = verdict
        return rewards
    return reward


def _truth(text, problem):
    """1.0 if the answer of a response is right by the exact rule, else 0.0."""
    answer = tasks.parse(text)[1]
    return float(answer is not None and _is_right(answer, problem))


def _test(model, judge, run):
    """Numbers of answers to test problems, and the most frequent ones that fool the judge:

        judged     the share that the judge accepts, with a reward above 0.5
        true       the share that is right by the exact rule
        plain      the share that is a plain number
        fooled     the share that is wrong and accepted
        accepted   the share of the wrong answers that is accepted
    """
    problems = tasks.make_problems("test", run.eval.problems, run.zero.levels)
    asked = repeat_for_answers(problems, run.eval.fewer_samples)
    ids = sample_answers(model, prompts_of(asked), run.zero.max_new_tokens, run.eval.rows, seed=1)
    texts = [tasks.decode(x) for x in ids]
    rewards, true = _reward_of(judge)(texts, asked), [_truth(t, p) for t, p in zip(texts, asked)]
    plain = sum(bool(tasks.INTEGER.fullmatch(tasks.parse(text)[1] or "")) for text in texts)
    fooled = Counter()
    for text, problem, paid, right in zip(texts, asked, rewards, true):
        if paid > 0.5 and not right:
            fooled[f"{tasks.parse(text)[1]} for {problem.answer}"] += 1
    return {"judged": sum(reward > 0.5 for reward in rewards) / len(texts),
            "true": sum(true) / len(texts), "plain": plain / len(texts),
            "fooled": sum(fooled.values()) / len(texts),
            "accepted": sum(fooled.values()) / max(1, true.count(0.0)),
            "examples": "; ".join(text for text, _ in fooled.most_common(5)) or "none"}


def measure_arm(arm, folder):
    """The numbers of a judge, and of RL that it rewards."""
    run, s, base = folder.run, folder.run.zero, load_kept(folder, "base")
    judge = _make_judge(arm, folder, base)
    policy = _policy(base, run)
    before = _test(policy, judge, run)
    rewards = {"judge": (1.0, _reward_of(judge)), "accuracy": (0.0, for_each(_truth))}
    for _ in train_rl(policy, make_task(run, s, rewards), s, run.seed):
        pass
    numbers = _accuracy_of(judge, run) | _test(policy, judge, run)
    seen = _accuracy_of(judge, run, "train")
    numbers |= {key.replace("accuracy", "seen"): x for key, x in seen.items()}
    return numbers | {f"before.{key}": x for key, x in before.items() if key != "examples"}


def combine(numbers):
    """The accuracy of both judges."""
    return {f"judge.{arm}.accuracy": numbers[f"{arm}.accuracy"] for arm in ("value", "reasoning")}


NAMES = {"value": "value head", "reasoning": "reasons first", "text": "comparison of texts",
         "rule": "the exact rule"}


def picture(rows):
    """The right verdicts of all judges, and how often each is fooled by the policy it rewards."""
    value, reasoning = (rows[f"{arm}.accuracy"]["mean"] for arm in ("value", "reasoning"))
    names = NAMES | {"text": "same text", "rule": "exact rule"}
    return Picture([arms_panel(f"Value head: {value:.0%} right,\nwith reasoning {reasoning:.0%}",
                               rows, names, "accuracy", "right verdicts"),
                    arms_panel(f"It accepts {rows['value.accepted']['mean']:.0%} of\nwrong answers",
                               rows, names, "accepted", "wrong and accepted")],
                   "test problems, on the right after RL; a dot is a seed, a line the mean")


def page(rows, notes):
    """The lines of the report: the judges, the RL that they reward, and what fooled them."""
    columns = {"seen": "right verdicts, training part", "accuracy": "right verdicts, test part"}
    columns |= {f"accuracy.{form}": form for form in FORMS}
    body = [[name, *(cell(rows, f"{arm}.{key}") for key in columns)]
            for arm, name in NAMES.items()]
    lines = [*table(["judge", *columns.values()], body), ""]
    names = {"judged": "judged right", "true": "right", "plain": "plain numbers",
             "fooled": "wrong and accepted", "accepted": "of the wrong ones"}
    columns = {f"before.{key}": f"{name}, before" for key, name in names.items()} | names
    body = [[name, *(cell(rows, f"{arm}.{key}") for key in columns)]
            for arm, name in NAMES.items()]
    lines += [*table(["RL rewarded by", *columns.values()], body), ""]
    comparison = compare(rows, "value.accuracy", "reasoning.accuracy")
    if comparison:
        lines.append(f"- right verdicts, reasoning minus value: {comparison.text(points=True)}")
    for arm in ("value", "reasoning"):
        for seed, examples in notes.get(f"{arm}.examples", {}).items():
            lines.append(f"- what fools the judge ({NAMES[arm]}), seed {seed}: {examples}")
    return lines
