"""Embedding and searching as a user meets them: two commands, the images found, and a page."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from grr import config
from grr.inference.index import open_index

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def run(monkeypatch, name: str, *words: str) -> int:
    """Run a recipe in this process; gives its exit status."""
    default = str(RECIPES / f"configs/{name}/default.yaml")
    monkeypatch.setattr(sys, "argv", [name, "--config", default, *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    return end.value.code


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with images of six colours, four of each and a bad one."""
    (tmp_path / "mine").mkdir()
    for name in ("red", "green", "blue", "yellow", "white", "black"):
        for i in range(4):
            Image.new("RGB", (9 + i, 9), name).save(tmp_path / f"mine/{name} {i}.png")
    (tmp_path / "mine/torn.png").write_bytes(b"\x89PNG")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_texts_and_an_image_find_their_colours_by_the_model_that_made_the_index(here, colour_run, monkeypatch, capsys):
    assert run(monkeypatch, "embed", f"model.path={colour_run}", "run.images=mine") == 0
    assert "24 images in index; 1 could not be read:\n" in (said := capsys.readouterr().out)
    assert "mine/torn.png: not a readable image" in said
    assert run(monkeypatch, "embed", f"model.path={colour_run}", "run.images=mine") == 0
    assert "24 images in index, 24 of them before; 1 could not be read:\n" in capsys.readouterr().out

    Image.new("RGB", (50, 50), "black").save("asked.jpg")
    words = ["run.texts=[a green picture, a white picture]", "run.images=asked.jpg", "run.top=4"]
    assert run(monkeypatch, "search", *words) == 0
    blocks = capsys.readouterr().out.split("\n\n")
    for block, query, name in zip(
        blocks, ["a green picture", "a white picture", "asked.jpg"], ["green", "white", "black"], strict=True
    ):
        lines = block.splitlines()
        assert lines[0] == query
        assert [line.split("  ")[-1] for line in lines[1:5]] == [f"mine/{name} {i}.png" for i in range(4)]
    page = Path("index/hits.html").read_text()
    assert page.count("<img src=") == 3 * 4 + 1
    assert "among 24 images" in page


def test_an_index_of_another_model_is_refused_and_says_what_to_do(here, colour_run, monkeypatch, capsys):
    run(monkeypatch, "embed", f"model.path={colour_run}", "run.images=mine")
    shutil.copytree(colour_run, "other")
    from safetensors.torch import load_file, save_file

    weights = load_file("other/model/model.safetensors")
    weights["contrastive_pooler.queries"] += torch.ones(1)
    save_file(weights, "other/model/model.safetensors")
    for name, words in {"search": "run.texts=[x]", "embed": "run.images=mine"}.items():
        assert run(monkeypatch, name, "model.path=other", words) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert re.search(r"index must hold embeddings of this model.*; use that model, or embed the images", said)
    assert len(open_index("index")) == 24


def test_a_query_that_cannot_be_read_is_named_and_a_failure(here, colour_run, monkeypatch, capsys):
    run(monkeypatch, "embed", f"model.path={colour_run}", "run.images=mine/*0.png")
    assert run(monkeypatch, "search", "run.images=mine/torn.png") == 1
    assert "mine/torn.png could not be read: not a readable image" in capsys.readouterr().out


def test_nothing_to_look_for_is_an_error(monkeypatch, capsys):
    assert run(monkeypatch, "search") == 1
    assert "search: there must be something to look for; give run.texts=[a fox]" in capsys.readouterr().err


@pytest.mark.slow
def test_copied_recipes_run_from_another_folder(here, colour_run):
    for name, words in {
        "embed": [f"model.path={colour_run}", "run.images=mine/*.png"],
        "search": ["run.texts=[a red picture]"],
    }.items():
        shutil.copy(RECIPES / f"{name}.py", f"my_{name}.py")
        shutil.copy(RECIPES / f"configs/{name}/default.yaml", f"{name}.yaml")
        done = subprocess.run(
            [sys.executable, f"my_{name}.py", "--config", f"{name}.yaml", *words],
            text=True,
            capture_output=True,
            timeout=120,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Warning" not in done.stderr
    assert "mine/red 0.png" in done.stdout.splitlines()[1]


@pytest.mark.parametrize("name", ["embed", "search"])
def test_the_configs_are_valid_and_say_how_to_run_them(name):
    sys.path.insert(0, str(RECIPES))
    recipe = __import__(name)
    for file in (RECIPES / f"configs/{name}").glob("*.yaml"):
        words = ["--config", str(file), "model.path=runs/openmoji", "run.images=photos"]
        config.load({"run": recipe.Run, "model": recipe.Model}, words)
        assert f"recipes/{name}.py --config recipes/configs/{name}/{file.name}" in file.read_text().split("\nrun:")[0]
