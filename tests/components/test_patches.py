"""PatchEmbedding: each patch of the image becomes one vector, row by row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from grr.components import PatchEmbedding

grids = st.tuples(st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 2, 5]))  # rows, columns, patch_size


def some_images(rows: int, columns: int, patch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    return torch.randn(2, 3, rows * patch, columns * patch, generator=generator, dtype=torch.float64)


@given(grid=grids, data=st.data())
def test_a_pixel_changes_only_the_vector_of_its_patch(grid, data):
    rows, columns, patch = grid
    y = data.draw(st.integers(0, rows * patch - 1))
    x = data.draw(st.integers(0, columns * patch - 1))
    module, images = PatchEmbedding(8, patch).double(), some_images(*grid)
    before = module(images)
    images[:, :, y, x] += 1
    changed = (module(images) != before).any(-1)  # [b, p]
    assert changed.nonzero()[:, 1].tolist() == [y // patch * columns + x // patch] * 2


@given(grid=grids)
def test_it_equals_a_linear_layer_over_unfolded_patches(grid):
    module, images = PatchEmbedding(8, grid[2]).double(), some_images(*grid)
    squares = nn.functional.unfold(images, grid[2], stride=grid[2]).transpose(1, 2)  # [b, p, 3 * patch * patch]
    expected = nn.functional.linear(squares, module.projection.weight.flatten(1), module.projection.bias)
    torch.testing.assert_close(module(images), expected)


def test_the_output_is_contiguous():
    """Sums keep the memory layout of their first term, so the residual stream has that of the patch embedding."""
    x = PatchEmbedding(8, 2)(torch.zeros(2, 3, 6, 6))
    assert (x + torch.zeros(2, 9, 8)).is_contiguous()


def test_parameter_count():
    assert sum(p.numel() for p in PatchEmbedding(768, 18).parameters()) == 768 * 3 * 18 * 18 + 768


def test_images_are_cast_to_the_dtype_of_the_weights():
    assert PatchEmbedding(8, 4, channels=1).bfloat16()(torch.ones(1, 1, 8, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize(("height", "width"), [(8, 9), (9, 8)])
def test_a_side_that_is_not_a_multiple_of_the_patch_is_refused(height, width):
    with pytest.raises(ValueError, match=f"PatchEmbedding: .* multiples of patch_size=4, got {height} x {width}"):
        PatchEmbedding(8, 4)(torch.ones(1, 3, height, width))
