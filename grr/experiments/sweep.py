"""Plan of a sweep: a grid of variants and seeds, each through one or several stages, as command lines."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grr.experiments import catalog as installed

NAME = re.compile(r"\w+")  # no hyphen: a folder is <variant>-<seed>, and baseline-* must not match another variant
MODEL = "model"
EVALUATION = "evaluation.json"
PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass
class Job:
    """Run of a sweep: a command line, and the job that must finish before it."""

    stage: str
    variant: str
    seed: int
    folder: Path
    words: list[str]  # a recipe and its arguments, as after `grr run`
    after: "Job | None"

    result: str = MODEL  # file or folder that the recipe writes last

    @property
    def name(self) -> str:
        return f"{self.stage} {self.variant}-{self.seed}"

    @property
    def finished(self) -> bool:
        return (self.folder / self.result).exists()

    def command(self) -> list[str]:
        """Returns the arguments of python that start the run.

        Raises ValueError if the recipe is neither installed nor a file below the working directory, because a config
        must not start other programs.
        """
        command = installed.command(self.words)
        recipe = Path(command[installed.recipe_place(command)])
        below = recipe.resolve().is_relative_to(Path.cwd().resolve())
        if not below and recipe.absolute().parent != installed.RECIPES:
            raise ValueError(
                f"sweep: a stage must start an installed recipe, or one below {Path.cwd()}, got {recipe}; copy it there"
            )
        return command


def plan(
    folder: Path, stages: Sequence[str], variants: Sequence[str], seeds: Sequence[int], overrides: Sequence[str] = ()
) -> list[Job]:
    """Returns all runs in the order of start: every variant of the first seed, then of the next.

    stages: "name: recipe arguments", in which {stage} is the folder of the same variant and seed in an earlier stage.
    variants: "name: key=value ...", overrides of the first stage. overrides: "stage: key=value ...", for all its runs.
    Each run gets its folder, folder/stage/variant-seed, and its seed; a stage of the recipe evaluate gets neither, and
    writes into the folder of the stage that it follows, which trained the model. Raises ValueError with all faults.
    """
    faults: list[str] = []
    commands, changes = _entries("stages", stages, faults), _entries("variants", variants, faults)
    more = _entries("overrides", overrides, faults)
    faults += [
        f"overrides: {name} must be a stage, one of {', '.join(commands)}" for name in more if name not in commands
    ]
    faults += [f"seeds: {seed} occurs twice" for seed in sorted(set(seeds)) if seeds.count(seed) > 1]
    faults += [
        f"{what}: there must be at least one"
        for what, given in {"stages": stages, "variants": variants, "seeds": seeds}.items()
        if not given
    ]
    for i, (stage, words) in enumerate(commands.items()):
        earlier = list(commands)[:i]
        faults += [
            f"stages: {{{name}}} in {stage} must be an earlier stage, one of {', '.join(earlier) or 'none'}"
            for word in words
            for name in PLACEHOLDER.findall(word)
            if name not in earlier
        ]
        if not words:
            faults.append(f"stages: {stage} must have a recipe after the colon")
    if faults:
        raise ValueError("\n".join(["sweep:", *(f"  {fault}" for fault in faults)]))

    jobs = []
    for seed in seeds:
        for variant, change in changes.items():
            folders = {stage: folder / stage / f"{variant}-{seed}" for stage in commands}
            earlier_job = None
            for stage, words in commands.items():
                arguments = [*_filled(words, folders), *(change if earlier_job is None else []), *more.get(stage, [])]
                if earlier_job and _recipe(words) == "evaluate":
                    place, result = earlier_job.folder, EVALUATION
                    arguments += [f"model.path={place}", f"run.folder={place}"]
                else:
                    place, result = folders[stage], MODEL
                    arguments += [f"run.folder={place}", f"run.seed={seed}"]
                earlier_job = Job(stage, variant, seed, place, arguments, earlier_job, result)
                jobs.append(earlier_job)
    return jobs


def _recipe(words: list[str]) -> str:
    """Returns the name of the recipe of a stage: evaluate of evaluate/openmoji, evaluate and recipes/evaluate.py."""
    name = words[2] if words[0] == "--nproc" and len(words) > 2 else words[0]
    return Path(name).stem if name.endswith(".py") else name.partition("/")[0]


def _filled(words: list[str], folders: dict[str, Path]) -> list[str]:
    return [PLACEHOLDER.sub(lambda match: str(folders[match[1]]), word) for word in words]


def _entries(what: str, given: Sequence[str], faults: list[str]) -> dict[str, list[str]]:
    """Returns the words of each name, and adds faults to `faults`."""
    entries: dict[str, list[str]] = {}
    for entry in given:
        name, colon, text = entry.partition(":")
        if not colon or not NAME.fullmatch(name):
            faults.append(f'{what}: must be "name: words", the name of letters, digits and _, got {entry!r}')
        elif name in entries:
            faults.append(f"{what}: {name} occurs twice")
        else:
            try:
                entries[name] = shlex.split(text)
            except ValueError as error:
                faults.append(f"{what}: {name} cannot be split into words ({error}), got {text!r}")
    return entries
