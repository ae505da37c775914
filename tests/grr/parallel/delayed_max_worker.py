"""What test_process_group.py runs in two processes: DelayedMax, where rank 1 calls only after rank 0's call returned.

torchrun --nproc_per_node 2 delayed_max_worker.py FILE, through which the ranks take turns. Rank 0 prints what the calls
of both returned, as JSON.
"""

import json
import sys
from datetime import timedelta

import torch.distributed as dist

from grr.parallel.process_group import DelayedMax, process_group

NUMBERS = ([0, 3, 0, 1, 0, 0], [0, 0, 2, 5, 0, 0])  # of the two ranks, a step each


def main() -> None:
    with process_group():
        rank, store = dist.get_rank(), dist.FileStore(sys.argv[1], 2)
        largest, found = DelayedMax(), []
        for step, number in enumerate(NUMBERS[rank]):
            if rank == 1:
                store.wait([f"returned {step}"], timedelta(seconds=60))
            found.append(largest(number))
            store.set(f"returned {step}", "")
        gathered: list = [None, None]
        dist.all_gather_object(gathered, found)
        if rank == 0:
            print("RESULT " + json.dumps(gathered))


if __name__ == "__main__":
    sys.exit(main())
