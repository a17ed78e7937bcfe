"""Tests of studies/transfer.py: the task of sorting digits, and the arms."""
import random
import re

import tasks
from studies import transfer
from tests.helpers import FEW_OF_STUDY, random_micro, run_arm


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


def test_transfer_trains_on_questions_of_train():
    """RL and the documents of the base have questions of train alone."""
    rng = random.Random(0)
    task = transfer.make_task(transfer.question, transfer.right)
    asked = [problem.question for problem in task.draw(rng, 50, 0)]
    asked += [transfer.document(rng).problem.question for _ in range(50)]
    for question in asked:
        digits = "".join(sorted(question.removeprefix("Sort ")))
        assert tasks.part_of_problem(f"sort/{digits}") == "train"


def test_transfer_arm(monkeypatch, tmp_path):
    """A tiny run starts from the model that the arm is named after. It has numbers before RL, on
    the way and after it."""
    monkeypatch.chdir(tmp_path)
    loaded = []
    monkeypatch.setattr(transfer, "load_kept", lambda folder, name: loaded.append(name)
                        or random_micro())
    shares = iter([0.1, 0.2, 0.3, 0.5, 0.6] * len(transfer.ARMS))
    monkeypatch.setattr(transfer, "_test", lambda *_: next(shares))
    for arm in transfer.ARMS:
        numbers = run_arm(transfer, arm, *FEW_OF_STUDY, "zero.max_new_tokens=9")
        assert {"before", "pass@1", "dev0", "dev1", "dev2", "mean_on_dev"} <= set(numbers)
        assert [numbers[f"dev{step}"] for step in range(3)] == [0.2, 0.3, 0.5]
        assert numbers["mean_on_dev"] == 0.4 and numbers["gain"] == 0.6 - 0.1
    assert loaded == ["base", "zero", "r1"]
