"""Kill a recipe at its file operations, again and again, and compare what it leaves with an undisturbed run.

    python tests/reliability/kill_loop.py pretrain finetune finetune_classifier caption embed --kills 20
    python tests/reliability/kill_loop.py pretrain --kills 10 --processes 2

Each kill is a SIGKILL that a process sends to itself just before its N-th operation on a file below its folder (open
for writing, rename, remove, mkdir, ...), with N drawn from a seed. The same command is then submitted again. A
training run must end with the log lines and the weights of the undisturbed run, bit for bit; captions and an index with
the same content. Prints a line for each recipe, and exits with the number of recipes that lost something.
"""

import argparse
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from grr.cli import main as grr_main

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree", "os.link")
MODEL = [
    "model.image_size=32",
    "model.dim=32",
    "model.num_heads=2",
    "model.vision_layers=1",
    "model.text_layers=1",
    "model.multimodal_layers=1",
    "model.dropout=0.1",
]
SCENES = ["data.scenes=80", "data.held_out=20", "validation.scenes=80", "validation.held_out=20"]
RUN = ["run.batch_size=16", "run.micro_batch_size=4", "run.log_every=1", "saving.every=2", "saving.keep=1"]
OPERATIONS = {"pretrain": 60, "finetune": 60, "finetune_classifier": 60, "caption": 10, "embed": 16}  # about, in a run
TIMES = ("samples_per_second", "data_wait", "time")  # values that no two runs share


def kill_before_operation(number: int, folder: str) -> None:
    """Let this process kill itself just before its N-th operation on a file below folder."""
    seen = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        written = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if not (written or event in WRITES) or not isinstance(arguments[0], str | os.PathLike):
            return
        if os.path.abspath(os.fspath(arguments[0])).startswith(folder):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


FINETUNE = """
model: {path: null}
data: {name: openmoji, split: train}
validation: {name: openmoji, split: validation}
schedule: {min_lr: 1e-7}
"""
CLASSIFIER = """
model: {name: pretrained, path: null}
head: {name: image_classifier}
data: {name: openmoji_classes, split: train, pictures: 1}
validation: {name: openmoji_classes, split: validation, pictures: 1}
"""


def commands(folder: Path, pretrained: Path, photos: Path) -> dict[str, list[str]]:
    """The command line of each recipe, and of `grr embed`; they write below folder only."""
    config, configs = RECIPES / "configs", photos.parent
    return {
        "pretrain": [
            "pretrain.py",
            "--config",
            f"{config}/pretrain/openmoji.yaml",
            *MODEL,
            *SCENES,
            *RUN,
            "tokenizer.vocab_size=128",
            "run.epochs=3",
            "run.validate_every=5",
            f"run.folder={folder}",
        ],
        "finetune": [
            "finetune.py",
            "--config",
            f"{configs}/finetune.yaml",
            *RUN,
            *SCENES,
            "run.epochs=3",
            f"model.path={pretrained}",
            f"run.folder={folder}",
        ],
        "finetune_classifier": [
            "finetune_classifier.py",
            "--config",
            f"{configs}/classifier.yaml",
            *RUN,
            "run.max_steps=12",
            "run.validate_every=5",
            f"model.path={pretrained}",
            f"run.folder={folder}",
        ],
        "caption": [
            "caption.py",
            "--config",
            f"{config}/caption/default.yaml",
            f"model.path={pretrained}",
            f"run.images={photos}",
            f"run.folder={folder}",
            "run.batch_size=2",
        ],
        "embed": [
            "embed",
            f"{pretrained}",
            f"{photos}",
            "--index",
            f"{folder}",
            "--batch-size",
            "2",
        ],
    }


def submit(words: list[str], folder: Path, *, kill_at: int = 0, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run a recipe, or a command of grr, to its end or to its N-th file operation."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, __file__, "--as-recipe", str(kill_at), str(folder), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def left_behind(folder: Path) -> dict[str, Any]:
    """What must be equal between two runs: lines without their times, and the bytes of weights and embeddings."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.suffix == ".jsonl":
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = [{key: x for key, x in line.items() if key not in TIMES} for line in lines]
        elif file.suffix in (".safetensors", ".npy", ".npz") and not name.startswith(("checkpoints", "best")):
            found[name] = file.read_bytes()
        elif file.name.endswith((".tmp", ".old")):
            found[name] = "left over"
    return found


def loop(recipe: str, *, kills: int, processes: int, seed: int, work: Path, pretrained: Path, photos: Path) -> bool:
    """Kill a recipe some times, let it finish, and say whether nothing was lost."""
    whole, folder = work / f"{recipe}_whole", work / f"{recipe}_killed"
    rng = random.Random(f"{recipe} {seed} {processes}")
    done = submit(commands(whole, pretrained, photos)[recipe], whole, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    words, killed, rounds = commands(folder, pretrained, photos)[recipe], 0, 0
    lost = []
    while killed < kills:
        done = submit(words, folder, kill_at=rng.randint(1, OPERATIONS[recipe]), processes=processes)
        if done.returncode not in (0, -signal.SIGKILL) and processes == 1:
            lost.append(f"exit status {done.returncode}: {done.stderr.splitlines()[-1:]}")
            break
        killed += done.returncode != 0
        if done.returncode == 0:  # it came to its end before that operation
            rounds += 1
            if left_behind(folder) != left_behind(whole):
                lost.append("a finished run differs")
                break
            shutil.rmtree(folder)
    done = submit(words, folder, processes=processes)
    if done.returncode != 0:
        lost.append(f"the last submission failed: {done.stderr.splitlines()[-1:]}")
    ours, theirs = left_behind(folder), left_behind(whole)
    lost += [f"{name} differs" for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    print(
        f"{recipe}, {processes} process(es): {killed} kills in {rounds + 1} runs, "
        f"{'; '.join(lost) if lost else 'nothing lost, ' + ', '.join(theirs)}",
        flush=True,
    )
    return not lost


def main() -> int:
    if sys.argv[1:2] == ["--as-recipe"]:
        number, folder, recipe, *arguments = sys.argv[2:]
        if int(number) and os.environ.get("RANK", "0") == str(int(number) % int(os.environ.get("WORLD_SIZE", "1"))):
            kill_before_operation(int(number), folder)
        if not recipe.endswith(".py"):
            return grr_main([recipe, *arguments])
        sys.argv = [str(RECIPES / recipe), *arguments]
        runpy.run_path(sys.argv[0], run_name="__main__")
        return 0
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "recipes", nargs="+", choices=["pretrain", "finetune", "finetune_classifier", "caption", "embed"]
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        pretrained, photos = work / "pretrained", work / "photos"
        done = submit([*commands(pretrained, pretrained, photos)["pretrain"], "run.max_steps=2"], pretrained)
        assert done.returncode == 0, done.stderr[-3000:]
        paint(photos)
        (work / "finetune.yaml").write_text(FINETUNE)
        (work / "classifier.yaml").write_text(CLASSIFIER)
        return sum(
            not loop(
                recipe,
                kills=options.kills,
                processes=options.processes,
                seed=options.seed,
                work=work,
                pretrained=pretrained / "model",
                photos=photos,
            )
            for recipe in options.recipes
        )


def paint(folder: Path) -> None:
    """A few pictures to caption and to embed."""
    from PIL import Image

    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (40, 30), (20 * i, 255 - 20 * i, 90)).save(folder / f"{i}.png")


if __name__ == "__main__":
    raise SystemExit(main())
