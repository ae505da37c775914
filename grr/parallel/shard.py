"""Sharding a model over processes with FSDP2, and what was done to a model before."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from grr.parallel.bf16 import InBFloat16, held_in_bf16
from grr.parallel.blocks import blocks

ORDER = "build the model anew and call parallelize once: float8, compile, FSDP2 or bfloat16, activation checkpointing"
METHODS = ("embed", "encode_image", "encode_text", "image_context", "from_context", "next_token_logits")  # of a CoCa


def shard_over(model: nn.Module, mesh: DeviceMesh, *, bf16: bool = False, keep_gathered: bool = False) -> None:
    """Shard every block, then the rest, over the last dimension of a mesh, even if that is one process.

    keep_gathered: whether `gathered` holds the whole weights through a step. Where it does not, each block gathers its
    weights when they are needed, and those of the next block of its tower while it computes. `parallelize` calls this.
    Raises ValueError if the model is sharded, or computes in bfloat16 without being sharded.
    """
    if isinstance(model.forward, InBFloat16) or any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError(
            f"shard_over: a model is sharded once, got one that is {' and '.join(preparations(model))}; {ORDER}"
        )
    compute, exact = (torch.bfloat16, torch.float32) if bf16 else (None, None)
    for block in blocks(model) if mesh.size(-1) > 1 else ():  # one process gathers nothing, so it needs one unit only
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(compute, exact))
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(compute, exact, output_dtype=exact))
    for name in METHODS:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
    model.keep_gathered = keep_gathered  # type: ignore[assignment]
    for tower in model.modules():
        parts = [part for part in tower.children() if isinstance(part, FSDPModule)]
        for part, following in itertools.pairwise(parts if isinstance(tower, nn.ModuleList) else ()):
            part.set_modules_to_forward_prefetch([following])


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold the whole weights through the passes of an optimizer step, where `parallelize` chose so.

        with gathered(model):
            for i, batch in enumerate(batches):
                loss = ...
                if i == len(batches) - 1:
                    reduce_gradients(model)
                loss.backward()

    Weights are gathered once, and gradients are added up in float32 in each process and reduced once, in the backward
    pass that follows `reduce_gradients`. Without that choice, and for a model that is not sharded, nothing changes:
    each backward pass reduces its gradients. After the block, each process holds its shards again.
    """
    if not getattr(model, "keep_gathered", False):
        yield
        return
    parts = sharded_parts(model)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.set_reshard_after_backward(False, recurse=False)
        part.set_requires_gradient_sync(False, recurse=False)
        part.unshard(async_op=True)  # its first forward pass waits for it
    try:
        yield
    finally:
        reduce_gradients(model)
        _reshard(parts)


def reduce_gradients(model: nn.Module) -> None:
    """Reduce the gradients of a step over the processes in the next backward pass, the last one inside `gathered`."""
    if getattr(model, "keep_gathered", False):
        model.set_requires_gradient_sync(True)  # type: ignore[operator]
        model.set_reshard_after_backward(True)  # type: ignore[operator]


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Hold the whole model in every process, so that each may call it any number of times, e.g. to write captions."""
    parts = sharded_parts(model)
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        with held_in_bf16(model):
            yield
    finally:
        _reshard(parts)


def local(x: Tensor) -> Tensor:
    """Returns this process's shard of a sharded tensor, and a plain tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def shard_as(value: Tensor, parameter: Tensor) -> Tensor:
    """Returns a whole tensor, equal in all processes, on the device, in the dtype and sharded as a parameter."""
    value = value.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value


def _reshard(parts: list[FSDPModule]) -> None:
    """Hold shards only, now and between blocks; the first part is the whole model, which is used until the end."""
    for i, part in enumerate(parts):
        part.set_reshard_after_forward(i > 0, recurse=False)
        part.reshard()


def sharded_parts(model: nn.Module) -> list[FSDPModule]:
    """Returns the parts of a model that are gathered and reduced separately; an empty list if it is not sharded."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def preparations(model: nn.Module) -> list[str]:
    """Returns what `parallelize` did to a model, in words; an empty list for a model as it was built."""
    modules = [model, *model.children(), *blocks(model)]
    replaced = any("forward" in module.__dict__ or module._compiled_call_impl is not None for module in modules)
    done = {
        "converted to float8": any(type(module).__name__ == "Float8Linear" for module in model.modules()),
        "compiled, cast to bfloat16 or checkpointed": replaced,
        "sharded": bool(sharded_parts(model)),
    }
    return [what for what, is_so in done.items() if is_so]
