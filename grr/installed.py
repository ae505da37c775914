"""The recipes and configs that come with the package: found by name, told in a sentence, copied out of it."""

import ast
import difflib
import re
from pathlib import Path
from typing import NamedTuple

RECIPES = Path(__file__).parent / "recipes"
COMMAND = re.compile(r"#\s+(python|torchrun|grr)\s")  # in a config's header


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

    A recipe's file beside that folder, which may be a changed copy, goes before the installed one. Raises ValueError if
    there is neither.
    """
    if recipe is not None:
        return Path(recipe) if recipe.endswith(".py") else find(recipe).path
    folder = file.absolute().parent
    beside = folder.parent.parent / f"{folder.name}.py"
    if folder.parent.name == "configs" and beside.is_file():
        return beside
    names = [item.name for item in recipes()]
    if folder.name not in names:
        raise ValueError(f"{file} lies in no folder configs/<recipe>/, so its recipe must be named: grr run RECIPE "
                         f"--config {file}, or grr check --recipe RECIPE {file}, for one of {', '.join(names)}, or a "
                         "file")  # fmt: skip
    return find(folder.name).path


def about(item: Item) -> str:
    """What a recipe or a config says of itself, its first sentence: of a config, behind the command that starts it."""
    text = item.path.read_text(encoding="utf-8")
    if item.is_recipe:
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    said, in_command = [], False
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        in_command = in_command or COMMAND.match(line) is not None
        if not in_command:
            said.append(line.lstrip("# "))
        in_command = in_command and line.endswith("\\")
    return re.split(r"(?<=[.?!])(?<!et al\.)\s", " ".join(said), maxsplit=1)[0]


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


def _same(one: Path, other: Path) -> bool:
    return one.is_file() and one.read_bytes() == other.read_bytes()
