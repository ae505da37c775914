"""Heads: the parts of a contrastive captioner as a classifier of images, or of images with a text.

A head keeps the parts of a CoCa by reference and under the names that they have there, so that a trained model fills
them; what it adds is its own, and new. All heads are called alike: head(images, ids, positions=positions) -> logits.
In training, sample_keys= key their dropout as they do in `CoCa`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from grr.components import AttentionPooler, Dropout, DropoutKeys, RMSNorm, dropout_keys, fold_in
from grr.data.collate import right_pad
from grr.models.coca import CLASSIFIER, MULTIMODAL, TEXT, CoCa, MultimodalDecoder, encode_pixels, tower_keys


class Head(nn.Module):
    """What all heads have: the image side of a CoCa, dropout, and a linear layer that scores the classes."""

    def __init__(self, coca: CoCa, *, classifier: nn.Linear, dropout: float = 0.0) -> None:
        super().__init__()
        self.vision_encoder = coca.vision_encoder
        self.pooler_norm = coca.pooler_norm
        self.generative_pooler = coca.generative_pooler
        self.dropout = Dropout(dropout)
        self.classifier = classifier

    def _context(self, images: Tensor, sample_keys: Tensor | None) -> Tensor:
        seen = encode_pixels(self.vision_encoder, images, sample_keys)  # [b, p, d]
        return self.generative_pooler(self.pooler_norm(seen))  # [b, n, d]

    def _classify(self, read: Tensor, sample_keys: Tensor | None) -> Tensor:
        """The vectors that are classified [b, d] -> logits [b, c]."""
        if sample_keys is None:
            return self.classifier(self.dropout(read))
        own = fold_in(sample_keys, torch.full_like(sample_keys, CLASSIFIER))
        rows, columns = dropout_keys(own, own.new_zeros(1), 1, read.shape[-1])  # [1, b, 1], [d]
        return self.classifier(self.dropout(read, DropoutKeys(rows[0, :, 0], columns)))


class ImageClassifier(Head):
    """Image -> vision encoder -> generative pooler -> one more query, the task's own -> norm -> a logit for each class.

    images: uint8 or normalised float [b, 3, h, w] -> [b, c]; ids are not read. The text towers are left behind.
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
        read = self.norm(self.task_pooler(self._context(images, sample_keys))[:, 0])  # [b, d]
        return self._classify(read, sample_keys)  # [b, c]


class ImageTextClassifier(Head):
    """A text, a question or a statement, goes through both decoders, of which the second sees the image; the vector at
    CLS has read all of it -> a logit for each class.

    images: uint8 or normalised float [b, 3, h, w], ids: [b, s], CLS the last token that is not PAD; without positions
    as the tokenizer lays them out, with positions [s] or [b, s] packed -> [b, c]. The contrastive pooler and the
    vocabulary head are left behind. Source: CoCa, section 4.2 (multimodal understanding).
    """

    def __init__(self, coca: CoCa, *, classifier: nn.Linear, dropout: float = 0.0) -> None:
        super().__init__(coca, classifier=classifier, dropout=dropout)
        self.pad_id = coca.pad_id
        self.text_decoder = coca.text_decoder
        self.multimodal_decoder = MultimodalDecoder(
            blocks=coca.multimodal_decoder.blocks,  # type: ignore[arg-type]  # a ModuleList is iterable
            norm=coca.multimodal_decoder.norm,
            head=nn.Identity(),  # type: ignore[arg-type]  # classes are scored instead of words
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
        cls = (ids != self.pad_id).sum(dim=1) - 1  # [b]: padding stands behind it
        read = hidden[torch.arange(len(ids), device=ids.device), cls]  # [b, d]
        return self._classify(read, sample_keys)  # [b, c]


def image_classifier(coca: CoCa, num_classes: int, *, dropout: float = 0.0) -> ImageClassifier:
    """Build a classifier of images on the image side of a CoCa; dropout is that of the vector that is classified.

    Raises ValueError if there are fewer than two classes.
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
    """Build a classifier of images with a text on a CoCa: visual question answering, visual entailment.

    Raises ValueError if there are fewer than two classes.
    """
    classifier = _linear("image_text_classifier", coca, num_classes)
    return ImageTextClassifier(coca, classifier=classifier, dropout=dropout)


HEADS: dict[str, Callable[..., Head]] = {
    "image_classifier": image_classifier,
    "image_text_classifier": image_text_classifier,
}


def _linear(who: str, coca: CoCa, num_classes: int) -> nn.Linear:
    if num_classes < 2:
        raise ValueError(f"{who}: there must be at least two classes to choose from, got {num_classes=}")
    return nn.Linear(coca.dim, num_classes)
