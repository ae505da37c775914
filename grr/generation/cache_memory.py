"""Memory of the key/value caches of a model, so that rows of all of them are selected by one operation."""

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from grr.components import KeyValueCache


class CacheMemory:
    """Keys and values of the tokens in many caches, in one tensor for each width of a head: [rows, heads, t, k].

    The caches, which must be filled to the same length, keep views of it.
    """

    def __init__(self, caches: Iterable[KeyValueCache]) -> None:
        groups = itertools.groupby(caches, key=lambda cache: (cache.keys.shape[-1], cache.keys.dtype))
        self._groups = [_Group(list(group)) for _, group in groups]

    def select(self, rows: Tensor) -> None:
        """Keep these rows [n], in this order; a row may occur more than once.

        If there were n rows before, nothing is allocated after the first time, and the memory of caches whose shapes
        are fixed keeps its address, from which a captured step reads.
        """
        for group in self._groups:
            group.select(rows)


class _Group:
    """Caches whose keys and values are parts of one tensor."""

    def __init__(self, caches: list[KeyValueCache]) -> None:
        self.caches = caches
        tensors = [x for cache in caches for x in (cache.keys, cache.values)]
        self.heads = [x.shape[1] for x in tensors]
        self.spare: Tensor | None = None
        self.hold(torch.cat(tensors, dim=1))

    def hold(self, memory: Tensor) -> None:
        self.memory = memory  # [rows, heads, t, k]
        parts = iter(memory.split(self.heads, dim=1))
        for cache in self.caches:
            cache.keys, cache.values = next(parts), next(parts)

    def select(self, rows: Tensor) -> None:
        memory, spare, length = self.memory, self.spare, self.caches[0].length
        if spare is None or len(rows) != len(memory):
            spare = memory.new_empty(len(rows), *memory.shape[1:])
        torch.index_select(memory[:, :, :length], 0, rows, out=spare[:, :, :length])
        if self.caches[0].place is not None:
            memory.copy_(spare)
            self.spare = spare
        else:
            self.hold(spare)
            self.spare = memory if len(rows) == len(memory) else None
