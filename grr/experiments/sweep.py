"""The runs of a grid of variants and seeds, each through one or several stages, as command lines."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grr.experiments import catalog as installed

NAME = re.compile(r"\w+")  # no hyphen: a folder is <variant>-<seed>, and baseline-* must not match another variant
PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass
class Job:
    """One run: a recipe's command line, and the job that must be finished before it."""

    stage: str
    variant: str
    seed: int
    folder: Path
    words: list[str]  # a recipe and its arguments, as behind `grr run`
    after: "Job | None"

    @property
    def name(self) -> str:
        return f"{self.stage} {self.variant}-{self.seed}"

    def command(self) -> list[str]:
        """The arguments of python that start the run.

        Raises ValueError if its recipe is not an installed one, by its name, or a file below the current folder: a
        config cannot start a program.
        """
        command = installed.command(self.words)
        recipe = Path(command[installed.recipe_place(command)])
        below = recipe.resolve().is_relative_to(Path.cwd().resolve())
        if not below and recipe.absolute().parent != installed.RECIPES:
            raise ValueError(f"sweep: a stage starts an installed recipe, or one below {Path.cwd()}, got {recipe}")
        return command


def plan(
    folder: Path, stages: Sequence[str], variants: Sequence[str], seeds: Sequence[int], overrides: Sequence[str] = ()
) -> list[Job]:
    """All runs, in the order they are worth having: every variant of the first seed, then of the next.

    stages: "name: recipe arguments", in which {stage} is the folder of the same variant and seed in an earlier one.
    variants: "name: key=value ...", overrides of the first stage. overrides: "stage: key=value ...", for all its runs.
    Each run is given its folder, folder/stage/variant-seed, and its seed. Raises ValueError naming all that is wrong.
    """
    faults: list[str] = []
    commands, changes = _entries("stages", stages, faults), _entries("variants", variants, faults)
    more = _entries("overrides", overrides, faults)
    faults += [f"overrides: there is no stage {name}" for name in more if name not in commands]
    faults += [f"seeds: {seed} stands there twice" for seed in sorted(set(seeds)) if seeds.count(seed) > 1]
    faults += [
        f"{what}: there must be at least one"
        for what, given in {"stages": stages, "variants": variants, "seeds": seeds}.items()
        if not given
    ]
    for i, (stage, words) in enumerate(commands.items()):
        earlier = list(commands)[:i]
        faults += [
            f"stages: {{{name}}} in {stage} must be a stage before it, one of {', '.join(earlier) or 'none'}"
            for word in words
            for name in PLACEHOLDER.findall(word)
            if name not in earlier
        ]
        if not words:
            faults.append(f"stages: {stage} has no command")
    if faults:
        raise ValueError("\n".join(["sweep:", *(f"  {fault}" for fault in faults)]))

    jobs = []
    for seed in seeds:
        for variant, change in changes.items():
            folders = {stage: folder / stage / f"{variant}-{seed}" for stage in commands}
            before = None
            for stage, words in commands.items():
                own = [
                    *_filled(words, folders),
                    *(change if before is None else []),
                    *more.get(stage, []),
                    f"run.folder={folders[stage]}",
                    f"run.seed={seed}",
                ]
                before = Job(stage, variant, seed, folders[stage], own, before)
                jobs.append(before)
    return jobs


def _filled(words: list[str], folders: dict[str, Path]) -> list[str]:
    return [PLACEHOLDER.sub(lambda match: str(folders[match[1]]), word) for word in words]


def _entries(what: str, given: Sequence[str], faults: list[str]) -> dict[str, list[str]]:
    """The words behind each name; adds what is wrong to faults."""
    entries: dict[str, list[str]] = {}
    for entry in given:
        name, colon, text = entry.partition(":")
        if not colon or not NAME.fullmatch(name):
            faults.append(f'{what}: must be "name: words", the name of letters, digits and _, got {entry!r}')
        elif name in entries:
            faults.append(f"{what}: {name} stands there twice")
        else:
            try:
                entries[name] = shlex.split(text)
            except ValueError as error:
                faults.append(f"{what}: {name} cannot be split into words ({error}), got {text!r}")
    return entries
