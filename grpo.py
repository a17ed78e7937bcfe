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
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe import (Router, UserError, add_up, gather, make_cache, own, pad, sampling, share, spread,
                 total, twin, whole, world)


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
# Sampling


@dataclass
class Samples:
    """N sampled answers, right-padded behind their prompts."""
    tokens: Tensor    # (N, T) prompt then answer, right-padded
    answer: Tensor    # (N, T) True at the answer's tokens, its end token included
    logprobs: Tensor  # (N, T) log-probability of each answer token as it was sampled, elsewhere 0
    finished: Tensor  # (N,) whether the answer ended by itself

    def answers(self):
        """The answers' token ids, N lists."""
        return [row[mask].tolist() for row, mask in zip(self.tokens, self.answer)]


def sampling_logprobs(logits, temperature, top_p):
    """Log-probabilities (N, V) of the sampling policy: logits over temperature, then the smallest
    set of tokens whose mass reaches top_p, renormalised. Temperature 0: the likeliest token."""
    if temperature == 0:
        return torch.full_like(logits, -math.inf).scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
    logp = (logits / temperature if temperature != 1 else logits).log_softmax(-1)
    if top_p < 1:
        outside = math.log((1 - top_p) / logp.size(-1))    # all such together lack the mass
        ordered, order = logp.topk(int((logp > outside).sum(-1).max()))
        before = ordered.exp().cumsum(-1) - ordered.exp()  # mass of the likelier tokens
        kept = ordered.masked_fill(before >= top_p, -math.inf).log_softmax(-1)
        logp = torch.full_like(logp, -math.inf).scatter(-1, order, kept)
    return logp


def draw(logp, uniform):
    """A token (N, 1) for each row of log-probabilities (N, V), by its own number (N,) in [0, 1)."""
    mass = logp.exp().cumsum(-1)
    found = torch.searchsorted(mass, uniform.unsqueeze(-1) * mass[:, -1:], right=True)
    return found.clamp(max=logp.size(-1) - 1)


def pad_left(prompts, pad_id, device):
    """N token lists -> tokens (N, T) padded on the left, and where they are real."""
    longest = max(map(len, prompts))
    real = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    tokens = pad([[pad_id] * (longest - len(p)) + list(p) for p in prompts], pad_id, device)
    return tokens, torch.tensor(real, dtype=torch.bool, device=device)


def check_length(config, longest, max_new_tokens):
    """UserError if a prompt and its answer are longer than the model can read."""
    if longest + max_new_tokens > config.max_seq_len:
        raise UserError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the "
                        f"model's max_seq_len of {config.max_seq_len}")


@torch.no_grad()
def generate(model, prompts, max_new_tokens, end_id, pad_id, temperature=1.0, top_p=1.0, seed=0,
             watch=None):
    """Samples an answer to each of N prompts (token lists of any lengths). Returns Samples.

    Answer n, token t is drawn with its own uniform number, so the other prompts' fate does not
    touch it. A prompt that comes several times is read once. Ended rows leave the batch when more
    than a quarter of it is idle. Each process writes its share of the answers and all return all,
    so a group is compared whole. watch sees each round's tokens (rows, 1), of ended rows too.
    """
    device, config, longest = model.head.weight.device, model.config, max(map(len, prompts))
    check_length(config, longest, max_new_tokens)
    training = model.training
    model.eval()
    uniform = torch.rand(len(prompts), max_new_tokens,
                         generator=torch.Generator().manual_seed(seed))
    shared = len(prompts) >= world()[1]  # or all write all
    mine, uniform = (share(x) if shared else x for x in (prompts, uniform.to(device)))
    ids = torch.full(uniform.shape, pad_id, device=device)     # (len(mine), max_new_tokens)
    logp = torch.zeros_like(uniform)
    rows = torch.arange(len(ids), device=device)               # of ids: those still in the batch
    alive = torch.ones_like(rows, dtype=torch.bool)            # and of these, those not ended
    place = {p: i for i, p in enumerate(dict.fromkeys(map(tuple, mine)))}  # of distinct prompts
    fed, real = pad_left(list(place), pad_id, device)          # (prompts, the longest of mine)
    cache, last = make_cache(model, *fed.size()), F.pad(real[:, 1:] & False, (0, 1), value=True)
    with sampling(model) as unfinished, torch.inference_mode():  # FSDP gathers before the second
        for t in range(max_new_tokens):
            if t == 0:
                read = torch.tensor([place[tuple(p)] for p in mine], device=device)
                logits = model(fed, real, cache, last).logits[read]
                cache = cache.keep(read, max_new_tokens)
            else:
                logits = model(fed, cache=cache).logits[:, -1]
            policy = sampling_logprobs(logits, temperature, top_p)
            fed = draw(policy, uniform[:, t])                  # (rows, 1)
            if watch:
                watch(fed)
            ids[rows, t], logp[rows, t] = fed[:, 0], policy.gather(-1, fed)[:, 0]  # ended ones too
            alive = alive & (fed[:, 0] != end_id)
            count = int(alive.sum())
            if not unfinished(count > 0):
                break
            if 0 < count < 0.75 * len(rows):
                left = alive.nonzero().squeeze(1)
                cache, rows, alive = cache.keep(left), rows[left], alive[left]
                fed, uniform = fed[left], uniform[left]
    model.train(training)
    return lay_out(prompts, *(gather(x) if shared else x for x in (ids, logp)), end_id, pad_id)


def lay_out(prompts, ids, logp, end_id, pad_id):
    """Samples of N prompts and their answers' ids and logp (N, max_new_tokens). An answer counts up
    to its first end_id and with it; what was drawn after that does not."""
    ended = ids == end_id
    finished = ended.any(1)
    length = torch.where(finished, ended.int().argmax(1) + 1, ids.size(1)).unsqueeze(1)  # (N, 1)
    begin = torch.tensor([[len(p)] for p in prompts], device=ids.device)
    width = int((begin + length).max())
    column = torch.arange(width, device=ids.device) - begin  # (N, width) which of ids
    answer, at = (0 <= column) & (column < length), column.clamp(0, ids.size(1) - 1)
    before = F.pad(pad(prompts, pad_id, ids.device), (0, width - int(begin.max())), value=pad_id)
    return Samples(torch.where(answer, ids.gather(1, at), before), answer,
                   torch.where(answer, logp.gather(1, at), 0.0), finished)


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
# One update, of RL and of the supervised stages. No weight decay (V3: 0.1); rates fall linearly to
# 0 (V3: a cosine); Muon moves the matrices in every supervised stage. In pretraining too, questions
# are given, not predicted, and documents padded (V3 predicts all tokens, of packed documents).


def supervised_loss(model, tokens, real, weight, targets, sequences):
    """V3's training loss: next token, MTP (eq 24-25) and balance (eq 17). Returns (loss, info).

    tokens (B, T), real (B, T) False at padding, weight (B, T) of predicting each token. targets and
    sequences count the global batch, so cutting it into micro-batches never changes the gradient.
    """
    def nll(hidden, shift):                        # place i predicts token i + shift
        at = weight[:, shift:] > 0
        parts = hidden[:, :at.size(1)][at], tokens[:, shift:][at], weight[:, shift:][at]
        some = max(1, len(parts[0]) // 512)        # parts of 512 to 1,023 rows: faster on CPUs
        return sum((F.cross_entropy(model.head(h), ids, reduction="none") * w).sum()
                   for h, ids, w in zip(*(x.chunk(some) for x in parts))) / targets
    nowhere = torch.zeros_like(real)               # no logits from the model: nll makes them
    output = model(tokens, real, at=nowhere)
    main, second, balance = nll(output.hidden, 1), 0.0, output.balance
    if model.mtp is not None and model.config.mtp_weight:
        ahead = model.predict_second(tokens, real, output.hidden, nowhere[:, 1:])
        second = model.config.mtp_weight * nll(ahead.hidden, 2)  # by targets too (eq 24: 1/T)
        balance = balance + ahead.balance
    return main + second + balance / sequences, {"loss": main.detach()}


@torch.no_grad()
def balance(model, moving=True):
    """Moves every routing bias by gamma * sign(mean load - load) (V3 section 2.1.2) and forgets the
    load. Returns it over its mean: of each mixture a list, an expert's load after the other."""
    loads = []
    for router in (m for m in model.modules() if isinstance(m, Router)):
        mean = router.load.mean()
        if mean > 0:
            loads.append([round(x, 3) for x in (router.load / mean).tolist()])
            router.bias += moving * router.config.bias_speed * torch.sign(mean - router.load)
        router.load.zero_()
    return loads


class Muon(torch.optim.Optimizer):
    """Momentum, each matrix replaced by the nearest orthogonal one (Jordan et al. 2024; Kimi K2).

    torch.optim.Muon takes single matrices; this one also takes stacks of them, as experts have.
    """

    def __init__(self, parameters, lr, momentum=0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        """One update; with sqrt(rows / columns), outputs change by a like amount for all shapes."""
        for group in self.param_groups:
            nesterov = {}
            for p in (p for p in group["params"] if p.grad is not None):
                average = self.state[p].setdefault("momentum", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                nesterov[p] = p.grad.lerp(average, group["momentum"])
            for p, nearest in zip(nesterov, all_orthogonal(list(nesterov.values()))):
                factor = max(1.0, p.size(-2) / p.size(-1)) ** 0.5
                own(p).add_(nearest, alpha=-group["lr"] * factor)


def all_orthogonal(matrices):
    """orthogonal() of each matrix or stack, as far as this process holds it. What all processes
    hold alike is shared out, large ones first, and exchanged in one message."""
    alike = [i for i, x in enumerate(matrices) if own(x) is x]
    mine = share(sorted(alike, key=lambda i: -matrices[i].numel()))

    def found(i, x):
        if i in alike:                               # 0 where another process finds it
            return orthogonal(x) if i in mine else torch.zeros_like(x)
        if x.dim() > 2:                              # a stack is spread by whole matrices
            return orthogonal(own(x))
        return own(spread(orthogonal(whole(x)), x))  # a matrix in parts is gathered
    results = [found(i, x) for i, x in enumerate(matrices)]
    if alike:
        total(*(results[i] for i in alike))
    return results


def orthogonal(x, rounds=5):
    """Roughly U V^T of x = U S V^T (.., rows, columns): a quintic Newton-Schulz iteration that
    drives every singular value to about 1 (between 0.7 and 1.2: fast, not exact)."""
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    plus = torch.addmm if x.dim() == 2 else torch.baddbmm              # beta x + alpha a b
    for _ in range(rounds):
        gram = x @ x.mT
        gram = plus(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = plus(x, gram, x, beta=3.4445)
    return x.mT if tall else x


def make_optimizer(model, lr, muon_lr=0.0):
    """AdamW with V3's betas (section 4.2) on all parameters; with muon_lr, Muon on the matrices
    between embedding and head (not the router's centroids, which are vectors). Returns a list."""
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and muon_lr
                and not name.startswith(("embed.", "head.")) and "router" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    alike = len({type(p.data) for p in others}) == 1  # with ddp, experts elsewhere are another type
    adamw = torch.optim.AdamW(others, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=alike,
                              foreach=False)
    return [adamw, Muon(matrices, muon_lr)] if matrices else [adamw]


def learning_rate_at(step, steps, warmup, decay):
    """The factor on the learning rate: linear from 0 over `warmup` steps, constant, linear to 0
    over the last share `decay` of `steps`."""
    left = (steps - step) / (decay * steps) if decay else 1.0
    return min(1.0, (step + 1) / (warmup + 1), left)


def clip(model, max_norm):
    """Scales all gradients down to a common norm of max_norm. Returns the norm they had. Torch
    takes those together that are spread alike."""
    alike = {}
    for p in model.parameters():
        if p.grad is not None:
            alike.setdefault(getattr(p, "device_mesh", None), []).append(p)
    norms = [whole(nn.utils.get_total_norm([p.grad for p in some])) for some in alike.values()]
    norm = math.hypot(*map(float, norms))
    for some in alike.values():
        nn.utils.clip_grads_with_norm_(some, max_norm, torch.tensor(norm))
    return norm


def restore(target, saved):
    """Loads a saved state into a model or an optimizer, however spread."""
    if isinstance(target, nn.Module):
        like = target.state_dict()
        target.load_state_dict({name: spread(x, like[name]) for name, x in saved.items()})
        return
    like = [p for group in target.param_groups for p in group["params"]]
    groups = [old | {key: new[key] for key in new.keys() & {"fused"}}  # that hangs on the layout
              for old, new in zip(saved["param_groups"], target.param_groups)]
    target.load_state_dict(saved | {"param_groups": groups, "state": {
        i: {name: spread(x, like[i]) for name, x in of.items()}
        for i, of in saved["state"].items()}})


def update(model, optimizers, factor=1.0, max_norm=1.0):
    """One optimizer step from the gradients at hand: clip, step, zero, balance. Returns its log.

    A gradient that is not finite changes nothing and is counted as skipped. With several processes
    gradients and loads are sums over all, so that all take the same step."""
    add_up(model)
    norm = clip(model, max_norm)
    finite = math.isfinite(norm)
    for optimizer in optimizers if finite else ():
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        optimizer.step()
    model.zero_grad()
    loads = balance(model, finite)  # the busiest expert's is the figure to watch; no mixture: 0
    return {"grad_norm": norm if finite else 0.0, "skipped": int(not finite),
            "expert_load": max(map(max, loads), default=0.0), "loads": loads}


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


def micro_batches(lengths, rows, limit):
    """Cuts rows, by length, into lists of `limit` tokens at most with padding (or one row), each
    with its longest row last. Returns this process' share of the lists. All make as many passes,
    for FSDP and expert parallelism need all in each: a last list may be empty."""
    rows, count = sorted(rows, key=lambda r: (lengths[r], r)), world()[1]

    def cut(most):  # lists of at most so many tokens, padding counted
        lists = [[]]
        for row in rows:
            if lists[-1] and (len(lists[-1]) + 1) * lengths[row] > most:
                lists.append([])
            lists[-1].append(row)
        return lists
    needed = math.ceil(len(cut(limit)) / count) * count
    # The smallest limit that needs no more lists makes them even, so that none waits long for
    # another. (The larger it is, the fewer lists; bisect wants rising keys, hence the minus.)
    lists = cut(1 + bisect_left(range(1, limit), -needed, key=lambda most: -len(cut(most))))
    lists += [[]] * (needed - len(lists))
    deals = [lists[i:i + count] for i in range(0, needed, count)]  # to and fro: long rows for all
    return [deal[::-1 if i % 2 else 1][world()[0]] for i, deal in enumerate(deals)]


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
    means = total(torch.tensor(list(sums.values()), dtype=torch.float64)) / answered
    record = dict(zip(sums, means.tolist())) | gap_between(total(gap), compared)
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
    optimizers, reference = make_optimizer(model, s.lr), twin(model).eval()
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
