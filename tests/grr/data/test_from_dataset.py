"""Pairs of a map-style data set of any library: images of any type, captions as text, and counts of skipped samples."""

import hashlib
import io
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from grr.data import Pairs, training_steps
from grr.data.images import BadImage, load_image
from grr.tokenizers import train_tokenizer


def colour(i: int) -> tuple[int, int, int]:
    return (10 * i, 255 - 10 * i, 7)


def picture(i: int) -> Image.Image:
    return Image.new("RGB", (12, 10), colour(i))


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    picture(i).save(buffer, "PNG")
    return buffer.getvalue()


def a_list(count: int, kind: str = "Pillow", folder: Path | None = None) -> list[dict[str, object]]:
    """Returns samples whose images have one type, each with one caption."""
    forms = {
        "Pillow": picture,
        "bytes": png,
        "array": lambda i: np.array(picture(i)),
        "tensor": lambda i: torch.from_numpy(np.array(picture(i))).permute(2, 0, 1),
        "Hugging Face": lambda i: {"bytes": png(i), "path": None},
    }
    if kind == "path":
        assert folder is not None
        for i in range(count):
            picture(i).save(folder / f"{i}.png")
        forms["path"] = lambda i: str(folder / f"{i}.png")
    return [{"picture": forms[kind](i), "text": f"picture number {i}"} for i in range(count)]


@pytest.mark.parametrize("kind", ["Pillow", "bytes", "array", "tensor", "Hugging Face", "path"])
def test_images_of_any_kind_are_the_pixels_of_their_file(tmp_path, kind):
    pairs = Pairs.from_dataset(a_list(5, kind, tmp_path), image="picture", caption="text")
    assert list(pairs.captions) == [f"picture number {i}" for i in range(5)]
    assert list(pairs.ids) == [f"{i}#0" for i in range(5)]
    for i in range(5):
        assert torch.equal(pairs.load(i, size=8, crop="squash"), load_image(png(i), size=8))


@given(st.lists(st.lists(st.sampled_from(["", " ", "a fox", "an  owl", "ein Schlüssel"]), max_size=4), max_size=8))
def test_read_and_skipped_captions_are_all_captions_of_the_data_set(captions_of):
    samples = [{"image": picture(i), "captions": captions} for i, captions in enumerate(captions_of)]
    expected = [
        (i, " ".join(caption.split()))
        for i, captions in enumerate(captions_of)
        for caption in captions
        if caption.strip()
    ]
    if not expected:
        with pytest.raises(
            ValueError, match=rf"from_dataset: a data set must have a caption, got none in {len(samples)}"
        ):
            Pairs.from_dataset(samples, image="image", caption="captions")
        return
    pairs = Pairs.from_dataset(samples, image="image", caption="captions")
    assert list(pairs.captions) == [caption for _, caption in expected]
    assert [int(name.partition("#")[0]) for name in pairs.ids] == [i for i, _ in expected]
    assert len(set(pairs.ids)) == len(expected)
    assert pairs.records.read == len(expected)
    assert pairs.records.total == sum(max(1, len(captions)) for captions in captions_of)
    for k, (i, _) in enumerate(expected):  # captions of one image have one number, and its pixels
        assert {j for j, (other, _) in enumerate(expected) if pairs.image_of[j] == pairs.image_of[k]} == {
            j for j, (other, _) in enumerate(expected) if other == i
        }
        assert torch.equal(pairs.load(k, size=4, crop="squash"), load_image(png(i), size=4))


def test_samples_of_one_path_are_one_image(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(png(2))
    rows = [{"file": tmp_path / name, "text": f"caption {i}"} for i, name in enumerate(["a.png", "b.png", "a.png"])]
    pairs = Pairs.from_dataset(rows, image="file", caption="text")
    assert pairs.image_of.tolist() == [0, 1, 0]
    assert list(pairs.ids) == ["0#0", "1#0", "0#1"]


class Tuples(Dataset):
    """A torch data set with the layout of torchvision's: an image and its captions."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[Image.Image, tuple[str, ...]]:
        if i >= len(self):
            raise IndexError(i)
        if i == 3:
            raise OSError("a damaged image")
        return picture(i), (f"picture {i}", f"number {i}")


def test_a_torch_data_set_of_tuples_is_trained_on_from_threads(tmp_path):
    pairs = Pairs.from_dataset(Tuples(), image=0, caption=lambda sample: list(sample[1]))
    assert list(pairs.captions) == list(Pairs.from_dataset(Tuples(), image=0, caption=1).captions)
    assert len(pairs) == 22
    assert pairs.records.facts()["skipped"] == {"cannot be read: OSError": {"count": 1, "first": ["dataset[3]"]}}
    tokenizer = train_tokenizer(pairs.captions, tmp_path / "t.model", vocab_size=60, context_length=16)
    steps = training_steps(
        pairs,
        tokenizer,
        rank=0,
        world=1,
        seed=0,
        start_step=0,
        batch_size=8,
        micro_batch_size=4,
        image_size=16,
        pin_memory=False,
        workers=2,
    )
    seen = set()
    for batches in islice(steps, 5):
        names = [name for batch in batches for name in batch.names]
        assert len({name.partition("#")[0] for name in names}) == len(names) == 8
        for batch in batches:
            for name, image in zip(batch.names, batch.images, strict=True):
                assert tuple(image[:, 3, 3].tolist()) == colour(int(name.partition("#")[0]))
        seen |= set(names)
    assert len(seen) > 12


def test_the_fingerprint_depends_on_captions_and_their_order_alone(tmp_path):
    samples = a_list(4)
    first = Pairs.from_dataset(samples, image="picture", caption="text").fingerprint
    assert first == Pairs.from_dataset(a_list(4, "bytes"), image="picture", caption=lambda s: [s["text"]]).fingerprint
    names, texts = [f"{i}#0" for i in range(4)], [f"picture number {i}" for i in range(4)]
    assert first == hashlib.blake2b(digest(names) + digest(texts), digest_size=16).hexdigest()
    assert first != Pairs.from_dataset(samples[::-1], image="picture", caption="text").fingerprint
    samples[2]["text"] = "another"
    assert first != Pairs.from_dataset(samples, image="picture", caption="text").fingerprint


def digest(texts: list[str]) -> bytes:
    """Returns a hash of the lengths of some texts and of the texts."""
    lengths = np.array([len(text.encode()) for text in texts], dtype="<i8").tobytes()
    return hashlib.blake2b(lengths + "".join(texts).encode(), digest_size=16).digest()


BOTH = ("picture", "text")


class Stream(IterableDataset):
    def __iter__(self):
        yield from a_list(2)


@pytest.mark.parametrize(
    ("dataset", "fields", "message"),
    [
        (a_list(2), ("image", "text"), r"dataset\[0\] has no image 'image', it has \['picture', 'text'\]; set i"),
        (a_list(2), ("picture", "caption"), r"dataset\[0\] has no caption 'caption', it has \['picture', 'text'\]; s"),
        ([*a_list(2), {"picture": picture(2), "text": 7}], BOTH, r"dataset\[2\]: a caption must be a.*got 7"),
        ([*a_list(2), {"picture": picture(2), "text": [None]}], BOTH, r"dataset\[2\]: a caption must .*null"),
        ([{"picture": picture(0), "text": b"a"}], BOTH, r"dataset\[0\]: a caption must .* got bytes"),
        ([{"picture": 3, "text": "a"}], BOTH, r"the image of dataset\[0\] must be a path.* got int '3'"),
        ([{"picture": np.zeros((4, 4, 3)), "text": "a"}], BOTH, r"must be an array uint8 .*got float64"),
        ([(picture(0), "a")], (0, 2), r"dataset\[0\] has no caption 2, it has tuple; set caption to"),
        ([(picture(0), "a")], ("image", 1), r"dataset\[0\] has no image 'image', it has tuple; set image to"),
        ([], (0, 1), r"a data set must have a caption, got none in 0 samples; set caption"),
        (iter(a_list(2)), BOTH, r"must be map-style, with len\(dataset\).* got list_iterator; list\(d"),
        (Stream(), BOTH, r"must be map-style, .* got Stream; list\(dataset\)"),
    ],
)  # fmt: skip
def test_a_data_set_that_does_not_fit_is_refused_with_its_sample(dataset, fields, message):
    with pytest.raises(ValueError, match=f"from_dataset: .*{message}"):
        Pairs.from_dataset(dataset, image=fields[0], caption=fields[1])


def test_a_damaged_image_is_a_bad_sample_and_one_of_another_kind_stops_the_run():
    samples = a_list(3, "bytes")
    samples[0]["picture"], samples[1]["picture"] = b"no image", 5
    pairs = Pairs.from_dataset(samples, image="picture", caption="text")
    with pytest.raises(BadImage, match="not a readable image"):
        pairs.load(0, size=8, crop="squash")
    with pytest.raises(ValueError, match=r"from_dataset: the image of dataset\[1\] must be a path") as error:
        pairs.load(1, size=8, crop="squash")
    assert not isinstance(error.value, BadImage)


class Columns:
    """A data set that is indexed by the name of a column, as pandas' DataFrame is."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, name: str) -> list[str]:
        return {"image": ["a.png", "b.png"], "text": ["a", "b"]}[name]


@pytest.mark.parametrize("dataset", [{"image": ["a.png"], "text": ["a"]}, {"train": a_list(2)}, Columns()])
def test_a_data_set_indexed_by_names_is_refused_with_a_remedy(dataset):
    with pytest.raises(
        ValueError, match=r"from_dataset: .* got KeyError: 0 from dataset\[0\] of a .*; give a list of dic"
    ):
        Pairs.from_dataset(dataset, image="image", caption="text")


def test_the_remedy_for_a_dict_of_lists_makes_pairs(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    d = {"image": [str(tmp_path / "a.png")], "text": ["a"]}
    samples = [dict(zip(d, row, strict=True)) for row in zip(*d.values(), strict=True)]
    assert list(Pairs.from_dataset(samples, image="image", caption="text").captions) == ["a"]


def test_an_image_that_cannot_be_read_is_named_with_its_sample_and_file(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "a.png").write_bytes(png(1))
    files = [tmp_path / name for name in ("a.png", "none.png", "bad.png")]
    forms = [*map(str, files), *({"bytes": None, "path": str(file)} for file in files)]
    pairs = Pairs.from_dataset(
        [{"image": x, "text": f"{i}"} for i, x in enumerate(forms)], image="image", caption="text"
    )
    for i, name, kind in ((1, "none", FileNotFoundError), (2, "bad", BadImage)):
        for j in (i, i + 3):
            for read in (partial(pairs.load, size=8, crop="squash"), partial(pairs.thumbnail, side=8)):
                with pytest.raises(
                    kind, match=rf"from_dataset: the image of dataset\[{j}\], '.*{name}.png', "
                ) as error:
                    read(j)
                assert type(error.value) is kind


def test_an_error_of_the_data_set_itself_is_named_with_its_sample():
    class Decoding:
        def __init__(self, error: OSError) -> None:
            self.error, self.read = error, 0

        def __len__(self) -> int:
            return 1

        def __getitem__(self, i: int) -> dict[str, object]:
            self.read += 1
            if self.read > 1:  # the caption was read
                raise self.error
            return {"image": picture(0), "text": "a"}

    class Other(OSError):
        def __init__(self, code: int, *, reason: str) -> None:
            super().__init__(reason)

    for error, message in (
        (
            FileNotFoundError(2, "No such file", "gone.png"),
            r"dataset\[0\], 'gone.png', cannot be read: No such file; give",
        ),
        (Other(5, reason="timed out"), r"dataset\[0\] cannot be read: timed out; give"),
    ):
        pairs = Pairs.from_dataset(Decoding(error), image="image", caption="text")
        with pytest.raises(OSError, match=message):
            pairs.load(0, size=8, crop="squash")


def test_only_the_text_of_a_hugging_face_data_set_is_read_for_captions(tmp_path):
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    (tmp_path / "broken.png").write_bytes(b"no image")
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    files = [str(tmp_path / name) for name in ("0.png", "1.png", "broken.png", "3.png")]
    captions = [[f"picture {i}", f"number {i}"] for i in range(4)]
    rows = datasets.Dataset.from_dict({"image": files, "captions": captions})
    decoded = rows.cast_column("image", datasets.Image())
    bytes_alone = rows.cast_column("image", datasets.Image(decode=False))
    for dataset in (decoded, bytes_alone, rows):
        pairs = Pairs.from_dataset(dataset, image="image", caption="captions")
        assert list(pairs.captions) == [caption for both in captions for caption in both]
        assert pairs.image_of.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert torch.equal(pairs.load(7, size=8, crop="squash"), load_image(png(3), size=8))
        with pytest.raises((BadImage, OSError)):
            pairs.load(4, size=8, crop="squash")
    with pytest.raises(
        ValueError, match=r"the data set has no caption 'text', it has \['image', 'captions'\]; set cap"
    ):
        Pairs.from_dataset(decoded, image="image", caption="text")
    flat = datasets.Dataset.from_dict({"image": [files[0], files[1], files[0]], "text": ["a", "b", "c"]})
    assert Pairs.from_dataset(flat, image="image", caption="text").image_of.tolist() == [0, 1, 0]
