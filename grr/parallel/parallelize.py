"""The preparation of a model for training: float8, compilation, precision, sharding and activation checkpointing."""

import functools

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from grr.parallel.bf16 import compute_in_bf16
from grr.parallel.blocks import blocks
from grr.parallel.compiled import compile_parts, compiles
from grr.parallel.float8 import multiply_in_float8
from grr.parallel.memory import has_room_for_whole
from grr.parallel.shard import METHODS, ORDER, preparations, shard_over


def parallelize(
    model: nn.Module,
    device: torch.device,
    *,
    bf16: bool = False,  # compute in bfloat16; weights and the reduction of gradients stay float32
    float8: bool = False,  # multiply in 8 bits in the blocks, on a GPU that can
    compile: bool | None = None,  # compile the passes of training steps; null: on a CUDA GPU
    activation_checkpointing: bool = False,  # keep only the input of each block, and compute the rest again
    dp_replicate: int = 1,  # copies of the model, each sharded over its part of the processes (HSDP)
    keep_gathered: bool | None = None,  # hold whole weights and gradients through a step; null: where memory allows
) -> None:
    """Prepare a model in place for training on all processes, before or after it has weights.

    The order is float8 (`multiply_in_float8`), compilation, FSDP2 or plain bfloat16, activation checkpointing: each
    wraps the result of the one before. Towers are compiled whole where nothing works between their blocks: in one
    process, without float8 and activation checkpointing; elsewhere each block is (`compile_parts`). bf16 keeps
    parameters, reductions and outputs in float32. Several processes shard every block, then the rest; with
    dp_replicate > 1 they form that many groups, each with a whole model: one group a machine is best. With
    keep_gathered, a training step gathers the weights once and reduces the gradients once, however many micro-batches
    and passes it has (`grr.parallel.shard.gathered`). One process keeps plain parameters: the same function with fewer
    calls.

    Raises ValueError if the model was prepared before, if the number of processes is not a multiple of dp_replicate, or
    if several share a Mac's GPU; float8 raises as `multiply_in_float8` does.
    """
    if done := preparations(model):
        raise ValueError(f"parallelize: a model is prepared once, got one that is {' and '.join(done)}; {ORDER}")
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world % dp_replicate:
        raise ValueError(
            f"parallelize: the number of processes must be a multiple of dp_replicate, got {world=}, {dp_replicate=}"
        )
    if world > 1 and device.type == "mps":
        raise ValueError(
            f"parallelize: a Mac's GPU computes in one process, got {world=} on mps; start one process, or set "
            "GRR_DEVICE=cpu"
        )
    if float8:
        multiply_in_float8(model, device)
    if compiles(device, compile):
        compile_parts(model, whole_towers=world == 1 and not float8 and not activation_checkpointing)
    if world > 1:
        shape = (dp_replicate, world // dp_replicate) if dp_replicate > 1 else (world,)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        if keep_gathered is None:
            keep_gathered = has_room_for_whole(model, device, bf16=bf16)
        shard_over(model, mesh, bf16=bf16, keep_gathered=keep_gathered)
    elif bf16:
        compute_in_bf16(model, METHODS)
    if activation_checkpointing:
        for block in blocks(model):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
