"""Sharding a model over processes with FSDP2, and what was done to a model before."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from grr.components import Block
from grr.parallel.bf16 import InBFloat16, held_in_bf16

ORDER = "build the model anew and call parallelize once: float8, compile, FSDP2 or bfloat16, activation checkpointing"
METHODS = ("embed", "encode_image", "encode_text", "image_context", "from_context", "next_token_logits")  # of a CoCa


def shard_over(model: nn.Module, mesh: DeviceMesh, *, bf16: bool = False) -> None:
    """Shard every block, then the rest, over the last dimension of a mesh, even if that is one process.

    `parallelize` calls it. Raises ValueError if the model is sharded, or computes in bfloat16 without being sharded.
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


def local(x: Tensor) -> Tensor:
    """Returns this process's shard of a sharded tensor, and a plain tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def blocks(model: nn.Module) -> Iterator[Block]:
    """Yield all transformer blocks of a model, in order."""
    return (module for module in model.modules() if isinstance(module, Block))


def preparations(model: nn.Module) -> list[str]:
    """Returns what `parallelize` did to a model, in words; an empty list for a model as it was built."""
    modules = [model, *model.children(), *blocks(model)]
    replaced = any("forward" in module.__dict__ or module._compiled_call_impl is not None for module in modules)
    done = {
        "converted to float8": any(type(module).__name__ == "Float8Linear" for module in model.modules()),
        "compiled, cast to bfloat16 or checkpointed": replaced,
        "sharded": any(isinstance(module, FSDPModule) for module in model.modules()),
    }
    return [what for what, is_so in done.items() if is_so]
