"""flops: counts floating-point operations (FLOPs). One function counts for the report, the studies,
bench, check and cost.

    what happens to a token                                     FLOPs
    "write"   it is sampled, with the cache                     2 N
    "read"    it is in a prompt, or the reference model or a
              teacher reads it                                  2 N
    "learn"   forward and backward                              6 N

N is the number of weights that a token meets in matrix products. A weight takes one multiplication
and one addition. The backward pass takes twice as many: for the gradients of input and weight.
The embedding is looked up and the norms are no products, so they do not count.

torch's own counter gives the same numbers on a real model (tests/test_flops.py). The convention:

- The products of queries with keys and of weights with values count only if `seen` is given.
- The head counts for each token. The code leaves it out where no token is predicted.
- Padding and evaluation do not count. Neither does what reward models read in RL.
- The optimizer does not count. Muon's own products, which RL does not have, would add about a tenth
  to a supervised step of nano.
"""
import dataclasses
import functools

import torch

import moe

PASSES = {"write": 1, "read": 1, "learn": 3}  # forward; or forward and backward, which takes two

FLOPS_NOTE = (
    "FLOPs are counted by tools/flops.py. N is the number of weights that a token meets in matrix "
    "products, and n the number of tokens. A supervised stage takes 6 N n, and its N includes MTP. "
    "RL does not train MTP. It takes 2 N n to sample, where n includes each prompt once. It takes "
    "6 N n to learn and 2 N n for the reference model, where n counts the live groups, and all "
    "groups of a minibatch in which none is live. With beta 0 there is no reference model. "
    "Distillation by logits takes 2 N n more, with the teacher's N. "
    "The samples that a stage learns from take 2 N n. Attention between tokens, the optimizer and "
    "evaluation are not counted. A TFLOP is 10^12 FLOPs.")


def flops_per_token(config, work, mtp=False, seen=0):
    """FLOPs of one token.

    work: a key of PASSES. mtp: whether multi-token prediction runs too. seen: the mean number of
    tokens that a token attends to, itself included; with 0, attention between tokens is left out.
    """
    weights = _weights_in_products(config, mtp)
    attention = seen * _products_per_seen_token(config, mtp, absorbed=work == "write")
    return 2 * PASSES[work] * (weights + attention)


@functools.cache
def _weights_in_products(config, mtp):
    """N of one token. It is counted on the meta device, which takes no memory."""
    with torch.device("meta"):
        model = moe.Transformer(config)
    with_mtp = mtp and config.n_mtp_layers > 0
    N = 0
    for name, weight in model.named_parameters():
        if weight.dim() == 1 or name == "embed.weight":  # norms; the embedding is looked up
            continue
        if name.startswith("mtp.") and not with_mtp:
            continue
        count = weight.numel()
        if ".experts." in name:  # (E, ., .), of which a token uses K
            count = config.n_activated_experts * weight[0].numel()
        if name == "head.weight" and with_mtp:
            count = 2 * count  # MTP uses the head once more
        N += count
    return N


def _products_per_seen_token(config, mtp, absorbed):
    """Multiplications of a query with one token that it sees, and of that token's value, in all
    layers. absorbed: the form for sampling, in which all heads attend to the cached latents."""
    if absorbed:
        widths = config.kv_lora_rank + config.qk_rope_head_dim + config.kv_lora_rank
    else:
        widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    layers = config.n_layers + (config.n_mtp_layers if mtp else 0)
    return layers * config.n_heads * widths


def flops_by_stage(log):
    """{stage: 10^12 FLOPs} of the log of a run. collect_STAGE is the cost of the samples that a
    stage learns from."""
    flops = {}
    for record in log:
        if "tokens" not in record:
            continue
        stage = record["kind"]
        if stage == "collected":
            stage = f"collect_{record['stage']}"
        flops[stage] = flops.get(stage, 0.0) + _flops_of_record(record, log[0]) / 1e12
    return flops


def _flops_of_record(record, settings):
    """FLOPs of one step, or of the samples that were collected for a stage."""
    stage, tokens = record["kind"], record["tokens"]
    teacher, student = (moe.Config(**settings[name]) for name in ("model", "student"))
    config = student if stage.startswith(("student", "distill")) else teacher
    if stage in ("helpful", "safe"):  # reward models have a head of one output
        config = dataclasses.replace(config, n_outputs=1, n_mtp_layers=0)
    write, read, learn = (flops_per_token(config, work) for work in ("write", "read", "learn"))

    if stage == "collected":
        # All answers to a problem share its prompt, which is read once.
        prompts = record.get("prompt_tokens", 0) / settings["data"]["tries"]
        return write * tokens + read * prompts
    if "learnt_tokens" in record:  # RL
        s = settings[stage if stage in settings else "student_rl"]
        prompts = record["prompt_tokens"] / s["group_size"]
        reference = read if s["beta"] else 0
        sampling = write * tokens + read * prompts
        return sampling + (learn + reference) * record["learnt_tokens"]
    if stage == "distill_logits":
        return (learn + flops_per_token(teacher, "read")) * tokens
    trains_mtp = config.mtp_weight > 0
    return flops_per_token(config, "learn", mtp=trains_mtp) * tokens
