"""cost: the parameters of a preset and the size of its cache.

    python r1mini.py cost --preset v3

The parameters are counted on the meta device, which takes no memory. With --gpus, studies/hours.py
adds what training takes.
"""
import dataclasses
from collections import Counter

import torch

import moe
from engine.errors import UserError
from r1mini import PRESETS

# {part of the model: a piece of its parameters' names}. The first piece that fits decides. Names
# without any of them are norms.
PARTS = {"embedding": "embed.", "head": "head.", "attention": ".attn.", "MTP projection": ".proj.",
         "routed experts": ".experts.", "shared experts": ".shared.", "gates": ".router.",
         "dense feed-forward": ".ffn."}


def main(options):
    """The command cost."""
    training_options = (options.tokens, options.mfu, options.dollars_per_hour)
    if options.gpus is None and any(value is not None for value in training_options):
        raise UserError("--tokens, --mfu and --dollars-per-hour go with --gpus")
    config = PRESETS[options.preset]
    total, active = count_parameters(config)
    latent = config.n_layers * (config.kv_lora_rank + config.qk_rope_head_dim)
    heads = config.n_layers * config.n_heads * (
        config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    print(f"{options.preset}: {total:,} parameters in all, {active:,} active per token "
          "(without MTP)")
    print(f"cache: {latent:,} numbers per token; multi-head attention with the same heads would "
          f"keep {heads:,} ({heads / latent:.0f} times)")
    return 0


def count_parts(config, mtp=True):
    """(all parameters, parameters active per token), each as {part: number}."""
    with torch.device("meta"):
        model = moe.Transformer(config if mtp else dataclasses.replace(config, n_mtp_layers=0))
    total, active = Counter(), Counter()
    idle_experts = config.n_routed_experts - config.n_activated_experts
    for name, p in model.named_parameters():
        part = next((part for part, piece in PARTS.items() if piece in name), "norms")
        total[part] += p.numel()
        active[part] += p.numel()
        if part == "routed experts":  # (E, ., .)
            active[part] -= idle_experts * p[0].numel()
    return total, active


def count_parameters(config):
    """(all parameters, parameters active per token) of a model without MTP."""
    total, active = count_parts(config, mtp=False)
    return total.total(), active.total()
