"""What a piece of code asks of a device, counted on any device: operations, waits, collectives, FLOPs and bytes.

A GPU works behind the host that starts its operations. It idles while the host waits for a result (a wait), and where
an operation takes the host longer to start than the GPU to compute. Both can be counted without a GPU; on one,
`torch.cuda.set_sync_debug_mode("error")` raises at each wait.
"""

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from grr.training.micro_batch import count_kept_bytes

WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # of item(), nonzero(), unique() ...
INDEXES = {"index", "index_put", "index_put_"}  # wait for the number of true elements of a boolean mask
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "unsafe_view"}
HOST_READS = {Tensor.tolist, Tensor.cpu, Tensor.numpy}  # of a tensor on a CPU these are no operations
PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}  # -> the places of the factors
ATTENTION = {  # of a CPU, which torch's counter does not know
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
ALIGNMENT = 8  # tensor cores are fastest where all dimensions of a product are multiples of it


class Counts(NamedTuple):
    """What one call does."""

    operations: int  # kernels or copies in eager mode; views are not counted
    waits: dict[str, int]  # the operation and the line -> how often the host waits there
    collectives: dict[str, int]  # name -> calls
    collective_bytes: dict[str, int]  # name -> bytes of the largest tensor of each call, summed
    flops: int  # executed, of matrix products; fused attention computes its scores again for the backward pass
    unaligned_flops: int  # of products that have a dimension that is not a multiple of 8; attention is not included
    kept_bytes: int  # at any time for a backward pass, without the parameters, at most
    host_calls: int  # of Python and C functions


class Counters:
    """Counts the operations, waits, collectives and products of the code in its context.

        with Counters() as counters:
            step()
        print(counters.waits)

    A wait is what would be one on a GPU: reading a value, a size that depends on values, a tensor made from numbers of
    the host, a copy between host and device. Compiled code under it runs in eager mode.
    """

    def __init__(self) -> None:
        self.operations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.collective_bytes: Counter[str] = Counter()
        self.products: Counter[tuple[int, ...]] = Counter()  # (m, k, n) -> FLOPs

    def __enter__(self) -> "Counters":
        with ExitStack() as stack:
            stack.enter_context(_Operations(self))
            stack.enter_context(_HostReads(self))
            self._modes = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._modes.__exit__(*error)

    @property
    def unaligned_flops(self) -> int:
        """FLOPs of products that have a dimension that is not a multiple of 8."""
        return sum(flops for dims, flops in self.products.items() if any(n % ALIGNMENT for n in dims))


def count(act: Callable[[], object], model: nn.Module) -> Counts:
    """Count what `act` does, which is called three times. The bytes of the model's parameters do not count as kept."""
    with flop_counter() as flops, Counters() as counters:
        act()
    with count_kept_bytes(model) as kept:
        act()
    with host_calls() as calls:
        act()
    return Counts(
        counters.operations.total(),
        dict(counters.waits),
        dict(counters.collectives),
        dict(counters.collective_bytes),
        flops.get_total_flops(),
        counters.unaligned_flops,
        kept.most,
        calls.total(),
    )


def flop_counter() -> FlopCounterMode:
    """Returns torch's counter of FLOPs, which counts the fused attention of a CPU as it counts that of a GPU."""
    counter = FlopCounterMode(display=False)
    counter.flop_registry |= ATTENTION
    return counter


@contextmanager
def host_calls() -> Iterator[Counter[str]]:
    """Yield a counter of the functions that this thread calls in the context: name -> calls, of Python and C."""
    calls: Counter[str] = Counter()

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            calls[frame.f_code.co_qualname] += 1
        elif event == "c_call":
            calls[argument.__qualname__] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(before)


class GraphCounter:
    """A backend of torch.compile that counts the graphs it receives, and runs them uncompiled.

    graphs = GraphCounter()
    torch.compile(model, backend=graphs)(x)
    print(graphs.count)  # 1 and not more: the model compiles whole
    """

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


class _Operations(TorchDispatchMode):
    """Sees every operation below autograd, those of a backward pass too."""

    def __init__(self, counters: Counters) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counters = counters

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        counters, name = self.counters, operation.overloadpacket.__name__
        result = operation(*args, **(kwargs or {}))
        if "c10d" in operation.namespace:
            counters.collectives[name] += 1
            counters.collective_bytes[name] += max((x.nbytes for x in _tensors((args, result))), default=0)
            return result
        if why := _wait(operation, args, result):
            counters.waits[f"{why} at {_line()}"] += 1
        if name in PRODUCTS:
            a, b = (args[i] for i in PRODUCTS[name])
            dims = (*a.shape[-2:], b.shape[-1])
            counters.products[dims] += 2 * a.numel() * b.shape[-1]
        if not (
            operation.is_view or name.lstrip("_") in NO_KERNEL or torch.Tag.data_dependent_output in operation.tags
        ):
            counters.operations[name] += 1
        return result


class _HostReads(TorchFunctionMode):
    """Sees the functions that read a tensor on the host, which on a CPU are no operations."""

    def __init__(self, counters: Counters) -> None:
        super().__init__()
        self.counters = counters

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in HOST_READS and args[0].device.type == "cpu":  # elsewhere the operation is counted
            self.counters.waits[f"{function.__name__} at {_line()}"] += 1
        return function(*args, **(kwargs or {}))


def _wait(operation: Any, args: tuple[Any, ...], result: Any) -> str | None:
    """Returns why an operation makes the host wait, or None."""
    name = operation.overloadpacket.__name__
    if name in INDEXES:
        masked = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        return f"{name} by a boolean mask" if masked else None
    if WAITING.intersection(operation.tags):
        return name
    if name == "lift_fresh":  # torch.tensor(...), which copies to the device from memory that is not pinned
        return "a tensor of numbers on the host"
    source, target = (args[1:2], args[0]) if name == "copy_" else (args, result)
    devices = {x.device.type for x in _tensors(source)}
    if not isinstance(target, Tensor) or not devices or target.device.type in devices:
        return None
    pinned = all(x.is_pinned() for x in _tensors(source) if x.device.type == "cpu")
    return None if "cpu" in devices and pinned else f"copy to {target.device.type}"


def _line() -> str:
    """Returns the file and line outside torch that is running."""
    frame = inspect.currentframe()
    inside = str(Path(torch.__file__).parent)
    while frame is not None and (frame.f_code.co_filename.startswith(inside) or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame is not None else "a backward pass"


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested sequences."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
