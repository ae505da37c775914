"""docs/pretrain.sbatch on two "nodes" of this machine saves before the time limit and queues itself again."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from waiting import started, wait_until

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs/pretrain.sbatch"
TINY = [
    "run.num_eval_images=4",
    "run.batch_size=32",
    "run.micro_batch_size=16",
    "data.scenes=320",
    "validation.held_out=64",
    "model.dim=32",
    "saving.every=1000",
]

# Replacements of Slurm's commands: one task a node, and signals to the tasks of a step.
SRUN = """#!/bin/bash
for node in $(seq "$SLURM_NNODES"); do "$@" & echo $! >> "$TASKS"; done
status=0
for task in $(cat "$TASKS"); do wait "$task" || status=$?; done
exit "$status"
"""
SCANCEL = """#!/bin/bash
for task in $(cat "$TASKS"); do kill -TERM "$task"; done
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; echo 127.0.0.1; else echo "requeued $2" >> "$TASKS.queue"; fi
"""


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """Returns an environment with Slurm's commands and variables."""
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {
        "PATH": path,
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "GPUS": "1",
        "PORT": str(port),
        "TASKS": str(tmp_path / "tasks"),
        "OMP_NUM_THREADS": "1",
        "RECIPE": str(ROOT / "recipes/pretrain.py"),
    }


def submit(folder: Path, cluster: dict[str, str], *overrides: str) -> AbstractContextManager[subprocess.Popen]:
    config = ROOT / "recipes/configs/pretrain/openmoji.yaml"
    command = ["bash", str(SCRIPT), "--config", str(config), f"run.folder={folder}", *TINY, *overrides]
    return started(command, env=cluster, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, seconds=240)


@pytest.mark.slow
def test_the_slurm_script_saves_before_the_time_limit_and_resumes(tmp_path, cluster):
    folder = tmp_path / "run"
    metrics = folder / "metrics.jsonl"
    with submit(folder, cluster, "run.epochs=1000") as job:
        wait_until(lambda: metrics.is_file() and '"step": 10' in metrics.read_text(), job)
        job.send_signal(signal.SIGUSR1)  # what --signal=B:USR1@300 sends to the script
        output = job.communicate(timeout=120)[0]
    assert (tmp_path / "tasks.queue").read_text() == "requeued 7\n", output[-3000:]
    (checkpoint,) = (folder / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step_"))

    (tmp_path / "tasks").unlink()
    with submit(folder, cluster | {"SLURM_RESTART_COUNT": "1"}, f"run.max_steps={step + 2}") as again:
        output = again.communicate(timeout=120)[0]
    assert again.returncode == 0, output[-3000:]
    assert f"resuming {folder} after step {step}" in output
    assert f"finished after step {step + 2} of {step + 2}" in output
    assert '"world_size": 2' in (folder / "manifest.json").read_text()
