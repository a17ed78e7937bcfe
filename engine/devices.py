"""Several processes share each step, and perhaps the weights. The model does not know.

    rank_and_size, share, gather, all_sum ...  what processes tell each other
    shard, place, copy_model                   spread a model: data parallel, FSDP, expert parallel
    ParallelExperts                            experts on several processes: tokens travel to them
    processes                                  starts or joins the processes of a command

On one process all of these do nothing, so the callers need not ask how many there are.
"""
import contextlib
import datetime
import functools
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single_autograd as all_to_all
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from engine.errors import UserError
from moe import Experts, Router, Transformer, grouped_swiglu


def rank_and_size():
    """(number of this process, number of all processes that share a step)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main():
    """Whether this process is the one that writes files and prints."""
    return rank_and_size()[0] == 0


def process_share(items):
    """This process' part of a list, or of a tensor's rows, that all processes hold: with four
    processes, every fourth."""
    rank, processes = rank_and_size()
    return items[rank::processes]


def gather_from_processes(part):
    """Undoes process_share(): every process gets the whole tensor from the parts of all."""
    rank, count = rank_and_size()
    if count == 1:
        return part
    lengths = torch.zeros(count, dtype=torch.int64)
    lengths[rank] = len(part)
    all_sum(lengths)
    # The parts differ by one row. They travel as bytes, since gloo does not know every dtype.
    padded = part.new_zeros(int(lengths.max()), *part.shape[1:])
    padded[:len(part)] = part
    padded_parts = [torch.empty_like(padded) for _ in range(count)]
    dist.all_gather([_as_bytes(x) for x in padded_parts], _as_bytes(padded))
    rows = part.new_empty(int(lengths.sum()), *part.shape[1:])
    for other, (length, padded_part) in enumerate(zip(lengths.tolist(), padded_parts)):
        rows[other::count] = padded_part[:length]
    return rows


def _as_bytes(x):
    """The bytes of a contiguous tensor, which share its memory."""
    return x.flatten().view(torch.uint8)


def all_sum(*parts, group=None):
    """Sums tensors over all processes, or over a group of them, in place and in one message.
    Returns the first tensor."""
    if rank_and_size()[1] > 1:
        message = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(message, group=group)
        sums = message.split([part.numel() for part in parts])
        for part, part_sum in zip(parts, sums):
            part.copy_(part_sum.view_as(part))
    return parts[0]


def any_process(flag=False):
    """Whether the flag is set in any process. All processes wait here for the last one."""
    return bool(all_sum(torch.tensor(float(flag))))


@torch.no_grad()
def sum_gradients(model):
    """Sums gradients and experts' loads over the processes that hold the same weights.

    DistributedDataParallel would not do: it takes means, but our denominators count the global
    batch; and it wants one backward pass a step, but we make several.
    """
    if rank_and_size()[1] == 1:
        return
    loads = [module.load for module in model.modules() if isinstance(module, Router)]
    tensors_of_group = {dist.group.WORLD: loads}
    for p in model.parameters():
        if isinstance(p, DTensor) and "experts" not in p.device_mesh.mesh_dim_names:
            continue  # FSDP has summed it
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        group = dist.group.WORLD
        if isinstance(p, DTensor):  # an expert, of which not all processes have a copy
            group = p.device_mesh["replicas"].get_group()
        tensors_of_group.setdefault(group, []).append(local_tensor(p.grad))
    for group, tensors in tensors_of_group.items():
        if tensors:  # a dense model has no loads
            all_sum(*tensors, group=group)


@functools.cache
def _expert_mesh(kind, experts):
    """A DeviceMesh (processes / experts, experts). The processes of a row hold all experts
    together; those of a column hold the same ones."""
    return dist.init_device_mesh(kind, (rank_and_size()[1] // experts, experts),
                                 mesh_dim_names=("replicas", "experts"))


def shard(model, device, mode="ddp", experts=1, recompute=False):
    """Spreads a model over the processes, in place. Steps come out the same, but for rounding.

    mode: with ddp each process holds all weights; with fsdp (FSDP2) it holds a part of each, and
    gathers a block's weights, in float32, when the block needs them. experts: so many processes
    share the experts of a layer; each holds some of them, whole. recompute: a block keeps only its
    input and computes the rest again in the backward pass.
    """
    model.layout = mode, experts, recompute
    if recompute:  # loads are then counted twice; the sign that moves the bias stays the same
        model.layers = nn.ModuleList(map(checkpoint_wrapper, model.layers))
    expert_weights = set()
    if experts > 1:
        mesh = _expert_mesh(device.type, experts)
        for module in [m for m in model.modules() if isinstance(m, Experts)]:
            for name, p in list(module.named_parameters()):
                spread = distribute_tensor(p.detach().to(device), mesh, (Replicate(), Shard(0)),
                                           src_data_rank=None)
                module.register_parameter(name, nn.Parameter(spread))
            expert_weights.update(module.parameters())
            module.__class__ = ParallelExperts
    if mode == "fsdp":
        mesh = _expert_mesh(device.type, 1)["replicas"]
        for module in [*model.layers, *([model.mtp] if model.mtp else []), model]:
            fully_shard(module, mesh=mesh, ignored_params=expert_weights)
            # Gradients are summed, not averaged: the denominators count the global batch.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def place_model(model, device, dtype=torch.float32, *layout):
    """The model on a device, spread by shard() if a layout is given. Its weights stay float32; it
    computes products in dtype."""
    model.compute_dtype = dtype
    if layout:
        shard(model, torch.device(device), *layout)
    return model.to(device)


def local_tensor(x):
    """The part of a tensor that this process holds."""
    return x.to_local() if isinstance(x, DTensor) else x


def full_tensor(x):
    """The whole tensor, on every process."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_like(x, like):
    """A whole tensor, spread over the processes like another one if both have the same shape."""
    if not isinstance(like, DTensor) or x.shape != like.shape:
        return x
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def _layout_of(model):
    """The (mode, experts, recompute) with which shard() spread a model; () if it did not."""
    return getattr(model, "layout", ())


class ParallelExperts(Experts):
    """Experts that are spread over processes: each process holds some of them, whole."""

    def products(self, x_MC, counts_E):
        """Experts.products of sorted rows. Each row travels to the process of its expert, and its
        result travels back. Gradients take the same way."""
        group = self.w2.device_mesh["experts"].get_group()
        processes = group.size()
        arriving = torch.empty_like(counts_E)  # rows from each process for each local expert
        dist.all_to_all_single(arriving, counts_E, group=group)
        rows_sent = counts_E.view(processes, -1).sum(1).tolist()
        rows_arriving = arriving.view(processes, -1).sum(1).tolist()
        x_MC = all_to_all(x_MC, rows_arriving, rows_sent, group)

        # They arrive sorted by process, then by expert. The product wants them by expert alone.
        arriving_by_process = arriving.view(processes, -1)
        local_experts = torch.arange(arriving_by_process.size(1), device=x_MC.device)
        expert_M = local_experts.repeat(processes).repeat_interleave(arriving)
        order = expert_M.argsort(stable=True)
        y_MC = grouped_swiglu(x_MC[order], arriving_by_process.sum(0), local_tensor(self.w13),
                              local_tensor(self.w2))
        return all_to_all(y_MC[order.argsort()], rows_sent, rows_arriving, group)


@contextlib.contextmanager
def gathered_weights(model):
    """A context for sampling. FSDP's weights are gathered once, and not again for each token.

    Yields a function that says whether to write another token, given whether this process wants
    one. With experts on several processes, all go on while one of them does.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    layout = _layout_of(model)
    tokens_travel = bool(layout) and layout[1] > 1
    try:
        yield any_process if tokens_travel else bool
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()


def copy_model(model):
    """A copy of a model, spread like it."""
    other = place_model(Transformer(model.config), model.device, model.compute_dtype,
                  *_layout_of(model))
    other.load_state_dict(model.state_dict())
    return other.train(model.training)


# ------------------------------------------------------------------------------
# Processes

STORE = "R1MINI_STORE"  # names the file in which local processes meet, to those that are started
LOOPBACK = ("lo", "lo0")  # the interface that only this machine reaches, on Linux and on a Mac


@contextlib.contextmanager
def loopback_only():
    """A context in which gloo and NCCL listen on the loopback interface alone. Where there is none
    of these names (Windows), they choose."""
    names = [name for _, name in socket.if_nameindex() if name in LOOPBACK]
    settings = {"GLOO_SOCKET_IFNAME": names[0], "NCCL_SOCKET_IFNAME": names[0]} if names else {}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def _end_with_parent():
    """Ends this process when the one that started it ends. That one holds the other end of our
    standard input and writes nothing."""
    def wait():
        os.read(0, 1)
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _local_store(count, command):
    """A store for `count` processes of a command, of which this one is the first. Starts the
    others, and ends them.

    They meet in a file of a folder that other users cannot read. So no port is opened that others
    could write to, and nothing that arrives is unpickled.
    """
    folder, children = Path(tempfile.mkdtemp(prefix="r1mini-")), []  # its mode is 0700
    path = str(folder / "store")
    env = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), STORE: path}
    try:
        with loopback_only():
            for i in map(str, range(1, count)):
                env_of_child = os.environ | env | {"RANK": i, "LOCAL_RANK": i}
                children.append(subprocess.Popen(command, env=env_of_child,
                                                 stdin=subprocess.PIPE))
            _wait_for(children, folder)
            yield dist.FileStore(path, count)
    finally:
        for child in children:
            child.kill()  # it writes no files
            child.wait()
            child.stdin.close()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(children, folder):
    """Waits until each child has left its mark in the folder. UserError if one ends before: torch
    would wait for it for half an hour."""
    while len(list(folder.glob("joined-*"))) < len(children):
        for child in children:
            if child.poll() is not None:
                raise UserError("another process of this run ended at its start, with exit code "
                                f"{child.returncode}: give --processes 1, which needs no other")
        time.sleep(0.02)


def _store_of_environment(timeout):
    """(store, rank, number of processes) of a process that torchrun or _local_store() started."""
    env = os.environ
    if STORE in env:
        _end_with_parent()
        Path(env[STORE]).with_name(f"joined-{env['RANK']}").touch()
        count = int(env["WORLD_SIZE"])
        return dist.FileStore(env[STORE], count), int(env["RANK"]), count
    # torchrun says in the environment where the others are.
    store, rank, count = next(dist.rendezvous("env://", timeout=timeout))
    # Its store outlives the processes. When it starts them again, none may find the addresses of
    # the dead. (Several machines count their restarts apart, so not there.)
    if env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]:
        store = dist.PrefixStore(env.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    return store, rank, count


@contextlib.contextmanager
def processes(device, count, command):
    """Joins the processes that torchrun started, or starts `count` processes of a command, of which
    this one is the first. Yields the device of this process.
    """
    timeout = datetime.timedelta(minutes=30)
    if count == 1 and "WORLD_SIZE" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    with contextlib.ExitStack() as stack:
        try:
            if "WORLD_SIZE" in os.environ:
                store, rank, count = _store_of_environment(timeout)
            else:
                store, rank = stack.enter_context(_local_store(count, command)), 0
            store.set_timeout(timeout)
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                    timeout=timeout, rank=rank, world_size=count, store=store)
            yield device
        except RuntimeError as error:
            words = ("connection", "timed out", "timeout", "peer")
            if not any(word in str(error).lower() for word in words):
                raise
            raise UserError("another process of this run is gone: it was killed, or had no memory. "
                            "The same command (without --fresh) goes on from the last "
                            "save") from None
        finally:
            _expert_mesh.cache_clear()
            if dist.is_initialized():
                dist.destroy_process_group()
