"""Progress bar of work that several processes share and none of them waits for the others in."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from grr.parallel.process_group import rank_and_world, wait_for_all

EVERY = 1.0  # seconds from one count to the next


@contextmanager
def shared_bar(folder: Path, *, total: int, initial: int, name: str | None) -> Iterator[Callable[[int], None]]:
    """Show a bar of `total` images on rank 0; yields a function by which each process adds its own.

    Processes other than rank 0 write their count to a file in `folder`, at most once a second, and a thread of rank 0
    reads the files, so that no process waits for another. The block ends, by `wait_for_all`, when all have finished.
    name: None for no bar.
    """
    rank, world = rank_and_world()
    files = [folder / f".progress.{other}" for other in range(1, world)]
    mine, written, stop = 0, 0.0, threading.Event()
    with tqdm(total=total, initial=initial, desc=name, unit="image", disable=name is None or rank > 0) as bar:

        def show() -> None:
            bar.update(initial + mine + sum(map(_count, files)) - bar.n)

        def watch() -> None:
            while not stop.wait(EVERY):
                show()

        def add(count: int) -> None:
            nonlocal mine, written
            mine += count
            if rank and time.monotonic() - written >= EVERY:
                files[rank - 1].write_text(str(mine))
                written = time.monotonic()
            elif world == 1:
                show()

        watcher = threading.Thread(target=watch, daemon=True) if world > 1 and rank == 0 else None
        if watcher is not None:
            watcher.start()
        if rank:
            files[rank - 1].write_text("0")  # a killed run may have left another number
        try:
            yield add
            wait_for_all()
        finally:
            stop.set()
            if watcher is not None:
                watcher.join(timeout=10 * EVERY)
            if rank:
                files[rank - 1].unlink(missing_ok=True)
        bar.update(total - bar.n)


def _count(file: Path) -> int:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # not written yet, or half
        return 0
