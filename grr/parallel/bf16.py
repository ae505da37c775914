"""Mixed precision for a model that is not sharded: bfloat16 computation with float32 weights, as FSDP2 does it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree

from grr.components import Block


class InBFloat16:
    """Wrapper of a module's function that computes with bfloat16 copies of the parameters.

    Gradients reach the float32 originals. Floating-point inputs are cast to bfloat16, and outputs to the dtype
    `outputs` if it is given.
    """

    def __init__(
        self, function: Callable[..., Any], owners: Sequence[nn.Module], *, outputs: torch.dtype | None = None
    ) -> None:
        self.function, self.owners, self.outputs = function, owners, outputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _cast((args, kwargs), torch.bfloat16)
        with lowered(self.owners):
            result = self.function(*args, **kwargs)
        return result if self.outputs is None else _cast(result, self.outputs)


def compute_in_bf16(model: nn.Module, entry_points: Sequence[str]) -> None:
    """Make `forward` and the methods `entry_points` of a model compute in bfloat16 and return float32.

    Parameters, gradients, optimizer and checkpoints stay float32. Each block casts its own parameters, so that a block
    whose activations are recomputed casts them again. `parallelize` calls this after compilation, so that compiled code
    reads bfloat16.
    """
    inside: set[nn.Module] = set()
    for block in (module for module in model.modules() if isinstance(module, Block)):
        inside.update(owners := _owners(block))
        block.forward = InBFloat16(block.forward, owners)  # type: ignore[method-assign]
    rest = [module for module in _owners(model) if module not in inside]
    for name in ("forward", *entry_points):
        if hasattr(model, name):
            setattr(model, name, InBFloat16(getattr(model, name), rest, outputs=torch.float32))


@contextmanager
def held_in_bf16(model: nn.Module) -> Iterator[None]:
    """Cast all parameters once for many calls without gradients, where the model computes in bfloat16."""
    if not isinstance(model.forward, InBFloat16):
        yield
        return
    with torch.no_grad(), lowered(_owners(model)):
        yield


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Context of a backward pass in which modules that recompute their activations read bfloat16 copies as well.

    Only other modules than those of this library need it: blocks cast their own parameters, and the vocabulary head
    keeps the copies of the forward pass.
    """
    if not isinstance(model.forward, InBFloat16):
        yield
        return
    with lowered(model.forward.owners):
        yield


@contextmanager
def lowered(owners: Sequence[nn.Module]) -> Iterator[None]:
    """Replace the parameters that these modules hold directly by bfloat16 copies, within the context."""
    places = [
        (module._parameters, name, parameter)
        for module in owners
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dtype != torch.bfloat16
    ]
    copies = _ToBFloat16.apply(*(parameter for _, _, parameter in places)) if places else ()  # type: ignore[no-untyped-call]
    try:
        for (parameters, name, _), copy in zip(places, copies, strict=True):
            parameters[name] = copy
        yield
    finally:
        for parameters, name, parameter in places:
            parameters[name] = parameter


class _ToBFloat16(torch.autograd.Function):
    """Cast many tensors by one kernel and one node of the autograd graph."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a parameter without a gradient keeps none
        copies = tuple(torch.empty_like(x, dtype=torch.bfloat16) for x in tensors)
        torch._foreach_copy_(copies, tensors)
        return copies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else g.float() for g in gradients)


def _owners(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if part._parameters]


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return tree.tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, values)
