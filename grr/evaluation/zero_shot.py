"""Zero-shot classification: the class of an image is that of the nearest text embedding (CLIP, Radford et al. 2021)."""

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from grr.checkpoint.finite import check_finite_outputs
from grr.data.collate import collate_captions
from grr.models.coca import CoCa, evaluating
from grr.parallel.device import where_float64_is
from grr.tokenizers import Tokenizer

BATCH = 200  # texts
TEMPLATES = ("a photo of a {}", "a photo of the {}", "a picture of one {}", "an image that shows a {}")


@torch.no_grad()
def class_embeddings(
    model: CoCa,
    tokenizer: Tokenizer,
    classes: Sequence[str],
    device: torch.device,
    *,
    templates: tuple[str, ...] = TEMPLATES,
) -> Tensor:
    """Embed c classes, each as the normalised mean of its prompts: float32 [c, e], unit length.

    A prompt is a template with the class name in place of {}. Scores of images are then
    image_embeddings @ class_embeddings.T. Source: CLIP (Radford et al. 2021), section 3.1.4.
    Raises ValueError if there is no class, a class occurs twice, or a template does not contain {} once.
    """
    _check_texts(classes, templates)
    texts = [template.replace("{}", name) for name in classes for template in templates]
    embeddings = embed_texts(model, tokenizer, texts, device)
    of_class = embeddings.unflatten(0, (len(classes), len(templates)))  # [c, templates, e]
    return F.normalize(of_class.mean(1), dim=-1)


@torch.no_grad()
def embed_texts(model: CoCa, tokenizer: Tokenizer, texts: Sequence[str], device: torch.device) -> Tensor:
    """Embed n >= 1 texts: float32 [n, e], unit length. Raises ValueError if the model computes NaN."""
    embeddings = []
    with evaluating(model):
        for start in range(0, len(texts), BATCH):
            rows = [tokenizer.encode(text) for text in texts[start : start + BATCH]]
            ids, positions, *_ = collate_captions(rows, pad_id=tokenizer.pad_id)
            embeddings.append(model.encode_text(ids.to(device), positions=positions.to(device)))
    joined = torch.cat(embeddings)
    check_finite_outputs("embed_texts", joined, texts)
    return joined


@torch.no_grad()
def class_probabilities(model: CoCa, images: Tensor, classes: Tensor, *, who: str, of: Sequence[str]) -> Tensor:
    """Compute the probability of each class for b images: softmax(cosine similarities / temperature), float64 [b, c].

    images: as `CoCa.encode_image` takes them, classes: [c, e] of `class_embeddings`, `who` and `of`: the function and
    the names of the images, for messages. Raises ValueError if the model computes NaN or infinity.
    """
    scale, _ = model.logit_scale(images.device)
    scores = where_float64_is(model.encode_image(images) @ classes.T * scale).double()  # [b, c]
    check_finite_outputs(who, scores, of)
    return scores.softmax(1)


def accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Compute top_1, top_5 if there are more than five classes, and mean_per_class accuracy, as fractions.

    scores: [n, c], labels: [n], each from 0 to c - 1. mean_per_class is the mean of the top_1 of each class that
    occurs, so that rare classes have equal weight. A tie with the right class and NaN count as wrong.
    Raises ValueError if there is no label, or shapes or labels do not fit.
    """
    _check_labels(scores, labels)
    labels = labels.to(scores.device)
    right = scores.gather(1, labels.unsqueeze(1))  # [n, 1]
    before = (~(scores < right)).sum(1) - 1  # [n]: all but the right class itself
    first = (before < 1).double()
    result = {"top_1": first.mean().item()}
    if scores.shape[1] > 5:
        result["top_5"] = (before < 5).double().mean().item()
    images = torch.bincount(labels)  # of each class
    right_images = torch.bincount(labels, weights=first)
    return {**result, "mean_per_class": (right_images / images)[images > 0].mean().item()}


def _check_texts(classes: Sequence[str], templates: Sequence[str]) -> None:
    if isinstance(classes, str) or len(classes) == 0:
        raise ValueError(f"class_embeddings: classes must be a list of one name or more, got {classes!r}")
    twice = [repr(name) for name, count in Counter(classes).items() if count > 1]
    if twice:
        raise ValueError(
            f"class_embeddings: each class must have a unique name, got {', '.join(twice[:5])} more than once; add "
            'what is meant, as in "crane, a bird", "crane, a machine", with the quotes, or in a file, one a line'
        )
    wrong = [templates] if isinstance(templates, str) else [t for t in templates if t.count("{}") != 1]
    if wrong or not templates:
        raise ValueError(
            "class_embeddings: templates must be a list of texts that each contain {} once, for the name of a "
            f"class, got {', '.join(map(repr, wrong)) or 'none'}; write for example ['a photo of a {{}}']"
        )


def _check_labels(scores: Tensor, labels: Tensor) -> None:
    if scores.dim() != 2 or labels.shape != scores.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"accuracy: scores must be [n, c] and labels [n], n at least 1, got {list(scores.shape)} and "
            f"{list(labels.shape)}; a row of scores belongs to each image"
        )
    first, last = int(labels.min()), int(labels.max())
    if first < 0 or last >= scores.shape[1]:
        raise ValueError(
            f"accuracy: labels must be from 0 to {scores.shape[1] - 1}, as many as scores has columns, got {first} to "
            f"{last}; leave out images without a class, and number classes from 0"
        )
