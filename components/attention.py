"""Multi-head self-attention and cross-attention, computed by torch's fused kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norms import RMSNorm
from .recompute import call_without_keeping
from .rotary import AxialRotaryEmbedding, MixedRotaryEmbedding, RotaryEmbedding, Rotation, rotate

Rotary = RotaryEmbedding | AxialRotaryEmbedding | MixedRotaryEmbedding


class KeyValueCache:
    """Keys and values of the tokens read so far, so that generation computes those of each token once.

    keys, values: [b, h, t, k], memory for t tokens; the first `length` are filled. Tensors are written in place, so
    no gradient passes through a cache. After `fix`, no shape depends on the number of tokens read, so that one compiled
    or captured step reads every further token: attention covers all of the memory, under `mask`.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        self.keys = self.values = torch.empty(0)
        self.place: Tensor | None = None
        self.mask: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [b, h, s, k] and return all that are stored, [b, h, length, k].

        Raises ValueError if they exceed max_length. After `fix`, s is 1 and length is max_length.
        """
        if self.place is not None:
            self.keys.index_copy_(2, self.place, keys)
            self.values.index_copy_(2, self.place, values)
            return self.filled()
        b, h, s, k = keys.shape
        if self.length + s > self.max_length:
            raise ValueError(f"KeyValueCache: {self.length} + {s} tokens do not fit into max_length={self.max_length}")
        if self.length == 0:
            self.keys, self.values = (keys.new_empty(b, h, self.max_length, k) for _ in range(2))
        self.keys[:, :, self.length : self.length + s] = keys
        self.values[:, :, self.length : self.length + s] = values
        self.length += s
        return self.filled()

    def fix(self, place: Tensor, mask: Tensor) -> None:
        """Write each further token at `place` and attend under `mask`, which the caller changes from token to token.

        place: int64 [1], where the next token is written, mask: [1, 1, 1, t] in the dtype of the keys, 0 for the
        places up to that one and minus infinity for the rest.
        """
        for x in (self.keys, self.values):
            x[:, :, self.length :].zero_()  # masked, but uninitialised memory may hold NaN, and 0 * NaN is NaN
        self.place, self.mask, self.length = place, mask, self.max_length

    def filled(self) -> tuple[Tensor, Tensor]:
        """Returns the stored keys and values, [b, h, length, k] each."""
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def select(self, rows: Tensor) -> None:
        """Keep these rows [n] of the batch, in this order; a row may occur more than once."""
        if self.length == 0:
            return
        keys, values = (x[rows] for x in self.filled())  # [n, h, length, k]
        if len(rows) != len(self.keys):
            self.keys, self.values = (x.new_empty(len(rows), *x.shape[1:]) for x in (self.keys, self.values))
        self.keys[:, :, : self.length], self.values[:, :, : self.length] = keys, values


class SelfAttention(nn.Module):
    """Multi-head self-attention: a token attends to all tokens, or with `causal` to itself and earlier ones.

    x: [b, s, d], positions: as the rotary embedding takes them, or the `Rotation` of its angles -> [b, s, d]. "Earlier"
    is defined by the order in the tensor; positions only rotate queries and keys. Query, key and value projections are
    one matrix, in that order; all four projections have biases, unless bias=False: 4 (d^2 + d) parameters. `qk_norm`
    normalises queries and keys of each head before the rotation (Dehghani et al. 2023), which limits the growth of
    attention logits. `gated` multiplies what is attended to by sigmoid(x G), elementwise and before the output
    projection, with one more matrix G of d^2 parameters and its bias (Qiu et al. 2025, "Gated Attention", G1). With
    a cache, x holds the tokens that follow those in the cache. mask: booleans that broadcast to [b, h, s, t], true
    where a query may attend to a key; causal attention hides later tokens as well. Raises ValueError if dim is not a
    multiple of num_heads.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        rotary: Rotary | None = None,
        qk_norm: bool = False,
        bias: bool = True,
        gated: bool = False,
    ) -> None:
        super().__init__()
        head_dim = _head_dim("SelfAttention", dim, num_heads)
        self.num_heads, self.causal = num_heads, causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.gate = nn.Linear(dim, dim, bias=bias) if gated else None
        self.q_norm = RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.rotary = rotary

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | Rotation | None = None,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        b, s, d = x.shape
        qkv = call_without_keeping(self.qkv, x).view(b, s, 3, self.num_heads, -1)
        qk, v = qkv.split((2, 1), dim=2)  # [b, s, 2, h, k], [b, s, 1, h, k]
        qk, v = qk.permute(2, 0, 3, 1, 4), v.squeeze(2).transpose(1, 2)  # [2, b, h, s, k], [b, h, s, k]
        if not isinstance(self.q_norm, nn.Identity):
            q, k = qk.unbind()
            qk = torch.stack((self.q_norm(q), self.k_norm(k)))
        if self.rotary is not None:
            if positions is None:
                raise ValueError("SelfAttention: a rotary embedding needs positions, got positions=None")
            qk = rotate(qk, positions if isinstance(positions, Rotation) else self.rotary.angles(positions))
            if v.requires_grad:  # with a copy of the values, the backward pass needs nothing of the projection
                v = v.clone()
        q, k = qk.unbind()
        if cache is not None:
            k, v = cache.append(k, v)
            if cache.mask is not None:
                mask = cache.mask if mask is None else cache.mask.masked_fill(~mask, -torch.inf)
        t = k.shape[2]
        causal = self.causal if s > 1 else False  # a branch, because `s > 1` is symbolic when compiled for any length
        if causal and (mask is not None or t > s):  # is_causal excludes a mask, and aligns the first query and key
            earlier = torch.ones(s, t, dtype=torch.bool, device=x.device).tril(t - s)
            mask, causal = earlier if mask is None else earlier & mask, False
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(_gated(y.transpose(1, 2).reshape(b, s, d), self.gate, x))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}" + (", causal" if self.causal else "")


class CrossAttention(nn.Module):
    """Multi-head cross-attention: a token attends to all vectors of a context, whose order does not matter.

    x: [b, s, d], context: [b, t, c] -> [b, s, d], for c = context_dim, by default d. context_norm is applied to the
    context first, and may return fewer vectors. Key and value projections are one matrix, in that order; all have
    biases, unless bias=False: 2 (d^2 + d) + 2 (c d + d) parameters; `gated` is that of `SelfAttention`. With a cache,
    the context is projected at the first call only. x may also be [b n, s, d]: each group of n consecutive rows attends
    to one context, and shares its keys and values.
    Raises ValueError if dim is not a multiple of num_heads.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        context_dim: int | None = None,
        context_norm: nn.Module | None = None,
        qk_norm: bool = False,
        bias: bool = True,
        gated: bool = False,
    ) -> None:
        super().__init__()
        head_dim = _head_dim("CrossAttention", dim, num_heads)
        self.num_heads = num_heads
        self.context_norm = context_norm or nn.Identity()
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(context_dim or dim, 2 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.gate = nn.Linear(dim, dim, bias=bias) if gated else None
        self.q_norm = RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, context: Tensor, *, cache: KeyValueCache | None = None) -> Tensor:
        b, n, s = len(context), len(x) // len(context), x.shape[1]
        q = call_without_keeping(self.q, x).view(b, n * s, self.num_heads, -1)
        q = self.q_norm(q.transpose(1, 2))  # [b, h, n s, k]
        if cache is not None and cache.length:
            k, v = cache.filled()
        else:
            context = self.context_norm(context)
            k, v = self.kv(context).view(b, context.shape[1], 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            k = self.k_norm(k)  # [b, h, t, k]
            if cache is not None:
                cache.append(k, v)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(_gated(y.transpose(1, 2).reshape(x.shape), self.gate, x))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


def _gated(y: Tensor, gate: nn.Module | None, x: Tensor) -> Tensor:
    return y if gate is None else y * call_without_keeping(gate, x).sigmoid()


def _head_dim(who: str, dim: int, num_heads: int) -> int:
    if dim % num_heads:
        raise ValueError(f"{who}: dim must be a multiple of num_heads, got {dim=}, {num_heads=}")
    return dim // num_heads
