"""One side of the equality tests: what a random model makes of generated pairs, and the numbers made of that.

torchrun --nproc_per_node N evaluate_worker.py FOLDER, or plain python for one process; rank 0 prints digests of all
tensors, and all numbers in full. Its pairs and its model serve the other tests of evaluations as well.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from grr.data import Labelled, Pairs
from grr.data.images import BadImage, Crop
from grr.data.pairs import Texts
from grr.evaluation.evaluate import caption_scores, losses, recalls, validation_metrics
from grr.evaluation.outputs import compute_outputs, features, over_images
from grr.models.builders import grr_coca_tiny
from grr.models.coca import CoCa
from grr.parallel.initialize import initialize
from grr.parallel.parallelize import parallelize
from grr.parallel.process_group import on_rank_0, process_group
from grr.tokenizers import Tokenizer, train_tokenizer

THINGS = ["fox", "owl", "car", "tree", "moon", "star"]
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
SEEN = {"image_size": 32, "crop": "squash"}


class Noise(Pairs):
    """Noise on a colour, image image_of[t] with caption t. Some images are bad, some captions (of pairs) missing."""

    def __init__(self, image_of: list[int], *, bad: tuple[int, ...] = (), silent: tuple[int, ...] = ()) -> None:
        captions = [f"a {list(COLOURS)[j % 4]} {THINGS[j % 6]} number {t % 7}" for t, j in enumerate(image_of)]
        captions = ["" if t in silent else caption for t, caption in enumerate(captions)]
        ids = Texts.of(f"{j}.png#{t}" for t, j in enumerate(image_of))
        super().__init__(ids, Texts.of(captions), np.array(image_of))
        self.bad = bad

    def load(self, i: int, *, size: int, crop: Crop) -> Tensor:
        j = int(self.image_of[i])
        if j in self.bad:
            raise BadImage("half of it is missing")
        noise = torch.randint(0, 128, (3, size, size), generator=torch.Generator().manual_seed(j))
        return (noise + torch.tensor(list(COLOURS.values())[j % 4]).view(3, 1, 1) // 2).to(torch.uint8)


def several_captions(images: int) -> list[int]:
    """Images with one, two or three captions, which do not stand together."""
    return [j for k in range(3) for j in range(images) if j % 3 >= k]


def colours(images: int, **options: tuple[int, ...]) -> Labelled:
    """Images whose classes are their colours."""
    return Labelled(Noise(list(range(images)), **options), list(COLOURS), np.arange(images) % 4)


def a_tokenizer(folder: Path) -> Tokenizer:
    return train_tokenizer(
        Noise(several_captions(40)).captions, folder / "tokenizer.model", vocab_size=96, context_length=16
    )


def a_model(tokenizer: Tokenizer, seed: int = 0) -> CoCa:
    with torch.device("meta"):
        model = grr_coca_tiny(vocab_size=tokenizer.vocab_size, context_length=16, dropout=0.1)
    initialize(model, torch.device("cpu"), seed=seed)
    return model


def digest(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(x.contiguous().numpy().tobytes() for x in tensors)).hexdigest()


def main(folder: Path) -> None:
    with process_group() as device:
        on_rank_0(lambda: folder.mkdir(exist_ok=True) or a_tokenizer(folder))
        tokenizer = Tokenizer(folder / "tokenizer.model", context_length=16)
        model = a_model(tokenizer)
        pairs = Noise(several_captions(130), bad=(3, 50, 77), silent=(0, 9))
        outputs = compute_outputs(model, pairs, tokenizer, device, generation={}, **SEEN)
        batches, _ = over_images(pairs, list(range(130)), lambda pixels, items: [len(pixels), items], device, **SEEN)
        looked = features(model, colours(70, bad=(5,)), device, patches=True, **SEEN)
        parallelize(model, device)
        metrics, examples = validation_metrics(model, pairs, tokenizer, device, num_eval_images=60, **SEEN)
        shown = [match.candidate for r in examples.retrievals for match in r.images] + [
            c.image for c in examples.captions
        ]
        shown += [maps.maps for maps in examples.attention]
        if outputs is not None:
            tensors = [
                outputs.image_of_text,
                outputs.image_embeddings,
                outputs.text_embeddings,
                outputs.token_losses,
                outputs.tokens,
            ]
            print(
                "RESULT "
                + json.dumps(
                    {
                        "batches": batches,
                        "rows": [outputs.images, outputs.texts, list(outputs.left_out.items()), outputs.written],
                        "tensors": digest(*tensors),
                        "losses": losses(outputs, contrastive_batch=32),
                        "recalls": recalls(outputs),
                        "captions": caption_scores(outputs, tokenizer),
                        "features": [
                            digest(looked.embeddings, looked.patches, looked.labels),
                            list(looked.left_out.items()),
                        ],
                        "examined": [metrics, digest(*shown), [c.written for c in examples.captions]],
                    }
                )
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
