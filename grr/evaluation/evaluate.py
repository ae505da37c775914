"""Metrics of a model on held-out pairs: losses, retrieval and captions."""

from collections.abc import Callable
from typing import Any, Literal

import torch

from grr.data import Pairs, epoch_order, validation_steps
from grr.data.images import Crop
from grr.evaluation.captions import caption_metrics
from grr.evaluation.examples import Examples, examples
from grr.evaluation.outputs import ModelOutputs, compute_outputs
from grr.evaluation.retrieval import retrieval
from grr.models.coca import CoCa
from grr.parallel.process_group import on_rank_0
from grr.parallel.shard import unsharded
from grr.tokenizers import Tokenizer
from grr.training.loss import contrastive_loss, sigmoid_loss
from grr.training.step import Losses, evaluation_losses


def validation_metrics(
    model: CoCa,
    pairs: Pairs,
    tokenizer: Tokenizer,
    device: torch.device,
    *,
    num_eval_images: int,
    image_size: int,
    crop: Crop,
) -> tuple[dict[str, float], Examples]:
    """Compute retrieval and caption metrics of the first `num_eval_images` images; all processes share the work.

    Returns in all processes the recalls of `retrieval` with `caption_exact` from `exact_match`, and the examples of a
    report. The model may be sharded. Unreadable images are left out.
    """
    with unsharded(model):
        outputs = compute_outputs(
            model, pairs, tokenizer, device, image_size=image_size, crop=crop, images=num_eval_images, generation={}
        )

        def metrics_and_examples() -> tuple[dict[str, float], Examples]:
            assert outputs is not None
            metrics = recalls(outputs) | {"caption_exact": exact_match(outputs, tokenizer)}
            return metrics, examples(outputs, model, tokenizer)

        return on_rank_0(metrics_and_examples)


def validate(
    model: CoCa,
    pairs: Pairs,
    tokenizer: Tokenizer,
    device: torch.device,
    loader: dict[str, Any],
    loss: dict[str, Any],
    num_eval_images: int,
    check: Callable[[Losses], None] | None = None,
) -> tuple[Losses, dict[str, float], Examples]:
    """Compute the losses over all validation pairs, and `validation_metrics` of the first images.

    loader: arguments of `validation_steps`; loss: those of `evaluation_losses`. check: called with the losses before
    captions are generated, so that it may refuse losses that are not finite. All processes must call it.
    """
    steps = validation_steps(pairs, tokenizer, **loader)
    losses = evaluation_losses(model, ([batch.to(device) for batch in step] for step in steps), **loss)
    if check is not None:
        check(losses)
    metrics, examples = validation_metrics(
        model,
        pairs,
        tokenizer,
        device,
        num_eval_images=num_eval_images,
        image_size=loader["image_size"],
        crop=loader["crop"],
    )
    return losses, metrics, examples


def losses(
    outputs: ModelOutputs,
    *,
    contrastive_batch: int = 768,
    contrastive_weight: float = 2.0,
    captioning_weight: float = 1.0,
    contrastive: Literal["softmax", "sigmoid"] = "softmax",
) -> dict[str, float]:
    """Compute the metrics of the paper: loss, contrastive_loss, captioning_loss and perplexity, with their settings.

    The captioning loss is the mean over all tokens. The contrastive loss is the mean over batches of
    `contrastive_batch` pairs, or of one per image if there are fewer images, in a constant order in which no batch has
    an image twice; an incomplete last batch is left out. Computed in float64. Raises ValueError if a batch would have
    fewer than two images.
    """
    owners = outputs.pairs.image_of[outputs.texts]
    size = min(contrastive_batch, len(outputs.images))
    if size < 2:
        raise ValueError(
            "losses: a batch of the contrastive loss must have at least two images, got "
            f"{contrastive_batch=} and {len(outputs.images)} images; raise the smaller of both"
        )
    image, text = outputs.image_embeddings.double(), outputs.text_embeddings.double()
    contrasts = []
    for row in torch.from_numpy(epoch_order(owners, seed=0, epoch=0, batch_size=size)):
        batch = image[outputs.image_of_text[row]], text[row]  # [b, e] each
        if contrastive == "sigmoid":
            contrasts.append(sigmoid_loss(*batch, 1 / outputs.scale, outputs.bias))
        else:
            contrasts.append(contrastive_loss(*batch, 1 / outputs.scale))
    contrast = torch.stack(contrasts).mean().item()
    caption = (outputs.token_losses.sum() / outputs.tokens.sum()).item()
    loss = contrastive_weight * contrast + captioning_weight * caption
    return Losses(loss, contrast, caption, size, contrastive_weight, captioning_weight).numbers()


def recalls(outputs: ModelOutputs) -> dict[str, float]:
    """Compute `retrieval` over all images and their captions; `num_eval_images` is the number of images."""
    metrics = retrieval(outputs.image_embeddings, outputs.text_embeddings, outputs.image_of_text)
    return metrics | {"num_eval_images": len(outputs.images)}


def caption_scores(outputs: ModelOutputs, tokenizer: Tokenizer) -> dict[str, float]:
    """Compute `caption_metrics` and `exact_match`, by the name exact, of the generated captions."""
    return caption_metrics(outputs.references, outputs.written) | {"exact": exact_match(outputs, tokenizer)}


def exact_match(outputs: ModelOutputs, tokenizer: Tokenizer) -> float:
    """Returns the fraction of images whose caption equals a reference after the tokenizer encodes and decodes it."""
    references = [{tokenizer.decode(tokenizer.encode(caption)) for caption in some} for some in outputs.references]
    return sum(w in some for w, some in zip(outputs.written, references, strict=True)) / len(references)
