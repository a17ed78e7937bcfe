"""Which problems should RL ask, and may a long answer be written in parts?

The paper: RL asks easy problems first, and draws problems in proportion to 1 - success rate
(Kimi k1.5 section 2.3.4). Uniform sampling throughout reaches 0.553; uniform sampling and
then only hard problems reaches 0.590 (section 3.5, Figure 9, iteration 42). Long answers are
written in parts, so that no rollout waits for them (section 2.6).

    python r1mini.py study sampling

All arms start from the same kept base, with Kimi's objective. They ask problems of one pool,
and stop at the same number of generated tokens:

    uniform       all problems of the pool are equally likely
    hard          uniform up to half of the tokens, then only five and six operations
    prioritized   in proportion to 1 - success rate. The first success rates are the base's,
                  from eight answers to each problem (ten in section 2.1). Their tokens count,
                  so fewer are left for RL. A rate is replaced when its problem is asked again
    parts         uniform. An answer gets PART tokens in a rollout. In the next rollout an
                  unfinished answer is continued. A group is ready when all its answers are
                  finished. The policy is updated when 24 groups are ready, as many as in a
                  rollout of the other arms. Each token keeps the log-probability with which it
                  was drawn
    parts_last    the same, but the loss covers only the last part of an answer
"""
import heapq
import random
from dataclasses import dataclass, field
from statistics import fmean

import torch

import tasks
from engine.devices import copy_model
from engine.evaluate import evaluate
from engine.optim import make_optimizers
from engine.sampling import Samples, generate, pad_right
from grpo import Rollout, advantages, improve
from r1mini import draw_problem, make_task, rule_rewards
from tools.compare import compare
from tools.figures import Picture, arms_panel
from tools.study import load_kept, test_numbers
from tools.tables import cell, table

SEEDS = range(6)
SETTINGS, STAGES = ("zero.objective=kimi", "eval.samples=8"), ()
ARMS = {"uniform": "", "hard": "", "prioritized": "", "parts": "", "parts_last": ""}
DIFFERENCES = {f"sampling.{arm}.minus_uniform.pass@1": (f"{arm}.pass@1", "uniform.pass@1")
               for arm in ARMS if arm != "uniform"}
POOL = 512            # problems, of the training part
FIRST_ANSWERS = 8     # to each problem, for its first success rate
TOKENS = 65           # mean of an answer in Zero's run; the budget is steps x P x G x TOKENS
PART = 48             # tokens that an answer gets in a rollout
HARD = (5, 6)         # operations
FLOOR = 0.02          # smallest weight: a solved problem is still drawn sometimes


# ------------------------------------------------------------------------------
# The pool


class Pool:
    """Problems, and how often each was answered right when it was last asked."""

    def __init__(self, arm, model, run):
        rng = random.Random(f"{run.seed}/pool")
        self.arm = arm
        self.problems = [draw_problem(rng, run, run.zero.levels) for _ in range(POOL)]
        self.success = {}  # {question: share of right answers}
        self.tokens = 0    # generated for the first success rates
        if arm == "prioritized":
            means, by_problem = evaluate(model, self.problems, FIRST_ANSWERS, 1.0, 1.0,
                                         run.zero.max_new_tokens, run.eval.rows)
            self.tokens = round(means["length"] * POOL * FIRST_ANSWERS)
            for problem, r in zip(self.problems, by_problem):
                self.success[problem.question] = r["right"] / FIRST_ANSWERS

    def draw(self, rng, n, progress):
        """n different problems. progress: the share of the budget that is spent."""
        problems = self.problems
        if self.arm == "hard" and progress >= 0.5:
            problems = [problem for problem in problems if problem.level in HARD]
        if self.arm != "prioritized":
            return rng.sample(problems, n)
        # Each problem gets a random number to the power of 1 / weight; the n largest are drawn.
        # That is drawing one after the other in proportion to the weights.
        keys = {}
        for i, problem in enumerate(problems):
            weight = max(FLOOR, 1 - self.success[problem.question])
            keys[i] = rng.random() ** (1 / weight)
        return [problems[i] for i in heapq.nlargest(n, keys, key=keys.get)]

    def update(self, problems, right):
        """Keeps the success rates of a rollout. right: (P, G), 1.0 for a right answer."""
        for problem, share in zip(problems, right.mean(1).tolist()):
            self.success[problem.question] = share


# ------------------------------------------------------------------------------
# Answers that are written in parts


@dataclass
class Answer:
    """An answer, finished or not."""
    prompt: list[int]
    ids: list[int] = field(default_factory=list)         # written so far
    logprobs: list[float] = field(default_factory=list)  # of each, by the policy that drew it
    drawn_in: list[int] = field(default_factory=list)    # iteration in which each was drawn
    last_part: int = 0        # tokens of its last part
    finished: bool = False    # it ended by itself

    def is_done(self, limit):
        """Whether the answer has ended or has reached the limit."""
        return self.finished or len(self.ids) >= limit


def _write_on(model, answers, part, s, seed, iteration):
    """Each unfinished answer gets up to `part` more tokens. Returns these answers. iteration: the
    number of updates of the policy before."""
    rows = [answer for answer in answers if not answer.is_done(s.max_new_tokens)]
    samples = generate(model, [answer.prompt + answer.ids for answer in rows], part,
                       tasks.END_ID, tasks.PAD_ID, s.temperature, seed=seed)
    for i, answer in enumerate(rows):
        room = s.max_new_tokens - len(answer.ids)
        written = samples.answer[i]
        ids = samples.tokens[i][written].tolist()[:room]
        answer.ids += ids
        answer.logprobs += samples.logprobs[i][written].tolist()[:room]
        answer.drawn_in += [iteration] * len(ids)
        answer.last_part = len(ids)
        answer.finished = ids[-1] == tasks.END_ID
    return rows


def _as_samples(answers, only_last, device):
    """The Samples of finished answers. only_last: earlier parts are read, but not learnt from."""
    tokens = pad_right([answer.prompt + answer.ids for answer in answers], tasks.PAD_ID)  # (N, T)
    learnt = torch.zeros(tokens.shape, dtype=torch.bool)
    logprobs = torch.zeros(tokens.shape)
    for i, answer in enumerate(answers):
        count = answer.last_part if only_last else len(answer.ids)
        end = len(answer.prompt) + len(answer.ids)
        learnt[i, end - count:end] = True
        logprobs[i, end - count:end] = torch.tensor(answer.logprobs[-count:])
    finished = torch.tensor([answer.finished for answer in answers])
    return Samples(tokens.to(device), learnt.to(device), logprobs.to(device), finished.to(device))


def _score(problems, answers, task, s, only_last, device):
    """The Rollout of groups that are finished. problems: P. answers: N, the answers of a group
    are neighbours."""
    problem_of_answer = [problem for problem in problems for _ in range(s.group_size)]
    texts = [task.decode(answer.ids) for answer in answers]
    reward_parts, rewards = {}, 0.0
    for name, (weight, reward) in task.rewards.items():
        reward_parts[name] = torch.tensor(reward(texts, problem_of_answer))
        rewards = rewards + weight * reward_parts[name]
    rewards = rewards.view(len(problems), s.group_size)
    return Rollout(problems, _as_samples(answers, only_last, device), texts, reward_parts, rewards,
                   advantages(rewards, s.normalize_std))


# ------------------------------------------------------------------------------
# The loop: that of grpo.train_rl, which ends when the budget is spent


def measure_arm(arm, folder):
    """The numbers of an arm: on test, and how it spent its tokens."""
    run, s = folder.run, folder.run.zero
    base = load_kept(folder, "base")
    model, reference = copy_model(base), copy_model(base).eval()
    optimizers, task = make_optimizers(model, s.lr), make_task(run, s, rule_rewards(s))
    pool, in_parts = Pool(arm, base, run), arm.startswith("parts")
    part = PART if in_parts else s.max_new_tokens
    # All arms have the same total of tokens; RL gets `budget` of them.
    slots = s.problems * s.group_size
    budget = s.steps * slots * TOKENS - pool.tokens
    waiting, ready = [], []  # groups: (problem, answers)
    spent, rollouts, iterations, idle, kept_back, old = 0, 0, 0, [], [], []
    while spent < budget:
        rng = random.Random(f"{run.seed}/rl/{rollouts}")
        new_problems = pool.draw(rng, s.problems - len(waiting), spent / budget)
        waiting += [(problem, [Answer(task.encode(problem)) for _ in range(s.group_size)])
                    for problem in new_problems]
        rows = _write_on(model, [answer for _, answers in waiting for answer in answers], part, s,
                         rng.getrandbits(60), iterations)
        lengths = [answer.last_part for answer in rows]
        # A row of a fixed batch idles from the end of its answer to the end of the longest one.
        # It idles all the time if its answer is finished and its group is not.
        idle.append(1 - sum(lengths) / (slots * max(lengths)))
        # The schedule of the learning rate goes by tokens, so that it ends with the budget.
        step = int(s.steps * spent / budget)
        spent, rollouts = spent + sum(lengths), rollouts + 1

        still_waiting = []
        for problem, answers in waiting:
            is_ready = all(answer.is_done(s.max_new_tokens) for answer in answers)
            (ready if is_ready else still_waiting).append((problem, answers))
        waiting = still_waiting
        kept_back.append(len(waiting) / s.problems)
        if len(ready) < s.problems:
            continue
        groups, ready = ready[:s.problems], ready[s.problems:]
        problems = [problem for problem, _ in groups]
        answers = [answer for _, of_group in groups for answer in of_group]
        drawn_in = [i for answer in answers for i in answer.drawn_in]
        old.append(sum(i < iterations for i in drawn_in) / len(drawn_in))
        rollout = _score(problems, answers, task, s, arm == "parts_last", model.device)
        pool.update(problems, rollout.reward_parts["accuracy"].view(-1, s.group_size))
        model.train()
        improve(model, reference, optimizers, rollout, s, rng, step)
        iterations += 1
        if iterations % s.reference_every == 0:
            reference.load_state_dict(model.state_dict())
    return test_numbers(model, run) | {
        "rollouts": rollouts, "iterations": iterations, "tokens_generated": spent + pool.tokens,
        "first_tokens": pool.tokens, "idle": fmean(idle), "kept_back": fmean(kept_back),
        "old": fmean(old)}


NAMES = {"uniform": "uniform", "hard": "uniform, then hard ones",
         "prioritized": "by 1 - success rate", "parts": "in parts, all of them in the loss",
         "parts_last": "in parts, only the last one in the loss"}


def picture(rows):
    """pass@1 of all arms, and the idle rows. The titles compare an arm with uniform."""
    names = {"uniform": "uniform", "hard": "then hard ones", "prioritized": "by 1 - success rate",
             "parts": "in parts", "parts_last": "last part in loss"}
    points = 100 * (rows["prioritized.pass@1"]["mean"] - rows["uniform.pass@1"]["mean"])
    idle, in_parts = rows["uniform.idle"]["mean"], rows["parts.idle"]["mean"]
    return Picture([arms_panel(f"By 1 - success rate:\n{points:+.1f} points of pass@1", rows, names,
                               "pass@1", "correct answers"),
                    arms_panel(f"Idle rows: {in_parts:.0%}\ninstead of {idle:.0%}", rows, names,
                               "idle", "rows that idle")],
                   "test problems, temperature 1; a dot is a seed, a line the mean")


def page(rows, notes):
    """The lines of the report: the arms, and each against uniform."""
    columns = {"pass@1": "pass@1", "length": "tokens", "rollouts": "rollouts",
               "iterations": "iterations of learning", "tokens_generated": "tokens generated",
               "first_tokens": "of these for success rates", "idle": "share of idle rows",
               "kept_back": "groups that wait for the next rollout",
               "old": "tokens of an older policy"}
    body = [[name, *(cell(rows, f"{arm}.{key}") for key in columns)]
            for arm, name in NAMES.items()]
    lines = [*table(["arm", *columns.values()], body), ""]
    for arm, name in NAMES.items():
        comparison = compare(rows, "uniform.pass@1", f"{arm}.pass@1")
        if arm != "uniform" and comparison:
            lines.append(f"- {name}, minus uniform: {comparison.text(points=True)}")
    return lines
