"""TensorBoard: events in the run's folder, without those of steps that a resumed run takes again."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grr.training.loggers.logger import Line, last_steps, run_files


class TensorBoard:
    """Writes folder/tensorboard, which `tensorboard --logdir` reads."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        there = _last_steps(folder / "tensorboard")
        self.held: Mapping[str, int] = {split: min(last, step) for split, last in there.items()}
        # readers drop the events of earlier files from purge_step on
        self._writer: Any = SummaryWriter(folder / "tensorboard", purge_step=step + 1)
        for file in run_files(folder):
            text = "".join(f"    {line}\n" for line in file.read_text().splitlines())  # indented: Markdown's code
            self._writer.add_text(file.name, text, step + 1)
        self._writer.flush()

    def write(self, line: Line) -> None:
        for key, value in line.numbers.items():
            self._writer.add_scalar(f"{line.split}/{key}", value, line.step)
        for i, (image, text) in enumerate(line.pictures):
            tag = f"{line.split}/pictures/{i:02d}"
            self._writer.add_image(tag, image, line.step)
            self._writer.add_text(tag, text.replace("\n", "  \n"), line.step)  # two spaces: Markdown's line break
        self._writer.flush()  # so that a kill loses nothing

    def close(self, *, finished: bool) -> None:
        self._writer.close()


def open_tensorboard(folder: Path, step: int) -> TensorBoard:
    return TensorBoard(folder, step)


def _last_steps(events: Path) -> dict[str, int]:
    """The last step of each split in a folder of events; empty if there is no such folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not events.is_dir():
        return {}
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of the steps that a resumed run took again
    last_alone = {"scalars": 1, "images": 1, "tensors": 1}
    read = EventAccumulator(str(events), size_guidance=last_alone).Reload()
    return last_steps([(tag, read.Scalars(tag)[-1].step) for tag in read.Tags()["scalars"]])
