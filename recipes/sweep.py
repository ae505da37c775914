"""Run a grid of variants and seeds, each through one or more stages.

    python recipes/sweep.py --config recipes/configs/sweep/ablation.yaml
    python recipes/sweep.py --config recipes/configs/sweep/ablation.yaml run.overrides='["pretrain: run.max_steps=20"]'

Each run is a separate command, and writes folder/stage/variant-seed with its output in log.txt. The same command,
submitted again, skips runs that have finished and continues the others. After Ctrl-C or SIGTERM the runs save and exit;
a second signal kills them. After a kill -9 they run on, and the same command waits for them.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from grr import config
from grr.cli.program import run_main
from grr.experiments.catalog import recipe_place
from grr.experiments.sweep import MODEL, Job, plan
from grr.files.lock import is_locked, lock

LOG = "log.txt"  # in the folder of a run: its output
LAST_LINES = 15  # of the log of a failed run, to print


@dataclass
class Run:
    """Options of the recipe; see grr.experiments.sweep.plan."""

    folder: str  # of all runs
    stages: list[str]  # "name: RECIPE/CONFIG arguments" as for grr run, in order; {name} is an earlier stage's folder
    variants: list[str]  # "name: key=value ...", overrides of the first stage
    seeds: list[int] = field(default_factory=lambda: [0])
    jobs: int | None = 1  # concurrent runs, each with one GPU or a part of the cores; null: as many as these
    overrides: list[str] = field(default_factory=list)  # "stage: key=value ...", for all runs of a stage


SECTIONS: config.Sections = {"run": Run}


def main() -> None:
    cfg = config.load(SECTIONS)
    run = cfg.get(Run)
    if run.jobs is not None and run.jobs < 1:
        raise ValueError(f"sweep: run.jobs must be at least 1, got {run.jobs}")
    jobs = plan(Path(run.folder), run.stages, run.variants, run.seeds, run.overrides)
    check_recipes(jobs)
    waiting = [job for job in jobs if not job.finished]
    warn_of_changed_commands([job for job in jobs if job.finished])

    # the grid: as many runs at a time as wanted, each as soon as the one before it is finished
    gpus = visible_gpus() if run.jobs != 1 else []
    places = run.jobs or len(gpus) or available_cores()
    running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}  # by index, below places
    others = [job for job in waiting if is_ready(job) and is_going_on(job)]  # of a sweep that was killed
    failed: dict[str, str] = {}  # name of a run -> cause
    signals, passed_on = collect_signals(), 0
    bar, shown = tqdm(total=len(jobs), initial=len(jobs) - len(waiting), unit="run", smoothing=0), ""
    while running or (waiting and not signals):
        for place, (job, process) in list(running.items()):
            status = process.poll()
            if status is None:
                continue
            del running[place]
            if not signals and not job.finished:
                failed[job.name] = f"ended with status {status}" if status else f"ended without writing {job.result}"
                bar.write(f"{job.name} {failed[job.name]}; see {job.folder / LOG}")
            bar.update(0 if signals else 1)
        for job in [job for job in others if not is_going_on(job)]:
            others.remove(job)
            if job.finished:
                waiting.remove(job)
                bar.update()
        for job in list(waiting):
            if job.after and job.after.name in failed:
                waiting.remove(job)
                failed[job.name] = f"was not started, since {job.after.name} failed"
                bar.update()
        ready = [job for job in waiting if is_ready(job) and job not in others]
        while len(running) + len(others) < places and not signals and ready:
            waiting.remove(job := ready.pop(0))
            place = min(set(range(places)) - running.keys())
            running[place] = job, start(job, places, gpus[place % len(gpus)] if gpus else None)
        if (now := ", ".join(job.name for job in [*(job for job, _ in running.values()), *others])) != shown:
            bar.set_postfix_str(now)
            shown = now
        if len(signals) > passed_on:
            passed_on = len(signals)
            stop((process for _, process in running.values()), at_once=passed_on > 1)
        time.sleep(0.1)
    bar.close()

    if signals:
        print(f"stopped; the same command continues {run.folder}", file=sys.stderr)
        raise SystemExit(128 + signals[0])
    for job in jobs:
        if job.name in failed:
            print(f"\n{job.name} {failed[job.name]}", *last_lines(job), sep="\n    ", file=sys.stderr)
    print(f"{len(jobs) - len(failed)} of {len(jobs)} runs are finished in {run.folder}", file=sys.stderr)
    raise SystemExit(1 if failed else 0)


def check_recipes(jobs: Iterable[Job]) -> None:
    """Check that all recipes and configs exist, and print the recipes, before the first run starts."""
    faults: dict[str, None] = {}
    recipes: dict[str, None] = {}
    for job in jobs:
        try:
            command = job.command()
            recipes[command[recipe_place(command)]] = None
        except ValueError as error:
            faults[f"{job.stage}: {error}"] = None
    if faults:
        raise ValueError("\n  ".join(["sweep:", *faults]))
    print(f"recipes: {', '.join(recipes)}", file=sys.stderr)


def warn_of_changed_commands(finished: Iterable[Job]) -> None:
    """Warn of finished runs whose command has changed, because they are not run again."""
    for job in finished:
        manifest = job.folder / "manifest.json"
        if job.result != MODEL or not manifest.is_file():
            continue
        then = set(json.loads(manifest.read_text())["starts"][-1]["command"])
        command = job.command()
        now = set(command[recipe_place(command) :])
        if then != now:
            print(
                f"{job.name} is finished with another command: {shlex.join(sorted(then - now)) or 'nothing'} "
                f"then, {shlex.join(sorted(now - then)) or 'nothing'} now; remove {job.folder} to run it again",
                file=sys.stderr,
            )


def is_going_on(job: Job) -> bool:
    """Returns whether a process that a sweep started for this job has not ended."""
    return is_locked(job.folder / LOG)


def is_ready(job: Job) -> bool:
    return job.after is None or job.after.finished


def visible_gpus() -> list[str]:
    if given := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return given.split(",")
    import torch  # imported here because it takes seconds, and only concurrent runs need it

    return [str(i) for i in range(torch.cuda.device_count())]


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start(job: Job, places: int, gpu: str | None) -> subprocess.Popen[bytes]:
    """Start a run in a new session, so that Ctrl-C reaches it only through this process; append to its log.

    The run inherits the lock of its log, which ends with it, and not with this process.
    Runs side by side share the cores: threads of several runs on one core would wait for each other.
    """
    words = [sys.executable, *job.command()]
    environment = {**os.environ, "TQDM_MININTERVAL": "10", "PYTHONUNBUFFERED": "1"}
    if places > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // places)))
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / LOG).open("ab") as log:
        with contextlib.suppress(OSError):  # where a file system has no locks, there is none
            lock(log.fileno())
        log.write(f"\n$ {shlex.join(words)}\n".encode())
        log.flush()
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def collect_signals() -> list[int]:
    """Returns a list to which SIGINT and SIGTERM are added instead of ending the program."""
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    return signals


def stop(processes: Iterable[subprocess.Popen[bytes]], *, at_once: bool) -> None:
    """Ask runs to save and exit, or kill them with all processes that they started."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL) if at_once else process.terminate()


def last_lines(job: Job) -> list[str]:
    """Returns the last lines of the log of a run; of a progress bar, only its last state."""
    file = job.folder / LOG
    # not read_text, which converts \r to a new line
    text = file.read_bytes().decode(errors="replace") if file.is_file() else ""
    lines = [line.rstrip("\r").split("\r")[-1] for line in text.split("\n")]
    return [line for line in lines if line.strip()][-LAST_LINES:]


if __name__ == "__main__":
    run_main(main)
