"""The losses and gradients of one optimizer step, which depend on the global batch alone.

The negatives of a contrastive loss are the whole global batch: all processes and all micro-batches. Where that is more
than one micro-batch, embeddings are computed first without a graph, the loss is differentiated with respect to them,
and each micro-batch is run again, with the same dropout, to carry that gradient to the weights (Gao et al. 2021).
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grr.components import fold_in
from grr.data import Batch
from grr.data.collate import IGNORE
from grr.data.order import check_negatives
from grr.models.coca import CoCaOutput, evaluating
from grr.parallel.bf16 import recomputing
from grr.parallel.process_group import all_sum, gather
from grr.seeds import derive_seed
from grr.training.loss import contrastive_loss, sigmoid_loss


class Losses(NamedTuple):
    """The losses of a global batch, or of many, and what they depend on."""

    loss: float  # contrastive_weight * contrastive_loss + captioning_weight * captioning_loss
    contrastive_loss: float
    captioning_loss: float
    contrastive_batch: int  # pairs that are contrasted with each other; 2 ln of it is the loss of guessing
    contrastive_weight: float
    captioning_weight: float

    @property
    def perplexity(self) -> float:
        """exp(captioning_loss); GRR-CoCa, equation 3."""
        return math.exp(min(self.captioning_loss, 700.0))

    def numbers(self) -> dict[str, float]:
        """The paper's numbers by name, as the log has them."""
        return {**self._asdict(), "perplexity": self.perplexity}


def global_batch_step(
    model: nn.Module,
    batches: Sequence[Batch],
    seed: int,
    *,
    contrastive_weight: float = 2.0,
    captioning_weight: float = 1.0,
    contrastive: Literal["softmax", "sigmoid"] = "softmax",
    negatives: Literal["global", "local"] = "global",
) -> Losses:
    """Add the gradients of one optimizer step to the model, and give its losses.

    `batches` are the micro-batches of this process, equally many and equally large everywhere; `seed` draws the
    dropout (`seed_dropout`). The captioning loss is the mean over all tokens of the global batch. With local
    negatives, each micro-batch of each process is contrasted in itself, and the losses are averaged: a smaller, easier
    task, whose numbers may not be compared with those of the global batch.
    """
    world, micro = dist.get_world_size(), len(batches[0].images)
    check_negatives(world * micro * len(batches), micro, negatives)
    tokens = _count_tokens(batches)
    share = captioning_weight * world / tokens  # FSDP takes the mean over processes
    captioning = []  # of each micro-batch; read at the end, for reading a number waits for the device

    if negatives == "local" or len(batches) == 1:
        contrasts = []
        for i, batch in enumerate(batches):
            output = _forward(model, batch, seed, i)
            contrasts.append(_contrast([output], contrastive, negatives) / len(batches))
            with recomputing(model):
                (contrastive_weight * contrasts[-1] + share * _sum(output)).backward()
            captioning.append(_sum(output).detach())
        total = torch.stack([c.detach() for c in contrasts]).sum().item()
        return _losses(total, _total(captioning) / tokens, contrastive_weight, captioning_weight, negatives, batches)

    leaves = []
    with torch.no_grad():
        for i, batch in enumerate(batches):
            keys = seed_dropout(batch, seed, i)
            embed: Any = model.embed
            leaves.append(embed(batch.images, batch.ids, positions=batch.positions, sample_keys=keys))
    leaves = [CoCaOutput(*(x.detach().requires_grad_() for x in leaf[:4])) for leaf in leaves]
    contrast = _contrast(leaves, contrastive, negatives)
    (contrastive_weight * contrast).backward()
    for i, (batch, leaf) in enumerate(zip(batches, leaves, strict=True)):
        output = _forward(model, batch, seed, i)
        carried = [
            (x * x_leaf.grad).sum()
            for x, x_leaf in zip(output[:4], leaf[:4], strict=True)
            if x.requires_grad and x_leaf.grad is not None
        ]
        with recomputing(model):
            (share * _sum(output) + sum(carried)).backward()
        captioning.append(_sum(output).detach())
    return _losses(
        contrast.item(), _total(captioning) / tokens, contrastive_weight, captioning_weight, negatives, batches
    )


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
    """The same losses without gradients and without dropout, over many global batches, as `validation_steps` cuts them.

    The captioning loss is the mean over all tokens of all batches. The contrastive loss is the mean over the batches
    that are to be contrasted; with local negatives over their full micro-batches.
    """
    contrasts, count, size, captioning, tokens = [0.0], 0, 0, 0.0, 0
    with evaluating(model):
        for batches in steps:
            outputs = [model(b.images, b.ids, positions=b.positions, labels=b.labels) for b in batches]
            captioning += sum(_sum(o).item() for o in outputs)
            tokens += sum(int((b.labels != IGNORE).sum()) for b in batches)
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
            "evaluation_losses: no two pairs of the validation data could be read; the log names the bad ones"
        )
    contrast, captioning = contrast / counted, captioning / all_tokens
    loss = contrastive_weight * contrast + captioning_weight * captioning
    return Losses(loss, contrast, captioning, size, contrastive_weight, captioning_weight)


def seed_dropout(batch: Batch, seed: int, index: int) -> Tensor:
    """Seed the dropout of micro-batch `index` of this process, and return the keys of its samples, int64 [b].

    A key depends on the seed and on the sample's place in the global batch, which `grr.data.training_steps` cuts into
    micro-batches: any number of processes and micro-batches draws the same dropout. What draws from torch's generator
    instead, such as nn.Dropout in a user's own encoder, draws by the micro-batch's place in the global batch, so there
    a micro-batch of another size draws another dropout.
    """
    place, b = index * dist.get_world_size() + dist.get_rank(), len(batch.ids)
    torch.manual_seed(derive_seed(seed, place))
    return fold_in(derive_seed(seed), torch.arange(place * b, (place + 1) * b, device=batch.ids.device))


def check_finite(losses: NamedTuple, norm: float, step: int, batches: Sequence[Batch], folder: Path) -> None:
    """Stop all processes before an update that would ruin the weights, and name the pairs that led to it.

    losses: with a field `loss`; norm: of the gradient. Writes folder/non_finite_step_N.json, in which a number that is
    not finite is null. Raises FloatingPointError if the loss or the norm is not finite.
    """
    if math.isfinite(losses.loss) and math.isfinite(norm):  # type: ignore[attr-defined]
        return
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, [batch.names for batch in batches])
    file = folder / f"non_finite_step_{step}.json"
    if dist.get_rank() == 0:
        numbers = {key: x if math.isfinite(x) else None for key, x in (losses._asdict() | {"grad_norm": norm}).items()}
        file.write_text(json.dumps({"step": step, **numbers, "names": names}, allow_nan=False))
    advice = (
        "Look at those pairs, or lower optimizer.lr or raise schedule.warmup_steps, and submit the same command again"
    )
    if (folder / "checkpoints").is_dir():
        advice += (
            ": it continues from the last checkpoint, and names the option that accepts the change. If this is the "
            f"first step since a resume, delete the newest folder in {folder / 'checkpoints'} to continue from the one "
            "before"
        )
    raise FloatingPointError(
        f"check_finite: the loss and its gradient must be finite, got {losses} and a norm of {norm} at step {step}, in "
        f"the batch of {names[0][0][0]} (all its names are in {file}); the weights were not updated, and not saved. "
        + advice
    )


def _forward(model: nn.Module, batch: Batch, seed: int, index: int) -> CoCaOutput:
    keys = seed_dropout(batch, seed, index)
    output: CoCaOutput = model(
        batch.images, batch.ids, positions=batch.positions, labels=batch.labels, sample_keys=keys
    )
    return output


def _contrast(outputs: Sequence[CoCaOutput], kind: str, negatives: str, *, kept: Tensor | None = None) -> Tensor:
    """The contrastive loss of some micro-batches taken together, and of all processes if the negatives are global.

    kept: bool [b], the rows that count; None: all.
    """
    image, text = (torch.cat([o[i] for o in outputs]) for i in (0, 1))  # type: ignore[misc]
    if negatives == "global":
        image, text = gather(image), gather(text)
    if kept is not None:
        kept = gather(kept.byte()).bool() if negatives == "global" else kept  # gloo gathers no bool
        image, text = image[kept], text[kept]
    if kind == "sigmoid":
        return sigmoid_loss(image, text, 1 / outputs[0].scale, outputs[0].bias)
    return contrastive_loss(image, text, 1 / outputs[0].scale)


def _kept(batches: Sequence[Batch]) -> Tensor | None:
    """The rows of some micro-batches that are samples, bool [b]; None if all are."""
    if batches[0].kept is None:
        return None
    return torch.cat([batch.kept for batch in batches if batch.kept is not None])


def _sum(output: CoCaOutput) -> Tensor:
    assert output.token_losses is not None
    return output.token_losses.sum()


def _total(sums: Sequence[Tensor]) -> float:
    return torch.stack(list(sums)).double().sum().item()


def _count_tokens(batches: Sequence[Batch]) -> int:
    return int(all_sum(sum(int((b.labels != IGNORE).sum()) for b in batches))[0])


def _losses(
    contrast: float,
    captioning: float,
    contrastive_weight: float,
    captioning_weight: float,
    negatives: str,
    batches: Sequence[Batch],
) -> Losses:
    """Make one process's parts whole: captioning is its share of the global mean."""
    world = dist.get_world_size()
    all_contrast, captioning = all_sum(contrast, captioning)
    local = negatives == "local"
    contrast = all_contrast / world if local else contrast
    size = len(batches[0].names) if local else world * sum(len(b.names) for b in batches)
    loss = contrastive_weight * contrast + captioning_weight * captioning
    return Losses(loss, contrast, captioning, size, contrastive_weight, captioning_weight)
