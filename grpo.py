"""Group relative policy optimisation (GRPO): the reinforcement learning, in one loop.

    repeat
      1 sample   P problems
      2 act      the policy writes G answers to each
      3 score    rules read the texts; no learnt judge that could be hacked (R1 v1 section 2.2.2);
                 only for general prompts, and late, do reward models judge (R1 v2 section 3.2.2)
      4 compare  advantage = reward against the mean of its group; no value network
      5 improve  a few updates on the rollout: clipped ratios, and a KL leash to a reference policy
      and now and then the reference becomes the policy

train_rl is that box. What differs between methods is one function each, in OBJECTIVES, and a row
of SETTINGS.

Departures and choices, where the papers (DeepSeekMath, R1) differ or are silent:
- The ratio and the clip are per token, as in DeepSeekMath's eq 3; R1 prints one ratio per answer.
- A group's standard deviation is the one with G - 1; where all rewards are equal, advantages are 0.
- pi_old is what the sampler reported for the ids it drew. Sampler and trainer are the same weights
  in different arithmetic (absorbed and cached against whole); their gap is logged at every step.
- The routing bias goes on moving, once an update (V3 stops it late in pretraining); the balance
  loss is left out, and MTP is not trained.
- DAPO resamples until its batch is full of mixed groups; here `oversample` times P problems are
  acted on once, and at most P of the groups whose rewards differ are learnt from.
- Groups whose rewards are all equal are not learnt from: their advantages are 0, and all that
  DeepSeekMath's eq 3 leaves of them is the pull of beta. They still count in the denominators.
  So the load that moves the routing bias is that of live groups (V3: of the whole batch). A
  minibatch in which no group lives is gone over whole, for the pull of beta and for the log.
- One rollout serves `minibatches` updates (16 in R1), each answer once.
"""
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.checkpoint import restore
from engine.devices import all_sum, copy_model
from engine.optim import learning_rate_at, make_optimizers, micro_batches, update
from engine.sampling import Samples, generate, pad


@dataclass(frozen=True)
class RL:
    """Settings of the loop; in brackets R1-Zero's own, or R1's where that is said."""
    steps: int = 30                 # rollouts [650]
    problems: int = 24              # P, questions a rollout [512]
    group_size: int = 16            # G, answers a question [16]
    minibatches: int = 2            # updates a rollout [16]
    max_new_tokens: int = 200       # an answer longer than this is cut off [32768]
    temperature: float = 1.0        # of sampling [1]
    objective: str = "grpo"         # one of OBJECTIVES
    lr: float = 4e-4                # AdamW [3e-6]
    warmup: int = 2                 # updates until the learning rate is whole
    decay: float = 0.6              # share of the updates over which it falls to 0 [unpublished]
    clip_low: float = 0.2           # epsilon below 1 [unpublished; R1's first RL: 10]
    clip_high: float = 0.2          # epsilon above 1
    beta: float = 0.001             # weight of the KL to the reference [0.001]; 0: no reference
    reference_every: int = 10       # rollouts until the reference becomes the policy [25]
    normalize_std: bool = True      # divide the advantage by the group's standard deviation
    oversample: int = 1             # act on so many times P problems, learn from P live (DAPO)
    overlong: int = 0               # L_cache, tokens before the limit with a penalty (DAPO)
    accuracy_weight: float = 1.0    # of the accuracy reward
    format_weight: float = 0.2      # of the format reward [as accuracy's, R1 v2 eq 4]
    language_weight: float = 0.0    # of the language consistency reward (R1 v2 eq 7)
    preference_weight: float = 1.0  # of the reward models, on general prompts
    general: float = 0.0            # share of general prompts, once they join
    general_from: float = 0.75      # share of the steps before they join [R1: 1300 of 1700]
    levels: tuple[int, ...] = (3, 4, 5, 6)  # levels of the problems, drawn evenly
    micro_tokens: int = 2048        # tokens in one forward pass; memory and speed only
    dev_every: int = 5              # rollouts between evaluations on dev


# What a method changes beside its objective (Dr. GRPO, section 3; DAPO, section 3; GSPO).
SETTINGS = {
    "grpo": {},
    "dr_grpo": {"normalize_std": False, "beta": 0.0},
    "dapo": {"clip_high": 0.28, "beta": 0.0, "oversample": 2, "overlong": 40},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "beta": 0.0},
}


# -------------------------------------------------------------------------------------------------
# Advantages and objectives


def advantages(rewards, normalize_std=True):
    """Group-relative advantages of rewards (P, G) (DeepSeekMath section 4.1.2)."""
    centered = rewards - rewards.mean(1, keepdim=True)
    dead = (rewards == rewards[:, :1]).all(1, keepdim=True)  # or rounding in the mean is a signal
    if normalize_std:
        centered = centered / rewards.std(1, keepdim=True).clamp(min=1e-6)
    return centered.masked_fill(dead, 0.0)


def kl_k3(new, reference):
    """k3 estimate of KL(policy || reference) at each sampled token, >= 0 (DeepSeekMath eq 4)."""
    log_x = reference - new  # x = pi_ref / pi
    return log_x.exp() - log_x - 1


def overlong_penalty(lengths, limit, buffer):
    """0 up to limit - buffer tokens, then falling to -1 at the limit (DAPO section 3.4)."""
    return ((limit - buffer - lengths) / buffer).clamp(-1.0, 0.0)


@dataclass(frozen=True)
class Batch:
    """Counts of a whole minibatch: how it is cut into micro-batches never changes the gradient."""
    answers: int   # N
    tokens: int    # sum of |o_i|


# An objective takes new and old log-probabilities (n, T), advantages (n,), a mask (n, T) of answer
# tokens, the Batch's counts and the settings. It returns what is maximised at each token, that
# token's weight, and where the clip holds the gradient back, all (n, T). The sum of weight times
# value over all micro-batches is the method's J.


def grpo(new, old, advantage, mask, batch, s):
    """DeepSeekMath eq 3: clipped token ratios, mean over an answer's tokens, then over answers."""
    ratio, A = (new - old).exp(), advantage.unsqueeze(1)     # r_it (n, T), A_i (n, 1)
    free, clipped = ratio * A, ratio.clamp(1 - s.clip_low, 1 + s.clip_high) * A
    weight = mask / mask.sum(1, keepdim=True).clamp(min=1) / batch.answers  # 1 / (N |o_i|)
    return torch.minimum(free, clipped), weight, clipped < free


def dr_grpo(new, old, advantage, mask, batch, s):
    """Dr. GRPO: the sum over tokens by a constant, so that long wrong answers are not let off."""
    value, _, held = grpo(new, old, advantage, mask, batch, s)
    return value, mask / (batch.answers * s.max_new_tokens), held


def dapo(new, old, advantage, mask, batch, s):
    """DAPO eq 8: every token weighs the same, of the minibatch (DAPO: of a group); the upper clip
    is wider (clip_high)."""
    value, _, held = grpo(new, old, advantage, mask, batch, s)
    return value, mask / batch.tokens, held


def gspo(new, old, advantage, mask, batch, s):
    """GSPO: one ratio an answer, the geometric mean of its tokens' ratios."""
    length = mask.sum(1, keepdim=True).clamp(min=1)            # |o_i| (n, 1)
    mean = ((new - old) * mask).sum(1, keepdim=True) / length  # log s_i (n, 1)
    return grpo(mean.expand_as(new), torch.zeros_like(old), advantage, mask, batch, s)


OBJECTIVES = {"grpo": grpo, "dr_grpo": dr_grpo, "dapo": dapo, "gspo": gspo}


# -------------------------------------------------------------------------------------------------
# The loop


@dataclass(frozen=True)
class Task:
    """The world as the loop sees it."""
    sample: Callable    # (random.Random, n, step) -> n problems
    encode: Callable    # problem -> token ids of its prompt
    decode: Callable    # token ids of an answer -> text
    rewards: dict       # name -> (weight, function(texts, problems) -> N numbers, nan: not asked)
    measures: dict      # name -> function(text, problem) -> number: logged beside the rewards
    end_id: int
    pad_id: int


@dataclass
class Rollout:
    """What one round of acting brought."""
    problems: list          # P
    samples: Samples        # N = P * G answers, a group's beside each other
    texts: list             # N
    parts: dict             # name of a reward -> (N,) unweighted
    rewards: Tensor         # (P, G) weighted sum
    advantages: Tensor      # (P, G)


def act(model, task, s, rng, step=0):
    """Steps 1 to 4 of the box: problems, G answers to each, rewards, advantages, in a Rollout."""
    problems = task.sample(rng, s.problems * s.oversample, step)
    asked = [p for p in problems for _ in range(s.group_size)]
    samples = generate(model, [task.encode(p) for p in asked], s.max_new_tokens, task.end_id,
                       task.pad_id, s.temperature, seed=rng.getrandbits(60))
    texts = [task.decode(ids) for ids in samples.answers()]
    parts = {name: torch.tensor(f(texts, asked), dtype=torch.float32)
             for name, (_, f) in task.rewards.items()}
    rewards = sum(weight * parts[name].nan_to_num() for name, (weight, _) in task.rewards.items())
    if s.overlong:
        lengths = samples.answer.sum(1).cpu()
        parts["overlong"] = overlong_penalty(lengths, s.max_new_tokens, s.overlong)
        rewards = rewards + parts["overlong"]
    rewards = rewards.view(len(problems), s.group_size)
    return Rollout(problems, samples, texts, parts, rewards, advantages(rewards, s.normalize_std))


def describe(rollout, task):
    """What a rollout looks like, for the log: means over its answers."""
    samples, N = rollout.samples, len(rollout.texts)
    asked = [p for p in rollout.problems for _ in range(N // len(rollout.problems))]
    record = {"reward": float(rollout.rewards.mean())}
    record |= {name: float(part.nanmean()) for name, part in rollout.parts.items()}
    record |= {name: None for name, x in record.items() if math.isnan(x)}  # asked of none
    for name, measure in task.measures.items():
        record[name] = sum(float(measure(t, p)) for t, p in zip(rollout.texts, asked)) / N
    record["length"] = float(samples.answer.sum(1).float().mean())
    record["cut_off"] = 1 - float(samples.finished.float().mean())
    record["dead_groups"] = 1 - float(live_groups(rollout).float().mean())
    return record


def live_groups(rollout):
    """(P,) whether a group's rewards differ; if not, it teaches nothing."""
    return (rollout.rewards != rollout.rewards[:, :1]).any(1)


def chosen_rows(rollout, s):
    """The rows of a rollout to learn from: all, or with oversampling the first P live groups."""
    groups = torch.arange(len(rollout.problems))
    if s.oversample > 1 and live_groups(rollout).any():
        groups = groups[live_groups(rollout)]
    groups = groups[:s.problems]
    return (groups.unsqueeze(1) * s.group_size + torch.arange(s.group_size)).flatten().tolist()


def logprobs(model, tokens, wanted, real=None, temperature=1.0):
    """Log-probability of tokens (N, T) given what stands before them, and the entropy there: both
    (N, T), zero where `wanted` (N, T) is False."""
    logits = model(tokens, real, at=F.pad(wanted[:, 1:], (0, 1))).logits
    logp = (logits / temperature if temperature != 1 else logits).log_softmax(-1)
    chosen = logp.gather(-1, tokens[wanted].unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    blank = torch.zeros(tokens.shape, device=tokens.device)
    return blank.masked_scatter(wanted, chosen), blank.masked_scatter(wanted, entropy)


def improve(model, reference, optimizers, rollout, s, rng, step):
    """Step 5 of the box: `minibatches` updates on one rollout. Returns means over the tokens learnt
    from, those of live groups, for the log."""
    tokens, answer, old = rollout.samples.tokens, rollout.samples.answer, rollout.samples.logprobs
    advantage = rollout.advantages.flatten().to(tokens.device)
    ends = answer.cumsum(1).argmax(1) + 1                     # (N,) columns up to the answer's end
    lengths, rows = ends.tolist(), chosen_rows(rollout, s)
    rng.shuffle(rows)
    live = live_groups(rollout).repeat_interleave(s.group_size)  # (N,)
    sums, updates = dict.fromkeys(("entropy", "kl", "clip", "ratio"), 0.0), []
    gap, compared = torch.zeros_like(old), torch.zeros_like(answer)  # sampler to trainer
    answered = passed = 0
    for m in range(s.minibatches):
        counted = rows[m::s.minibatches]
        batch = Batch(len(counted), int(answer[counted].sum()))  # first, over the whole minibatch
        learnt = [row for row in counted if live[row]] or counted  # others' advantages are all 0
        answered += int(answer[learnt].sum())                 # tokens, for the means
        passed += sum(lengths[row] for row in learnt)         # with prompts, for the FLOPs
        for micro in micro_batches(lengths, learnt, s.micro_tokens):
            some, work = micro or learnt[:1], bool(micro)     # no rows: one of which nothing counts
            T = lengths[some[-1]]                             # the last row is the longest
            ids, mask, before = tokens[some, :T], answer[some, :T] & work, old[some, :T] * work
            real = (torch.arange(T, device=ids.device) < ends[some].unsqueeze(1)) & work
            new, entropy = logprobs(model, ids, mask, real, s.temperature)
            value, weight, held = OBJECTIVES[s.objective](
                new, before, advantage[some], mask.float(), batch, s)
            kl = torch.zeros_like(new)
            if s.beta:
                with torch.no_grad():
                    anchor, _ = logprobs(reference, ids, mask, real, s.temperature)
                kl = kl_k3(new, anchor)
            loss = -(weight * (value - s.beta * kl)).sum()    # J is maximised
            loss.backward()
            ratio = (new.detach() - before).exp()
            if m == 0:                                        # before any update, it should be 1
                gap[micro, :T], compared[learnt] = (new.detach() - before).abs(), answer[learnt]
            for name, x in (("entropy", entropy), ("kl", kl), ("clip", held), ("ratio", ratio)):
                sums[name] += float((x.detach() * mask).sum())
        done, of = step * s.minibatches + m, s.steps * s.minibatches
        factor = learning_rate_at(done, of, s.warmup, s.decay)
        updates.append(update(model, optimizers, factor))
    means = all_sum(torch.tensor(list(sums.values()), dtype=torch.float64)) / answered
    record = dict(zip(sums, means.tolist())) | gap_between(all_sum(gap), compared)
    return record | {"learnt_tokens": passed, "grad_norm": max(u["grad_norm"] for u in updates),
                     "expert_load": max(u["expert_load"] for u in updates),
                     "loads": updates[-1]["loads"],
                     "skipped": sum(u["skipped"] for u in updates)}


def gap_between(gap, compared):
    """How far sampler and trainer were apart: of gap (N, T), |differences of log-probabilities|,
    where compared (N, T).

    In float32 a gap over 1e-3 betrays a routing flip: two experts all but tied, and the other
    batch shape rounded the other way. flips counts the answers in which that happened.
    """
    ordered = gap[compared].sort().values
    return {"gap_p999": float(ordered[math.ceil(0.999 * (len(ordered) - 1))]),
            "gap_max": float(ordered[-1]),
            "flips": int(((gap > 1e-3) & compared).any(1).sum())}


def train_rl(model, task, s, seed=0, state=None):
    """Trains the model in place; a generator of (record, snapshot) after each step.

    snapshot() is the state to continue from, on a CPU to the same bits: all randomness is drawn
    afresh from the seed and the step.
    """
    optimizers, reference = make_optimizers(model, s.lr), copy_model(model).eval()
    first = state["step"] if state else 0
    if state:
        restore(reference, state["reference"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            restore(optimizer, saved)
    for step in range(first, s.steps):
        rng = random.Random(f"{seed}/rl/{step}")  # each stage meets the same problems
        rollout = act(model, task, s, rng, step)
        record = {"step": step + 1} | describe(rollout, task)
        model.train()
        record |= improve(model, reference, optimizers, rollout, s, rng, step)
        if (step + 1) % s.reference_every == 0:
            reference.load_state_dict(model.state_dict())
        record["tokens"] = int(rollout.samples.answer.sum())
        record["prompt_tokens"] = sum(len(task.encode(p)) for p in rollout.problems) * s.group_size
        yield record, lambda: {"step": step + 1, "reference": reference.state_dict(),
                               "optimizers": [o.state_dict() for o in optimizers]}


# -------------------------------------------------------------------------------------------------
# Reward models, for general prompts: the same Transformer with a head of one output


def score(judge, rows, pad_id):
    """(N,) scores of N token lists: the head's output at the last token of each."""
    tokens = pad(rows, pad_id, judge.head.weight.device)
    ends = torch.tensor([len(row) for row in rows] or [0], device=tokens.device)
    column = torch.arange(tokens.size(1), device=tokens.device)
    real, last = column < ends.unsqueeze(1), column == ends.unsqueeze(1) - 1
    return judge(tokens, real, at=last).logits.squeeze(-1).float()


def preference_loss(better, worse):
    """Helpfulness, pairwise: -log sigmoid(s_better - s_worse), summed (R1 v2 section 3.1)."""
    return F.softplus(worse - better).sum()


def safety_loss(scores, safe):
    """Safety, pointwise: the cross-entropy of safe (1) and unsafe (0), summed."""
    return F.binary_cross_entropy_with_logits(scores, safe, reduction="sum")
