"""What a model can do with pairs it never saw: find the image of a sentence, and say what an image shows."""

from typing import Any, Literal

import torch

from grr.data import Pairs, epoch_order, validation_steps
from grr.data.images import Crop
from grr.evaluation.captions import caption_metrics
from grr.evaluation.examples import Examples, examples
from grr.evaluation.outputs import Observation, observe
from grr.evaluation.retrieval import retrieval
from grr.models.coca import CoCa
from grr.parallel.process_group import on_rank_0
from grr.parallel.shard import unsharded
from grr.tokenizers import Tokenizer
from grr.training.loss import contrastive_loss, sigmoid_loss
from grr.training.step import Losses, evaluation_losses


def examine(
    model: CoCa,
    pairs: Pairs,
    tokenizer: Tokenizer,
    device: torch.device,
    *,
    num_eval_images: int,
    image_size: int,
    crop: Crop,
) -> tuple[dict[str, float], Examples]:
    """Retrieve among, and caption, the first `num_eval_images` images of some pairs; all processes share the work.

    Gives all processes the recalls of `retrieval`, `caption_exact`, as `exact` counts, and what a report shows. The
    model may be sharded. Images that cannot be read are left out.
    """
    with unsharded(model):
        seen = observe(
            model, pairs, tokenizer, device, image_size=image_size, crop=crop, images=num_eval_images, generation={}
        )

        def judge() -> tuple[dict[str, float], Examples]:
            assert seen is not None
            metrics = recalls(seen) | {"caption_exact": exact(seen, tokenizer)}
            return metrics, examples(seen, model, tokenizer)

        return on_rank_0(judge)


def validate(
    model: CoCa,
    pairs: Pairs,
    tokenizer: Tokenizer,
    device: torch.device,
    loader: dict[str, Any],
    loss: dict[str, Any],
    num_eval_images: int,
) -> tuple[Losses, dict[str, float], Examples]:
    """The losses of a training run over all validation pairs, and `examine` of the first images.

    loader: arguments of `validation_steps`; loss: those of `evaluation_losses`. Called by all processes alike.
    """
    steps = validation_steps(pairs, tokenizer, **loader)
    losses = evaluation_losses(model, ([batch.to(device) for batch in step] for step in steps), **loss)
    found, examples = examine(
        model,
        pairs,
        tokenizer,
        device,
        num_eval_images=num_eval_images,
        image_size=loader["image_size"],
        crop=loader["crop"],
    )
    return losses, found, examples


def losses(
    seen: Observation,
    *,
    contrastive_batch: int = 768,
    contrastive_weight: float = 2.0,
    captioning_weight: float = 1.0,
    contrastive: Literal["softmax", "sigmoid"] = "softmax",
) -> dict[str, float]:
    """The paper's numbers: loss, contrastive_loss, captioning_loss and perplexity, and what they were computed with.

    The captioning loss is the mean over all tokens. The contrastive loss depends on the size of its batches: it is the
    mean over batches of `contrastive_batch` pairs, or of as many as there are images, in an order that never changes,
    in which no image occurs twice in a batch; a last batch that would not be full is left out. In float64.
    """
    owners = seen.pairs.image_of[seen.texts]
    size = min(contrastive_batch, len(seen.images))
    if size < 2:
        raise ValueError(
            "losses: a contrastive loss needs two images or more in a batch, got "
            f"{contrastive_batch=} and {len(seen.images)} images"
        )
    image, text = seen.image_embeddings.double(), seen.text_embeddings.double()
    contrasts = []
    for row in torch.from_numpy(epoch_order(owners, seed=0, epoch=0, batch_size=size)):
        batch = image[seen.image_of_text[row]], text[row]  # [b, e] each
        if contrastive == "sigmoid":
            contrasts.append(sigmoid_loss(*batch, 1 / seen.scale, seen.bias))
        else:
            contrasts.append(contrastive_loss(*batch, 1 / seen.scale))
    contrast = torch.stack(contrasts).mean().item()
    caption = (seen.token_losses.sum() / seen.tokens.sum()).item()
    loss = contrastive_weight * contrast + captioning_weight * caption
    return Losses(loss, contrast, caption, size, contrastive_weight, captioning_weight).numbers()


def recalls(seen: Observation) -> dict[str, float]:
    """`retrieval` among all images and all of their captions, and how many images those are: `num_eval_images`."""
    found = retrieval(seen.image_embeddings, seen.text_embeddings, seen.image_of_text)
    return found | {"num_eval_images": len(seen.images)}


def captioning(seen: Observation, tokenizer: Tokenizer) -> dict[str, float]:
    """`caption_metrics` of the captions that were written, and `exact`."""
    return caption_metrics(seen.references, seen.written) | {"exact": exact(seen, tokenizer)}


def exact(seen: Observation, tokenizer: Tokenizer) -> float:
    """The fraction of images whose caption is one of their references to the letter, as the tokenizer spells those."""
    spelled = [{tokenizer.decode(tokenizer.encode(caption)) for caption in own} for own in seen.references]
    return sum(w in own for w, own in zip(seen.written, spelled, strict=True)) / len(spelled)
