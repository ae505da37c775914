"""A grid of runs as a user meets it: it continues, names what failed, and stops when it is asked to."""

import inspect
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from waiting import started, wait_until

from grr import config
from grr.experiments.sweep import plan
from grr.models.builders import MODELS
from grr.training.log import read_metrics, read_starts

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "recipes/configs/sweep").glob("*.yaml"))
RECIPE = '''
"""A program that behaves as a recipe does, and as it is told: {do: fail | wait | nothing | train}."""
import json, os, pathlib, signal, sys, time

given = dict(word.split("=", 1) for word in sys.argv[1:])
folder = pathlib.Path(given["run.folder"])
(folder / "going_on").touch(exist_ok=False)  # fails if the run was started twice
(folder / "pid").write_text(str(os.getpid()))
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
began = time.time()
print("threads", os.environ.get("OMP_NUM_THREADS"), flush=True)
print("seed", given["run.seed"], "of", folder.name, "on", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
if given["do"] == "fail" and not pathlib.Path("mended").exists():
    (folder / "going_on").unlink()
    print("step 1\\rstep 2\\rstep 3")
    raise SystemExit("the disk is full")
while given["do"] == "wait" and not asked and not pathlib.Path("mended").exists() and time.time() < began + 60:
    time.sleep(0.02)
if asked:
    (folder / "saved").touch()
elif given["do"] != "nothing":
    if "path" in given:
        assert (pathlib.Path(given["path"]) / "model").is_dir()
    time.sleep(0.3)
    (folder / "model").mkdir()
(folder / "going_on").unlink()
(folder / "times.json").write_text(json.dumps([began, time.time()]))
'''


def sweep(folder: Path, *overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "recipes/sweep.py"), "--config", str(folder / "sweep.yaml"), *overrides]


def run(folder: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        sweep(folder, *overrides),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


@pytest.fixture
def grid(tmp_path) -> Path:
    """A folder with a recipe and a sweep over it: two stages, two variants, two seeds."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    values = {
        "folder": "runs",
        "stages": ["first: recipe.py do=train", "second: recipe.py do=train path={first}"],
        "variants": ["a:", "b:"],
        "seeds": [0, 1],
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"run": values}))
    return tmp_path


def finished(folder: Path) -> list[str]:
    return sorted(str(path.parent.relative_to(folder / "runs")) for path in folder.glob("runs/*/*/model"))


EVERY = [f"{stage}/{variant}-{seed}" for stage in ("first", "second") for variant in "ab" for seed in (0, 1)]


def test_every_run_is_made_once_and_a_second_time_none(grid):
    done = run(grid)
    assert done.returncode == 0, done.stderr
    assert finished(grid) == EVERY
    assert "8 of 8 runs are finished in runs" in done.stderr
    times = {path: path.stat().st_mtime_ns for path in grid.glob("runs/*/*/log.txt")}
    again = run(grid)
    assert again.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in grid.glob("runs/*/*/log.txt")} == times


@pytest.mark.parametrize("jobs", [1, 3])
def test_no_more_runs_at_a_time_than_jobs_and_each_alone_on_its_gpu(grid, jobs):
    assert run(grid, f"run.jobs={jobs}", CUDA_VISIBLE_DEVICES="4,7,9").returncode == 0
    spans = [json.loads(path.read_text()) for path in grid.glob("runs/*/*/times.json")]
    at_once = [sum(begin <= moment < end for begin, end in spans) for moment, _ in spans]
    assert max(at_once) == jobs
    devices = {path.read_text().split()[-1] for path in grid.glob("runs/*/*/log.txt")}
    assert devices == ({"4,7,9"} if jobs == 1 else {"4", "7", "9"})


@pytest.mark.parametrize(("jobs", "gpus", "at_once"), [("null", "4,7,9", 3), ("null", "", None), ("2", "", 2)])
def test_runs_side_by_side_have_a_gpu_or_a_part_of_the_cores_each(grid, jobs, gpus, at_once):
    cores = len(os.sched_getaffinity(0))
    at_once = at_once or cores
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"CUDA_VISIBLE_DEVICES": gpus}
    words = sweep(grid, f"run.jobs={jobs}", f"run.seeds={list(range(at_once))}")
    done = subprocess.run(words, cwd=grid, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    threads = {path.read_text().split("\nthreads ")[1].split()[0] for path in grid.glob("runs/*/*/log.txt")}
    assert threads == {str(max(1, cores // at_once)) if at_once > 1 else "None"}
    spans = [json.loads(path.read_text()) for path in grid.glob("runs/*/*/times.json")]
    assert max(sum(begin <= moment < end for begin, end in spans) for moment, _ in spans) == at_once


def test_a_run_that_fails_is_named_with_its_last_lines_and_the_others_go_on(grid):
    values = yaml.safe_load((grid / "sweep.yaml").read_text())
    values["run"]["variants"] = ["a: do=fail", "b:"]
    (grid / "sweep.yaml").write_text(yaml.safe_dump(values))
    done = run(grid)
    assert done.returncode == 1
    assert finished(grid) == [name for name in EVERY if "/b-" in name]
    for seed in (0, 1):
        assert f"first a-{seed} ended with status 1\n" in done.stderr
        assert f"second a-{seed} was not started, since first a-{seed} failed" in done.stderr
    assert "    step 3\n    the disk is full\n" in done.stderr
    assert "step 1" not in done.stderr
    assert "4 of 8 runs are finished" in done.stderr

    (grid / "mended").touch()
    again = run(grid)
    assert again.returncode == 0
    assert finished(grid) == EVERY
    log = (grid / "runs/first/a-0/log.txt").read_text()
    assert log.count("seed 0 of a-0") == 2  # what it said before is still there


def test_a_run_that_ends_without_a_model_is_no_finished_one(grid):
    done = run(grid, "run.overrides=['first: do=nothing']", "run.seeds=[0]")
    assert done.returncode == 1
    assert "first a-0 ended without writing model\n" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_lets_its_runs_save_and_the_same_command_continues(grid, number):
    words = sweep(grid, "run.jobs=2", "run.overrides=['first: do=wait']")
    with started(
        words,
        cwd=grid,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "0"},
    ) as process:
        wait_until(lambda: sum(" of " in x.read_text() for x in grid.glob("runs/*/*/log.txt")) == 2, process)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "stopped; the same command continues runs" in said
    assert len(list(grid.glob("runs/first/*/saved"))) == len(list(grid.glob("runs/*/*"))) == 2
    (grid / "mended").touch()
    done = run(grid, "run.jobs=2", "run.overrides=['first: do=wait']", CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 0
    assert finished(grid) == EVERY


@pytest.mark.parametrize("ends", ["before the next sweep", "during it", "without a model"])
def test_runs_of_a_sweep_that_was_killed_run_on_and_the_same_command_waits_for_them(grid, ends):
    words = sweep(grid, "run.jobs=2", "run.overrides=['first: do=wait']")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with started(words, cwd=grid, env=environment, **output) as process:
        wait_until(lambda: sum(" of " in x.read_text() for x in grid.glob("runs/*/*/log.txt")) == 2, process)
        process.kill()
        process.communicate(timeout=20)
    left = {path: path.parent.name for path in grid.glob("runs/first/*/log.txt")}
    assert len(left) == 2
    if ends == "before the next sweep":
        (grid / "mended").touch()
        wait_until(lambda: len(finished(grid)) == 2)
    places = 3 if ends == "during it" else 2  # of which two are taken
    with started([*words, f"run.jobs={places}"], cwd=grid, env=environment, **output) as process:
        if ends != "before the next sweep":
            wait_until(lambda: len(list(grid.glob("runs/*/*/log.txt"))) == places, process)
            time.sleep(1.5)
            assert process.poll() is None
            assert len(list(grid.glob("runs/*/*/log.txt"))) == places
        if ends == "without a model":
            for folder in (path.parent for path in left):
                os.kill(int((folder / "pid").read_text()), signal.SIGKILL)
                (folder / "going_on").unlink()
        (grid / "mended").touch()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert finished(grid) == EVERY
    for log, name in left.items():
        assert log.read_text().count(f" of {name} on") == (2 if ends == "without a model" else 1)


def test_asked_twice_it_kills_runs_that_do_not_listen(grid):
    (grid / "recipe.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('deaf', flush=True)\ntime.sleep(60)\n"
    )
    with started(sweep(grid), cwd=grid, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: any("deaf" in x.read_text() for x in grid.glob("runs/*/*/log.txt")), process)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGINT


def test_what_is_missing_is_named_before_anything_starts(grid):
    done = run(grid, "run.stages=['first: recipe.py --config none.yaml do=train', 'second: nowhere.py']")
    assert done.returncode == 1
    assert "  first: the config file none.yaml does not exist (" in done.stderr
    assert "  second: there is no recipe or config 'nowhere.py'" in done.stderr
    done = run(grid, "run.seeds=[0, 0]")
    assert done.returncode == 1
    assert "seeds: 0 occurs twice" in done.stderr
    assert "Traceback" not in done.stderr
    done = run(grid, "run.jobs=0")
    assert done.returncode == 1
    assert "sweep: run.jobs must be at least 1, got 0" in done.stderr
    assert not (grid / "runs").exists()


@pytest.mark.slow
def test_a_sweep_of_pre_training_trains_each_model_as_its_command_alone_would(swept):
    names = sorted(path.name for path in (swept / "pretrain").iterdir())
    assert names == ["baseline-0", "baseline-1", "grr-0", "grr-1"]
    lines = {}
    for name in names:
        folder = swept / "pretrain" / name
        lines[name] = [line["loss"] for line in read_metrics(folder) if line["split"] == "train"]
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert (config["model"]["name"], config["run"]["seed"]) == (f"{name[:-2]}_coca", int(name[-1]))
        assert lines[name][-1] < lines[name][0]
    assert len({tuple(losses) for losses in lines.values()}) == 4

    [start] = read_starts(swept / "pretrain/grr-1")
    words = [f"run.folder={swept / 'alone'}" if word.startswith("run.folder=") else word for word in start["command"]]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True, timeout=120)
    alone = [line["loss"] for line in read_metrics(swept / "alone") if line["split"] == "train"]
    assert alone == pytest.approx(lines["grr-1"], rel=1e-6)


@pytest.mark.slow
def test_what_a_trial_left_is_not_taken_for_the_sweep_without_a_word(swept, tiny_sweep):
    done = subprocess.run(
        sweep(tiny_sweep.parent, 'run.overrides=["pretrain: run.max_steps=3"]'),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0
    assert "pretrain grr-1 is finished with another command: nothing then, run.max_steps=3 now" in done.stderr
    assert f"remove {swept / 'pretrain/grr-1'} to run it again" in done.stderr


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_is_valid_and_so_is_every_run_of_it(file, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import pretrain
    import sweep

    grid = config.load(sweep.SECTIONS, ["--config", str(file)]).get(sweep.Run)
    assert Path(grid.folder).name == file.stem
    assert f"python recipes/sweep.py --config recipes/configs/sweep/{file.name}\n" in file.read_text()
    jobs = plan(Path(grid.folder), grid.stages, grid.variants, grid.seeds, grid.overrides)
    for job in jobs:
        recipe, *words = job.command()
        assert Path(recipe).is_file()
        if Path(recipe).name == "pretrain.py":
            cfg = config.load(
                pretrain.SECTIONS,
                words,
            )
            assert (cfg.run["folder"], cfg.run["seed"]) == (str(job.folder), job.seed)


def test_the_ablation_holds_every_combination_of_the_papers_three_changes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    monkeypatch.chdir(ROOT)
    from grr.cli.sizes import _variants

    def chosen(name: str, **arguments) -> tuple[str, ...]:
        arguments = {key: p.default for key, p in inspect.signature(MODELS[name]).parameters.items()} | arguments
        return tuple(arguments[f"vision_{part}"] for part in changes)

    changes = {"norm": "rmsnorm", "feed_forward": "geglu", "position": "rope"}
    classic = {"norm": "layernorm", "feed_forward": "mlp", "position": "sinusoidal"}
    expected = {}
    for parts in itertools.chain.from_iterable(itertools.combinations(changes, n) for n in range(4)):
        name = {0: "baseline", 3: "grr"}.get(len(parts), "_".join(parts))
        expected[name] = tuple({**classic, **{part: changes[part] for part in parts}}.values())
    for kind in ("rope_2d", "rope_mixed"):
        expected[f"grr_{kind}"] = ("rmsnorm", "geglu", kind)
    assert {
        name: chosen(**model) for name, model in _variants(Path("recipes/configs/sweep/ablation.yaml")).items()
    } == expected


def test_a_sweep_starts_without_torch_which_takes_seconds_to_import():
    words = [sys.executable, "-X", "importtime", str(ROOT / "recipes/sweep.py"), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "omegaconf" in imported
    assert "torch" not in imported
