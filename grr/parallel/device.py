"""Devices: the one that a process computes on, its name, its memory, and the precision that it has."""

import os

import torch
from torch import Tensor

WITHOUT_FLOAT64 = ("mps",)  # kinds of devices
CHOICES = ("cpu", "mps", "cuda")


def default_device() -> torch.device:
    """Returns the device that this process computes on: its GPU (LOCAL_RANK under torchrun), else the CPU.

    See `choose_device`. Raises ValueError if the environment variable GRR_DEVICE names a device that is not there.
    """
    return choose_device(
        cuda=torch.cuda.is_available(),  # GPUs of AMD too, with a ROCm build of torch
        mps=torch.backends.mps.is_available(),
        processes=int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1,
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        wanted=os.environ.get("GRR_DEVICE") or None,
    )


def choose_device(*, cuda: bool, mps: bool, processes: int, local_rank: int, wanted: str | None = None) -> torch.device:
    """Returns the device of a process: a CUDA GPU, else a Mac's GPU (mps) for a run of one process, else the CPU.

    cuda, mps: whether this machine has such a GPU; wanted: cpu, mps or cuda instead of the first that is there. Several
    processes of a Mac compute on the CPU, because gloo does not reduce tensors of mps.
    Raises ValueError if `wanted` is another word, or is not there.
    """
    there = {"cuda": cuda, "mps": mps and processes == 1, "cpu": True}
    kind = next(kind for kind, is_there in there.items() if is_there) if wanted is None else wanted
    if not there.get(kind):
        found = ", ".join(kind for kind, is_there in there.items() if is_there)
        alone = ", or start one process" if wanted == "mps" and mps else ""
        raise ValueError(
            f"choose_device: GRR_DEVICE must be one of {', '.join(CHOICES)} that this process can use, got {wanted!r}, "
            f"where {found} can be used; unset it{alone}"
        )
    return torch.device("cuda", local_rank) if kind == "cuda" else torch.device(kind)


def device_name(device: torch.device) -> str:
    """Returns the name of a GPU's model, MPS for that of a Mac, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def exact_dtype(device: torch.device) -> torch.dtype:
    """Returns float64, or float32 for a device that does not have it: for sums that stay on the device."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def where_float64_is(x: Tensor) -> Tensor:
    """Returns a tensor on its device, or on the CPU if its device does not have float64."""
    return x.cpu() if x.device.type in WITHOUT_FLOAT64 else x


def check_device(device: torch.device | str, *, gpus: int, mps: bool) -> torch.device:
    """Returns a device that was asked for. gpus: the number of CUDA GPUs of this machine; mps: whether it has that one.

    Raises ValueError for another value, and for a GPU that this machine does not have.
    """
    try:
        checked = torch.device(device)
    except (RuntimeError, TypeError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"load_pretrained: device must be a torch device, such as 'cuda' or 'cpu', got {device!r} ({why}); leave "
            "device out for the default"
        ) from error
    if {"cuda": (checked.index or 0) >= gpus, "mps": not mps}.get(checked.type):
        has = f"{gpus} CUDA GPUs are available" if checked.type == "cuda" else "MPS is not available"
        raise ValueError(
            f"load_pretrained: device must be one of this machine, got {device!r} and {has}; leave device out for the "
            "default"
        )
    return checked
