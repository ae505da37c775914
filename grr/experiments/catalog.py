"""The recipes and configs that come with the package: found by name, told in a sentence, copied out of it."""

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
        """Where it lies among the others: pretrain.py, configs/pretrain/openmoji.yaml."""
        return self.path.relative_to(RECIPES)


def recipes() -> list[Item]:
    """All recipes, by name."""
    return [Item(path.stem, path) for path in sorted(RECIPES.glob("*.py"))]


def configs(recipe: str) -> list[Item]:
    """The configs of a recipe, by name."""
    return [Item(f"{recipe}/{path.stem}", path) for path in sorted((RECIPES / "configs" / recipe).glob("*.yaml"))]


def find(name: str) -> Item:
    """The recipe or config of a name. Raises ValueError if there is none."""
    every = [item for recipe in recipes() for item in (recipe, *configs(recipe.name))]
    for item in every:
        if item.name == name:
            return item
    names = [item.name for item in every]
    near = [known for known in names if known.endswith(f"/{name}")] or difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"there is no recipe or config {name!r}{hint} (grr ls lists them)")


def recipe_of(file: Path, recipe: str | None = None) -> Path:
    """The recipe that a config is for: the one named, or that of the folder configs/<recipe>/ that holds the config.

    Of a config below the current folder's recipes/, where `grr cp` copies to, it is recipes/<recipe>.py, which may be a
    changed copy; of other configs the installed recipe, because a config that someone sent must not bring a program
    with it. Raises ValueError if there is neither.
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
            f"{file} lies in no folder configs/<recipe>/, so its recipe must be named: grr run RECIPE "
            f"--config {file}, or grr check --recipe RECIPE {file}, for one of {', '.join(names)}, or a "
            "file"
        )
    return find(folder.name).path


def left_out(file: Path, recipe: Path) -> Path | None:
    """A file beside a config's configs/ that is named as its recipe, where it is another than the recipe to start."""
    beside = file.absolute().parent.parent.parent / f"{recipe.stem}.py"
    ours = beside.is_file() and beside.resolve() != recipe.resolve()
    return beside if ours and file.absolute().parent.parent.name == "configs" else None


def is_own(recipe: Path) -> bool:
    """Whether a recipe is installed, or lies in the current folder's recipes/, where `grr cp` copies to."""
    return recipe.absolute().parent in (RECIPES.absolute(), RECIPES.resolve(), Path("recipes").absolute())


def config_file(name: str) -> Path:
    """A config's file, one's own or the installed one of that name. Raises ValueError if there is neither."""
    if Path(name).is_file():
        return Path(name)
    if name.endswith((".yaml", ".yml")):
        raise ValueError(f"there is no file {name} (grr cp copies a config to begin with, grr ls lists them)")
    item = find(name)
    if item.is_recipe:
        known = ", ".join(config.name for config in configs(name)) or "none is installed"
        raise ValueError(f"{name} is a recipe, a config is wanted: {known}, or a file of your own")
    return item.path


def command(words: Sequence[str]) -> list[str]:
    """The arguments of python that start a recipe: its file, and of a config's name the file.

    words: RECIPE, RECIPE/CONFIG or a file of one's own, with the recipe's arguments behind it, and --nproc N before it
    for N processes. Where GRR_IMPORT lists modules, they are imported first (`grr --import`). Raises ValueError if
    something of the words is not there.
    """
    launcher: list[str] = []
    if words[:1] == ["--nproc"] and len(words) > 2:
        launcher, words = ["-m", "grr.cli.launch", f"--nproc_per_node={words[1]}"], words[2:]
    if os.environ.get(IMPORTS):
        launcher += ["-m", "grr.cli.imports"]
    name, *rest = words
    own = name.endswith((".py", ".yaml", ".yml")) and Path(name).is_file()
    item = Item(name, Path(name)) if own else find(name)
    if item.is_recipe:
        return [*launcher, str(item.path), *_with_config(item, rest)]
    return [*launcher, str(recipe_of(item.path)), "--config", str(item.path), *rest]


def recipe_place(command: Sequence[str]) -> int:
    """Where the recipe stands in the arguments of python that start it."""
    return next(i for i, word in enumerate(command) if word.endswith(".py"))


def about(item: Item) -> str:
    """The title of a recipe or a config: the first line of the docstring, or of the file."""
    text = item.path.read_text(encoding="utf-8")
    said = ast.get_docstring(ast.parse(text)) if item.is_recipe else text.lstrip("# ")
    return (said or "").partition("\n")[0]


def copy(name: str, destination: Path) -> list[Path]:
    """Copy a recipe and its configs, or a config alone, into a folder, laid out as in `recipes/`; or one file to one.

    A destination that ends in .py or .yaml is a file, others are folders. What is there already and is the same stays.
    Gives the files. Raises ValueError, and copies nothing, if one of them is there with other content, or if a
    destination's ending is not that of the file.
    """
    item = find(name)
    if destination.suffix in (".py", ".yaml"):
        if destination.suffix != item.path.suffix:
            raise ValueError(f"{name} is a {item.path.suffix} file, got {destination}; name a folder, or such a file")
        sources = {destination: item.path}
    else:
        items = [item, *configs(name)] if item.is_recipe else [item]
        sources = {destination / item.place: item.path for item in items}
    changed = [str(to) for to, path in sources.items() if to.exists() and not _same(to, path)]
    if changed:
        raise ValueError(
            f"{', '.join(changed)}: there already, with other content, and nothing is overwritten; name another "
            f"DESTINATION, as in `grr cp {name} mine`, or move the old file away"
        )
    for to, path in sources.items():
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(path.read_bytes())
    return list(sources)


def _with_config(recipe: Item, words: list[str]) -> list[str]:
    """The words of a recipe's command line, --config NAME as the file of that name."""
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
