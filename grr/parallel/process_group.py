"""One process or many: starting them, sharding a model over them, filling it, and gathering what they computed."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grad_norm_

from grr.components import Block
from grr.parallel.bf16 import InBFloat16, held_in_bf16

T = TypeVar("T")
ORDER = "build the model anew and call parallelize once: float8, compile, FSDP2 or bfloat16, activation checkpointing"
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


def shard_over(model: nn.Module, mesh: DeviceMesh, *, bf16: bool = False) -> None:
    """Shard every block, then the rest, over the last dimension of a mesh, even if that is one process.

    `parallelize` calls it. Raises ValueError if the model is sharded, or computes in bfloat16 without being sharded.
    """
    if isinstance(model.forward, InBFloat16) or any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError(
            f"shard_over: a model is sharded once, got one that is {' and '.join(preparations(model))}; {ORDER}"
        )
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
        raise ValueError(
            f"materialize: these modules hold parameters or buffers but cannot fill them: "
            f"{', '.join(stuck)}; give them a reset_parameters() method"
        )
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
        _draw(module, derive_seed(seed, name))


def derive_seed(*parts: int | str) -> int:
    """A seed of 63 bits out of any numbers and names: well mixed, the same on every machine."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def blocks(model: nn.Module) -> Iterator[Block]:
    """All transformer blocks of a model, in order."""
    return (module for module in model.modules() if isinstance(module, Block))


def preparations(model: nn.Module) -> list[str]:
    """What `parallelize` did to a model, in words; empty for one that it left as it was built."""
    modules = [model, *blocks(model)]
    replaced = any("forward" in module.__dict__ or module._compiled_call_impl is not None for module in modules)
    done = {
        "converted to float8": any(type(module).__name__ == "Float8Linear" for module in model.modules()),
        "compiled, cast to bfloat16 or checkpointed": replaced,
        "sharded": any(isinstance(module, FSDPModule) for module in model.modules()),
    }
    return [what for what, is_so in done.items() if is_so]


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
