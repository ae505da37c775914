"""Patch embedding of images."""

from torch import Tensor, nn


class PatchEmbedding(nn.Module):
    """Split images into square patches and project each to a vector: a convolution whose stride is its kernel size.

    images: float [b, c, height, width] -> [b, p, d], row by row, for p = (height / patch_size) (width / patch_size).
    Raises ValueError if a side is not a multiple of patch_size. Source: Dosovitskiy et al. 2020 (ViT), equation 1.
    """

    def __init__(self, dim: int, patch_size: int, *, channels: int = 3) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"PatchEmbedding: both sides of an image must be multiples of patch_size={self.patch_size}, "
                f"got {height} x {width}; resize it first"
            )
        x = self.projection(images.to(self.projection.weight.dtype)).flatten(2)  # [b, d, p]
        return x.transpose(1, 2).contiguous()  # [b, p, d]; otherwise all later sums keep the convolution's layout
