"""Shared by all tests: reproducible hypothesis, exact matmuls, and where the development data lies."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("grr", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("grr")
torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photographs and files, named by GRR_TEST_DATA; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("GRR_TEST_DATA", Path(__file__).resolve().parents[1] / "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no development data at {folder} (set GRR_TEST_DATA)")
    return folder
