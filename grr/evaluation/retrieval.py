"""Retrieval metrics: recall of the image of a text, and of a text of an image."""

import math

import torch
from torch import Tensor

from grr.parallel.device import where_float64_is

CHUNK = 512  # texts compared with all images at a time: with 30,000 images, 123 MB of scores
BITS = 26  # a product of two numbers of 26 bits fits into the 53 that float64 keeps


def retrieval(
    image_embeddings: Tensor, text_embeddings: Tensor, image_of_text: Tensor, *, chunk: int = CHUNK
) -> dict[str, float]:
    """Compute recall at 1, 5 and 10 in both directions, as fractions: image_to_text_r1 ... text_to_image_r10.

    image_embeddings: [n, e], text_embeddings: [m, e], image_of_text: [m], the row of the image of each text. An image
    counts as retrieved if any of its texts is among the k nearest (Karpathy and Fei-Fei 2015); images without texts are
    left out. A tie counts as a miss: candidates that score equal to the right one rank before it, so a model with a
    constant embedding has recall 0. Scores are sums without rounding, so ranks depend neither on chunk nor machine.
    Raises ValueError if there is no text, if shapes do not fit, or if an embedding is not finite.
    """
    _check(image_embeddings, text_embeddings, image_of_text)
    image_embeddings, text_embeddings = map(where_float64_is, (image_embeddings, text_embeddings))
    image, text = (
        whole_numbers(x, longest=x.double().norm(dim=1).max().item()) for x in (image_embeddings, text_embeddings)
    )
    owner = image_of_text.to(image.device)
    chunks = list(zip(text.split(chunk), owner.split(chunk), strict=True))
    right = torch.cat([(some * image[own]).sum(1) for some, own in chunks])  # [m]: each text with its image
    best = right.new_full((len(image),), -torch.inf).scatter_reduce(
        0, owner, right, "amax"
    )  # [n]: the best text of each image

    before_text, before_image = [], -torch.bincount(owner[right == best[owner]], minlength=len(image))
    for (some, _), right_score in zip(chunks, right.split(chunk), strict=True):
        scores = some @ image.T  # [chunk, n]
        before_text.append((scores >= right_score.unsqueeze(1)).sum(1) - 1)  # all but the right image itself
        before_image += (scores >= best).sum(0)  # [n]: all but the image's texts, subtracted above
    recalls = {}
    ranks = {"image_to_text": before_image[best > -torch.inf], "text_to_image": torch.cat(before_text)}
    for direction, rank in ranks.items():
        for k in (1, 5, 10):
            recalls[f"{direction}_r{k}"] = (rank < k).double().mean().item()
    return recalls


def whole_numbers(embeddings: Tensor, *, longest: float) -> Tensor:
    """Scale by a power of two and round, so that a row of length `longest` is at most 2^26 long: [n, e] -> float64.

    By the Cauchy-Schwarz inequality, no sum of products of two rows, nor a partial sum, exceeds 2^53, below which
    float64 adds whole numbers exactly in any order. The rounding is below the resolution of a float32 score.
    """
    return (embeddings.double() * math.ldexp(1.0, BITS - math.frexp(longest)[1])).round_()


def _check(image_embeddings: Tensor, text_embeddings: Tensor, image_of_text: Tensor) -> None:
    shapes = f"got {list(image_embeddings.shape)}, {list(text_embeddings.shape)} and {list(image_of_text.shape)}"
    fits = image_embeddings.dim() == text_embeddings.dim() == 2 and image_of_text.shape == text_embeddings.shape[:1]
    if not fits or image_embeddings.shape[1] != text_embeddings.shape[1]:
        raise ValueError(
            f"retrieval: image_embeddings must be [n, e], text_embeddings [m, e] and image_of_text [m], {shapes}; "
            "image_of_text holds, for each text, the row of its image"
        )
    if len(image_of_text) == 0:
        raise ValueError(f"retrieval: there must be at least one text, {shapes}; check that the split is not empty")
    first, last = int(image_of_text.min()), int(image_of_text.max())
    if first < 0 or last >= len(image_embeddings):
        raise ValueError(
            f"retrieval: image_of_text must hold rows of image_embeddings, which has {len(image_embeddings)}, got "
            f"{first} to {last}; count images from 0, in the order of their embeddings"
        )
    for name, x in (("image_embeddings", image_embeddings), ("text_embeddings", text_embeddings)):
        if not x.isfinite().all():
            row = int((~x.isfinite()).any(1).nonzero()[0, 0])
            raise ValueError(
                f"retrieval: {name} must be finite, got {x[row, :4].tolist()} ... in row {row}; check the weights"
            )
