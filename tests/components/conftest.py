"""Counts of what a layer costs: kernels, which views are not, and bytes kept for the backward pass."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Kernels(TorchDispatchMode):
    """Count the operations that compute something, by name: those that allocate or return a view do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        aliases = any(argument.alias_info is not None for argument in function._schema.returns)
        name = function._schema.name.removeprefix("aten::")
        if not (aliases and not function._schema.is_mutable) and not name.startswith(
            ("empty", "new_empty", "_unsafe_view")
        ):
            self.count[name] += 1
        return result


@pytest.fixture
def kernels() -> Callable[[Callable[[], Any]], Counter[str]]:
    """Returns a function that counts the operations of a call on the CPU."""

    def count(function: Callable[[], Any]) -> Counter[str]:
        with Kernels() as counted:
            function()
        return counted.count

    return count


@pytest.fixture
def saved_bytes() -> Callable[..., int]:
    """Returns a function that counts the bytes that the graph of a call keeps, other than those of given tensors."""

    def count(function: Callable[[], Any], *without: Tensor) -> int:
        storages: dict[int, int] = {}
        known = {x.untyped_storage().data_ptr() for x in without}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in known:
                storages[storage.data_ptr()] = storage.nbytes()
            kept.append(x)  # so that no two tensors have one address
            return x

        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output = function()
        del output
        return sum(storages.values())

    return count
