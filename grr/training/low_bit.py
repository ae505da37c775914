"""AdamW that keeps its two moments in 8 or 4 bits, in the formats and with the arithmetic of torchao."""

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grr.parallel.shard import local

Bits = Literal["8bit", "4bit", "fp8"]
BLOCK: dict[Bits, int] = {"8bit": 256, "4bit": 128, "fp8": 256}  # torchao's
SMALLEST_BLOCK = 32  # of shorter ones, the scales would take what the codes save
LARGEST_BLOCK = 2048  # that of Dettmers et al.
SMALLEST_TENSOR = 4096  # numbers; smaller ones take no memory worth saving
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # and whether they have a sign


class LowBitAdamW(torch.optim.Optimizer):
    """AdamW, each of whose moments is a code for every number and a scale for every block of neighbours in a row.

    8bit: codes of a table whose steps grow with the numbers (Dettmers et al. 2021); 4bit: the same, of 16 entries (Li
    et al. 2023); fp8: e4m3. An update computes in float32 and rounds the moments when they are put back, so the very
    first is that of AdamW. Moments are kept whole, as the parameters are, of the parameters in `whole`, of vectors, of
    parameters of less than 4,096 numbers, and where no number from 32 to 2,048 divides a row (for 4bit: or it is odd).

    No block reaches from one row into the next. So the moments of a sharded parameter are the shards of the whole
    one's, bit for bit, and a checkpoint fits any number of processes; torchao's own optimizers cut what each process
    happens to hold. The state is plain tensors, sharded as the parameters are: exp_avg_codes, exp_avg_scale, and so
    exp_avg_sq. On a GPU torchao compiles the update; on a CPU it runs uncompiled, many times slower.
    Raises ImportError without torchao.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        bits: Bits,
        *,
        whole: Iterable[Tensor] = (),
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        try:
            import torchao  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f'adamw: moments={bits} needs torchao, which is not installed; pip install "grr-coca[quantize]", or '
                "leave moments at fp32"
            ) from error
        self.bits: Bits = bits
        self._whole = set(whole)
        self._tables: dict[tuple[bool, torch.device], Tensor] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; each process updates its shards."""
        from torchao import optim  # two seconds, for those who need it

        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        kind = {"8bit": optim.AdamW8bit, "4bit": optim.AdamW4bit, "fp8": optim.AdamWFp8}[self.bits]
        for group in self.param_groups:
            shards: dict[nn.Parameter, dict[str, Any]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p] or self._begin(p)
                shard = nn.Parameter(local(p.detach()))  # in the same memory
                shard.grad = local(p.grad)
                if shard.numel():
                    shards[shard] = {"step": state["step"]} | {m: self._moment(m, state, shard) for m in MOMENTS}
                else:
                    state["step"] += 1
            if shards:
                options = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
                torchaos = kind(list(shards), **options)  # of this update; torchao's lr is a tensor, ours a number
                torchaos.state.update(shards)
                with _uncompiled() if next(iter(shards)).device.type == "cpu" else contextlib.nullcontext():
                    torchaos.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which however makes every tensor of a state as its parameter is, and of codes float32."""
        super().load_state_dict({**state_dict, "state": {}})
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(keys, params, strict=True):
            if key in state_dict["state"]:
                self.state[p] = {
                    name: x if name == "step" else x.to(p.device) for name, x in state_dict["state"][key].items()
                }

    def _begin(self, p: nn.Parameter) -> dict[str, Any]:
        """The state of a parameter before its first update: zeros."""
        state: dict[str, Any] = {"step": torch.tensor(0.0)}
        row, block = math.prod(p.shape[1:]), self._block(p)
        for moment in MOMENTS:
            if block is None:
                state[moment] = torch.zeros_like(p)
            else:
                shape = (len(p), row // 2) if self.bits == "4bit" else p.shape
                dtype = torch.float8_e4m3fn if self.bits == "fp8" else torch.uint8
                state[f"{moment}_codes"] = _zeros(p, shape, dtype)
                state[f"{moment}_scale"] = _zeros(p, (len(p), row // block), torch.float32)
        self.state[p] = state
        return state

    def _block(self, p: nn.Parameter) -> int | None:
        """How many numbers of a row share a scale: the most up to torchao's block that divide it, or else the next
        above; None: the moments are kept whole."""
        row, block = math.prod(p.shape[1:]), BLOCK[self.bits]
        two_in_a_byte = self.bits == "4bit"
        if p in self._whole or p.ndim < 2 or p.numel() < SMALLEST_TENSOR or (two_in_a_byte and row % 2):
            return None
        sizes = [*range(block, SMALLEST_BLOCK - 1, -1), *range(block + 1, LARGEST_BLOCK + 1)]
        return next((size for size in sizes if row % size == 0), None)

    def _moment(self, moment: str, state: dict[str, Any], shard: Tensor) -> Tensor:
        """A moment as torchao's tensor, which writes into the state."""
        from torchao.optim.subclass_4bit import OptimState4bit
        from torchao.optim.subclass_8bit import OptimState8bit
        from torchao.optim.subclass_fp8 import OptimStateFp8

        if moment in state:
            return local(state[moment])
        codes, scale = local(state[f"{moment}_codes"]), local(state[f"{moment}_scale"]).view(-1)
        if self.bits == "fp8":
            return OptimStateFp8(codes, scale, shard.dtype)
        signed, kind = MOMENTS[moment], OptimState8bit if self.bits == "8bit" else OptimState4bit
        if (signed, shard.device) not in self._tables:
            self._tables[signed, shard.device] = kind.zeros(SMALLEST_TENSOR, signed, device=shard.device).qmap
        table = self._tables[signed, shard.device]
        if self.bits == "8bit":
            return OptimState8bit(codes, scale, table, signed, shard.dtype)
        return OptimState4bit(codes.view(-1), scale, table, signed, shard.shape, shard.dtype)


def _zeros(p: Tensor, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    """Zeros of a shape with p's number of rows, sharded as p is."""
    shape = torch.Size(shape)
    zeros = torch.zeros(len(local(p)), *shape[1:], dtype=dtype, device=p.device)
    if not isinstance(p, DTensor):
        return zeros
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(zeros, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)


def _uncompiled() -> contextlib.AbstractContextManager[None]:
    return torch.compiler.set_stance("force_eager")
