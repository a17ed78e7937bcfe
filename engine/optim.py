"""One update: AdamW and Muon, clipping, learning rates, and how a step is cut into passes.

No weight decay (V3: 0.1); rates fall linearly to 0 (V3: a cosine); Muon moves the matrices in every
supervised stage.
"""
import math
from bisect import bisect_left

import torch
from torch import nn

from engine.devices import all_sum, full, local, rank_and_size, shard_like, share, sum_gradients
from moe import update_routing_bias


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
            for p, nearest in zip(nesterov, orthogonalize_all(list(nesterov.values()))):
                factor = max(1.0, p.size(-2) / p.size(-1)) ** 0.5
                local(p).add_(nearest, alpha=-group["lr"] * factor)


def orthogonalize_all(matrices):
    """orthogonal() of each matrix or stack, as far as this process holds it. What all processes
    hold alike is shared out, large ones first, and exchanged in one message."""
    alike = [i for i, x in enumerate(matrices) if local(x) is x]
    mine = share(sorted(alike, key=lambda i: -matrices[i].numel()))

    def found(i, x):
        if i in alike:                               # 0 where another process finds it
            return orthogonalize(x) if i in mine else torch.zeros_like(x)
        if x.dim() > 2:                              # a stack is spread by whole matrices
            return orthogonalize(local(x))
        return local(shard_like(orthogonalize(full(x)), x))  # a matrix in parts is gathered
    results = [found(i, x) for i, x in enumerate(matrices)]
    if alike:
        all_sum(*(results[i] for i in alike))
    return results


def orthogonalize(x, rounds=5):
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


def make_optimizers(model, lr, muon_lr=0.0):
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


def clip_gradients(model, max_norm):
    """Scales all gradients down to a common norm of max_norm. Returns the norm they had. Torch
    takes those together that are spread alike."""
    alike = {}
    for p in model.parameters():
        if p.grad is not None:
            alike.setdefault(getattr(p, "device_mesh", None), []).append(p)
    norms = [full(nn.utils.get_total_norm([p.grad for p in some])) for some in alike.values()]
    norm = math.hypot(*map(float, norms))
    for some in alike.values():
        nn.utils.clip_grads_with_norm_(some, max_norm, torch.tensor(norm))
    return norm


def update(model, optimizers, factor=1.0, max_norm=1.0):
    """One optimizer step from the gradients at hand: clip, step, zero, balance. Returns its log.

    A gradient that is not finite changes nothing and is counted as skipped. With several processes
    gradients and loads are sums over all, so that all take the same step."""
    sum_gradients(model)
    norm = clip_gradients(model, max_norm)
    finite = math.isfinite(norm)
    for optimizer in optimizers if finite else ():
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        optimizer.step()
    model.zero_grad()
    loads = update_routing_bias(model, finite)  # the busiest expert's is the figure to watch; no mixture: 0
    return {"grad_norm": norm if finite else 0.0, "skipped": int(not finite),
            "expert_load": max(map(max, loads), default=0.0), "loads": loads}


def micro_batches(lengths, rows, limit):
    """Cuts rows, by length, into lists of `limit` tokens at most with padding (or one row), each
    with its longest row last. Returns this process' share of the lists. All make as many passes,
    for FSDP and expert parallelism need all in each: a last list may be empty."""
    rows, count = sorted(rows, key=lambda r: (lengths[r], r)), rank_and_size()[1]

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
    return [deal[::-1 if i % 2 else 1][rank_and_size()[0]] for i, deal in enumerate(deals)]
