"""The blocks of a model: the units that are sharded, compiled and checkpointed."""

from collections.abc import Iterator

from torch import nn

from grr.components import Block
from grr.models.towers import Tower


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield all blocks of a model, in order: our transformer blocks, and those of a tower of another library."""
    for module in model.modules():
        if isinstance(module, Tower):
            yield from module.blocks
        elif isinstance(module, Block):
            yield module
