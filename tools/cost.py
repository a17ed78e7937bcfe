"""cost: what a preset's sizes come to, counted on the meta device (no memory is taken).

    python r1mini.py cost --preset v3

With --gpus also what training takes: studies/hours.py.
"""
import dataclasses
from collections import Counter

import torch

import moe
from engine.errors import UserError
from r1mini import PRESETS

# A part of the model: what is in the names of its parameters. The first that fits; else norms.
PARTS = {"embedding": "embed.", "head": "head.", "attention": ".attn.", "MTP projection": ".proj.",
         "routed experts": ".experts.", "shared experts": ".shared.", "gates": ".router.",
         "dense feed-forward": ".ffn."}


def count_parts(config, mtp=True):
    """(parameters, those of them active a token), each by part."""
    with torch.device("meta"):
        model = moe.Transformer(config if mtp else dataclasses.replace(config, n_mtp_layers=0))
    total, active = Counter(), Counter()
    for name, p in model.named_parameters():
        part = next((part for part, mark in PARTS.items() if mark in name), "norms")
        idle = config.n_routed_experts - config.n_activated_experts
        total[part] += p.numel()
        active[part] += p.numel() - (part == "routed experts") * idle * p[0].numel()
    return total, active


def count_parameters(config):
    """(total, active a token) of a model without MTP."""
    total, active = count_parts(config, mtp=False)
    return total.total(), active.total()


def in_products(config, mtp=True):
    """The active parameters that a token in training meets in matrix products: not the embedding,
    which is looked up; the head twice if MTP, which shares it, is trained too."""
    active = count_parts(config, mtp)[1]
    return active.total() - active["embedding"] + active["head"] * (mtp and config.n_mtp_layers)


def main(options):
    """Prints parameters in all and active a token, and the cache a token needs."""
    c = PRESETS[options.preset]
    total, active = count_parameters(c)
    latent = c.n_layers * (c.kv_lora_rank + c.qk_rope_head_dim)
    heads = c.n_layers * c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    print(f"{options.preset}: {total:,} parameters in all, {active:,} active a token (without MTP)")
    print(f"cache: {latent:,} numbers a token; ordinary multi-head attention with the same heads "
          f"would keep {heads:,} ({heads / latent:.0f} times)")
    if options.gpus is None and {options.tokens, options.mfu, options.dollars_per_hour} != {None}:
        raise UserError("--tokens, --mfu and --dollars-per-hour go with --gpus")
    return 0
