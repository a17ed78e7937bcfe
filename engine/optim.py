"""One update: AdamW and Muon, gradient clipping, learning rates, and cutting a step into passes.

What differs from V3: Muon moves the matrices in all supervised stages (V3: AdamW), there is no
weight decay (V3: 0.1), and learning rates fall linearly to 0 (V3: a cosine).
"""
import math
from bisect import bisect_left

import torch
from torch import nn

from engine.devices import (
    all_sum,
    full_tensor,
    local_tensor,
    process_share,
    rank_and_size,
    shard_like,
    sum_gradients,
)
from moe import update_routing_bias


class Muon(torch.optim.Optimizer):
    """Momentum, with each matrix replaced by the nearest orthogonal one (Jordan et al. 2024; Kimi
    K2 uses it). Unlike torch.optim.Muon, it also takes stacks of matrices, as experts have."""

    def __init__(self, parameters, lr, momentum=0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        """One update. The factor sqrt(rows / columns) makes outputs change by about as much for
        every shape."""
        for group in self.param_groups:
            nesterov = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("momentum", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                nesterov[p] = p.grad.lerp(average, group["momentum"])
            for p, direction in zip(nesterov, _orthogonalize_all(list(nesterov.values()))):
                factor = max(1.0, p.size(-2) / p.size(-1)) ** 0.5
                local_tensor(p).add_(direction, alpha=-group["lr"] * factor)


def _orthogonalize_all(matrices):
    """orthogonalize() of each matrix or stack, as far as this process holds it.

    Matrices that all processes hold are dealt out, the largest first; the results are exchanged in
    one message.
    """
    replicated = [i for i, x in enumerate(matrices) if local_tensor(x) is x]
    assigned = set(process_share(sorted(replicated, key=lambda i: -matrices[i].numel())))
    results = []
    for i, x in enumerate(matrices):
        if i in assigned:
            results.append(orthogonalize(x))
        elif i in replicated:
            results.append(torch.zeros_like(x))  # another process adds it in the sum below
        elif x.dim() > 2:                        # a stack of experts: whole matrices are here
            results.append(orthogonalize(local_tensor(x)))
        else:                                    # a part of a matrix is here: gather it first
            results.append(local_tensor(shard_like(orthogonalize(full_tensor(x)), x)))
    if replicated:
        all_sum(*(results[i] for i in replicated))
    return results


def orthogonalize(x, rounds=5):
    """About U V^T of x = U S V^T (.., rows, columns), by a quintic Newton-Schulz iteration. Each
    singular value comes to between 0.7 and 1.2: fast, not exact."""
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    multiply_add = torch.addmm if x.dim() == 2 else torch.baddbmm  # beta * x + alpha * (a @ b)
    for _ in range(rounds):
        gram = x @ x.mT
        gram = multiply_add(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = multiply_add(x, gram, x, beta=3.4445)
    return x.mT if tall else x


def make_optimizers(model, lr, muon_lr=0.0):
    """[AdamW] for all parameters, with V3's betas (section 4.2). With muon_lr, [AdamW, Muon]: Muon
    gets the matrices between embedding and head, but not the router's centroids, which are
    vectors."""
    matrices = []
    for name, p in model.named_parameters():
        outer = name.startswith(("embed.", "head.")) or "router" in name
        if muon_lr and p.dim() > 1 and not outer:
            matrices.append(p)
    muon_ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in muon_ids]
    # The fused kernel wants parameters of one type. Experts on other processes are another type.
    one_type = len({type(p.data) for p in others}) == 1
    adamw = torch.optim.AdamW(others, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=one_type,
                              foreach=False)
    return [adamw, Muon(matrices, muon_lr)] if matrices else [adamw]


def learning_rate_at(step, steps, warmup, decay):
    """The factor on the learning rate: from 0 to 1 over `warmup` steps, then 1, then to 0 over the
    last share `decay` of the steps."""
    rising = (step + 1) / (warmup + 1)
    falling = (steps - step) / (decay * steps) if decay else 1.0
    return min(1.0, rising, falling)


def _clip_gradients(model, max_norm):
    """Scales all gradients down to a common norm of max_norm. Returns the norm that they had."""
    by_mesh = {}  # torch wants gradients of one layout together
    for p in model.parameters():
        if p.grad is not None:
            by_mesh.setdefault(getattr(p, "device_mesh", None), []).append(p)
    norms = []
    for parameters in by_mesh.values():
        norms.append(full_tensor(nn.utils.get_total_norm([p.grad for p in parameters])))
    norm = math.hypot(*map(float, norms))
    for parameters in by_mesh.values():
        nn.utils.clip_grads_with_norm_(parameters, max_norm, torch.tensor(norm))
    return norm


def optimizer_update(model, optimizers, factor=1.0, max_norm=1.0, learn=True):
    """One optimizer step from the gradients: clip, step, forget them, move the routing bias.
    Returns what is logged.

    A gradient that is not finite changes nothing and is counted as skipped. With learn=False the
    gradients are dropped and the bias stays. Several processes first sum their gradients and loads,
    so that all take the same step.
    """
    sum_gradients(model)
    norm = _clip_gradients(model, max_norm)
    finite = math.isfinite(norm)
    if finite and learn:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
            optimizer.step()
    model.zero_grad()
    loads = update_routing_bias(model, finite and learn)
    busiest = max(map(max, loads), default=0.0)  # of all experts; 0 without a mixture
    return {"grad_norm": norm if finite else 0.0, "grad_clipped": int(finite and norm > max_norm),
            "skipped": int(not finite),
            "expert_load": busiest, "loads": loads}


def micro_batches(lengths, rows, limit):
    """Cuts rows into passes and returns this process' share of them, as lists of rows.

    A pass has at most `limit` tokens, padding included, or a single row. Rows of like length come
    together, the longest of a pass last. All processes get equally many passes, since FSDP and
    expert parallelism need every process in each of them; the last pass may be empty.
    """
    rows = sorted(rows, key=lambda row: (lengths[row], row))
    rank, processes = rank_and_size()

    def cut(limit):
        passes = [[]]
        for row in rows:
            if passes[-1] and (len(passes[-1]) + 1) * lengths[row] > limit:
                passes.append([])
            passes[-1].append(row)
        return passes

    needed = math.ceil(len(cut(limit)) / processes) * processes
    # The smallest limit that needs no more passes makes them even, so that no process waits long
    # for another. bisect wants rising keys, and the number of passes falls: hence the minus.
    smallest = 1 + bisect_left(range(1, limit), -needed, key=lambda limit: -len(cut(limit)))
    passes = cut(smallest)
    passes += [[]] * (needed - len(passes))
    # Dealt to and fro, like cards: each process gets long and short passes.
    deals = [passes[i:i + processes] for i in range(0, needed, processes)]
    return [deal[-1 - rank] if i % 2 else deal[rank] for i, deal in enumerate(deals)]
