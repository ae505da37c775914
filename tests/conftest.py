"""Shared by all tests: reproducible hypothesis, exact matmuls, and where the development data lies."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import is_hypothesis_test, settings
from PIL import ImageColor

from grr.checkpoint.model_folder import save_model
from grr.data.collate import collate_captions
from grr.inference.pretrained import describe
from grr.models.builders import grr_coca_tiny
from grr.parallel import process_group as parallel
from grr.tokenizers import train_tokenizer
from grr.training.loss import contrastive_loss

COLOURS = ("red", "green", "blue", "yellow", "white", "black")

settings.register_profile("grr", deadline=None, derandomize=True, max_examples=30)  # the same examples in each run
settings.register_profile("thorough", deadline=None, max_examples=30, print_blob=True)  # others in each run
settings.load_profile(os.environ.get("GRR_HYPOTHESIS", "grr"))
torch.set_float32_matmul_precision("highest")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what tests start: workers of two threads each wait for one another
torch.set_num_threads(1)


# Files whose slow tests take minutes: a worker that began one last would run alone for as long.
LONGEST = (
    "test_docs.py",
    "test_parallelize.py",
    "test_finetune.py",
    "test_step.py",
    "test_resume.py",
    "test_caption_by_many.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what hypothesis runs as a law, for GRR_HYPOTHESIS=thorough pytest -m law; begin with the longest files.

    What needs a GPU is skipped without one.
    """
    items.sort(key=lambda item: item.path.name not in LONGEST)
    for item in items:
        if is_hypothesis_test(getattr(item, "obj", None)):
            item.add_marker("law")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, got none"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photographs and files, named by GRR_TEST_DATA; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("GRR_TEST_DATA", Path(__file__).resolve().parents[1] / "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no development data at {folder} (set GRR_TEST_DATA)")
    return folder


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """A process group of this one process, for the tests of a file."""
    with parallel.process_group():
        yield


@pytest.fixture(scope="session")
def colour_run(tmp_path_factory) -> Path:
    """The folder of a run whose model knows six colours, by their names in Pillow, and says "a red picture"."""
    folder = tmp_path_factory.mktemp("colours") / "run"
    captions = [f"a {colour} picture" for colour in COLOURS]
    folder.mkdir()
    tokenizer = train_tokenizer(captions, folder / "tokenizer.model", vocab_size=64, context_length=16)
    arguments = {"vocab_size": tokenizer.vocab_size, "context_length": 16, "image_size": 32}
    torch.manual_seed(0)
    model = grr_coca_tiny(**arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    texts = [tokenizer.encode(caption) for caption in captions]
    ids, positions, _, label_places, labels, n = collate_captions(texts, pad_id=tokenizer.pad_id)
    plain = torch.tensor([ImageColor.getrgb(colour) for colour in COLOURS]).view(-1, 3, 1, 1)
    for _ in range(60):
        images = plain + torch.randint(-25, 26, (6, 3, 1, 1)) + torch.randint(-10, 11, (6, 3, 32, 32))
        output = model(images.clamp(0, 255).byte(), ids, positions=positions, labels=labels, label_places=label_places)
        contrast = contrastive_loss(output.image_embeddings, output.text_embeddings)
        (contrast + output.token_losses.sum() / n).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(folder / "model", model, describe("grr_coca_tiny", arguments, "squash"), folder / "tokenizer.model")
    return folder
