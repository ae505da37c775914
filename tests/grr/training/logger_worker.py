"""Write the log of a run that goes on after a step, with a logger, and end: python logger_worker.py JSON.

The loss of step s is s + offset. Every fifth step is validated. end: "close", "kill" (with SIGKILL), or "wait", which
kills as soon as a tool that writes in the background has had seconds to do so.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from grr.training.log import MetricsLog, write_manifest
from grr.training.loggers import check_loggers

order = json.loads(sys.argv[1])
folder = Path(order["folder"])
check_loggers(order["loggers"])
folder.mkdir(exist_ok=True)
(folder / "config.yaml").write_text("optimizer:\n  lr: 0.125\n  betas: [0.9, 0.98]\nrun:\n  max_steps: null\n")
write_manifest(folder, machine="first" if order["step"] == 0 else "later")
log = MetricsLog(folder, step=order["step"], steps_per_epoch=5, loggers=order["loggers"])
for step in range(order["step"] + 1, order["last"] + 1):
    log.write("train", step, loss=step + order["offset"], lr=float("nan"), decision="improved")
    if step % 5 == 0:
        pictures = [(torch.full((3, side, 8), step, dtype=torch.uint8), f"{step}\nof {side}") for side in (6, 9)]
        log.write("validation", step, pictures, loss=2.0 * step)
if order["end"] == "close":
    log.write("final", order["last"], loss=0.5)
    log.close()
else:
    time.sleep(4 if order["end"] == "wait" else 0)
    os.kill(os.getpid(), signal.SIGKILL)
