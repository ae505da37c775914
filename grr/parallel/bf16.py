"""Compute in bfloat16 with weights that stay float32: what FSDP2 does of itself, for a model that is not sharded."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree

from grr.components import Block


class InBFloat16:
    """A function of a module, computed with bfloat16 copies of parameters; their gradients reach the float32 originals.

    Floating-point inputs are cast to bfloat16 as well, and with `outputs` what comes out to that dtype.
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


def compute_in_bf16(model: nn.Module, entrances: Sequence[str]) -> None:
    """Make the forward pass and the entrances of a model compute in bfloat16, and give float32.

    Parameters, and so gradients, optimizer and checkpoints, stay what they are. Each block casts its own parameters, so
    that a block whose activations are computed again casts them again. `parallelize` calls it, after compiling, so that
    what is compiled reads bfloat16.
    """
    inside: set[nn.Module] = set()
    for block in (module for module in model.modules() if isinstance(module, Block)):
        inside.update(owners := _owners(block))
        block.forward = InBFloat16(block.forward, owners)  # type: ignore[method-assign]
    rest = [module for module in _owners(model) if module not in inside]
    for name in ("forward", *entrances):
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
    """Around a backward pass: modules that compute their activations again in it read bfloat16 copies there, too.

    That is for modules of a user's own. Blocks cast their own parameters, and the vocabulary head keeps those it had.
    """
    if not isinstance(model.forward, InBFloat16):
        yield
        return
    with lowered(model.forward.owners):
        yield


@contextmanager
def lowered(owners: Sequence[nn.Module]) -> Iterator[None]:
    """Put bfloat16 copies in the place of the parameters that these modules hold themselves."""
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
    """Many tensors at once: a kernel for all of them, and a node of the graph, instead of one for each."""

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
