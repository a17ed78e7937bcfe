"""The model: a DeepSeek-V3 transformer in miniature.

    MLA          multi-head latent attention: keys and values share a small latent (V3 eq 1-11)
    Router       sigmoid affinities, node-limited groups, a bias that balances the load (eq 13-16)
    Experts      stacked weights, tokens sorted by expert, none dropped; MoE adds the shared experts
    MTP          one more block that predicts the token after the next (eq 21-25)
    Transformer  the whole, with a cache of latents
    supervised_loss, balance   V3's training loss, and the step of the routing bias

Axes: B batch, T time, C width (dim), H heads, E routed experts, K experts a token, N = B*T tokens.

Departures from V3: no YaRN, FP8 or pipeline; latents have norms, as in its code, not its equations.
MTP reads the state after the final norm; a norm of its own is before the shared head, as released.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import kernels


@dataclass(frozen=True)
class Config:
    """Sizes of a model, named as in DeepSeek's inference code; comments: the paper's symbols."""
    vocab_size: int = 521
    n_outputs: int = 0             # of the head; 0: the vocabulary, 1: a reward model's score
    dim: int = 64                  # d, width of the residual stream
    inter_dim: int = 192           # hidden width of a dense feed-forward
    moe_inter_dim: int = 64        # hidden width of one expert
    n_layers: int = 3
    n_dense_layers: int = 1        # the first layers' feed-forward is dense; all of them: no MoE
    n_heads: int = 4               # n_h
    n_routed_experts: int = 8      # N_r
    n_shared_experts: int = 1      # N_s, one feed-forward of width N_s * moe_inter_dim
    n_activated_experts: int = 2   # K_r, routed experts a token uses
    n_expert_groups: int = 1       # groups ("nodes") the experts lie in
    n_limited_groups: int = 1      # M, groups a token may use
    route_scale: float = 1.0       # factor on the routed experts' sum; 2.5 in V3
    q_lora_rank: int = 0           # d_c', query latent; 0: queries are not compressed (as V2-Lite)
    kv_lora_rank: int = 32         # d_c, key-value latent: only it and the rotary key are cached
    qk_nope_head_dim: int = 16     # d_h, content part of a query and key head
    qk_rope_head_dim: int = 16     # d_h^R, rotary part, one key shared by all heads
    v_head_dim: int = 32           # value head; if nope + rope, the fused attention kernel serves
    n_mtp_layers: int = 1          # D, multi-token prediction depth: 0 or 1
    mtp_weight: float = 0.3        # lambda, weight of the MTP loss
    balance_alpha: float = 1e-4    # alpha, weight of the sequence-wise balance loss
    bias_speed: float = 1e-3       # gamma, how far the routing bias moves a step
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    init_std: float = 0.05         # of every matrix; 0.006 at V3's width
    max_seq_len: int = 512         # tokens, prompt and answer


NANO = Config()
V3 = Config(vocab_size=129280, dim=7168, inter_dim=18432, moe_inter_dim=2048, n_layers=61,
                 n_dense_layers=3, n_heads=128, n_routed_experts=256, n_activated_experts=8,
                 n_expert_groups=8, n_limited_groups=4, route_scale=2.5, q_lora_rank=1536,
                 kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
                 init_std=0.006, max_seq_len=4096)


# --------------------------------------------------------------------------------------------------
# Attention


def rope_turns(config):
    """e^(i angle) of every position and frequency, (max_seq_len, qk_rope_head_dim / 2) complex."""
    twice = torch.arange(0, config.qk_rope_head_dim, 2, dtype=torch.float32)              # 2i
    frequency = config.rope_theta ** (-twice / config.qk_rope_head_dim)
    angle = torch.outer(torch.arange(config.max_seq_len, dtype=torch.float32), frequency)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x, turn):
    """Rotates pairs (x0, x1), (x2, x3), ... of (B, T, H, R), as DeepSeek does (Llama: halves)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, T, H, R/2)
    return torch.view_as_real(pairs * turn.unsqueeze(-2)).flatten(-2).type_as(x)


@dataclass
class Cache:
    """All that MLA remembers of a token: the normalised latent and the rotated shared key."""
    latent: Tensor   # (layers, B, S, kv_lora_rank + qk_rope_head_dim), S columns reserved
    real: Tensor     # (B, S) False at left padding and at drafts that were rejected
    length: int = 0  # columns filled

    def keep(self, rows, more=0):
        """The cache of some rows, by number, repeated or not, and `more` columns, undefined yet."""
        layers, _, S, width = self.latent.size()
        latent = self.latent.new_empty(layers, len(rows), S + more, width)
        torch.index_select(self.latent[:, :, :self.length], 1, rows, out=latent[:, :, :self.length])
        return Cache(latent, F.pad(self.real[rows], (0, more), value=True), self.length)

    def view(self, T):
        """Positions (B, T) of the last T columns, and their mask (B, 1, T, filled), 0 or -inf."""
        column = torch.arange(self.length, device=self.real.device)
        real, query = self.real[:, :self.length], column[-T:].unsqueeze(-1)          # query (T, 1)
        visible = (column <= query) & real[:, None, None] | (column == query)
        return (real.cumsum(1)[:, -T:] - 1).clamp(min=0), torch.where(visible, 0.0, -math.inf)


def make_cache(model, rows, size, drafts=False):
    """An empty cache of `size` columns for a number of rows; with drafts, a layer more for MTP."""
    config, device = model.config, model.turns.device
    size = config.n_layers + drafts, rows, size, config.kv_lora_rank + config.qk_rope_head_dim
    latent = torch.zeros(size, dtype=model.compute_dtype, device=device)  # as products round it
    return Cache(latent, torch.ones(size[1:3], dtype=torch.bool, device=device))


class MLA(nn.Module):
    """Multi-head latent attention (V3 section 2.1.1, eq 1-11)."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.value, self.rank = config.n_heads, config.v_head_dim, config.kv_lora_rank
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.scale = (self.nope + self.rope) ** -0.5
        q_dim, kv_dim = self.heads * (self.nope + self.rope), self.heads * (self.nope + self.value)
        if config.q_lora_rank:
            self.wq_a = nn.Linear(config.dim, config.q_lora_rank, bias=False)  # W_DQ
            self.q_norm = nn.RMSNorm(config.q_lora_rank, config.norm_eps)
            self.wq_b = nn.Linear(config.q_lora_rank, q_dim, bias=False)       # W_UQ, W_QR by head
        else:
            self.wq = nn.Linear(config.dim, q_dim, bias=False)
        self.wkv_a = nn.Linear(config.dim, self.rank + self.rope, bias=False)  # W_DKV, W_KR
        self.kv_norm = nn.RMSNorm(self.rank, config.norm_eps)
        self.wkv_b = nn.Linear(self.rank, kv_dim, bias=False)                  # W_UK, W_UV by head
        self.wo = nn.Linear(self.heads * self.value, config.dim, bias=False)   # W_O

    def forward(self, x, turn, cache=None, mask=None):
        """x (B, T, C) -> (B, T, C). cache (B, S, .), its last T columns empty; mask: Cache.view."""
        B, T, _ = x.size()
        q = self.wq(x) if hasattr(self, "wq") else self.wq_b(self.q_norm(self.wq_a(x).float()))
        q, q_rope = q.view(B, T, self.heads, -1).split((self.nope, self.rope), -1)  # (B, T, H, .)
        latent, k_rope = self.wkv_a(x).split((self.rank, self.rope), -1)            # (B, T, .)
        latent = self.kv_norm(latent.float())                                       # c_KV
        q_rope, k_rope = rotate(q_rope, turn), rotate(k_rope.unsqueeze(2), turn)    # k_R, one head
        if cache is not None:
            cache[:, -T:] = torch.cat((latent, k_rope.squeeze(2)), -1)
        if cache is None or T == cache.size(1) > 128:  # a prompt so long that scores fill memory
            return self.wo(self.attend(q, q_rope, latent, k_rope, mask).flatten(2))
        return self.wo(self.attend_absorbed(q, q_rope, cache, mask, x.is_cuda).flatten(2))

    def attend(self, q, q_rope, latent, k_rope, mask=None):
        """The form for training and long prompts: each head's keys and values. (B, T, H, value)"""
        k, v = self.wkv_b(latent).unflatten(-1, (self.heads, -1)).split((self.nope, self.value), -1)
        q, q_rope, k, k_rope, v = (x.transpose(1, 2) for x in (q, q_rope, k, k_rope, v))
        q = torch.cat((q, q_rope), -1)                                 # (B, H, T, nope + rope)
        k = torch.cat((k, k_rope.expand(-1, self.heads, -1, -1)), -1)  # k_C, k_R
        return kernels.attention(q, k, v, mask).transpose(1, 2)

    def attend_absorbed(self, q, q_rope, cache, mask, fused=False):
        """The form for decoding (V2 section 2.1.2): W_UK moves to the query and W_UV to the output;
        all heads share the cached latents as keys. fused: by torch's kernel, slow on a CPU."""
        w_ukv = self.wkv_b.weight.view(self.heads, -1, self.rank)  # (H, nope + value, rank)
        w_uk, w_uv = w_ukv.split((self.nope, self.value), 1)
        q = torch.einsum("bthd,hdr->bhtr", q, w_uk)                # the query's content as a latent
        q = torch.cat((q, q_rope.transpose(1, 2)), -1)             # (B, H, T, rank + rope)
        mask, v = mask.expand(-1, self.heads, -1, -1).flatten(1, 2), cache[..., :self.rank]
        z = kernels.attention_of_one_key_head(                     # heads: queries of one head
            q.flatten(1, 2), cache, v, mask, self.scale, fused)    # (B, H*T, rank)
        return torch.einsum("bhtr,hvr->bthv", z.unflatten(1, (self.heads, -1)), w_uv)


# --------------------------------------------------------------------------------------------------
# Mixture of experts


class MLP(nn.Module):
    """SwiGLU feed-forward: w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim, inter_dim):
        super().__init__()
        self.w13 = nn.Linear(dim, 2 * inter_dim, bias=False)  # w1 (gate) above w3 (up): one product
        self.w2 = nn.Linear(inter_dim, dim, bias=False)

    def forward(self, x):
        """x (.., C) -> (.., C)"""
        gate, up = self.w13(x).chunk(2, -1)
        return self.w2(F.silu(gate) * up)


class Router(nn.Module):
    """Which K experts a token goes to, with what gates (V3 eq 13-16; node limit: section 2.1.2)."""

    def __init__(self, config):
        super().__init__()
        self.config, E = config, config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(E, config.dim))          # centroids e_i
        self.register_buffer("bias", torch.zeros(E))                    # b_i, moved by balance()
        self.register_buffer("load", torch.zeros(E), persistent=False)  # c_i since the last step

    def forward(self, x_NC):
        """Returns scores (N, E), gates (N, K) and the chosen experts (N, K)."""
        config = self.config
        with torch.autocast(x_NC.device.type, enabled=False):          # float32: near-ties decide
            scores_NE = F.linear(x_NC.float(), self.weight.float()).sigmoid()  # s_i
        biased_NE = scores_NE.detach() + self.bias                     # only the choice is biased
        if config.n_expert_groups > 1:
            groups = biased_NE.unflatten(-1, (config.n_expert_groups, -1))  # (N, groups, E/groups)
            score = groups.topk(2, -1).values.sum(-1)        # its best 2, as in DeepSeek's code
            best = score.topk(config.n_limited_groups, -1).indices
            outside = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, False)
            biased_NE = groups.masked_fill(outside.unsqueeze(-1), -math.inf).flatten(-2)
        chosen_NK = biased_NE.topk(config.n_activated_experts, -1).indices
        gates_NK = scores_NE.gather(-1, chosen_NK)                     # g_i, from unbiased scores
        gates_NK = gates_NK / (gates_NK.sum(-1, keepdim=True) + 1e-20) * config.route_scale
        return scores_NE, gates_NK.type_as(x_NC), chosen_NK


class Experts(nn.Module):
    """All routed experts as stacked weights."""

    def __init__(self, config):
        super().__init__()
        E, C, I = config.n_routed_experts, config.dim, config.moe_inter_dim
        self.w13 = nn.Parameter(torch.empty(E, 2 * I, C))
        self.w2 = nn.Parameter(torch.empty(E, C, I))

    def forward(self, x_NC, gates_NK, chosen_NK):
        """The gated sum of each token's experts (N, C)."""
        dtype = kernels.product_dtype(x_NC)
        token_M, gates_M, counts_E = kernels.sort_by_expert(
            chosen_NK, gates_NK, len(self.w2), dtype)
        y_MC = self.products(x_NC.index_select(0, token_M).to(dtype), counts_E)
        y_MC = y_MC.type_as(gates_NK) * gates_M.unsqueeze(-1)          # mixed types: slow on a CPU
        return torch.zeros_like(x_NC, dtype=y_MC.dtype).index_add(0, token_M, y_MC)

    def products(self, x_MC, counts_E):
        """What experts make of rows sorted by expert, counts_E each: (M, C)."""
        return swiglu_by_group(x_MC, counts_E, self.w13, self.w2)


def swiglu_by_group(x_MC, counts_E, w13, w2):
    """SwiGLU of rows in groups of counts_E each, with stacked weights: w13 (E, 2I, C), w2 (E, C, I)
    -> (M, C)."""
    w13, w2 = (w.to(x_MC.dtype).transpose(1, 2) for w in (w13, w2))
    ends = counts_E.cumsum(0).int()
    gate, up = F.grouped_mm(x_MC, w13, offs=ends).chunk(2, -1)
    return F.grouped_mm(F.silu(gate) * up, w2, offs=ends)


class MoE(nn.Module):
    """Shared and routed experts (V3 eq 12)."""

    def __init__(self, config):
        super().__init__()
        self.config, self.router, self.experts = config, Router(config), Experts(config)
        self.shared = MLP(config.dim, config.n_shared_experts * config.moe_inter_dim)

    def forward(self, x, real):
        """x (B, T, C), real (B, T) -> (B, T, C), balance loss. Counts load in training."""
        x_NC = x.flatten(0, 1)
        scores_NE, gates_NK, chosen_NK = self.router(x_NC)
        loss = 0.0
        if self.training:
            taken_NE = F.one_hot(chosen_NK, scores_NE.size(1)).sum(1) * real.flatten().unsqueeze(-1)
            self.router.load += taken_NE.sum(0)
            loss = self.balance_loss(scores_NE.unflatten(0, x.shape[:2]), real)
        y_NC = self.experts(x_NC, gates_NK, chosen_NK) + self.shared(x_NC).float()
        return y_NC.view_as(x), loss

    def balance_loss(self, scores_BTE, real):
        """The sequence-wise balance loss (V3 eq 17-20), over all sequences; alpha each if even."""
        K, E = self.config.n_activated_experts, self.config.n_routed_experts
        mask = real.unsqueeze(-1).float()           # (B, T, 1)
        length = mask.sum(1).clamp(min=1)           # T of each sequence, (B, 1)
        top = torch.zeros_like(scores_BTE).scatter(-1, scores_BTE.topk(K, -1).indices, 1.0)
        f = E / (K * length) * (top * mask).sum(1)  # (B, E)
        p = (scores_BTE / scores_BTE.sum(-1, keepdim=True) * mask).sum(1) / length
        return self.config.balance_alpha * (f * p).sum()


# --------------------------------------------------------------------------------------------------
# The transformer


class Block(nn.Module):
    """Pre-norm attention, then a dense or mixture-of-experts feed-forward."""

    def __init__(self, config, dense):
        super().__init__()
        self.attn_norm, self.ffn_norm = (nn.RMSNorm(config.dim, config.norm_eps) for _ in range(2))
        self.attn = MLA(config)
        self.ffn = MLP(config.dim, config.inter_dim) if dense else MoE(config)

    def forward(self, x, turn, real, cache=None, mask=None):
        """x (B, T, C) -> (B, T, C), balance loss."""
        x = x + self.attn(self.attn_norm(x), turn, cache, mask).float()  # mixed sums: slow on a CPU
        h = self.ffn_norm(x)
        y, loss = self.ffn(h, real) if isinstance(self.ffn, MoE) else (self.ffn(h), 0.0)
        return x + y.float(), loss


class MTP(nn.Module):
    """Multi-token prediction of depth 1 (V3 section 2.2): h_i and Emb(t_{i+1}) predict t_{i+2}."""

    def __init__(self, config):
        super().__init__()
        norms = (nn.RMSNorm(config.dim, config.norm_eps) for _ in range(3))
        self.hidden_norm, self.embed_norm, self.norm = norms
        self.proj = nn.Linear(2 * config.dim, config.dim, bias=False)  # M_1
        self.block = Block(config, dense=config.n_dense_layers == config.n_layers)

    def forward(self, hidden, embedded, turn, real, cache=None, mask=None):
        """hidden (B, T, C), embedded (B, T, C) of the next -> (B, T, C) for the shared head."""
        x = torch.cat((self.hidden_norm(hidden), self.embed_norm(embedded)), -1)  # eq 21
        x, loss = self.block(self.proj(x).float(), turn, real, cache, mask)
        return self.norm(x), loss


@dataclass
class Output:
    """What a forward pass returns."""
    logits: Tensor  # (B, T, vocabulary), or (M, vocabulary) of the positions asked for
    hidden: Tensor  # (B, T, C) after the final norm
    balance: Tensor | float  # balance loss, summed over layers and sequences


class Transformer(nn.Module):
    """The whole model. Every weight of the embedding is separate from the head's, as in V3."""

    def __init__(self, config):
        super().__init__()
        self.config, self.compute_dtype = config, torch.float32
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, dense=i < config.n_dense_layers)
                                    for i in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.n_outputs or config.vocab_size, bias=False)
        self.mtp = MTP(config) if config.n_mtp_layers else None
        self.register_buffer("turns", rope_turns(config), persistent=False)
        for parameter in (p for p in self.parameters() if p.dim() > 1):
            nn.init.normal_(parameter, std=config.init_std)

    def forward(self, tokens, real=None, cache=None, at=None):
        """tokens (B, T) -> Output. real (B, T): False at padding, on the right, in no load;
        anywhere with a cache, which tokens continue. at (B, T): True where logits are wanted."""
        T, mask = tokens.size(1), None
        if cache is None:
            real = torch.ones_like(tokens).bool() if real is None else real
            position = torch.arange(T, device=tokens.device)
        else:
            cache.length += T
            cache.real[:, cache.length - T:cache.length] = True if real is None else real
            position, mask = cache.view(T)
        turn = self.turns[position]  # (T, R/2), with a cache (B, T, R/2)
        with self.precision():
            x, balance = self.embed(tokens), 0.0
            for i, layer in enumerate(self.layers):
                columns = None if cache is None else cache.latent[i, :, :cache.length]
                x, loss = layer(x, turn, real, columns, mask)
                balance = balance + loss
            hidden = self.norm(x)
        logits = self.head(hidden if at is None else hidden[at])  # in float32, whatever precision()
        return Output(logits, hidden, balance)

    def precision(self):
        """A context in which products are computed in compute_dtype, from float32 weights."""
        return torch.autocast(self.head.weight.device.type, self.compute_dtype,
                              enabled=self.compute_dtype != torch.float32)

    def predict_second(self, tokens, real, hidden, at):
        """MTP's Output for the token after the next: place i reads hidden (B, T, C) of tokens 0..i
        and the embedding of token i+1, and predicts token i+2. at (B, T-1): True if wanted."""
        with self.precision():
            embedded, turn = self.embed(tokens[:, 1:]), self.turns[:tokens.size(1) - 1]
            h, loss = self.mtp(hidden[:, :-1], embedded, turn, real[:, 1:])
        return Output(self.head(h[at]), h, loss)



# --------------------------------------------------------------------------------------------------
# Training


# In pretraining too, questions are given, not predicted, and documents padded (V3 predicts all
# tokens, of packed documents).


def supervised_loss(model, tokens, real, weight, targets, sequences):
    """V3's training loss: next token, MTP (eq 24-25) and balance (eq 17). Returns (loss, info).

    tokens (B, T), real (B, T) False at padding, weight (B, T) of predicting each token. targets and
    sequences count the global batch, so cutting it into micro-batches never changes the gradient.
    """
    def nll(hidden, shift):                        # place i predicts token i + shift
        at = weight[:, shift:] > 0
        total = kernels.cross_entropy_sum(model.head, hidden[:, :at.size(1)][at],
                                          tokens[:, shift:][at], weight[:, shift:][at])
        return total / targets
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
