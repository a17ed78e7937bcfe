"""Do the published GPU-hours of V3 and R1 agree with their FLOPs?

The paper: V3's pre-training took 2,664K H800-hours, all of its training 2,788K (V3
Table 1). R1-Zero took 101K and all of R1 147K (R1 v2 Table 7).

    python r1mini.py cost --preset v3 --gpus 2048
    python r1mini.py cost --preset v3 --gpus 2048 --tokens 14.8e12 --mfu 0.4 --dollars-per-hour 2

This prints the memory of each GPU, the FLOPs, the messages between GPUs, the hours and
the dollars, for GPUs that are laid out as in V3's training. For v3 the published hours
stand beside ours. The output says what is assumed. Nothing is trained or measured.
"""
import math
import textwrap

from r1mini import PRESETS
from tools import cost
from tools.cost import count_parameters, count_parts
from tools.flops import flops_per_token

PEAK = 989e12     # FLOP/s of an H800 in BF16, dense (NVIDIA's data sheet); FP8 has twice as many
TOKENS = 14.8e12  # of V3's pre-training, in sequences of 4096 (V3 section 4.2)
# H800 hours, at $2 per hour (V3 Table 1; R1 v2 Table 7).
HOURS = {"pre-training": 2664e3, "context extension": 119e3, "post-training": 5e3, "V3": 2788e3,
         "R1-Zero": 101e3, "SFT data": 5e3, "the other stages": 41e3, "R1": 147e3}
EXTENSION = ((32768, 1920), (131072, 480))  # length and batch of 1000 steps each (V3 section 4.3)
ZERO = ((8200, 32768), (2200, 65536))       # updates of 512 answers, and their limit (R1 Methods)


# ------------------------------------------------------------------------------
# What training takes


def _flops(config, length):
    """{part: FLOPs per token}, forward and backward, in sequences of `length` tokens."""
    weights = flops_per_token(config, "learn", mtp=True)
    # Attention is causal: on average a token sees half of the sequence.
    both = flops_per_token(config, "learn", mtp=True, seen=length // 2)
    return {"weights": weights, "attention": both - weights}


def _flops_of_rl(config):
    """FLOPs per sampled token, of the weights alone: with N parameters, 2N to write it,
    2N in the reference, 6N to learn from it."""
    return sum(flops_per_token(config, work) for work in ("write", "read", "learn"))


def _hours(work, mfu):
    """GPU-hours of `work` FLOPs at this share of the peak."""
    return work / (3600 * PEAK * mfu)


def _implied_mfu():
    """The share of the peak that V3's own pre-training hours imply."""
    work = TOKENS * sum(_flops(PRESETS["v3"], 4096).values())
    return _hours(work, 1) / HOURS["pre-training"]


def _layout(config, gpus):
    """(GPUs that share the experts, pipeline stages). V3 has 64 and 16 (V3 section
    3.2). Fewer GPUs get the largest numbers that divide them."""
    has_experts = config.n_dense_layers < config.n_layers
    experts = math.gcd(64, gpus, config.n_routed_experts) if has_experts else 1
    stages = max(n for n in (1, 2, 4, 8, 16)
                 if gpus // experts % n == 0 and n <= config.n_layers)
    return experts, stages


def _activation_bytes(c):
    """Bytes per token that the backward pass needs, in all layers.

    16 bits for the residual stream, attention's latents and attention's result; 8 bits
    for the inputs of feed-forwards and of SwiGLU. The rest is computed again (V3
    sections 3.2.3 and 3.3.3).
    """
    queries = c.q_lora_rank or c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    latents = queries + c.kv_lora_rank + c.qk_rope_head_dim
    attention = 2 * (c.dim + latents + c.n_heads * c.v_head_dim)
    dense = c.dim + 2 * c.inter_dim
    experts = (c.n_shared_experts + c.n_activated_experts) * (c.dim + 2 * c.moe_inter_dim)
    expert_layers = c.n_layers - c.n_dense_layers
    return c.n_layers * attention + c.n_dense_layers * dense + expert_layers * experts


def _memory(config, gpus):
    """{part: bytes per GPU}, the mean over all GPUs."""
    experts, stages = _layout(config, gpus)
    total = count_parts(config)[0]
    routed = total["routed experts"]
    held = routed / experts / stages + (total.total() - routed) / stages
    copies, micro_batches = 1, 1
    if stages > 1:  # DualPipe (V3 Table 2)
        copies, micro_batches = 2, stages + 1
    return {"weights": held * copies,                               # 8 bits
            "gradients": held * 4,                                  # 32 bits
            "optimizer": total.total() / gpus * (4 + 2 + 2),        # master weight, two moments
            "activations": (_activation_bytes(config) / stages
                            * config.max_seq_len * micro_batches)}


def _messages(c):
    """Bytes that a token sends in one layer of experts, forward: (to its experts, from
    node to node). Its vector travels in 8 bits and comes back in 16, once for each node
    (V3 section 3.2.2)."""
    nodes = c.n_limited_groups if c.n_expert_groups > 1 else c.n_activated_experts
    return 3 * c.dim * c.n_activated_experts, 3 * c.dim * nodes


# ------------------------------------------------------------------------------
# What is printed


def _row(name, *numbers):
    """A line of a table."""
    return f"{name:22}" + "".join(f"{x:>19}" for x in numbers)


def _note(text):
    """A remark below a table."""
    return textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="  ",
                         break_on_hyphens=False)


def _size_lines(config):
    """Lines of the parameters by part."""
    total, active = count_parts(config)
    yield _row("parameters", "in all", "active per token")
    for part, n in total.items():
        yield _row(part, f"{n:,}", f"{active[part]:,}")
    if config.n_mtp_layers:
        total_without_mtp, active_without_mtp = count_parameters(config)
        yield _row("of these, MTP's own", f"{total.total() - total_without_mtp:,}",
                   f"{active.total() - active_without_mtp:,}")


def _memory_lines(config, gpus):
    """Lines of the memory."""
    experts, stages = _layout(config, gpus)
    parts = _memory(config, gpus)
    yield _row(f"memory of {gpus:,} GPUs", "GiB per GPU, mean")
    for part, size in (parts | {"in all": sum(parts.values())}).items():
        yield _row(part, f"{size / 2 ** 30:,.3g}")
    yield _note(
        f"assumed: GPUs that share the experts: {experts}; pipeline stages: {stages}; the rest "
        "is data parallel (ZeRO-1). Weights have 8 bits, and two copies if there are "
        "several stages (DualPipe). Gradients have 32 bits, master weights 32, and the two "
        f"moments 16 each. Sequences have {config.max_seq_len:,} tokens; one more is in flight "
        "than there are stages. The backward pass computes norms, up-projections and SwiGLU "
        "again")


def _training_lines(config, gpus, tokens, mfu, price, why):
    """Lines of FLOPs, messages, hours and dollars."""
    length = config.max_seq_len
    work = _flops(config, length)
    flops_per_token = sum(work.values())
    yield _row("FLOPs per token", f"{flops_per_token / 1e9:,.4g}e9")
    for part, n in work.items():
        yield _row(part, f"{n / 1e9:,.4g}e9")
    yield _note("forward and backward: 6 for each weight that a token meets, MTP's too; and "
                f"causal attention over {length:,} tokens")
    if config.n_dense_layers < config.n_layers:
        to_experts, between_nodes = _messages(config)
        yield _row("all-to-all, bytes", "per token", f"{length:,} tokens")
        yield _row("to the experts", f"{to_experts:,}", f"{to_experts * length:,}")
        yield _row("from node to node", f"{between_nodes:,}", f"{between_nodes * length:,}")
        yield _note("per layer, forward, at most; the backward pass sends as much. 8 bits to the "
                    "experts, 16 bits back; scales are left out")
    gpu_hours = _hours(tokens * flops_per_token, mfu)
    yield _row(f"{tokens / 1e12:g}e12 tokens", "GPU-hours", f"at ${price:g}", "days")
    yield _row("training", f"{gpu_hours:,.0f}", f"${gpu_hours * price:,.0f}",
               f"{gpu_hours / gpus / 24:,.1f}")
    yield _note(f"assumed: {mfu:.1%} of {PEAK / 1e12:.0f} TFLOP/s, the peak of an H800 in BF16: "
                f"{why}")


def _published_lines(config, tokens, mfu):
    """Lines of V3's and R1's hours, as computed here and as published."""
    extension_flops = 0
    for length, batch in EXTENSION:
        extension_flops += 1000 * batch * length * sum(_flops(config, length).values())
    answer_tokens = sum(512 * updates * limit for updates, limit in ZERO)
    computed = {
        "pre-training": _hours(tokens * sum(_flops(config, 4096).values()), mfu),
        "context extension": _hours(extension_flops, mfu),
        "R1-Zero": _hours(answer_tokens * _flops_of_rl(config), mfu)}
    yield _row("H800 hours", "computed", "published", "at $2")
    for name, published in HOURS.items():
        ours = f"{computed[name]:,.0f}" if name in computed else ""
        yield _row(name, ours, f"{published:,.0f}", f"${2 * published:,.0f}")
    yield _note("context extension: 1000 steps of 1920 sequences of 32K, then 1000 of 480 of 128K")
    yield _note("R1-Zero: 10,400 updates of 512 answers. Each answer is taken to be as long as "
                "allowed (32K, later 64K tokens); the real lengths are not published. 10 FLOPs "
                "per weight and token: 2 to write it, 2 in the reference, 6 to learn from it. "
                "Attention is left out")


def main(options):
    """The command cost --gpus: prints the sizes, then what training takes."""
    cost.main(options)
    config, gpus = PRESETS[options.preset], options.gpus
    tokens = options.tokens or TOKENS
    price = 2.0 if options.dollars_per_hour is None else options.dollars_per_hour
    if options.mfu:
        mfu, why = options.mfu, "as given"
    else:
        mfu = _implied_mfu()
        why = (f"what V3's own {HOURS['pre-training']:,.0f} hours for {TOKENS / 1e12:g}e12 "
               "tokens imply")
    lines = [*_size_lines(config), *_memory_lines(config, gpus),
             *_training_lines(config, gpus, tokens, mfu, price, why)]
    if options.preset == "v3":
        lines += _published_lines(config, tokens, mfu)
    print("\n".join(lines))
    return 0
