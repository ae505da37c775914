"""What tests compare of two runs' metrics.jsonl."""

from pathlib import Path

from grr.training.log import read_metrics

TIMES = ("samples_per_second", "data_wait")  # differ between two runs


def lines(folder: Path, split: str) -> list[dict]:
    """The lines of a split, without their times."""
    return [{k: v for k, v in x.items() if k not in TIMES} for x in read_metrics(folder) if x["split"] == split]
