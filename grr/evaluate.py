"""What a model can do with pairs it never saw: find the image of a sentence, and say what an image shows."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from grr.data import Pairs
from grr.distributed import unsharded
from grr.generate import generate
from grr.images import BadImage, Crop
from grr.model import CoCa
from grr.packing import pack_captions
from grr.report import Caption, Examples, Retrieval
from grr.retrieval import retrieval
from grr.tokenizer import Tokenizer

T = TypeVar("T")
BATCH = 50  # images or sentences at a time
SHOWN = 8  # sentences of the report; twice as many images


@torch.no_grad()
def examine(model: CoCa, pairs: Pairs, tokenizer: Tokenizer, device: torch.device, *, candidates: int, image_size: int,
            crop: Crop) -> tuple[dict[str, float], Examples]:  # fmt: skip
    """Retrieve among, and caption, the first `candidates` images of some pairs; all processes share the work.

    Gives the recalls of `retrieval`, `caption_exact`, the fraction of images whose caption is one of their references
    to the letter (as the tokenizer spells those), and what a report shows. Images that cannot be read are left out.
    """
    pair_of = _first_pairs(pairs, candidates)  # image -> the first of its pairs
    texts = [int(t) for t in np.flatnonzero(np.isin(pairs.image_of, list(pair_of)))]

    def read(image: int) -> Tensor | None:
        try:
            return pairs.load(pair_of[image], size=image_size, crop=crop)
        except (BadImage, OSError):
            return None

    was_training = model.training
    model.eval()
    with unsharded(model):
        seen = _from_all(_see(model, tokenizer, read, _my_share(list(pair_of)), device))
        heard = _from_all(_hear(model, tokenizer, pairs, _my_share(texts), device))
    model.train(was_training)

    images = [image for image in pair_of if image in seen]
    row = {image: i for i, image in enumerate(images)}
    texts = [t for t in texts if int(pairs.image_of[t]) in row]
    owner = [row[int(pairs.image_of[t])] for t in texts]
    image_embeddings = torch.stack([seen[image][0] for image in images])  # [n, e]
    text_embeddings = torch.stack([heard[t] for t in texts])  # [m, e]
    references: list[list[str]] = [[] for _ in images]
    for t, i in zip(texts, owner, strict=True):
        references[i].append(pairs.captions[t])
    spelled = [{tokenizer.decode(tokenizer.encode(r)) for r in own} for own in references]
    written = [seen[image][1] for image in images]
    exact = sum(caption in own for caption, own in zip(written, spelled, strict=True)) / len(images)
    metrics = retrieval(image_embeddings, text_embeddings, torch.tensor(owner)) | {"caption_exact": exact}

    def picture(i: int) -> Tensor:
        pixels = read(images[i])
        assert pixels is not None  # it could be read a moment ago
        return pixels

    examples = Examples([], [])
    for t in _spread(len(texts), SHOWN):
        best = (image_embeddings @ text_embeddings[t]).topk(min(5, len(images)))
        found = best.indices.tolist()
        correct = found.index(owner[t]) if owner[t] in found else None
        query = pairs.captions[texts[t]]
        examples.retrievals.append(Retrieval(query, [picture(i) for i in found], best.values.tolist(), correct))
    for i in _spread(len(images), 2 * SHOWN):
        examples.captions.append(Caption(picture(i), written[i], references[i]))
    return metrics, examples


def _first_pairs(pairs: Pairs, count: int) -> dict[int, int]:
    """The first `count` images that occur, each with the first of its pairs."""
    images, first = np.unique(pairs.image_of, return_index=True)
    order = np.argsort(first)[:count]
    return {int(images[i]): int(first[i]) for i in order}


def _see(model: CoCa, tokenizer: Tokenizer, read: Callable[[int], Tensor | None], images: list[int],
         device: torch.device) -> dict[int, tuple[Tensor, str]]:  # fmt: skip
    """The embedding [e] and the caption of each image that can be read."""
    result: dict[int, tuple[Tensor, str]] = {}
    with ThreadPoolExecutor() as pool:
        for part in _batches(images):
            pixels = {i: x for i, x in zip(part, pool.map(read, part), strict=True) if x is not None}
            if not pixels:
                continue
            stack = torch.stack(list(pixels.values())).to(device)  # [b, 3, h, w]
            embeddings = model.encode_image(stack).cpu()
            result |= zip(pixels, zip(embeddings, generate(model, stack, tokenizer), strict=True), strict=True)
    return result


def _hear(model: CoCa, tokenizer: Tokenizer, pairs: Pairs, texts: list[int],
          device: torch.device) -> dict[int, Tensor]:  # fmt: skip
    """The embedding [e] of each caption."""
    result: dict[int, Tensor] = {}
    for part in _batches(texts):
        rows = [tokenizer.encode(pairs.captions[t]) for t in part]
        ids, positions, _ = pack_captions(rows, pad_id=tokenizer.pad_id)
        result |= zip(part, model.encode_text(ids.to(device), positions=positions.to(device)).cpu(), strict=True)
    return result


def _my_share(items: list[int]) -> list[int]:
    return items[dist.get_rank() :: dist.get_world_size()]


def _batches(items: list[int]) -> Iterator[list[int]]:
    return (items[i : i + BATCH] for i in range(0, len(items), BATCH))


def _from_all(mine: dict[int, T]) -> dict[int, T]:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def _spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` of `count` places, evenly apart."""
    return list(range(0, count, max(1, count // wanted)))[:wanted]
