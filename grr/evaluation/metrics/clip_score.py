"""CLIPScore and RefCLIPScore: captions judged by the embeddings of a model (Hessel et al. 2021)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from grr.data import Pairs
from grr.data.images import Crop
from grr.evaluation.outputs import ModelOutputs, over_images
from grr.evaluation.zero_shot import embed_texts
from grr.models.coca import CoCa, evaluating
from grr.parallel.process_group import on_rank_0
from grr.tokenizers import Tokenizer

WEIGHT = 2.5  # of the cosine, which spreads CLIP's scores from 0 to about 1
PROMPT = "A photo depicts "  # before captions and references


class Scores(NamedTuple):
    """Scores of n captions."""

    clip: Tensor  # float64 [n]
    ref_clip: Tensor  # float64 [n]


def clip_scores(
    image_embeddings: Tensor, caption_embeddings: Tensor, reference_embeddings: Tensor, image_of_reference: Tensor
) -> Scores:
    """Compute CLIPScore and RefCLIPScore of n captions, in float64.

    image_embeddings, caption_embeddings: [n, e], reference_embeddings: [m, e], image_of_reference: int64 [m], the row
    of the image that a reference describes. CLIPScore is 2.5 max(cos(caption, image), 0); RefCLIPScore is the harmonic
    mean of it and max(cos(caption, reference), 0) of the nearest reference, 0 if both are. Source: Hessel et al. 2021,
    section 3. Raises ValueError if shapes do not fit.
    """
    n, m = len(image_embeddings), len(reference_embeddings)
    if caption_embeddings.shape != image_embeddings.shape or image_of_reference.shape != (m,):
        raise ValueError(
            "clip_scores: image_embeddings and caption_embeddings must be [n, e], reference_embeddings [m, e] and "
            f"image_of_reference [m], got {list(image_embeddings.shape)}, {list(caption_embeddings.shape)}, "
            f"{list(reference_embeddings.shape)} and {list(image_of_reference.shape)}; give a row for each caption"
        )
    image, caption, reference = (
        F.normalize(x.double(), dim=-1) for x in (image_embeddings, caption_embeddings, reference_embeddings)
    )
    clip = WEIGHT * (image * caption).sum(1).clamp(min=0)  # [n]
    cosines = (reference * caption[image_of_reference]).sum(1)  # [m]
    nearest = clip.new_zeros(n).scatter_reduce(0, image_of_reference, cosines, "amax")  # [n], at least 0
    total = clip + nearest
    return Scores(clip, torch.where(total > 0, 2 * clip * nearest / total, 0.0))


@torch.no_grad()
def judged_captions(
    model: CoCa,
    tokenizer: Tokenizer,
    pairs: Pairs,
    outputs: ModelOutputs | None,
    device: torch.device,
    *,
    image_size: int,
    crop: Crop,
    progress: bool = False,
) -> dict[str, Any]:
    """Compute the mean `clip_scores` of generated captions, by the names clip_score and ref_clip_score.

    model, tokenizer, image_size, crop: those of the judge, which need not be the model that wrote the captions.
    outputs: what `compute_outputs` returned for `pairs`, with generated captions. All processes call it and share the
    images; each has the result: also `images`, the number of those that the judge could read, and `truncated`, the
    number of captions and references that, with the prompt, are longer than its context. Raises ValueError if it reads
    none.
    """

    def captions() -> tuple[list[int], list[str], list[list[str]]]:
        assert outputs is not None
        return outputs.images, outputs.written, outputs.references

    items, written, references = on_rank_0(captions)
    row = {item: n for n, item in enumerate(items)}

    def work(pixels: Tensor, members: list[int]) -> tuple[Scores, int]:
        own = [references[row[item]] for item in members]
        texts = [PROMPT + written[row[item]] for item in members] + [PROMPT + text for some in own for text in some]
        embeddings = embed_texts(model, tokenizer, texts, device).cpu()
        caption, reference = embeddings.split([len(members), len(texts) - len(members)])
        images = model.encode_image(pixels).cpu()
        return clip_scores(images, caption, reference, _rows(own)), sum(map(tokenizer.truncates, texts))

    with evaluating(model):
        parts, unread = over_images(
            pairs, items, work, device, image_size=image_size, crop=crop, progress="judged images" if progress else None
        )

    def means() -> dict[str, Any]:
        if not parts:
            raise ValueError(
                f"judged_captions: the judge must read one image, got none of {len(items)}; check the data"
            )
        clip, ref_clip = (torch.cat(x).mean().item() for x in zip(*(scores for scores, _ in parts), strict=True))
        truncated = sum(count for _, count in parts)
        return {
            "clip_score": clip,
            "ref_clip_score": ref_clip,
            "images": len(items) - len(unread),
            "truncated": truncated,
        }

    return on_rank_0(means)


def _rows(references: Sequence[Sequence[str]]) -> Tensor:
    """Returns the number of the image of each reference: int64 [m]."""
    return torch.arange(len(references)).repeat_interleave(torch.tensor([len(some) for some in references]))
