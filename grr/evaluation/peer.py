"""open_clip's CoCa (Ilharco et al. 2021) at the sizes of a model of this library, to measure both on one machine."""

import importlib
from typing import Any

from torch import Tensor, nn

from grr.data import Batch


class OpenClipCoCa(nn.Module):
    """open_clip's CoCa with its loss: images float [b, 3, h, w], texts int64 [b, context_length] -> the loss, a scalar.

    Its text is CLIP's layout: BOS, tokens, EOS, padding; its own class token is added inside. The weights are random.
    Raises ModuleNotFoundError if open_clip is not installed.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        vocab_size: int,
        context_length: int,
        image_size: int,
        patch_size: int,
        num_queries: int,
        vision_layers: int,
        text_layers: int,
        multimodal_layers: int,
    ) -> None:
        super().__init__()
        open_clip = _open_clip()
        text = {"context_length": context_length, "vocab_size": vocab_size, "width": dim, "heads": num_heads}
        self.context_length, self.image_size = context_length, image_size
        self.version: str = open_clip.__version__
        self.coca = open_clip.CoCa(
            embed_dim=dim,
            vision_cfg={
                "image_size": image_size,
                "patch_size": patch_size,
                "layers": vision_layers,
                "width": dim,
                "head_width": dim // num_heads,
                "attentional_pool": True,
                "attn_pooler_queries": num_queries + 1,
                "attn_pooler_heads": num_heads,
                "output_tokens": True,
            },
            text_cfg={**text, "layers": text_layers, "embed_cls": True, "output_tokens": True},
            multimodal_cfg={**text, "layers": multimodal_layers, "attn_pooler_heads": num_heads},
        )
        nn.init.normal_(self.coca.text_decoder.text_projection, std=dim**-0.5)  # 3.3 leaves it without values
        self.loss = open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0, pad_id=0)

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        out = self.coca(images, texts)
        features = out["image_features"], out["text_features"], out["logits"], out["labels"], out["logit_scale"]
        contrastive, captioning = self.loss(*features)
        return contrastive + captioning

    def captions(self, images: Tensor, tokens: int, *, bos_id: int, eos_id: int) -> Tensor:
        """Write captions of `tokens` tokens by greedy search, as its own `generate` does."""
        special = {"sot_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": 0}
        lengths = {"seq_len": tokens + 1, "min_seq_len": tokens, "max_seq_len": self.context_length}
        ids: Tensor = self.coca.generate(images, generation_type="top_k", top_k=1, **special, **lengths)
        return ids


def texts_of(batch: Batch, *, context_length: int, cls_id: int, pad_id: int = 0) -> Tensor:
    """Returns the captions of a batch in CLIP's layout, int64 [b, context_length]: no CLS, padded to the context."""
    ids = batch.ids.masked_fill(batch.ids == cls_id, pad_id)
    return nn.functional.pad(ids, (0, context_length - ids.shape[1]), value=pad_id)


def _open_clip() -> Any:
    try:
        return importlib.import_module("open_clip")
    except ImportError as error:
        raise ModuleNotFoundError(
            f"OpenClipCoCa: open_clip must be installed, got {error}; pip install open_clip_torch "
            "transformers==4.56.2, or leave open_clip out of run.packages"
        ) from None
