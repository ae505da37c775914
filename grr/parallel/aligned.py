"""Padding of bfloat16 copies, so that the sides of all products suit a GPU."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from grr.components import GEGLU, SwiGLU
from grr.models.head import aligned


class Layout(NamedTuple):
    """Where a parameter lies in a copy that is longer in one dimension; the rest of the copy is zero.

    `starts` holds pairs of indices in that dimension, of the copy and of the parameter, at which `length` elements lie.
    """

    dim: int
    size: int  # of the copy
    length: int
    starts: tuple[tuple[int, int], ...]

    def zeros(self, parameter: Tensor) -> Tensor:
        """Returns zeros of the copy's shape."""
        return parameter.new_zeros([*parameter.shape[: self.dim], self.size, *parameter.shape[self.dim + 1 :]])

    def pieces(self, copy: Tensor, parameter: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield views of the copy and of the parameter, or of their gradients, that hold the same elements."""
        for of_copy, of_parameter in self.starts:
            yield (
                copy.narrow(self.dim, of_copy, self.length),
                parameter.narrow(self.dim, of_parameter, self.length),
            )


def layouts(model: nn.Module) -> dict[Tensor, Layout]:
    """Returns the parameters of a model whose copies are padded: those of GEGLUs and SwiGLUs of an odd inner width.

    Zeros pass through them as zeros (GELU(0) * 0) and meet columns of zeros, so results and gradients do not change.
    A width of 2,073, that of the paper's encoder, becomes 2,112.
    """
    found: dict[Tensor, Layout] = {}
    for module in model.modules():
        if isinstance(module, GEGLU | SwiGLU) and type(module.up) is type(module.down) is nn.Linear:
            width = module.down.in_features
            if (size := aligned(width)) != width:
                halves = Layout(0, 2 * size, width, ((0, 0), (size, width)))
                found |= {p: halves for p in (module.up.weight, module.up.bias) if p is not None}
                found[module.down.weight] = Layout(1, size, width, ((0, 0),))
    return found
