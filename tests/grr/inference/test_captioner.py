"""A captioner reads an image in any form as the same pixels, and returns what the functions below it compute."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

import grr
from grr.data.image_inputs import read_image
from grr.data.images import BadImage, load_image
from grr.evaluation.zero_shot import class_embeddings, embed_texts
from grr.generation.generate import generate
from grr.inference.captioner import BATCH, Captioner
from grr.inference.captioning.files import caption_files
from grr.inference.classify import classify_images
from grr.inference.pretrained import load, load_pretrained

COLOURS = ("red", "green", "blue", "yellow", "white", "black")


@pytest.fixture
def pictures(files) -> list[str]:
    """An image file of each colour."""
    return [file for file in files if "empty" not in file]


def a_picture(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def in_every_form(array: np.ndarray, folder: Path) -> dict[str, object]:
    """One image as a path, its bytes, a Pillow image, an array and a tensor, alone and in a batch of one."""
    image, file = Image.fromarray(array), folder / "picture.png"
    image.save(file)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    forms = {"str": str(file), "Path": file, "bytes": file.read_bytes(), "Pillow": image}
    forms |= {"array": array, "tensor": tensor, "opened": Image.open(file)}
    return forms | {"array batch": array[None], "tensor batch": tensor[None]} | {"list": [image], "tuple": (file,)}


@given(
    height=st.integers(1, 80),
    width=st.integers(1, 80),
    seed=st.integers(0, 9),
    crop=st.sampled_from(("squash", "center", "clip")),
)
def test_an_image_in_any_form_gives_the_pixels_of_its_file(trained, tmp_path_factory, height, width, seed, crop):
    captioner = trained._replace(crop=crop)
    forms = in_every_form(a_picture(height, width, seed), tmp_path_factory.mktemp("form"))
    expected = load_image(forms["str"], size=32, crop=crop)
    for form, image in forms.items():
        pixels = captioner.preprocess(image)
        assert (pixels.dtype, pixels.shape) == (torch.uint8, (1, 3, 32, 32)), form
        assert torch.equal(pixels[0], expected), form


@given(
    kinds=st.lists(st.sampled_from(["str", "bytes", "Pillow", "array", "tensor"]), max_size=6), seed=st.integers(0, 9)
)
def test_a_list_may_mix_the_forms_and_keeps_their_order(trained, tmp_path_factory, kinds, seed):
    folder = tmp_path_factory.mktemp("mixed")
    images = []
    for i, kind in enumerate(kinds):
        (folder / str(i)).mkdir()
        images.append(in_every_form(a_picture(20 + i, 30, seed + i), folder / str(i))[kind])
    pixels = trained.preprocess(images)
    assert pixels.shape == (len(kinds), 3, 32, 32)
    for i in range(len(kinds)):
        assert torch.equal(pixels[i], load_image(folder / str(i) / "picture.png", size=32)), i


def test_preprocessed_images_are_read_as_they_are(trained, pictures):
    pixels = trained.preprocess(pictures)
    assert torch.equal(trained.preprocess(pixels), pixels)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_orientation_is_applied_to_a_path_and_to_a_pillow_image(trained, tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    array = a_picture(20, 30, 0)
    Image.fromarray(array).save(tmp_path / "turned.png", exif=exif)
    turned = {3: np.rot90(array, 2), 6: np.rot90(array, -1), 8: np.rot90(array)}[orientation]
    expected = trained.preprocess(np.ascontiguousarray(turned))
    assert torch.equal(trained.preprocess(tmp_path / "turned.png"), expected)
    assert torch.equal(trained.preprocess(Image.open(tmp_path / "turned.png")), expected)


def test_transparency_is_laid_on_white_and_grey_becomes_rgb(trained):
    clear = Image.new("RGBA", (9, 9), (255, 0, 0, 0))
    assert (trained.preprocess(clear) == 255).all()
    grey = trained.preprocess(Image.new("L", (9, 9), 77))
    assert (grey == 77).all()


def test_captions_are_those_of_generate(trained, pictures):
    model, tokenizer, size, crop = trained
    images = torch.stack([load_image(file, size=size, crop=crop) for file in pictures])
    assert trained.caption(pictures) == generate(model, images, tokenizer)
    assert "a red picture" in trained.caption(pictures)
    assert trained.caption(pictures, num_beams=3, max_new_tokens=4) == generate(
        model, images, tokenizer, num_beams=3, max_new_tokens=4
    )
    assert trained.caption(pictures[0]) == generate(model, images[:1], tokenizer)


def test_embeddings_are_those_of_the_model(trained, pictures):
    with torch.no_grad():
        expected = trained.model.encode_image(torch.stack([load_image(file, size=32) for file in pictures]))
    assert torch.equal(trained.embed_images(pictures), expected)
    texts = ["a red picture", "a blue picture"]
    assert torch.equal(
        trained.embed_texts(texts), embed_texts(trained.model, trained.tokenizer, texts, torch.device("cpu"))
    )
    assert torch.equal(trained.embed_texts(texts[0]), trained.embed_texts(texts[:1]))
    best = (trained.embed_images(pictures) @ trained.embed_texts([f"a {c} picture" for c in COLOURS]).T).argmax(1)
    assert [COLOURS[i] for i in best] == [Path(file).stem for file in pictures]


def test_probabilities_of_classes_are_the_formula_and_those_of_the_command(trained, pictures):
    templates = ("a {} picture",)
    rows = trained.classify(pictures, COLOURS, templates=templates)
    assert [next(iter(row)) for row in rows] == [Path(file).stem for file in pictures]
    classes = class_embeddings(trained.model, trained.tokenizer, COLOURS, torch.device("cpu"), templates=templates)
    for row, image in zip(rows, trained.embed_images(pictures), strict=True):
        weights = {
            name: math.exp(float(image.double() @ c.double()) / 0.07) for name, c in zip(COLOURS, classes, strict=True)
        }
        assert list(row) == sorted(COLOURS, key=lambda name: -weights[name])
        assert row == pytest.approx({name: w / sum(weights.values()) for name, w in weights.items()}, rel=1e-3)
    (told,) = classify_images(trained, pictures, COLOURS, templates=templates, top=9)
    assert [list(row) for row in rows] == [row["classes"] for row in told]
    assert [list(row.values()) for row in rows] == [row["probabilities"] for row in told]


def test_no_image_gives_nothing_of_the_right_shape(trained):
    assert trained.preprocess([]).shape == (0, 3, 32, 32)
    assert trained.caption([]) == trained.classify([], COLOURS) == []
    assert trained.embed_images([]).shape == trained.embed_texts([]).shape == (0, 64)


def test_images_of_a_generator_are_computed_in_batches(trained, monkeypatch):
    sizes = []
    encode = trained.model.encode_image
    monkeypatch.setattr(trained.model, "encode_image", lambda images: sizes.append(len(images)) or encode(images))
    images = a_picture(8, 8, 0), a_picture(9, 7, 1)
    many = trained.embed_images(images[i % 2] for i in range(BATCH + 3))
    assert sizes[1:] == [BATCH, 3]  # the first is the blank image that gives the width
    torch.testing.assert_close(many, trained.embed_images(images)[[i % 2 for i in range(BATCH + 3)]])


def test_a_model_in_training_mode_is_used_without_dropout_and_stays_in_it(trained):
    model = grr.create_model("grr_coca_tiny", dropout=0.5, vocab_size=trained.tokenizer.vocab_size)
    captioner = Captioner(model.train(), trained.tokenizer, 32, "squash")
    image = a_picture(30, 30, 0)
    assert torch.equal(captioner.embed_images(image), captioner.embed_images(image))
    assert captioner.classify(image, COLOURS) == captioner.classify(image, COLOURS)
    assert model.training


WRONG = [
    (np.zeros((4, 4, 3), dtype=np.float32), r"images\[1\] must be an array uint8 .*, got float32 \[4, 4, 3\]; scale"),
    (np.zeros((3, 4, 5), dtype=np.uint8), r"got uint8 \[3, 4, 5\]; permute its axes"),
    (np.zeros((4, 4), dtype=np.uint8), r"got uint8 \[4, 4\]; PIL.Image.fromarray makes an image"),
    (np.zeros((0, 4, 3), dtype=np.uint8), r"h and w at least 1, got uint8 \[0, 4, 3\]"),
    (torch.zeros(3, 4, 4), r"images\[1\] must be a tensor uint8 .*, got float32 \[3, 4, 4\]; scale .* model.encode"),
    (torch.zeros(4, 4, 3, dtype=torch.uint8), r"got uint8 \[4, 4, 3\]; permute"),
    (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), r"images\[1\] must be a tensor .* got uint8 \[1, 3, 4, 4\]"),
    (3, r"images\[1\] must be a path, a Pillow image, .* got int '3'; give the path"),
    (None, r"images\[1\] must be a path, .* got NoneType 'None'"),
    (np.zeros((4, 4, 4), dtype=np.uint8), r"got uint8 \[4, 4, 4\]; PIL.Image.fromarray .* alpha"),
    (np.zeros((4, 4, 1), dtype=np.uint8), r"got uint8 \[4, 4, 1\]; repeat its channel"),
    (np.zeros((4, 5, 7), dtype=np.uint8), r"got uint8 \[4, 5, 7\]; give an image with the channels red"),
    ({"a": 1}, r"images\[1\] must hold \"bytes\" or \"path\" if it is a dict, got a dict of \['a'\]; give the image"),
    (io.StringIO("a"), r"images\[1\] must be a file opened in binary mode, got one of text; open it with mode 'rb'"),
    (b"no image", r"images\[1\] must be an image, got not a readable image: .*; leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(("image", "message"), WRONG, ids=range(len(WRONG)))
@pytest.mark.parametrize("method", ["preprocess", "caption", "embed_images", "classify"])
def test_an_image_of_a_wrong_kind_is_named(trained, method, image, message):
    words = [COLOURS] if method == "classify" else []
    with pytest.raises(ValueError, match=f"{method}: .*{message}"):
        getattr(trained, method)([a_picture(4, 4, 0), image], *words)


def test_a_file_that_cannot_be_read_is_named(trained, files, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"caption: images\[0\], '.*none.png', cannot be read: No such file.*; give"
    ):
        trained.caption(tmp_path / "none.png")
    with pytest.raises(
        BadImage, match=r"caption: images\[1\], '.*empty.png', must be an image, got .* the file is empty"
    ):
        trained.caption([files[0], tmp_path / "empty.png"])
    with pytest.raises(BadImage, match=r"images\[0\], '.*', .* is a folder; give the paths of the image files in it$"):
        trained.caption(tmp_path)


def test_a_text_or_class_of_a_wrong_kind_is_named(trained):
    with pytest.raises(ValueError, match=r"embed_texts: texts\[1\] must be a string, got int"):
        trained.embed_texts(["a", 3])
    with pytest.raises(ValueError, match="each class must have a unique name, got 'red' more than once"):
        trained.classify(a_picture(4, 4, 0), ["red", "red"])


@pytest.mark.parametrize("value", [None, b"a", 3, [1, 2], ["a", None]])
@pytest.mark.parametrize(
    ("method", "argument"), [("embed_texts", "texts"), ("classify", "names"), ("classify", "templates")]
)
def test_texts_that_are_not_a_list_of_strings_are_named(trained, method, argument, value):
    image = [a_picture(4, 4, 0)] if method == "classify" else []
    given = {"names": COLOURS, argument: value} if method == "classify" else {argument: value}
    with pytest.raises(ValueError, match=rf"{method}: {argument}(\[\d\])? must be a (list of )?string"):
        getattr(trained, method)(*image, **given)


def test_an_opened_file_is_one_image(trained, pictures, tmp_path):
    expected = trained.preprocess(pictures[0])
    with open(pictures[0], "rb") as file:
        assert torch.equal(trained.preprocess(file), expected)
    assert torch.equal(trained.preprocess([io.BytesIO(Path(pictures[0]).read_bytes())]), expected)
    with pytest.raises(ValueError, match=r"images\[0\] must be an open file, got .*closed.*; give its path"):
        trained.caption(file)


@pytest.mark.parametrize(("option", "near"), [("beams", "num_beams"), ("max_tokens", "max_new_tokens")])
def test_an_option_of_captions_that_is_mistyped_is_refused_with_the_nearest_before_anything_is_read(
    trained, tmp_path, option, near
):
    rule = rf"generate takes no argument '{option}' \(did you mean {near}\?\); help\(grr\.generate\) lists"
    with pytest.raises(TypeError, match=f"^caption: {rule}"):
        trained.caption(tmp_path / "none.png", **{option: 3})
    with pytest.raises(TypeError, match=f"^caption_files: {rule}"):
        caption_files(trained, ["none.png"], tmp_path / "captions.jsonl", {option: 3})
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="takes no argument 'model'"):  # what is passed by position is not an option
        trained.caption([], model=3)


def test_a_captioner_is_shown_in_one_line(trained):
    parameters = sum(p.numel() for p in trained.model.parameters())
    ids = trained.tokenizer.vocab_size
    assert repr(trained) == (
        f"Captioner(CoCa of {parameters:,} parameters in float32 on cpu, Tokenizer of {ids} ids, image_size=32, "
        "crop='squash')"
    )


def test_an_undecoded_image_of_a_hugging_face_data_set_is_read(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(a_picture(9, 9, 0)).save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    expected = load_image(buffer.getvalue(), size=32)
    for value in ({"bytes": buffer.getvalue(), "path": "gone.png"}, {"bytes": None, "path": str(tmp_path / "a.png")}):
        assert torch.equal(read_image(value, size=32, crop="squash", where="image"), expected)


def test_load_opens_what_load_pretrained_opens_where_there_is_a_gpu_on_it(colour_run, pictures):
    captioner, expected = load(colour_run), load_pretrained(colour_run)
    assert isinstance(captioner, Captioner)
    assert captioner.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = load(str(colour_run), device="cpu")
    assert torch.equal(on_cpu.embed_images(pictures), expected.embed_images(pictures))
    half = load(colour_run, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert half.embed_images(pictures[0]).dtype == torch.float32
