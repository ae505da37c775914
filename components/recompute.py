"""Recomputation of cheap functions between matrix products: the backward pass computes their outputs again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active

LARGE = 2**23  # elements; below it, the time that the host needs for a node counts more than the memory that it saves


def recomputable(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Returns function(*inputs), which `call_without_keeping` can compute again from the inputs.

    The gradient keeps the inputs only, if the first has LARGE elements or more. The function may not draw random
    numbers or change its inputs.
    """
    if not (torch.is_grad_enabled() and runs_eagerly()) or inputs[0].numel() < LARGE:
        return function(*inputs)
    return _Recomputable.apply(function, *inputs)  # type: ignore[no-untyped-call]


def call_without_keeping(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Returns module(x), whose graph keeps no copy of x if x was returned by `recomputable`.

    For a module that needs its input for the gradient of its weights, such as a linear layer. Other tensors are kept as
    usual. It may be used within activation checkpointing: what is recomputed then needs nothing that was dropped.
    """
    node = x.grad_fn if runs_eagerly() else None
    if not hasattr(node, "again") or not x.is_contiguous():
        return module(x)
    storage = x.untyped_storage()

    def pack(kept: Tensor) -> Any:
        is_x = kept.untyped_storage() is storage and kept.numel() == x.numel() and kept.is_contiguous()
        return (node, kept.shape) if is_x else kept  # x may be kept with its leading axes as one

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        return module(x)


def runs_eagerly() -> bool:
    """Returns whether a Function of autograd may be used: not while code is compiled or exported, nor in torch.func."""
    return not (torch.compiler.is_compiling() or _are_functorch_transforms_active())


class _Recomputable(torch.autograd.Function):
    """A node of the graph that knows how its output was computed."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.function = function
        ctx.again = None  # in the backward pass: inputs and output, from the first use of either to the last
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, output = _again(ctx)
        ctx.again = None
        wanted = [x for x in inputs if x.requires_grad]
        gradients = iter(torch.autograd.grad(output, wanted, gradient, create_graph=torch.is_grad_enabled()))
        return None, *(next(gradients) if x.requires_grad else None for x in inputs)


def _again(node: Any) -> tuple[tuple[Tensor, ...], Tensor]:
    if torch.is_grad_enabled():  # for second derivatives
        return node.saved_tensors, node.function(*node.saved_tensors)
    if node.again is None:
        inputs = tuple(x.detach().requires_grad_(x.requires_grad) for x in node.saved_tensors)
        with torch.enable_grad():
            node.again = inputs, node.function(*inputs)
    return node.again


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    node, shape = kept
    return _again(node)[1].detach().view(shape)
