"""Workarounds for hardware: the same numbers, sooner. Each is named after what it does."""
import math

import torch
import torch.nn.functional as F


def attention(q, k, v, mask):
    """softmax(q k^T / sqrt(width) + mask) v, all (B, H, T, .); without a mask it is causal."""
    if mask is None and q.is_cpu and q.dtype == torch.bfloat16:  # the fused one is slower
        future = q.new_full((q.size(2), q.size(2)), -math.inf).triu(1)
        return (q * q.size(-1) ** -0.5 @ k.mT + future).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)


def attention_of_one_key_head(q, k, v, mask, scale, fused):
    """softmax(q k^T scale + mask) v of queries (B, Q, .), one head of keys and values (B, S, .) and
    a mask (B, Q, S). fused: by torch's kernel, slow on a CPU."""
    if fused:
        q, k, v, mask = (x.unsqueeze(1) for x in (q, k, v, mask))
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).squeeze(1)
    return torch.bmm(torch.baddbmm(mask, q, k.mT, alpha=scale).softmax(-1), v)


def product_dtype(x):
    """The dtype in which products of x are computed: autocast does not know torch's grouped_mm."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def sort_by_expert(expert_ids_NK, gates_NK, experts, dtype):
    """Of all pairs of token and expert, sorted by expert: the token (M,), its gate (M,), and how
    many pairs each expert has (E,). dtype: of the experts' products."""
    N, K = expert_ids_NK.shape
    pairs, gates = expert_ids_NK.flatten(), gates_NK.flatten()         # (N*K,) of token and expert
    counts = pairs.new_zeros(experts).index_add(0, pairs, torch.ones_like(pairs))
    if pairs.is_cpu and dtype == torch.bfloat16:  # torch compiles for each number of rows, so
        spare = -counts % 64                      # the last token, gated 0, fills up to 64s
        pairs = torch.cat((pairs, torch.arange(len(spare)).repeat_interleave(spare)))
        gates, counts = F.pad(gates, (0, len(pairs) - len(gates))), counts + spare
    order = pairs.argsort(stable=True)
    return (order // K).clamp(max=N - 1), gates[order], counts


def cross_entropy_sum(head, hidden, targets, weight):
    """The weighted sum of -log p(target), from hidden states (M, C) through a head. Logits are made
    in parts of 512 to 1,023 rows, which stay in a CPU's cache."""
    parts = max(1, len(hidden) // 512)
    return sum((F.cross_entropy(head(h), ids, reduction="none") * w).sum()
               for h, ids, w in zip(*(x.chunk(parts) for x in (hidden, targets, weight))))


def keep_freed_memory():
    """Lets glibc keep freed blocks of up to 31 MB for the next step, whose pages would else all
    fault again, up to a tenth of a step. Larger ones still go back."""
    torch.empty(31 * 2 ** 20, dtype=torch.uint8)  # freed at once
