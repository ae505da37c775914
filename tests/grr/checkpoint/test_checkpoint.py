"""grr.checkpoint: what is saved comes back bit for bit, on any number of ranks, and damage never does."""

import hashlib
import json
import logging
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import run
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from waiting import started

from grr.checkpoint.model_folder import load_model_weights, save_model
from grr.checkpoint.run_lock import RunLock
from grr.checkpoint.step_folders import adopt_checkpoint, latest_checkpoint, remove_checkpoints_after, remove_leftovers
from grr.checkpoint.stop_signal import StopSignal
from grr.checkpoint.training_state import load_checkpoint, load_checkpoint_weights, save_checkpoint
from grr.training.ema import EMA

WORKER = Path(__file__).with_name("checkpoint_worker.py")
sys.path.insert(0, str(WORKER.parent))
from checkpoint_worker import Toy, constant, state, toy, train, whole  # noqa: E402


@pytest.fixture(params=["alone", "in a group of one, sharded"])
def sharded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[bool]:
    """Whether the models of a test are sharded; then a process group of this one process exists."""
    if request.param == "alone":
        yield False
        return
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield True
    dist.destroy_process_group()


@pytest.fixture
def two_checkpoints(tmp_path: Path) -> Path:
    """A folder with step_1 and step_2, every number in them being 1 and 2."""
    for step in (1, 2):
        save_checkpoint(tmp_path, *constant(float(step)), {"step": step})
    return tmp_path


# ---- laws


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(sharded: bool, tmp_path: Path) -> None:
    model, optimizer = toy(0, sharded=sharded)
    train(model, optimizer, range(3))
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 3, "epoch": 1, "samples": [24, 0]})
    saved = state(model, optimizer)
    expected = train(model, optimizer, range(3, 6))

    model, optimizer = toy(1, sharded=sharded)
    assert load_checkpoint(path, model, optimizer) == {"step": 3, "epoch": 1, "samples": [24, 0]}
    assert state(model, optimizer) == saved
    assert train(model, optimizer, range(3, 6)) == expected


def test_a_run_saved_before_its_first_step_is_left_and_resumed_as_if_it_had_not_been(
    sharded: bool, tmp_path: Path
) -> None:
    model, optimizer = toy(0, sharded=sharded)
    expected = train(model, optimizer, range(3))

    model, optimizer = toy(0, sharded=sharded)
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 0})
    assert not optimizer.state
    assert train(model, optimizer, range(3)) == expected

    model, optimizer = toy(1, sharded=sharded)
    load_checkpoint(path, model, optimizer)
    assert not optimizer.state
    assert train(model, optimizer, range(3)) == expected


def test_loading_into_an_optimizer_in_use_with_gradients_left_forgets_them(tmp_path: Path) -> None:
    model, optimizer = toy(0, sharded=False)
    train(model, optimizer, range(3))
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 3})
    saved = state(model, optimizer)

    model, optimizer = toy(1, sharded=False)
    model(torch.ones(1, 5)).sum().backward()
    load_checkpoint(path, model, optimizer)
    assert state(model, optimizer) == saved
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_optimizer_in_use_goes_back_to_before_its_first_step(sharded: bool, tmp_path: Path) -> None:
    model, optimizer = toy(0, sharded=sharded)
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 0})
    expected = train(model, optimizer, range(3))
    load_checkpoint(path, model, optimizer)
    assert not optimizer.state
    assert train(model, optimizer, range(3)) == expected


def test_a_mean_of_weights_comes_back_bit_for_bit_and_is_what_a_reader_of_weights_gets(
    sharded: bool, tmp_path: Path
) -> None:
    model, optimizer = toy(0, sharded=sharded)
    average = EMA(model, decay=0.5)
    train(model, optimizer, range(3))
    average.update()
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 3}, average.weights)
    trained, mean = state(model, optimizer), whole(average.weights)

    model, optimizer = toy(1, sharded=sharded)
    average = EMA(model, decay=0.5)
    load_checkpoint(path, model, optimizer, average.weights)
    assert (state(model, optimizer), whole(average.weights)) == (trained, mean)

    model, optimizer = toy(2, sharded=sharded)
    load_checkpoint_weights(path, model)
    assert {name: whole(parameter.detach()) for name, parameter in model.named_parameters()} == mean
    assert state(model, optimizer)["model"]["count"] == trained["model"]["count"]  # a buffer, of which there is no mean


@pytest.mark.parametrize("averaged", [True, False])
def test_a_mean_of_weights_on_one_side_only_is_refused(averaged: bool, tmp_path: Path) -> None:
    model, optimizer = toy(0, sharded=False)
    average = EMA(model, decay=0.5)
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 1}, average.weights if averaged else None)
    made = "with" if averaged else "without"
    with pytest.raises(
        ValueError, match=rf"load_checkpoint: .*step_1 was made {made} an EMA of weights; .*run\.ema_decay"
    ):
        load_checkpoint(path, model, optimizer, None if averaged else average.weights)


def test_a_scheduler_finds_its_initial_lr_again(tmp_path: Path) -> None:
    model, optimizer = toy(0, sharded=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    schedule.step()
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 1})

    model, optimizer = toy(1, sharded=False)
    load_checkpoint(path, model, optimizer)
    assert [(g["initial_lr"], g["lr"], g["betas"]) for g in optimizer.param_groups] == [(0.01, 0.005, (0.8, 0.99))] * 2


@settings(max_examples=20)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), which=st.integers(0, 100))
def test_one_flipped_bit_anywhere_is_noticed(
    place: float, bit: int, which: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "flipped"
    if not folder.exists():
        save_checkpoint(folder, *toy(0, sharded=False), {"step": 1})
    files = sorted(file for file in (folder / "step_1").iterdir() if file.name != "manifest.json")
    file = files[which % len(files)]
    content = bytearray(file.read_bytes())
    if not content:
        return
    content[int(place * len(content))] ^= 1 << bit
    good = file.read_bytes()
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged: .*step_1.* to begin again at step 0"):
        latest_checkpoint(folder)
    file.write_bytes(good)
    assert latest_checkpoint(folder) == folder / "step_1"


@given(steps=st.lists(st.integers(0, 30), min_size=1, max_size=5), keep=st.integers(1, 3))
@settings(max_examples=10)
def test_the_newest_are_kept_and_never_the_one_just_written_removed(
    steps: list[int], keep: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("keep")
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    expected: set[int] = set()
    for step in steps:
        save_checkpoint(folder, model, optimizer, {"step": step}, keep=keep)
        upto = sorted((n for n in expected | {step} if n <= step), reverse=True)
        expected = set(upto[:keep]) | {n for n in expected if n > step}
        assert {path.name for path in folder.iterdir()} == {f"step_{n}" for n in expected}
        assert latest_checkpoint(folder) == folder / f"step_{max(expected)}"


def test_checkpoints_of_later_steps_can_be_removed(tmp_path: Path) -> None:
    for step in (1, 5, 10):
        save_checkpoint(tmp_path, *constant(0.0), {"step": step}, keep=9)
    (tmp_path / "step_7.tmp").mkdir()
    (tmp_path / "notes").mkdir()
    remove_checkpoints_after(tmp_path, 5)
    assert {path.name for path in tmp_path.iterdir()} == {"step_1", "step_5", "notes"}
    remove_checkpoints_after(tmp_path / "never made", 5)


# ---- damage


def test_a_full_disk_is_an_error_and_the_checkpoint_before_stays(two_checkpoints: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*step_3\.tmp"):
            save_checkpoint(two_checkpoints, *constant(3.0), {"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert latest_checkpoint(two_checkpoints) == two_checkpoints / "step_2"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("__0_0.distcp", flip, "does not have the sha256"),
        ("__0_0.distcp", cut, r"has \d+ bytes where manifest.json says \d+"),
        (".metadata", Path.unlink, "is missing"),
        ("progress.json", flip, "does not have the sha256"),
        ("manifest.json", Path.unlink, "is missing"),
        ("manifest.json", cut, "is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning_and_never_loaded(
    two_checkpoints: Path,
    name: str,
    damage: Callable[[Path], None],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    damage(two_checkpoints / "step_2" / name)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(two_checkpoints) == two_checkpoints / "step_1"
    (warning,) = caplog.messages
    assert re.search(f"step_2/{name} {message}", warning)
    assert "delete" in warning
    with pytest.raises(ValueError, match=rf"load_checkpoint: .*{name} {message}.*another checkpoint"):
        load_checkpoint(two_checkpoints / "step_2", *constant(0.0))


def test_a_shard_of_another_step_is_noticed(two_checkpoints: Path) -> None:
    shard = "__0_0.distcp"
    (two_checkpoints / "step_2" / shard).write_bytes((two_checkpoints / "step_1" / shard).read_bytes())
    assert latest_checkpoint(two_checkpoints) == two_checkpoints / "step_1"


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "never made") is None
    (tmp_path / "step_5.tmp").mkdir()
    (tmp_path / "step_7").write_text("not a folder")
    assert latest_checkpoint(tmp_path) is None


def test_what_a_killed_run_left_is_used_if_whole_and_removed_by_the_next_save(
    two_checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (two_checkpoints / "step_2").rename(two_checkpoints / "step_2.tmp")
    (two_checkpoints / "step_9.tmp").mkdir()
    assert latest_checkpoint(two_checkpoints) == two_checkpoints / "step_2.tmp"
    assert not caplog.messages
    save_checkpoint(two_checkpoints, *constant(3.0), {"step": 3})
    assert {path.name for path in two_checkpoints.iterdir()} == {"step_1", "step_3"}


@pytest.mark.parametrize("suffix", [".tmp", ".old"])
def test_a_checkpoint_that_a_kill_left_under_another_name_gets_its_own_and_leftovers_go(
    two_checkpoints: Path, suffix: str
) -> None:
    (two_checkpoints / "step_2").rename(two_checkpoints / f"step_2{suffix}")
    (two_checkpoints / "step_1.old").mkdir()
    latest = latest_checkpoint(two_checkpoints)
    assert latest is not None
    assert adopt_checkpoint(latest) == two_checkpoints / "step_2"
    remove_leftovers(two_checkpoints)
    assert {path.name for path in two_checkpoints.iterdir()} == {"step_1", "step_2"}
    load_checkpoint(two_checkpoints / "step_2", *constant(0.0))


def test_killed_at_any_moment_a_run_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    """keep=1 and every step saved twice: the hardest case, as nothing older is left to fall back on."""
    words = [sys.executable, str(WORKER), "kill", str(tmp_path)]
    reached = 0
    with started(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as killer:
        assert killer.stdin is not None
        assert killer.stdout is not None
        for turn in range(8):
            killer.stdin.write(f"{turn}\n")
            killer.stdin.flush()
            assert killer.stdout.readline() == "killed\n"
            latest = latest_checkpoint(tmp_path)
            if latest is None and reached == 0:
                continue  # killed before the first save was done
            assert latest is not None
            model, optimizer = constant(0.0)
            step = load_checkpoint(latest, model, optimizer)["step"]
            assert step >= reached
            assert all(
                (p == step).all() and (optimizer.state[p]["momentum_buffer"] == step).all() for p in model.parameters()
            )
            reached = step
        killer.stdin.close()
        assert killer.wait(timeout=60) == 0
    assert reached > 0


# ---- pickles


class Bomb:
    """A pickle of it creates a file when it is read."""

    def __init__(self, fuse: Path) -> None:
        self.fuse = fuse

    def __reduce__(self) -> Any:
        return Path.touch, (self.fuse,)


def seal(path: Path) -> None:
    """Make the manifest true again, as an attacker would."""
    names = [file.name for file in path.iterdir() if file.name != "manifest.json"]
    entry = {name: (path / name).read_bytes() for name in names}
    files = {name: {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()} for name, text in entry.items()}
    (path / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


def test_metadata_that_runs_code_is_refused(two_checkpoints: Path) -> None:
    path, fuse = two_checkpoints / "step_2", two_checkpoints / "fuse"
    (path / ".metadata").write_bytes(pickle.dumps(Bomb(fuse)))
    seal(path)
    with pytest.raises(ValueError, match=r"load_checkpoint: .*\.metadata asks for .*do not use it"):
        load_checkpoint(path, *constant(0.0))
    assert not fuse.exists()
    with pytest.raises(AttributeError):
        FileSystemReader(path).read_metadata()
    assert fuse.exists()  # the bomb was live


class OlderPickler(pickle.Pickler):
    """Writes members of an enum as Python 3.11.0 to 3.11.3 do: by getattr."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_metadata_of_an_older_python_is_read_and_getattr_finds_nothing_else(two_checkpoints: Path) -> None:
    path = two_checkpoints / "step_2"
    expected, optimizer = constant(0.0)
    load_checkpoint(path, expected, optimizer)
    file = path / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    with file.open("wb") as stream:
        OlderPickler(stream).dump(metadata)
    assert b"getattr" in file.read_bytes()
    seal(path)
    model, optimizer = constant(0.0)
    load_checkpoint(path, model, optimizer)
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, wanted)

    class Reach:
        def __reduce__(self) -> Any:
            return getattr, (Metadata, "__init__")

    file.write_bytes(pickle.dumps(Reach()))
    seal(path)
    with pytest.raises(ValueError, match=r"asks for builtins.getattr\(.*'__init__'\), which no checkpoint needs"):
        load_checkpoint(path, *constant(0.0))


def test_a_value_that_runs_code_is_refused(tmp_path: Path) -> None:
    fuse = tmp_path / "fuse"
    model, optimizer = constant(1.0)
    optimizer.param_groups[0]["lr"] = Bomb(fuse)
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 1})
    with pytest.raises(
        ValueError, match=r"load_checkpoint: optimizer.param_groups.0.lr is not a plain value; .*not use"
    ):
        load_checkpoint(path, *constant(0.0))
    assert not fuse.exists()


def test_metadata_must_be_metadata(two_checkpoints: Path) -> None:
    (two_checkpoints / "step_2" / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    seal(two_checkpoints / "step_2")
    with pytest.raises(ValueError, match=r"\.metadata must hold a Metadata, got dict"):
        load_checkpoint(two_checkpoints / "step_2", *constant(0.0))


# ---- what does not fit


def test_another_model_is_refused_by_all_its_names(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, *toy(0, sharded=False), {"step": 1})
    model = Toy(0, dim=9)
    model.extra = nn.Parameter(torch.zeros(1))
    del model.unused
    model.scale.data = model.scale.data.double()
    with pytest.raises(ValueError, match="does not fit the model") as refusal:
        load_checkpoint(path, model, torch.optim.AdamW(model.parameters()))
    for line in (
        "extra: in the model, not in the file",
        "unused: in the file, not in the model",
        "scale: torch.float32 [1] in the file, torch.float64 [1] in the model",
        "body.0.weight: torch.float32 [7, 5] in the file, torch.float32 [9, 5] in the model",
        "resume with the model section",
        "set a new run.folder",
    ):
        assert line in str(refusal.value)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    model, optimizer = toy(0, sharded=False)
    train(model, optimizer, range(1))
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 1})
    groups = [group["params"] for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=r"does not fit the optimizer:\n.*step: in the file, not in the optimizer"):
        load_checkpoint(path, model, torch.optim.SGD(model.parameters(), momentum=0.9))
    with pytest.raises(ValueError, match="has 2 parameter groups, the optimizer 1"):
        load_checkpoint(path, model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="other parameter groups"):
        load_checkpoint(path, model, torch.optim.AdamW([{"params": groups[1]}, {"params": groups[0]}]))


def test_many_names_are_counted_not_listed(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, *constant(1.0), {"step": 1})
    model = nn.ModuleList(nn.Linear(1, 1) for _ in range(15))
    with pytest.raises(ValueError, match="and 10 more"):
        load_checkpoint(path, model, torch.optim.SGD(model.parameters()))


@pytest.mark.parametrize("progress", [{}, {"step": "7"}, {"step": -1}, {"step": True}])
def test_progress_needs_a_step(tmp_path: Path, progress: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="progress must hold the number of the step"):
        save_checkpoint(tmp_path, *constant(0.0), progress)


def test_progress_is_json_and_keep_is_positive(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(tmp_path, *constant(0.0), {"step": 1, "loss": torch.ones(1)})
    with pytest.raises(ValueError, match="keep must be at least 1, got keep=0"):
        save_checkpoint(tmp_path, *constant(0.0), {"step": 1}, keep=0)
    assert not list(tmp_path.iterdir())


# ---- the model's folder


def test_a_models_folder_brings_the_model_back(sharded: bool, tmp_path: Path) -> None:
    vocabulary = tmp_path / "spiece.model"
    vocabulary.write_bytes(b"pieces")
    model, _ = toy(0, sharded=sharded)
    for _ in range(2):  # the second replaces the first
        save_model(tmp_path / "model", model, {"builder": "toy", "arguments": {"seed": 0}}, vocabulary)
    assert {path.name for path in tmp_path.iterdir()} == {"spiece.model", "model"}
    assert (tmp_path / "model/tokenizer.model").read_bytes() == b"pieces"
    assert json.loads((tmp_path / "model/config.json").read_text()) == {"builder": "toy", "arguments": {"seed": 0}}

    plain = Toy(0).state_dict()
    stored = load_file(tmp_path / "model/model.safetensors")
    assert stored.keys() == plain.keys()
    assert all(torch.equal(stored[name], plain[name]) for name in plain)
    model, optimizer = toy(1, sharded=sharded)
    load_model_weights(tmp_path / "model", model)
    assert state(model, optimizer)["model"] == {name: value.tolist() for name, value in plain.items()}


def test_tied_and_strided_weights_are_saved_apart(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3, bias=False), nn.Linear(2, 3))
    model[1].weight = model[0].weight
    model[2].weight = nn.Parameter(torch.arange(6.0).view(2, 3).T)
    mask = os.umask(0o027)
    try:
        save_model(tmp_path / "model", model, {}, None)
    finally:
        os.umask(mask)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "model").iterdir()} == {0o640}  # as others may read
    other = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3, bias=False), nn.Linear(2, 3))
    load_model_weights(tmp_path / "model", other)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())
    assert not (tmp_path / "model/tokenizer.model").exists()


def test_weights_that_do_not_fit_are_all_named(sharded: bool, tmp_path: Path) -> None:
    save_model(tmp_path / "model", toy(0, sharded=sharded)[0], {}, None)
    model = Toy(0, dim=9)
    model.extra = nn.Parameter(torch.zeros(1))
    del model.unused
    with pytest.raises(ValueError, match=r"load_model_weights: .*does not fit the model") as refusal:
        load_model_weights(tmp_path / "model", model)
    for line in (
        "extra: in the model, not in the file",
        "unused: in the file, not in the model",
        "body.0.weight: [7, 5] in the file, [9, 5] in the model",
        "config.json",
    ):
        assert line in str(refusal.value)
    with pytest.raises(FileNotFoundError, match=r"there is no .*nothing/model.safetensors; give the model folder"):
        load_model_weights(tmp_path / "nothing", model)


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_weights_of_which_a_part_is_missing_are_refused(left: int, tmp_path: Path) -> None:
    save_model(tmp_path / "model", Toy(0), {}, None)
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"load_model_weights: .*safetensors cannot be read: .* copy it again"):
        load_model_weights(tmp_path / "model", Toy(0))


# ---- one run at a time, and its end


def test_a_second_run_in_the_folder_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    first = RunLock(tmp_path / "run", patience=0.0)
    message = rf"{tmp_path}/run is being written by process {os.getpid()} on .*; wait for that run, end it .*folder"
    with pytest.raises(BlockingIOError, match=message):
        RunLock(tmp_path / "run", patience=0.2)
    first.release()
    with RunLock(tmp_path / "run", patience=0.0):
        pass
    RunLock(tmp_path / "run", patience=0.0).release()


@pytest.mark.parametrize("below", ["", "run"])
def test_a_run_cannot_write_to_a_file_or_below_one(tmp_path: Path, below: str) -> None:
    file = tmp_path / "photo.png"
    file.touch()
    with pytest.raises(
        NotADirectoryError, match=rf"run.folder, .* must be a folder, and {file} is a file; set another"
    ):
        RunLock(file / below)


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from grr.checkpoint.run_lock import RunLock\n"
    code += "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    with started([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=f"process {holder.pid} on"):
            RunLock(tmp_path, patience=0.0)
        holder.kill()
        RunLock(tmp_path).release()


@pytest.fixture
def signals() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
def test_signals_ask_for_a_stop_and_a_second_interrupt_insists(sharded: bool) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        stop = StopSignal()
        assert not stop.requested()
        signal.raise_signal(number)
        assert stop.requested()
        assert stop.requested()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


# ---- several ranks


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_on_one_two_and_four(tmp_path: Path) -> None:
    """Two groups of processes, each checking all that needs several ranks; the single process is this one."""
    reports = []
    for ranks in (2, 4):
        run([str(WORKER), str(tmp_path)], processes=ranks).check_returncode()
        reports.append(json.loads((tmp_path / f"report_{ranks}.json").read_text()))
    on_two, on_four = reports
    first = on_two[0]

    model, optimizer = toy(0, sharded=False)
    torch.testing.assert_close(train(model, optimizer, range(6)), first["first"] + first["continued"])

    for report in [*on_two, *on_four]:
        assert report["progress"] == {"step": 3, "epoch": 0}
        assert report["loaded"] == first["saved"]
        assert report["weights"] == first["final"]
        assert "is being written by process" in report["lock"]
        assert "body.0.weight: [7, 5] in the file, [9, 5] in the model" in report["misfit"]
        assert (report["stop before"], report["stop after"]) == (False, True)
    assert all(report["resumed"] == first["continued"] for report in on_two)
    torch.testing.assert_close(on_four[0]["resumed"], first["continued"])

    model, optimizer = toy(1, sharded=False)
    load_checkpoint(tmp_path / "step_3", model, optimizer)
    assert json.loads(json.dumps(state(model, optimizer))) == first["saved"]
    torch.testing.assert_close(train(model, optimizer, range(3, 6)), first["continued"])
