"""Losses and gradients of one optimizer step, which depend on the global batch alone.

The negatives of the contrastive loss are the whole global batch: all processes and all micro-batches. With more than
one micro-batch, the step is GradCache (Gao et al. 2021): compute the embeddings of all micro-batches without a graph,
compute the gradient of the loss with respect to them, then run each micro-batch again, with the same dropout, and
backpropagate that gradient to the weights.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grr.components import fold_in
from grr.data import Batch
from grr.data.order import check_negatives
from grr.models.coca import CoCaOutput, evaluating
from grr.parallel.bf16 import recomputing
from grr.parallel.device import exact_dtype
from grr.parallel.process_group import all_sum, sum_over_processes
from grr.parallel.shard import gathered, reduce_gradients
from grr.seeds import derive_seed
from grr.training.contrast import Columns, contrast, gather_columns


class Losses(NamedTuple):
    """Losses of one or several global batches, and the settings that they depend on."""

    loss: float  # contrastive_weight * contrastive_loss + captioning_weight * captioning_loss
    contrastive_loss: float
    captioning_loss: float
    contrastive_batch: int  # pairs contrasted with each other; the chance level of the softmax loss is 2 ln of it
    contrastive_weight: float
    captioning_weight: float

    @property
    def perplexity(self) -> float:
        """Returns exp(captioning_loss); GRR-CoCa, equation 3."""
        return math.exp(min(self.captioning_loss, 700.0))

    def numbers(self) -> dict[str, float]:
        """Returns all fields and the perplexity by name, as in metrics.jsonl."""
        return {**self._asdict(), "perplexity": self.perplexity}


class StepLosses(NamedTuple):
    """Losses of one optimizer step, on the device: the parts of this process, whose sum over processes are the losses.

    A training loop that reads them only where it logs them never waits for the device in between.
    """

    contrastive_loss: Tensor  # float32 []
    captioning_loss: Tensor  # float32 []
    contrastive_batch: int
    contrastive_weight: float
    captioning_weight: float

    def read(self) -> Losses:
        """Returns the losses of the global batch. Waits for the device; all processes must call it."""
        contrast, captioning = sum_over_processes(torch.stack(self[:2])).tolist()
        loss = self.contrastive_weight * contrast + self.captioning_weight * captioning
        return Losses(loss, contrast, captioning, *self[2:])


def global_batch_step(
    model: nn.Module,
    batches: Sequence[Batch],
    seed: int,
    *,
    contrastive_weight: float = 2.0,
    captioning_weight: float = 1.0,
    contrastive: Literal["softmax", "sigmoid"] = "softmax",
    negatives: Literal["global", "local"] = "global",
) -> StepLosses:
    """Compute the losses of one optimizer step, and add their gradients to the model (GradCache, Gao et al. 2021).

    batches: the micro-batches of this process, equal in number and size in all processes; seed: of the dropout
    (`seed_dropout`). The captioning loss is the mean over all tokens of the global batch. With negatives="local", each
    micro-batch is contrasted within itself and the losses are averaged: a smaller, easier task, whose losses are not
    comparable with those of global negatives. Nothing in a step waits for the device.
    """
    world, micro = dist.get_world_size(), len(batches[0].images)
    check_negatives(world * micro * len(batches), micro, negatives)
    compute = _global_losses if negatives == "global" else _local_losses
    with gathered(model):
        contrast, captioning = compute(model, batches, seed, contrastive, contrastive_weight, captioning_weight)
    size = micro if negatives == "local" else world * sum(len(batch.names) for batch in batches)
    return StepLosses(contrast / world, captioning / world, size, contrastive_weight, captioning_weight)


def _global_losses(
    model: nn.Module,
    batches: Sequence[Batch],
    seed: int,
    kind: Literal["softmax", "sigmoid"],
    contrastive_weight: float,
    captioning_weight: float,
) -> tuple[Tensor, Tensor]:
    """Add the gradients of a step with global negatives; returns losses whose means over processes are the step's."""
    one_pass = len(batches) == 1
    outputs = [_forward(model, batches[0], seed, 0)] if one_pass else _embed(model, batches, seed)
    columns, (labels,) = _gather(outputs, _counts(outputs, batches))
    contrasted = _contrast(outputs, columns, kind)
    token_weight = dist.get_world_size() / labels.sum(dtype=exact_dtype(labels.device)).clamp(min=1)
    if one_pass:
        captioning = token_weight * _sum(outputs[0])
        _backward(model, contrastive_weight * contrasted + captioning_weight * captioning, last=True)
        return contrasted.detach(), captioning.detach()
    (contrastive_weight * contrasted).backward()
    captionings = []
    for i, (batch, leaf) in enumerate(zip(batches, outputs, strict=True)):
        output = _forward(model, batch, seed, i)
        captioning = token_weight * _sum(output)
        loss = captioning_weight * captioning + _carry_gradient(output, leaf)
        _backward(model, loss, last=i == len(batches) - 1)
        captionings.append(captioning.detach())
    return contrasted.detach(), torch.stack(captionings).sum()


def _local_losses(
    model: nn.Module,
    batches: Sequence[Batch],
    seed: int,
    kind: Literal["softmax", "sigmoid"],
    contrastive_weight: float,
    captioning_weight: float,
) -> tuple[Tensor, Tensor]:
    """As `_global_losses`, where each micro-batch is contrasted within itself."""
    labels = sum(batch.num_labels for batch in batches)
    device = batches[0].ids.device
    labels_of_all = sum_over_processes(torch.full((), labels, dtype=exact_dtype(device), device=device))
    token_weight = dist.get_world_size() / labels_of_all.clamp(min=1)
    losses = []
    for i, batch in enumerate(batches):
        output = _forward(model, batch, seed, i)
        contrasted, captioning = _contrast([output], None, kind) / len(batches), token_weight * _sum(output)
        loss = contrastive_weight * contrasted + captioning_weight * captioning
        _backward(model, loss, last=i == len(batches) - 1)
        losses.append(torch.stack((contrasted, captioning)).detach())
    contrast, captioning = torch.stack(losses).sum(dim=0)
    return contrast, captioning


def _backward(model: nn.Module, loss: Tensor, *, last: bool) -> None:
    """Add the gradients of a micro-batch; FSDP averages them over processes, with `gathered` at the last one only."""
    if last:
        reduce_gradients(model)
    with recomputing(model):
        loss.backward()


@torch.no_grad()
def evaluation_losses(
    model: nn.Module,
    steps: Iterable[Sequence[Batch]],
    *,
    contrastive_weight: float = 2.0,
    captioning_weight: float = 1.0,
    contrastive: Literal["softmax", "sigmoid"] = "softmax",
    negatives: Literal["global", "local"] = "global",
) -> Losses:
    """Compute the same losses without gradients and dropout over many global batches, from `validation_steps`.

    The captioning loss is the mean over all tokens of all batches. The contrastive loss is the mean over the batches
    marked `contrast`; with local negatives, over their full micro-batches. Raises ValueError if fewer than two pairs of
    a batch, or no tokens, could be read.
    """
    contrasts, count, size, captioning, tokens = [0.0], 0, 0, 0.0, 0
    with evaluating(model):
        for batches in steps:
            outputs = [_run(model, batch) for batch in batches]
            captioning += torch.stack([_sum(output) for output in outputs]).sum().item()
            tokens += sum(batch.num_labels for batch in batches)
            if not batches[0].contrast:
                continue
            if negatives == "local":
                whole = [o for o, b in zip(outputs, batches, strict=True) if len(b.names) == len(b.images)]
                contrasts += [_contrast([o], None, contrastive).item() for o in whole]
                count, size = count + len(whole), len(batches[0].images)
            elif (pairs := int(all_sum(sum(len(b.names) for b in batches))[0])) > 1:
                columns, (kept,) = _gather(outputs, _kept(batches))
                contrasts.append(_contrast(outputs, columns._replace(kept=kept > 0), contrastive).item())
                count, size = count + 1, max(size, pairs)
    contrast, counted, captioning, all_tokens = all_sum(sum(contrasts), count, captioning, tokens)
    if not counted or not all_tokens:
        raise ValueError(
            "evaluation_losses: a batch must hold two readable pairs, and no validation batch does; the log names the "
            "bad samples"
        )
    contrast, captioning = contrast / counted, captioning / all_tokens
    loss = contrastive_weight * contrast + captioning_weight * captioning
    return Losses(loss, contrast, captioning, size, contrastive_weight, captioning_weight)


def seed_dropout(batch: Batch, seed: int, index: int) -> Tensor:
    """Seed the dropout of micro-batch `index` of this process, and return the keys of its samples, int64 [b].

    A key depends on the seed and the sample's index in the global batch, in the order in which
    `grr.data.training_steps` cuts it into micro-batches, so the dropout is the same for any number of processes and
    micro-batches. Modules that draw from torch's generator instead, such as nn.Dropout in a user's encoder, are seeded
    by the index of the micro-batch in the global batch, so their dropout changes with the size of a micro-batch.
    """
    place, b = index * dist.get_world_size() + dist.get_rank(), len(batch.ids)
    torch.manual_seed(derive_seed(seed, place))
    return fold_in(derive_seed(seed), torch.arange(place * b, (place + 1) * b, device=batch.ids.device))


def _embed(model: nn.Module, batches: Sequence[Batch], seed: int) -> list[CoCaOutput]:
    """Compute the embeddings of all micro-batches without a graph: the leaves that GradCache differentiates."""
    embed: Any = model.embed
    leaves = []
    with torch.no_grad():
        for i, batch in enumerate(batches):
            keys = seed_dropout(batch, seed, i)
            given = {"positions": batch.positions, "cls_places": batch.cls_places, "sample_keys": keys}
            leaves.append(embed(batch.images, batch.ids, **given))
    return [CoCaOutput(*(x.detach().requires_grad_() for x in leaf[:4])) for leaf in leaves]


def _carry_gradient(output: CoCaOutput, leaf: CoCaOutput) -> Tensor | int:
    """Returns a scalar whose gradient with respect to `output` is the gradient that was computed for `leaf`."""
    products = [
        (x * x_leaf.grad).sum()
        for x, x_leaf in zip(output[:4], leaf[:4], strict=True)
        if x.requires_grad and x_leaf.grad is not None
    ]
    return sum(products)


def _forward(model: nn.Module, batch: Batch, seed: int, index: int) -> CoCaOutput:
    return _run(model, batch, sample_keys=seed_dropout(batch, seed, index))


def _run(model: nn.Module, batch: Batch, *, sample_keys: Tensor | None = None) -> CoCaOutput:
    output: CoCaOutput = model(
        batch.images,
        batch.ids,
        positions=batch.positions,
        labels=batch.labels,
        label_places=batch.label_places,
        cls_places=batch.cls_places,
        sample_keys=sample_keys,
    )
    return output


def _contrast(outputs: Sequence[CoCaOutput], columns: Columns | None, kind: Literal["softmax", "sigmoid"]) -> Tensor:
    """Compute this process's part of the contrastive loss of some micro-batches; None: of these alone."""
    image, text = _embeddings(outputs)
    if columns is None:
        columns = Columns(image.detach(), text.detach())
    return contrast(image, text, outputs[0].scale, outputs[0].bias, columns, kind=kind)


def _gather(outputs: Sequence[CoCaOutput], *numbers: Tensor) -> tuple[Columns, tuple[Tensor, ...]]:
    """Gather the embeddings of some micro-batches of all processes, and numbers [b] of their pairs beside them."""
    return gather_columns(*_embeddings(outputs), *numbers)


def _embeddings(outputs: Sequence[CoCaOutput]) -> tuple[Tensor, Tensor]:
    return torch.cat([o.image_embeddings for o in outputs]), torch.cat([o.text_embeddings for o in outputs])


def _counts(outputs: Sequence[CoCaOutput], batches: Sequence[Batch]) -> Tensor:
    """Returns numbers of labels whose sum is that of this process, [b]; made without a wait for the device."""
    counts = torch.cat([o.image_embeddings.new_zeros(len(o.image_embeddings)) for o in outputs])
    counts[:1].fill_(sum(batch.num_labels for batch in batches))
    return counts


def _kept(batches: Sequence[Batch]) -> Tensor:
    """Returns which rows of some micro-batches are samples, bool [b]."""
    return torch.cat([torch.ones_like(b.ids[:, 0]).bool() if b.kept is None else b.kept for b in batches])


def _sum(output: CoCaOutput) -> Tensor:
    assert output.token_losses is not None
    return output.token_losses.sum()
