"""The commands that use a trained model: what they print and the files that they write."""

import re
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from grr.cli import main
from grr.inference.index import open_index
from grr.inference.results import read_results

COLOURS = ("red", "green", "blue", "yellow", "white", "black")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, with four images of each colour and an unreadable one."""
    (tmp_path / "mine").mkdir()
    for name in COLOURS:
        for i in range(4):
            Image.new("RGB", (9 + i, 9), name).save(tmp_path / f"mine/{name} {i}.png")
    (tmp_path / "mine/torn.png").write_bytes(b"\x89PNG")
    (tmp_path / "colours.txt").write_text("\n".join(COLOURS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("classes", ["colours.txt", ", ".join(COLOURS)], ids=["file", "names"])
def test_classify_prints_the_class_of_each_image(here, colour_run, capsys, classes):
    images = [f"mine/{colour} 0.png" for colour in COLOURS]
    words = [str(colour_run), *images, "mine/torn.png", "--classes", classes, "--template", "a {} picture"]
    assert main(["classify", *words, "--top", "2"]) == 0
    printed = capsys.readouterr()
    assert "mine/torn.png could not be read: not a readable image" in printed.err
    for line, image, colour in zip(printed.out.splitlines(), images, COLOURS, strict=True):
        assert re.fullmatch(rf"{image}: {colour} [\d.]+%, \w+ [\d.]+%", line)


@pytest.mark.parametrize("command", ["caption", "classify", "embed"])
def test_the_help_states_the_exit_status_of_unreadable_files(command, here, colour_run, capsys):
    more = {"caption": [], "classify": ["--classes", "red,blue"], "embed": ["--index", "index"]}[command]
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "The exit status is 0 if at least one file could be read, else 1." in capsys.readouterr().out
    assert main([command, str(colour_run), "mine/torn.png", *more]) == 1
    assert main([command, str(colour_run), "mine/torn.png", "mine/red 0.png", *more]) == 0


def test_caption_prints_the_captions_of_images_and_of_tar_shards(here, colour_run, capsys):
    with tarfile.open("00000.tar", "w") as tar:
        for name in ("red 0.png", "torn.png", "blue 1.png"):
            tar.add(f"mine/{name}", name)
    assert main(["caption", str(colour_run), "00000.tar", "mine/green 0.png"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "mine/green 0.png: a green picture",
        "00000.tar/red 0.png: a red picture",
        "00000.tar/blue 1.png: a blue picture",
    ]
    assert "00000.tar/torn.png could not be read: not a readable image" in printed.err


def test_classify_writes_rows_and_a_page_and_continues(here, colour_run, capsys):
    words = ["--classes", "colours.txt", "--template", "a {} picture", "--top", "2", "--output", "classes"]
    assert main(["classify", str(colour_run), "mine/*0.png", "mine/torn.png", *words]) == 0
    rows = read_results(Path("classes/classes.jsonl"))
    assert {Path(row["file"]).stem: row["classes"][0] for row in rows if "classes" in row} == {
        f"{colour} 0": colour for colour in COLOURS
    }
    assert all(len(row["classes"]) == len(row["probabilities"]) == 2 for row in rows if "classes" in row)
    assert "6 images classified; 1 could not be read:\n  mine/torn.png: not a readable" in capsys.readouterr().out
    assert Path("classes/classes.html").read_text().count("<img src=") == 6
    assert main(["classify", str(colour_run), "mine", *words]) == 0
    assert "24 images classified, 6 of them before; 1 could not be read" in capsys.readouterr().out
    assert main(["classify", str(colour_run), "mine", *words[:-4], "--top", "3", *words[-2:]]) == 1
    assert "top is 2 there and 3 now" in capsys.readouterr().err


def test_the_template_decides_what_the_text_encoder_reads(here, colour_run, capsys):
    def likelihoods(*words: str) -> str:
        assert main(["classify", str(colour_run), "mine/red 0.png", "--classes", "colours.txt", *words]) == 0
        return capsys.readouterr().out

    assert likelihoods("--template", "a {} picture") != likelihoods() == likelihoods("--batch-size", "1")
    assert main(["classify", str(colour_run), "mine", "--classes", "colours.txt", "--template", "a picture"]) == 1
    assert "'a picture'" in capsys.readouterr().err


def test_bf16_computes_in_bfloat16(here, colour_run, capsys):
    for name, words in {"exact": [], "rounded": ["--bf16"]}.items():
        assert main(["embed", str(colour_run), "mine/*0.png", "--index", name, *words]) == 0
    exact, rounded = (torch.from_numpy(open_index(name).parts[0]) for name in ("exact", "rounded"))
    assert (exact - rounded).abs().max() > 1e-6
    torch.testing.assert_close(rounded, exact, atol=0.03, rtol=0)


def test_texts_and_an_image_find_their_colours_by_the_model_that_made_the_index(here, colour_run, capsys):
    assert main(["embed", str(colour_run), "mine", "--batch-size", "5"]) == 0
    printed = capsys.readouterr().out
    assert "24 images in index; 1 could not be read:\n" in printed
    assert "mine/torn.png: not a readable image" in printed
    assert main(["embed", str(colour_run), "mine"]) == 0
    assert "24 images in index, 24 of them before; 1 could not be read:\n" in capsys.readouterr().out

    Image.new("RGB", (50, 50), "black").save("asked.jpg")
    queries = {"a green picture": "green", "a white picture": "white", "asked.jpg": "black"}
    assert main(["search", "index", *queries, "--top", "4", "--page", "hits.html"]) == 0
    *blocks, last = capsys.readouterr().out.split("\n\n")
    for block, (query, colour) in zip(blocks, queries.items(), strict=True):
        lines = block.splitlines()
        assert lines[0] == query
        assert [line.split("  ")[-1] for line in lines[1:5]] == [f"mine/{colour} {i}.png" for i in range(4)]
    assert last == "see hits.html\n"
    page = Path("hits.html").read_text()
    assert page.count("<img src=") == 3 * 4 + 1
    assert "among 24 images" in page


def test_an_index_of_another_model_is_refused_with_a_remedy(here, colour_run, capsys):
    main(["embed", str(colour_run), "mine"])
    shutil.copytree(colour_run, "other")
    weights = load_file("other/model/model.safetensors")
    weights["contrastive_pooler.queries"] += torch.ones(1)
    save_file(weights, "other/model/model.safetensors")
    for words in (["search", "index", "x", "--model", "other"], ["embed", "other", "mine"]):
        assert main(words) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert re.search(r"index must hold embeddings of this model.*; use that model, or embed the images", error)
    assert len(open_index("index")) == 24


def test_a_query_that_cannot_be_read_is_named_and_a_failure(here, colour_run, capsys):
    main(["embed", str(colour_run), "mine/*0.png"])
    assert main(["search", "index", "mine/torn.png"]) == 1
    assert "mine/torn.png could not be read: not a readable image" in capsys.readouterr().err
