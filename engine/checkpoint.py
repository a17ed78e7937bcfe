"""Checkpoints: written whole or not at all, and without a trace of how processes share weights."""
import os
from dataclasses import asdict

import torch
from torch import nn
from torch.utils._pytree import tree_map

from engine.devices import full, is_main, place, shard_like
from engine.errors import UserError
from moe import Config, Transformer

FORMAT = 1


def save(path, model, **extra):
    """Writes a checkpoint whole or not at all: a temporary file, synced, is renamed to `path`. All
    processes call it, one writes; no trace of how they share the weights is left."""
    record = extra | {"format": FORMAT, "config": asdict(model.config),
                      "model": dict(model.state_dict())}
    record = tree_map(lambda x: full(x).cpu() if full(x) is not x else x, record)
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
    """(model, all else that was saved) of a checkpoint, or UserError. Executes nothing in it."""
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
        if (found := record.pop("format")) != FORMAT:
            raise ValueError(f"format {found}, wanted {FORMAT}")
        model = Transformer(Config(**record.pop("config")))
        model.load_state_dict(record.pop("model"))
    except Exception as error:  # torch.load meets damage with errors of a dozen types
        if isinstance(error, OSError) and error.filename:
            raise               # no such file, or not ours to read
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:60]
        raise UserError(f"{path}: damaged, or not a checkpoint of r1mini: replace or delete it "
                        f"[{reason}]") from None
    return place(model, device, dtype, *layout), record


def restore(target, saved):
    """Loads a saved state into a model or an optimizer, however spread."""
    if isinstance(target, nn.Module):
        like = target.state_dict()
        target.load_state_dict({name: shard_like(x, like[name]) for name, x in saved.items()})
        return
    like = [p for group in target.param_groups for p in group["params"]]
    groups = [old | {key: new[key] for key in new.keys() & {"fused"}}  # that hangs on the layout
              for old, new in zip(saved["param_groups"], target.param_groups)]
    target.load_state_dict(saved | {"param_groups": groups, "state": {
        i: {name: shard_like(x, like[i]) for name, x in of.items()}
        for i, of in saved["state"].items()}})
