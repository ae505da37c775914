"""Exponential moving average of weights over a run, and WiSE-FT interpolation between two models."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from grr.parallel.shard import local


class EMA:
    """Exponential moving average of a model's weights: mean <- decay mean + (1 - decay) weights.

        ema = EMA(model, decay=0.999)   # after the weights are initialised or loaded, plain or sharded
        ...
        optimizer.step()
        ema.update()                    # after each optimizer step
        ...
        with ema.applied():             # validate and save the model with the mean
            ...

    The mean starts at the weights that the model has at construction; those that are not trained are left out.
    `weights` holds it by parameter name, sharded as the parameters are, for `save_checkpoint` and `load_checkpoint`.
    With decay=0, `weights` is empty, and `update` and `applied` change nothing. Source: Polyak and Juditsky 1992, with
    exponential weights.
    Raises ValueError unless decay is in [0, 1).
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay must be at least 0 and below 1, got {decay=}")
        self._model, self.decay = model, decay
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        self.weights = {n: w.clone() for n, w in _shards(model).items() if n in trained} if decay else {}

    @torch.no_grad()
    def update(self) -> None:
        """Update the mean with the present weights of the model."""
        for mean, weight in self._pairs():
            mean.lerp_(weight, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Swap the mean into the model for the block; `weights` then holds the weights that are trained."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for mean, weight in self._pairs():
            kept = weight.clone()
            weight.copy_(mean)
            mean.copy_(kept)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.weights:
            shards = _shards(self._model)
            yield from ((local(mean), local(shards[name])) for name, mean in self.weights.items())


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns a copy of the parameters by name, sharded as they are."""
    return {name: weight.clone() for name, weight in _shards(model).items()}


@torch.no_grad()
def wise_ft(model: nn.Module, others: Mapping[str, Tensor], *, alpha: float) -> None:
    """Interpolate the model's weights: w <- (1 - alpha) w + alpha other; alpha=1 copies the others exactly.

    Between a pre-trained model and its fine-tuned version, an alpha inside (0, 1) is often more accurate than both
    under a shift of the data (WiSE-FT, Wortsman et al. 2022). others: from `weights_of` a model of the same
    architecture. Raises ValueError unless alpha is in [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"wise_ft: alpha must be from 0 to 1, got {alpha=}")
    for name, weight in _shards(model).items():
        local(weight).lerp_(local(others[name]), alpha)


def _shards(model: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters by name, in the memory that the optimizer updates.

    After a forward pass without a backward pass, FSDP2 keeps the unsharded parameters of the outermost module, and the
    next forward pass would use them instead of the shards: `reshard` frees them first.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
