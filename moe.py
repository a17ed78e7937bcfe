"""The model: DeepSeek-V3 in miniature.

    MLA          multi-head latent attention: keys and values from one latent (eq 1-11)
    Router       chooses the experts of each token; a bias balances their load (eq 13-16)
    Experts      the routed experts; MoE adds the shared ones (eq 12) and the balance
                 loss (eq 17-20)
    MTP          multi-token prediction: one more block predicts the token after the
                 next (eq 21-23)
    Transformer  embedding, blocks, head; a cache of latents for sampling
    supervised_loss       the loss of a training step (eq 24-25)
    update_routing_bias   moves the bias after a training step (section 2.1.2)

All equation numbers are those of the DeepSeek-V3 report (arXiv 2412.19437).

Axes: B batch, T time, S filled columns of the cache, C width, H heads, R rotary width,
N = B * T tokens, E routed experts, K experts of a token, I hidden width of an expert,
M = N * K pairs of a token and one of its experts. In the mixture of experts a suffix
gives the shape: gates_NK is (N, K).

Products may be computed in bfloat16. Norms, router, head and the residual stream are
always float32: .float() leads back to it.

What differs from the report:
- The latents have a norm, as in DeepSeek's code. The equations leave it out.
- A group of experts is scored by its best 2 experts, as in DeepSeek's code. The report
  takes K_r divided by the number of groups a token may use: 8/4 = 2 in V3.
- MTP reads the hidden state after the final norm, and has a norm of its own before the
  shared head, as in transformers' code.
- Questions are given and not predicted; V3 predicts every token. Documents are packed
  into rows as in V3, but do not see each other. The next-token and MTP losses are those
  of separate documents. The balance loss is of a whole row.
- There is no YaRN, no FP8 and no pipeline.

How several GPUs share the model is not in this file: engine/devices.py does it from outside,
by wrapping blocks and replacing Experts.products.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import kernels


@dataclass(frozen=True)
class Config:
    """The sizes of a model. Names are those of DeepSeek's inference code; comments give
    the paper's symbols."""
    vocab_size: int = 629
    n_outputs: int = 0             # outputs of the head; 0: vocab_size, 1: a reward model
    dim: int = 64                  # d, width of the residual stream
    inter_dim: int = 192           # hidden width of a dense feed-forward
    moe_inter_dim: int = 64        # hidden width of one expert
    n_layers: int = 3
    n_dense_layers: int = 1        # the first layers are dense, the others have experts
    n_heads: int = 4               # n_h
    n_routed_experts: int = 8      # N_r
    n_shared_experts: int = 1      # N_s, computed as one wide feed-forward
    n_activated_experts: int = 2   # K_r, routed experts that a token uses
    n_expert_groups: int = 1       # groups ("nodes") of experts
    n_limited_groups: int = 1      # groups that a token may use
    route_scale: float = 1.0       # factor on all gates; 2.5 in V3
    q_lora_rank: int = 0           # d_c', query latent; 0: not compressed (as V2-Lite)
    kv_lora_rank: int = 32         # d_c, key-value latent, which the cache holds
    qk_nope_head_dim: int = 16     # d_h, content part of a query and key head
    qk_rope_head_dim: int = 16     # d_h^R, position part; its key serves all heads
    v_head_dim: int = 32           # width of a value head
    n_mtp_layers: int = 1          # D, depth of multi-token prediction: 0 or 1
    mtp_weight: float = 0.3        # lambda, weight of the MTP loss
    balance_alpha: float = 1e-4    # alpha, weight of the sequence-wise balance loss
    bias_speed: float = 1e-3       # gamma, how far the routing bias moves in a step
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    init_std: float = 0.05         # of every matrix; 0.006 at V3's width
    max_seq_len: int = 512         # tokens, prompt and answer together


NANO = Config()
V3 = Config(
    vocab_size=129280, dim=7168, inter_dim=18432, moe_inter_dim=2048,
    n_layers=61, n_dense_layers=3, n_heads=128,
    n_routed_experts=256, n_activated_experts=8,
    n_expert_groups=8, n_limited_groups=4, route_scale=2.5,
    q_lora_rank=1536, kv_lora_rank=512,
    qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    init_std=0.006, max_seq_len=4096)


# ------------------------------------------------------------------------------
# Attention


def make_rotations(config):
    """exp(1j * angle) for each position and frequency: complex (max_seq_len, R/2)."""
    R = config.qk_rope_head_dim
    even = torch.arange(0, R, 2, dtype=torch.float32)  # 0, 2, 4, ...
    frequency = config.rope_theta ** (-even / R)
    position = torch.arange(config.max_seq_len, dtype=torch.float32)
    angle = torch.outer(position, frequency)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x, rotation):
    """Rotates the pairs (x0, x1), (x2, x3), ... of x (B, T, H, R) by the angles of their
    positions. rotation (T, R/2) or (B, T, R/2).

    DeepSeek pairs neighbours. Llama pairs the first half with the second.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, T, H, R/2)
    rotated = pairs * rotation.unsqueeze(-2)
    return torch.view_as_real(rotated).flatten(-2).type_as(x)


@dataclass
class Cache:
    """All that MLA remembers of each token: its normalised latent and its rotated key."""
    latent: Tensor   # (layers, B, columns, kv_lora_rank + qk_rope_head_dim)
    real: Tensor     # (B, columns) False at padding and at drafts that were rejected
    length: int = 0  # S, columns that are filled

    def keep_rows(self, row_ids, extra_columns=0):
        """A copy of the rows in row_ids, which may repeat, with more empty columns."""
        layers, _, columns, width = self.latent.size()
        latent = self.latent.new_empty(layers, len(row_ids), columns + extra_columns, width)
        filled = latent[:, :, :self.length]
        # `filled` is a part of the new tensor, and out= writes into it.
        torch.index_select(self.latent[:, :, :self.length], 1, row_ids, out=filled)
        # An empty column counts as real until it is written.
        real = F.pad(self.real[row_ids], (0, extra_columns), value=True)
        return Cache(latent, real, self.length)

    def positions_and_mask(self, T):
        """Positions (B, T) of the last T columns, and what they see: a mask (B, 1, T,
        S) of 0 and -inf."""
        key_column = torch.arange(self.length, device=self.real.device)
        query_column = key_column[-T:].unsqueeze(-1)         # (T, 1)
        real = self.real[:, :self.length]
        visible = (key_column <= query_column) & real[:, None, None]
        # Padding sees itself. Otherwise its softmax would be over nothing, which is NaN.
        visible = visible | (key_column == query_column)
        # A real token's position is the number of real tokens before it.
        positions = (real.cumsum(1)[:, -T:] - 1).clamp(min=0)
        return positions, torch.where(visible, 0.0, -math.inf)


def make_cache(model, n_rows, n_columns, drafts=False):
    """An empty cache. With drafts it has one more layer, for MTP, whose guesses the
    model then judges (speculative decoding, engine/sampling.py)."""
    config = model.config
    layers = config.n_layers + (1 if drafts else 0)
    width = config.kv_lora_rank + config.qk_rope_head_dim
    latent = torch.zeros(layers, n_rows, n_columns, width,
                         dtype=model.compute_dtype, device=model.device)
    real = torch.ones(n_rows, n_columns, dtype=torch.bool, device=model.device)
    return Cache(latent, real)


def causal_mask(score):
    """(T, T) of -inf above the diagonal and 0 elsewhere, in the dtype of score (..,
    T, T)."""
    T = score.size(-1)
    return score.new_full((T, T), -math.inf).triu(1)


def document_mask(document):
    """What the tokens of packed rows see: their own document, up to themselves. A mask
    (B, 1, T, T) of 0 and -inf. document (B, T) numbers the documents of a row."""
    same = document.unsqueeze(1) == document.unsqueeze(2)    # (B, T, T)
    return torch.where(same.tril().unsqueeze(1), 0.0, -math.inf)


LONG_PROMPT = 128  # tokens; the form for training is faster above it


class MLA(nn.Module):
    """Multi-head latent attention (section 2.1.1, eq 1-11)."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.rank = config.n_heads, config.kv_lora_rank
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value_dim = config.v_head_dim
        self.scale = (self.nope_dim + self.rope_dim) ** -0.5
        q_dim = self.heads * (self.nope_dim + self.rope_dim)
        kv_dim = self.heads * (self.nope_dim + self.value_dim)
        kv_a_dim = self.rank + self.rope_dim
        self.compresses_queries = config.q_lora_rank > 0
        if self.compresses_queries:
            self.wq_a = nn.Linear(config.dim, config.q_lora_rank, bias=False)  # W_DQ
            self.q_norm = nn.RMSNorm(config.q_lora_rank, config.norm_eps)
            self.wq_b = nn.Linear(config.q_lora_rank, q_dim, bias=False)       # W_UQ, W_QR
        else:
            self.wq = nn.Linear(config.dim, q_dim, bias=False)
        self.wkv_a = nn.Linear(config.dim, kv_a_dim, bias=False)               # W_DKV, W_KR
        self.kv_norm = nn.RMSNorm(self.rank, config.norm_eps)
        self.wkv_b = nn.Linear(self.rank, kv_dim, bias=False)                  # W_UK, W_UV
        self.wo = nn.Linear(self.heads * self.value_dim, config.dim, bias=False)  # W_O

    def forward(self, x, rotation, cache=None, mask=None):
        """x (B, T, C) -> (B, T, C).

        cache (B, S, .) is this layer's filled columns; the last T of them are written
        here. mask comes from Cache.positions_and_mask.
        """
        B, T, _ = x.size()
        if self.compresses_queries:
            q_compressed = self.q_norm(self.wq_a(x).float())              # eq 6, c_Q
            q = self.wq_b(q_compressed)                                   # eq 7
        else:
            q = self.wq(x)
        q = q.view(B, T, self.heads, -1)
        q_nope, q_rope = q.split((self.nope_dim, self.rope_dim), -1)      # (B, T, H, .)
        q_rope = rotate(q_rope, rotation)                                 # eq 8
        kv = self.wkv_a(x)                                                # eq 1
        latent, k_rope = kv.split((self.rank, self.rope_dim), -1)         # (B, T, .)
        latent = self.kv_norm(latent.float())                             # c_KV, with a norm
        k_rope = rotate(k_rope.unsqueeze(2), rotation)                    # eq 3, (B, T, 1, R)

        if cache is not None:
            cache[:, -T:] = torch.cat((latent, k_rope.squeeze(2)), -1)
        # If this call fills an empty cache, nothing comes before it, and the training
        # form serves too. With a mask it is one fused kernel, which never stores the
        # scores.
        fills_cache = cache is not None and T == cache.size(1)
        if cache is None or (fills_cache and T > LONG_PROMPT):
            o = self.attend(q_nope, q_rope, latent, k_rope, mask)
        else:
            o = self.attend_absorbed(q_nope, q_rope, cache, mask)
        return self.wo(o.flatten(2))                                      # eq 11

    def attend(self, q_nope, q_rope, latent, k_rope, mask=None):
        """The form for training: each head has its own keys and values. Returns (B, T,
        H, .).

        Without a mask, attention is causal.
        """
        kv = self.wkv_b(latent)                                           # eq 2 and eq 5
        kv = kv.unflatten(-1, (self.heads, -1))                           # (B, T, H, .)
        k_nope, v = kv.split((self.nope_dim, self.value_dim), -1)
        k_rope = k_rope.expand(-1, -1, self.heads, -1)                    # all heads share it
        q_nope, q_rope, k_nope, k_rope, v = (                             # (B, H, T, .)
            x.transpose(1, 2) for x in (q_nope, q_rope, k_nope, k_rope, v))

        if kernels.fused_attention_is_slow(q_nope):
            score = q_nope * self.scale @ k_nope.mT                       # the content
            score = score + q_rope * self.scale @ k_rope.mT               # plus the position
            score = score + (causal_mask(score) if mask is None else mask)
            o = score.softmax(-1) @ v                                     # eq 10
        else:  # the same in one kernel, whose default scale is self.scale
            q = torch.cat((q_nope, q_rope), -1)                           # eq 9
            k = torch.cat((k_nope, k_rope), -1)                           # eq 4
            o = F.scaled_dot_product_attention(                           # eq 10
                q, k, v, mask, is_causal=mask is None)
        return o.transpose(1, 2)

    def attend_absorbed(self, q_nope, q_rope, cache, mask):
        """The form for sampling (DeepSeek-V2 report, section 2.1.2): all heads attend
        to the cached latents.

            q_nope . k_nope = q_nope . (W_UK c_KV) = (W_UK^T q_nope) . c_KV

        So W_UK moves to the query and W_UV to the output, and no key or value of the
        past is ever computed. Returns (B, T, H, .).
        """
        w_ukv = self.wkv_b.weight.view(self.heads, -1, self.rank)     # (H, ., rank)
        w_uk, w_uv = w_ukv.split((self.nope_dim, self.value_dim), 1)
        q_latent = torch.einsum("bthd,hdl->bhtl", q_nope, w_uk)
        # The cache holds (c_KV; k_rope), so one product adds up content and position.
        q = torch.cat((q_latent, q_rope.transpose(1, 2)), -1)         # (B, H, T, rank + R)
        v = cache[..., :self.rank]                                    # (B, S, rank)
        # All heads have the same keys, so H heads of T queries are one head of H*T
        # queries.
        mask = mask.expand(-1, self.heads, -1, -1).flatten(1, 2)      # (B, H*T, S)
        o_latent = kernels.attend_to_one_key_head(q.flatten(1, 2), cache, v, mask, self.scale)
        o_latent = o_latent.unflatten(1, (self.heads, -1))            # (B, H, T, rank)
        return torch.einsum("bhtl,hvl->bthv", o_latent, w_uv)


# ------------------------------------------------------------------------------
# Mixture of experts


def swiglu(x, w13, w2):
    """W2 (silu(W1 x) * W3 x). w13 is W1 above W3, so that both need one product."""
    gated, up = F.linear(x, w13).chunk(2, -1)
    return F.linear(F.silu(gated) * up, w2)


class MLP(nn.Module):
    """A SwiGLU feed-forward."""

    def __init__(self, dim, inter_dim):
        super().__init__()
        self.w13 = nn.Linear(dim, 2 * inter_dim, bias=False)
        self.w2 = nn.Linear(inter_dim, dim, bias=False)

    def forward(self, x):
        """x (.., C) -> (.., C)"""
        return swiglu(x, self.w13.weight, self.w2.weight)


class Router(nn.Module):
    """Chooses K experts for each token, and their gates (eq 13-16; section 2.1.2).

    With the bias, eq 16 takes the place of eq 14.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        E = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(E, config.dim))  # centroids e_i
        self.register_buffer("bias", torch.zeros(E))            # b_i
        # How many tokens each expert had since the last step.
        self.register_buffer("load", torch.zeros(E), persistent=False)

    def forward(self, x_NC):
        """Returns scores (N, E), gates (N, K) and the chosen experts' numbers (N, K)."""
        config = self.config
        # In float32, since in bfloat16 rounding would choose between nearly equal scores.
        with torch.autocast(x_NC.device.type, enabled=False):
            logits_NE = F.linear(x_NC.float(), self.weight.float())
        scores_NE = logits_NE.sigmoid()                                 # eq 15, s_i
        biased_NE = scores_NE.detach() + self.bias  # only to choose: it has no gradient
        if config.n_expert_groups > 1:
            biased_NE = self.limit_groups(biased_NE)
        expert_ids_NK = biased_NE.topk(config.n_activated_experts, -1).indices
        gates_NK = scores_NE.gather(-1, expert_ids_NK)                  # eq 16: bias not in g'_i
        gates_NK = gates_NK / (gates_NK.sum(-1, keepdim=True) + 1e-20)  # eq 13, g_i
        gates_NK = gates_NK * config.route_scale
        return scores_NE, gates_NK.type_as(x_NC), expert_ids_NK

    def limit_groups(self, biased_NE):
        """-inf for all experts outside the best groups of a token, n_limited_groups of
        them. A group's score is the sum of its best 2 experts."""
        # (N, groups, experts of a group)
        groups = biased_NE.unflatten(-1, (self.config.n_expert_groups, -1))
        score = groups.topk(2, -1).values.sum(-1)                       # (N, groups)
        best = score.topk(self.config.n_limited_groups, -1).indices
        allowed = torch.zeros_like(score, dtype=torch.bool).scatter(-1, best, True)
        return groups.masked_fill(~allowed.unsqueeze(-1), -math.inf).flatten(-2)


class Experts(nn.Module):
    """The routed experts. The weights of all experts are stacked."""

    def __init__(self, config):
        super().__init__()
        E, C, I = config.n_routed_experts, config.dim, config.moe_inter_dim
        self.w13 = nn.Parameter(torch.empty(E, 2 * I, C))
        self.w2 = nn.Parameter(torch.empty(E, C, I))

    def forward(self, x_NC, gates_NK, expert_ids_NK):
        """The sum of each token's experts, weighted by its gates: (N, C)."""
        if kernels.has_grouped_product(x_NC):
            return self.forward_grouped(x_NC, gates_NK, expert_ids_NK)
        return self.forward_loop(x_NC, gates_NK, expert_ids_NK)

    def forward_loop(self, x_NC, gates_NK, expert_ids_NK):
        """The sum over i of g_i FFN_i(u) in eq 12, literally: one expert after
        the other."""
        y_NC = torch.zeros_like(x_NC)
        for i, (w13, w2) in enumerate(zip(self.w13, self.w2)):
            token, choice = (expert_ids_NK == i).nonzero(as_tuple=True)
            gate = gates_NK[token, choice].unsqueeze(-1)
            y_NC = y_NC.index_add(0, token, gate * swiglu(x_NC[token], w13, w2))
        return y_NC

    def forward_grouped(self, x_NC, gates_NK, expert_ids_NK):
        """The same sum. The pairs of token and expert are sorted by expert, so that two
        grouped products serve all experts."""
        dtype = kernels.product_dtype(x_NC)
        token_M, gates_M, counts_E = kernels.sort_by_expert(
            expert_ids_NK, gates_NK, len(self.w2), dtype)
        x_MC = x_NC.index_select(0, token_M).to(dtype)
        y_MC = self.products(x_MC, counts_E).type_as(gates_NK)
        y_MC = y_MC * gates_M.unsqueeze(-1)
        return torch.zeros_like(x_NC, dtype=y_MC.dtype).index_add(0, token_M, y_MC)

    def products(self, x_MC, counts_E):
        """What the experts make of rows that are sorted by expert: (M, C).
        engine/devices.py replaces it where other processes hold some of the experts."""
        return grouped_swiglu(x_MC, counts_E, self.w13, self.w2)


def grouped_swiglu(x_MC, counts_E, w13, w2):
    """swiglu() of sorted rows: the first counts_E[0] by expert 0, the next by expert 1,
    ..."""
    w13_ECI = w13.to(x_MC.dtype).transpose(1, 2)
    w2_EIC = w2.to(x_MC.dtype).transpose(1, 2)
    ends = counts_E.cumsum(0).int()
    gated, up = F.grouped_mm(x_MC, w13_ECI, offs=ends).chunk(2, -1)
    return F.grouped_mm(F.silu(gated) * up, w2_EIC, offs=ends)


class MoE(nn.Module):
    """Shared and routed experts (eq 12)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared = MLP(config.dim, config.n_shared_experts * config.moe_inter_dim)

    def forward(self, x, real):
        """x (B, T, C) and real (B, T) -> (B, T, C) and the balance loss.

        real is False at padding. In training, the load counts real tokens only.
        """
        x_NC = x.flatten(0, 1)
        scores_NE, gates_NK, expert_ids_NK = self.router(x_NC)
        loss = 0.0
        if self.training:
            uses_NE = F.one_hot(expert_ids_NK, scores_NE.size(1)).sum(1)
            self.router.load += (uses_NE * real.flatten().unsqueeze(-1)).sum(0)
            loss = self.balance_loss(scores_NE.unflatten(0, x.shape[:2]), real)
        routed_NC = self.experts(x_NC, gates_NK, expert_ids_NK)
        y_NC = routed_NC + self.shared(x_NC).float()  # eq 12; Block adds the residual
        return y_NC.view_as(x), loss

    def balance_loss(self, scores_BTE, real):
        """The sequence-wise balance loss, summed over the sequences. It is alpha for
        each sequence whose load is even."""
        K, E = self.config.n_activated_experts, self.config.n_routed_experts
        mask = real.unsqueeze(-1).float()                               # (B, T, 1)
        length = mask.sum(1).clamp(min=1)                               # (B, 1), real tokens
        # The report counts the best K by scores without the bias, though the bias
        # decides routing.
        best = scores_BTE.topk(K, -1).indices
        chosen = torch.zeros_like(scores_BTE).scatter(-1, best, 1.0)
        f = E / (K * length) * (chosen * mask).sum(1)                   # eq 18, (B, E)
        share = scores_BTE / scores_BTE.sum(-1, keepdim=True)           # eq 19
        P = (share * mask).sum(1) / length                              # eq 20, (B, E)
        return self.config.balance_alpha * (f * P).sum()                # eq 17


# ------------------------------------------------------------------------------
# The transformer


class Block(nn.Module):
    """Attention, then a dense feed-forward or a mixture of experts. Inputs are
    normalised."""

    def __init__(self, config, dense):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attn = MLA(config)
        self.ffn = MLP(config.dim, config.inter_dim) if dense else MoE(config)

    def forward(self, x, rotation, real, cache=None, mask=None):
        """x (B, T, C) -> (B, T, C) and the balance loss."""
        attended = self.attn(self.attn_norm(x), rotation, cache, mask)
        x = x + attended.float()
        normed = self.ffn_norm(x)
        if isinstance(self.ffn, MoE):
            y, loss = self.ffn(normed, real)
        else:
            y, loss = self.ffn(normed), 0.0
        return x + y.float(), loss


class MTP(nn.Module):
    """Multi-token prediction of depth 1 (section 2.2).

    Position i reads the hidden state h_i and the embedding of token i+1, and predicts
    token i+2.
    """

    def __init__(self, config):
        super().__init__()
        self.hidden_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.embed_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.proj = nn.Linear(2 * config.dim, config.dim, bias=False)  # M_1 of eq 21
        only_dense = config.n_dense_layers == config.n_layers
        self.block = Block(config, dense=only_dense)

    def forward(self, hidden, next_embedding, rotation, real, cache=None, mask=None):
        """hidden (B, T, C) and the next token's embedding (B, T, C) -> (B, T, C) for
        the head."""
        x = torch.cat((self.hidden_norm(hidden), self.embed_norm(next_embedding)), -1)
        x = self.proj(x).float()                                       # eq 21
        x, loss = self.block(x, rotation, real, cache, mask)           # eq 22
        return self.norm(x), loss


@dataclass
class Output:
    """What a forward pass returns."""
    logits: Tensor                # (B, T, vocabulary), or (wanted, vocabulary)
    hidden: Tensor                # (B, T, C) after the final norm
    balance_loss: Tensor | float  # sum over layers and sequences


class Transformer(nn.Module):
    """The whole model. Embedding and head are not tied, as in V3."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32  # of products; see precision()
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(
            Block(config, dense=i < config.n_dense_layers) for i in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.n_outputs or config.vocab_size, bias=False)
        self.mtp = MTP(config) if config.n_mtp_layers else None
        self.register_buffer("rotations", make_rotations(config), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=config.init_std)

    @property
    def device(self):
        """The device of the weights."""
        return self.rotations.device

    def forward(self, tokens, real=None, cache=None, logits_at=None, document=None):
        """tokens (B, T) -> Output.

        real (B, T) is False at padding. Without a cache, padding is on the right, where
        no real token sees it. With a cache, the tokens continue it, the cache is
        extended in place, and padding may be anywhere.

        logits_at (B, T) is True where logits are wanted; without it, everywhere.

        document (B, T) numbers the documents that a row is packed of; none sees another.
        Without it, a row is one document.
        """
        T, mask = tokens.size(1), None
        if cache is None:
            real = torch.ones_like(tokens).bool() if real is None else real
            position = torch.arange(T, device=tokens.device)                    # (T,)
            mask = None if document is None else document_mask(document)
        else:
            cache.length += T
            new_columns = slice(cache.length - T, cache.length)
            cache.real[:, new_columns] = True if real is None else real
            position, mask = cache.positions_and_mask(T)                        # (B, T)
        rotation = self.rotations[position]
        with self.precision():
            x, balance_loss = self.embed(tokens), 0.0
            for i, layer in enumerate(self.layers):
                layer_cache = None if cache is None else cache.latent[i, :, :cache.length]
                x, loss = layer(x, rotation, real, layer_cache, mask)
                balance_loss = balance_loss + loss
            hidden = self.norm(x)
        # The head computes in float32, whatever precision() says.
        logits = self.head(hidden if logits_at is None else hidden[logits_at])
        return Output(logits, hidden, balance_loss)

    def precision(self):
        """A context in which products are computed in compute_dtype, from float32
        weights."""
        return torch.autocast(self.device.type, self.compute_dtype,
                              enabled=self.compute_dtype != torch.float32)

    def predict_after_next(self, tokens, document, hidden, logits_at):
        """MTP's Output for the token after the next.

        tokens and document (B, T), hidden (B, T, C) of forward(), logits_at (B, T-1).
        """
        mask = document_mask(document[:, :-1])
        with self.precision():
            next_embedding = self.embed(tokens[:, 1:])
            rotation = self.rotations[:tokens.size(1) - 1]
            next_is_real = document[:, 1:] > 0
            h, loss = self.mtp(hidden[:, :-1], next_embedding, rotation, next_is_real,
                               mask=mask)
        return Output(self.head(h[logits_at]), h, loss)                        # eq 23


# ------------------------------------------------------------------------------
# Training


def supervised_loss(model, tokens, document, token_weight, total_weight, n_rows):
    """V3's training loss: next token, MTP and balance. Returns (loss, info).

    tokens (B, T). document (B, T) numbers the documents of a row from 1, and is 0 at
    padding. token_weight (B, T) says how much the prediction of each token counts. It is
    0 for the first two tokens of a document. Otherwise the last tokens of the previous
    document would have to predict them. total_weight is the sum of all weights in the
    global batch, and n_rows is its number of rows. Since both are of the global batch,
    the gradient does not depend on how the batch is cut into passes.
    """
    def prediction_loss(hidden, shift):
        """Each position i predicts token i + shift. Returns the weighted mean of -log
        p."""
        wanted = token_weight[:, shift:] > 0
        predicting = hidden[:, :wanted.size(1)][wanted]                        # (wanted, C)
        total = kernels.cross_entropy_sum(model.head, predicting, tokens[:, shift:][wanted],
                                          token_weight[:, shift:][wanted])
        return total / total_weight

    # With an all-False mask the model computes no logits: cross_entropy_sum does that in
    # parts, to save memory.
    nowhere = torch.zeros_like(tokens, dtype=torch.bool)
    output = model(tokens, document > 0, logits_at=nowhere, document=document)
    main_loss = prediction_loss(output.hidden, shift=1)
    loss, balance_loss = main_loss, output.balance_loss
    if model.mtp is not None and model.config.mtp_weight:
        second = model.predict_after_next(tokens, document, output.hidden, nowhere[:, 1:])
        # eq 24, which divides by the same number as the main loss, though it has fewer
        # terms.
        mtp_loss = prediction_loss(second.hidden, shift=2)
        loss = loss + model.config.mtp_weight * mtp_loss                       # eq 25, D = 1
        balance_loss = balance_loss + second.balance_loss
    return loss + balance_loss / n_rows, {"loss": main_loss.detach()}


@torch.no_grad()
def update_routing_bias(model, moving=True):
    """Moves each routing bias by gamma: up if its expert had less than the mean load,
    down if it had more (section 2.1.2). Then sets the load to 0. Unless `moving`, the
    bias stays.

    Returns a list for each mixture that had tokens: the load of each expert over the
    mean.
    """
    loads = []
    for module in model.modules():
        if not isinstance(module, Router):
            continue
        mean = module.load.mean()
        if mean > 0:
            loads.append([round(x, 3) for x in (module.load / mean).tolist()])
            if moving:
                step = module.config.bias_speed * torch.sign(mean - module.load)
                module.bias += step
        module.load.zero_()
    return loads
