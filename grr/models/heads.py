"""Task heads: classifiers of images, or of images with a text, on the parts of a contrastive captioner.

A head references the parts of a CoCa under the same names, so that weights of a trained CoCa load into it; its
other parts are initialised. All heads have the call head(images, ids, positions=positions) -> logits. In training,
sample_keys= are dropout keys as in `CoCa`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from grr.components import AttentionPooler, Dropout, DropoutKeys, RMSNorm, dropout_keys, fold_in
from grr.data.collate import right_pad
from grr.models.coca import CLASSIFIER, MULTIMODAL, TEXT, CoCa, MultimodalDecoder, encode_pixels, tower_keys


class Head(nn.Module):
    """Base class of heads: the image side of a CoCa, dropout, and a linear layer that scores the classes."""

    def __init__(self, coca: CoCa, *, classifier: nn.Linear, dropout: float = 0.0) -> None:
        super().__init__()
        self.vision_encoder = coca.vision_encoder
        self.pooler_norm = coca.pooler_norm
        self.generative_pooler = coca.generative_pooler
        self.dropout = Dropout(dropout)
        self.classifier = classifier

    def _context(self, images: Tensor, sample_keys: Tensor | None) -> Tensor:
        patches = encode_pixels(self.vision_encoder, images, sample_keys)  # [b, p, d]
        return self.generative_pooler(self.pooler_norm(patches))  # [b, n, d]

    def _classify(self, x: Tensor, sample_keys: Tensor | None) -> Tensor:
        """Score the classes of vectors: [b, d] -> logits [b, c]."""
        if sample_keys is None:
            return self.classifier(self.dropout(x))
        keys = fold_in(sample_keys, torch.full_like(sample_keys, CLASSIFIER))
        rows, columns = dropout_keys(keys, keys.new_zeros(1), 1, x.shape[-1])  # [1, b, 1], [d]
        return self.classifier(self.dropout(x, DropoutKeys(rows[0, :, 0], columns)))


class ImageClassifier(Head):
    """Image classifier: vision encoder, generative pooler, a task pooler of one query, norm, a logit per class.

    images: uint8 or normalised float [b, 3, h, w] -> [b, c]; ids are ignored. The text towers are not used.
    Source: CoCa, section 3.2 (a pooler for each task) and 4.2 (image classification).
    """

    def __init__(
        self, coca: CoCa, *, task_pooler: AttentionPooler, norm: nn.Module, classifier: nn.Linear, dropout: float = 0.0
    ) -> None:
        super().__init__(coca, classifier=classifier, dropout=dropout)
        self.task_pooler = task_pooler
        self.norm = norm

    def forward(
        self,
        images: Tensor,
        ids: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        sample_keys: Tensor | None = None,
    ) -> Tensor:
        x = self.norm(self.task_pooler(self._context(images, sample_keys))[:, 0])  # [b, d]
        return self._classify(x, sample_keys)  # [b, c]


class ImageTextClassifier(Head):
    """Classifier of an image with a text (question or statement): a logit per class from the multimodal vector at CLS.

    images: uint8 or normalised float [b, 3, h, w], ids: [b, s], in which CLS is the last token that is not PAD -> [b,
    c]. Without positions, ids have the layout of the tokenizer; with positions [s] or [b, s], they are right-padded.
    The contrastive pooler and the vocabulary head are not used. Source: CoCa, section 4.2 (multimodal understanding).
    """

    def __init__(self, coca: CoCa, *, classifier: nn.Linear, dropout: float = 0.0) -> None:
        super().__init__(coca, classifier=classifier, dropout=dropout)
        self.pad_id = coca.pad_id
        self.text_decoder = coca.text_decoder
        self.multimodal_decoder = MultimodalDecoder(
            blocks=coca.multimodal_decoder.blocks,  # type: ignore[arg-type]  # a ModuleList is iterable
            norm=coca.multimodal_decoder.norm,
            head=nn.Identity(),  # type: ignore[arg-type]  # the classifier replaces the vocabulary head
        )

    def forward(
        self, images: Tensor, ids: Tensor, *, positions: Tensor | None = None, sample_keys: Tensor | None = None
    ) -> Tensor:
        if positions is None:
            ids, positions = right_pad(ids, pad_id=self.pad_id)
        keys = tower_keys(self.text_decoder, sample_keys, TEXT)
        text = self.text_decoder(ids, positions=positions, **keys)  # [b, s, d]
        keys = tower_keys(self.multimodal_decoder, sample_keys, MULTIMODAL)
        context = self._context(images, sample_keys)
        hidden = self.multimodal_decoder(text, context, positions=positions, **keys)  # [b, s, d]
        cls = (ids != self.pad_id).sum(dim=1) - 1  # [b]: rows are right-padded
        at_cls = hidden[torch.arange(len(ids), device=ids.device), cls]  # [b, d]
        return self._classify(at_cls, sample_keys)  # [b, c]


def image_classifier(coca: CoCa, num_classes: int, *, dropout: float = 0.0) -> ImageClassifier:
    """Build an image classifier on a CoCa; dropout is applied to the vector that is classified.

    Raises ValueError if num_classes is below 2.
    """
    classifier = _linear("image_classifier", coca, num_classes)
    return ImageClassifier(
        coca,
        task_pooler=AttentionPooler(coca.dim, 1, coca.pooler_heads),
        norm=RMSNorm(coca.dim),
        classifier=classifier,
        dropout=dropout,
    )


def image_text_classifier(coca: CoCa, num_classes: int, *, dropout: float = 0.0) -> ImageTextClassifier:
    """Build a classifier of images with a text on a CoCa, for visual question answering or visual entailment.

    Raises ValueError if num_classes is below 2.
    """
    classifier = _linear("image_text_classifier", coca, num_classes)
    return ImageTextClassifier(coca, classifier=classifier, dropout=dropout)


HEADS: dict[str, Callable[..., Head]] = {
    "image_classifier": image_classifier,
    "image_text_classifier": image_text_classifier,
}


def _linear(who: str, coca: CoCa, num_classes: int) -> nn.Linear:
    if num_classes < 2:
        raise ValueError(f"{who}: num_classes must be at least 2, got {num_classes=}; check the classes of the data")
    return nn.Linear(coca.dim, num_classes)
