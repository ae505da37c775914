"""Captions of image files equal those of single images, and one output file holds those of one model."""

import pytest
import torch

from grr.data.images import load_image
from grr.generation.generate import generate
from grr.inference.captioning.files import caption_files, caption_images
from grr.inference.pretrained import load_pretrained
from grr.inference.results import read_results

COLOURS = ("red", "green", "blue", "yellow", "white", "black")


@pytest.mark.parametrize("generation", [None, {"num_beams": 2, "max_new_tokens": 3}])
def test_each_caption_equals_that_of_a_single_image(trained, files, generation):
    rows = [row for some in caption_images(trained, files, generation, batch_size=4) for row in some]
    for row in rows[:-1]:
        if "error" not in row:
            image = load_image(row["file"], size=trained.image_size, crop=trained.crop).unsqueeze(0)
            assert [row["caption"]] == generate(trained.model, image, trained.tokenizer, **generation or {})
    assert sorted(row["file"] for row in rows) == files
    assert [row["error"] for row in rows if "error" in row] == ["not a readable image: the file is empty"]


def test_the_captions_name_the_colours(trained, files):
    (rows,) = caption_images(trained, files)
    captions = {row["file"]: row.get("caption") for row in rows}
    for name, file in zip(sorted((*COLOURS, "empty")), files, strict=True):
        assert captions[file] == (f"a {name} picture" if name in COLOURS else None)


def test_other_options_or_weights_are_refused_for_the_same_file(trained, files, tmp_path, colour_run):
    output = tmp_path / "captions.jsonl"
    assert caption_files(trained, files, output).done == 6
    assert caption_files(trained, files, output).before == 6
    with pytest.raises(ValueError, match=r"other options \(generation.num_beams is not set there and 2 now\)"):
        caption_files(trained, files, output, {"num_beams": 2})
    other = load_pretrained(colour_run)
    with torch.no_grad():
        other.model.multimodal_decoder.head.weight[5] += 1
    with pytest.raises(ValueError, match=r'written with other options \(model is "\w+" there and "\w+" now\)'):
        caption_files(other, files, output)
    assert len(read_results(output)) == 7


def test_bfloat16_models_caption(files, colour_run):
    (rows,) = caption_images(load_pretrained(colour_run, dtype=torch.bfloat16), files)
    assert {"a red picture", "a blue picture"} <= {row.get("caption") for row in rows}


def test_an_option_out_of_range_is_refused(trained, files, tmp_path):
    with pytest.raises(ValueError, match="generate: num_beams must be at least 1"):
        caption_files(trained, files, tmp_path / "captions.jsonl", {"num_beams": 0})
