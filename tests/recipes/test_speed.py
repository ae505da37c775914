"""The comparison of speed with open_clip: what it measures, in which order, and what it writes down."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from programs import run

from grr import config
from grr.evaluation.peer import OpenClipCoCa, texts_of
from grr.training.random_batches import random_batches

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
CONFIGS = sorted((RECIPES / "configs/speed").glob("*.yaml"))
sys.path.insert(0, str(RECIPES))
from speed import SECTIONS, Run, cases, validate_config  # noqa: E402


def measure(folder: Path, *words: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    tiny = str(RECIPES / "configs/speed/tiny.yaml")
    done = run([str(RECIPES / "speed.py"), "--config", tiny, "run.folder=out", *words], cwd=folder, timeout=600)
    file = folder / "out/speed.json"
    return done, json.loads(file.read_text())["rows"] if file.exists() else []


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_is_valid_and_says_how_to_run_it(file):
    validate_config(config.load(SECTIONS, ["--config", str(file)]))
    assert f"recipes/speed.py --config recipes/configs/speed/{file.name}" in file.read_text().split("\nrun:")[0]


def test_each_row_of_a_peer_follows_ours_and_compiled_rows_are_last():
    rows = cases(Run())
    assert [row.package for row in rows] == ["grr", "open_clip"] * (len(rows) // 2)
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        assert ours._replace(package="open_clip") == theirs
    compiled = ["compile" in row.variant for row in rows]
    assert compiled == sorted(compiled)
    assert len(set(rows)) == len(rows) == 2 * (4 + 2 + 4)


def test_a_peer_reads_the_same_captions_without_our_class_token():
    (batch,) = random_batches(1, batch_size=5, vocab_size=512, context_length=16, image_size=32, caption_tokens=6)
    texts = texts_of(batch, context_length=16, cls_id=511)
    assert texts.shape == (5, 16)
    for text, row in zip(texts.tolist(), batch.ids.tolist(), strict=True):
        assert [token for token in text if token] == [token for token in row if token not in (0, 511)]


def test_a_peer_that_is_not_installed_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    sizes = {"dim": 48, "num_heads": 2, "vocab_size": 512, "context_length": 16, "image_size": 32, "patch_size": 8}
    layers = {"num_queries": 16, "vision_layers": 1, "text_layers": 1, "multimodal_layers": 1}
    with pytest.raises(ModuleNotFoundError, match=r"open_clip must be installed, got .*; pip install open_clip_torch"):
        OpenClipCoCa(**sizes, **layers)


@pytest.mark.slow
def test_it_runs_from_end_to_end_without_a_gpu(tmp_path):
    done, rows = measure(tmp_path, "run.packages=[grr]", "run.variants=[bf16]", "run.batch_sizes=[4]")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["what"] for row in rows] == ["training step"] * 2 + ["captions"] * 2
    result = json.loads((tmp_path / "out/speed.json").read_text())
    for row in rows:
        assert row["samples_per_second"] == pytest.approx(row["samples"] / row["seconds"])
        assert row["ratio"] == 1
        if row["what"] == "training step":
            assert row["of_peak"] == pytest.approx(row["flops"] / row["seconds"] / 0.4e12)
            assert row["of_matmul"] == pytest.approx(row["flops"] / row["seconds"] / result["matmul"][row["variant"]])
    table = (tmp_path / "out/speed.md").read_text().split("\n\n")[1].splitlines()
    assert len(table) == 2 + len(rows)
    assert len({line.count("|") for line in table}) == 1
    head, _, *lines = ([cell.strip() for cell in line.split("|")] for line in table)
    lengths = [(line[head.index("caption")], line[head.index("padded")]) for line in lines]
    assert lengths == [("full", "16"), ("4", str(rows[1]["padded_tokens"])), ("10", "-"), ("10", "-")]


@pytest.mark.slow
def test_rows_for_which_there_is_no_time_are_listed(tmp_path):
    done, rows = measure(tmp_path, "run.seconds=0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(rows) == len(cases(config.load(SECTIONS, ["--config", str(CONFIGS[-1])]).get(Run)))
    assert all(row["not_measured"] == "run.seconds=0 had passed" for row in rows)
    assert done.stdout.count("not measured: run.seconds=0 had passed") == len(rows)
    assert {row["caption_tokens"] for row in rows if row["what"] == "captions"} == {10}  # those written


def test_what_cannot_be_measured_is_said_before_anything_starts(tmp_path):
    done, rows = measure(tmp_path, "run.written_tokens=14", "run.caption_tokens=[0]")
    assert done.returncode != 0
    assert "speed: written_tokens must be from 1 to 13, got 14; caption_tokens must be null or a mean" in done.stderr
    assert rows == []
    assert not list(tmp_path.iterdir())
