"""CLIP_benchmark's own code, run on a model of this library, gives the numbers of our evaluation."""

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageColor

from grr.evaluation.retrieval import retrieval
from grr.inference import clip_benchmark

NAMES = ("red", "green", "blue", "white")
NOISE = 100  # of 255 levels, so that the model is wrong at times


def test_the_loaded_functions_are_those_of_the_captioner(colour_run, trained):
    model, transform, tokenize = clip_benchmark.load_clip(str(colour_run))
    image = Image.new("RGB", (40, 30), "red")
    with torch.no_grad():
        images = model.encode_image(torch.stack([transform(image)]))
        texts = model.encode_text(tokenize(["a red picture", "blue"]))
    torch.testing.assert_close(images, trained.embed_images([image]))
    torch.testing.assert_close(texts, trained.embed_texts(["a red picture", "blue"]))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)
    with pytest.raises(ImportError, match="pip install clip-benchmark"):
        clip_benchmark.main()


def noisy_pictures(number: int) -> list[tuple[int, Image.Image]]:
    """Pictures of colours, some of them hardly recognisable, each with the number of its colour."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(number):
        label = i % len(NAMES)
        color = torch.tensor(ImageColor.getrgb(NAMES[label]))
        mixed = (color + torch.randint(-NOISE, NOISE + 1, (3,), generator=generator)).clamp(0, 255)
        rows.append((label, Image.new("RGB", (32, 32), tuple(mixed.tolist()))))
    return rows


def a_webdataset(folder: Path, rows: list[tuple[int, Image.Image]], text: str) -> None:
    """The layout that CLIP_benchmark reads: numbered tar files, and the names and templates of classes."""
    (folder / "test").mkdir(parents=True)
    (folder / "test/nshards.txt").write_text("1")
    (folder / "classnames.txt").write_text("\n".join(NAMES))
    (folder / "zeroshot_classification_templates.txt").write_text("a {c} picture")
    with tarfile.open(folder / "test/0.tar", "w") as tar:
        for i, (label, image) in enumerate(rows):
            png = io.BytesIO()
            image.save(png, "PNG")
            for suffix, content in (("png", png.getvalue()), (text, str(label).encode())):
                if suffix == "txt":
                    content = f"a {NAMES[label]} picture".encode()
                entry = tarfile.TarInfo(f"{i:04}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def judged(folder: Path, model: Path, task: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, float]:
    """Run CLIP_benchmark's command."""
    pytest.importorskip("clip_benchmark", reason="pip install clip-benchmark")
    output = folder / "result.json"
    words = ["eval", "--model_type", "grr", "--model", str(model), "--pretrained", "x", "--dataset", "wds/colours"]
    words += ["--dataset_root", str(folder), "--task", task, "--no_amp", "--num_workers", "0", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", *words, *more])
    clip_benchmark.main()
    return json.loads(output.read_text())["metrics"]


def test_its_command_computes_our_zero_shot_accuracy(colour_run, trained, tmp_path, monkeypatch):
    rows = noisy_pictures(40)
    a_webdataset(tmp_path, rows, "cls")
    found = judged(tmp_path, colour_run, "zeroshot_classification", monkeypatch)
    ours = trained.classify([image for _, image in rows], NAMES, templates=["a {} picture"])
    right = sum(next(iter(p)) == NAMES[label] for p, (label, _) in zip(ours, rows, strict=True))
    assert len(NAMES) < right < 40
    assert found["acc1"] == pytest.approx(right / 40)


def test_its_command_computes_our_recall(colour_run, trained, tmp_path, monkeypatch):
    rows = noisy_pictures(4)
    a_webdataset(tmp_path, rows, "txt")
    (tmp_path / "dataset_type.txt").write_text("retrieval")
    found = judged(tmp_path, colour_run, "zeroshot_retrieval", monkeypatch, "--recall_k", "1")
    images = trained.embed_images([image for _, image in rows])
    texts = trained.embed_texts([f"a {NAMES[label]} picture" for label, _ in rows])
    ours = retrieval(images, texts, torch.arange(4))
    assert found["image_retrieval_recall@1"] == pytest.approx(ours["text_to_image_r1"])
    assert found["text_retrieval_recall@1"] == pytest.approx(ours["image_to_text_r1"])
