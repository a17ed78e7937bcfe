"""Checkpoints. A file is written whole or not at all, and does not depend on how many processes
share the weights.

Each has a fingerprint of the tokenizer, since a model's numbers mean nothing without it.
"""
import hashlib
import os
from dataclasses import asdict

import torch
from torch import nn
from torch.utils._pytree import tree_map

import tasks
from engine.devices import full_tensor, is_main, place_model, shard_like
from engine.errors import UserError, is_out_of_memory
from moe import Config, Transformer

FORMAT = 1


def _vocabulary():
    """A fingerprint of the tokenizer: of each token and its id."""
    tokens = sorted(tasks.RANKS.items()), tasks.SPECIAL
    return hashlib.sha256(repr(tokens).encode()).hexdigest()


def check_vocabulary(path, config):
    """UserError if a checkpoint's model, of this config, has more or fewer tokens than ours."""
    if config.vocab_size != tasks.VOCAB_SIZE:  # it was imported, or the tokenizer has changed
        raise UserError(f"{path} has a vocabulary of {config.vocab_size}; r1mini's has "
                        f"{tasks.VOCAB_SIZE}, so it can write no text")


def save(path, model, **extra):
    """Writes a model, and whatever else is given, to a checkpoint.

    A temporary file is written and synced, then renamed to `path`. All processes call this; one
    writes.
    """
    record = extra | {"format": FORMAT, "config": asdict(model.config),
                      "model": dict(model.state_dict())}
    if model.config.vocab_size == tasks.VOCAB_SIZE:  # other models are imported ones
        record["vocabulary"] = _vocabulary()
    record = tree_map(lambda x: x if full_tensor(x) is x else full_tensor(x).cpu(), record)
    if not is_main():
        return
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(record, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def load(path, device="cpu", dtype=torch.float32, *layout):
    """(model, all else that was saved) of a checkpoint. UserError if it is none, or if its tokens
    are not ours. Nothing in the file is executed. device, dtype and layout are those of
    devices.place_model()."""
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
        if (found := record.pop("format")) != FORMAT:
            raise ValueError(f"format {found}, wanted {FORMAT}")
        fingerprint = record.pop("vocabulary", None)  # older checkpoints have none
        model = Transformer(Config(**record.pop("config")))
        model.load_state_dict(record.pop("model"))
    except Exception as error:  # torch.load meets damage with a dozen types of errors
        if isinstance(error, OSError) and error.filename:
            raise               # there is no such file, or we may not read it
        if is_out_of_memory(error):
            raise UserError(f"{path}: out of memory while it was loaded; the file stays as it is. "
                            "End other programs, or use a machine with more memory") from None
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:60]
        raise UserError(f"{path}: damaged, or not a checkpoint of r1mini: replace or delete it "
                        f"[{reason}]") from None
    if fingerprint not in (None, _vocabulary()):
        raise UserError(f"{path} has another vocabulary: its numbers stand for other tokens than "
                        "those of tasks.py. Use the version of r1mini that made it, or train again")
    return place_model(model, device, dtype, *layout), record


def restore_all(targets, saved):
    """restore() of each model or optimizer with its saved state."""
    for target, state in zip(targets, saved, strict=True):
        restore(target, state)


def restore(target, saved):
    """Loads a saved state into a model or an optimizer, however its tensors are spread."""
    if isinstance(target, nn.Module):
        now = target.state_dict()
        target.load_state_dict({name: shard_like(x, now[name]) for name, x in saved.items()})
        return
    parameters = [p for group in target.param_groups for p in group["params"]]
    states = {}
    for i, tensors in saved["state"].items():
        states[i] = {name: shard_like(x, parameters[i]) for name, x in tensors.items()}
    groups = []
    for old, now in zip(saved["param_groups"], target.param_groups):
        # Whether AdamW is fused depends on the layout of today, not on the one that was saved.
        groups.append(old | {key: now[key] for key in now if key == "fused"})
    target.load_state_dict(saved | {"param_groups": groups, "state": states})
