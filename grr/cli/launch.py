"""Run a recipe in several processes on this machine, as torchrun does, without its report of failed processes.

    python -m grr.cli.launch --nproc_per_node 2 recipes/pretrain.py --config ...

The arguments are torchrun's, and the exit status is that of the process that failed first. A process prints its own
error; one that a signal ended cannot, so it is reported here.
"""

import logging
import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the processes to their end. Returns the exit status."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, which prints a warning about it
    try:
        run(parse_args(["--standalone", *(sys.argv[1:] if argv is None else argv)]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        hint = "; if memory was exhausted, lower run.micro_batch_size" if failure.exitcode == -9 else ""
        print(f"grr run: process {rank} was ended by {failure.signal_name()}{hint}", file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
