"""Use an exported captioner without PyTorch: caption an image, and compare it with texts.

    python run_onnx.py photo.jpg "a red fox in the snow" "a bowl of soup"

This file is in the folder of an export, beside image.onnx, text.onnx, step.onnx, config.json and tokenizer.model. It
needs only numpy, onnxruntime, pillow and sentencepiece; copy the parts that you need.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image, ImageOps
from sentencepiece import SentencePieceProcessor

Image.init()
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")  # others may start a program
Arrays = dict[str, Any]  # numpy arrays by name


class Captioner:
    """The three graphs of an export with their vocabulary and preprocessing."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if self.config["vocabulary"] != "sentencepiece":
            raise ValueError(
                f"Captioner: this example needs a SentencePiece vocabulary, got CLIP's in {folder}; encode texts with "
                "open_clip's tokenizer, in the layout of text_inputs"
            )
        self.pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        self.image, self.text, self.step = (
            InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
            for name in ("image", "text", "step")
        )

    def preprocess(self, path: str | Path) -> Any:
        """Read an image file as pixels [3, h, w], in the dtype of the input of image.onnx."""
        size, crop = self.config["image_size"], self.config["crop"]
        if not Path(path).is_file():
            raise ValueError(f"Captioner: {path} must be an image file; pipes and devices are not opened")
        image = ImageOps.exif_transpose(Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        bicubic = crop in ("clip", "squash_bicubic")
        resampling = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
        if crop.startswith("squash"):
            image = image.resize((size, size), resampling)
        elif crop == "center":
            image = ImageOps.fit(image, (size, size), resampling)
        else:
            width, height = (int(size * side / min(image.size)) for side in image.size)
            left, top = round((width - size) / 2), round((height - size) / 2)
            image = image.resize((width, height), resampling)
            image = image.crop((left, top, left + size, top + size))
        pixels = np.asarray(image).transpose(2, 0, 1)
        if self.config["pixels"] == "uint8":
            return pixels
        mean, std = (np.array(self.config[key], dtype=np.float32)[:, None, None] for key in ("mean", "std"))
        return (pixels.astype(np.float32) / 255 - mean) / std

    def encode_images(self, pixels: Any) -> Arrays:
        """Encode pixels [b, 3, h, w] -> image_embeddings [b, e], and context_keys and context_values for captions."""
        names = [output.name for output in self.image.get_outputs()]
        return dict(zip(names, self.image.run(names, {"images": pixels}), strict=True))

    def embed_texts(self, texts: list[str]) -> Any:
        """Embed texts -> [b, e], unit length; the product with image_embeddings is the cosine similarity."""
        return self.text.run(["text_embeddings"], self.text_inputs(texts))[0]

    def text_inputs(self, texts: list[str]) -> Arrays:
        """Returns rows of BOS t1 ... tn EOS CLS PAD ... PAD, and positions, with the last of the context for CLS."""
        c = self.config
        rows = []
        for text in texts:
            tokens = self.pieces.encode(" ".join(text.split()))[: c["max_new_tokens"]]
            rows.append([c["bos_id"], *tokens, c["eos_id"], c["cls_id"]])
        longest = max(map(len, rows))
        ids = np.array([row + [c["pad_id"]] * (longest - len(row)) for row in rows], dtype=np.int64)  # [b, s]
        positions = np.where(ids == c["cls_id"], c["context_length"] - 1, np.arange(longest))
        return {"ids": ids, "positions": positions}

    def caption(self, encoded: Arrays) -> list[str]:
        """Generate a caption for each image of encode_images."""
        return [self._decode(ids) for ids in self.generate(encoded).tolist()]

    def generate(self, encoded: Arrays) -> Any:
        """Generate greedily until all captions have EOS: ids [b, n], to be ignored after EOS."""
        c, context = self.config, {name: encoded[name] for name in ("context_keys", "context_values")}
        b, h, k = (context["context_keys"].shape[axis] for axis in (1, 2, 4))
        layers = self.step.get_inputs()[-1].shape[0]
        keys = values = np.zeros((layers, b, h, 0, k), dtype=np.float32)  # of no tokens at first
        ids = np.full((b, 1), c["bos_id"], dtype=np.int64)
        generated = []
        for position in range(c["max_new_tokens"]):
            inputs = {"ids": ids, "position": np.array([position]), "keys": keys, "values": values, **context}
            logits, keys, values = self.step.run(["logits", "next_keys", "next_values"], inputs)
            logits[:, [c["pad_id"], c["bos_id"], c["cls_id"]]] = -np.inf  # never generated
            ids = logits.argmax(-1)[:, None]
            generated.append(ids)
            if (np.concatenate(generated, axis=1) == c["eos_id"]).any(axis=1).all():
                break
        return np.concatenate(generated, axis=1)

    def _decode(self, ids: list[int]) -> str:
        """Returns the text up to EOS; ids that are not pieces are skipped."""
        end = ids.index(self.config["eos_id"]) if self.config["eos_id"] in ids else len(ids)
        text: str = self.pieces.decode([i for i in ids[:end] if i < self.pieces.get_piece_size()])
        return text


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(f"usage: python {sys.argv[0]} IMAGE [TEXT ...]")
    captioner = Captioner(Path(__file__).parent)
    encoded = captioner.encode_images(captioner.preprocess(sys.argv[1])[None])
    caption = captioner.caption(encoded)[0]
    print(caption if caption.isprintable() else repr(caption))  # a model may generate control characters
    for text in sys.argv[2:]:
        print(f"{float(captioner.embed_texts([text])[0] @ encoded['image_embeddings'][0]):.4f}  {text}")


if __name__ == "__main__":
    main()
