"""Numbers out of range, and options that another option leaves without effect, are refused when a config is read."""

from pathlib import Path

import pytest

from grr import config
from grr.cli.check import recipe_sections
from grr.config import ConfigError
from grr.config.needs import NEEDS
from grr.config.ranges import RANGES
from grr.config.signature import arguments_of
from grr.experiments import catalog
from grr.generation.generate import generate

NUMBERS = [
    ("model.patch_dropout=1.0", "must be from 0 to below 1, got 1.0"),
    ("loader.block=0", "must be at least 1, got 0"),
    ("loader.workers=-1", "must be at least 0, got -1"),
    ("optimizer.lr=0", "must be above 0 and finite, got 0.0"),
    ("optimizer.betas=[0.9, 1.0]", r"must be from 0 to below 1, got \[0.9, 1.0\]"),
    ("optimizer.layer_decay=0", "must be above 0 and at most 1, got 0.0"),
    ("schedule.warmup_steps=-1", "must be at least 0, got -1"),
]
IN_VAIN = [
    (
        "run.patch_dropout_epochs=3",
        "3 with model.patch_dropout=0.0; set model.patch_dropout",
        "model.patch_dropout=0.5",
    ),
    (
        "model.logit_bias=-10.0",
        "-10.0 with loss.contrastive='softmax'; set loss.contrastive",
        "loss.contrastive=sigmoid",
    ),
    ("optimizer.decay_all=false", "False with optimizer.weight_decay=0.0; set", "optimizer.weight_decay=0.01"),
    ("generation.length_penalty=0.5", "0.5 with generation.num_beams=1; set", "generation.num_beams=2"),
    ("loader.prefetch=8", "8 with loader.workers=0; set", "loader.workers=3"),
    ("control.factor=10.0", "10.0 with control.regimes=1; set", "control.regimes=2"),
    ("generation.seed=3", "3 with generation.temperature=0.0; set", "generation.temperature=0.7"),
    ("generation.top_k=5", "5 with generation.temperature=0.0; set", "generation.temperature=0.7"),
    ("generation.top_p=0.5", "0.5 with generation.temperature=0.0; set", "generation.temperature=0.7"),
]
PRETRAIN, _ = recipe_sections(catalog.RECIPES / "pretrain.py")
SECTIONS = {key: PRETRAIN[key] for key in ("run", "model", "loader", "loss", "optimizer", "schedule")}
SECTIONS |= {"generation": generate}
FINETUNE, _ = recipe_sections(catalog.RECIPES / "finetune.py")
SECTIONS |= {"control": FINETUNE["control"]}
BASE = "model: {name: grr_coca_tiny}\noptimizer: {weight_decay: 0.0}\nloader: {workers: 0}\ncontrol: {regimes: 1}"


def load(tmp_path: Path, yaml: str, *overrides: str) -> config.Config:
    (tmp_path / "tiny.yaml").write_text(yaml)
    return config.load(SECTIONS, ["--config", str(tmp_path / "tiny.yaml"), *overrides])


@pytest.mark.parametrize(("override", "message"), NUMBERS)
def test_a_number_out_of_range_is_refused_when_the_config_is_read(tmp_path, override, message):
    with pytest.raises(ConfigError, match=f"command line:\n  {override.partition('=')[0]}: {message}$"):
        load(tmp_path, BASE, override)


@pytest.mark.parametrize(("option", "message", "remedy"), IN_VAIN)
def test_an_option_that_another_leaves_without_effect_is_refused_with_the_remedy(tmp_path, option, message, remedy):
    key, _, value = option.partition("=")
    with pytest.raises(ConfigError, match=f"command line:\n  {key}: has no effect unless .*, got {message}"):
        load(tmp_path, BASE, option)
    section, name = key.split(".")
    assert str(vars(load(tmp_path, BASE, option, remedy))[section][name]).lower() == value


def test_an_option_in_vain_is_named_beside_the_other_mistakes_and_its_default_is_none(tmp_path):
    yaml = "model: {name: grr_coca_tiny}\nrun: {patch_dropout_epochs: 3}"
    with pytest.raises(
        ConfigError, match=r"command line:\n  model.dim: .*\n.*tiny.yaml:\n  run.patch_dropout_epochs: has no "
    ):
        load(tmp_path, yaml, "model.dim=wide")
    load(tmp_path, "model: {name: grr_coca_tiny}\nrun: {patch_dropout_epochs: null}")


def test_every_rule_of_a_number_or_an_option_is_of_a_key_that_a_recipe_has():
    functions = [
        (section, function)
        for item in catalog.recipes()
        for section, one in recipe_sections(item.path)[0].items()
        for function in (one.values() if isinstance(one, dict) else [one])
    ]
    keys = {f"{section}.{key}" for section, function in functions for key in arguments_of(function)[0]}
    assert RANGES.keys() | NEEDS.keys() | {need.other for need in NEEDS.values()} <= keys
