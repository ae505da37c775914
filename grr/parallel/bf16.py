"""Mixed precision for a model that is not sharded: bfloat16 computation with float32 weights, as FSDP2 does it."""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils import _pytree as tree

from grr.parallel.aligned import Layout, layouts
from grr.parallel.blocks import blocks

GROUP = 2**24  # elements: of the parameters of a node, and of gradients in float32 (67 MB) that are added at a time


class InBFloat16:
    """Wrapper of a model's or a block's function that computes with bfloat16 copies of the parameters.

    Gradients reach the float32 originals. Floating-point inputs are cast to bfloat16, and outputs to the dtype
    `outputs` if it is given. `block`: the function is one of this block alone.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        copies: "Copies",
        *,
        block: nn.Module | None = None,
        outputs: torch.dtype | None = None,
    ) -> None:
        self.function, self.copies, self.block, self.outputs = function, copies, block, outputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.block is not None and self.copies.placed:  # no context manager here, nor where this is compiled
            return self.function(*map(_lowered, args), **{key: _lowered(value) for key, value in kwargs.items()})
        args, kwargs = _cast((args, kwargs), torch.bfloat16)
        with self.copies.in_place(self.block):
            result = self.function(*args, **kwargs)
        return result if self.outputs is None else _cast(result, self.outputs)


def compute_in_bf16(model: nn.Module, entry_points: Sequence[str]) -> None:
    """Make `forward` and the methods `entry_points` of a model compute in bfloat16 and return float32.

    Parameters, gradients, optimizer and checkpoints stay float32. A block that is called alone, as when activations
    are computed again in the backward pass, reads its copies as well. `parallelize` calls this after compilation, so
    that compiled code reads bfloat16.
    """
    copies = Copies(model)
    for block in blocks(model):
        block.forward = InBFloat16(block.forward, copies, block=block)
    for name in ("forward", *entry_points):
        if hasattr(model, name):
            setattr(model, name, InBFloat16(getattr(model, name), copies, outputs=torch.float32))


def bf16_copies(model: nn.Module) -> list[Tensor]:
    """Returns the copies of a model that computes in bfloat16, from its first pass on; else an empty list."""
    return model.forward.copies.copies if isinstance(model.forward, InBFloat16) else []


@contextmanager
def held_in_bf16(model: nn.Module) -> Iterator[None]:
    """Keep the copies in place for many calls without gradients, where the model computes in bfloat16."""
    if not isinstance(model.forward, InBFloat16):
        yield
        return
    with torch.no_grad(), model.forward.copies.in_place():
        yield


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Context of the backward pass of a training step, where the model computes in bfloat16.

    Modules of others that compute their activations again read the copies too; blocks do so without it. Gradients are
    added to those of earlier micro-batches many at a time, which `backward()` alone would do one by one. Parameters
    with hooks keep torch's own way.
    """
    if not isinstance(model.forward, InBFloat16):
        yield
        return
    copies = model.forward.copies
    copies.adding = True
    try:
        with copies.in_place():
            yield
    finally:
        copies.adding = False


class Place(NamedTuple):
    """A name under which a module holds a parameter, and the parameter's number."""

    module: nn.Module
    name: str
    number: int


class Copies:
    """bfloat16 copies of a model's parameters, which last: they are renewed only after the parameters have changed.

    A change is noticed by torch's version counters, by other parameters or other memory in their places, and by a step
    of any torch.optim optimizer (the fused ones do not count versions). A write through `parameter.data` is not
    noticed. Some copies are padded (`grr.parallel.aligned`). A deep copy makes copies of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.owners = [module for module in model.modules() if module._parameters]
        self.model = model
        self.placed = False  # the modules hold the copies now
        self.adding = False  # a training step's backward pass runs now
        self._clear()

    def _clear(self) -> None:
        self.found: list[nn.Parameter | None] = []  # all that the owners hold
        self.parameters: list[nn.Parameter] = []  # those that have a copy, each once
        self.places: list[Place] = []
        self.copies: list[Tensor] = []
        self.layouts: list[Layout | None] = []
        self.versions: list[int] = []
        self.memory: list[torch.UntypedStorage] = []
        self.updates = -1

    def __getstate__(self) -> dict[str, Any]:
        return {"owners": self.owners, "model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.placed = self.adding = False
        self._clear()

    @contextmanager
    def in_place(self, block: nn.Module | None = None) -> Iterator[None]:
        """Put copies in the places of the parameters, of one block or of the model, unless they are there."""
        if self.placed:
            yield
            return
        self._renew()
        places = self.places
        if block is not None:
            inside = set(block.modules())
            places = [place for place in places if place.module in inside]
        values = self._values(places)
        self.placed = True
        try:
            for (module, name, _), value in zip(places, values, strict=True):
                module._parameters[name] = value  # type: ignore[assignment]
            yield
        finally:
            for module, name, number in places:
                module._parameters[name] = self.parameters[number]
            self.placed = False

    def earlier(self, parameter: nn.Parameter) -> Tensor | None:
        """Returns the gradient of earlier micro-batches, if the backward pass that runs now may add to it itself."""
        hooks = parameter._backward_hooks or parameter._post_accumulate_grad_hooks
        return parameter.grad if self.adding and not hooks else None

    def _values(self, places: Sequence[Place]) -> list[Tensor]:
        """Returns the copies for some places, as functions of those parameters that are trained."""
        values = [self.copies[place.number] for place in places]
        if not torch.is_grad_enabled():
            return values
        where: dict[int, list[int]] = {}  # of each parameter that is trained, the indices of its values
        for i, place in enumerate(places):
            if self.parameters[place.number].requires_grad:
                where.setdefault(place.number, []).append(i)
        for group in _groups((n, self.parameters[n]) for n in where):
            numbers = [n for n in group for _ in where[n]]
            lowered = _Lowered.apply(self, numbers, *group.values())  # type: ignore[no-untyped-call]
            for i, value in zip((i for n in group for i in where[n]), lowered, strict=True):
                values[i] = value
        return values

    @torch.inference_mode(False)
    @torch.no_grad()
    def _renew(self) -> None:
        found = [parameter for module in self.owners for parameter in module._parameters.values()]
        memory = [parameter.untyped_storage() for parameter in self.parameters]
        if not (_same(found, self.found) and _same(memory, self.memory)):
            self._allocate(found)
        versions = [parameter._version for parameter in self.parameters]
        if self.updates != _updates or not self.versions:
            changed = list(range(len(versions)))
        else:
            changed = [n for n, version in enumerate(versions) if version != self.versions[n]]
        pieces = (_pieces(self.layouts[n], self.copies[n], self.parameters[n]) for n in changed)
        _copy_all([pair for pairs in pieces for pair in pairs])
        self.versions, self.updates = versions, _updates

    def _allocate(self, found: list[nn.Parameter | None]) -> None:
        self._clear()
        self.found = found
        numbers: dict[nn.Parameter, int] = {}
        for module in self.owners:
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_floating_point() and parameter.dtype != torch.bfloat16:
                    self.places.append(Place(module, name, numbers.setdefault(parameter, len(numbers))))
        padded = layouts(self.model)
        for parameter in numbers:
            self.parameters.append(parameter)
            self.memory.append(parameter.untyped_storage())
            self.layouts.append(layout := padded.get(parameter))
            like = parameter.detach() if layout is None else layout.zeros(parameter)
            self.copies.append(torch.zeros_like(like, dtype=torch.bfloat16))


class _Lowered(torch.autograd.Function):
    """Copies as a function of a group of parameters: one node of the autograd graph for many small ones.

    Not one for all, because a node frees its gradients in bfloat16 only after all of them are cast.
    """

    @staticmethod
    def forward(ctx: Any, copies: Copies, numbers: Sequence[int], *parameters: nn.Parameter) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a parameter without a gradient keeps none
        ctx.copies, ctx.numbers = copies, numbers
        inputs = zip(dict.fromkeys(numbers), parameters, strict=True)
        ctx.inputs = {n: (parameter, copies.layouts[n]) for n, parameter in inputs}
        return tuple(copies.copies[n].detach() for n in numbers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        results: dict[int, Tensor] = {}
        present = ((n, x) for n, x in zip(ctx.numbers, gradients, strict=True) if x is not None)
        for group in _groups(present):
            exact = {n: torch.empty_like(ctx.inputs[n][0]) for n in group}
            pieces = (_pieces(ctx.inputs[n][1], gradient, exact[n]) for n, gradient in group.items())
            _copy_all([(new, old) for pairs in pieces for old, new in pairs])
            earlier = {n: results[n] if n in results else ctx.copies.earlier(ctx.inputs[n][0]) for n in group}
            results |= {n: exact[n] for n in group if earlier[n] is None}
            if sums := {n: x for n, x in earlier.items() if x is not None}:
                torch._foreach_add_(list(sums.values()), [exact[n] for n in sums])
        return (None, None, *(results.get(n) for n in ctx.inputs))


def _groups(tensors: Iterable[tuple[int, Tensor]]) -> Iterator[dict[int, Tensor]]:
    """Yield tensors by their number, in groups of about GROUP elements that hold a number at most once."""
    group: dict[int, Tensor] = {}
    elements = 0
    for number, tensor in tensors:
        if number in group or elements >= GROUP:
            yield group
            group, elements = {}, 0
        group[number] = tensor
        elements += tensor.numel()
    if group:
        yield group


def _pieces(layout: Layout | None, copy: Tensor, parameter: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    return [(copy, parameter)] if layout is None else layout.pieces(copy, parameter)


def _copy_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair to the first, those without gaps by one kernel."""
    dense = []
    for to, source in pairs:
        if to.is_contiguous() and source.is_contiguous():
            dense.append((to, source))
        else:
            to.copy_(source)
    if dense:
        torch._foreach_copy_([to for to, _ in dense], [source for _, source in dense])


def _same(these: Sequence[object], those: Sequence[object]) -> bool:
    return len(these) == len(those) and all(map(operator.is_, these, those))


def _lowered(value: Any) -> Any:
    return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return tree.tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, values)


_updates = 0  # steps of all optimizers of this process


def _count_update(*_: object) -> None:
    global _updates
    _updates += 1


register_optimizer_step_post_hook(_count_update)
