"""The collectives of a computation, counted as torch dispatches them."""

from collections import Counter

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAMES = {
    "allreduce_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "weights",
    "_reduce_scatter_base_": "gradients",
}


class Collectives(TorchDispatchMode):
    """Within the context, count the collectives of this process by kind, and the bytes of the larger side of each.

    FSDP2 alone gathers into one tensor and scatters from one: its all-gathers are `weights`, its reduce-scatters
    `gradients`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            name = function.__name__.split(".")[0]
            tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            self.counts[NAMES.get(name, name)] += 1
            self.bytes[NAMES.get(name, name)] += max((x.numel() * x.element_size() for x in tensors), default=0)
        return function(*args, **(kwargs or {}))
