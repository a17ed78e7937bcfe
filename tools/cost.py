"""cost: the parameters of a preset, the size of its cache, and the bytes that decoding reads.

    python r1mini.py cost --preset v3

The parameters are counted on the meta device, which takes no memory. With --gpus, studies/hours.py
adds what training takes.

A step of decoding writes one token for each of B answers. It reads each weight that one of these
tokens needs once. A token uses K of E experts. If all experts are equally likely, one token leaves
an expert idle with probability 1 - K/E, and B independent tokens do so with (1 - K/E)^B:

    experts touched     E (1 - (1 - K/E)^B) in each layer
    bytes of a token    2 (weights of the other parts + experts touched x weights of one) / B

A weight in bfloat16 has 2 bytes. Of the embedding only B rows are read, which we leave out. A limit
on groups changes nothing, since each expert stays equally likely. Uneven loads touch fewer experts.
"""
import dataclasses
from collections import Counter

import torch

import moe
from engine.errors import UserError
from r1mini import PRESETS
from tools.tables import table

BATCHES = (1, 4, 16, 64, 256, 1024, 4096)  # answers that are written at once
BYTES = 2                                  # of a weight in bfloat16

# {part of the model: a piece of its parameters' names}. The first piece that a name contains
# decides. A name that contains none is a norm's.
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
    if config.n_dense_layers < config.n_layers:
        print("\n".join(["", *_decoding_table(config)]))
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


def _experts_touched(config, batch):
    """The mean number of experts of a layer that at least one of `batch` tokens uses."""
    E, K = config.n_routed_experts, config.n_activated_experts
    return E * (1 - (1 - K / E) ** batch)


def _bytes_read(config, batch):
    """The bytes of weights that decoding reads for each token, if it writes `batch` answers at
    once."""
    total, _ = count_parts(config, mtp=False)
    share = _experts_touched(config, batch) / config.n_routed_experts
    others = total.total() - total["embedding"] - total["routed experts"]
    return BYTES * (others + share * total["routed experts"]) / batch


def _decoding_table(config):
    """The lines about decoding: what a mixture and two dense models read, by batch."""
    total, active = count_parts(config, mtp=False)
    dense = [BYTES * (count.total() - count["embedding"]) for count in (active, total)]
    E, K = config.n_routed_experts, config.n_activated_experts
    body = []
    for batch in BATCHES:
        row = [f"{batch:,}", f"{_experts_touched(config, batch):.1f} of {E}",
               f"{batch * K / E:.2f}"]
        for n_bytes in (_bytes_read(config, batch), *(size / batch for size in dense)):
            row.append(f"{n_bytes / 1e6:,.0f}" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.3g}")
        body.append(row)
    return ["decoding in bfloat16: weights read for each token, by answers written at once", "",
            *table(["batch", "experts touched in a layer", "tokens of an expert",
                    "MB a token", "dense, as many active", "dense, as many in all"], body), "",
            "With one answer, a mixture reads only the experts of one token. With more answers, it",
            "soon reads all experts, and few tokens share each. In a dense model, all tokens share",
            "every weight. For as many tokens to share an expert, a mixture needs about",
            f"{E / K:.0f} times as many answers at once.",
            "The cache is read on top: "
            f"{BYTES * config.n_layers * (config.kv_lora_rank + config.qk_rope_head_dim):,} "
            "bytes for each token of the context."]
