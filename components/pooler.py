"""Attention poolers: a fixed number of learned queries attends to a sequence of any length."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import CrossAttention


class AttentionPooler(nn.Module):
    """Pool a sequence by attention: n learned queries attend to x.

    x: [b, t, d] -> [b, n, d] for n = num_queries. The queries are not projected; key, value and output projections
    have biases: n d + 3 (d^2 + d) parameters. The result does not depend on the order of x. Source: CoCa, section 3.2
    (attentional pooling). Raises ValueError if dim is not a multiple of num_heads, or if x has another width than dim.
    """

    def __init__(self, dim: int, num_queries: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"AttentionPooler: dim must be a multiple of num_heads, got {dim=}, {num_heads=}")
        self.num_heads = num_heads
        self.queries = nn.Parameter(torch.empty(num_queries, dim))
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.queries)  # unit variance, that of a projected query

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        if d != self.queries.shape[1]:
            raise ValueError(
                f"AttentionPooler: x must be [b, t, {self.queries.shape[1]}], got {list(x.shape)}; build the pooler "
                "with the width of x, or project x first"
            )
        q = self.queries.to(x.dtype).view(1, -1, self.num_heads, d // self.num_heads).transpose(1, 2)  # [1, h, n, k]
        k, v = self.kv(x).view(b, t, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # [b, h, t, k] each
        y = F.scaled_dot_product_attention(q.expand(b, -1, -1, -1), k, v)
        return self.out(y.transpose(1, 2).reshape(b, -1, d))

    def extra_repr(self) -> str:
        return f"num_queries={self.queries.shape[0]}, num_heads={self.num_heads}"


class CrossAttentionPooler(nn.Module):
    """Pool a sequence by the cross-attention of a block: n learned queries, normalised and projected, attend to x.

    x: [b, t, c] -> [b, n, d] for n = num_queries and c the width of the context of `attention`.
    """

    def __init__(self, dim: int, num_queries: int, *, norm: nn.Module, attention: CrossAttention) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(num_queries, dim))
        self.norm = norm
        self.attention = attention
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.queries)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.norm(self.queries.to(x.dtype))  # [n, d]
        return self.attention(queries.expand(len(x), -1, -1), x)

    def extra_repr(self) -> str:
        return f"num_queries={self.queries.shape[0]}"
