"""Compilation of the passes of a training step."""

import functools
import warnings
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn

from grr.components import Block, LoRALinear
from grr.models.coca import CoCa, MultimodalDecoder, TextDecoder, VisionTransformer
from grr.models.head import cross_entropies, token_losses
from grr.models.towers import Tower

TOWERS = (VisionTransformer, TextDecoder, MultimodalDecoder)
TEXT_MULTIPLE = 8  # columns
RECOMPILE_LIMIT = 256  # versions of one function; torch's own limit is 8, past which it runs uncompiled


def compile_parts(model: nn.Module, *, whole_towers: bool) -> None:
    """Compile the towers, or their blocks, and the losses of tokens, in place.

    In training mode, each part is compiled once for each size of a batch: images have one, texts have lengths that are
    multiples of 8 (`text_multiple`). GradCache's first pass, without a graph, is another version. Blocks of one kind
    share the compiled code. The number of labelled tokens may be any, from the second one on. In evaluation mode and
    with caches, as captions are written, the parts run uncompiled: sizes vary there, and hooks are called.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    # `_takes` in grr.models.coca is cached, and a function of its arguments alone
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`-wrapped function")
    # both passes of a step must draw the dropout of adapters alike, from torch's generator
    draws = any(isinstance(module, LoRALinear) and module.dropout.p > 0 for module in model.modules())
    options: dict[str, Any] = {"options": {"fallback_random": True}} if draws else {}
    compiled: dict[type, Callable[..., Any]] = {}
    for part in _parts(model, TOWERS if whole_towers else ()):
        if type(part) not in compiled:
            compiled[type(part)] = _in_training(type(part).forward, options)
        part.forward = MethodType(compiled[type(part)], part)  # a method, which a deep copy binds anew
    if isinstance(model, CoCa):
        model.token_losses = functools.partial(token_losses, losses=torch.compile(cross_entropies))


def compiles(device: torch.device, compile: bool | None) -> bool:
    """Returns whether `parallelize` compiles for this argument; null is on a CUDA GPU alone."""
    return device.type == "cuda" if compile is None else compile


def text_multiple(device: torch.device, compile: bool | None) -> int:
    """Returns what lengths of texts are rounded up to: texts of few lengths where each is compiled, exact elsewhere."""
    return TEXT_MULTIPLE if compiles(device, compile) else 1


def _parts(module: nn.Module, whole: tuple[type, ...]) -> Iterator[nn.Module]:
    """Yield the modules of these types, and the blocks outside of them."""
    if isinstance(module, (*whole, Block)):
        yield module
    elif isinstance(module, Tower):
        yield from module.blocks
    else:
        for child in module.children():
            yield from _parts(child, whole)


def _in_training(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    compiled = torch.compile(forward, dynamic=False, **options)

    @functools.wraps(forward)
    def in_training(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        cached = kwargs.get("cache") is not None or kwargs.get("caches") is not None
        return (compiled if self.training and not cached else forward)(self, *args, **kwargs)

    return in_training
