"""cost: what a preset's sizes come to, counted on the meta device (no memory is taken)."""
import dataclasses

import torch

import moe


def count_parameters(config):
    """(total, active a token) of a model without MTP."""
    with torch.device("meta"):
        model = moe.Transformer(dataclasses.replace(config, n_mtp_layers=0))
    total = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return total, total - routed + routed * config.n_activated_experts // config.n_routed_experts


def main(options):
    """Prints parameters in all and active a token, and the cache a token needs."""
    c = moe.PRESETS[options.preset]
    total, active = count_parameters(c)
    latent = c.n_layers * (c.kv_lora_rank + c.qk_rope_head_dim)
    heads = c.n_layers * c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    print(f"{options.preset}: {total:,} parameters in all, {active:,} active a token (without MTP)")
    print(f"cache: {latent:,} numbers a token; ordinary multi-head attention with the same heads "
          f"would keep {heads:,} ({heads / latent:.0f} times)")
    return 0
