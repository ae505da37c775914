"""Low-rank adapters of linear layers."""

import math
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dropout import Dropout


class LoRALinear(nn.Module):
    """Linear layer with a trained update of low rank: x W^T + b + (alpha / rank) dropout(x) A^T B^T.

    x: [..., in_features] -> [..., out_features]. `weight` W and `bias` b are those of an nn.Linear, under the same
    names; `lora_a` A: [rank, in_features] is drawn as the weight of an nn.Linear, `lora_b` B: [out_features, rank] is
    0, so that the layer begins as the linear layer, bit for bit. rank (in_features + out_features) parameters more.
    Dropout is drawn from torch's generator. Source: Hu et al. 2021 (LoRA), equation 3.
    Raises ValueError if rank is not from 1 to the shorter side of the matrix, or alpha or dropout out of its range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"LoRALinear: rank must be from 1 to the shorter side of the matrix, got {rank=} for {out_features} x "
                f"{in_features}; a full matrix has no more parameters than an update of a higher rank"
            )
        if not (0 < alpha < math.inf and 0 <= dropout < 1):
            raise ValueError(
                f"LoRALinear: alpha must be above 0 and finite, dropout from 0 to below 1, got {alpha=}, {dropout=}; "
                "alpha=16 and dropout=0 are usual"
            )
        self.in_features, self.out_features, self.rank, self.alpha = in_features, out_features, rank, alpha
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.lora_a = nn.Parameter(torch.empty(rank, in_features))
        self.lora_b = nn.Parameter(torch.empty(out_features, rank))
        self.dropout = Dropout(dropout)
        self.quantized = False
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, rank: int, alpha: float, dropout: float = 0.0) -> Self:
        """Returns the layer on the parameters of an nn.Linear, plain or quantised, which are frozen.

        Raises ValueError as the class does, and if no gradient passes through the weight, as in torchao's int8 with
        quantised inputs.
        """
        weight, bias = linear.weight, linear.bias
        out_features, in_features = weight.shape
        with torch.device("meta"):
            layer = cls(in_features, out_features, rank=rank, alpha=alpha, dropout=dropout, bias=bias is not None)
        layer.weight, layer.bias = weight, bias  # type: ignore[assignment]  # typed as a Tensor there
        layer.requires_grad_(False)
        layer.quantized = type(weight.data) is not Tensor
        if layer.quantized and not _passes_gradients(weight):
            raise ValueError(
                f"LoRALinear: gradients must pass through the weight, got a {type(weight.data).__name__} that stops "
                "them; quantize by a weight-only scheme, such as int8_weight_only"
            )
        for name in ("lora_a", "lora_b"):
            empty = torch.empty_like(getattr(layer, name), device=weight.device, dtype=weight.dtype)
            setattr(layer, name, nn.Parameter(empty))
        layer.reset_adapter()
        return layer

    @property
    def scale(self) -> float:
        """Factor of the update, alpha / rank."""
        return self.alpha / self.rank

    def reset_parameters(self) -> None:
        """Draw weight and bias as nn.Linear does, and the adapter."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Linear has it
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(self.in_features**-0.5), self.in_features**-0.5)
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Draw A anew and set B to 0."""
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    def update(self) -> Tensor:
        """Compute what the adapter adds to the weight, [out_features, in_features]."""
        return self.scale * (self.lora_b @ self.lora_a)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the weight and set B to 0: the layer computes the same, without the adapter.

        Raises ValueError if the weight is quantised.
        """
        if self.quantized:
            raise ValueError(
                f"LoRALinear: an update is added to a matrix of numbers, got a {type(self.weight.data).__name__}; keep "
                "the adapters beside the model, or merge them before it is quantised"
            )
        self.weight.add_(self.update())
        self.lora_b.zero_()

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(self.dropout(x), self.lora_a), self.lora_b)
        return torch.add(F.linear(x, self.weight, self.bias), update, alpha=self.scale)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"rank={self.rank}, alpha={self.alpha:g}"
        )


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters of all adapters in a model, A and B of each, by name."""
    return {
        f"{name}.{key}".removeprefix("."): getattr(layer, key)
        for name, layer in model.named_modules()
        if isinstance(layer, LoRALinear)
        for key in ("lora_a", "lora_b")
    }


def _passes_gradients(weight: Tensor) -> bool:
    """Returns whether a product with a quantised weight has a gradient with respect to the other factor."""
    x = torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device, requires_grad=True)
    with torch.enable_grad():
        return F.linear(x, weight).requires_grad
