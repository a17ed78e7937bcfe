"""export: writes a checkpoint as a Hugging Face folder of DeepSeek-V3. import: the way back.

    python r1mini.py export CKPT DIR     config, weights, and a tokenizer with chat template
    python r1mini.py import DIR CKPT     reads such a folder; also one that transformers wrote

    weights   _published_views() maps published names to places in our weights, for both directions
    sizes     CONFIG_NAMES maps the fields of moe.Config to those of config.json

Our weights differ from the published ones in three ways. w13 is gate and up projection in one
tensor. The experts of a layer are stacked. MTP's projection takes (hidden, embedding), while V3 as
released takes (embedding, hidden). Rotary pairs are adjacent in both ("rope_interleave").

MTP is layer n_layers, as in V3, with copies of embedding and head. transformers reads it in models
of 61 layers only. For other models it reports these weights as unexpected, and ignores them.
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
from tools.cli import load_from_arguments
from tools.settings import MAY_BE_ZERO, resolve_settings, size_rules

# {field of moe.Config: its name in the published config.json}. The other fields have one name.
CONFIG_NAMES = {
    "dim": "hidden_size", "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size", "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace", "n_heads": "num_attention_heads",
    "n_activated_experts": "num_experts_per_tok", "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group", "route_scale": "routed_scaling_factor",
    "n_mtp_layers": "num_nextn_predict_layers", "balance_alpha": "aux_loss_alpha",
    "norm_eps": "rms_norm_eps", "init_std": "initializer_range",
    "max_seq_len": "max_position_embeddings"}
# Fields that only training needs. config.json may lack them.
OPTIONAL = ("n_outputs", "n_mtp_layers", "mtp_weight", "balance_alpha", "bias_speed", "init_std")

# Fields of config.json that have one possible value, since this model has no other.
# rms_norm_eps: transformers uses this value for the norms of the latents, whatever the field says.
FIXED = {"model_type": "deepseek_v3", "hidden_act": "silu", "scoring_func": "sigmoid",
         "topk_method": "noaux_tc", "norm_topk_prob": True, "moe_layer_freq": 1,
         "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False,
         "rope_interleave": True, "rms_norm_eps": 1e-6}
# The same for fields that we read, but do not write.
FIXED_IF_PRESENT = {"rope_type": "default", "type": "default", "quantization_config": None}

# {part of our weights' names: its published form}, replaced in this order. DeepSeek's convert.py
# has the same names.
WEIGHT_NAMES = {
    "mtp.block": "layers.{}", "mtp.norm": "layers.{}.shared_head.norm",
    "mtp.proj": "layers.{}.eh_proj", "mtp.hidden_norm": "layers.{}.hnorm",
    "mtp.embed_norm": "layers.{}.enorm", "embed.": "embed_tokens.",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn.": "self_attn.", "q_norm": "q_a_layernorm", "wq_a": "q_a_proj",
    "wq_b": "q_b_proj", "wq.": "q_proj.", "kv_norm": "kv_a_layernorm",
    "wkv_a": "kv_a_proj_with_mqa", "wkv_b": "kv_b_proj", "wo.": "o_proj.", "ffn.": "mlp.",
    "router.bias": "gate.e_score_correction_bias", "router": "gate",
    "shared.": "shared_experts.", "w2": "down_proj", "model.head": "lm_head"}

# The chat template has the form of tasks.encode_prompt and tasks.dialogue. The text of a
# message cannot become a special token, except for the four tags in an answer. A tokenizer looks
# for special tokens before it normalizes the text. So the template puts GUARD behind each "<" that
# must stay text, and the normalizer of _tokenizer_json() removes it. GUARD is a code point that
# Unicode reserves for uses inside a program, so it is in no normal text.
GUARD = "\ufdd0"
TEMPLATE = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'user' %}<|user|>{{ content | replace('<', '<GUARD') }}"
    "{% elif message['role'] == 'assistant' %}"
    "<|assistant|>{{ content | replace('<|', '<GUARD|') }}<|end|>"
    "{% else %}{{ raise_exception('roles are user and assistant') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}").replace("GUARD", GUARD)


def main(options):
    """The commands export and import."""
    checkpoint, folder = Path(options.checkpoint), Path(options.folder)
    target = checkpoint if options.back else folder
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"{target} is there already; choose another name")
    if target.resolve() in (Path.cwd(), Path.home()):  # it is empty, and would be replaced
        raise UserError(f"{target} is the current folder, or your home folder: name a new folder, "
                        "such as r1-hf")
    if options.back:
        model, config_json = read_hf_folder(folder)
        save(checkpoint, model, preset=str(config_json.get("preset", "nano")))
    else:
        model, record = load_from_arguments(options)
        write_hf_folder(folder, model, record.get("preset", "nano"))
    count = sum(p.numel() for p in model.parameters())
    mtp = "without MTP" if model.mtp is None else "with MTP"
    print(f"{target}: {count:,} parameters, {mtp}")
    return 0


# --------------------------------------------------------------------------------------------------
# Weights


def _published_views(model):
    """{published name: the place of this tensor in our weights}. To copy into a place changes the
    model."""
    places = {}
    for our_name, weight in model.state_dict(prefix="model.").items():
        name = our_name
        for ours, theirs in WEIGHT_NAMES.items():
            name = name.replace(ours, theirs.format(model.config.n_layers))
        tensors = {name: weight}
        if "w13" in name:  # (.., 2I, C)
            gate, up = weight.chunk(2, -2)
            tensors = {name.replace("w13", "gate_proj"): gate,
                       name.replace("w13", "up_proj"): up}
        for stacked_name, tensor in tensors.items():
            if ".experts." not in stacked_name:
                places[stacked_name] = tensor
                continue
            for e, expert in enumerate(tensor):  # (E, ., .)
                places[f"{stacked_name.replace('experts.', f'experts.{e}.')}.weight"] = expert
    return places


def _mtp_names(config):
    """(published name of MTP's projection, {name of MTP's copy: name of the original})."""
    layer = f"model.layers.{config.n_layers}"
    return f"{layer}.eh_proj.weight", {
        f"{layer}.embed_tokens.weight": "model.embed_tokens.weight",
        f"{layer}.shared_head.head.weight": "lm_head.weight"}


def _swap_halves(weight):
    """Exchanges the halves of a weight's columns: [hidden; embedding] and [embedding; hidden]."""
    return weight.roll(weight.size(1) // 2, 1)


def _published_weights(model):
    """{published name: tensor} of a model."""
    weights = _published_views(model)
    if model.mtp is not None:
        projection, copies = _mtp_names(model.config)
        weights[projection] = _swap_halves(weights[projection])
        for copy, original in copies.items():
            weights[copy] = weights[original].clone()
    return weights


def _model_from(config, weights):
    """The model of {published name: tensor}. UserError names a weight that does not fit."""
    projection, copies = _mtp_names(config)
    copy_of = {original: weights.pop(copy, None) for copy, original in copies.items()}
    _check_weights(config, weights)
    for original, copy in copy_of.items():
        if copy is not None and not torch.equal(copy.float(), weights[original].float()):
            raise UserError(f"MTP has another {original} than the model: not supported")
    model = moe.Transformer(config)
    for name, place in _published_views(model).items():
        place.copy_(_swap_halves(weights[name]) if name == projection else weights[name])
    return model


def _check_weights(config, weights):
    """UserError if a published weight is missing, is not known or has another shape."""
    with torch.device("meta"):
        wanted = {name: x.shape for name, x in _published_views(moe.Transformer(config)).items()}
    for name in [*wanted, *weights]:
        if name not in weights:
            raise UserError(f"the weights lack {name}")
        if name not in wanted:
            raise UserError(f"the weights have no place for {name}")
        if weights[name].shape != wanted[name]:
            raise UserError(f"{name} is {tuple(weights[name].shape)}, by config.json "
                            f"{tuple(wanted[name])}")


# --------------------------------------------------------------------------------------------------
# Sizes


def _published_config(config):
    """config.json of a moe.Config, as a dict. UserError if the format cannot say it."""
    if config.norm_eps != FIXED["rms_norm_eps"]:
        raise UserError(f"model.norm_eps {config.norm_eps}: only {FIXED['rms_norm_eps']} can be "
                        "exported")
    fields = {CONFIG_NAMES.get(name, name): value
              for name, value in dataclasses.asdict(config).items() if name != "n_outputs"}
    dense_layers = config.n_dense_layers
    if dense_layers == config.n_layers:  # then MTP's block is dense too
        dense_layers += config.n_mtp_layers
    return fields | FIXED | {
        "architectures": ["DeepseekV3ForCausalLM"], "torch_dtype": "float32",
        "q_lora_rank": config.q_lora_rank or None, "num_key_value_heads": config.n_heads,
        "first_k_dense_replace": dense_layers}


def _config_from(published, with_mtp):
    """The moe.Config of a config.json, a dict. UserError names a field that does not fit."""
    for inner in (published.get("rope_scaling"), published.get("rope_parameters")):
        if isinstance(inner, dict):
            published = published | inner
    fixed = FIXED | FIXED_IF_PRESENT | {
        "num_key_value_heads": published.get("num_attention_heads")}
    for name, value in fixed.items():
        if published.get(name, value) != value:
            raise UserError(f"config.json: {name} {published[name]!r} is not supported, only "
                            f"{value!r}")
    sizes = {field.name: _read_size(published, field) for field in dataclasses.fields(moe.Config)}
    dense, layers = sizes["n_dense_layers"], sizes["n_layers"]
    if with_mtp and dense == layers:
        raise UserError(f"config.json: first_k_dense_replace {dense} is not supported: MTP with "
                        "experts on a dense model")
    sizes |= {"n_outputs": 0, "n_mtp_layers": int(with_mtp), "n_dense_layers": min(dense, layers)}
    config = moe.Config(**sizes)
    for wrong, message in size_rules(config, "config.json"):
        if wrong:
            raise UserError(re.sub(
                r"\w+", lambda word: CONFIG_NAMES.get(word[0], word[0]), message))
    return config


def _read_size(published, field):
    """The value of a field of moe.Config in a config.json. UserError if it is missing or wrong."""
    name, kind = CONFIG_NAMES.get(field.name, field.name), type(field.default)
    if name not in published and field.name not in OPTIONAL:
        raise UserError(f"config.json lacks {name}")
    value = published.get(name, field.default)
    if name == "q_lora_rank" and value is None:
        value = 0
    least = 1 if kind is int and field.name not in MAY_BE_ZERO else 0
    if type(value) not in (int, kind) or not least <= value < math.inf:
        numbers = "whole numbers" if kind is int else "numbers"
        raise UserError(f"config.json: {name} {value!r} is not supported, only {numbers} from "
                        f"{least} up")
    return kind(value)


# --------------------------------------------------------------------------------------------------
# Tokens


def _tokenizer_json():
    """tokenizer.json of tasks.ENCODING, as a dict: a byte-level BPE with its ranks and pattern.

    The four tags are not "special" tokens, as in R1's tokenizer: skip_special_tokens keeps them.
    """
    letters = _byte_letters()

    def spell(token):
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in tasks.RANKS:
        for i in range(1, len(token)):
            if token[:i] in tasks.RANKS and token[i:] in tasks.RANKS:
                merges.append(f"{spell(token[:i])} {spell(token[i:])}")
    added_tokens = [
        {"id": tasks.ENCODING.encode_single_token(tag), "content": tag, "single_word": False,
         "lstrip": False, "rstrip": False, "normalized": False, "special": "|" in tag}
        for tag in tasks.SPECIAL]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    return {
        "version": "1.0", "added_tokens": added_tokens,
        "normalizer": {"type": "Replace", "pattern": {"String": f"<{GUARD}"}, "content": "<"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated",
             "invert": False},
            byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "ignore_merges": True,  # a known word is one token, as in tiktoken
                  "vocab": {spell(token): rank for token, rank in tasks.RANKS.items()},
                  "merges": merges}}


def _byte_letters():
    """{byte: the letter for it in tokenizer.json}, GPT-2's alphabet: printable bytes stand for
    themselves, and the others are numbered from 256."""
    letters, others = {}, 0
    for byte in range(256):
        if chr(byte).isprintable() and byte != ord(" "):
            letters[byte] = chr(byte)
        else:
            letters[byte] = chr(256 + others)
            others += 1
    return letters


def _json_files(model, preset):
    """{file name: dict} of the folder. It samples as the checkpoint's preset evaluates."""
    run, config = resolve_settings(preset, ()), model.config
    ids = {"bos_token_id": None, "eos_token_id": tasks.END_ID, "pad_token_id": tasks.PAD_ID}
    return {
        "config.json": _published_config(config) | ids | {"preset": preset},
        "generation_config.json": ids | {
            "do_sample": True, "temperature": run.eval.temperature, "top_p": run.eval.top_p,
            "top_k": 0, "max_new_tokens": run.zero.max_new_tokens},
        "tokenizer.json": _tokenizer_json(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tasks.END,
            "pad_token": tasks.PAD, "padding_side": "left", "chat_template": TEMPLATE,
            "model_max_length": config.max_seq_len, "clean_up_tokenization_spaces": False}}


# --------------------------------------------------------------------------------------------------
# Folders


def _safetensors():
    """The package safetensors with its module torch. UserError if it is not installed."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("export and import need safetensors: pip install '.[hf]'") from None
    return safetensors


def write_hf_folder(folder, model, preset="nano"):
    """Writes a model as a folder. A temporary folder beside it is written and synced, then renamed,
    so the folder is complete or is not there."""
    folder = Path(folder).resolve()
    contents = {name: json.dumps(record, ensure_ascii=False, indent=2).encode()
                for name, record in _json_files(model, preset).items()}
    contents["model.safetensors"] = _safetensors().torch.save(
        _published_weights(model), {"format": "pt"})
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name, content in contents.items():
            with open(temporary / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_hf_folder(folder):
    """(model, config.json as a dict) of a folder. UserError says what in it does not fit."""
    library, weights, path = _safetensors(), {}, Path(folder) / "config.json"
    try:
        published = json.loads(path.read_text("utf-8"))
        if not isinstance(published, dict):
            raise ValueError("wanted an object")
        for path in sorted(Path(folder).glob("model*.safetensors")):
            weights |= library.torch.load_file(path)
    except (ValueError, RecursionError, library.SafetensorError) as error:
        raise UserError(f"{path}: damaged ({error})") from None
    mtp_projection = f"model.layers.{published.get('num_hidden_layers')}.eh_proj.weight"
    config = _config_from(published, with_mtp=mtp_projection in weights)
    if config.vocab_size == tasks.VOCAB_SIZE:
        _check_tokens(Path(folder) / "tokenizer.json")
    return _model_from(config, weights), published


def _check_tokens(path):
    """UserError if a tokenizer.json has other tokens than ours, or other ids for them. A folder
    without this file is taken to have ours."""
    if not path.exists():
        return
    try:
        tokens = _ids_by_token(json.loads(path.read_text("utf-8")))
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error})") from None
    if tokens != _ids_by_token(_tokenizer_json()):
        raise UserError(f"{path} has as many tokens as r1mini, but other ones: the model could "
                        "neither read nor write text here")


def _ids_by_token(tokenizer):
    """{token: id} of a tokenizer.json, a dict."""
    return tokenizer["model"]["vocab"] | {
        token["content"]: token["id"] for token in tokenizer["added_tokens"]}
