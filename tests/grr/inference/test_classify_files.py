"""Probabilities of classes are softmax(cosine / temperature) over all names, the most probable first."""

import math
import re

import pytest
import torch

from grr.data.images import load_image
from grr.evaluation.zero_shot import class_embeddings
from grr.inference.classify import classify_files, classify_images, read_classes, split_classes

COLOURS = ("red", "green", "blue", "yellow", "white", "black")
TEMPLATES = ("a {} picture",)


def test_probabilities_are_the_formula_in_float64(trained, files):
    model, tokenizer, size, crop = trained
    names = class_embeddings(model, tokenizer, COLOURS, torch.device("cpu"), templates=TEMPLATES).double()
    (rows,) = classify_images(trained, files, COLOURS, templates=TEMPLATES, top=3)
    for row in rows[:-1]:
        with torch.no_grad():
            image = model.encode_image(load_image(row["file"], size=size, crop=crop).unsqueeze(0))[0].double()
        weights = {name: math.exp(float(image @ n) / 0.07) for name, n in zip(COLOURS, names, strict=True)}
        expected = sorted(weights, key=lambda name: -weights[name])[:3]
        assert row["classes"] == expected
        total = sum(weights.values())
        assert row["probabilities"] == pytest.approx([weights[name] / total for name in expected], rel=1e-3)
    assert rows[-1]["error"] == "not a readable image: the file is empty"


def test_colours_are_classified_by_their_names(trained, files):
    (rows,) = classify_images(trained, files, COLOURS, templates=TEMPLATES, top=9)
    assert [row["classes"][0] for row in rows[:-1]] == sorted(COLOURS)
    assert all(len(row["classes"]) == 6 and sum(row["probabilities"]) == pytest.approx(1) for row in rows[:-1])


def test_classes_of_equal_probability_keep_their_order(trained, files):
    same = ["red ", " red", "red"]  # the tokenizer encodes all alike
    (rows,) = classify_images(trained, files, same, templates=TEMPLATES)
    assert all(row["classes"] == same for row in rows[:-1])


def test_other_classes_are_refused_for_the_same_file(trained, files, tmp_path):
    output = tmp_path / "classes.jsonl"
    assert classify_files(trained, files, COLOURS, output).done == 6
    assert classify_files(trained, files, COLOURS, output).before == 6
    with pytest.raises(ValueError, match=r"written with other options \(classes\.3 is .* there and not set now"):
        classify_files(trained, files, COLOURS[:3], output)


def test_a_repeated_class_and_top_0_are_refused(trained, files):
    with pytest.raises(ValueError, match="class_embeddings: each class must have a unique name, got 'red'"):
        next(classify_images(trained, files, ["red", "red"]))
    with pytest.raises(ValueError, match="classify_images: top must be at least 1, got top=0"):
        next(classify_images(trained, files, COLOURS, top=0))


def test_classes_are_read_from_a_text_file(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_bytes("\ufeffcrane, a bird\r\n\n  crane,  a machine \nübung".encode())
    assert read_classes(file) == ["crane, a bird", "crane, a machine", "übung"]
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_classes(file)
    with pytest.raises(FileNotFoundError, match=r"read_classes: the file of classes .* does not exist"):
        read_classes(tmp_path / "nowhere.txt")


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("fox, owl,key", ["fox", "owl", "key"]),
        ('"crane, a bird", "crane, a machine"', ["crane, a bird", "crane, a machine"]),
        ('"crane, a bird",fox,', ["crane, a bird", "fox"]),
        (" red  fox ,", ["red fox"]),
        ("", []),
    ],
)
def test_typed_names_are_separated_by_commas_outside_quotes(typed, names):
    assert split_classes(typed) == names


def test_the_remedy_for_a_repeated_name_can_be_typed(trained, files):
    with pytest.raises(ValueError, match="'crane' more than once") as error:
        next(classify_images(trained, files, split_classes("crane, a bird,crane, a machine")))
    (advised,) = re.findall(r'as in (".*"), with the quotes, or in a file', str(error.value))
    assert split_classes(advised) == ["crane, a bird", "crane, a machine"]
    with pytest.raises(ValueError, match="split_classes: a double quote must be closed after its name"):
        split_classes('"crane, a bird')
