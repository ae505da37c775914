"""Catalog of the installed recipes and configs: find by name, read the title, copy to a folder."""

import ast
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

IMPORTS = "GRR_IMPORT"  # environment variable: modules of the user, separated as in PATH
RECIPES = Path(__file__).parents[1] / "recipes"


class Item(NamedTuple):
    """A recipe, "pretrain", or a config of one, "pretrain/openmoji"."""

    name: str
    path: Path

    @property
    def is_recipe(self) -> bool:
        return self.path.suffix == ".py"

    @property
    def place(self) -> Path:
        """Path relative to the recipes: pretrain.py, configs/pretrain/openmoji.yaml."""
        return self.path.relative_to(RECIPES)


def recipes() -> list[Item]:
    """Returns all recipes, by name."""
    return [Item(path.stem, path) for path in sorted(RECIPES.glob("*.py"))]


def configs(recipe: str) -> list[Item]:
    """Returns the configs of a recipe, by name."""
    return [Item(f"{recipe}/{path.stem}", path) for path in sorted((RECIPES / "configs" / recipe).glob("*.yaml"))]


def find(name: str) -> Item:
    """Returns the recipe or config of a name. Raises ValueError if it does not exist."""
    every = [item for recipe in recipes() for item in (recipe, *configs(recipe.name))]
    for item in every:
        if item.name == name:
            return item
    names = [item.name for item in every]
    near = [known for known in names if known.endswith(f"/{name}")] or difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"there is no recipe or config {name!r}{hint} (grr ls lists them)")


def recipe_of(file: Path, recipe: str | None = None) -> Path:
    """Returns the recipe of a config: the named one, or else that of the config's folder configs/<recipe>/.

    For a config below recipes/ of the working directory, the target of `grr cp`, it is recipes/<recipe>.py, which may
    be an edited copy. For all others it is the installed recipe, because a downloaded config must not start a program
    beside it. Raises ValueError if neither exists.
    """
    if recipe is not None:
        return Path(recipe) if recipe.endswith(".py") else find(recipe).path
    folder = file.absolute().parent
    copied = Path("recipes", f"{folder.name}.py")
    if folder.parent == Path("recipes/configs").absolute() and copied.is_file():
        return copied
    names = [item.name for item in recipes()]
    if folder.name not in names:
        raise ValueError(
            f"a config outside a folder configs/<recipe>/ needs the name of its recipe, got {file}: grr run RECIPE "
            f"--config {file}, or grr check --recipe RECIPE {file}, for one of {', '.join(names)}, or a file"
        )
    return find(folder.name).path


def left_out(file: Path, recipe: Path) -> Path | None:
    """Returns the file beside configs/ that has the name of the recipe, if it is not the recipe that starts."""
    beside = file.absolute().parent.parent.parent / f"{recipe.stem}.py"
    ours = beside.is_file() and beside.resolve() != recipe.resolve()
    return beside if ours and file.absolute().parent.parent.name == "configs" else None


def is_own(recipe: Path) -> bool:
    """Returns whether a recipe is installed or in recipes/ of the working directory, the target of `grr cp`."""
    return recipe.absolute().parent in (RECIPES.absolute(), RECIPES.resolve(), Path("recipes").absolute())


def config_file(name: str) -> Path:
    """Returns the file of a config: a path, or the name of an installed one. Raises ValueError if neither exists."""
    if Path(name).is_file():
        return Path(name)
    if name.endswith((".yaml", ".yml")):
        raise ValueError(
            f"the config file {name} does not exist (grr cp copies a config to start from, grr ls lists them)"
        )
    item = find(name)
    if item.is_recipe:
        known = ", ".join(config.name for config in configs(name)) or "none is installed"
        raise ValueError(f"expected a config, got the recipe {name}; its configs are {known}, or name a file")
    return item.path


def command(words: Sequence[str]) -> list[str]:
    """Returns the arguments of python that start a recipe, with the files of the recipe and its config.

    words: RECIPE, RECIPE/CONFIG or a file, followed by the arguments of the recipe, and preceded by --nproc N for N
    processes. Where GRR_IMPORT lists modules, they are imported first (`grr --import`). Raises ValueError if a recipe,
    config or file does not exist, or if N is not a number from 1 on.
    """
    launcher: list[str] = []
    if words[:1] == ["--nproc"] and len(words) > 2:
        if not words[1].isdecimal() or int(words[1]) < 1:
            raise ValueError(f"--nproc must be at least 1, got {words[1]}")
        launcher, words = ["-m", "grr.cli.launch", f"--nproc_per_node={words[1]}"], words[2:]
    if os.environ.get(IMPORTS):
        launcher += ["-m", "grr.cli.imports"]
    name, *rest = words
    is_file = name.endswith((".py", ".yaml", ".yml")) and Path(name).is_file()
    item = Item(name, Path(name)) if is_file else find(name)
    if item.is_recipe:
        return [*launcher, str(item.path), *_with_config(item, rest)]
    return [*launcher, str(recipe_of(item.path)), "--config", str(item.path), *rest]


def recipe_place(command: Sequence[str]) -> int:
    """Returns the index of the recipe in the arguments of python that start it."""
    return next(i for i, word in enumerate(command) if word.endswith(".py"))


def about(item: Item) -> str:
    """Returns the title of a recipe or config: the first line of its docstring, or of the file."""
    text = item.path.read_text(encoding="utf-8")
    head = ast.get_docstring(ast.parse(text)) if item.is_recipe else text.lstrip("# ")
    return (head or "").partition("\n")[0]


def copy(name: str, destination: Path) -> list[Path]:
    """Copy a recipe with its configs, or one config, into a folder with the layout of `recipes/`, or to one file.

    A destination with the suffix .py or .yaml is a file, others are folders. An existing file of equal content is kept.
    Returns the files. Raises ValueError, before it copies, if a file exists with other content, or if the suffix of the
    destination is not that of the source.
    """
    item = find(name)
    if destination.suffix in (".py", ".yaml"):
        if destination.suffix != item.path.suffix:
            raise ValueError(
                f"{name} is a {item.path.suffix} file, got {destination}; name a folder, or a file with that suffix"
            )
        sources = {destination: item.path}
    else:
        items = [item, *configs(name)] if item.is_recipe else [item]
        sources = {destination / item.place: item.path for item in items}
    changed = [str(to) for to, path in sources.items() if to.exists() and not _same(to, path)]
    if changed:
        raise ValueError(
            f"{', '.join(changed)}: exists with other content, and is not overwritten; name another DESTINATION, "
            f"as in `grr cp {name} mine`, or move the old file away"
        )
    for to, path in sources.items():
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(path.read_bytes())
    return list(sources)


def _with_config(recipe: Item, words: list[str]) -> list[str]:
    """Returns the words of a recipe's command line, in which --config NAME becomes the file of that config."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" in words[:-1]:
        place = words.index("--config") + 1
        return [*words[:place], str(config_file(words[place])), *words[place + 1 :]]
    known = [config.name for config in configs(recipe.path.stem)]
    if known and not {"-h", "--help"} & set(words):
        raise ValueError(
            f"{recipe.name} needs a config: grr run {recipe.name} --config FILE, or an installed one, "
            f"grr run {' or '.join(known)}"
        )
    return words


def _same(one: Path, other: Path) -> bool:
    return one.is_file() and one.read_bytes() == other.read_bytes()
