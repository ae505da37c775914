"""Every recipe and config has a name, a sentence, and a way out of the package that overwrites nothing."""

import itertools
import re
from pathlib import Path

import pytest

from grr.experiments import catalog as installed

EVERY = [item for recipe in installed.recipes() for item in (recipe, *installed.configs(recipe.name))]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_recipe_and_config_of_the_package_is_found_by_its_name():
    found = {installed.find(item.name).path for item in EVERY}
    assert found == {*installed.RECIPES.glob("*.py"), *installed.RECIPES.glob("configs/*/*.yaml")}
    assert {config.parent.name for config in installed.RECIPES.glob("configs/*/*.yaml")} <= {
        recipe.name for recipe in installed.recipes()
    }


@pytest.mark.parametrize("item", EVERY, ids=lambda item: item.name)
def test_each_begins_with_a_title_that_fits_a_line(item):
    said = installed.about(item)
    assert len(said.split()) >= 2
    assert not said.startswith(("python", "torchrun", "-", "data."))
    assert len(said) < 80
    if not item.is_recipe:
        assert item.path.read_text().startswith(f"# {said}\n# ")
        assert not said.endswith(".")
        assert "/configs/" not in said


@pytest.mark.parametrize("config", [item for item in EVERY if not item.is_recipe], ids=lambda item: item.name)
def test_a_config_names_the_command_that_runs_it_and_what_to_expect(config):
    lines = itertools.takewhile(lambda line: line.startswith("#"), config.path.read_text("utf-8").splitlines())
    header = " ".join(line.removeprefix("#").removesuffix("\\") for line in lines)
    script, file = f"recipes/{config.name.partition('/')[0]}.py", f"recipes/configs/{config.name}.yaml"
    assert re.search(rf" (python|torchrun [-\w ]+) {re.escape(script)} +--config {re.escape(file)}\b", header)
    assert "Expect: " in header


def test_titles_differ():
    titles = [installed.about(item) for item in EVERY]
    assert len(set(titles)) == len(titles)


def test_a_recipe_is_copied_with_its_configs_in_the_same_layout(tmp_path):
    files = installed.copy("pretrain", tmp_path / "recipes")
    there = {path for path in tree(installed.RECIPES) if path == "pretrain.py" or path.startswith("configs/pretrain/")}
    assert {str(file.relative_to(tmp_path / "recipes")) for file in files} == there
    assert tree(tmp_path / "recipes") == {path: tree(installed.RECIPES)[path] for path in there}


def test_a_config_is_copied_alone_or_to_a_file(tmp_path):
    installed.copy("pretrain/photos", tmp_path)
    installed.copy("pretrain/photos", tmp_path / "deep" / "mine.yaml")
    assert set(tree(tmp_path)) == {"configs/pretrain/photos.yaml", "deep/mine.yaml"}
    assert len(set(tree(tmp_path).values())) == 1


def test_copying_does_not_overwrite_and_copies_all_files_or_none(tmp_path):
    changed = tmp_path / "configs" / "pretrain" / "photos.yaml"
    changed.parent.mkdir(parents=True)
    changed.write_text("mine")
    with pytest.raises(ValueError, match=r"photos.yaml: exists .* is not overwritten; .*`grr cp pretrain "):
        installed.copy("pretrain", tmp_path)
    assert tree(tmp_path) == {"configs/pretrain/photos.yaml": b"mine"}
    changed.unlink()
    assert installed.copy("pretrain", tmp_path) == installed.copy("pretrain", tmp_path)  # the same may be there


def test_a_destination_with_another_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"pretrain/photos is a .yaml file, got .*mine.py"):
        installed.copy("pretrain/photos", tmp_path / "mine.py")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("pretrian", "pretrain"), ("pretrain/photo", "pretrain/photos"), ("cc12m_grr", "pretrain/cc12m_grr")],
)
def test_the_error_for_a_mistyped_name_suggests_the_right_one(name, meant):
    with pytest.raises(ValueError, match=rf"no recipe or config {name!r}; did you mean {meant}\?"):
        installed.find(name)


def test_the_error_for_an_ambiguous_name_lists_all_configs():
    with pytest.raises(ValueError, match=r"did you mean .*evaluate/openmoji or .*pretrain/openmoji"):
        installed.find("openmoji")
