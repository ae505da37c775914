"""Classifying as a user meets it: a folder, names of classes, one command."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from grr import config
from grr.data.formats.openmoji import OBJECTS
from grr.evaluation.zero_shot import class_embeddings
from grr.inference.results import read_results

RECIPE = Path(__file__).resolve().parents[2] / "recipes/classify.py"
CONFIGS = sorted((RECIPE.parent / "configs/classify").glob("*.yaml"))
DEFAULT = RECIPE.parent / "configs/classify/default.yaml"
COLOURS = ("red", "green", "blue", "yellow", "white", "black")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with an image of each colour and a bad one."""
    (tmp_path / "mine").mkdir()
    for name in COLOURS:
        Image.new("RGB", (9, 9), name).save(tmp_path / f"mine/{name}.png")
    (tmp_path / "mine/empty.png").touch()
    (tmp_path / "colours.txt").write_text("\n".join(COLOURS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def classify(monkeypatch, *words: str) -> int:
    """Run the recipe in this process; gives its exit status."""
    monkeypatch.setattr(sys, "argv", [str(RECIPE), "--config", str(DEFAULT), *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(RECIPE), run_name="__main__")
    return end.value.code


@pytest.mark.parametrize("classes", ["run.classes_file=colours.txt", f"run.classes=[{', '.join(COLOURS)}]"])
def test_each_image_gets_its_class_wherever_the_names_stand(here, colour_run, monkeypatch, capsys, classes):
    words = [
        f"model.path={colour_run}",
        "run.images=mine",
        classes,
        "zero_shot.templates=['a {} picture']",
        "run.top=2",
    ]
    assert classify(monkeypatch, *words) == 0
    rows = read_results(Path("classes/classes.jsonl"))
    assert {Path(row["file"]).stem: row["classes"][0] for row in rows if "classes" in row} == {c: c for c in COLOURS}
    assert all(len(row["classes"]) == len(row["probabilities"]) == 2 for row in rows if "classes" in row)
    said = capsys.readouterr().out
    assert f"mine/red.png: red {rows[-3]['probabilities'][0]:.1%}, " in said
    assert (
        "6 images classified; 1 could not be read:\n  mine/empty.png: not a readable image: the file is empty" in said
    )
    assert Path("classes/classes.html").read_text().count("<img src=") == 6


@pytest.mark.parametrize("classes", [[], ["run.classes=[red]", "run.classes_file=colours.txt"]])
def test_classes_are_named_once(here, colour_run, monkeypatch, capsys, classes):
    assert classify(monkeypatch, f"model.path={colour_run}", "run.images=mine", *classes) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(r"classify: the classes must be named once, got .*; set one of them\n", said)


def test_a_copied_recipe_runs_from_another_folder(here, colour_run):
    shutil.copy(RECIPE, "mine.py")
    words = [f"model.path={colour_run}", "run.images=mine/red.png", "run.classes_file=colours.txt"]
    done = subprocess.run(
        [sys.executable, "mine.py", "--config", str(DEFAULT), *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("mine/red.png: ")


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_is_valid_and_says_how_to_run_it(file):
    sys.path.insert(0, str(RECIPE.parent))
    from classify import Model, Run

    words = ["--config", str(file), "model.path=runs/openmoji", "run.images=photos"]
    cfg = config.load({"run": Run, "model": Model, "zero_shot": class_embeddings}, words)
    if file.stem == "openmoji":
        assert cfg.run["classes"] == list(OBJECTS)
    assert f"recipes/classify.py --config recipes/configs/classify/{file.name}" in file.read_text().split("\nrun:")[0]
