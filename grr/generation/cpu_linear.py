"""Linear layers on a CPU through oneDNN as it is fastest for few rows, which is what writing a caption needs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def onednn_linears(*modules: nn.Module) -> Iterator[None]:
    """Within it, and without gradients, the linear layers of these modules give the same numbers, but for rounding.

    A token of a caption is the product of a row with every weight of a decoder, and so a matter of reading them. In
    float32, torch takes a library (MKL) that reads them with one core; oneDNN reads with all. In bfloat16, torch takes
    oneDNN, but with weights as they lie in memory; here they are copied once into its own order, for as long as the
    context lasts. On a GPU, in other dtypes, for sharded or quantised layers, and in a module whose forward was
    replaced (compiled, say, or by another such context), nothing changes.
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
    """Whether oneDNN can read it: numbers of this machine's memory, neither a shard nor a few bits."""
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
