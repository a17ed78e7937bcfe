"""export: a checkpoint as a Hugging Face folder of DeepSeek-V3; import: such a folder as one.

    python r1mini.py export CKPT DIR     config, weights, tokenizer with chat template
    python r1mini.py import DIR CKPT     the way back; also from what transformers itself wrote

views() alone maps the weights, both ways: for each published name it gives the place in our
weights where that tensor lies. NAMES maps the sizes. Ours differ in three things: w13 is gate and
up projection in one, experts are stacked, and MTP joins (hidden, embedding), V3 as released
(embedding, hidden). Rotary pairs lie as released: adjacent ("rope_interleave").

MTP is layer n_layers, as in V3, with copies of embedding and head. transformers looks for it in
models of 61 layers only; of others it says that these weights are unexpected, and leaves them.
"""
import dataclasses
import json
import math
import os
import re
import shutil
from pathlib import Path

import torch

import moe
import tasks
from engine.checkpoint import save
from engine.errors import UserError
from engine.tokenizer import PATTERN
from tools.cli import load_writer
from tools.settings import MAY_BE_ZERO, resolve, size_rules

# Of moe.Config, what the published config.json calls otherwise.
NAMES = {"dim": "hidden_size", "inter_dim": "intermediate_size",
         "moe_inter_dim": "moe_intermediate_size", "n_layers": "num_hidden_layers",
         "n_dense_layers": "first_k_dense_replace", "n_heads": "num_attention_heads",
         "n_activated_experts": "num_experts_per_tok", "n_expert_groups": "n_group",
         "n_limited_groups": "topk_group", "route_scale": "routed_scaling_factor",
         "n_mtp_layers": "num_nextn_predict_layers", "balance_alpha": "aux_loss_alpha",
         "norm_eps": "rms_norm_eps", "init_std": "initializer_range",
         "max_seq_len": "max_position_embeddings"}
# What only training needs, and may be missing.
OPTIONAL = ("n_outputs", "n_mtp_layers", "mtp_weight", "balance_alpha", "bias_speed", "init_std")

# What else config.json says, each with the one value that this model has; then what it may not say.
FIXED = {"model_type": "deepseek_v3", "hidden_act": "silu", "scoring_func": "sigmoid",
         "topk_method": "noaux_tc", "norm_topk_prob": True, "moe_layer_freq": 1,
         "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False,
         "rope_interleave": True, "rms_norm_eps": 1e-6}  # readers fix that of the latents' norms
ABSENT = {"rope_type": "default", "type": "default", "quantization_config": None}

# Parts of our weights' names, as published (DeepSeek's convert.py maps them so), in this order.
RENAMED = {"mtp.block": "layers.{}", "mtp.norm": "layers.{}.shared_head.norm",
           "mtp.proj": "layers.{}.eh_proj", "mtp.hidden_norm": "layers.{}.hnorm",
           "mtp.embed_norm": "layers.{}.enorm", "embed.": "embed_tokens.",
           "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
           "attn.": "self_attn.", "q_norm": "q_a_layernorm", "wq_a": "q_a_proj",
           "wq_b": "q_b_proj", "wq.": "q_proj.", "kv_norm": "kv_a_layernorm",
           "wkv_a": "kv_a_proj_with_mqa", "wkv_b": "kv_b_proj", "wo.": "o_proj.", "ffn.": "mlp.",
           "router.bias": "gate.e_score_correction_bias", "router": "gate",
           "shared.": "shared_experts.", "w2": "down_proj", "model.head": "lm_head"}

# encode_prompt's form, and dialogue's: what stands in a message, tags too, is shown as it is.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}{{ raise_exception('roles are user and assistant') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}")


# --------------------------------------------------------------------------------------------------
# Weights


def views(model):
    """{published name: the tensor's place in our weights}; to copy into it changes the model."""
    found = {}
    for name, weight in model.state_dict(prefix="model.").items():
        for ours, theirs in RENAMED.items():
            name = name.replace(ours, theirs.format(model.config.n_layers))
        parts = {name: weight}
        if "w13" in name:  # (.., 2I, C)
            parts = {name.replace("w13", half): part for half, part in zip(
                ("gate_proj", "up_proj"), weight.chunk(2, -2))}
        for name, part in parts.items():
            if ".experts." in name:  # (E, ., .)
                found |= {f"{name.replace('experts.', f'experts.{e}.')}.weight": one
                          for e, one in enumerate(part)}
            else:
                found[name] = part
    return found


def mtp_names(config):
    """The published names of MTP's projection, and of its {copy: original}."""
    layer = f"model.layers.{config.n_layers}"
    return f"{layer}.eh_proj.weight", {
        f"{layer}.embed_tokens.weight": "model.embed_tokens.weight",
        f"{layer}.shared_head.head.weight": "lm_head.weight"}


def swap(weight):
    """Exchanges the halves of a weight's columns: [hidden; embedding] and [embedding; hidden]."""
    return weight.roll(weight.size(1) // 2, 1)


def published(model):
    """{published name: tensor} of all weights."""
    tensors = views(model)
    if model.mtp is not None:
        projection, copies = mtp_names(model.config)
        tensors[projection] = swap(tensors[projection])
        tensors |= {copy: tensors[original].clone() for copy, original in copies.items()}
    return tensors


def fill(config, weights):
    """The model of published weights, a dict; UserError names one that does not fit."""
    projection, copies = mtp_names(config)
    copied = {original: weights.pop(copy, None) for copy, original in copies.items()}
    with torch.device("meta"):
        wanted = {name: x.shape for name, x in views(moe.Transformer(config)).items()}
    for name in [*wanted, *weights]:
        if name not in weights or name not in wanted:
            raise UserError(f"the weights {'lack' if name in wanted else 'have no place for'} "
                            f"{name}")
        if weights[name].shape != wanted[name]:
            raise UserError(f"{name} is {tuple(weights[name].shape)}, by config.json "
                            f"{tuple(wanted[name])}")
    for name, copy in copied.items():
        if copy is not None and not torch.equal(copy.float(), weights[name].float()):
            raise UserError(f"MTP has another {name} than the model: not supported")
    model = moe.Transformer(config)
    for name, place in views(model).items():
        place.copy_(swap(weights[name]) if name == projection else weights[name])
    return model


# --------------------------------------------------------------------------------------------------
# Sizes


def settings(config):
    """config.json of a moe.Config, a dict; UserError if the format has no place for it."""
    if config.norm_eps != FIXED["rms_norm_eps"]:
        raise UserError(f"model.norm_eps {config.norm_eps}: only {FIXED['rms_norm_eps']} can be "
                        "exported")
    found = {NAMES.get(key, key): value for key, value in dataclasses.asdict(config).items()
             if key != "n_outputs"}
    dense = config.n_dense_layers == config.n_layers  # then MTP's block is dense too
    return found | FIXED | {
        "architectures": ["DeepseekV3ForCausalLM"], "torch_dtype": "float32",
        "q_lora_rank": config.q_lora_rank or None, "num_key_value_heads": config.n_heads,
        "first_k_dense_replace": config.n_dense_layers + dense * config.n_mtp_layers}


def read_config(found, with_mtp):
    """The moe.Config of a config.json, a dict; UserError names a field that r1mini lacks."""
    for inner in (found.get("rope_scaling"), found.get("rope_parameters")):
        found = found | inner if isinstance(inner, dict) else found
    only = FIXED | ABSENT | {"num_key_value_heads": found.get("num_attention_heads")}
    for key, value in only.items():
        if found.get(key, value) != value:
            raise UserError(f"config.json: {key} {found[key]!r} is not supported, only {value!r}")
    values = {}
    for field in dataclasses.fields(moe.Config):
        key, kind = NAMES.get(field.name, field.name), type(field.default)
        if key not in found and field.name not in OPTIONAL:
            raise UserError(f"config.json lacks {key}")
        value = found.get(key, field.default)
        value = 0 if key == "q_lora_rank" and value is None else value
        least = int(kind is int and field.name not in MAY_BE_ZERO)
        if type(value) not in (int, kind) or not least <= value < math.inf:
            raise UserError(f"config.json: {key} {value!r} is not supported, only "
                            f"{'whole ' * (kind is int)}numbers from {least} up")
        values[field.name] = kind(value)
    dense, layers = values["n_dense_layers"], values["n_layers"]
    if with_mtp and dense == layers:
        raise UserError(f"config.json: first_k_dense_replace {dense} is not supported: MTP with "
                        "experts on a dense model")
    values |= {"n_outputs": 0, "n_mtp_layers": int(with_mtp), "n_dense_layers": min(dense, layers)}
    config = moe.Config(**values)
    for wrong, message in size_rules(config, "config.json"):
        if wrong:
            raise UserError(re.sub(r"\w+", lambda word: NAMES.get(word[0], word[0]), message))
    return config


# --------------------------------------------------------------------------------------------------
# Tokens


def tokenizer():
    """tokenizer.json of tasks.ENCODING, a dict: a byte-level BPE of the same ranks and pattern.

    The four tags are no "special" tokens, as in R1's: skip_special_tokens must leave them.
    """
    shown = [b for b in range(256) if chr(b).isprintable() and b != ord(" ")]  # GPT-2's alphabet
    letters = {b: chr(b) for b in shown} | {
        b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in shown)}

    def spell(token):
        return "".join(letters[b] for b in token)
    merges = [(token[:i], token[i:]) for token in tasks.RANKS for i in range(1, len(token))]
    added = [{"id": tasks.ENCODING.encode_single_token(tag), "content": tag, "single_word": False,
              "lstrip": False, "rstrip": False, "normalized": False, "special": "|" in tag}
             for tag in tasks.SPECIAL]
    return {
        "version": "1.0", "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated",
             "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False}]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                    "use_regex": False},
        "model": {"type": "BPE", "ignore_merges": True,  # a whole word is looked up first
                  "vocab": {spell(token): rank for token, rank in tasks.RANKS.items()},
                  "merges": [f"{spell(a)} {spell(b)}" for a, b in merges
                             if a in tasks.RANKS and b in tasks.RANKS]}}


def records(model, preset):
    """{name: dict} of the folder's JSON files; sampling as the checkpoint's preset evaluates."""
    run, config = resolve(preset, ()), model.config
    ids = {"bos_token_id": None, "eos_token_id": tasks.END_ID, "pad_token_id": tasks.PAD_ID}
    return {
        "config.json": settings(config) | ids | {"preset": preset},
        "generation_config.json": ids | {
            "do_sample": True, "temperature": run.eval.temperature, "top_p": run.eval.top_p,
            "top_k": 0, "max_new_tokens": run.zero.max_new_tokens},
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tasks.END,
            "pad_token": tasks.PAD, "padding_side": "left", "chat_template": TEMPLATE,
            "model_max_length": config.max_seq_len, "clean_up_tokenization_spaces": False}}


# --------------------------------------------------------------------------------------------------
# Folders


def safetensors():
    """The module safetensors.torch; UserError if it is not installed."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("export and import want safetensors: pip install '.[hf]'") from None
    return safetensors


def write(folder, model, preset="nano"):
    """Writes the folder whole or not at all: a temporary one beside it is renamed."""
    folder = Path(folder).resolve()
    files = {name: json.dumps(record, ensure_ascii=False, indent=2).encode()
             for name, record in records(model, preset).items()}
    files["model.safetensors"] = safetensors().torch.save(published(model), {"format": "pt"})
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name, content in files.items():
            with open(temporary / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read(folder):
    """(model, config.json as a dict) of a folder; UserError says what of it does not fit."""
    library, weights, path = safetensors(), {}, Path(folder) / "config.json"
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("wanted an object")
        for path in sorted(Path(folder).glob("model*.safetensors")):
            weights |= library.torch.load_file(path)
    except (ValueError, RecursionError, library.SafetensorError) as error:
        raise UserError(f"{path}: damaged ({error})") from None
    mtp = f"model.layers.{found.get('num_hidden_layers')}.eh_proj.weight"
    return fill(read_config(found, mtp in weights), weights), found


def main(options):
    """The commands export and import."""
    checkpoint, folder = Path(options.checkpoint), Path(options.folder)
    made = checkpoint if options.back else folder
    if made.is_file() or made.is_dir() and any(made.iterdir()):
        raise UserError(f"{made} is there already; choose another name")
    if options.back:
        model, found = read(folder)
        save(checkpoint, model, preset=str(found.get("preset", "nano")))
    else:
        model, record = load_writer(options)
        write(folder, model, record.get("preset", "nano"))
    print(f"{made}: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{'without' if model.mtp is None else 'with'} MTP")
    return 0
