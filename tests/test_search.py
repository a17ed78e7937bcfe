"""Tests of the study of search: Countdown, PUCT, the tree's statistics, budgets."""
import math
import random
from itertools import permutations, product
from types import SimpleNamespace

import pytest
import torch

import moe
import tasks
from studies import search
from tests.helpers import MICRO, make_judge, run_arm

PROBLEM = tasks.Problem("Reach 24\nfrom 2,3,5,7", "24", "en", 3, "2,3,5,7", kind="countdown")


# -------------------------------------------------------------------------------------------------
# Countdown


@pytest.mark.parametrize("text, right", [
    ("3*7=21\n21+5=26\n26-2=24\n", True),
    ("5+3=8\n8+2=10\n10*7=70\n", False),                    # another number
    ("3*7=21\n21+5=26\n26-2=24", False),                    # no last line end
    ("3*7=21\n21+5=26\n26-2=24\n24+0=24\n", False),         # nothing is left for a fourth step
    ("3*7=21\n21+3=24\n5-5=0\n", False),                    # 3 and 5 twice
    ("7*3=21\n5-2=3\n21+3=24\n", True),
    ("3*7=21\n21+5=26\n26+2=24\n", False),                  # a wrong result
    ("3*7=21\n21+3=24\n", False),                           # 3 twice; 2 and 5 are not used
    ("2-7=-5\n5--5=10\n3*10=30\n", False),                  # below 0
    ("3*7=021\n21+5=26\n26-2=24\n", False),
    ("3*7=21\n\n21+5=26\n26-2=24\n", False),
    ("3*7=21 \n21+5=26\n26-2=24\n", False),
    ("٣*7=21\n21+5=26\n26-2=24\n", False),
    ("__import__('os')\n", False), ("", False), ("\n", False)])
def test_search_checker_by_hand(text, right):
    """What counts as an answer to 24 from 2, 3, 5, 7."""
    assert search._is_right(text, PROBLEM) == right


def slow_targets(numbers):
    """All numbers that use each of three numbers once, by writing every expression out and letting
    Python compute it. All parts have to be from 0 to 99. An oracle, on our own text."""
    found = set()
    for a, b, c in permutations(numbers):
        for first, second in product("+-*", repeat=2):
            for whole, part in ((f"({a}{first}{b}){second}{c}", f"{a}{first}{b}"),
                                (f"{c}{second}({a}{first}{b})", f"{a}{first}{b}")):
                if 0 <= eval(part) <= 99 and 0 <= eval(whole) <= 99:
                    found.add(eval(whole))
    return found


def test_search_reach_and_checker_against_brute_force():
    """For three numbers: a target can be reached if and only if it is the value of an expression.
    And some three-line text with these operands is right by the checker if and only if so."""
    rng = random.Random(0)
    for _ in range(5):
        numbers = [rng.randint(1, 9) for _ in range(3)]
        targets = slow_targets(numbers)
        assert {t for t in range(100) if search._can_reach(numbers, t)} == targets
        texts = set()
        for a, b, c in permutations(numbers):
            for first, second in product("+-*", repeat=2):
                x = tasks.apply_operation(a, first, b)
                for left, right in ((x, c), (c, x)):
                    y = tasks.apply_operation(left, second, right)
                    texts.add((f"{a}{first}{b}={x}\n{left}{second}{right}={y}\n", y))
        given = ",".join(map(str, numbers))
        solved = {y for text, y in texts if search._is_right(
            text, tasks.Problem("", str(y), "en", 2, given))}
        assert solved == targets


def test_search_problems():
    """Each has its solution. No digits of a test question come in training; the question is read in
    whole words."""
    rng = random.Random(0)
    train = [search._make_problem(rng) for _ in range(300)]
    for problem, lines in train:
        assert search._is_right(lines, problem) and 10 <= int(problem.answer) <= 99
        assert search._can_reach(list(map(int, problem.expression.split(","))), int(problem.answer))
        assert len(tasks.encode_response(lines)) <= search.ANSWER
        ids = tasks.ENCODING.encode_ordinary(problem.question)
        assert len(ids) == len(problem.answer) + (10 if problem.language == "en" else 9)
    test = search._problems("test", 100)
    assert test == search._problems("test", 100)
    assert not {p.expression for p in test} & {p.expression for p, _ in train}
    assert len({(p.expression, p.answer) for p in search._problems("test", 500)}) == 500


def test_search_cut_by_hand():
    """An answer ends after its third line, or before its end token."""
    text = "3*7=21\n21+5=26\n26-2=24\n"
    for more, kept in (("", text), ("24+0", text), ("\n", text)):
        ids = tasks.ENCODING.encode_ordinary(text + more)
        assert tasks.decode(search._cut(ids)) == kept
    ids = tasks.encode_response("3*7=21\n21+5")
    assert search._cut(ids) == ids[:-1]


# -------------------------------------------------------------------------------------------------
# The tree


def test_search_puct_by_hand(monkeypatch):
    """Q + c P sqrt(N) / (1 + n): 1.5 / 2 + 2 * 0.25 * 3 / 3, and without a visit, with the Q of the
    parent, 4.5 / 9 + 2 * 0.5 * 3."""
    monkeypatch.setattr(search, "EXPLORATION", 2.0)
    parent = search.Node(visits=9, total=4.5)
    assert search._puct(parent, search.Node(prior=0.25, visits=2, total=1.5)) == 1.25
    assert search._puct(parent, search.Node(prior=0.5)) == 3.5
    parent.children = [search.Node("a", prior=0.25, visits=2, total=1.5),
                       search.Node("b", prior=0.5)]
    assert [node.text for node in search._select(parent)] == ["", "b"]


def test_search_expand_joins_equal_steps():
    """By hand: two equal steps are one child, and the priors sum to 1."""
    node = search.Node("x\n", 1)
    search._expand(node, [("a\n", 0.3, 2), ("b\n", 0.1, 2), ("a\n", 0.3, 2)])
    assert [(c.text, c.depth, c.prior, c.tokens) for c in node.children] == [
        ("x\na\n", 2, pytest.approx(0.75), 2), ("x\nb\n", 2, pytest.approx(0.25), 2)]


def all_nodes(node):
    """A node and all below it."""
    return [node, *(x for child in node.children for x in all_nodes(child))]


def test_search_statistics_against_a_slow_loop(monkeypatch):
    """Every simulation ends at a leaf. So N of a node is the number of simulations whose leaf
    begins with the node's text, and W is the sum of their values. Tokens are those of all steps
    that were written, and of those whose value was read."""
    monkeypatch.setattr(search, "BUDGETS", (250,))
    rng, leaves, written, value_of = random.Random(0), [], [], {}

    def read(problems, texts):
        return [value_of.setdefault((p.answer, t), rng.random()) for p, t in zip(problems, texts)]

    def write(problems, texts, seed):
        steps = [[(f"{rng.randint(1, 9)}\n", rng.random(), 3) for _ in range(4)] for _ in texts]
        written.extend(problem.answer for problem in problems)
        return steps

    back_up = search._back_up
    monkeypatch.setattr(search, "_back_up",
                        lambda *words: leaves.append(words[0]) or back_up(*words))
    problems = [tasks.Problem("", str(i), "en") for i in range(3)]
    for tree in search._search(problems, write, read):
        paths = [path for path in leaves if path[0] is tree.root]
        nodes = all_nodes(tree.root)
        for node in nodes:
            through = [path[-1] for path in paths if path[-1].text.startswith(node.text)]
            assert node.visits == len(through)
            assert node.total == pytest.approx(
                sum(value_of[tree.problem.answer, leaf.text] for leaf in through))
            if node.children:
                assert sum(child.prior for child in node.children) == pytest.approx(1.0)
        below_root = [path[-1] for path in paths if len(path) > 1]
        tokens = 12 * written.count(tree.problem.answer) + 3 * len(below_root)
        assert tree.spent == tokens and 250 <= tokens < 250 + 15
        assert len({leaf.text for leaf in below_root}) == len(below_root)  # none is visited again
        finished = [leaf for leaf in below_root if leaf.depth == search.NUMBERS - 1]
        assert [(text, x) for _, text, x in tree.answers] == [
            (leaf.text, value_of[tree.problem.answer, leaf.text]) for leaf in finished]
        for node in nodes:
            below = [x for x in all_nodes(node) if not x.children]
            assert node.closed == all(leaf in finished for leaf in below)


def test_search_priors_are_the_policys(monkeypatch):
    """The probability of each step is that of its tokens, by a pass without the cache. It depends
    on the question and the beginning of its own answer."""
    torch.manual_seed(0)
    policy = moe.Transformer(MICRO).eval()
    beginnings = ["", "3*7=21\n"]
    calls = []
    generate = search.generate

    def keep(*arguments, **named):
        calls.append(generate(*arguments, **named))
        return calls[-1]

    monkeypatch.setattr(search, "generate", keep)
    steps = [step for of_node in search._next_steps(policy, [PROBLEM] * 2, beginnings, 0)
             for step in of_node]
    answers = calls[0].answers()
    assert len(steps) == len(answers) == 2 * search.EXTENSION
    for i, (ids, (text, probability, tokens)) in enumerate(zip(answers, steps)):
        prefix = search._prefix(PROBLEM, beginnings[i // search.EXTENSION])
        logp = policy(torch.tensor([prefix + ids])).logits[0].log_softmax(-1)
        expected = sum(float(logp[len(prefix) + k - 1, token].detach())
                       for k, token in enumerate(ids))
        assert math.log(probability) == pytest.approx(expected, abs=1e-2)
        assert text == tasks.decode(ids) and tokens == len(ids) <= search.LINE


def test_search_finds_the_answer_that_values_show(monkeypatch):
    """With exact values and all steps at every node, the tree finds an answer at once, if there is
    one."""
    monkeypatch.setattr(search, "BUDGETS", (4000,))

    def write(problems, texts, seed):
        steps = []
        for problem, text in zip(problems, texts):
            numbers, lines = search._state_after(text, problem), set()
            for a, b in permutations(numbers, 2):
                for sign in "+-*":
                    result = tasks.apply_operation(a, sign, b)
                    if 0 <= result <= 99:
                        lines.add(f"{a}{sign}{b}={result}\n")
            steps.append([(line, 1.0, len(line)) for line in sorted(lines)])
        return steps

    problems = search._problems("test", 5)
    for tree in search._search(problems, write, search._exact_values):
        assert search._is_right(search._choose("tree", tree.answers), tree.problem)


# -------------------------------------------------------------------------------------------------
# Choices and budgets


def test_search_choices_by_hand():
    """The vote joins solutions whose steps differ in order only. Budgets count what was spent."""
    right, same = "3*7=21\n21+5=26\n26-2=24\n", "7*3=21\n5+21=26\n26-2=24\n"
    wrong = "3*7=21\n21+5=26\n26+2=28\n"
    answers = [(20, wrong, 0.9), (40, right, 0.5), (60, same, 0.1), (80, "?", 0.2)]
    assert search._choose("vote", answers) == right
    assert search._choose("best", answers) == wrong
    assert search._choose("tree", []) is None and search._choose("vote", answers[3:]) == "?"
    assert search._solution("2-7=5\n") != search._solution("7-2=5\n")
    assert search._solution("7*3=20\n") != search._solution("7*3=21\n")  # one is wrong
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "BUDGETS", (10, 20, 59, 60))
        vote = search._scores("vote", [PROBLEM], [answers])
        best = search._scores("best", [PROBLEM], [answers])
    assert [vote[f"pass@1.{b}"] for b in (10, 20, 59, 60)] == [0, 0, 0, 1]
    assert [best[f"found.{b}"] for b in (10, 20, 59, 60)] == [0, 0, 1, 1]
    assert [best[f"pass@1.{b}"] for b in (10, 20, 59, 60)] == [0, 0, 0, 0]


def test_search_sampling_costs(monkeypatch):
    """By hand: a token is written once. A value model reads the first answer, and nothing of its
    repetitions. The end token does not count. The answers to a problem fill the largest budget."""
    text = "3*7=21\n21+5=26\n26-2=24\n"
    n = len(tasks.ENCODING.encode_ordinary(text))
    monkeypatch.setattr(search, "BUDGETS", (360,))
    ids = tasks.encode_response(text)
    monkeypatch.setattr(search, "sample_answers",
                        lambda model, prompts, *_, **__: [ids] * len(prompts))
    monkeypatch.setattr(search, "_values", lambda model, problems, texts: [0.5] * len(texts))
    run = SimpleNamespace(eval=SimpleNamespace(rows=8))
    for value, read, value_of_answer in ((None, 0, 0.0), ("a model", n, 0.5)):
        of_first, of_second = search._sample([PROBLEM] * 2, None, value, run, "")
        assert of_first == of_second and of_first[-1][0] >= 360
        assert of_first[:2] == [(n + read, text, value_of_answer),
                                (2 * n + read, text, value_of_answer)]


def test_search_reads_a_beginning_once():
    """By hand: of the second answer only its last line is new, of the third one everything."""
    seen, lines = set(), ["3*7=21\n", "21+5=26\n", "26-2=24\n", "26+2=28\n", "5+3=8\n"]
    ids = [tasks.ENCODING.encode_ordinary(line) for line in lines]
    a, b, c, d, e = ids
    assert search._unread(a + b + c, seen) == len(a + b + c)
    assert search._unread(a + b + d, seen) == len(d)
    assert search._unread(e + b, seen) == len(e + b)
    assert search._unread(a + b + c, seen) == 0


def test_search_value_learns_from_whole_answers(monkeypatch):
    """The loss is the mean over all beginnings of the answers, the empty one included: read one by
    one, each with the label of the whole answer. What follows a third line is not read."""
    texts = ["3*7=21\n21+5=26\n26-2=24\n24+", "3*7=21\n21+5=27\n27-2"]
    monkeypatch.setattr(search, "OWN_PROBLEMS", 1)
    monkeypatch.setattr(search, "OWN_ANSWERS", 2)
    monkeypatch.setattr(search, "_make_problem", lambda rng: (PROBLEM, texts[0]))
    monkeypatch.setattr(search, "sample_answers",
                        lambda *_, **__: [tasks.encode_response(text) for text in texts])
    attempts = search._attempts(None, SimpleNamespace(seed=0, eval=SimpleNamespace(rows=8)))
    beginnings = ["", "3*7=21\n", "3*7=21\n21+5=26\n", "3*7=21\n21+5=26\n26-2=24\n",
                  "", "3*7=21\n", "3*7=21\n21+5=27\n"]
    model = make_judge(0)
    values = search._values(model, [PROBLEM] * 7, beginnings)
    expected = [math.log(x) for x in values[:4]] + [math.log(1 - x) for x in values[4:]]
    loss, _ = search._value_loss(model, attempts, attempts)
    assert float(loss.detach()) == pytest.approx(-sum(expected) / 7, rel=1e-4)


@pytest.mark.parametrize("arm", list(search.ARMS))
def test_search_arm(arm, monkeypatch, tmp_path):
    """A tiny run of each arm has its numbers, and spends no more than it may."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = moe.Transformer(MICRO)
    monkeypatch.setattr(search, "load_kept", lambda *_: model)
    monkeypatch.setattr(search, "BUDGETS", (64, 128))
    monkeypatch.setattr(search, "OWN_PROBLEMS", 4)
    few = ["eval.problems=3", "dev1.steps=2", "dev1.documents=4", "judge.steps=2",
           "judge.documents=4"]
    numbers = run_arm(search, arm, *few)
    assert {"pass@1.64", "pass@1.128", "found.128"} <= set(numbers)
    assert 0.0 <= numbers["pass@1.128"] <= numbers["found.128"] <= 1.0
    assert ("closed" in numbers) == (arm in ("tree", "blind", "exact"))
    assert ("one.train" in numbers) == (arm == "vote")
