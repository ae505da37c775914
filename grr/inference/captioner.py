"""A trained model as a program uses it: images in any form go in, captions, embeddings and classes come out."""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from grr.checkpoint.finite import check_finite_outputs
from grr.checkpoint.model_folder import save_model_state
from grr.data.image_inputs import ImageInput, ImageInputs, each_image, named_error, read_image
from grr.data.images import BadImage, Crop
from grr.data.threads import in_thread
from grr.evaluation.zero_shot import TEMPLATES, class_embeddings, class_probabilities, embed_texts
from grr.generation.generate import check_generation, generate
from grr.inference.description import describe
from grr.inference.hub import card_start, push, split_name
from grr.models.coca import CoCa, evaluating
from grr.tokenizers import Tokenizer

BATCH = 50  # images at a time


class Captioner(NamedTuple):
    """A trained model with its tokenizer and the way it reads images; `grr.load` opens one.

        captioner = grr.load("runs/openmoji")
        captioner.caption("photo.jpg")                            # ["a fox and a key"]
        captioner.classify(["a.jpg", "b.jpg"], ["fox", "owl"])    # [{"fox": 0.9, "owl": 0.1}, ...]

    `images` is a path, the bytes of a file, a file opened in binary mode, a Pillow image, an array uint8 [h, w, 3], a
    tensor uint8 [3, h, w], a list of these, or a batch, an array uint8 [b, h, w, 3] or a tensor uint8 [b, 3, h, w].
    EXIF orientation is applied, transparency is laid on white. Images are read and computed 50 at a time, so memory
    does not grow with their number.
    What is returned lies on the CPU. An image that cannot be used raises an error that names it: ValueError, BadImage,
    which is a ValueError, for a damaged file, and OSError for one that cannot be read; the commands `grr caption`,
    `classify` and `embed` report such files and continue.

    It is a tuple too: model, tokenizer, image_size, crop = captioner.
    """

    model: CoCa
    tokenizer: Tokenizer
    image_size: int
    crop: Crop

    def __repr__(self) -> str:
        parameters = sum(p.numel() for p in self.model.parameters())
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        return (
            f"Captioner({type(self.model).__name__} of {parameters:,} parameters in {dtype} on {self.device}, "
            f"{type(self.tokenizer).__name__} of {self.tokenizer.vocab_size:,} ids, image_size={self.image_size}, "
            f"crop={self.crop!r})"
        )

    @property
    def device(self) -> torch.device:
        """The device of the model, where everything is computed."""
        return next(self.model.parameters()).device

    def preprocess(self, images: ImageInputs) -> Tensor:
        """Returns images as the model reads them: uint8 [b, 3, image_size, image_size]."""
        empty = torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8)
        return torch.cat([empty, *(pixels for pixels, _ in self._batches("preprocess", images))])

    def caption(self, images: ImageInputs, **generation: Any) -> list[str]:
        """Returns a caption for each image. generation: the options of `grr.generate`, num_beams=4 for example.

        Raises TypeError, with the nearest name, for an option that `grr.generate` does not have.
        """
        check_generation("caption", generation)
        captions: list[str] = []
        for pixels, _ in self._batches("caption", images):
            captions += generate(self.model, pixels.to(self.device), self.tokenizer, **generation)
        return captions

    @torch.no_grad()
    def embed_images(self, images: ImageInputs) -> Tensor:
        """Returns the embeddings of images: float32 [b, e], unit length.

        The cosine similarities to texts are embed_images(images) @ embed_texts(texts).T.
        Raises ValueError if the model computes NaN or infinity.
        """
        blank = torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8)
        embeddings = [self._encode(blank)[:0]]  # [0, e], for no images
        for pixels, names in self._batches("embed_images", images):
            embeddings.append(self._encode(pixels))
            check_finite_outputs("embed_images", embeddings[-1], names)
        return torch.cat(embeddings)

    def embed_texts(self, texts: str | Sequence[str]) -> Tensor:
        """Returns the embeddings of texts: float32 [b, e], unit length.

        Raises ValueError if one is not a string, or if the model computes NaN or infinity.
        """
        texts = _strings("embed_texts", "texts", [texts] if isinstance(texts, str) else texts)
        return embed_texts(self.model, self.tokenizer, texts or [""], self.device).cpu()[: len(texts)]

    def classify(
        self, images: ImageInputs, names: Sequence[str], *, templates: Sequence[str] = TEMPLATES
    ) -> list[dict[str, float]]:
        """Returns for each image the probability of each class, the likeliest class first.

        names: of the classes; each is put into the templates in the place of {}, and no training is needed (zero-shot
        classification; Radford et al. 2021, section 3.1.4). Probabilities are the softmax over all classes of the
        cosine similarities divided by the model's temperature. Classes of the same probability are in the order given.
        Raises ValueError if there is no name, one occurs twice, a template does not hold {} once, or the model computes
        NaN or infinity.
        """
        names = _strings("classify", "names", names)
        templates = tuple(_strings("classify", "templates", templates))
        classes = class_embeddings(self.model, self.tokenizer, names, self.device, templates=templates)  # [c, e]
        rows: list[dict[str, float]] = []
        for pixels, of in self._batches("classify", images):
            with evaluating(self.model):
                p = class_probabilities(self.model, pixels.to(self.device), classes, who="classify", of=of)  # [b, c]
            for likely, order in zip(*(x.tolist() for x in p.sort(dim=1, descending=True, stable=True)), strict=True):
                rows.append({names[i]: chance for i, chance in zip(order, likely, strict=True)})
        return rows

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as a folder that `grr.load` reads: config.json, model.safetensors and tokenizer.model.

        Weights are saved in the precision that they have here. Raises ValueError for anything but the path of a folder
        that is new, empty or a model's, if the model is quantised, or if no builder is known by which it can be built
        again.
        """
        if not isinstance(folder, str | os.PathLike) or os.fspath(folder) == "":
            raise ValueError(
                f"save_pretrained: folder must be a path, got {folder!r}; name a new folder, such as 'models/mine'"
            )
        folder = Path(folder)
        if folder.exists() and not (
            (folder / "config.json").is_file() or (folder.is_dir() and not any(folder.iterdir()))
        ):
            raise ValueError(
                f"save_pretrained: folder must be new, empty or a model's, got {folder}, which holds other files; name "
                "another folder"
            )
        state = self.model.state_dict()
        if any(is_traceable_wrapper_subclass(value) for value in state.values()):
            raise ValueError(
                "save_pretrained: the model must have plain weights, got a quantised one; copy the folder that it was "
                "opened from"
            )
        if self.model.built_by is None:
            raise ValueError(
                "save_pretrained: the model must be of grr.load or grr.create_model, which know how to build it again, "
                f"got a {type(self.model).__name__} of other code; add its builder to grr.builders.MODELS"
            )
        builder, arguments = self.model.built_by
        with TemporaryDirectory() as place:
            self.tokenizer.save(Path(place, "tokenizer.model"))
            description = describe(builder, arguments, self.crop)
            save_model_state(folder, state, description, Path(place, "tokenizer.model"))

    def push_to_hub(self, name: str, *, private: bool = False) -> str:
        """Save the model, upload it to the Hugging Face hub as owner/name, and return the address of the commit.

        The repository is created if there is none; HF_TOKEN or `hf auth login` names the user. `grr push` uploads a run
        with a model card of its data and numbers. Raises as `save_pretrained` and `grr.inference.hub.push` do.
        """
        with TemporaryDirectory() as place:
            self.save_pretrained(Path(place, "model"))
            files: dict[str, Path | bytes] = {file.name: file for file in Path(place, "model").iterdir()}
            files["README.md"] = card_start(split_name(name, who="push")[0]).encode()
            return push(files, name, private=private)

    def _encode(self, pixels: Tensor) -> Tensor:
        with evaluating(self.model):
            return self.model.encode_image(pixels.to(self.device)).float().cpu()  # [b, e]

    def _batches(self, who: str, images: ImageInputs) -> Iterator[tuple[Tensor, list[str]]]:
        """Read at most BATCH images at a time: uint8 [b, 3, image_size, image_size], and their names in messages."""
        read = in_thread(partial(_read, size=self.image_size, crop=self.crop))
        numbered = enumerate(each_image(images))
        with ThreadPoolExecutor() as pool:
            while some := [(image, f"{who}: images[{i}]") for i, image in islice(numbered, BATCH)]:
                yield torch.stack(list(pool.map(read, some))), [where for _, where in some]


def _read(named: tuple[ImageInput, str], *, size: int, crop: Crop) -> Tensor:
    image, where = named
    try:
        return read_image(image, size=size, crop=crop, where=where)
    except (BadImage, OSError) as error:
        raise named_error(error, where, image) from error


def _strings(who: str, argument: str, values: object) -> list[str]:
    """Returns the values as a list. Raises ValueError, naming the argument, if they are not several strings."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ValueError(
            f"{who}: {argument} must be a list of strings, got {type(values).__name__} {str(values)[:60]!r}; write "
            "each as text, in a list"
        )
    strings = list(values)
    for i, value in enumerate(strings):
        if not isinstance(value, str):
            raise ValueError(
                f"{who}: {argument}[{i}] must be a string, got {type(value).__name__} {str(value)[:60]!r}; write it as "
                "text"
            )
    return strings
