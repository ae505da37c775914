"""Single samples of a validation or an evaluation, for a page to show: retrieval, captions, answers, attention."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Generic, TypeVar

import torch
from torch import Tensor

from grr.data import Pairs
from grr.data.collate import collate_captions
from grr.data.images import BadImage
from grr.evaluation.attention import word_attention
from grr.evaluation.outputs import ModelOutputs
from grr.models.coca import CoCa
from grr.tokenizers.sentencepiece import Tokenizer

T = TypeVar("T")
RETRIEVALS = 8  # pairs of a page; twice as many captions
NEAREST = 5  # candidates that are shown for a query
MAPPED = 3  # images whose attention is shown


@dataclass
class Match(Generic[T]):
    """A candidate of a retrieval, an image or a caption."""

    candidate: T
    score: float  # cosine similarity to the query
    rank: int  # 1 is the nearest
    right: bool  # whether it belongs to the query


@dataclass
class Retrieval:
    """A pair, the images nearest to its caption, and the captions nearest to its image, nearest first.

    If none of the nearest candidates is right, the nearest one that is right follows them.
    """

    caption: str
    image: Tensor  # uint8 [3, h, w]
    images: list[Match[Tensor]]  # uint8 [3, h, w] each
    captions: list[Match[str]]


@dataclass
class Caption:
    """An image, the caption that the model wrote, and the references."""

    image: Tensor  # uint8 [3, h, w]
    written: str
    references: list[str]
    name: str = ""  # of the image's first pair


@dataclass
class Answer:
    """An image, the question or sentence about it, the predicted class, and the right one; None if it has none."""

    image: Tensor  # uint8 [3, h, w]
    text: str
    given: str
    right: str | None


@dataclass
class AttentionMaps:
    """An image, the words of the caption that the model wrote, and where it attended while it wrote each of them."""

    image: Tensor  # uint8 [3, h, w]: what the model reads of it
    words: list[str]
    maps: Tensor  # float32 [words, rows, columns]; each map sums to 1


@dataclass
class Examples:
    retrievals: list[Retrieval]
    captions: list[Caption]
    answers: list[Answer] = field(default_factory=list)
    similarities: Tensor | None = None  # float32 [k, k], of the captions and the images of `retrievals`
    attention: list[AttentionMaps] = field(default_factory=list)
    distinct_captions: int = 0  # among all captions that the model wrote
    written_captions: int = 0
    training: list[tuple[Tensor, str]] = field(default_factory=list)  # images uint8 [3, h, w] with their captions


def examples(outputs: ModelOutputs, model: CoCa | None = None, tokenizer: Tokenizer | None = None) -> Examples:
    """Returns what a page shows of an observation: the same pairs and images at each call on the same data.

    With the model, which must be whole in this process, and its tokenizer, three images get attention maps.
    """
    thumbnail = cache(outputs.thumbnail)
    texts = _evenly_spaced(len(outputs.texts), RETRIEVALS)
    owners = outputs.image_of_text[texts].tolist()  # [k]
    result = Examples(
        [_retrieval(outputs, t, thumbnail) for t in texts],
        [
            Caption(thumbnail(i), outputs.written[i], outputs.references[i], outputs.pairs.ids[outputs.images[i]])
            for i in _evenly_spaced(len(outputs.written), 2 * RETRIEVALS)
        ],
        similarities=outputs.text_embeddings[texts] @ outputs.image_embeddings[owners].T,
        distinct_captions=len(set(outputs.written)),
        written_captions=len(outputs.written),
    )
    if model is not None and tokenizer is not None:
        rows = _evenly_spaced(len(outputs.written), MAPPED)
        result.attention = [maps for i in rows if (maps := _attention_maps(outputs, i, model, tokenizer, thumbnail(i)))]
    return result


def captioned_pictures(examples: Examples) -> list[tuple[Tensor, str]]:
    """Returns the images of captions and answers, uint8 [3, h, w], each with what the model wrote and the truth."""
    captions = [
        (one.image, f"{one.written or '(empty)'}\nreference: {(one.references or [''])[0]}")
        for one in examples.captions
    ]
    answers = [
        (one.image, f"{one.text}: {one.given}\nright: {one.right or 'none of the classes'}") for one in examples.answers
    ]
    return captions + answers


def training_examples(pairs: Pairs) -> Examples:
    """Returns evenly spaced training pairs without those whose image cannot be read, for a page without outputs."""
    training = []
    for i in _evenly_spaced(len(pairs), 2 * RETRIEVALS):
        with suppress(BadImage, OSError):
            training.append((pairs.thumbnail(i), pairs.captions[i]))
    return Examples([], [], training=training)


def _retrieval(outputs: ModelOutputs, t: int, thumbnail: Callable[[int], Tensor]) -> Retrieval:
    owner = int(outputs.image_of_text[t])
    images = _matches(outputs.image_embeddings @ outputs.text_embeddings[t], [owner])
    own = (outputs.image_of_text == owner).nonzero().flatten().tolist()
    captions = _matches(outputs.text_embeddings @ outputs.image_embeddings[owner], own)
    return Retrieval(
        outputs.pairs.captions[outputs.texts[t]],
        thumbnail(owner),
        [Match(thumbnail(m.candidate), m.score, m.rank, m.right) for m in images],
        [Match(outputs.pairs.captions[outputs.texts[m.candidate]], m.score, m.rank, m.right) for m in captions],
    )


def _matches(scores: Tensor, right: Sequence[int]) -> list[Match[int]]:
    """The nearest candidates, scores [n], and the nearest right one if it is not among them."""
    order = scores.argsort(descending=True, stable=True).tolist()
    ranked = [Match(i, float(scores[i]), rank, i in right) for rank, i in enumerate(order, 1)]
    nearest, others = ranked[:NEAREST], ranked[NEAREST:]
    if not any(match.right for match in nearest):
        nearest += [match for match in others if match.right][:1]
    return nearest


def _attention_maps(
    outputs: ModelOutputs, i: int, model: CoCa, tokenizer: Tokenizer, thumbnail: Tensor
) -> AttentionMaps | None:
    """The attention while the caption of image i was written; None for an empty caption or a model without a map."""
    device = next(model.parameters()).device
    pixels = outputs.pairs.load(outputs.images[i], size=outputs.image_size, crop=outputs.crop).to(device)
    ids, positions, *_ = collate_captions([tokenizer.encode(outputs.written[i])], pad_id=tokenizer.pad_id)
    maps = word_attention(model, pixels[None], ids.to(device), positions=positions.to(device))
    words, word_of = words_of_tokens(tokenizer, ids[0].tolist())
    if maps is None or not words:
        return None
    reading = maps[0, : len(word_of)].cpu()  # [n, rows, columns]: row i is read to write token i + 1
    means = [reading[torch.tensor(word_of) == w].mean(0) for w in range(len(words))]
    side = min(thumbnail.shape[1:])
    image = thumbnail if outputs.crop == "squash" else _middle(thumbnail, side)
    return AttentionMaps(image, words, torch.stack(means))


def words_of_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[list[str], list[int]]:
    """The words of a caption, ids BOS t1 ... tn EOS ..., and for each of its n tokens the number of its word."""
    tokens = list(ids[1 : ids.index(tokenizer.eos_id)])
    words = tokenizer.decode(tokens).split()
    prefixes = (tokenizer.decode(tokens[: n + 1]).split() for n in range(len(tokens)))
    return words, [min(max(len(prefix), 1), len(words)) - 1 for prefix in prefixes]


def _middle(image: Tensor, side: int) -> Tensor:
    """The square in the middle of an image: [3, h, w] -> [3, side, side]."""
    top, left = ((length - side) // 2 for length in image.shape[1:])
    return image[:, top : top + side, left : left + side]


def _evenly_spaced(count: int, wanted: int) -> list[int]:
    """At most `wanted` of `count` places, evenly spaced."""
    return list(range(0, count, max(1, count // wanted)))[:wanted]
