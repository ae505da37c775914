"""Exit statuses of programs, and one line of text for an error that the user can correct."""

import contextlib
import dis
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from grr.config import ConfigError
from grr.files.printable import PrintableRecord, printable_lines

# Loggers that warn of optional packages that are not installed, and of calls that these libraries make internally.
NOISY = ("torchao", "torch.onnx._internal.exporter._registration", "torch.utils._pytree")
OWN_LOGGERS = ("grr", "root")  # recipes log by the root logger
INTERRUPTED = 128 + signal.SIGINT  # the exit status that shells give to a program that Ctrl-C ended


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a recipe's main and exit with the status it returned, 0 if it returned none.

    Errors become exit statuses as `attempt` says. Rank 0 prints what recipes and grr log at level INFO, each rank the
    warnings of all loggers.
    """
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: record.levelno > logging.INFO or record.name.partition(".")[0] in OWN_LOGGERS)
    rank_0 = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.INFO if rank_0 else logging.WARNING, handlers=[handler])
    raise SystemExit(attempt(main, Path(sys.argv[0]).stem))


def attempt(act: Callable[[], int | None], name: str) -> int:
    """Run act. Returns its exit status: 0 if it returned none, 130 after Ctrl-C.

    An error that a user can correct (`is_user_mistake`) is printed in one line that begins with the program's name, and
    the status is 1; the mistakes of a config are printed one per line, and the status is 2. Of the processes of a run,
    the first that fails prints. Other errors are bugs and keep their traceback; with GRR_DEBUG=1 all errors do.
    """
    logging.setLogRecordFactory(PrintableRecord)
    if os.environ.get("GRR_DEBUG") != "1":
        for logger in NOISY:
            logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        return act() or 0
    except BrokenPipeError:  # `grr ls | head`: the reader of the output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("GRR_DEBUG") == "1":
            raise
        if isinstance(error, KeyboardInterrupt):
            return INTERRUPTED
        if is_user_mistake(error):
            _report(_worded(error, name))
            return 2 if isinstance(error, ConfigError) else 1
        if isinstance(error, RuntimeError) and _times_reported(0):
            return 1  # another process of the run reported its error and exited, which this one noticed
        raise


def is_user_mistake(error: Exception) -> bool:
    """Returns whether the message of an error says what its user can correct.

    That holds for errors from a `raise` in grr or in the recipe, which are worded for users, for those of the operating
    system, such as a missing file or a full disk, and where memory does not suffice. An error from a library or a
    built-in function is a bug.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return True
    if is_out_of_memory(error):
        return True
    return isinstance(error, ValueError | OSError | ImportError | FloatingPointError) and _raised_by_us(error)


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether an error says that the device or the machine has no memory left; does not import torch."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _raised_by_us(error: Exception) -> bool:
    """Returns whether the innermost frame of the traceback is at a `raise` of grr or of the program."""
    innermost: TracebackType | None = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    if innermost is None:
        return False
    module = innermost.tb_frame.f_globals.get("__name__", "")
    at_raise = innermost.tb_frame.f_code.co_code[innermost.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return at_raise and module.partition(".")[0] in ("grr", "__main__")


def _worded(error: Exception, name: str) -> str:
    """Returns the message of an error in one line; a list of mistakes keeps its lines."""
    if isinstance(error, ConfigError):
        return str(error)
    said = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        said = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if is_out_of_memory(error):
        first = said.partition(". ")[0].partition("\n")[0]
        said = f"the memory does not suffice: {first}; lower run.micro_batch_size, which does not change the result"
    said = re.sub(r"\s*\n(?!  )\s*", " ", said.strip())  # lines of a list are indented by two spaces
    for prefix in (name, name.split()[-1]):
        if said.startswith((f"{prefix}: ", f"{prefix}:\n")):
            said = said[len(prefix) + 1 :].removeprefix(" ")
    gap = "" if said.startswith("\n") else " "
    return f"{name}:{gap}{said}"


# --- many processes ------------------------------------------------------------------------------------------------


def _report(line: str) -> None:
    """Print an error, unless another process of the run has printed one, and add it to torchrun's report."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": message}), encoding="utf-8")
    if _times_reported(1) == 1:
        _end_progress_bars()
        print(printable_lines(line), file=sys.stderr, flush=True)


def _end_progress_bars() -> None:
    """End the lines of the progress bars, so that what is printed next has a line of its own."""
    tqdm: Any = sys.modules.get("tqdm")
    for bar in list(getattr(tqdm.tqdm, "_instances", ())) if tqdm else ():
        bar.close()


def _times_reported(more: int) -> int:
    """Returns how many processes of this run have reported an error, after adding `more`.

    torchrun's store, which outlives the processes, holds the number. Without torchrun only rank 0 counts and prints.
    """
    if "RANK" not in os.environ:
        return more
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return more if os.environ["RANK"] == "0" else 2 * more
    from datetime import timedelta

    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=10),
        )
        return store.add(f"grr/mistakes/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", more)
    except RuntimeError:  # torchrun has ended
        return more
