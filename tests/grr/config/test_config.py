"""A config holds keyword arguments of functions: saving preserves it, and every mistake is reported with its place."""

import functools
import inspect
import re
import subprocess
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import run

from grr import config
from grr.cli.check import recipe_sections
from grr.config import ConfigError
from grr.config.help import reference
from grr.data import DATASETS
from grr.experiments import catalog as installed
from grr.models.builders import MODELS
from grr.training.optim import adamw
from grr.training.schedule import warmup_cosine


@dataclass
class Run:
    """Options of a recipe."""

    steps: int
    folder: Path = Path("runs/x")
    betas: tuple[float, float] = (0.9, 0.999)
    note: str | None = None
    layers: list[int] = field(default_factory=lambda: [1, 2])
    crop: Literal["squash", "center", 3] = "squash"
    fast: bool = False
    words: tuple[str, ...] = ()


def folder(index: torch.Tensor, *, path: Path, split: str = "train", weights: torch.Tensor | None = None):
    """Images in a folder."""
    return index, path, split, weights


def shards(index: torch.Tensor, *, pattern: str):
    """Images in tar files."""
    return index, pattern


DATA = {"folder": folder, "shards": shards}
SECTIONS = {"run": Run, "data": DATA, "optimizer": adamw, "schedule": warmup_cosine}
GOOD = "{run: {steps: 3}, data: {name: folder, path: photos}}"


def load(tmp_path: Path, yaml: str, *overrides: str, **sections) -> config.Config:
    file = tmp_path / "tiny.yaml"
    file.write_text(textwrap.dedent(yaml), encoding="utf-8")
    return config.load(sections or SECTIONS, ["--config", str(file), *overrides])


def refusal(tmp_path: Path, yaml: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, yaml, *overrides)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_an_optional_section_that_is_missing_builds_none_and_is_saved(tmp_path):
    sections = {"run": Run, "extra": DATA | config.NONE}
    cfg = load(tmp_path, "{run: {steps: 3}}", **sections)
    assert cfg.build("extra") is None
    (tmp_path / "saved.yaml").write_text(config.to_yaml(cfg))
    assert config.load(sections, ["--config", str(tmp_path / "saved.yaml")]) == cfg
    cfg = load(tmp_path, "{run: {steps: 3}}", "extra.name=shards", "extra.pattern=x", **sections)
    assert cfg.extra["pattern"] == "x"
    with pytest.raises(ConfigError, match=r"extra.name: must be one of folder, shards, none"):
        load(tmp_path, "{run: {steps: 3}}", "extra.pattern=x", **sections)


# Interpolations are resolved before a config is saved, so no text with ${ comes from one; ??? is OmegaConf's "missing".
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0$")).filter(lambda text: text != "???")
numbers = st.floats(allow_nan=False)


@given(
    steps=st.integers(-(10**30), 10**30),
    folder=texts,
    betas=st.tuples(numbers, numbers),
    note=st.none() | texts | st.sampled_from(["null", "1e-4", "on", "12", "~", "", " x", "a: b", "- a", "*.tar", "#"]),
    layers=st.lists(st.integers()),
    crop=st.sampled_from(["squash", "center", 3]),
    fast=st.booleans(),
    words=st.lists(texts).map(tuple),
)
def test_a_saved_config_loads_as_the_same_config(tmp_path_factory, folder, **values):
    tmp_path = tmp_path_factory.mktemp("config")
    cfg = load(tmp_path, GOOD)
    cfg.run = {"folder": Path(folder), **values}
    (tmp_path / "config.yaml").write_text(config.to_yaml(cfg))
    again = config.load(SECTIONS, ["--config", str(tmp_path / "config.yaml")])
    assert again == cfg
    assert {key: type(value) for key, value in again.run.items()} == {k: type(v) for k, v in cfg.run.items()}


@given(name=st.sampled_from(sorted(MODELS)), dim=st.integers(1, 9), rate=st.floats(0, 1, exclude_min=True))
def test_missing_values_are_the_defaults_of_the_function(tmp_path_factory, name, dim, rate):
    yaml = f"model: {{name: {name}, dim: {dim}}}\noptimizer: {{lr: {rate!r}}}"
    cfg = load(tmp_path_factory.mktemp("config"), yaml, model=MODELS, optimizer=adamw, schedule=warmup_cosine)
    defaults = {key: p.default for key, p in inspect.signature(MODELS[name]).parameters.items()}
    assert cfg.model == {"name": name, **defaults, "dim": dim}
    assert cfg.optimizer == adamw.__kwdefaults__ | {"lr": rate}
    assert cfg.schedule == warmup_cosine.__kwdefaults__
    assert list(cfg.schedule) == list(warmup_cosine.__kwdefaults__)  # in the order of the signature


def test_all_mistakes_are_reported_at_once_with_their_places(tmp_path):
    yaml = """
        run:
          step: 3
          fast: 1
        data:
          name: folder
        optimizer:
          lrr: 3e-3
          betas: [0.9]
          model: big
        optimzer:
          lr: 1
    """
    assert refusal(tmp_path, yaml, "optimizer.eps=small", "schedule.warmup=2", "lr=3", "data.index=1") == (
        "tiny.yaml:\n"
        "  optimzer: there is no such section (did you mean optimizer?)\n"
        "  run.step: Run takes no such argument (did you mean steps?)\n"
        "  run.fast: Run wants bool, got 1\n"
        "  run.steps: Run needs this argument, int\n"
        "  data.path: folder needs this argument, path\n"
        "  optimizer.lrr: adamw takes no such argument (did you mean lr?)\n"
        "  optimizer.betas: adamw wants tuple[float, float], got [0.9]\n"
        "  optimizer.model: adamw is given this by code, it cannot be set here\n"
        "command line:\n"
        "  lr=3: must be section.key=value\n"
        "  data.index: folder is given this by code, it cannot be set here\n"
        "  optimizer.eps: adamw wants float, got 'small'\n"
        "  schedule.warmup: warmup_cosine takes no such argument (did you mean warmup_steps?)"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.steps=2.5", "run.steps: Run wants int, got 2.5"),
        ("run.steps=true", "run.steps: Run wants int, got True"),
        ("run.steps=null", "run.steps: Run wants int, got None"),
        ("run.steps.more=2", "run.steps: Run wants int, got {'more': 2}"),
        ("run.note=2", r"run.note: Run wants str \| null, got 2"),
        ("run.layers=3", r"run.layers: Run wants list\[int\], got 3; write \[3\]"),
        ("run.layers=[a]", r"run.layers: Run wants list\[int\], got \['a'\]"),
        ("run.words=[1]", r"run.words: Run wants tuple\[str, ...\], got \[1\]"),
        ("run.crop=centre", r"run.crop: Run wants 'squash' \| 'center' \| 3, got 'centre' \(did you mean center\?\)"),
        ("data.name=foldr", r"data.name: must be one of folder, shards, got 'foldr' \(did you mean folder\?\)"),
        ("data.name=[folder]", r"data.name: must be one of folder, shards, got \['folder'\]"),
        ("data.weights=[1]", "data.weights: folder is given this by code, it cannot be set here"),
        ("run=3", "run=3: must be section.key=value"),
        ("steps", "steps: must be section.key=value"),
        ("run.note=*", r"run.note=\*: cannot be read as YAML"),
        ("run.note=???", "run.note: Missing mandatory value"),
        ("run.note=${run.nothing}", "run.note: Interpolation key 'run.nothing' not found"),
        ("--verbose", "unrecognized arguments: --verbose"),
    ],
)
def test_a_mistake_on_the_command_line_is_reported_as_such(tmp_path, override, message):
    with pytest.raises(ConfigError, match="command line:\n(.*\n)*  " + message):
        load(tmp_path, GOOD, override)


def test_a_section_with_a_choice_of_functions_needs_a_name(tmp_path):
    assert refusal(tmp_path, "run: {steps: 1}") == "tiny.yaml:\n  data.name: must be one of folder, shards"


def test_another_name_has_other_arguments(tmp_path):
    message = "tiny.yaml:\n  data.pattern: shards needs this argument, str"
    assert refusal(tmp_path, GOOD, "data.name=shards") == message


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("run: [1, 2]", r"run: must be a section of `key: value`, got \[1, 2\]"),
        ("- run", "must be sections of `key: value`, got a list"),
        ("run: {steps: 1", "cannot be read as YAML: .* line 1"),
        ("run: {steps: 1, steps: 2}", "cannot be read as YAML: .*duplicate key"),
        ("run: !!python/object/apply:os.getcwd []", "cannot be read as YAML: could not determine a constructor"),
    ],
)
def test_a_file_that_is_not_a_config_is_refused(tmp_path, yaml, message):
    with pytest.raises(ConfigError, match=rf"tiny\.yaml:\n  {message}"):
        load(tmp_path, yaml)


def test_a_file_must_be_named_and_exist(tmp_path):
    with pytest.raises(ConfigError, match=r"command line:\n  the following arguments are required: --config"):
        config.load(SECTIONS, [])
    with pytest.raises(ConfigError, match=r"none\.yaml:\n  there is no file .*none\.yaml; grr ls lists the installed"):
        config.load(SECTIONS, ["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(ConfigError, match=r":\n  cannot be read: Is a directory; name a YAML file"):
        config.load(SECTIONS, ["--config", str(tmp_path)])


def test_values_are_converted_to_the_annotated_type(tmp_path):
    cfg = load(tmp_path, GOOD, "optimizer.lr=1e-4", "optimizer.betas=[0, 0.5]", "run.note='2'", "run.words=[a, b]")
    assert cfg.optimizer["lr"] == 1e-4
    assert repr(cfg.optimizer["betas"]) == "(0.0, 0.5)"
    assert cfg.run["note"] == "2"
    assert cfg.run["words"] == ("a", "b")
    assert cfg.data == {"name": "folder", "path": Path("photos"), "split": "train"}  # weights is passed by code
    assert load(tmp_path, GOOD, "run.note=a", "run.note=null").run["note"] is None


def test_one_key_may_repeat_another_but_nothing_runs_or_reads_the_environment(tmp_path, monkeypatch):
    cfg = load(tmp_path, GOOD, "run.note=on ${data.path}", "run.layers=[1, '${run.steps}']")
    assert (cfg.run["note"], cfg.run["layers"]) == ("on photos", [1, 3])
    monkeypatch.setenv("TOKEN", "secret")
    for value in ("${oc.env:TOKEN}", "${${run.crop}:TOKEN}", "[1, '${oc.env:TOKEN}']", "${run.${run.crop}}"):
        message = refusal(tmp_path, GOOD, f"run.note={value}", "run.folder=${run.note}")
        assert "run.note: only ${section.key} can be filled in, got" in message
        assert "secret" not in message


def test_two_configs_do_not_share_their_lists(tmp_path):
    load(tmp_path, GOOD).run["layers"].append(3)
    assert load(tmp_path, GOOD).run["layers"] == [1, 2]


def test_a_section_builds_its_function_with_arguments_from_code(tmp_path):
    cfg = load(tmp_path, "model: {name: grr_coca_tiny}", model=MODELS)
    cfg.model |= {"vocab_size": 40}
    assert cfg.build("model").text_decoder.embedding.num_embeddings == 40
    assert cfg.model["name"] == "grr_coca_tiny"  # kept, because a saved config needs it
    cfg = load(tmp_path, GOOD)
    assert cfg.build("data", "an index") == ("an index", Path("photos"), "train", None)
    assert cfg.build("run") == Run(steps=3)


def test_a_function_without_a_name_is_called_by_its_section(tmp_path):
    with pytest.raises(ConfigError, match=r"schedule\.x: schedule takes no such argument"):
        load(tmp_path, "schedule: {x: 1}", schedule=functools.partial(warmup_cosine, min_lr=0.0))


# Another function on the command line

NAMED = "data: {name: karpathy, annotations: a.json, images: b, split: train}"


def named(tmp_path: Path, *overrides: str, text: str = NAMED) -> dict[str, object]:
    (tmp_path / "named.yaml").write_text(text)
    return config.load({"data": DATASETS | config.NONE}, ["--config", str(tmp_path / "named.yaml"), *overrides]).data


def test_another_name_drops_arguments_that_only_the_first_function_takes(tmp_path):
    assert named(tmp_path, "data.path=photos", "data.name=folder") == {
        "name": "folder",
        "path": "photos",
        "split": "train",
        "validation_fraction": 0.05,
    }
    assert named(tmp_path, "data.name=none") == {"name": "none"}
    assert named(tmp_path, "data.name=karpathy")["annotations"] == "a.json"


@pytest.mark.parametrize(
    ("overrides", "text", "message"),
    [
        (["data.name=folder"], NAMED, r"data\.path: folder needs this argument"),
        (["data.name=folder", "data.path=x"], NAMED.replace("images", "imges"), r"data\.imges: folder takes no such"),
        (["data.name=folder", "data.path=x", "data.images=b"], NAMED, r"line:\n  data\.images: folder takes no such"),
        (["data.name=foldr"], NAMED, r"data\.name: must be one of .* got 'foldr' \(did you mean folder\?\)"),
        (["data.name=[folder]"], NAMED, r"data\.name: must be one of"),
    ],
)
def test_another_name_does_not_hide_a_mistake(tmp_path, overrides, text, message):
    with pytest.raises(ConfigError, match=message):
        named(tmp_path, *overrides, text=text)


# Recipes as programs

RECIPE = '''"""Train something, 100 % of it."""

from dataclasses import dataclass

from grr import config
from grr.models.builders import MODELS
from grr.cli.program import run_main


@dataclass
class Run:
    """Options."""

    steps: int
    note: str | None = None


def main() -> None:
    cfg = config.load({"run": Run, "model": MODELS})
    print(cfg.run)


run_main(main)
'''


def recipe(tmp_path: Path, *arguments: str, rank: str = "0") -> subprocess.CompletedProcess[str]:
    (tmp_path / "recipe.py").write_text(RECIPE)
    (tmp_path / "tiny.yaml").write_text("run: {steps: 3}\nmodel: {name: grr_coca_tiny}")
    return run(["recipe.py", *arguments], cwd=tmp_path, RANK=rank)


def test_a_recipe_with_a_bad_config_prints_the_mistake_and_exits_2(tmp_path):
    done = recipe(tmp_path, "--config", "tiny.yaml", "run.stps=4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "command line:\n  run.stps: Run takes no such argument (did you mean steps?)\n"


def test_only_the_first_process_prints_config_errors(tmp_path):
    done = recipe(tmp_path, "--config", "tiny.yaml", "run.stps=4", rank="1")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_a_recipe_reads_its_command_line(tmp_path):
    done = recipe(tmp_path, "run.note=hello", "--config", "tiny.yaml", "run.steps=4")
    assert done.stdout == "{'steps': 4, 'note': 'hello'}\n", done.stderr


def test_help_shows_every_section_with_its_arguments_types_and_defaults(tmp_path):
    text = recipe(tmp_path, "--help").stdout
    assert "Train something, 100 % of it." in text
    assert "run:  # Run: Options.\n  steps:  # int, required\n  note: null  # str | null\n" in text
    assert "name: baseline_coca  # Build the baseline CoCa" in text
    assert "image_size: 288  # int" in text
    assert "vision_norm: \"layernorm\"  # 'rmsnorm' | 'layernorm'" in text


def test_help_shows_the_values_of_the_config_on_its_command_line(tmp_path):
    text = recipe(tmp_path, "--config", "tiny.yaml", "run.note=hello", "--help").stdout
    assert '  steps: 3  # int, required\n  note: "hello"  # str | null, default null\n' in text
    assert "model:  # one of these functions, by name; another name keeps the keys that both take\n  name: g" in text
    assert "usage" in recipe(tmp_path, "--config", "gone.yaml", "--help").stdout


@dataclass
class Meant:
    """Keys with their meanings."""

    folder: str  # where it writes
    steps: Annotated[int, "how many"] = 3
    names: list[str] = field(default_factory=list)  # what: "a" or b


def meant(
    image: int,
    *,
    share: float = 0.5,  # of it
    mode: Annotated[Literal["a", "b"], "which"] = "a",
    dim: int = 3,
    size: int = 4,
) -> None:
    """A function."""


def test_a_meaning_comes_from_an_annotation_a_comment_or_the_list_of_shared_keys(tmp_path):
    text = reference({"run": Meant, "other": meant}, {})
    assert "  folder:  # str, required: where it writes\n  steps: 3  # int: how many\n" in text
    assert '  names: []  # list[str]: what: "a" or b\n' in text
    assert "  mode: \"a\"  # 'a' | 'b': which\n" in text
    assert "  dim: 3  # int: width of the residual stream and of the embeddings\n  size: 4  # int" in text
    (tmp_path / "c.yaml").write_text("{run: {folder: x, steps: 4}, other: {mode: b}}")
    cfg = config.load({"run": Meant, "other": meant}, ["--config", str(tmp_path / "c.yaml")])
    assert (cfg.run["steps"], cfg.other["mode"]) == (4, "b")


@pytest.mark.parametrize("item", [r for r in installed.recipes() if r.name != "sizes"], ids=lambda item: item.name)
def test_every_key_of_every_recipe_has_a_meaning(item):
    text = reference(recipe_sections(item.path)[0], {})
    keys = [line for line in text.splitlines() if line.startswith("  ") and not line.lstrip().startswith("name: ")]
    without = [line.strip() for line in keys if not re.search(r"  # [^:]+: \S", line)]
    assert without == []


def test_a_text_without_brackets_is_a_list_of_one(tmp_path):
    (tmp_path / "c.yaml").write_text("run: {folder: x}")
    for word, names in {
        "A man, standing": ["A man, standing"],
        "[A man, standing]": ["A man", "standing"],
        '["A man, standing"]': ["A man, standing"],
    }.items():
        cfg = config.load({"run": Meant}, ["--config", str(tmp_path / "c.yaml"), f"run.names={word}"])
        assert cfg.run["names"] == names


def test_a_key_that_was_renamed_is_refused_with_its_new_name(tmp_path):
    with pytest.raises(ConfigError, match=r"run\.clip: Run takes no such argument; it is run\.max_grad_norm now"):
        load(tmp_path, GOOD.replace("steps: 3", "steps: 3, clip: 2.0"))


def test_a_key_that_was_removed_is_refused_with_the_reason(tmp_path):
    (tmp_path / "c.yaml").write_text("optimizer: {moments: 8bit}")
    with pytest.raises(ConfigError, match=r"optimizer\.moments: adamw takes no such argument; it was removed: the opt"):
        config.load({"optimizer": adamw}, ["--config", str(tmp_path / "c.yaml")])
