"""Losses of a contrastive captioner: contrastive (softmax or sigmoid) and captioning."""

import torch
import torch.nn.functional as F
from torch import Tensor

from grr.data.collate import IGNORE
from grr.models.head import at_least_float32


def contrastive_loss(image_embeddings: Tensor, text_embeddings: Tensor, temperature: float | Tensor = 0.07) -> Tensor:
    """Compute the cross-entropy of choosing the text of an image, plus that of choosing the image of a text.

    Both [b, e], unit length, row i of one belongs to row i of the other -> scalar. The two directions are summed, not
    averaged; each is a mean over b. Source: GRR-CoCa, equation 1. Raises ValueError if the shapes differ, or if the
    temperature is a number that is not positive.
    """
    _check_pairs("contrastive_loss", image_embeddings, text_embeddings)
    _check_temperature("contrastive_loss", temperature)
    logits = image_embeddings @ text_embeddings.T / temperature  # [b, b]
    match = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, match) + F.cross_entropy(logits.T, match)


def sigmoid_loss(
    image_embeddings: Tensor, text_embeddings: Tensor, temperature: float | Tensor = 0.1, bias: float | Tensor = -10.0
) -> Tensor:
    """Compute the binary cross-entropy of all b^2 pairs, match or not; summed over texts, averaged over images.

    Both [b, e], unit length -> scalar. Source: Zhai et al. 2023 (SigLIP), equation 2 and algorithm 1.
    Raises ValueError as `contrastive_loss` does.
    """
    _check_pairs("sigmoid_loss", image_embeddings, text_embeddings)
    _check_temperature("sigmoid_loss", temperature)
    logits = image_embeddings @ text_embeddings.T / temperature + bias  # [b, b]
    sign = 2 * torch.eye(len(logits), device=logits.device) - 1  # 1 on the diagonal, -1 elsewhere
    return -F.logsigmoid(sign * logits).sum() / len(logits)


def captioning_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean next-token cross-entropy over labels that are not IGNORE; perplexity is its exponential.

    logits: [b, s, v], labels: [b, s] -> scalar. Source: GRR-CoCa, equations 2 and 3. Training computes the same from
    hidden vectors with `token_losses`.
    """
    return F.cross_entropy(at_least_float32(logits.flatten(0, 1)), labels.flatten(), ignore_index=IGNORE)


def _check_pairs(who: str, image_embeddings: Tensor, text_embeddings: Tensor) -> None:
    if image_embeddings.dim() != 2 or image_embeddings.shape != text_embeddings.shape:
        raise ValueError(
            f"{who}: image and text embeddings must both be [b, e], got {list(image_embeddings.shape)} and "
            f"{list(text_embeddings.shape)}; row i of one must belong to row i of the other"
        )


def _check_temperature(who: str, temperature: float | Tensor) -> None:
    if not isinstance(temperature, Tensor) and not temperature > 0:  # the value of a tensor may be on a GPU: no wait
        raise ValueError(f"{who}: temperature must be positive, got {temperature=}; the paper has 0.07")
