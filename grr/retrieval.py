"""Find the image of a sentence among others, and a sentence of an image."""

import torch
from torch import Tensor


def retrieval(image_embeddings: Tensor, text_embeddings: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions, as fractions.

    image_embeddings: [n, e], text_embeddings: [m, e], image_of_text: [m], the row of each text's image. An image is
    found when any of its texts is among the k nearest. A tie counts against: what scores equal to the right answer
    stands before it, so a model that gives one embedding for everything finds nothing.
    """
    scores = text_embeddings @ image_embeddings.T  # [m, n]
    texts = torch.arange(len(scores), device=scores.device)
    right = scores[texts, image_of_text]  # [m]
    text_rank = (scores >= right.unsqueeze(1)).sum(1) - 1  # [m]: images that stand before the right one

    own = image_of_text.unsqueeze(1) == torch.arange(len(image_embeddings), device=scores.device)  # [m, n]
    best_own = scores.masked_fill(~own, -torch.inf).amax(0)  # [n]
    image_rank = (scores.masked_fill(own, -torch.inf) >= best_own).sum(0)  # [n]: texts of others that stand before
    has_text = own.any(0)
    recalls = {}
    for direction, rank in (("image_to_text", image_rank[has_text]), ("text_to_image", text_rank)):
        for k in (1, 5, 10):
            recalls[f"{direction}_r{k}"] = (rank < k).float().mean().item()
    return recalls
