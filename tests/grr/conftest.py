"""Shared by the tests of what is done with a trained model: the model, image files, and the words of made-up pairs."""

import pytest
from evaluate_worker import a_tokenizer
from PIL import Image

from grr.data.image_files import find_images
from grr.inference.captioner import Captioner
from grr.inference.pretrained import load_pretrained
from grr.tokenizers import Tokenizer


@pytest.fixture(scope="module")
def trained(colour_run) -> Captioner:
    """The model that knows six colours."""
    return load_pretrained(colour_run)


@pytest.fixture
def files(tmp_path) -> list[str]:
    """An image of each of its colours, and a file that is none."""
    for name in ("red", "green", "blue", "yellow", "white", "black"):
        Image.new("RGB", (40, 30), name).save(tmp_path / f"{name}.png")
    (tmp_path / "empty.png").touch()
    return find_images(tmp_path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """The words of evaluate_worker.py's captions."""
    return a_tokenizer(tmp_path_factory.mktemp("tokenizer"))
