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
from grr.parallel.process_group import all_sum, gather, sum_over_processes
from grr.seeds import derive_seed
from grr.training.loss import contrastive_loss, sigmoid_loss


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
    device = batches[0].ids.device
    labels = torch.full((), sum(batch.num_labels for batch in batches), dtype=torch.float64, device=device)
    token_share = 1 / sum_over_processes(labels).clamp(min=1)  # of a token in the mean over the global batch
    token_weight = captioning_weight * world * token_share  # FSDP averages gradients over processes
    tokens, contrasts = list[Tensor](), list[Tensor]()  # sums of token losses and contrastive losses, of micro-batches

    if negatives == "local" or len(batches) == 1:
        for i, batch in enumerate(batches):
            output = _forward(model, batch, seed, i)
            contrasts.append(_contrast([output], contrastive, negatives) / len(batches))
            tokens.append(_sum(output))
            with recomputing(model):
                (contrastive_weight * contrasts[-1] + token_weight * tokens[-1]).backward()
    else:
        leaves = _embed(model, batches, seed)
        contrasts.append(_contrast(leaves, contrastive, negatives))
        (contrastive_weight * contrasts[-1]).backward()
        for i, (batch, leaf) in enumerate(zip(batches, leaves, strict=True)):
            output = _forward(model, batch, seed, i)
            tokens.append(_sum(output))
            carried = _carry_gradient(output, leaf)
            with recomputing(model):
                (token_weight * tokens[-1] + carried).backward()

    with torch.no_grad():
        contrast = torch.stack(contrasts).sum() / world
        captioning = torch.stack(tokens).sum() * token_share
    size = micro if negatives == "local" else world * sum(len(batch.names) for batch in batches)
    return StepLosses(contrast, captioning, size, contrastive_weight, captioning_weight)


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
                contrasts += [_contrast([o], contrastive, negatives).item() for o in whole]
                count, size = count + len(whole), len(batches[0].images)
            elif (pairs := int(all_sum(sum(len(b.names) for b in batches))[0])) > 1:
                contrasts.append(_contrast(outputs, contrastive, negatives, kept=_kept(batches)).item())
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


def _contrast(outputs: Sequence[CoCaOutput], kind: str, negatives: str, *, kept: Tensor | None = None) -> Tensor:
    """Compute the contrastive loss of some micro-batches together, over all processes if the negatives are global.

    kept: bool [b], the rows to include; None: all.
    """
    image, text = (torch.cat([o[i] for o in outputs]) for i in (0, 1))  # type: ignore[misc]
    if negatives == "global":
        image, text = gather(image), gather(text)
    if kept is not None:
        kept = gather(kept.byte()).bool() if negatives == "global" else kept  # gloo cannot gather bool
        image, text = image[kept], text[kept]
    if kind == "sigmoid":
        return sigmoid_loss(image, text, 1 / outputs[0].scale, outputs[0].bias)
    return contrastive_loss(image, text, 1 / outputs[0].scale)


def _kept(batches: Sequence[Batch]) -> Tensor | None:
    """Returns which rows of some micro-batches are samples, bool [b]; None if all are."""
    if batches[0].kept is None:
        return None
    return torch.cat([batch.kept for batch in batches if batch.kept is not None])


def _sum(output: CoCaOutput) -> Tensor:
    assert output.token_losses is not None
    return output.token_losses.sum()
