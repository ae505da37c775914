"""One process or many: starting them, sharding a model over them, filling it, and gathering what they computed."""

import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from grr.bf16 import compute_in_bf16, held_in_bf16
from grr.components import Block

T = TypeVar("T")
METHODS = ("embed", "encode_image", "encode_text", "image_context", "from_context", "next_token_logits")  # of a CoCa


def start() -> torch.device:
    """Join the process group that torchrun describes, or make one of a single process; gives this process's device.

    CUDA with NCCL where there is a GPU, else the CPU with gloo. A group of one runs the same code as many.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return device


def shard(model: nn.Module, device: torch.device, *, bf16: bool = False, replicas: int = 1) -> None:
    """Shard every block, then the rest, over all processes with FSDP2; bf16 computes in bfloat16, reduces in float32.

    With replicas > 1 the processes form that many groups which each hold a whole model (HSDP): best one a machine.
    A process alone has nothing to gather, and keeps plain parameters: the same function, and far fewer calls.
    Raises ValueError if the number of processes is not a multiple of replicas.
    """
    world = dist.get_world_size()
    if world % replicas:
        raise ValueError(f"shard: the number of processes must be a multiple of replicas, got {world=}, {replicas=}")
    if world == 1:
        if bf16:
            compute_in_bf16(model, METHODS)
        return
    if replicas > 1:
        mesh = init_device_mesh(device.type, (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    shard_over(model, mesh, bf16=bf16)


def shard_over(model: nn.Module, mesh: DeviceMesh, *, bf16: bool = False) -> None:
    """Shard every block, then the rest, over the last dimension of a mesh, even if that is one process."""
    compute, exact = (torch.bfloat16, torch.float32) if bf16 else (None, None)
    for block in blocks(model) if mesh.size(-1) > 1 else ():  # what is not sharded need not be gathered bit by bit
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(compute, exact))
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(compute, exact, output_dtype=exact))
    for name in METHODS:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)


def materialize(model: nn.Module, device: torch.device, *, seed: int) -> None:
    """Give memory to a model built on the meta device, sharded or not, and draw its initial weights.

    The weights of a module depend on the seed and on its name alone: not on the number of processes, nor on the order
    in which a model is built. Each module draws its own, whole, on the CPU (`reset_parameters`, as torch's modules
    have it), and keeps its shard; no process ever holds more than the largest module in full.
    Raises ValueError naming the modules that hold parameters or buffers and have no reset_parameters.
    """
    owners = [(name, m) for name, m in model.named_modules() if m._parameters or m._buffers]
    stuck = [f"{name} ({type(m).__name__})" for name, m in owners if not hasattr(m, "reset_parameters")]
    if stuck:
        raise ValueError(f"materialize: these modules hold parameters or buffers but cannot fill them: "
                         f"{', '.join(stuck)}; give them a reset_parameters() method")  # fmt: skip
    first: dict[int, tuple[nn.Module, str]] = {}  # where a parameter stands first, and where it stands again
    again: list[tuple[nn.Module, str, nn.Module, str]] = []
    for _, module in owners:
        for key, parameter in module._parameters.items():
            if parameter is not None and first.setdefault(id(parameter), (module, key)) != (module, key):
                again.append((module, key, *first[id(parameter)]))
    model.to_empty(device=device)
    for module, key, other, other_key in again:
        module._parameters[key] = other._parameters[other_key]
    for name, module in owners:
        _draw(module, reset_seed(seed, name))


def reset_seed(*parts: int | str) -> int:
    """A seed of 63 bits out of any numbers and names: well mixed, the same on every machine."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def blocks(model: nn.Module) -> Iterator[Block]:
    """All transformer blocks of a model, in order."""
    return (module for module in model.modules() if isinstance(module, Block))


def checkpoint_activations(model: nn.Module) -> None:
    """Keep only what enters each block, and compute the rest again for its gradient. After compiling and `shard`."""
    for block in blocks(model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


def compile_blocks(model: nn.Module) -> None:
    """Compile each block; blocks of one shape share the compiled code. Before `shard`.

    There are about 20 versions of it: of three kinds of block, of one length and of any, in training, without
    gradients, in evaluation, and writing. Past torch's limit of 8, the others would run uncompiled with one warning.
    """
    torch._dynamo.config.recompile_limit = 64
    for block in blocks(model):
        block.forward = torch.compile(block.forward)  # type: ignore[method-assign]


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Hold the whole model in every process, so that each may call it any number of times, e.g. to write captions."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        with held_in_bf16(model):
            yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


def clip_gradients(model: nn.Module, largest: float) -> float:
    """Scale the gradients down to this norm, taken over all parameters of all processes; gives the norm before."""
    norm = clip_grad_norm_(model.parameters(), largest)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def local(x: Tensor) -> Tensor:
    """What this process holds of a tensor: its shard, or all of a plain one."""
    return x.to_local() if isinstance(x, DTensor) else x


def gather(x: Tensor) -> Tensor:
    """Concatenate the rows of all processes, in their order: [b, ...] -> [world b, ...]. Equal b everywhere.

    Its gradient is the sum of all processes' gradients for one's own rows. So a loss that every process computes on
    gathered rows has, after FSDP's mean over processes, the gradient of that loss in a single process.
    """
    return x if dist.get_world_size() == 1 else _Gather.apply(x)  # type: ignore[no-untyped-call]


def all_sum(*numbers: float) -> list[float]:
    """The sums of some numbers over all processes."""
    if dist.get_world_size() == 1:
        return [float(number) for number in numbers]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def all_max(*numbers: int) -> int:
    """The largest of some integers of all processes."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return max(numbers)
    largest = torch.tensor(max(numbers), device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest.item())


def on_rank_0(act: Callable[[], T]) -> T:
    """Run act on rank 0 alone; when it is done, every rank has its result, or raises its error."""
    if not dist.is_initialized():
        return act()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = act()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


@torch.no_grad()
def _draw(module: nn.Module, seed: int) -> None:
    own = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
    whole = {key: nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for key, p in own.items()}
    module._parameters.update(whole)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module.reset_parameters()  # type: ignore[operator]
    module._parameters.update(own)
    for key, parameter in own.items():
        value = whole[key].to(parameter.device)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)
