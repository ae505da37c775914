"""Contrastive losses over all processes: each computes its own rows of the logits, some at a time.

A process holds B embeddings and CHUNK logits, never B x B. Its rows of the gradient need nothing of the other processes
but the log-sum-exps of their rows, so gradients of embeddings are not reduced.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import logsigmoid

from grr.parallel.process_group import all_rows

CHUNK = 2**24  # logits in memory at a time, in several tensors; but at least those of one row


class Columns(NamedTuple):
    """Embeddings that those of this process are contrasted with: its own, or those of all processes.

    images, texts: [B, e], without a gradient. first: the place in them of the first row of this process. kept: bool
    [B], which pairs count; None: all.
    """

    images: Tensor
    texts: Tensor
    first: int = 0
    kept: Tensor | None = None


def gather_columns(image: Tensor, text: Tensor, *numbers: Tensor) -> tuple[Columns, tuple[Tensor, ...]]:
    """Gather the embeddings of all processes, and numbers of each pair, by one all-gather.

    image, text: [b, e], equal b everywhere; numbers: [b] each, exact in the dtype of the embeddings, such as token
    counts -> the columns, and the numbers as [B], in the order of the processes.
    """
    e = image.shape[1]
    together = torch.cat((image, text, *(x.to(image.dtype)[:, None] for x in numbers)), dim=1)  # [b, 2e + n]
    rows = all_rows(together)  # [B, 2e + n]
    return Columns(rows[:, :e], rows[:, e : 2 * e], dist.get_rank() * len(image)), rows[:, 2 * e :].unbind(dim=1)


def contrast(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    columns: Columns,
    *,
    kind: Literal["softmax", "sigmoid"] = "softmax",
) -> Tensor:
    """Compute this process's part of `contrastive_loss` or `sigmoid_loss` over all columns.

    image, text: [b, e], the embeddings of this process; scale, bias: [1]; bias is for the sigmoid loss -> scalar. The
    mean of the parts over the processes is the loss of all pairs, and the mean of their gradients with respect to the
    parameters, which FSDP computes, is its gradient, if the part of each process has the same weight in its total loss.
    """
    scale, bias = scale.to(image.dtype), bias.to(image.dtype)
    if kind == "sigmoid":
        return _Sigmoid.apply(image, text, scale, bias, *columns)  # type: ignore[no-untyped-call]
    return _Softmax.apply(image, text, scale, *columns)  # type: ignore[no-untyped-call]


class _Softmax(torch.autograd.Function):
    """With p the softmax of the logits along the texts, and q along the images: dL/dz = p + q - 2 I."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        images: Tensor,
        texts: Tensor,
        first: int,
        kept: Tensor | None,
    ) -> Tensor:
        over_texts = torch.cat([z.logsumexp(dim=1) for _, z in _logits(image, texts, scale, None, kept)])  # [b]
        over_images = torch.cat([z.logsumexp(dim=1) for _, z in _logits(text, images, scale, None, kept)])  # [b]
        weights = _weights(image, images, first, kept)
        ctx.save_for_backward(image, text, scale, images, texts, kept, over_texts, over_images, weights)
        return ((over_texts + over_images - 2 * scale * (image * text).sum(dim=1)) * weights).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale, images, texts, kept, over_texts, over_images, weights = ctx.saved_tensors
        sums = torch.stack((over_texts, over_images), dim=1)  # [b, 2]
        all_over_texts, all_over_images = (all_rows(sums) if len(images) > len(image) else sums).unbind(dim=1)  # [B]

        def row_gradients(rows: Tensor, columns: Tensor, of_rows: Tensor, of_columns: Tensor) -> Tensor:
            products = []
            for some, z in _logits(rows, columns, scale, None, kept):
                p = (z - of_rows[some, None]).exp_()
                products.append(p.add_(z.sub_(of_columns).exp_()) @ columns)
            return torch.cat(products)  # [b, e]

        weights = (weights * gradient)[:, None]
        to_image = (row_gradients(image, texts, over_texts, all_over_images) - 2 * text) * weights
        to_text = (row_gradients(text, images, over_images, all_over_texts) - 2 * image) * weights
        to_scale = (image * to_image).sum().expand(1)  # the logits are linear in the image and in the scale
        return to_image * scale, to_text * scale, to_scale, None, None, None, None


class _Sigmoid(torch.autograd.Function):
    """-log sigmoid(m z), m = 1 for a match and -1 otherwise, is softplus(z) - [match] z: dL/dz = sigmoid(z) - I."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        images: Tensor,
        texts: Tensor,
        first: int,
        kept: Tensor | None,
    ) -> Tensor:
        softplus = torch.cat([-logsigmoid(-z).sum(dim=1) for _, z in _logits(image, texts, scale, bias, kept)])  # [b]
        weights = _weights(image, images, first, kept)
        ctx.save_for_backward(image, text, scale, bias, images, texts, kept, weights)
        return ((softplus - scale * (image * text).sum(dim=1) - bias) * weights).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale, bias, images, texts, kept, weights = ctx.saved_tensors

        def row_gradients(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
            products, sums = [], []
            for _, z in _logits(rows, columns, scale, bias, kept):
                sums.append(z.sigmoid_().sum(dim=1))
                products.append(z @ columns)
            return torch.cat(products), torch.cat(sums)  # [b, e], [b]

        weights = weights * gradient
        to_image, sums = row_gradients(image, texts)
        to_image = (to_image - text) * weights[:, None]
        to_text = (row_gradients(text, images)[0] - image) * weights[:, None]
        to_scale, to_bias = (image * to_image).sum().expand(1), ((sums - 1) * weights).sum().expand(1)
        return to_image * scale, to_text * scale, to_scale, to_bias, None, None, None, None


def _logits(
    rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor | None, kept: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the logits of some rows at a time, [c, B], with their places; -inf in columns that do not count."""
    size = max(1, CHUNK // len(columns))
    for start in range(0, len(rows), size):
        some = slice(start, start + size)
        z = (rows[some] @ columns.T).mul_(scale)
        if bias is not None:
            z.add_(bias)
        yield some, z if kept is None else z.masked_fill_(~kept, -math.inf)


def _weights(rows: Tensor, columns: Tensor, first: int, kept: Tensor | None) -> Tensor:
    """Returns the weight of each row's loss in the part of this process, [b]."""
    if kept is None:
        return rows.new_full((len(rows),), 1 / len(rows))
    kept = kept.to(rows.dtype)
    return kept[first : first + len(rows)] * (len(columns) / len(rows)) / kept.sum()
