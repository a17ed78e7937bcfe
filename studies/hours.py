"""What did V3 and R1 take, and do their published hours agree with their FLOPs?

    python r1mini.py cost --preset v3 --gpus 2048
    python r1mini.py cost --preset v3 --gpus 2048 --tokens 14.8e12 --mfu 0.4 --dollars-per-hour 2

Laid out as V3's training was: memory of each GPU, FLOPs, messages, hours and dollars; for v3 beside
what the papers say. What is assumed stands in the output. Nothing is trained or measured.
"""
import math
import textwrap

from r1mini import PRESETS
from tools import cost
from tools.cost import count_parameters, count_parts, in_products

PEAK = 989e12     # FLOP/s of an H800 in BF16, without sparsity (NVIDIA's data sheet; in FP8 twice)
TOKENS = 14.8e12  # of V3's pre-training, in sequences of 4096 (section 4.2)
# H800 hours, at $2 (V3 Table 1; R1 v2 Table 7).
HOURS = {"pre-training": 2664e3, "context extension": 119e3, "post-training": 5e3, "V3": 2788e3,
         "R1-Zero": 101e3, "SFT data": 5e3, "the other stages": 41e3, "R1": 147e3}
EXTENSION = ((32768, 1920), (131072, 480))  # length and batch of 1000 steps each (V3 section 4.3)
ZERO = ((8200, 32768), (2200, 65536))       # updates of 512 answers, their limit (R1 Methods)


# -------------------------------------------------------------------------------------------------
# What training takes


def flops(config, length):
    """{part: FLOPs a token}, forward and backward, in sequences of `length` tokens."""
    layers = config.n_layers + config.n_mtp_layers
    pair = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return {"weights": 6 * in_products(config),                             # N, looked up apart
            "attention": 6 * layers * config.n_heads * pair * length // 2}  # causal: half


def flops_of_rl(config):
    """FLOPs a sampled token by weights alone: 2N to write it, 2N the reference, 6N to learn."""
    return 10 * in_products(config, mtp=False)


def hours(work, mfu):
    """GPU-hours of `work` FLOPs at a share of the peak."""
    return work / (3600 * PEAK * mfu)


def implied_mfu():
    """The share of the peak that V3's own hours of pre-training come to."""
    work = TOKENS * sum(flops(PRESETS["v3"], 4096).values())
    return hours(work, 1) / HOURS["pre-training"]


def layout(config, gpus):
    """(GPUs that share the experts, pipeline stages): 64 and 16 as V3 (section 3.2), or as many as
    divide a smaller number of GPUs."""
    routed = config.n_dense_layers < config.n_layers
    experts = math.gcd(64, gpus, config.n_routed_experts) if routed else 1
    stages = max(n for n in (1, 2, 4, 8, 16) if gpus // experts % n == 0 and n <= config.n_layers)
    return experts, stages


def kept(c):
    """Bytes that the backward pass needs of a token in all layers: the residual stream, attention's
    latents and result in 16 bits, what feed-forwards read and SwiGLU reads in 8. The rest is
    computed again (V3 sections 3.2.3, 3.3.3)."""
    queries = c.q_lora_rank or c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    attention = c.dim + queries + c.kv_lora_rank + c.qk_rope_head_dim + c.n_heads * c.v_head_dim
    ffn = (c.n_shared_experts + c.n_activated_experts) * (c.dim + 2 * c.moe_inter_dim)
    return (c.n_layers * 2 * attention + c.n_dense_layers * (c.dim + 2 * c.inter_dim)
            + (c.n_layers - c.n_dense_layers) * ffn)


def memory(config, gpus):
    """{part: bytes on a GPU}, the mean over all."""
    experts, stages = layout(config, gpus)
    total = count_parts(config)[0]
    routed = total["routed experts"]
    held = routed / experts / stages + (total.total() - routed) / stages
    flying = stages + 1 if stages > 1 else 1  # micro-batches; and two copies (V3 Table 2)
    return {"weights": held * (2 if stages > 1 else 1), "gradients": held * 4,
            "optimizer": total.total() / gpus * (4 + 2 + 2),
            "activations": kept(config) / stages * config.max_seq_len * flying}


def messages(c):
    """(bytes a token sends through a layer of experts, of them from node to node), forward: its
    vector to each expert in 8 bits and back in 16; to each node once (V3 section 3.2.2)."""
    nodes = c.n_limited_groups if c.n_expert_groups > 1 else c.n_activated_experts
    return 3 * c.dim * c.n_activated_experts, 3 * c.dim * nodes


# -------------------------------------------------------------------------------------------------
# What is printed


def row(name, *numbers):
    """A line of a table."""
    return f"{name:22}" + "".join(f"{x:>19}" for x in numbers)


def note(text):
    """A remark below a table."""
    return textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="  ",
                         break_on_hyphens=False)


def sizes(config):
    """Lines of the parameters by part."""
    total, active = count_parts(config)
    yield row("parameters", "in all", "active a token")
    yield from (row(part, f"{n:,}", f"{active[part]:,}") for part, n in total.items())
    if config.n_mtp_layers:
        alone = zip((total.total(), active.total()), count_parameters(config))
        yield row("of these, MTP's own", *(f"{n - main:,}" for n, main in alone))


def room(config, gpus):
    """Lines of the memory."""
    (experts, stages), parts = layout(config, gpus), memory(config, gpus)
    yield row(f"memory of {gpus:,} GPUs", "GiB each, mean")
    for part, size in (parts | {"in all": sum(parts.values())}).items():
        yield row(part, f"{size / 2 ** 30:,.3g}")
    yield note(
        f"assumed: experts over {experts} GPUs, pipeline stages: {stages}, the rest data parallel "
        "(ZeRO-1); weights in 8 bits, twice if there are stages (DualPipe); gradients in 32; "
        "master weights in 32, two moments in 16; sequences of "
        f"{config.max_seq_len:,} tokens, one more in flight than stages; norms, up-projections and "
        "SwiGLU computed again in the backward pass")


def effort(config, gpus, tokens, mfu, price, why):
    """Lines of FLOPs, messages, hours and dollars."""
    work, length = flops(config, config.max_seq_len), config.max_seq_len
    whole, across = messages(config)
    spent = hours(tokens * sum(work.values()), mfu)
    yield row("FLOPs a token", f"{sum(work.values()) / 1e9:,.4g}e9")
    for part, n in work.items():
        yield row(part, f"{n / 1e9:,.4g}e9")
    yield note("forward and backward: 6 for each weight a token meets, MTP's too; causal attention "
               f"over {length:,} tokens")
    if config.n_dense_layers < config.n_layers:
        yield row("all-to-all, bytes", "a token", f"{length:,} tokens")
        yield row("to the experts", f"{whole:,}", f"{whole * length:,}")
        yield row("from node to node", f"{across:,}", f"{across * length:,}")
        yield note("a layer, forward, at most; the backward pass sends as much; 8 bits there, 16 "
                   "back, scales left out")
    yield row(f"{tokens / 1e12:g}e12 tokens", "GPU-hours", f"at ${price:g}", "days")
    yield row("training", f"{spent:,.0f}", f"${spent * price:,.0f}", f"{spent / gpus / 24:,.1f}")
    yield note(f"assumed: {mfu:.1%} of {PEAK / 1e12:.0f} TFLOP/s, the peak of an H800 in BF16: "
               f"{why}")


def beside(config, tokens, mfu):
    """Lines of V3's and R1's hours, as counted here and as published."""
    extension = sum(1000 * batch * length * sum(flops(config, length).values())
                    for length, batch in EXTENSION)
    answers = sum(512 * updates * limit for updates, limit in ZERO)
    here = {"pre-training": hours(tokens * sum(flops(config, 4096).values()), mfu),
            "context extension": hours(extension, mfu),
            "R1-Zero": hours(answers * flops_of_rl(config), mfu)}
    yield row("H800 hours", "here", "published", "at $2")
    for name, x in HOURS.items():
        mine = f"{here[name]:,.0f}" if name in here else ""
        yield row(name, mine, f"{x:,.0f}", f"${2 * x:,.0f}")
    yield note("context extension: 1000 steps of 1920 sequences of 32K, then 1000 of 480 of 128K")
    yield note("R1-Zero: 10,400 updates of 512 answers, each as long as allowed (32K, later 64K), "
               "10 FLOPs a weight and token: 2 to write it, 2 in the reference, 6 to learn; "
               "attention left out. How long answers were is not published")


def main(options):
    """The command cost --gpus: what training takes, after what the sizes come to."""
    cost.main(options)
    c, tokens, mfu = PRESETS[options.preset], options.tokens or TOKENS, options.mfu
    price = 2.0 if options.dollars_per_hour is None else options.dollars_per_hour
    why = "as given" if mfu else (f"what V3's own {HOURS['pre-training']:,.0f} hours for "
                                  f"{TOKENS / 1e12:g}e12 tokens imply")
    mfu = mfu or implied_mfu()
    lines = [*sizes(c), *room(c, options.gpus), *effort(c, options.gpus, tokens, mfu, price, why),
             *(beside(c, tokens, mfu) if options.preset == "v3" else ())]
    print("\n".join(lines))
    return 0
