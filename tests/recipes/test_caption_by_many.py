"""The caption recipe by two processes: folders and tar shards, killed or not."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from programs import run
from waiting import started, wait_until

from grr.data.formats.shards import webdataset
from grr.inference.results import read_results

ROOT = Path(__file__).resolve().parents[2]
RECIPE, CONFIGS = ROOT / "recipes/caption.py", ROOT / "recipes/configs/caption"
COLOURS = ("red", "green", "blue", "yellow", "white", "black")
KILLS, SHARDS = 5, 16
IMAGES = int(os.environ.get("GRR_CAPTIONED_IMAGES", 40_000))


def words(config: str, *more: str) -> list[str]:
    return [str(RECIPE), "--config", str(CONFIGS / f"{config}.yaml"), *more]


def write_shards(folder: Path, counts: list[int], colours: int = 6) -> None:
    """Shards of small images, each of one of the colours, or of a colour of its own."""
    folder.mkdir()
    number = 0
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for _ in range(count):
                colour = COLOURS[number % 6] if colours == 6 else (number % 256, number // 256, 99)
                file = io.BytesIO()
                Image.new("RGB", (16, 16), colour).save(file, "PNG")
                for suffix, content in (("png", file.getvalue()), ("txt", f"old {number}".encode())):
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                number += 1


def test_two_processes_caption_shards_to_train_on(colour_run, tmp_path):
    write_shards(tmp_path / "shards", [13, 1, 8])
    with tarfile.open(tmp_path / "shards/00002.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("bad.png"), io.BytesIO())
    command = words("shards", f"model.path={colour_run}", "run.images=shards", "captions.min_cosine=null")
    command += ["captions.scores=true", "run.batch_size=3"]
    done = run(command, cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "23 images = 22 captioned + 1 skipped\n" in done.stdout
    assert "  1 skipped: not a readable image: the file is empty: 00002.tar/bad.png\n" in done.stdout
    assert "23 images in " in done.stdout
    assert " by 2 processes, " in done.stdout

    out = tmp_path / "recaptioned"
    rows = [row for file in sorted(out.glob("*.jsonl")) for row in read_results(file)]
    assert [row["file"].split("/")[0] for row in rows] == ["00000.tar"] * 13 + ["00001.tar"] + ["00002.tar"] * 9
    assert [row.get("caption") for row in rows] == [*(f"a {COLOURS[i % 6]} picture" for i in range(22)), None]
    assert all(row["likelihood"] < 0 < row["cosine"] for row in rows[:-1])
    pairs = webdataset(shards=f"{out}/*.tar")
    assert [pairs.captions[i] for i in range(22)] == [row["caption"] for row in rows[:-1]]
    assert pairs.load(0, size=8, crop="squash").float().mean((1, 2)).tolist() == [255, 0, 0]
    page = (out / "captions.html").read_text()
    assert page.count("<img src=") == 22
    assert "1 images: not a readable image: the file is empty: 00002.tar/bad.png" in page

    again = run([*command, "run.batch_size=5"], cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "23 images = 22 captioned + 1 skipped\n" in again.stdout
    assert "\n0 images in " in again.stdout
    refused = run([*command, "generation.num_beams=2"], cwd=tmp_path, processes=2)
    assert refused.returncode == 1
    (line,) = [line for line in refused.stderr.splitlines() if "other options" in line]
    assert line == (
        "caption: caption_shards: recaptioned was written with other options (generation.num_beams is 5 there and 2 "
        "now); set another folder, or delete that one to start again"
    )


def test_two_processes_share_a_folder_of_images(colour_run, tmp_path):
    (tmp_path / "mine").mkdir()
    for i in range(31):
        Image.new("RGB", (8, 8), COLOURS[i % 6]).save(tmp_path / f"mine/{i:03d}.png")
    (tmp_path / "mine/020.png").write_bytes(b"a mistake")
    command = words("default", f"model.path={colour_run}", "run.images=mine", "run.batch_size=4")
    done = run(command, cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_results(tmp_path / "captions/captions.jsonl")
    assert sorted(row["file"] for row in rows) == [f"mine/{i:03d}.png" for i in range(31)]
    assert {row["file"]: row.get("caption") for row in rows} == {
        f"mine/{i:03d}.png": None if i == 20 else f"a {COLOURS[i % 6]} picture" for i in range(31)
    }
    assert "30 images captioned; 1 could not be read:\n  mine/020.png: " in done.stdout
    assert "31/31" in done.stderr

    Image.new("RGB", (8, 8), "red").save(tmp_path / "mine/020.png")  # mended, and another was added
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "mine/031.png")
    (tmp_path / "captions/.captions.rank3.jsonl").write_bytes(b'{"file": "mine/031.png", "caption": "a blue pi')
    done = run(command, cwd=tmp_path)
    assert "32 images captioned, 30 of them before\n" in done.stdout
    rows = read_results(tmp_path / "captions/captions.jsonl")
    assert Counter(row["file"] for row in rows) == Counter(f"mine/{i:03d}.png" for i in range(32))
    assert not list((tmp_path / "captions").glob(".captions.rank*"))


@contextlib.contextmanager
def two_processes(command: list[str], folder: Path) -> Iterator[list[subprocess.Popen]]:
    """The recipe in two processes, whose output is in files; both are killed -9 at the end of the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        running = []
        for rank in range(2):
            output = stack.enter_context((folder / f"rank{rank}.txt").open("w"))
            environment = {**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            options = {"cwd": folder, "env": environment, "stdout": output, "stderr": subprocess.STDOUT}
            running.append(stack.enter_context(started([sys.executable, *command], seconds=600, **options)))
        yield running


def lines_in(folder: Path) -> int:
    """The number of rows that are written, of complete shards and of others."""
    count, whole = 0, {file.stem: file for file in folder.glob("*.jsonl")}
    parts = [file for file in folder.glob("parts/*.jsonl") if file.name.split(".")[0] not in whole]
    for file in (*whole.values(), *parts):
        with contextlib.suppress(FileNotFoundError):  # a shard was completed meanwhile
            count += file.read_bytes().count(b"\n")
    return count


@pytest.mark.slow
def test_many_images_through_two_processes_killed_five_times_are_captioned_once_each(start, tmp_path):
    write_shards(tmp_path / "shards", [IMAGES // SHARDS] * SHARDS, colours=IMAGES)
    command = words("default", f"model.path={start}", "run.images=shards", "run.batch_size=500", "run.write_tar=true")
    command += ["generation.max_new_tokens=4", "captions.scores=true"]
    folder, kills = tmp_path / "captions", 0
    for kill in range(1, KILLS + 1):
        with two_processes(command, tmp_path) as running:
            wait_until(lambda kill=kill: lines_in(folder) >= kill * IMAGES // (KILLS + 1), running[0], seconds=300)
            assert all(process.poll() is None for process in running)
            kills += 1
    assert kills == KILLS
    before, begin = lines_in(folder), time.monotonic()
    assert IMAGES / 2 < before < IMAGES
    with two_processes(command, tmp_path) as running:
        wait_until(lambda: all(process.poll() is not None for process in running), seconds=300)
        seconds = time.monotonic() - begin
        assert [process.returncode for process in running] == [0, 0], (tmp_path / "rank0.txt").read_text()[-3000:]
    print(f"{IMAGES - before:,} images after the last kill in {seconds:.1f} s, with the start of the processes")
    print("\n".join((tmp_path / "rank0.txt").read_text().splitlines()[-3:]))

    rows = [row for file in sorted(folder.glob("*.jsonl")) for row in read_results(file)]
    each = IMAGES // SHARDS
    assert [row["file"] for row in rows] == [f"{i // each:05d}.tar/{i:09d}.png" for i in range(IMAGES)]
    stats = [json.loads(file.read_bytes()) for file in sorted(folder.glob("*_stats.json"))]
    assert len(stats) == SHARDS
    assert all(one["images"] == each == one["read"] + sum(s["count"] for s in one["skipped"].values()) for one in stats)
    written = {row["file"]: row["caption"] for row in rows if row["caption"]}
    keys = Counter()
    for file in sorted(folder.glob("*.tar")):
        with tarfile.open(file) as tar:
            for name in tar.getnames():
                if name.endswith(".png"):
                    keys[f"{file.name}/{name}"] += 1
    assert keys == Counter(written.keys())
    assert len(written) > IMAGES / 2
    assert not list((folder / "parts").glob("*.jsonl"))
    assert not list(folder.glob("*.tmp"))
