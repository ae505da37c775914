"""A failed write raises OSError with the system's error number, whichever library wrote."""

import errno
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from grr.files.disk import disk_errors

FULL = Path("/dev/full")  # every write to it fails with ENOSPC


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
def test_a_full_disk_under_torch_save_is_an_os_error_with_its_number_and_the_remedy():
    with (
        pytest.raises(OSError, match=r"No space left on device; free some space, .*weights.pt") as caught,
        disk_errors(Path("weights.pt")),
        FULL.open("wb", buffering=0) as file,
    ):
        torch.save(torch.zeros(300_000), file)
    assert caught.value.errno == errno.ENOSPC


def test_a_write_that_fails_under_safetensors_is_an_os_error_with_its_number(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught, disk_errors(tmp_path / "a"):
            save_file({"x": torch.zeros(30_000)}, tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG


def test_other_errors_pass_unchanged():
    with pytest.raises(ValueError, match="a rule"), disk_errors(Path("a")):
        raise ValueError("a rule")
