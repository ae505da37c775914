"""A learned token in front of a sequence."""

import torch
from torch import Tensor, nn


class ClassToken(nn.Module):
    """Prepend one learned vector to every sequence, whose output serves as a summary of the sequence.

    x: [b, s, d] -> [b, 1 + s, d]. Source: Devlin et al. 2018 (BERT), section 3; Dosovitskiy et al. 2020 (ViT),
    equation 1.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.weight.to(x.dtype).expand(len(x), 1, -1), x), dim=1)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}"
