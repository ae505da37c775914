"""Sizes of batches and micro-batches, and what they must be."""

from typing import Literal


def check_batches(batch_size: int, micro_batch_size: int | None, world: int) -> None:
    """Raise ValueError unless a global batch is whole micro-batches of each of `world` processes.

    A micro_batch_size of None, which is chosen later, fits every batch that the processes can share equally.
    """
    micro = 1 if micro_batch_size is None else micro_batch_size
    if batch_size > 0 and micro > 0 and batch_size % (world * micro) == 0:
        return
    if batch_size > 0 and batch_size % world == 0:
        remedy = f"run.micro_batch_size={largest_divisor(batch_size // world, micro)} fits"
    else:
        unit = world * max(1, micro)
        remedy = f"run.batch_size={max(1, round(batch_size / unit)) * unit} fits"
    raise ValueError(
        f"data: batch_size must be a multiple of processes * micro_batch_size, got {batch_size=}, "
        f"{world=}, {micro_batch_size=}; {remedy}"
    )


def check_negatives(batch_size: int, micro_batch_size: int | None, negatives: Literal["global", "local"]) -> None:
    """Raise ValueError if pairs have no negatives, because the contrastive loss would be a constant 0.

    Negatives are the other pairs of the global batch, or with "local" those of the micro-batch, whose size then must
    not be None, which leaves it to the memory of the device.
    """
    if micro_batch_size is None and negatives == "local":
        raise ValueError(
            "contrastive loss: with loss.negatives=local the size of a micro-batch decides the loss, so "
            "run.micro_batch_size must be a number, got null; set run.micro_batch_size"
        )
    name, size = ("batch_size", batch_size) if negatives == "global" else ("micro_batch_size", micro_batch_size)
    if size is not None and size < 2:
        raise ValueError(
            f"contrastive loss: a pair needs a negative, so run.{name} must be at least 2 with "
            f"loss.negatives={negatives}, got {size}; raise run.{name}"
        )


def largest_divisor(number: int, most: int) -> int:
    """Returns the largest divisor of a number that is at most `most`; 1 if most is below 1."""
    return max(d for d in range(1, max(1, min(number, most)) + 1) if number % d == 0)
