"""Reinforcement learning: group relative policy optimisation (GRPO), in one loop.

    repeat
      1 draw     P problems
      2 act      the policy writes G answers to each problem
      3 score    rules turn the text of each answer into a reward
      4 compare  advantage = reward minus the mean reward of its group (no value network)
      5 improve  a few updates: clipped ratios, and a KL penalty to a reference policy
      every `reference_every` rounds, copy the policy into the reference

train_rl is this loop. A method (GRPO, Dr. GRPO, DAPO, GSPO, Kimi k1.5's) is one function in
OBJECTIVES and its settings in SETTINGS, which the command line applies to RL.

Sources: DeepSeekMath (arXiv 2402.03300), R1 (arXiv 2501.12948; v1 is of January 2025, v2 of
January 2026), Kimi k1.5 (arXiv 2501.12599).

What differs from the papers:
- The ratio and the clip are per token, as in DeepSeekMath's eq 3. R1's formula has one
  ratio per answer.
- The standard deviation of a group divides by G - 1, as torch does. The papers do not say.
- A group whose rewards are all equal is called dead; all others are live. The advantages of
  a dead group are 0, so in eq 3 only its KL term is left. We do not train on dead groups,
  but still count their tokens in the denominators. If all groups of a minibatch are dead,
  there is no update, and the learning-rate schedule still advances.
- The old log-probabilities are those that the sampler reported while it drew the tokens. The
  trainer computes them in another way; the log records how much they differ.
- DeepSeek-V3's routing bias moves at each update, by the load of the trained answers. V3
  stops it late in pretraining. There is no balance loss, and MTP is not trained.
- DAPO samples until its batch is full of live groups. We draw `oversample` times P problems
  once, drop the dead groups, and train on at most P of the rest.
- A rollout is cut into `minibatches` parts, and each part makes one update (16 in R1).
- Kimi k1.5 resets the optimizer after each rollout; here that is a setting. Its tau is not
  published.
"""
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.checkpoint import restore_all
from engine.devices import all_sum, copy_model
from engine.optim import learning_rate_at, make_optimizers, micro_batches, optimizer_update
from engine.sampling import Samples, generate, pad_right


@dataclass(frozen=True)
class RL:
    """Settings of the loop. In brackets: R1-Zero's value, or R1's where that is said."""
    steps: int = 30                 # rollouts [650]
    problems: int = 24              # P, questions in a rollout [512]
    group_size: int = 16            # G, answers to a question [16]
    minibatches: int = 2            # updates on a rollout [16]
    max_new_tokens: int = 200       # a longer answer is cut off [32768]
    temperature: float = 1.0        # of sampling [1]
    objective: str = "grpo"         # one of OBJECTIVES
    lr: float = 4e-4                # of AdamW [3e-6]
    warmup: int = 2                 # updates in which the learning rate rises from 0
    decay: float = 0.6              # last share of updates, in which it falls to 0
    clip_low: float = 0.2           # lower clip at 1 - clip_low [unpublished]
    clip_high: float = 0.2          # upper clip at 1 + clip_high [R1's first RL: 10]
    beta: float = 0.001             # weight of the KL penalty [0.001]; 0: no penalty
    reference_every: int = 10       # rollouts between updates of the reference [25]
    normalize_std: bool = True      # divide advantages by the group's standard deviation
    oversample: int = 1             # answer oversample * P problems, train on P (DAPO)
    overlong: int = 0               # L_cache, tokens before the limit (DAPO section 3.4)
    tau: float = 0.1                # how strongly Kimi's objective holds the policy back
    reset_optimizers: bool = False  # before each rollout (Kimi k1.5 section 2.3.2)
    length_weight: float = 0.0      # of Kimi's length reward
    length_from: float = 0.0        # share of steps before the length reward acts
    accuracy_weight: float = 1.0    # of the accuracy reward
    format_weight: float = 0.2      # of the format reward [equal to accuracy's]
    language_weight: float = 0.0    # of the language consistency reward (R1 v2 eq 7)
    preference_weight: float = 1.0  # of the reward models, on general prompts
    general: float = 0.0            # share of general prompts, once they join
    general_from: float = 0.75      # share of steps before they join [R1: 1300 of 1700]
    levels: tuple[int, ...] = (3, 4, 5, 6)  # levels of the problems, drawn evenly
    micro_tokens: int = 2048        # tokens in one pass; changes memory and speed only
    dev_every: int = 5              # rollouts between evaluations on dev


# What a method changes besides its objective (Dr. GRPO section 3; DAPO section 3; GSPO).
SETTINGS = {
    "grpo": {},
    "dr_grpo": {"normalize_std": False, "beta": 0.0},
    "dapo": {"clip_high": 0.28, "beta": 0.0, "oversample": 2, "overlong": 40},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "beta": 0.0},
    "kimi": {"normalize_std": False, "beta": 0.0},
}


# ------------------------------------------------------------------------------
# Advantages and objectives


def advantages(rewards, normalize_std=True):
    """How much better each answer is than its group: (P, G) of rewards (P, G)
    (DeepSeekMath 4.1.2)."""
    advantage = rewards - rewards.mean(1, keepdim=True)
    if normalize_std:
        std = rewards.std(1, keepdim=True)  # divides by G - 1
        advantage = advantage / std.clamp(min=1e-6)
    # Exactly 0 in dead groups. Otherwise rounding in the mean gives them tiny
    # advantages, which the division makes large.
    dead = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return advantage.masked_fill(dead, 0.0)


def kl_k3(new, reference):
    """An estimate of KL(policy || reference) at each token, never negative
    (DeepSeekMath eq 4)."""
    log_ratio = reference - new  # k3 is r - log r - 1 with r = reference / new
    return log_ratio.exp() - log_ratio - 1


def overlong_penalty(lengths, limit, buffer):
    """DAPO section 3.4: 0 up to limit - buffer tokens, then falling to -1 at the limit.
    """
    return ((limit - buffer - lengths) / buffer).clamp(-1.0, 0.0)


def length_reward(lengths, right):
    """Kimi k1.5, section 2.3.3: from 0.5 for a group's shortest answer to -0.5 for its
    longest; a wrong answer gets at most 0. (P, G) of lengths and right (P, G)."""
    shortest, longest = lengths.aminmax(dim=1, keepdim=True)                 # (P, 1)
    share = (lengths - shortest) / (longest - shortest).clamp(min=1)
    reward = torch.where(right, 0.5 - share, (0.5 - share).clamp(max=0.0))
    return reward.masked_fill(longest == shortest, 0.0)


@dataclass(frozen=True)
class Batch:
    """Counts over a whole minibatch. With them as denominators, cutting the minibatch
    into passes never changes the gradient."""
    answers: int   # of the minibatch
    tokens: int    # of these answers, the sum of |o_i|


def clipped_surrogate(ratio, A, s):
    """PPO's min(r A, clip(r) A), and where the minimum is the clipped side. Shapes of ratio.
    """
    clipped = ratio.clamp(1 - s.clip_low, 1 + s.clip_high)
    return torch.minimum(ratio * A, clipped * A), clipped * A < ratio * A


# Arguments and result of an objective: it takes log-probabilities (n, T) of the new,
# the old and the reference policy, advantages (n,), a mask (n, T) that is 1 at answer
# tokens, the Batch and the settings s. It returns (J, info). J is to be maximised; J of
# a minibatch is the sum over its passes. info has the KL estimate of each token, and
# where the clip acts. The first three differ only in `weight`; gspo has grpo's weight and
# another `ratio`; kimi has neither a clip nor a weight.


def grpo(new, old, reference, advantage, mask, batch, s):
    """DeepSeekMath eq 3: the mean over an answer's tokens, then the mean over answers."""
    A = advantage.unsqueeze(1)                              # (n, 1), A_i
    ratio = (new - old).exp()                               # (n, T), r_it
    surrogate, clip_acts = clipped_surrogate(ratio, A, s)
    kl = kl_k3(new, reference)                              # (n, T), D_it
    length = mask.sum(1, keepdim=True).clamp(min=1)         # (n, 1), |o_i|
    weight = mask / length / batch.answers
    J = (weight * (surrogate - s.beta * kl)).sum()
    return J, {"kl": kl, "clip": clip_acts}


def dr_grpo(new, old, reference, advantage, mask, batch, s):
    """Dr. GRPO, section 3: divides by a constant, max_new_tokens. GRPO's 1/|o_i| punishes
    each token of a wrong answer less if the answer is long."""
    A = advantage.unsqueeze(1)
    ratio = (new - old).exp()
    surrogate, clip_acts = clipped_surrogate(ratio, A, s)
    kl = kl_k3(new, reference)
    weight = mask / (batch.answers * s.max_new_tokens)
    J = (weight * (surrogate - s.beta * kl)).sum()
    return J, {"kl": kl, "clip": clip_acts}


def dapo(new, old, reference, advantage, mask, batch, s):
    """DAPO eq 8: each token of the minibatch has the same weight (in DAPO: of a group).
    Its wider upper clip is in SETTINGS."""
    A = advantage.unsqueeze(1)
    ratio = (new - old).exp()
    surrogate, clip_acts = clipped_surrogate(ratio, A, s)
    kl = kl_k3(new, reference)
    weight = mask / batch.tokens
    J = (weight * (surrogate - s.beta * kl)).sum()
    return J, {"kl": kl, "clip": clip_acts}


def gspo(new, old, reference, advantage, mask, batch, s):
    """GSPO (arXiv 2507.18071): one ratio per answer, the geometric mean of its tokens'
    ratios."""
    A = advantage.unsqueeze(1)
    length = mask.sum(1, keepdim=True).clamp(min=1)                     # (n, 1), |o_i|
    ratio = (((new - old) * mask).sum(1, keepdim=True) / length).exp()  # (n, 1), s_i
    surrogate, clip_acts = clipped_surrogate(ratio, A, s)               # (n, 1)
    kl = kl_k3(new, reference)                                          # (n, T)
    weight = mask / length / batch.answers
    J = (weight * (surrogate - s.beta * kl)).sum()
    return J, {"kl": kl, "clip": clip_acts}


def kimi(new, old, reference, advantage, mask, batch, s):
    """Kimi k1.5, eq 3: online mirror descent. The ratio is of whole answers, without a
    clip. A square holds the policy near `old`, which has drawn the answers."""
    log_ratio = ((new - old) * mask).sum(1)                 # (n,), log pi / pi_i
    J = (advantage * log_ratio - s.tau / 2 * log_ratio ** 2).sum() / batch.answers
    return J, {"kl": kl_k3(new, old), "clip": torch.zeros_like(mask).bool()}


OBJECTIVES = {"grpo": grpo, "dr_grpo": dr_grpo, "dapo": dapo, "gspo": gspo, "kimi": kimi}


# ------------------------------------------------------------------------------
# The loop


@dataclass(frozen=True)
class Task:
    """What the loop needs to know of the world."""
    draw: Callable      # (random.Random, n, step) -> n problems
    encode: Callable    # problem -> token ids of its prompt
    decode: Callable    # token ids of an answer -> text
    rewards: dict       # name -> (weight, function(texts, problems) -> N numbers or nan)
    measures: dict      # name -> function(texts, problems) -> number, for the log only
    end_id: int
    pad_id: int


@dataclass
class Rollout:
    """P problems and G answers to each. N = P * G; the answers of a group are
    neighbours."""
    problems: list          # P
    samples: Samples        # N answers
    texts: list             # N
    reward_parts: dict      # name of a reward -> (N,), without its weight
    rewards: Tensor         # (P, G), weighted sum of reward_parts
    advantages: Tensor      # (P, G)


def train_rl(model, task, s, seed=0, state=None):
    """Trains the model in place. A generator of (record, snapshot) after each step.

    record is for the log. snapshot() is all that a stopped run needs besides the
    weights; call it before the next step. A continued run on a CPU is bit-identical to
    an unbroken one, since all random numbers depend on the seed and the step alone.
    """
    optimizers = make_optimizers(model, s.lr)
    reference = copy_model(model).eval()
    first = 0
    if state:
        first = state["step"]
        restore_all([reference, *optimizers], [state["reference"], *state["optimizers"]])

    for step in range(first, s.steps):
        if s.reset_optimizers:
            optimizers = make_optimizers(model, s.lr)
        rng = random.Random(f"{seed}/rl/{step}")  # all RL stages draw alike
        rollout = make_rollout(model, task, s, rng, step)                   # 1 to 4
        model.train()
        log = improve(model, reference, optimizers, rollout, s, rng, step)  # 5
        if (step + 1) % s.reference_every == 0:
            reference.load_state_dict(model.state_dict())

        record = {"step": step + 1} | describe_rollout(rollout, task) | log
        record["tokens"] = int(rollout.samples.answer.sum())
        record["prompt_tokens"] = s.group_size * sum(
            len(task.encode(problem)) for problem in rollout.problems)
        yield record, lambda: {"step": step + 1, "reference": reference.state_dict(),
                               "optimizers": [o.state_dict() for o in optimizers]}


def make_rollout(model, task, s, rng, step=0):
    """Steps 1 to 4 of the loop. Returns a Rollout."""
    # 1 draw
    problems = task.draw(rng, s.problems * s.oversample, step)
    problem_of_answer = [p for p in problems for _ in range(s.group_size)]   # N

    # 2 act
    prompts = [task.encode(problem) for problem in problem_of_answer]
    samples = generate(model, prompts, s.max_new_tokens, task.end_id, task.pad_id,
                       s.temperature, seed=rng.getrandbits(60))
    texts = [task.decode(ids) for ids in samples.answers()]

    # 3 score
    reward_parts, rewards = {}, 0.0
    for name, (weight, reward) in task.rewards.items():
        values = torch.tensor(reward(texts, problem_of_answer), dtype=torch.float32)
        reward_parts[name] = values
        rewards = rewards + weight * values.nan_to_num()  # nan: not for this problem
    lengths = samples.answer.sum(1).cpu()                                    # (N,)
    if s.overlong:
        reward_parts["overlong"] = overlong_penalty(lengths, s.max_new_tokens, s.overlong)
        rewards = rewards + reward_parts["overlong"]
    if s.length_weight and step >= s.length_from * s.steps:
        accuracy = reward_parts["accuracy"].view(len(problems), -1)          # (P, G)
        values = length_reward(lengths.view_as(accuracy), accuracy == 1.0)
        reward_parts["length"] = values.masked_fill(accuracy.isnan(), math.nan).flatten()
        rewards = rewards + s.length_weight * reward_parts["length"].nan_to_num()
    rewards = rewards.view(len(problems), s.group_size)                      # (P, G)

    # 4 compare
    advantage = advantages(rewards, s.normalize_std)                         # (P, G)
    return Rollout(problems, samples, texts, reward_parts, rewards, advantage)


def improve(model, reference, optimizers, rollout, s, rng, step):
    """Step 5 of the loop: `minibatches` updates on one rollout. Returns what is logged.
    """
    samples, log = rollout.samples, ImproveLog(rollout)
    # The number of answer tokens so far is largest, for the first time, at the last of
    # them.
    last_token = samples.answer.cumsum(1).argmax(1)              # (N,)
    lengths = (last_token + 1).tolist()                          # N, prompt and answer
    live = live_groups(rollout).repeat_interleave(s.group_size)  # (N,)
    rows = chosen_rows(rollout, s)
    rng.shuffle(rows)
    for m in range(min(s.minibatches, len(rows))):  # each minibatch has at least one row
        minibatch = rows[m::s.minibatches]
        batch = Batch(len(minibatch), int(samples.answer[minibatch].sum()))
        live_rows = [row for row in minibatch if live[row]]
        # If all groups are dead, the pass only fills the log.
        trained_rows = live_rows or minibatch
        log.begin_minibatch(trained_rows, lengths)
        for pass_rows in micro_batches(lengths, trained_rows, s.micro_tokens):
            if pass_rows:
                part = RolloutPart(rollout, pass_rows, lengths)
            else:  # all processes have to make the same number of passes
                part = RolloutPart(rollout, trained_rows[:1], lengths, idle=True)
            new, entropy = logprobs(model, part.tokens, part.mask, part.real, s.temperature)
            if s.beta:
                with torch.no_grad():
                    reference_logp, _ = logprobs(reference, part.tokens, part.mask,
                                                 part.real, s.temperature)
            else:  # no penalty: skip the reference; the KL to itself is exactly 0
                reference_logp = new.detach()
            J, info = OBJECTIVES[s.objective](new, part.old, reference_logp, part.advantage,
                                              part.mask.float(), batch, s)
            (-J).backward()
            log.add(part, new, entropy, info)
        factor = learning_rate_at(step * s.minibatches + m, s.steps * s.minibatches,
                                  s.warmup, s.decay)
        log.updates.append(optimizer_update(model, optimizers, factor, learn=bool(live_rows)))
    return log.record()


class RolloutPart:
    """The rows of a rollout that go through the model in one pass. They are sorted by
    length, so the last of the n rows is the longest.

    An idle process, which has no rows left, runs one dummy row with a mask of zeros.
    """

    def __init__(self, rollout, rows, lengths, idle=False):
        samples, T = rollout.samples, lengths[rows[-1]]
        device = samples.tokens.device
        length = torch.tensor([lengths[row] for row in rows], device=device)
        before_end = torch.arange(T, device=device) < length.unsqueeze(1)
        busy = not idle
        self.rows = [] if idle else rows
        self.tokens = samples.tokens[rows, :T]                          # (n, T)
        self.mask = samples.answer[rows, :T] & busy                     # (n, T) bool
        self.real = before_end & busy                                   # (n, T) no padding
        self.old = samples.logprobs[rows, :T] * busy                    # (n, T)
        self.advantage = rollout.advantages.flatten(0, 1).to(device)[rows]  # (n,)


def logprobs(model, tokens, wanted, real=None, temperature=1.0):
    """The log-probability of each token (N, T) given the tokens before it, and the
    entropy of that choice: both (N, T), and 0 where `wanted` (N, T) is False."""
    predicting = F.pad(wanted[:, 1:], (0, 1))  # the logits at t predict token t + 1
    logits = model(tokens, real, logits_at=predicting).logits
    if temperature != 1:
        logits = logits / temperature
    logp = logits.log_softmax(-1)
    chosen = logp.gather(-1, tokens[wanted].unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    zeros = torch.zeros(tokens.shape, device=tokens.device)
    return zeros.masked_scatter(wanted, chosen), zeros.masked_scatter(wanted, entropy)


def live_groups(rollout):
    """(P,) True where the rewards of a group differ. The others have no advantage."""
    return (rollout.rewards != rollout.rewards[:, :1]).any(1)


def chosen_rows(rollout, s):
    """The rows of a rollout to train on: all, or with oversampling the first P live
    groups."""
    groups, live = torch.arange(len(rollout.problems)), live_groups(rollout)
    if s.oversample > 1 and live.any():
        groups = groups[live]
    first_rows = groups[:s.problems].unsqueeze(1) * s.group_size        # (groups, 1)
    return (first_rows + torch.arange(s.group_size)).flatten().tolist()


# ------------------------------------------------------------------------------
# The log


def describe_rollout(rollout, task):
    """A rollout in numbers: means over its answers."""
    samples, group_size = rollout.samples, rollout.rewards.size(1)
    problem_of_answer = [p for p in rollout.problems for _ in range(group_size)]
    record = {"reward": float(rollout.rewards.mean())}
    for name, part in rollout.reward_parts.items():
        record[name] = float(part.nanmean())  # over the answers that can earn this reward
    for name, measure in task.measures.items():
        record[name] = measure(rollout.texts, problem_of_answer)
    record = {name: None if math.isnan(x) else x for name, x in record.items()}
    record["length"] = float(samples.answer.sum(1).float().mean())
    record["cut_off"] = 1 - float(samples.finished.float().mean())
    record["dead_groups"] = 1 - float(live_groups(rollout).float().mean())
    return record


class ImproveLog:
    """Sums over the tokens that improve() trains on, for the log."""

    def __init__(self, rollout):
        self.sums = dict.fromkeys(("entropy", "kl", "clip", "ratio"), 0.0)
        self.answer = rollout.samples.answer                   # (N, T)
        self.gap = torch.zeros_like(rollout.samples.logprobs)  # (N, T) sampler to trainer
        self.compared = torch.zeros_like(self.answer)          # (N, T) where gap is known
        self.answer_tokens = self.row_tokens = 0
        self.updates = []

    def begin_minibatch(self, trained_rows, lengths):
        """Counts the tokens of the rows that a minibatch trains on."""
        self.answer_tokens += int(self.answer[trained_rows].sum())
        self.row_tokens += sum(lengths[row] for row in trained_rows)  # for the FLOPs
        if not self.updates:
            self.compared[trained_rows] = self.answer[trained_rows]

    def add(self, part, new, entropy, info):
        """Adds one pass."""
        log_ratio = new.detach() - part.old
        if not self.updates:  # the weights still are those that sampled
            self.gap[part.rows, :log_ratio.size(1)] = log_ratio.abs()
        values = info | {"entropy": entropy, "ratio": log_ratio.exp()}
        for name in self.sums:
            self.sums[name] += float((values[name].detach() * part.mask).sum())

    def record(self):
        """Means over tokens, the gap, and what the updates reported."""
        # answer_tokens counts the rows of all processes, sums those of this one.
        sums = all_sum(torch.tensor(list(self.sums.values()), dtype=torch.float64))
        means = (sums / self.answer_tokens).tolist()
        gap = all_sum(self.gap)  # each process has filled in its own rows
        record = dict(zip(self.sums, means)) | sampler_trainer_gap(gap, self.compared)
        return record | {
            "learnt_tokens": self.row_tokens,
            "grad_norm": max(u["grad_norm"] for u in self.updates),
            "grad_clipped": sum(u["grad_clipped"] for u in self.updates),
            "expert_load": max(u["expert_load"] for u in self.updates),
            "loads": self.updates[-1]["loads"],
            "skipped": sum(u["skipped"] for u in self.updates)}


def sampler_trainer_gap(gap, compared):
    """How far sampler and trainer are apart. gap (N, T) holds absolute differences of
    log-probabilities, compared (N, T) is True where they are known.

    In float32 a gap above 1e-3 comes from routing: two experts nearly tie, and the
    shape of the batch decides between them by rounding. flips counts the answers where
    that happened.
    """
    ordered = gap[compared].sort().values
    return {"gap_p999": float(ordered[math.ceil(0.999 * (len(ordered) - 1))]),
            "gap_max": float(ordered[-1]),
            "flips": int(((gap > 1e-3) & compared).any(1).sum())}


# ------------------------------------------------------------------------------
# Reward models, for general prompts: the same Transformer with a head of one output


def judge_scores(judge, sequences, pad_id):
    """Scores (N,) of N token lists: the head's output at the last token of each."""
    tokens = pad_right(sequences, pad_id, judge.device)
    # Without sequences, pad_right() makes a dummy row, for a process that has no work.
    length = torch.tensor([len(ids) for ids in sequences] or [0], device=tokens.device)
    column = torch.arange(tokens.size(1), device=tokens.device)
    real = column < length.unsqueeze(1)
    last = column == length.unsqueeze(1) - 1
    return judge(tokens, real, logits_at=last).logits.squeeze(-1).float()


def preference_loss(better, worse):
    """Helpfulness, pairwise: the sum of -log sigmoid(better - worse) (R1 v2 section
    3.1)."""
    return F.softplus(worse - better).sum()


def safety_loss(scores, safe):
    """Safety, pointwise: the summed cross-entropy of safe (1) and unsafe (0) (R1 v2,
    3.1)."""
    return F.binary_cross_entropy_with_logits(scores, safe, reduction="sum")
