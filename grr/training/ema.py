"""Means of weights: over the steps of a run, and between the two ends of a fine-tuning."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from grr.parallel.shard import local


class EMA:
    """The running mean of a model's weights, w <- decay w + (1 - decay) weights, which begins at the weights it meets.

        average = Average(model, decay=0.999)   # after the weights are there, plain or sharded
        ...                                     # in the loop, behind each optimizer.step()
        average.update()
        with average.applied():                 # the model validates, and is saved, with the mean
            ...

    `weights` holds the mean by the names of parameters, sharded as they are, for `save_checkpoint` and
    `load_checkpoint`. With decay=0 there is no mean: it holds nothing, and nothing of this does anything.
    Source: Polyak and Juditsky 1992, with exponential weights. Raises ValueError unless decay is in [0, 1).
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay must be at least 0 and below 1, got {decay=}")
        self._model, self.decay = model, decay
        self.weights = weights_of(model) if decay else {}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        for mean, weight in self._pairs():
            mean.lerp_(weight, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Exchange the two: the model holds the mean, and `weights` what the model is trained with, until the end."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for mean, weight in self._pairs():
            kept = weight.clone()
            weight.copy_(mean)
            mean.copy_(kept)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.weights:
            shards = _shards(self._model)
            yield from ((local(mean), local(shards[name])) for name, mean in self.weights.items())


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters by name, sharded as they are."""
    return {name: weight.clone() for name, weight in _shards(model).items()}


@torch.no_grad()
def wise_ft(model: nn.Module, others: Mapping[str, Tensor], *, alpha: float) -> None:
    """Move the model's weights toward others: w <- (1 - alpha) w + alpha other, exactly the others for a alpha of 1.

    From a pre-trained model toward what fine-tuning made of it, a alpha between gives, on data like neither's alone,
    often better results than both ends (Wortsman et al. 2022, WiSE-FT). others: as `weights_of` a model of the same
    kind gives them. Raises ValueError unless alpha is in [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"wise_ft: alpha must be from 0 to 1, got {alpha=}")
    for name, weight in _shards(model).items():
        local(weight).lerp_(local(others[name]), alpha)


def _shards(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, in the memory where the optimizer keeps them.

    After a forward pass without a backward pass, FSDP2 still holds the outermost module's whole parameters, and would
    compute with them whatever is written to their shards: so they are given up first.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
