"""grr models lists what is read by name; grr push uploads a run with its card, through the hub's own client."""

import io
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from local_hub import local_hub
from PIL import Image
from programs import run as program
from safetensors.torch import load

from grr.checkpoint.training_state import save_checkpoint
from grr.cli import main
from grr.inference.pretrained import load_pretrained
from grr.inference.zoo import FILE, zoo
from grr.models.builders import create_model
from grr.reports.card import curves

ROOT = Path(__file__).resolve().parents[3]
SECRET = "/home/anne/secret"


def test_models_lists_the_published_models_with_context_parameters_and_licence(capsys):
    assert main(["models"]) == 0
    *lines, note = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 4 + 21
    assert sum(line.startswith("hf-hub:laion/") for line in lines) == 4
    row = next(
        line for line in lines if line.startswith("hf-hub:apple/mobileclip2_coca_dfn2b_s13b_docci_s12m_context256")
    )
    assert row.split()[1:] == ["256", "638.6", "M", "apple-amlr"]
    assert note.endswith("the published weights themselves have not been tested.")


def test_the_parameters_of_the_list_are_those_of_the_models():
    """open_clip's have neither a bias of the patches, which normalisation needs here, nor one of similarities."""
    built = {(model.builder, model.context_length) for model in zoo().values()}
    for builder, context_length in built:
        with torch.device("meta"):
            model = create_model(builder, context_length=context_length)
        own = sum(p.numel() for p in model.parameters())
        width = model.vision_encoder.patches.projection.bias.numel()
        listed = {m.parameters for m in zoo().values() if (m.builder, m.context_length) == (builder, context_length)}
        assert listed == {own - width - 1}
    assert set(json.loads(FILE.read_text())["sources"]) > {"laion: license", "apple: license"}


@pytest.fixture
def trained_run(colour_run, tmp_path) -> Path:
    """A run's folder with the files that its training would have left: log, manifest, config and evaluation."""
    folder = tmp_path / "colours"
    folder.mkdir()
    for name in ("model", "tokenizer.model"):
        os.symlink(colour_run / name, folder / name)
    config = {
        "run": {"seed": 7},
        "model": {"path": "hf-hub:apple/mobileclip2_coca_dfn2b_s13b_context77"},
        "data": {"name": "folder", "path": f"{SECRET}/photos"},
        "validation": {"name": "folder", "split": "validation"},
        "optimizer": {"lr": 0.002},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    start = {"batch_size": 32, "world_size": 1, "training_pairs": 6000, "validation_pairs": 500, "data": "441a7f85"}
    start |= {"host": "annes-laptop", "command": [f"{SECRET}/pretrain.py"], "versions": {"grr": "0.2.0"}}
    (folder / "manifest.json").write_text(json.dumps({"starts": [start]}))
    log = [{"split": "train", "step": s, "loss": 5 - s / 10} for s in range(1, 21)]
    log += [{"split": "validation", "step": s, "loss": 4 - s / 10, "image_to_text_r1": s / 40} for s in (10, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (folder / "evaluation.json").write_text(json.dumps({"results": {"captions": {"cider": 1.234}}}))
    return folder


def test_curves_are_a_picture_of_both_plots(trained_run):
    picture = Image.open(io.BytesIO(curves(trained_run)))
    assert (picture.format, picture.size) == ("PNG", (1280, 320))
    colours = {colour for _, colour in picture.getcolors(2**16)}
    assert {(0x1F, 0x6F, 0xEB), (0x9A, 0xA4, 0xAF)} <= colours  # validation, and training
    (trained_run / "metrics.jsonl").write_text("")
    assert curves(trained_run) is None


def test_push_uploads_a_run_with_its_card_and_its_name_loads_it(trained_run, colour_run, tmp_path):
    pytest.importorskip("huggingface_hub", reason='pip install "grr-coca[hub]"')
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    with local_hub() as hub:
        variables = {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), **hub.environment}
        words = ["-m", "grr.cli", "push", str(trained_run), "me/colours", "--license", "cc-by-4.0"]
        done = program(words, cwd=ROOT, **variables)
        assert done.returncode == 0, done.stderr[-3000:]
        commit, files = hub.at("me/colours", "main")
        assert done.stdout == f"{hub.url}/me/colours/commit/{commit}\nnext: grr caption hf-hub:me/colours photos\n"
        assert set(files) == {
            *(".gitattributes", "README.md", "config.json", "curves.png", "model.safetensors", "tokenizer.model")
        }
        weights = (colour_run / "model/model.safetensors").read_bytes()
        assert files["model.safetensors"] == weights
        assert weights in hub.large.values()  # sent by Git LFS's batch API, the small files in the commit

        card = files["README.md"].decode()
        head = yaml.safe_load(card.split("---")[1])
        assert (head["license"], head["library_name"]) == ("cc-by-4.0", "grr")
        assert head["base_model"] == "apple/mobileclip2_coca_dfn2b_s13b_context77"
        for line in (
            'captioner = grr.load("hf-hub:me/colours")',
            "![Loss, and retrieval on the validation images](curves.png)",
            "Of the validation at step 20, and of an evaluation.",
            "`cc-by-4.0`. It was fine-tuned from hf-hub:apple/mobileclip2_coca_dfn2b_s13b_context77, whose licence",
        ):
            assert line in card
        table = {
            cells[0]: cells[1:]
            for line in card.splitlines()
            if len(cells := [c.strip() for c in line.split("|")[1:-1]])
        }
        assert table["path"] == ["photos", ""]
        assert table["pairs"] == ["6,000", "500"]
        assert table["batch_size"] == ["32"]
        assert table["optimizer.lr"] == ["0.002"]
        assert table["CoCa loss"] == ["2"]
        assert table["evaluation: CIDEr-D"] == ["1.234"]
        assert table["image_size"] == ["32"]
        assert SECRET not in card  # neither paths nor the name of the machine are published
        assert "annes-laptop" not in card

        done = program(
            ["-m", "grr.cli", "caption", "hf-hub:me/colours", str(tmp_path / "red.png")], cwd=ROOT, **variables
        )
        assert done.stdout == f"{tmp_path / 'red.png'}: a red picture\n", done.stderr[-2000:]
        again = program(words, cwd=ROOT, **variables)
        assert again.returncode == 0, again.stderr[-2000:]
        assert sum(path.startswith("PUT") for path in hub.requests) == len(hub.large)  # nothing was sent twice
        error = program([*words[:4], "me", *words[5:]], cwd=ROOT, **variables)
        assert (error.returncode, "must be hf-hub:owner/name" in error.stderr) == (1, True)
    done = program(words, cwd=ROOT, **variables)  # the server is gone
    assert done.returncode == 1
    assert "push: hf-hub:me/colours must be a repository that you may write to, got " in done.stderr


def test_a_checkpoint_is_pushed_as_safetensors(colour_run, tmp_path):
    """What a run saved for training is published as a model, and so is one opened by Python."""
    pytest.importorskip("huggingface_hub", reason='pip install "grr-coca[hub]"')
    script = tmp_path / "push.py"
    script.write_text(
        "import sys, grr, torch\n"
        "captioner = grr.load(sys.argv[1])\n"
        "print(captioner.push_to_hub('me/python', private=True))\n"
        "again = grr.load('hf-hub:me/python')\n"
        "images = torch.arange(2 * 3 * 40 * 40).reshape(2, 3, 40, 40).to(torch.uint8)\n"
        "assert torch.equal(captioner.embed_images(images), again.embed_images(images))\n"
        "assert torch.equal(captioner.embed_texts(['a red picture']), again.embed_texts(['a red picture']))\n"
        "assert (again.crop, again.image_size) == (captioner.crop, captioner.image_size)\n"
    )
    with local_hub() as hub:
        variables = {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), **hub.environment}
        done = program([str(script), str(colour_run)], cwd=ROOT, **variables)
        assert done.returncode == 0, done.stderr[-3000:]
        files = hub.at("me/python", "main")[1]
        assert {"config.json", "model.safetensors", "tokenizer.model", "README.md"} < set(files)

        model, tokenizer, *_ = load_pretrained(colour_run)
        (tmp_path / "run").mkdir()
        tokenizer.save(tmp_path / "run/tokenizer.model")
        progress = {"step": 3, "model": json.loads((colour_run / "model/config.json").read_text())}
        save_checkpoint(tmp_path / "run/checkpoints", model, torch.optim.AdamW(model.parameters()), progress)
        done = program(["-m", "grr.cli", "push", str(tmp_path / "run"), "me/step"], cwd=ROOT, **variables)
        assert done.returncode == 0, done.stderr[-3000:]
        pushed = hub.at("me/step", "main")[1]
        assert set(pushed) == {".gitattributes", "README.md", "config.json", "model.safetensors", "tokenizer.model"}
        state = model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in load(pushed["model.safetensors"]).items())
        assert "Not stated by its author" in pushed["README.md"].decode()


def test_saved_models_are_the_same_models(colour_run, tmp_path):
    captioner = load_pretrained(colour_run)
    captioner.save_pretrained(tmp_path / "saved")
    captioner.save_pretrained(tmp_path / "saved")  # replaces it
    assert {file.name for file in (tmp_path / "saved").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.model",
    }
    again = load_pretrained(tmp_path / "saved")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(again.embed_images(images), captioner.embed_images(images))
    assert again.tokenizer.fingerprint == captioner.tokenizer.fingerprint
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    with pytest.raises(ValueError, match=r"must be new, empty or a model's, got .*mine, which holds other files"):
        captioner.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine/thesis.tex").is_file()
    for wrong in (None, "", 3):
        with pytest.raises(
            ValueError, match=f"save_pretrained: folder must be a path, got {wrong!r}; name a new folder"
        ):
            captioner.save_pretrained(wrong)
    captioner.model.built_by = None
    with pytest.raises(ValueError, match=r"must be of grr.load or grr.create_model, which know how to build it"):
        captioner.save_pretrained(tmp_path / "other")


@pytest.mark.parametrize(("files", "name"), [({"model.bin": b""}, "a/b"), ({}, "a/b@v1"), ({}, "b")])
def test_push_refuses_pickles_and_other_names(files, name):
    from grr.inference.hub import push

    with pytest.raises(ValueError, match=r"^push: "):
        push(files, name)
