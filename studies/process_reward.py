"""Do rewards for single steps help?

The paper: a process reward model is good for reranking answers. In large RL it is not worth its
cost: steps are hard to define and to judge, and the policy hacks it (R1 v1 section 4.2). In
DeepSeekMath, process supervision (section 4.1.3) was a little better than outcome supervision
(Figure 5).

    python r1mini.py study process_reward

A step ends at " then ", " ok " or </think>. The last step is the answer:

    25-7=18 then | 18+9=27</think> | <answer>27</answer>

All arms start from the same kept base and draw the same questions. They stop when they have
spent the same FLOPs, those of labels and of the reward model included:

    outcome    one reward, for a right answer
    rule       a reward for each right step, and for a right answer. The rule knows the solution;
               no real task has such a rule
    model      a reward model scores each step, and the answer too. This arm gets no reward by a
               rule. The reward model learns from Monte Carlo labels: how often the base gets from a
               prefix to a right answer
    prefixes   one reward, for a right answer; a token that k answers share counts once, not k
               times (lambda-GRPO, arXiv 2509.21154)

Why prefixes: where answers of a group begin with the same tokens, GRPO in effect gives these tokens
the mean advantage of these answers. That is a Monte Carlo process reward already. But a token that
k answers share is counted k times. This arm divides by k.

The reward model also reranks 16 answers of the base to each test problem. To read them costs as
much as to write 16 more answers. So a majority of 32 is the comparison at equal compute.
"""
import random
import re
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.nn.functional as F
from tqdm import tqdm

import grpo
import tasks
from engine.devices import copy_model
from engine.evaluate import prompts_of, repeat_for_answers, sample_answers, selection_scores
from engine.optim import make_optimizers
from engine.sampling import pad_right, reading_passes
from grpo import clipped_surrogate, improve, kl_k3, make_rollout
from r1mini import draw_problem, make_task, one_of, pointwise_loss, rule_rewards, train_reward_model
from tools.compare import compare
from tools.figures import Picture, arms_panel, lines_panel
from tools.flops import flops_per_token
from tools.study import load_kept, test_numbers
from tools.tables import cell, table

SETTINGS = ("zero.objective=token_grpo", "zero.format_weight=0", "judge.steps=200",
            "judge.documents=48", "judge.lr=2e-3", "judge.muon_lr=2e-3")
SEEDS, STAGES = range(6), ("process",)
ARMS = dict.fromkeys(("outcome", "rule", "model", "prefixes"), "")
# At the end of the budget all arms may be near the ceiling. So they are also compared in the middle
# of it, on their rollouts.
DIFFERENCES = {f"{arm}_minus_outcome.{key}": (f"{arm}.{key}", f"outcome.{key}")
               for arm in ("rule", "model", "prefixes") for key in ("pass@1", "right.4")}
DIFFERENCES |= {f"rerank_minus_vote{k}": ("model.rerank", f"model.rerank.cons@{k}")
                for k in (16, 32)}
BUDGET = 3e12                # FLOPs of an arm; Zero's recipe takes half as many
PARTS = 8                    # training curves have a point for each eighth of the FLOPs
LABELLED, TRIES = 600, 2     # train problems for the labels; answers to each
PREFIXES, GO_ON = 2, 8       # prefixes of an answer that get a label; answers from each prefix
RERANKED, SAMPLES = 500, 16  # test problems, and answers of the base to each


# ------------------------------------------------------------------------------
# Steps

ENDS = {tasks.ENCODING.encode_single_token(tasks.END_THINK)}
for words in tasks.WORDS.values():
    ENDS |= {tasks.ENCODING.encode_single_token(words[name]) for name in ("then", "ok")}


def _step_ends(ids):
    """Where the steps of an answer end: the index of the last token of each."""
    last = len(ids) - 1
    return [t for t, token in enumerate(ids[:last]) if token in ENDS] + [last]


def _right_steps(ids, problem):
    """1.0 for each right step of an answer, else 0.0. Step k is right if it is the k-th operation
    of the sum with its right result; a slip may come before, if the step corrects it. The last
    step is right if the answer is."""
    first, *terms = re.findall(r"[+-]?[0-9]+", problem.expression)  # 25-7+9: 25, -7, +9
    wanted, total = [], int(first)
    for term in terms:
        wanted.append(f"{total}{term}={total + int(term)}")
        total += int(term)
    ends, rewards, begin = _step_ends(ids), [], 0
    for k, end in enumerate(ends[:-1]):
        text = tasks.TAG.sub("", tasks.decode(ids[begin:end]))
        final = re.split("wait|等等", text)[-1]  # what follows "wait" replaces a slip
        statement = re.split("check|检查", final)[0].strip()
        rewards.append(float(k < len(wanted) and statement == wanted[k]))
        begin = end + 1
    return [*rewards, tasks.accuracy(tasks.decode(ids), problem)]


# ------------------------------------------------------------------------------
# The reward model of steps


@dataclass
class Labels:
    """What the reward model learns from, and what it cost."""
    examples: list   # of tasks.Judgement: a prefix, and how often it leads to a right answer
    tokens: int      # that the base wrote for the labels
    prompts: int     # that it read, of prompts and prefixes


def _label_prefixes(base, run):
    """Labels by Monte Carlo (Math-Shepherd, arXiv 2312.08935). The base answers train problems, and
    goes on GO_ON times from prefixes of its answers. A prefix's label is the share of right
    answers. A whole answer's label is 1 if it is right, else 0."""
    rng, asked = random.Random(f"{run.seed}/labels"), []
    for _ in range(LABELLED):
        asked += [draw_problem(rng, run, run.zero.levels)] * TRIES
    limit, rows = run.zero.max_new_tokens, run.eval.rows
    prompts = prompts_of(asked)
    answers = sample_answers(base, prompts, limit, rows, seed=run.seed)
    labels = Labels([], sum(map(len, answers)), sum(map(len, prompts)) // TRIES)
    begins, problem_of_begin = [], []
    for ids, prompt, problem in zip(answers, prompts, asked):
        right = tasks.accuracy(tasks.decode(ids), problem)
        labels.examples.append(tasks.Judgement(prompt + ids, safe=right))
        ends = _step_ends(ids)[:-1]
        for end in rng.sample(ends, min(PREFIXES, len(ends))):
            begins.append((prompt, ids[:end + 1]))
            problem_of_begin.append(problem)
    rests = sample_answers(base, repeat_for_answers([p + begin for p, begin in begins], GO_ON),
                           limit, rows, seed=run.seed + 1)
    labels.tokens += sum(map(len, rests))
    for i, ((prompt, begin), problem) in enumerate(zip(begins, problem_of_begin)):
        share = fmean(tasks.accuracy(tasks.decode(begin + rest), problem)
                      for rest in rests[i * GO_ON:(i + 1) * GO_ON])
        labels.examples.append(tasks.Judgement(prompt + begin, safe=share))
        labels.prompts += len(prompt + begin)
    return labels


def _train_judge(folder, base):
    """(the reward model, the FLOPs of its labels and its training)."""
    run, labels = folder.run, _label_prefixes(base, folder.run)
    judge = train_reward_model(folder, "process", base, one_of(labels.examples), pointwise_loss)
    mean_length = fmean(len(example.tokens) for example in labels.examples)
    learnt = run.judge.steps * run.judge.documents * mean_length
    write, read = (flops_per_token(base.config, work) for work in ("write", "read"))
    flops = write * labels.tokens + read * labels.prompts
    return judge.eval(), flops + flops_per_token(judge.config, "learn") * learnt


@torch.no_grad()
def _judge_steps(judge, prompts, answers):
    """The scores of the steps of each answer, from 0 to 1: N lists. An answer is read once for all
    its steps, since no token sees what follows it."""
    sequences = [prompt + ids for prompt, ids in zip(prompts, answers)]
    places = [[len(prompt) + end for end in _step_ends(ids)]
              for prompt, ids in zip(prompts, answers)]
    scores = []
    for rows in reading_passes(sequences):
        tokens = pad_right(rows, tasks.PAD_ID, judge.device)
        wanted = torch.zeros_like(tokens, dtype=torch.bool)
        places_of_rows = places[len(scores):len(scores) + len(rows)]
        for row, ends in enumerate(places_of_rows):
            wanted[row, ends] = True
        length = torch.tensor([[len(ids)] for ids in rows], device=tokens.device)
        real = torch.arange(tokens.size(1), device=tokens.device) < length
        values = iter(judge(tokens, real, logits_at=wanted).logits.flatten().sigmoid().tolist())
        scores += [[next(values) for _ in ends] for ends in places_of_rows]
    return scores


# ------------------------------------------------------------------------------
# Advantages and objective


def _process_advantages(step_rewards, ends, first, T):
    """DeepSeekMath section 4.1.3: the advantage of a token is the sum of the normalised rewards of
    all steps that end at it or later. (G, T) of a group of G answers. If each answer has one step,
    it is the advantage of outcome supervision (section 4.1.2).

    step_rewards: G lists. ends: the index in the answer at which each step ends, G lists. first:
    the column of the answers' first token, after the prompt that they share.
    """
    rewards = torch.tensor([reward for of_answer in step_rewards for reward in of_answer])
    advantage = torch.zeros(len(ends), T)
    if (rewards == rewards[0]).all():
        return advantage  # exactly 0; see grpo.advantages
    for i, of_answer in enumerate(step_rewards):
        normalised = (torch.tensor(of_answer) - rewards.mean()) / rewards.std()  # (steps,)
        begin = first
        for k, end in enumerate(ends[i]):
            advantage[i, begin:first + end + 1] = normalised[k:].sum()           # A_it
            begin = first + end + 1
    return advantage


def _sharing_answers(tokens, answer):
    """(G, T): at each token of an answer, how many answers of the group are the same up to this
    token, itself included. 0 elsewhere. tokens (G, T); answer (G, T) is True at the tokens of an
    answer."""
    begin = int(answer[0].int().argmax())  # all answers follow the same prompt
    both = answer.unsqueeze(0) & answer.unsqueeze(1)                 # (G, G, T)
    same = (tokens.unsqueeze(0) == tokens.unsqueeze(1)) & both       # (G, G, T)
    same_so_far = same[..., begin:].int().cumprod(-1)                # (G, G, T - begin)
    return F.pad(same_so_far.sum(1), (begin, 0))


def _token_grpo(new, old, reference, advantage, mask, batch, s):
    """DeepSeekMath eq 3, as grpo.grpo, but with an advantage for each token: (n, T or more)."""
    A = advantage[:, :new.size(1)]                                   # (n, T), A_it
    surrogate, clip_acts = clipped_surrogate((new - old).exp(), A, s)
    kl = kl_k3(new, reference)
    length = mask.sum(1, keepdim=True).clamp(min=1)                  # (n, 1), |o_i|
    J = (mask / length / batch.answers * (surrogate - s.beta * kl)).sum()
    return J, {"kl": kl, "clip": clip_acts}


grpo.OBJECTIVES["token_grpo"] = _token_grpo
grpo.SETTINGS["token_grpo"] = {}


# ------------------------------------------------------------------------------
# RL


def _give_advantages(arm, rollout, judge):
    """Replaces the advantages of a rollout by those of an arm, one for each token: (P, G, T).
    Returns the step rewards of each answer, N lists."""
    samples, answers = rollout.samples, rollout.samples.answers()
    G, T = rollout.rewards.size(1), samples.tokens.size(1)
    first = samples.answer.int().argmax(1).tolist()                  # N, the prompts' lengths
    ends = [_step_ends(ids) for ids in answers]
    if arm == "rule":
        problem_of_answer = repeat_for_answers(rollout.problems, G)
        rewards = [_right_steps(*pair) for pair in zip(answers, problem_of_answer)]
    elif arm == "model":
        prompts = [row[:begin].tolist() for row, begin in zip(samples.tokens, first)]
        # Rounded, since noise must not become an advantage.
        rewards = [[round(score, 2) for score in of_answer]
                   for of_answer in _judge_steps(judge, prompts, answers)]
    else:  # the whole answer is one step
        ends = [of_answer[-1:] for of_answer in ends]
        rewards = [[right] for right in rollout.reward_parts["accuracy"].tolist()]

    advantages = []
    for begin in range(0, len(answers), G):
        group = slice(begin, begin + G)
        A = _process_advantages(rewards[group], ends[group], first[begin], T)
        if arm == "prefixes":
            # The paper gives all tokens of a group the same weight. Here eq 3's 1 / |o_i| stays.
            # The penalty of the KL is not divided.
            A = A / _sharing_answers(samples.tokens[group], samples.answer[group]).clamp(min=1)
        advantages.append(A)
    rollout.advantages = torch.stack(advantages)
    # improve() skips groups of equal rewards. So the rewards only mark groups from here on: 1, 0,
    # 0, ... is a group to train on, and all 0 is one whose tokens have no advantage.
    rollout.rewards = torch.zeros_like(rollout.rewards)
    rollout.rewards[:, 0] = rollout.advantages.flatten(1).any(1).float()
    return rewards


def _train_policy(arm, folder, base, judge, before):
    """(the policy, its numbers in each part of the budget, examples of overpaid answers). The loop
    is grpo.train_rl's, but ends when the FLOPs are spent. before: the FLOPs that the labels and
    the reward model took."""
    run, s = folder.run, folder.run.zero
    model, reference = copy_model(base), copy_model(base).eval()
    optimizers, task = make_optimizers(model, s.lr), make_task(run, s, rule_rewards(s))
    write, read, learn = (flops_per_token(model.config, work)
                          for work in ("write", "read", "learn"))
    learnt = learn + (read if s.beta else 0)  # the reference model reads what is learnt from
    spent, by_part, examples, rollouts = before, {}, [], 0
    with tqdm(total=BUDGET, initial=spent, unit="FLOP", unit_scale=True) as bar:
        while spent < BUDGET:
            rng = random.Random(f"{run.seed}/rl/{rollouts}")
            rollout = make_rollout(model, task, s, rng)
            rewards = _give_advantages(arm, rollout, judge)
            model.train()
            # The learning rate falls to 0 when the budget ends.
            step = int(s.steps * (spent - before) / (BUDGET - before))
            log = improve(model, reference, optimizers, rollout, s, rng, step)  # by eq 3
            rollouts += 1
            if rollouts % s.reference_every == 0:
                reference.load_state_dict(model.state_dict())

            part = int(PARTS * spent / BUDGET) + 1
            by_part.setdefault(part, []).append(_describe(rollout, rewards))
            examples = _overpaid(rollout, rewards) or examples
            written = int(rollout.samples.answer.sum())
            prompts = sum(len(task.encode(problem)) for problem in rollout.problems)
            cost = write * written + read * prompts + learnt * log["learnt_tokens"]
            if arm == "model":
                cost += flops_per_token(judge.config, "read") * (written + prompts * s.group_size)
            spent += cost
            bar.update(cost)
    numbers = {"rollouts": rollouts}
    for part, records in by_part.items():
        for key in records[0]:
            numbers[f"{key}.{part}"] = fmean(record[key] for record in records)
    return model, numbers, examples


def _describe(rollout, rewards):
    """A rollout in numbers. rewards: of the steps of each answer, N lists."""
    right = rollout.reward_parts["accuracy"]
    samples, G = rollout.samples, rollout.rewards.size(1)
    shared = [_sharing_answers(samples.tokens[i:i + G], samples.answer[i:i + G]) > 1
              for i in range(0, len(right), G)]
    return {"reward": fmean(map(sum, rewards)), "score": fmean(map(fmean, rewards)),
            "last_score": fmean(of_answer[-1] for of_answer in rewards),
            "right": float(right.mean()),
            "steps": fmean(len(_step_ends(ids)) for ids in samples.answers()),
            "length": float(samples.answer.sum(1).float().mean()),
            "shared": float(torch.cat(shared).sum() / samples.answer.sum()),
            "overpaid": len(_overpaid(rollout, rewards)) / len(right)}


def _overpaid(rollout, rewards):
    """The wrong answers that earn more than the mean right answer to the same problem, as texts.
    Those that earn most come first.

    An answer earns the sum of its step rewards, each minus the group's mean: the advantage of its
    first token, before the division by the standard deviation. The plain sum would grow with the
    number of steps, even if each step is worse than the mean.
    """
    right, G, found = rollout.reward_parts["accuracy"].tolist(), rollout.rewards.size(1), []
    for begin in range(0, len(right), G):
        group = range(begin, begin + G)
        mean = fmean(reward for i in group for reward in rewards[i])
        earned = {i: sum(reward - mean for reward in rewards[i]) for i in group}
        of_right = [earned[i] for i in group if right[i]]
        if not of_right:
            continue
        problem = rollout.problems[begin // G]
        for i in group:
            if not right[i] and earned[i] > fmean(of_right):
                found.append((earned[i], f"{problem.expression}: {rollout.texts[i]} "
                                         f"({earned[i]:.2f}, right ones {fmean(of_right):.2f})"))
    return [text for _, text in sorted(found, reverse=True)]


# ------------------------------------------------------------------------------
# Numbers


def _rerank(base, judge, run):
    """How often the reward model's choice among SAMPLES answers of the base is right. It takes the
    answer whose worst step has the highest score; `rerank.last` goes by the last step alone."""
    problems = tasks.make_problems("test", RERANKED, run.zero.levels, run.corpus.products)
    asked, texts = repeat_for_answers(problems, SAMPLES), []
    prompts = prompts_of(asked)
    for seed in (1, 2):  # the second half is for the majority of twice as many
        ids = sample_answers(base, prompts, run.zero.max_new_tokens, run.eval.rows, seed=seed)
        texts.append([tasks.decode(x) for x in ids])
        if seed == 1:
            scores = _judge_steps(judge, prompts, ids)
    reranked = texts[0]
    numbers = {}
    for name, value in (("rerank", min), ("rerank.last", lambda steps: steps[-1])):
        right = []
        for begin in range(0, len(asked), SAMPLES):
            best = max(range(begin, begin + SAMPLES), key=lambda i: value(scores[i]))
            right.append(tasks.accuracy(reranked[best], asked[best]))
        numbers[name] = fmean(right)
    both = [text for begin in range(0, len(asked), SAMPLES)
            for of_half in texts for text in of_half[begin:begin + SAMPLES]]
    for of_problems in (reranked, both):
        selected = selection_scores(of_problems, problems)
        k = len(of_problems) // len(problems)
        numbers |= {f"rerank.{key}": selected[key] for key in ("pass@1", f"cons@{k}", f"pass@{k}")}
    return numbers


def measure_arm(arm, folder):
    """The numbers of an arm on test, and of its rollouts in each part of the budget. The arm with a
    reward model also has what this costs and how it reranks."""
    run, base = folder.run, load_kept(folder, "base")
    judge, before, numbers = None, 0.0, {}
    if arm == "model":
        judge, before = _train_judge(folder, base)
        numbers = _rerank(base, judge, run) | {"judge_flops": before / BUDGET}
    model, of_parts, examples = _train_policy(arm, folder, base, judge, before)
    return numbers | of_parts | test_numbers(model, run) | {
        "examples": "; ".join(examples[:3]) or "none"}


def combine(numbers):
    """pass@1 of each arm, and of reranking."""
    found = {f"process_reward.{arm}.pass@1": numbers[f"{arm}.pass@1"] for arm in ARMS}
    return found | {"process_reward.rerank": numbers["model.rerank"]}


NAMES = {"outcome": "outcome", "rule": "steps, exact rule", "model": "steps, reward model",
         "prefixes": "outcome, shared tokens counted once"}


def picture(rows):
    """Right answers in rollouts by eighth of the FLOPs, and on test."""
    points = 100 * (rows["model.pass@1"]["mean"] - rows["outcome.pass@1"]["mean"])
    rule = 100 * (rows["rule.pass@1"]["mean"] - rows["outcome.pass@1"]["mean"])
    short = {"outcome": "outcome", "rule": "exact rule", "model": "model", "prefixes": "prefixes"}
    return Picture([lines_panel(f"A model of steps:\n{points:+.1f} points,", rows, short, "right",
                                "eighth of the FLOPs", "right answers in rollouts"),
                    arms_panel(f"an exact rule:\n{rule:+.1f} points", rows, short, "pass@1",
                               "correct answers on test")],
                   "temperature 1, equal FLOPs; points minus one reward for the outcome")


def page(rows, notes):
    """The lines of the report: the arms, their training curves, reranking, and wrong answers that
    earn more than right ones."""
    columns = {"pass@1": "pass@1", "length": "tokens", "reflection": "checks",
               "rollouts": "rollouts"}
    body = [[name, *(cell(rows, f"{arm}.{key}") for key in columns)]
            for arm, name in NAMES.items()]
    lines = [*table(["reward", *columns.values()], body), ""]
    for arm, name in NAMES.items():
        for key, where in (("pass@1", "on test"), ("right.4", "in the middle, in rollouts")):
            comparison = compare(rows, f"outcome.{key}", f"{arm}.{key}")
            if arm != "outcome" and comparison:
                lines.append(f"- {name}, minus outcome, {where}: {comparison.text(points=True)}")
    parts = range(1, PARTS + 1)
    for key, head in (("right", "right answers in rollouts"),
                      ("last_score", "reward of the last step"), ("score", "reward of a step"),
                      ("reward", "sum of the rewards of an answer"),
                      ("steps", "steps of an answer"), ("shared", "tokens in shared prefixes"),
                      ("overpaid", "wrong answers that earn more than right ones")):
        body = [[name, *(cell(rows, f"{arm}.{key}.{part}") for part in parts)]
                for arm, name in NAMES.items()]
        lines += ["", *table([f"{head}, by eighth of the FLOPs", *map(str, parts)], body)]
    columns = {"rerank.pass@1": "one answer", f"rerank.cons@{SAMPLES}": f"majority of {SAMPLES}",
               f"rerank.cons@{2 * SAMPLES}": f"majority of {2 * SAMPLES}",
               "rerank": "best worst step", "rerank.last": "best last step",
               f"rerank.pass@{SAMPLES}": f"any of {SAMPLES} is right"}
    body = [["right", *(cell(rows, f"model.{key}") for key in columns)]]
    lines += ["", *table(["answers of the base", *columns.values()], body), ""]
    for arm in ("rule", "model"):
        for seed, examples in notes.get(f"{arm}.examples", {}).items():
            lines.append(f"- wrong answers that earn more than right ones ({NAMES[arm]}), seed "
                         f"{seed}: `{examples}`")
    return lines
