"""Built-in tasks on OpenMoji: classification of objects, questions about scenes, entailment, choices of sentences."""

import itertools
import math
import random
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from PIL import Image
from torch import Tensor

from grr.data.formats.choices import Choices
from grr.data.formats.openmoji import (
    CANVAS,
    COLOURS,
    OBJECTS,
    RELATIONS,
    Scene,
    Scenes,
    openmoji,
    paste,
    sentence,
    with_article,
)
from grr.data.images import THUMBNAIL, Crop, to_tensor, to_thumbnail
from grr.data.labelled import CLASS_TEXT, JUDGEMENTS, Labelled
from grr.data.pairs import Ints, Pairs, Texts

Split = Literal["train", "validation"]
SIDES = {"to the left of": ("on the left", "on the right"), "above": ("at the top", "at the bottom")}
HIDDEN = 64  # grey level of 255 of a hidden half, darker than every background


def openmoji_classes(*, split: Split = "train", pictures: int = 12, held_out: int = 2, seed: int = 0) -> Labelled:
    """Generate pictures of one of forty objects on one of nine backgrounds; the class is the object.

    Validation has each object on `held_out` of the backgrounds, drawn by the seed, and training on the others. Each
    combination has `pictures` pictures of different sizes and positions. Raises ValueError if an argument is out of
    range.
    """
    if pictures < 1 or not 0 < held_out < len(COLOURS):
        raise ValueError(
            f"openmoji_classes: pictures must be at least 1 and held_out from 1 to {len(COLOURS) - 1}, got "
            f"{pictures=}, {held_out=}"
        )
    objects = []
    for name in OBJECTS:
        colours = random.Random(f"{seed} {name}").sample(list(COLOURS), len(COLOURS))
        chosen = colours[:held_out] if split == "validation" else colours[held_out:]
        objects += [(name, colour) for colour in chosen for _ in range(pictures)]
    classes = sorted(OBJECTS)
    return Labelled(Objects(objects, seed), classes, _numbers(classes, (name for name, _ in objects)))


def openmoji_questions(*, split: Split = "train", scenes: int = 3000, held_out: int = 200, seed: int = 0) -> Labelled:
    """Generate four questions about each scene of two objects; the classes are the answers: objects, colours, yes, no.

    "what colour is the background", "what is on the left" and "... on the right" (or "at the top", "at the bottom"),
    and "is there a fox", of which half are true. Scenes are those of `openmoji` with sentences="relation",
    split by sentence. Raises as it does.
    """
    pictures = openmoji(split=split, sentences="relation", scenes=scenes, held_out=held_out, seed=seed)
    items = [_questions(s, random.Random(f"{seed} {s}")) for s in pictures.scenes]
    questions = [[question for question, _ in of_scene] for of_scene in items]
    answers = (answer for of_scene in items for _, answer in of_scene)
    classes = [*sorted(OBJECTS), *sorted(COLOURS), "no", "yes"]
    return Labelled(TextsOfImages(pictures, questions), classes, _numbers(classes, answers))


def openmoji_entailment(*, split: Split = "train", scenes: int = 3000, held_out: int = 200, seed: int = 0) -> Labelled:
    """Generate three sentences about each scene of two objects, one of which is hidden: one sentence follows from the
    visible half, one contradicts it, and one is neutral, because it is about the hidden half.

    "a fox is on the left", "there is a fox", "there is no fox", "the background is blue": each kind of sentence belongs
    to several classes, so neither the sentence nor the image alone predicts the class. Scenes are those of `openmoji`
    with sentences="relation", split by sentence. Raises as it does.
    """
    pictures = openmoji(split=split, sentences="relation", scenes=scenes, held_out=held_out, seed=seed)
    rngs = [random.Random(f"{seed} {scene}") for scene in pictures.scenes]
    hidden = [rng.randrange(2) for rng in rngs]
    sentences = [_hypotheses(*drawn) for drawn in zip(pictures.scenes, hidden, rngs, strict=True)]
    halves = [(scene[1], h) for scene, h in zip(pictures.scenes, hidden, strict=True)]
    labels = np.tile(np.arange(len(JUDGEMENTS)), len(sentences))
    return Labelled(TextsOfImages(HalfHidden(pictures, halves), sentences), list(JUDGEMENTS), labels)


def openmoji_choices(*, held_out: int = 500, seed: int = 0) -> Choices:
    """Generate two questions about each validation scene of `openmoji` with sentences="relation": whether its sentence
    is right or that with the two objects exchanged ("objects"), and that with the other relation ("relation").

    The wrong sentences have the words of the right one or all but the relation, so a bag of words answers the first
    question by chance. Raises as `openmoji` does.
    """
    pictures = openmoji(split="validation", sentences="relation", held_out=held_out, seed=seed)
    texts = []
    for first, relation, second, colour in pictures.scenes:
        [other] = set(RELATIONS["relation"]) - {relation}
        right = sentence((first, relation, second, colour))
        wrong = sentence((second, relation, first, colour)), sentence((first, other, second, colour))
        texts.append([right, wrong[0], right, wrong[1]])
    n = len(texts)
    return Choices(
        TextsOfImages(pictures, texts),
        np.arange(2 * n).repeat(2),
        np.tile([True, False], 2 * n),
        ["objects", "relation"],
        np.tile([0, 0, 1, 1], n),
    )


class Objects(Pairs):
    """Single objects, drawn when they are loaded: (object, colour of the background) each."""

    def __init__(self, objects: Sequence[tuple[str, str]], seed: int) -> None:
        ids = Texts.of(f"{name}_on_{colour}_{i}" for i, (name, colour) in enumerate(objects))
        super().__init__(ids, Texts.of(CLASS_TEXT for _ in objects), np.arange(len(objects)))
        self.objects, self.seed = objects, seed

    def load(self, i: int, *, size: int, crop: Crop) -> Tensor:
        return to_tensor(self._draw(i), size=size, crop=crop)

    def thumbnail(self, i: int, *, side: int = THUMBNAIL) -> Tensor:
        return to_thumbnail(self._draw(i, scale=math.ceil(side / CANVAS)), side=side)

    def _draw(self, i: int, *, scale: int = 1) -> Image.Image:
        name, colour = self.objects[i]
        rng = random.Random(f"{self.seed} {self.ids[i]}")
        side = rng.randint(CANVAS * 3 // 8, CANVAS)
        image = Image.new("RGB", (scale * CANVAS, scale * CANVAS), COLOURS[colour])
        corner = rng.randint(0, CANVAS - side), rng.randint(0, CANVAS - side)
        paste(image, name, side, corner, scale=scale)
        return image


class TextsOfImages(Pairs):
    """Texts about the images of other pairs, which have one image each: texts[j] are those about image j."""

    def __init__(self, pictures: Pairs, texts: Sequence[Sequence[str]]) -> None:
        ids = Texts.of(f"{pictures.ids[j]}#{k}" for j, of_image in enumerate(texts) for k in range(len(of_image)))
        image_of = np.repeat(np.arange(len(texts)), [len(of_image) for of_image in texts])
        super().__init__(ids, Texts.of(itertools.chain.from_iterable(texts)), image_of)
        self.pictures = pictures

    def load(self, i: int, *, size: int, crop: Crop) -> Tensor:
        return self.pictures.load(int(self.image_of[i]), size=size, crop=crop)

    def thumbnail(self, i: int, *, side: int = THUMBNAIL) -> Tensor:
        return self.pictures.thumbnail(int(self.image_of[i]), side=side)


class HalfHidden(Pairs):
    """Scenes with one hidden object: halves[i] is the relation of scene i, and the number of its hidden object."""

    def __init__(self, scenes: Pairs, halves: Sequence[tuple[str, int]]) -> None:
        super().__init__(scenes.ids, scenes.captions, scenes.image_of)
        self.scenes, self.halves = scenes, halves

    def load(self, i: int, *, size: int, crop: Crop) -> Tensor:
        return self._hide(self.scenes.load(i, size=size, crop=crop), i)

    def thumbnail(self, i: int, *, side: int = THUMBNAIL) -> Tensor:
        return self._hide(self.scenes.thumbnail(i, side=side), i)

    def _hide(self, pixels: Tensor, i: int) -> Tensor:
        """Hide one half of scene i: uint8 [3, h, w] -> a new tensor of that shape."""
        pixels = pixels.clone()
        relation, hidden = self.halves[i]
        axis = 1 if relation == "above" else 2
        pixels.tensor_split(2, dim=axis)[hidden].fill_(HIDDEN)
        return pixels


def check_disjoint(train: Pairs, held_out: Pairs) -> None:
    """Raise ValueError if two built-in data sets, a training and a validation set, have a drawn scene in common.

    Files are not checked: people write equal captions for different images.
    """
    ours, theirs = _scenes(train), _scenes(held_out)
    if shared := len(ours & theirs):
        raise ValueError(
            f"openmoji: no scene of the validation may be in the training data, got {shared:,} of {len(theirs):,}; set "
            "held_out and seed of the section data to those of the section validation"
        )


def _scenes(pairs: Pairs) -> set[tuple[str, ...]]:
    """Returns what the pictures of a built-in data set show, empty for other data."""
    match pairs:
        case Scenes():
            return set(pairs.scenes)
        case Objects():
            return set(pairs.objects)
        case HalfHidden():
            return _scenes(pairs.scenes)
        case TextsOfImages():
            return _scenes(pairs.pictures)
        case Labelled():
            return _scenes(pairs.pairs)
    return set()


def _questions(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Returns questions about a scene with their answers."""
    first, relation, second, colour = scene
    left, right = SIDES[relation]
    true = rng.random() < 0.5
    name = rng.choice([first, second] if true else [n for n in OBJECTS if n not in (first, second)])
    return [
        ("what colour is the background", colour),
        (f"what is {left}", first),
        (f"what is {right}", second),
        (f"is there {with_article(name)}", "yes" if true else "no"),
    ]


def _hypotheses(scene: Scene, hidden: int, rng: random.Random) -> list[str]:
    """Returns a sentence for each of JUDGEMENTS about a scene whose first (0) or second (1) object is hidden."""
    first, relation, second, colour = scene
    visible = second if hidden == 0 else first
    here, there = SIDES[relation][1 - hidden], SIDES[relation][hidden]
    other = rng.choice([name for name in OBJECTS if name != visible])
    wrong = rng.choice([name for name in COLOURS if name != colour])
    a_visible, an_other = with_article(visible), with_article(other)
    return [
        rng.choice([f"{a_visible} is {here}", f"there is {a_visible}", f"the background is {colour}"]),
        rng.choice([f"{an_other} is {there}", f"there is {an_other}", f"there is no {other}"]),
        rng.choice([f"{an_other} is {here}", f"there is no {visible}", f"the background is {wrong}"]),
    ]


def _numbers(classes: Sequence[str], names: Iterable[str]) -> Ints:
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[name] for name in names], dtype=np.int64)
