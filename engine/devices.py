"""Several processes share each step, and perhaps the weights. The model knows nothing of it.

    rank_and_size, all_sum, gather ...   what processes tell each other; on one process, nothing
    shard, place                         spread a model: data parallel, FSDP, expert parallel
    processes                            starts or joins the processes of a command
"""
import contextlib
import datetime
import functools
import os
import subprocess

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
    """(number of this process, of all that share a step)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main():
    """Whether this process is the one that writes files and speaks."""
    return rank_and_size()[0] == 0


def share(items):
    """This process' part of what all hold: every so many-th of a list, or of a tensor's rows."""
    return items[slice(rank_and_size()[0], None, rank_and_size()[1])]


def gather(part):
    """The tensor of which each process holds its share(): its rows in their order, on all."""
    if (count := rank_and_size()[1]) == 1:
        return part
    parts = [None] * count
    dist.all_gather_object(parts, part.cpu())
    rows = part.new_empty(sum(map(len, parts)), *part.shape[1:])
    for i, some in enumerate(parts):
        rows[i::count] = some.to(rows.device)
    return rows


def all_sum(*parts, group=None):
    """Sums tensors over all processes or a group, in place, in one message. Returns the first."""
    if rank_and_size()[1] > 1:
        message = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(message, group=group)
        for part, sum_of in zip(parts, message.split([part.numel() for part in parts])):
            part.copy_(sum_of.view_as(part))
    return parts[0]


def any_process(flag=False):
    """Whether a flag is set in any process; all wait here for the last."""
    return bool(all_sum(torch.tensor(float(flag))))


@torch.no_grad()
def sum_gradients(model):
    """Sums gradients and experts' loads over the processes that hold the same, in one message each
    kind. (Not DistributedDataParallel: denominators are global, a step is several passes.)"""
    if rank_and_size()[1] == 1:
        return
    kinds = {dist.group.WORLD: [m.load for m in model.modules() if isinstance(m, Router)]}
    for p in model.parameters():
        if isinstance(p, DTensor) and "experts" not in p.device_mesh.mesh_dim_names:
            continue  # FSDP has summed it
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        group = p.device_mesh["replicas"].get_group() if isinstance(p, DTensor) else None
        kinds.setdefault(group or dist.group.WORLD, []).append(local(p.grad))
    for group, parts in kinds.items():
        if parts:  # a dense model has no loads
            all_sum(*parts, group=group)


@functools.cache
def expert_mesh(kind, experts):
    """A DeviceMesh (world / experts, experts): a row holds all experts, a column the same ones."""
    return dist.init_device_mesh(kind, (rank_and_size()[1] // experts, experts),
                                 mesh_dim_names=("replicas", "experts"))


def shard(model, device, mode="ddp", experts=1, recompute=False):
    """Spreads a model over the processes, in place; steps come out the same. ddp: each holds all
    weights. fsdp (FSDP2): a part, gathered in float32 when its block needs it. experts N > 1: N_r/N
    experts of a layer, whole; tokens travel. recompute: a layer keeps its input only."""
    model.layout, kept = (mode, experts, recompute), set()
    if recompute:  # loads are then counted twice, which moves a bias as once
        model.layers = nn.ModuleList(map(checkpoint_wrapper, model.layers))
    for module in (m for m in model.modules() if isinstance(m, Experts) and experts > 1):
        for name, p in list(module.named_parameters()):
            p = nn.Parameter(distribute_tensor(p.detach().to(device), expert_mesh(
                device.type, experts), (Replicate(), Shard(0)), src_data_rank=None))
            module.register_parameter(name, p)
            kept.add(p)
        module.__class__ = ParallelExperts
    modules = [*model.layers, *([model.mtp] if model.mtp else []), model]
    for module in modules if mode == "fsdp" else ():
        fully_shard(module, mesh=expert_mesh(device.type, 1)["replicas"], ignored_params=kept)
        module.set_gradient_divide_factor(1.0)  # sums: the denominators are global
        module.set_force_sum_reduction_for_comms(True)


def place(model, device, dtype=torch.float32, *layout):
    """The model on a device, spread by shard(); its weights stay float32, it computes in dtype."""
    model.compute_dtype = dtype
    if layout:
        shard(model, torch.device(device), *layout)
    return model.to(device)


def local(x):
    """What this process holds of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def full(x):
    """All of a tensor, on every process."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_like(x, like):
    """A whole tensor spread over the processes as another is, if they are of one shape."""
    if not isinstance(like, DTensor) or x.shape != like.shape:
        return x
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def layout_of(model):
    """How shard() has spread a model: its arguments, or nothing."""
    return getattr(model, "layout", ())


class ParallelExperts(Experts):
    """Experts of which each process holds some, whole: tokens travel to them."""

    def products(self, x_MC, counts_E):
        """Experts.products of rows sorted by expert, sent to where it lies and back; gradients
        too."""
        group = self.w2.device_mesh["experts"].get_group()
        arriving = torch.empty_like(counts_E)     # (processes * local experts,), by process
        dist.all_to_all_single(arriving, counts_E, group=group)
        sent, got = (n.view(group.size(), -1).sum(1).tolist() for n in (counts_E, arriving))
        counts = arriving.view(group.size(), -1)  # from whom, to which of our experts
        expert = torch.arange(counts.size(1), device=x_MC.device).repeat(group.size())
        order = expert.repeat_interleave(arriving).argsort(stable=True)
        rows = all_to_all(x_MC, got, sent, group)[order]
        y = grouped_swiglu(rows, counts.sum(0), local(self.w13), local(self.w2))
        return all_to_all(y[order.argsort()], sent, got, group)


@contextlib.contextmanager
def gathered_weights(model):
    """Within it FSDP's weights are whole everywhere, gathered once and not once a token. Yields
    what tells whether to write another token: with experts elsewhere, while any process does."""
    modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for m in modules:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    try:
        layout = layout_of(model)
        yield any_process if layout and layout[1] > 1 else bool
    finally:
        for m in modules:
            m.set_reshard_after_forward(m is not model, recurse=False)
            m.reshard()


def copy_model(model):
    """A copy of a model, spread as it is."""
    other = place(Transformer(model.config), model.device, model.compute_dtype,
                  *layout_of(model))
    other.load_state_dict(model.state_dict())
    return other.train(model.training)


@contextlib.contextmanager
def processes(device, count, command):
    """Joins torchrun's processes, or starts `count` of a command, this first. Yields its device."""
    env, rank, children, timeout = os.environ, 0, [], datetime.timedelta(minutes=30)
    if count == 1 and "WORLD_SIZE" not in env:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(env.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    try:
        if "WORLD_SIZE" in env:  # where the others are: torchrun says so in the environment
            store, rank, count = next(dist.rendezvous("env://", timeout=timeout))
        else:
            store = dist.TCPStore("127.0.0.1", 0, None, True, timeout, wait_for_workers=False)
            env = env | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
                         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
            for i in map(str, range(1, count)):
                children.append(subprocess.Popen(command, env=env | {"RANK": i, "LOCAL_RANK": i}))
        # torchrun's store outlives processes: started again, none may find where the dead were.
        if env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]:  # else machines count starts apart
            store = dist.PrefixStore(env.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=timeout, rank=rank, world_size=count, store=store)
        yield device
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in ("connection", "timed out", "peer")):
            raise
        raise UserError("another process of this run is gone, killed or out of memory; the same "
                        "command goes on from the last save") from None
    finally:
        expert_mesh.cache_clear()
        if dist.is_initialized():
            dist.destroy_process_group()
        for child in children:
            child.terminate()
            child.wait()
