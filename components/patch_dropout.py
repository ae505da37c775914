"""Patch dropout: training on a random part of the tokens of each sequence."""

import torch
from torch import Tensor, nn

from .dropout import fold_in


class PatchDropout(nn.Module):
    """Keep a random part of the tokens of each sequence in training, the same number in each, in their order.

    x: [b, s, d], positions: [s] -> [b, k, d] and the positions [b, k] of the kept tokens; in evaluation, or with p = 0,
    x and positions as they are. k is `num_kept(s)`. The first num_fixed tokens, such as a class token, are always kept.
    keys: int64 [b], one for each sequence. With keys, the kept tokens are a function of the sequence's key, s and p
    only: they are the same on every device and in batches of any size. Without, they are drawn from torch's generator.
    Raises ValueError if p is not from 0 to below 1. Source: Li et al. 2023 (FLIP), section 3.
    """

    def __init__(self, p: float = 0.0, *, num_fixed: int = 0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"PatchDropout: p must be from 0 to below 1, got {p=}; 0.5 drops half of the patches")
        self.p, self.num_fixed = p, num_fixed

    def num_kept(self, num_tokens: int) -> int:
        """Returns the number of tokens that are kept of num_tokens, the fixed ones included."""
        return self.num_fixed + num_kept(num_tokens - self.num_fixed, self.p)

    def forward(self, x: Tensor, positions: Tensor, *, keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self.training or self.p == 0:
            return x, positions
        b, s, d = x.shape
        fixed = torch.arange(self.num_fixed, device=x.device).expand(b, -1)  # [b, f]
        scores = _scores(b, s - self.num_fixed, keys, x.device)  # [b, s - f]
        drawn = scores.topk(self.num_kept(s) - self.num_fixed, sorted=False).indices.sort().values
        kept = torch.cat((fixed, drawn + self.num_fixed), dim=1)  # [b, k]
        return x.gather(1, kept.unsqueeze(-1).expand(-1, -1, d)), positions[kept]

    def extra_repr(self) -> str:
        return f"p={self.p:g}"


def num_kept(num_patches: int, p: float) -> int:
    """Returns the number of patches that `PatchDropout` keeps of num_patches: the nearest to 1 - p of them, at least 1.

    It is a number of the sizes alone, so that shapes do not depend on what was drawn.
    """
    return max(1, round(num_patches * (1 - p)))


def _scores(b: int, s: int, keys: Tensor | None, device: torch.device) -> Tensor:
    """Returns random numbers [b, s], of which the largest decide what is kept."""
    if keys is None:
        return torch.rand(b, s, device=device)
    own = fold_in(keys, torch.full_like(keys, -1))  # the numbers that dropout folds into these keys begin at 0
    return fold_in(own.unsqueeze(1), torch.arange(s, device=device))
