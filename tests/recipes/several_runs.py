"""Run recipes one after the other in this process: a JSON list of command lines in, their ends out.

The ends are a JSON list of {"status", "stderr"}. It saves the imports of a process for each.
"""

import contextlib
import gc
import io
import json
import logging
import runpy
import sys

import torch.distributed as dist

ends = []
for words in json.loads(sys.argv[1]):
    sys.argv = words
    said = io.StringIO()
    status: object = 0
    with contextlib.redirect_stderr(said):
        logging.basicConfig(format="%(message)s", level=logging.INFO, force=True)
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            status = end.code
    gc.collect()
    if dist.is_initialized():  # a run that failed leaves it to the end of its process
        dist.destroy_process_group()
    ends.append({"status": status, "stderr": said.getvalue()})
print("ENDS " + json.dumps(ends))
