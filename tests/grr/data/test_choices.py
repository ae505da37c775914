"""Questions with right and wrong captions, read from the layouts in which they are distributed."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from grr.data.formats.choices import Choices, aro, sugarcrepe, winoground
from grr.data.formats.openmoji import openmoji
from grr.data.formats.openmoji_tasks import openmoji_choices
from grr.data.images import BadImage


def picture(file: Path, color: tuple[int, int, int] = (9, 9, 9), size: tuple[int, int] = (8, 8)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(file)


def rows(choices: Choices) -> list[tuple[int, str, str, bool, int]]:
    """Each pair: question, its kind, caption, whether it is right, and the image."""
    kinds = [choices.kinds[k] for k in choices.kind]
    columns = choices.questions.tolist(), kinds, choices.captions, choices.right.tolist(), choices.image_of.tolist()
    return list(zip(*columns, strict=True))


def a_sugarcrepe(folder: Path) -> dict[str, str]:
    """Its layout: a JSON object of numbered entries in a file for each kind, and COCO's images."""
    content = {
        "add_att": {"0": {"filename": "b.png", "caption": "a  cat", "negative_caption": "a blue cat"}},
        "swap_obj": {
            "0": {"filename": "a.png", "caption": "a dog on a bed", "negative_caption": "a bed on a dog"},
            "1": {"filename": "b.png", "caption": "a cat and a cup", "negative_caption": "a cup and a cat "},
        },
    }
    (folder / "data").mkdir()
    for name, entries in content.items():
        (folder / f"data/{name}.json").write_text(json.dumps(entries))
    for name in "ab":
        picture(folder / f"val2017/{name}.png")
    return {"path": str(folder / "data"), "images": str(folder / "val2017")}


def test_sugarcrepe_asks_for_each_entry_of_each_file(tmp_path):
    files = a_sugarcrepe(tmp_path)
    choices = sugarcrepe(**files)
    assert rows(choices) == [
        (0, "add_att", "a cat", True, 0),
        (0, "add_att", "a blue cat", False, 0),
        (1, "swap_obj", "a dog on a bed", True, 1),
        (1, "swap_obj", "a bed on a dog", False, 1),
        (2, "swap_obj", "a cat and a cup", True, 0),
        (2, "swap_obj", "a cup and a cat", False, 0),
    ]
    assert choices.load(5, size=4, crop="squash").shape == (3, 4, 4)
    one = sugarcrepe(**{**files, "path": str(tmp_path / "data/swap_obj.json")})
    assert rows(one) == [(q - 1, kind, text, right, 1 - j) for q, kind, text, right, j in rows(choices)[2:]]
    assert one.fingerprint != choices.fingerprint


def test_other_files_in_the_folder_of_sugarcrepe_are_named_and_not_read(tmp_path, caplog):
    files = a_sugarcrepe(tmp_path)
    expected = rows(sugarcrepe(**files))
    assert not caplog.records
    for name, text in (("results.json", '{"swap_obj": 0.7}'), ("package.json", "[")):
        (tmp_path / "data" / name).write_text(text)
    assert rows(sugarcrepe(**files)) == expected
    (said,) = caplog.messages
    assert said == f"sugarcrepe: files of other names in {files['path']} are not read: package.json, results.json"
    for name in ("add_att", "swap_obj"):
        (tmp_path / f"data/{name}.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"path must be the folder of add_att.json and others"):
        sugarcrepe(**files)


def test_aro_shows_the_box_of_an_image_and_encodes_each_box_once(tmp_path):
    image = Image.new("RGB", (20, 10), (200, 0, 0))
    image.paste((0, 0, 200), (10, 0, 20, 10))
    (tmp_path / "images").mkdir()
    image.save(tmp_path / "images/1.png")
    entry = {"image_path": "1.png", "true_caption": "the cat is left of the cup", "relation_name": "left of"}
    entry |= {"false_caption": "the cup is left of the cat", "bbox_x": 0, "bbox_y": 0, "bbox_w": 10, "bbox_h": 10}
    right = {**entry, "bbox_x": 10, "relation_name": "on"}
    whole = {key: value for key, value in entry.items() if key != "relation_name"} | {
        "bbox_w": 20,
        "attributes": ["red", "blue"],
    }
    file = tmp_path / "visual_genome_relation.json"
    file.write_text(json.dumps([entry, right, whole, entry]))
    choices = aro(path=str(file), images=str(tmp_path / "images"))
    assert choices.image_of.tolist() == [0, 0, 1, 1, 2, 2, 0, 0]
    assert choices.kinds == ["left of", "on", "red, blue"]
    assert choices.captions[0] == "the cat is left of the cup"
    means = [choices.load(i, size=6, crop="squash").float().mean((1, 2)).tolist() for i in (0, 2, 4)]
    assert means[:2] == [[200, 0, 0], [0, 0, 200]]
    assert means[2] == pytest.approx([100, 0, 100], abs=10)
    assert choices.thumbnail(4).shape == (3, 10, 20)
    beyond, nothing = {**entry, "bbox_x": 10, "bbox_w": 99}, {**entry, "bbox_x": 20}
    file.write_text(json.dumps([beyond, nothing]))
    choices = aro(path=str(file), images=str(tmp_path / "images"))
    assert choices.load(0, size=6, crop="squash").float().mean((1, 2)).tolist() == [0, 0, 200]
    with pytest.raises(BadImage, match="shows nothing of 20 x 10 pixels"):
        choices.load(2, size=6, crop="squash")


def test_winoground_compares_two_images_with_two_captions(tmp_path):
    entries = [
        {"id": 0, "image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "caption_0": "an old person kisses a young person",
         "caption_1": "a young person kisses an old person", "collapsed_tag": "Object"},
        {"id": 1, "image_0": "ex_1_img_0", "image_1": "ex_1_img_1", "caption_0": "fire on water",
         "caption_1": "water on fire", "collapsed_tag": "Relation"},
    ]  # fmt: skip
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    for i in (0, 1):
        for k in (0, 1):
            picture(tmp_path / f"images/ex_{i}_img_{k}.png")
    choices = winoground(path=str(tmp_path))
    assert [row[3] for row in rows(choices)] == [True, False, False, True] * 2
    assert choices.image_of.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [text for _, _, text, right, _ in rows(choices) if right] == [
        entry[f"caption_{k}"] for entry in entries for k in (0, 1)
    ]
    assert choices.kinds == ["Object", "Relation"]


def test_what_cannot_be_read_names_the_file_and_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"winoground: path must be the folder of examples.jsonl and images/"):
        winoground(path=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"sugarcrepe: path must be the folder of add_att.json and others"):
        sugarcrepe(path=str(tmp_path), images=str(tmp_path))
    files = a_sugarcrepe(tmp_path)
    with pytest.raises(FileNotFoundError, match="images must be the folder that these names are relative to"):
        sugarcrepe(**{**files, "images": str(tmp_path)})
    broken = tmp_path / "broken.json"
    for text, says in [
        ("{", "is not JSON"),
        ("3", "must hold an object or a list"),
        ('{"0": {"filename": "a.png", "caption": "x"}}', r"\[0\] must have negative_caption, a string"),
        ('["x"]', r"\[0\] must have filename, a string"),
    ]:
        broken.write_text(text)
        with pytest.raises(ValueError, match=rf"sugarcrepe: \S*broken.json .*{says}|broken.json {says}"):
            sugarcrepe(**{**files, "path": str(broken)})
    with pytest.raises(FileNotFoundError, match="aro: there is no file"):
        aro(path=str(tmp_path / "none.json"), images=str(tmp_path))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"relation_name": 5}, r"\[0\] must have relation_name, a string, got '5'"),
        ({"relation_name": ["a"]}, r"\[0\] must have relation_name, a string"),
        ({"attributes": None}, r"\[0\] must have attributes, a list, got 'None'"),
        ({"bbox_w": "9"}, r"\[0\] must have bbox_w, a whole number"),
    ],
)
def test_an_entry_of_aro_with_another_content_is_named(tmp_path, change, says):
    entry = {"image_path": "1.png", "true_caption": "a b", "false_caption": "b a", "relation_name": "on"}
    entry |= {f"bbox_{name}": 4 for name in "xywh"} | change
    file = tmp_path / "visual_genome_relation.json"
    file.write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match=rf"aro: \S+ {says}"):
        aro(path=str(file), images=str(tmp_path))


def test_an_example_of_winoground_has_two_images_and_two_captions(tmp_path):
    good = {"image_0": "a", "image_1": "b", "caption_0": "x y", "caption_1": "y x"}
    for bad in ({"image_1": "a"}, {"caption_1": "x y"}):
        (tmp_path / "examples.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | bad) + "\n")
        with pytest.raises(ValueError, match=r"line 2 must have two images and two captions, got one twice"):
            winoground(path=str(tmp_path))


def test_built_in_choices_exchange_the_objects_or_the_relation():
    choices = openmoji_choices(held_out=20)
    scenes = openmoji(split="validation", sentences="relation", held_out=20)
    for i, (first, _, second, _) in enumerate(scenes.scenes):
        right, objects, again, relation = (choices.captions[4 * i + k] for k in range(4))
        assert right == again == scenes.captions[i]
        assert sorted(objects.replace("an ", "a ").split()) == sorted(right.replace("an ", "a ").split())
        assert objects.index(second) < objects.index(first)
        assert ("above" in relation) == ("left of" in right)
        assert relation.index(first) < relation.index(second)
        assert torch.equal(choices.load(4 * i + 3, size=32, crop="squash"), scenes.load(i, size=32, crop="squash"))
    assert choices.questions.tolist() == [q for q in range(40) for _ in (0, 1)]
    assert choices.right.tolist() == [True, False] * 40
