"""Linear layers on a CPU through oneDNN, which is the fastest kernel for the few rows of a decoding step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def onednn_linears(*modules: nn.Module) -> Iterator[None]:
    """Compute the linear layers of these modules by oneDNN, without gradients and equal but for rounding.

    A decoding step multiplies a few rows by every weight of a decoder, so its time is that of reading the weights. In
    float32, torch calls MKL, which reads them with one core; oneDNN reads with all cores. In bfloat16, torch calls
    oneDNN with the weights in their usual layout; here they are copied once into oneDNN's layout, for the duration of
    the context. On a GPU, in other dtypes, for sharded or quantised layers, and in a module whose forward was replaced
    (when compiled, or by another such context), nothing changes.
    """
    linears = [linear for module in modules for linear in _linears(module) if _is_plain(linear.weight)]
    for linear in linears:
        linear.forward = _through_onednn(linear)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


def _linears(module: nn.Module) -> Iterator[nn.Linear]:
    if "forward" in module.__dict__:
        return
    if type(module) is nn.Linear:
        yield module
    for child in module.children():
        yield from _linears(child)


def _is_plain(weight: Tensor) -> bool:
    """Returns whether oneDNN can read a weight: a plain CPU tensor, neither sharded nor quantised."""
    if weight.device.type != "cpu" or type(weight.data) is not Tensor or not torch.backends.mkldnn.is_available():
        return False
    in_bfloat16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or in_bfloat16


def _through_onednn(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight = linear.weight.detach()
    if weight.dtype == torch.bfloat16:
        weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1)

    def forward(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, linear.bias, "none", [], "")
        return y

    return forward
