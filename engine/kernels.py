"""Workarounds for hardware: the same numbers, sooner. `python r1mini.py bench` measures them.

The lesson files say what is computed. Each function here says what one kind of hardware wants.
"""
import functools

import torch
import torch.nn.functional as F


def fused_attention_is_slow(q):
    """Whether written-out attention is faster than torch's fused kernel: bfloat16 on a CPU."""
    return q.is_cpu and q.dtype == torch.bfloat16


def attend_to_one_key_head(q, k, v, mask, scale):
    """softmax(q k^T scale + mask) v for queries q (B, Q, .) and one head of keys and values
    (B, S, .). mask (B, Q, S) holds 0 and -inf.

    CUDA does it in one kernel. On a CPU that kernel is slow.
    """
    if q.is_cuda:
        return attend_to_one_key_head_fused(q, k, v, mask, scale)
    score = torch.baddbmm(mask, q, k.mT, alpha=scale)
    return torch.bmm(score.softmax(-1), v)


def attend_to_one_key_head_fused(q, k, v, mask, scale):
    """The same in torch's fused kernel, to which all queries are those of one head."""
    q, k, v, mask = (x.unsqueeze(1) for x in (q, k, v, mask))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).squeeze(1)


@functools.cache
def _cuda_has_grouped_product(device):
    """torch's grouped_mm wants compute capability 8.0."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def has_grouped_product(x):
    """Whether torch.nn.functional.grouped_mm can multiply tensors like x: not in float64, not on
    MPS, and not on old GPUs."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return x.is_cpu or (x.is_cuda and _cuda_has_grouped_product(x.device))


def product_dtype(x):
    """The dtype in which products of x are computed. Autocast does not change grouped_mm, so its
    inputs have to be cast by hand."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def sort_by_expert(expert_ids_NK, gates_NK, n_experts, dtype):
    """Sorts the pairs of a token and one of its experts by expert.

    Returns the tokens' numbers (M,), their gates (M,) and how many pairs each expert has (E,).
    In bfloat16 on a CPU, torch compiles a product for each number of rows. So there each expert's
    rows are filled up to a multiple of 64 with the last token, whose gate is 0.
    """
    N, K = expert_ids_NK.shape
    experts, gates = expert_ids_NK.flatten(), gates_NK.flatten()           # (N*K,)
    counts = experts.new_zeros(n_experts).index_add(0, experts, torch.ones_like(experts))
    if experts.is_cpu and dtype == torch.bfloat16:
        missing = -counts % 64
        filling = torch.arange(n_experts).repeat_interleave(missing)
        experts = torch.cat((experts, filling))
        gates = F.pad(gates, (0, len(filling)))
        counts = counts + missing
    order = experts.argsort(stable=True)
    token = (order // K).clamp(max=N - 1)
    return token, gates[order], counts


def cross_entropy_sum(head, hidden, targets, weight):
    """The sum of weight * -log p(target). hidden (M, C), targets (M,), weight (M,).

    The logits are made in parts of 512 to 1,023 rows: such a part stays in a CPU's cache.
    """
    n_parts = max(1, len(hidden) // 512)
    total = 0.0
    for h, target, w in zip(*(x.chunk(n_parts) for x in (hidden, targets, weight))):
        total = total + (F.cross_entropy(head(h), target, reduction="none") * w).sum()
    return total


def keep_freed_memory():
    """Makes glibc keep freed blocks of up to 31 MB for the next step.

    Otherwise each step faults all its pages in again, which takes up to a tenth of its time. glibc
    raises its threshold when a block of this size is freed, as happens here.
    """
    torch.empty(31 * 2 ** 20, dtype=torch.uint8)
