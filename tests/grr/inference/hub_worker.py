"""Load models from the hub by its real client, and save what they compute: hub_worker.py OUTPUT NAME ...

The environment names the hub and the cache.
"""

import sys
from pathlib import Path

import torch

import grr
from grr.inference.pretrained import find_pretrained
from grr.models.coca import evaluating

TEXTS = ["the fox", "a photo of a red fox!"]


def outputs(name: str, images: list[str]) -> dict[str, object]:
    """What a model computes for images and texts; of the captions, the greedy ones."""
    captioner = grr.load(name, device="cpu")
    ids = torch.tensor([captioner.tokenizer.encode(text) for text in TEXTS])[:, : captioner.tokenizer.context_length]
    pixels = captioner.preprocess(images)
    with evaluating(captioner.model):
        logits = captioner.model(pixels[: len(TEXTS)], ids).logits
    source, captions, tokenizer = find_pretrained(name), captioner.caption(images), captioner.tokenizer
    tokenizer.decode = lambda ids: [i for i in ids if i < tokenizer.bos_id]  # the tokens themselves
    return {
        "tokens": captioner.caption(images),
        "images": captioner.embed_images(images),
        "texts": captioner.embed_texts(TEXTS),
        "logits": logits,
        "captions": captions,
        "crop": captioner.crop,
        "source": str(source),
        "arguments": source.arguments,
        "pixels": pixels,
    }


def main() -> None:
    output, *names = sys.argv[1:]
    images = sorted(str(file) for file in Path(output).parent.glob("*.png"))
    torch.save({name: outputs(name, images) for name in names}, output)


if __name__ == "__main__":
    main()
