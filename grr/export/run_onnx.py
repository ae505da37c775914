"""Use an exported captioner without PyTorch: say what an image shows, and how well sentences fit it.

    python run_onnx.py photo.jpg "a red fox in the snow" "a bowl of soup"

Stands in the folder of an export, beside image.onnx, text.onnx, step.onnx, config.json and tokenizer.model, and needs
numpy, onnxruntime, pillow and sentencepiece alone: copy what you need of it.
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
Arrays = dict[str, Any]  # numpy arrays by their names


class Captioner:
    """The three graphs of a folder, its vocabulary, and how images and sentences are prepared for them."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if self.config["vocabulary"] != "sentencepiece":
            raise ValueError(
                f"Captioner: {folder} has the vocabulary of CLIP, which this example does not read; the "
                "graphs take ids of open_clip's tokenizer, laid out as in text_inputs"
            )
        self.pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        self.image, self.text, self.step = (
            InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
            for name in ("image", "text", "step")
        )

    def read_image(self, path: str | Path) -> Any:
        """An image file as pixels [3, h, w], of the dtype that image.onnx takes."""
        size, crop = self.config["image_size"], self.config["crop"]
        if not Path(path).is_file():
            raise ValueError(f"Captioner: {path} must be an image file; a pipe or a device is not opened")
        image = ImageOps.exif_transpose(Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if crop == "squash":
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        elif crop == "center":
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        else:
            width, height = (int(size * side / min(image.size)) for side in image.size)
            left, top = round((width - size) / 2), round((height - size) / 2)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            image = image.crop((left, top, left + size, top + size))
        pixels = np.asarray(image).transpose(2, 0, 1)
        if self.config["pixels"] == "uint8":
            return pixels
        mean, std = (np.array(self.config[key], dtype=np.float32)[:, None, None] for key in ("mean", "std"))
        return (pixels.astype(np.float32) / 255 - mean) / std

    def see(self, pixels: Any) -> Arrays:
        """pixels [b, 3, h, w] -> image_embeddings [b, e], and context_keys and context_values for captions."""
        names = [output.name for output in self.image.get_outputs()]
        return dict(zip(names, self.image.run(names, {"images": pixels}), strict=True))

    def embed(self, sentences: list[str]) -> Any:
        """Sentences -> [b, e], of unit length as those of images are: their product is the cosine similarity."""
        return self.text.run(["text_embeddings"], self.text_inputs(sentences))[0]

    def text_inputs(self, sentences: list[str]) -> Arrays:
        """Rows of BOS t1 ... tn EOS CLS PAD ... PAD, and positions; that of CLS is the last of the context."""
        c = self.config
        rows = []
        for sentence in sentences:
            tokens = self.pieces.encode(" ".join(sentence.split()))[: c["max_new_tokens"]]
            rows.append([c["bos_id"], *tokens, c["eos_id"], c["cls_id"]])
        longest = max(map(len, rows))
        ids = np.array([row + [c["pad_id"]] * (longest - len(row)) for row in rows], dtype=np.int64)  # [b, s]
        positions = np.where(ids == c["cls_id"], c["context_length"] - 1, np.arange(longest))
        return {"ids": ids, "positions": positions}

    def caption(self, seen: Arrays) -> list[str]:
        """A caption for each image that was seen."""
        return [self._spell(ids) for ids in self.write(seen).tolist()]

    def write(self, seen: Arrays) -> Any:
        """The most likely token, again and again, until all captions have their end: ids [b, n], of no account behind
        EOS."""
        c, context = self.config, {name: seen[name] for name in ("context_keys", "context_values")}
        b, h, k = (context["context_keys"].shape[axis] for axis in (1, 2, 4))
        layers = self.step.get_inputs()[-1].shape[0]
        keys = values = np.zeros((layers, b, h, 0, k), dtype=np.float32)  # of the tokens read so far: none
        ids = np.full((b, 1), c["bos_id"], dtype=np.int64)
        written = []
        for place in range(c["max_new_tokens"]):
            inputs = {"ids": ids, "position": np.array([place]), "keys": keys, "values": values, **context}
            logits, keys, values = self.step.run(["logits", "next_keys", "next_values"], inputs)
            logits[:, [c["pad_id"], c["bos_id"], c["cls_id"]]] = -np.inf  # never written
            ids = logits.argmax(-1)[:, None]
            written.append(ids)
            if (np.concatenate(written, axis=1) == c["eos_id"]).any(axis=1).all():
                break
        return np.concatenate(written, axis=1)

    def _spell(self, ids: list[int]) -> str:
        """The text up to EOS; ids that are no pieces say nothing."""
        end = ids.index(self.config["eos_id"]) if self.config["eos_id"] in ids else len(ids)
        text: str = self.pieces.decode([i for i in ids[:end] if i < self.pieces.get_piece_size()])
        return text


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(f"usage: python {sys.argv[0]} IMAGE [SENTENCE ...]")
    captioner = Captioner(Path(__file__).parent)
    seen = captioner.see(captioner.read_image(sys.argv[1])[None])
    caption = captioner.caption(seen)[0]
    print(caption if caption.isprintable() else repr(caption))  # a model may write control characters
    for sentence in sys.argv[2:]:
        print(f"{float(captioner.embed([sentence])[0] @ seen['image_embeddings'][0]):.4f}  {sentence}")


if __name__ == "__main__":
    main()
