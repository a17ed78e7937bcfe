"""Does tree search at inference beat as many tokens of plain sampling?

The paper: Monte Carlo tree search, guided by a value model, helps at inference. But the
space of tokens is far larger than that of chess, and a value model of single steps is hard
to train, so search did not go on to improve the model (R1 v1 section 4.2). Kimi k1.5 has no
tree: it lets the model search within one long answer (section 2.3.1).

    python r1mini.py study search

Sums have one right next step. So the task is Countdown, where four digits have to give a
number, each used once:

    question    Reach 24
                from 2,3,5,7
    answer      3*7=21
                21+5=26
                26-2=24

A policy learns from random solutions. A value model learns from the policy's own answers to
train problems: how likely is an answer with this beginning to be right? All arms have these two
models and the same number of tokens for a question:

    tree     tree search: PUCT, with the policy's probabilities as prior. It gives
             the answer with the highest value of those that it has found
    vote     the most frequent of n sampled answers
    best     of n sampled answers, the one that has the highest value
    blind    the tree without values: it goes by the policy's probabilities alone. The value model
             only chooses among its answers. So tree minus blind is what guidance is worth
    exact    the tree with exact values: whether the number can still be reached. It shows what
             a perfect value model would give. Its counterpart is a sampled answer that is right
             (found), since exact values also tell which answer is right

No arm but the last checks an answer by the rules. An answer ends after its third line.

Each token that the policy writes costs one, and each that the value model reads costs one more. A
beginning that was read before costs nothing. The question and the end token are free. Here a node
of the tree is a whole line, and there are few good ones. So the explosion of the token space, the
first of the paper's reasons, is not tested here.
"""
import math
import random
import re
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations
from statistics import fmean

import torch

import tasks
from engine.devices import copy_model
from engine.evaluate import majority, prompts_of, repeat_for_answers, sample_answers
from engine.sampling import generate, pad_right, reading_passes
from grpo import judge_scores, safety_loss
from r1mini import count_targets, train, train_reward_model
from tools.compare import compare
from tools.figures import Picture, lines_panel
from tools.study import load_kept, start_folder
from tools.tables import cell, table

SEEDS = range(6)
SETTINGS = ("dev1.steps=600", "dev1.documents=80", "dev1.lr=5e-3", "dev1.muon_lr=5e-3",
            "judge.steps=600", "judge.documents=128")
STAGES = "policy", "value"
ARMS = dict.fromkeys(("tree", "vote", "best", "blind", "exact"), "")
DIFFERENCES = {f"tree_minus_{arm}.pass@1": ("search.tree.pass@1", f"search.{arm}.pass@1")
               for arm in ("vote", "best", "blind")}
NUMBERS = 4                             # digits of a question; an answer has one step less
BUDGETS = 64, 128, 256, 512, 1024       # tokens for a question
LINE, ANSWER = 12, 40                   # tokens that a step and an answer may have
OWN_PROBLEMS, OWN_ANSWERS = 3000, 8     # the value model's train problems; answers to each
# Both chosen on dev, with one seed:
EXTENSION = 4                           # steps written at a node; the paper has such a limit too
EXPLORATION = 0.3                       # c of PUCT


# ------------------------------------------------------------------------------
# Countdown

NEWLINE = tasks.ENCODING.encode_single_token("\n")
STEP = re.compile(r"(0|[1-9][0-9]?)([-+*])(0|[1-9][0-9]?)=(0|[1-9][0-9]?)")
WORDS = {"en": ("Reach ", "\nfrom "), "zh": ("达到", "使用")}


def _take_step(numbers, line):
    """The numbers after a step such as 3*7=21, sorted; None if it breaks the rules. Its operands
    must be among the numbers, and its result must be right and from 0 to 99."""
    match = STEP.fullmatch(line)
    if match is None:
        return None
    a, b, result = int(match[1]), int(match[3]), int(match[4])
    left = list(numbers)
    for operand in (a, b):
        if operand not in left:
            return None
        left.remove(operand)
    if tasks.apply_operation(a, match[2], b) != result:
        return None
    return sorted([*left, result])


def _state_after(text, problem):
    """The numbers that are left after some steps. None if a step breaks the rules or has no line
    end."""
    numbers = [int(digit) for digit in problem.expression.split(",")]
    *lines, rest = text.split("\n")
    for line in lines:
        numbers = _take_step(numbers, line) if numbers else None
    return numbers if not rest else None


def _is_right(text, problem):
    """Whether an answer keeps the rules, uses all numbers, and ends with the wanted one."""
    return _state_after(text, problem) == [int(problem.answer)]


def _can_reach(numbers, target):
    """Whether some steps lead from these numbers to the target."""
    if len(numbers) == 1:
        return numbers[0] == target
    for a, b, *rest in permutations(numbers):
        for sign in "+-*":
            result = tasks.apply_operation(a, sign, b)
            if 0 <= result <= 99 and _can_reach([*rest, result], target):
                return True
    return False


def _make_problem(rng, part="train"):
    """(problem, one of its solutions). The digits alone decide the part. Two test questions may
    share their digits, but no test question shares them with training."""
    while True:
        digits = sorted(rng.randint(1, 9) for _ in range(NUMBERS))
        left, lines = list(digits), ""
        while len(left) > 1 and 0 <= left[-1] <= 99:
            rng.shuffle(left)
            a, b, *rest = left
            sign = rng.choice("+-*")
            result = tasks.apply_operation(a, sign, b)
            lines += f"{a}{sign}{b}={result}\n"
            left = [*rest, result]
        expression = ",".join(map(str, digits))
        if 10 <= left[-1] <= 99 and tasks.part_of_problem(expression) == part:
            language = rng.choice(tasks.LANGUAGES)
            reach, use = WORDS[language]
            question = f"{reach}{left[-1]}{use}{expression}"
            return tasks.Problem(question, str(left[-1]), language, NUMBERS - 1, expression,
                                 kind="countdown"), lines


def _problems(part, n):
    """n problems of a part, the same in every run. No two have the same digits and target."""
    rng, problems = random.Random(f"{part}/countdown"), {}
    while len(problems) < n:
        problem, _ = _make_problem(rng, part)
        problems[problem.expression, problem.answer] = problem
    return list(problems.values())


# ------------------------------------------------------------------------------
# Policy and value model


def _prefix(problem, text):
    """The token ids of a question and the beginning of an answer."""
    return tasks.encode_prompt(problem.question) + tasks.ENCODING.encode_ordinary(text)


def _cut(ids):
    """The tokens of an answer up to the end of its third line. What follows is cut off, as the tree
    does it, and so is the end token."""
    ends = [i for i, token in enumerate(ids) if token == NEWLINE][:NUMBERS - 1]
    if len(ends) == NUMBERS - 1:
        return ids[:ends[-1] + 1]
    return [token for token in ids if token != tasks.END_ID]


def _start_models(folder, arm):
    """(policy, value model) of a seed. They are trained once, in a folder that the arms share."""
    run, start = folder.run, start_folder(folder, arm, STAGES)

    def loop(model, state):
        return train(model, run.dev1, lambda rng: tasks.dialogue(*_make_problem(rng)), run.seed,
                     state)

    def no_watch(model, record, bar):
        """The dev problems of the stages are sums."""

    policy = start.stage("policy", copy_model(load_kept(folder, "base")), loop, run.dev1.steps,
                         no_watch)
    attempts = []

    def draw(rng):
        if not attempts:
            attempts.extend(_attempts(policy, run))
        return rng.choice(attempts)

    value = train_reward_model(start, "value", policy, draw, _value_loss)
    return policy.eval(), value.eval()


@dataclass(frozen=True)
class Attempt:
    """An answer of the policy, as the value model learns from it."""
    tokens: list[int]  # question and answer
    weight: list[int]  # 1 where the question and each step end, else 0
    right: float       # 1.0 if the answer was right in the end, else 0.0


def _attempts(policy, run):
    """The policy's own answers to train problems. Each beginning of an answer gets the label of
    the whole answer. Averaged over many answers, this label is the chance that the policy ends
    right from there (Monte Carlo)."""
    rng = random.Random(f"{run.seed}/value")
    asked = repeat_for_answers([_make_problem(rng)[0] for _ in range(OWN_PROBLEMS)], OWN_ANSWERS)
    answers = sample_answers(policy, prompts_of(asked), ANSWER, run.eval.rows, seed=run.seed,
                             name="value: samples")
    attempts = []
    for answer, problem in zip(answers, asked):
        question, ids = tasks.encode_prompt(problem.question), _cut(answer)
        ends = [0] * (len(question) - 1) + [1] + [int(token == NEWLINE) for token in ids]
        right = float(_is_right(tasks.decode(ids), problem))
        attempts.append(Attempt(question + ids, ends, right))
    return attempts


def _value_loss(model, attempts, step_attempts):
    """The loss of the value model: cross-entropy after the question and each step, for train."""
    tokens = pad_right([x.tokens for x in attempts], tasks.PAD_ID, model.device)     # (B, T)
    real = pad_right([[1] * len(x.tokens) for x in attempts], 0, model.device) > 0
    ends = pad_right([x.weight for x in attempts], 0, model.device) > 0
    scores = model(tokens, real, logits_at=ends).logits.squeeze(-1)                  # (steps,)
    right = torch.tensor([x.right for x in attempts], device=model.device).unsqueeze(1)
    n_steps = max(1, count_targets(step_attempts))
    loss = safety_loss(scores, right.expand_as(ends)[ends]) / n_steps
    return loss, loss.detach()


@torch.no_grad()
def _values(model, problems, texts):
    """The value model's estimate for each beginning of an answer: the probability that the answer
    ends right."""
    sequences = [_prefix(problem, text) for problem, text in zip(problems, texts)]
    return [float(score.sigmoid()) for part in reading_passes(sequences)
            for score in judge_scores(model, part, tasks.PAD_ID)]


def _exact_values(problems, texts):
    """1.0 where the wanted number can still be reached, else 0.0."""
    values = []
    for problem, text in zip(problems, texts):
        numbers = _state_after(text, problem)
        values.append(float(bool(numbers) and _can_reach(numbers, int(problem.answer))))
    return values


# ------------------------------------------------------------------------------
# Tree search


@dataclass
class Node:
    """The beginning of an answer."""
    text: str = ""         # its steps, each with a line end
    depth: int = 0         # number of steps
    prior: float = 1.0     # P, the policy's probability of the last step
    tokens: int = 0        # of the last step
    visits: int = 0        # N
    total: float = 0.0     # W, the sum of the values of all visits
    closed: bool = False   # whether nothing is left to visit below it
    children: list = field(default_factory=list)


def _puct(parent, child):
    """Q + c P sqrt(N of the parent) / (1 + N) (AlphaZero, arXiv 1712.01815). A child without a
    visit has its parent's Q. With 0, as in chess, where half of all positions are lost, the first
    child would keep its siblings unvisited for long."""
    node = child if child.visits else parent
    mean = node.total / node.visits                                     # Q = W / N
    bonus = EXPLORATION * child.prior * math.sqrt(parent.visits) / (1 + child.visits)
    return mean + bonus


def _select(root):
    """The path from the root to a leaf, along the highest PUCT. Closed nodes are passed over: a
    whole answer is visited once, since its value does not change."""
    path = [root]
    while path[-1].children:
        parent = path[-1]
        children = [child for child in parent.children if not child.closed]
        path.append(max(children, key=lambda child: _puct(parent, child)))
    return path


def _back_up(path, value):
    """Adds the value of a path's leaf to all nodes of the path. Closes the leaf if it is a whole
    answer, and each node whose children are all closed."""
    leaf = path[-1]
    leaf.closed = leaf.depth == NUMBERS - 1
    for node in reversed(path):
        node.visits += 1
        node.total += value
        if node.children:
            node.closed = all(child.closed for child in node.children)


def _expand(node, steps):
    """Gives a node its children. steps: (text, probability, tokens) of each step that the policy
    wrote. Equal steps are one child. The priors sum to 1."""
    distinct = {text: (probability, tokens) for text, probability, tokens in steps}
    total = sum(probability for probability, _ in distinct.values())
    for text, (probability, tokens) in distinct.items():
        node.children.append(Node(node.text + text, node.depth + 1, probability / total, tokens))


def _next_steps(policy, problems, texts, seed):
    """EXTENSION steps of the policy after each beginning: (text, probability, tokens) of each."""
    prompts = [_prefix(problem, text) for problem, text in zip(problems, texts)]
    samples = generate(policy, repeat_for_answers(prompts, EXTENSION), LINE, NEWLINE,
                       tasks.PAD_ID, seed=seed)
    probabilities = samples.logprobs.sum(1).exp().tolist()
    steps = [(tasks.decode(ids), probability, len(ids))
             for ids, probability in zip(samples.answers(), probabilities)]
    return [steps[i:i + EXTENSION] for i in range(0, len(steps), EXTENSION)]


@dataclass
class Tree:
    """The search for one problem."""
    problem: tasks.Problem
    root: Node = field(default_factory=Node)
    spent: int = 0                                # tokens so far
    # Of each whole answer: (tokens spent by then, text, value).
    answers: list = field(default_factory=list)


def _search(problems, write, read):
    """Searches one tree for each problem, all trees in step. Returns the trees. A tree ends when
    its tokens are spent or its root is closed.

    write(problems, texts, seed) gives the next steps, read(problems, texts) the values.
    """
    trees, round_number = [Tree(problem) for problem in problems], 0
    while busy := [tree for tree in trees if tree.spent < BUDGETS[-1] and not tree.root.closed]:
        # Walk to a leaf, read its value, and back it up.
        paths = [_select(tree.root) for tree in busy]
        leaves = [path[-1] for path in paths]
        values = read([tree.problem for tree in busy], [leaf.text for leaf in leaves])
        for tree, path, leaf, value in zip(busy, paths, leaves, values):
            tree.spent += leaf.tokens
            _back_up(path, value)
            if leaf.closed:
                tree.answers.append((tree.spent, leaf.text, value))
        # Write the next steps after each leaf that is no whole answer.
        growing = [(tree, leaf) for tree, leaf in zip(busy, leaves) if not leaf.closed]
        if growing:
            steps_of_leaf = write([tree.problem for tree, _ in growing],
                                  [leaf.text for _, leaf in growing], round_number)
            for (tree, leaf), steps in zip(growing, steps_of_leaf):
                _expand(leaf, steps)
                tree.spent += sum(tokens for _, _, tokens in steps)
        round_number += 1
    return trees


# ------------------------------------------------------------------------------
# Sampling, and the choice of one answer


def _sample(problems, policy, value, run, part):
    """Whole answers to each problem, enough for the largest budget: [(tokens spent by then, text,
    value)] of each problem, as a Tree has them. A value model reads each beginning once."""
    n = BUDGETS[-1] // (6 * (NUMBERS - 1))  # a step has at least 6 tokens
    asked = repeat_for_answers(problems, n)
    ids = sample_answers(policy, prompts_of(asked), ANSWER, run.eval.rows, seed=1, name=part)
    ids = [_cut(answer) for answer in ids]
    texts = [tasks.decode(x) for x in ids]
    values = _values(value, asked, texts) if value else [0.0] * len(texts)
    answers = []
    for i in range(0, len(asked), n):
        spent, seen, of_problem = 0, set(), []
        for j in range(i, i + n):
            spent += len(ids[j])
            if value:
                spent += _unread(ids[j], seen)
            of_problem.append((spent, texts[j], values[j]))
        answers.append(of_problem)
    return answers


def _unread(ids, seen):
    """How many tokens of an answer the value model reads, if beginnings that it has seen cost
    nothing. Adds those of this answer, each of whole lines, to the set `seen`."""
    tokens, begin = 0, 0
    for i, token in enumerate(ids):
        if token == NEWLINE or i == len(ids) - 1:
            beginning = tuple(ids[:i + 1])
            if beginning not in seen:
                seen.add(beginning)
                tokens += i + 1 - begin
            begin = i + 1
    return tokens


def _solution(text):
    """A form that is the same for answers which differ only in the order of steps, or of operands
    (7*3=21 and 3*7=21). None if a line is no step."""
    steps = []
    for line in text.splitlines():
        match = STEP.fullmatch(line)
        if match is None:
            return None
        operands = [match[1], match[3]] if match[2] == "-" else sorted((match[1], match[3]))
        steps.append((*operands, match[2], match[4]))  # with the result, which may be wrong
    return tuple(sorted(steps))


def _choose(arm, answers):
    """The text of the answer that an arm gives; None if it has none. answers: (tokens, text, value)
    of each that it can choose from."""
    if arm != "vote":
        return max(answers, key=lambda answer: answer[2])[1] if answers else None
    winner = majority([_solution(text) for _, text, _ in answers])
    return next((text for _, text, _ in answers if _solution(text) == winner), None)


def _scores(arm, problems, answers_of_problem):
    """For each budget: how often the chosen answer is right, and how often at least one is."""
    numbers = {}
    for budget in BUDGETS:
        right, found = 0, 0
        for problem, answers in zip(problems, answers_of_problem):
            affordable = [answer for answer in answers if answer[0] <= budget]
            chosen = _choose(arm, affordable)
            right += chosen is not None and _is_right(chosen, problem)
            found += any(_is_right(text, problem) for _, text, _ in affordable)
        numbers[f"pass@1.{budget}"] = right / len(problems)
        numbers[f"found.{budget}"] = found / len(problems)
    return numbers


def measure_arm(arm, folder, part="test"):
    """The numbers of an arm at each budget. Of a tree also how often nothing was left to visit, and
    the tokens that it spent. Of vote also how often one answer of the policy is right, on train
    problems too: the value model's labels come from these, and the policy has learnt them."""
    run, (policy, value) = folder.run, _start_models(folder, arm)
    problems, numbers = _problems(part, run.eval.problems), {}
    if arm in ("vote", "best"):
        answers = _sample(problems, policy, value if arm == "best" else None, run, arm)
    else:
        read = {"tree": partial(_values, value), "exact": _exact_values,
                "blind": lambda problems, texts: [0.0] * len(texts)}[arm]
        trees = _search(problems, partial(_next_steps, policy), read)
        answers = [tree.answers for tree in trees]
        numbers |= {"closed": fmean(tree.root.closed for tree in trees),
                    "spent": fmean(tree.spent for tree in trees)}
    if arm == "blind":
        for i, (problem, of_problem) in enumerate(zip(problems, answers)):
            texts = [text for _, text, _ in of_problem]
            values = _values(value, [problem] * len(texts), texts)
            answers[i] = [(spent, text, x) for (spent, text, _), x in zip(of_problem, values)]
    if arm == "vote":
        numbers["one"] = _mean_right(problems, answers)
        train_problems = _problems("train", run.eval.problems)
        of_train = _sample(train_problems, policy, None, run, "train problems")
        numbers["one.train"] = _mean_right(train_problems, of_train)
    return numbers | _scores(arm, problems, answers)


def _mean_right(problems, answers_of_problem):
    """The share of right answers among all that were sampled."""
    return fmean(_is_right(text, problem) for problem, answers in zip(problems, answers_of_problem)
                 for _, text, _ in answers)


def combine(numbers):
    """pass@1 of each arm at the largest budget."""
    return {f"search.{arm}.pass@1": numbers[f"{arm}.pass@1.{BUDGETS[-1]}"] for arm in ARMS}


NAMES = {"tree": "tree search", "vote": "majority vote", "best": "best of n by value",
         "blind": "tree without values", "exact": "tree search, exact values"}


def picture(rows):
    """How often the chosen answer is right, and any answer, by tokens."""
    points = [100 * (rows["search.tree.pass@1"]["mean"] - rows[f"search.{arm}.pass@1"]["mean"])
              for arm in ("vote", "best")]
    return Picture([lines_panel(f"Tree minus vote:\n{points[0]:+.1f} points,", rows, NAMES,
                                "pass@1", "tokens for a question", "the chosen answer is right"),
                    lines_panel(f"minus best of n:\n{points[1]:+.1f}", rows, NAMES, "found",
                                "tokens for a question", "any answer is right")],
                   "Countdown with four digits, test questions")


def page(rows, notes):
    """The lines of the report: two tables by budget, and the tree against the other arms."""
    lines = [f"One answer of the policy is right in {cell(rows, 'vote.one')}, on train problems in "
             f"{cell(rows, 'vote.one.train')}. With the largest budget nothing is left to visit in "
             f"{cell(rows, 'tree.closed')} of the trees. A tree spends {cell(rows, 'tree.spent')} "
             "tokens.", ""]
    for key, head in (("pass@1", "the chosen answer is right, by tokens"),
                      ("found", "any answer is right, by tokens")):
        body = [[name, *(cell(rows, f"{arm}.{key}.{budget}") for budget in BUDGETS)]
                for arm, name in NAMES.items()]
        lines += [*table([head, *map(str, BUDGETS)], body), ""]
    pairs = [(arm, f"search.{arm}.pass@1", "tree", "search.tree.pass@1")
             for arm in ("vote", "best", "blind")]
    pairs.append(("best", f"best.found.{BUDGETS[-1]}", "exact", "search.exact.pass@1"))
    for other, other_key, arm, key in pairs:
        comparison = compare(rows, other_key, key)
        if comparison:
            found = ", any of its answers" if "found" in other_key else ""
            lines.append(f"- {NAMES[arm]} minus {NAMES[other]}{found}, {BUDGETS[-1]} tokens: "
                         f"{comparison.text(points=True)}")
    return lines
