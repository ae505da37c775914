"""Batches of a run: the same for any number of processes, threads and micro-batches; bad samples; ends of a run."""

import itertools
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from label_rows import label_rows
from torch import Tensor
from waiting import wait_until

from grr.data import collate
from grr.data.collate import IGNORE, LongestFirst, collate_captions
from grr.data.images import BadImage
from grr.data.loader import Batch, steps_per_epoch, training_steps, validation_steps
from grr.data.order import BlockEpochs, Groups, epoch_order
from grr.data.pairs import Pairs
from grr.training.step import seed_dropout


@dataclass
class Painted(Pairs):
    """Pairs whose images each have another colour; some raise errors, and loading takes `seconds` times 0 to 2."""

    captions: list[str]
    image_of: np.ndarray
    errors: dict[int, BaseException] = field(default_factory=dict)  # by sample
    seconds: float = 0.0
    loaded: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def groups(self) -> Groups:
        return Groups(self.image_of)

    @property
    def ids(self) -> list[str]:
        return [f"{image}.png#{i}" for i, image in enumerate(self.image_of)]

    def load(self, i: int, *, size: int, crop: str) -> Tensor:
        self.loaded.append(i)
        time.sleep(self.seconds * (i % 3))
        if i in self.errors:
            raise self.errors[i]
        colour = torch.tensor([i % 251, self.image_of[i] % 241, crop == "center"], dtype=torch.uint8)
        return colour.view(3, 1, 1).expand(3, size, size)


class Letters:
    """Tokenizer with one token for each letter."""

    pad_id = 0

    def encode(self, caption: str) -> list[int]:
        tokens = [2 + ord(letter) for letter in caption[:61]]
        return [1000, *tokens, 1, *[0] * (61 - len(tokens)), 1001, 0]


def painted(images: int = 12, captions: int = 3, **more) -> Painted:
    n = images * captions
    return Painted([f"{'very ' * (i % 5)}no. {i}" for i in range(n)], np.arange(n) % images, **more)


def training(pairs, rank=0, world=1, *, seed=7, start_step=0, batch_size=8, micro_batch_size=2, image_size=4, **config):
    return training_steps(
        pairs, Letters(), rank, world, seed, start_step, batch_size, micro_batch_size, image_size, False, **config
    )


def validation(pairs, rank=0, world=1, *, batch_size=8, micro_batch_size=2, image_size=4, **config):
    return validation_steps(pairs, Letters(), rank, world, batch_size, micro_batch_size, image_size, False, **config)


def names(steps: Iterable[list[Batch]], n: int | None = None) -> list[list[list[str]]]:
    return [[batch.names for batch in step] for step in islice(steps, n)]


def columns(steps: Iterable[list[Batch]], n: int) -> tuple[int, int]:
    """Returns the columns that the text decoders compute in n steps, and the tokens in them."""
    batches = [batch for step in islice(steps, n) for batch in step]
    return sum(batch.ids.numel() for batch in batches), sum(int((batch.ids != 0).sum()) for batch in batches)


def flat(steps: Iterable[list[Batch]], n: int) -> list[list[tuple]]:
    """Returns each global batch in order: names, pixels and tokens of its samples."""
    result = []
    for step in islice(steps, n):
        row = []
        for b in step:
            labels = label_rows(b)
            for i, name in enumerate(b.names):
                tokens = int((b.ids[i] != 0).sum())
                row.append(
                    (
                        name,
                        b.images[i].flatten().tolist(),
                        b.ids[i, :tokens].tolist(),
                        b.positions[i, :tokens].tolist(),
                        labels[i, : tokens - 2].tolist(),
                    )
                )
        result.append(row)
    return result


some_bad = {3: BadImage("cut off"), 11: OSError(5, "input/output error"), 20: BadImage("a bomb")}


@given(start=st.integers(0, 12), workers=st.sampled_from([0, 2]), seed=st.integers(0, 99))
def test_a_run_that_starts_at_step_k_reads_the_tail_of_the_run_from_0(start, workers, seed):
    """Read more than three epochs of 4 steps, with bad samples."""
    pairs = painted(errors=some_bad)
    whole = flat(training(pairs, seed=seed, workers=0, max_bad_fraction=1), 14)
    resumed = training(pairs, seed=seed, start_step=start, workers=workers, max_bad_fraction=1)
    assert flat(resumed, 14 - start) == whole[start:]
    assert whole[:4] != whole[4:8]


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (2, 4), (5, 2)])
def test_threads_do_not_change_what_is_read(workers, prefetch):
    """Loading times differ, so that threads finish in another order than they start."""
    pairs = painted(errors=some_bad, seconds=0.001)
    expected = flat(training(pairs, workers=0, max_bad_fraction=1), 9)
    assert flat(training(pairs, workers=workers, prefetch=prefetch, max_bad_fraction=1), 9) == expected


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 8])
def test_micro_batches_do_not_change_the_global_batch(micro_batch_size):
    pairs = painted(errors=some_bad)
    expected = flat(training(pairs, workers=0, max_bad_fraction=1), 6)
    steps = list(islice(training(pairs, micro_batch_size=micro_batch_size, workers=0, max_bad_fraction=1), 6))
    assert flat(steps, 6) == expected
    assert all([len(b.names) for b in step] == [micro_batch_size] * (8 // micro_batch_size) for step in steps)


@pytest.mark.parametrize(("world", "micro_batch_size"), [(2, 2), (2, 4), (4, 1), (4, 2), (8, 1)])
def test_processes_together_read_the_batches_of_one_process(world, micro_batch_size):
    pairs = painted(errors=some_bad)
    options = {"micro_batch_size": micro_batch_size, "workers": 0, "max_bad_fraction": 1}
    one = names(training(pairs, **options), 6)
    ranks = [names(training(pairs, rank, world, **options), 6) for rank in range(world)]
    for step in range(6):
        assert one[step] == [ranks[i % world][step][i // world] for i in range(8 // micro_batch_size)]


def test_a_step_is_a_row_of_the_order():
    pairs = painted()
    rows = [row for epoch in (0, 1) for row in epoch_order(pairs.image_of, seed=7, epoch=epoch, batch_size=8)]
    assert len(rows) == 2 * steps_per_epoch(pairs, 8)
    read = [list(itertools.chain(*step)) for step in names(training(pairs), len(rows))]
    assert read == [[pairs.ids[i] for i in row] for row in rows]


def test_a_step_is_a_batch_of_the_order_of_blocks_from_any_start():
    pairs = painted(images=36, captions=1)
    epochs = BlockEpochs(pairs.image_of, seed=7, batch_size=8, block=1)
    read = [list(itertools.chain(*step)) for step in names(training(pairs, block=1, start_step=1), 2)]
    assert read == [[pairs.ids[i] for i in epochs.batch(*divmod(k, epochs.num_batches))] for k in (1, 2)]
    with pytest.raises(ValueError, match=r"loader\.block must be at least 1 sample, or null, got 0"):
        training(pairs, block=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_holds_the_pixels_and_tokens_of_its_samples(workers):
    pairs = painted()
    [batch, *_] = next(training(pairs, micro_batch_size=4, image_size=6, crop="center", workers=workers))
    samples = [int(name.split("#")[1]) for name in batch.names]
    assert (batch.images.dtype, batch.images.shape, batch.replaced) == (torch.uint8, (4, 3, 6, 6), 0)
    assert batch.images.equal(torch.stack([pairs.load(i, size=6, crop="center") for i in samples]))
    expected = collate_captions([Letters().encode(pairs.captions[i]) for i in samples])
    assert all(x.equal(getattr(batch, name)) for name, x in expected._asdict().items() if isinstance(x, torch.Tensor))
    assert batch.num_labels == expected.num_labels > 0


def test_a_batch_moves_to_a_device_with_all_its_tensors():
    batch = next(training(painted()))[0].to("meta")
    tensors = [x for x in vars(batch).values() if isinstance(x, torch.Tensor)]
    assert len(tensors) == 6
    assert {x.device.type for x in tensors} == {"meta"}
    assert len(batch.names) == 2


@given(images=st.integers(9, 40), captions=st.integers(1, 4), bad_images=st.integers(1, 3), data=st.data())
def test_bad_samples_are_replaced_by_images_that_the_global_batch_does_not_hold(images, captions, bad_images, data):
    """With at least batch_size substitutes, no two slots have the same: here in 2 processes and 5 steps."""
    pairs = painted(images + 15, captions)
    bad = set(data.draw(st.permutations(range(images + 15)))[:bad_images])
    pairs.errors = {i: BadImage("cut off") for i in range(len(pairs)) if pairs.image_of[i] in bad}
    steps = [list(islice(training(pairs, rank, 2, workers=0, max_bad_fraction=1), 5)) for rank in (0, 1)]
    rows = epoch_order(pairs.image_of, seed=7, epoch=0, batch_size=8)
    for k, row in enumerate(rows[:5]):
        read = [name for m in (0, 1) for rank in (0, 1) for name in steps[rank][k][m].names]
        held = [int(name.split(".")[0]) for name in read]
        assert len(set(held)) == 8
        assert not bad & set(held)
        for column, i in enumerate(row):
            if int(pairs.image_of[i]) in bad:
                assert held[column] not in pairs.image_of[row]
            else:
                assert read[column] == pairs.ids[int(i)]


def test_each_bad_sample_is_logged_and_counted(caplog):
    pairs = painted(40, 1)
    pairs.captions[5] = " \n"
    pairs.errors = {9: BadImage("cut off"), 30: FileNotFoundError(2, "no such file", "30.png")}
    with caplog.at_level(logging.WARNING):
        steps = list(validation(pairs))
    causes = {5: "its caption is empty", 9: "cut off", 30: "[Errno 2] no such file: '30.png'"}
    logged = [record.getMessage() for record in caplog.records]
    expected = {f"bad sample {i}.png#{i}, left out: {cause}" for i, cause in causes.items()}
    assert set(logged) == expected
    assert sum(batch.replaced for step in steps for batch in step) == len(logged) >= 3


def test_no_control_character_of_a_bad_sample_reaches_the_terminal(caplog):
    pairs = painted(errors={i: BadImage("not \x1b[2J read") for i in range(18)})
    with pytest.raises(ValueError, match=r"not \\x1b\[2J read") as stopped:
        names(training(pairs), 50)
    assert "not \\x1b[2J read" in caplog.text
    assert "\x1b" not in caplog.text + str(stopped.value)


def test_a_substitute_is_found_when_few_images_are_left():
    """Of 10 images in batches of 8, 2 are bad: with one substitute left, two slots may share it."""
    pairs = painted(10, 1, errors={i: BadImage("cut off") for i in (1, 2)})
    for step in islice(training(pairs, max_bad_fraction=1, workers=0), 20):
        images = [int(name.split(".")[0]) for batch in step for name in batch.names]
        assert not {1, 2} & set(images)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stops_where_too_many_samples_are_bad(workers):
    pairs = painted(100, 1, errors={i: BadImage(f"cut off at {i}") for i in range(15)})
    rule = r"more than max_bad_fraction=0.1 of the samples are bad, \d+ of 1\d\d: \d+.png#\d+: cut off at \d+; .*raise"
    with pytest.raises(ValueError, match=rule):
        names(training(pairs, workers=workers), 100)
    names(training(pairs, workers=workers, max_bad_fraction=0.3), 100)


def test_a_few_bad_samples_do_not_stop_a_run():
    """6 of 30 samples are bad, but fewer than 100 were read."""
    assert len(names(validation(painted(30, 1, errors={i: BadImage("cut off") for i in range(6)})))) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_whose_images_are_all_bad_stops_at_once(workers):
    """As with a folder that was moved: after 20 samples, and those that other threads are reading."""
    missing = FileNotFoundError(2, "no such file")
    pairs = painted(1_000, 1, errors=dict.fromkeys(range(1_000), missing))
    with pytest.raises(ValueError, match=r"no readable sample was found .*#\d+: \[Errno 2\] no such file; check the"):
        next(training(pairs, workers=workers, max_bad_fraction=1))
    assert 20 <= len(set(pairs.loaded)) <= 400


def test_a_run_stops_where_no_substitute_is_left():
    with pytest.raises(ValueError, match=r"no readable sample .*: 3.png#3: cut off; .*or lower batch_size"):
        next(training(painted(8, 1, errors={3: BadImage("cut off")}), max_bad_fraction=1))


@pytest.mark.parametrize("workers", [0, 3])
def test_an_error_other_than_a_bad_sample_reaches_the_main_thread(workers):
    pairs = painted(errors={3: RuntimeError("the decoder has a bug")})
    with pytest.raises(RuntimeError, match="the decoder has a bug"):
        names(training(pairs, workers=workers), 5)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt(), StopIteration(), GeneratorExit()], ids=repr)
def test_an_error_that_is_not_an_exception_ends_the_run(workers, error):
    raised: list[BaseException] = []

    def run() -> None:
        try:
            names(training(painted(errors={3: error}), workers=workers), 5)
        except BaseException as other:
            raised.append(other)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert type(raised[0]) is RuntimeError
    assert f"a thread that reads data must not raise {error!r}" in str(raised[0])


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_without_threads_an_interrupt_stays_an_interrupt(error):
    with pytest.raises(type(error)):
        names(training(painted(errors={3: error}), workers=0), 5)


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_reads_batches_that_never_change(workers):
    pairs = painted()
    once = names(validation(pairs, workers=workers))
    whole = steps_per_epoch(pairs, 8)
    assert once == names(validation(pairs, workers=workers))
    assert once[:whole] == names(training(pairs, seed=0), whole)


@given(
    images=st.integers(2, 40),
    captions=st.integers(1, 3),
    world=st.integers(1, 4),
    micro=st.integers(1, 5),
    rounds=st.integers(1, 3),
)
def test_validation_reads_every_pair_once_in_batches_of_one_size(images, captions, world, micro, rounds):
    """In any number of processes; all processes have the same number of batches of the same shapes."""
    pairs = painted(images, captions)
    sizes = {"batch_size": world * micro * rounds, "micro_batch_size": micro, "workers": 0}
    ranks = [list(validation(pairs, rank, world, **sizes)) for rank in range(world)]
    assert len({str([[(*b.images.shape, b.contrast) for b in step] for step in steps]) for steps in ranks}) == 1
    read = [[name for rank in ranks for batch in rank[k] for name in batch.names] for k in range(len(ranks[0]))]
    assert sorted(itertools.chain(*read)) == sorted(pairs.ids)
    size = min(sizes["batch_size"], images)
    for step, held in zip(ranks[0], read, strict=True):
        assert all(len(batch.images) <= micro for batch in step)
        if step[0].contrast:
            assert len({name.split("#")[0] for name in held}) == len(held) == size
    assert sum(step[0].contrast for step in ranks[0]) == steps_per_epoch(pairs, size)
    for batch in itertools.chain(*itertools.chain(*ranks)):
        labels = label_rows(batch)
        assert (labels[~batch.kept] == IGNORE).all()
        assert (labels[batch.kept] != IGNORE).any(1).all()
        assert batch.kept.sum() == len(batch.names)


@given(bad=st.sets(st.integers(0, 19), max_size=18), batch_size=st.sampled_from([8, 64]))
def test_validation_leaves_bad_samples_out_and_reads_every_other_pair_once(bad, batch_size):
    """Also where one batch holds all images, so that there are no substitutes."""
    pairs = painted(20, 1, errors={i: BadImage("cut off") for i in bad})
    steps = list(validation(pairs, batch_size=batch_size, max_bad_fraction=1))
    read = [name for step in steps for batch in step for name in batch.names]
    assert sorted(read) == sorted(name for i, name in enumerate(pairs.ids) if i not in bad)
    assert sum(batch.replaced for step in steps for batch in step) == len(bad)


def test_a_validation_of_one_image_is_refused():
    with pytest.raises(ValueError, match="needs at least two images for the contrastive loss, got 1"):
        validation(painted(1, 5))


def test_twenty_pairs_are_one_batch_of_validation():
    [[batch]] = validation(painted(20, 1), batch_size=768, micro_batch_size=48)
    assert len(batch.names) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"batch_size": 10, "micro_batch_size": 4},
            "multiple of processes .* batch_size=10, world=1, micro_batch_size=4; run.micro_batch_size=2 fits",
        ),
        ({"batch_size": 8, "micro_batch_size": 5}, "run.micro_batch_size=4 fits"),
        ({"batch_size": 12, "micro_batch_size": 12, "world": 2}, "run.micro_batch_size=6 fits"),
        ({"batch_size": 12, "micro_batch_size": 1, "world": 5}, "world=5, micro_batch_size=1; run.batch_size=10 fits"),
        ({"batch_size": 0}, "batch_size=0, world=1, micro_batch_size=2; run.batch_size=2 fits"),
        ({"micro_batch_size": 0}, "micro_batch_size=0; run.micro_batch_size=.* fits"),
        ({"batch_size": 14}, "batch_size=14 for 12 images; lower batch_size"),
        ({"workers": -1}, "workers must be >= 0, .*workers=-1"),
        ({"prefetch": 0}, "prefetch >= 1 .*prefetch=0"),
        ({"max_bad_fraction": 2}, "from 0 to 1, .*max_bad_fraction=2"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_read(arguments, message):
    with pytest.raises(ValueError, match=message):
        training(painted(), **arguments)


def test_threads_read_the_samples_of_one_micro_batch_together():
    """Every load waits until four have started."""
    pairs, together = painted(), threading.Barrier(4)
    load = pairs.load
    pairs.load = lambda i, **how: (together.wait(timeout=20), load(i, **how))[1]
    next(training(pairs, micro_batch_size=4, workers=4))


def test_at_most_prefetch_batches_are_read_ahead():
    pairs = painted(200, 1)
    steps = training(pairs, workers=2, prefetch=3)
    next(steps)
    wait_until(lambda: len(pairs.loaded) >= (4 + 3) * 2)  # 4 taken, 3 ready, of 2 samples each
    time.sleep(0.3)
    assert len(pairs.loaded) <= (4 + 3) * 2 + 2 * 2  # and 2 a worker


@pytest.mark.parametrize("end", ["close", "forget"])
def test_an_abandoned_run_ends_its_threads(end):
    before = set(threading.enumerate())
    steps = training(painted(seconds=0.01), workers=4)
    next(steps)
    assert len(set(threading.enumerate()) - before) >= 4
    if end == "close":
        steps.close()
    del steps
    wait_until(lambda: not set(threading.enumerate()) - before)


@pytest.mark.parametrize(
    ("ending", "code"),
    [("", 0), ("sys.exit(3)", 3), ("raise RuntimeError('enough')", 1), ("del steps; next(training(pairs))", 0)],
    ids=["end of the program", "exit", "error", "forgotten"],
)
def test_a_program_that_stops_in_the_middle_ends(ending, code):
    """Its threads are reading large images at that time."""
    program = f"""
import sys
sys.path.append("../..")
from test_loader import painted, training
pairs = painted(200, 1, seconds=0.02)
steps = training(pairs, image_size=2000, workers=4)
next(steps)
{ending}
"""
    where = Path(__file__).parent
    run = subprocess.run([sys.executable, "-c", program], cwd=where, timeout=60, capture_output=True, text=True)
    assert run.returncode == code, run.stderr
    assert run.stderr.splitlines()[-1:] == (["RuntimeError: enough"] if code == 1 else [])


@pytest.mark.parametrize(("world", "micro_batch_size"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 2)])
def test_a_sample_has_the_dropout_keys_of_its_place_in_the_global_batch(monkeypatch, world, micro_batch_size):
    def keys(rank: int, world: int, size: int) -> dict[str, int]:
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        monkeypatch.setattr(dist, "get_world_size", lambda: world)
        (step,) = islice(training(painted(), rank, world, micro_batch_size=size), 1)
        return {
            name: key
            for i, batch in enumerate(step)
            for name, key in zip(batch.names, seed_dropout(batch, 3, i).tolist(), strict=True)
        }

    whole = keys(0, 1, 8)
    assert len(set(whole.values())) == 8
    parts = [keys(rank, world, micro_batch_size) for rank in range(world)]
    assert {name: key for part in parts for name, key in part.items()} == whole


def worded(seed: int = 0, *, images: int = 96, mean: float = 15, **more) -> Painted:
    """Pairs whose captions have random numbers of letters, which are tokens of `Letters`."""
    lengths = np.random.default_rng(seed).poisson(mean, images).clip(1, 60)
    return Painted(["x" * n for n in lengths], np.arange(images), **more)


@given(seed=st.integers(0, 99), world=st.sampled_from([1, 2, 4]), micro=st.sampled_from([1, 2, 6]))
def test_the_longest_first_are_the_same_global_batches_in_one_order_for_any_split(seed, world, micro):
    pairs = worded(seed)
    plain = [sorted(row) for row in flat(training(pairs, batch_size=24, workers=0), 6)]
    order = flat(training(pairs, batch_size=24, micro_batch_size=24, workers=0, longest_first=True), 6)
    assert [sorted(row) for row in order] == plain
    lengths = [[len(sample[2]) for sample in row] for row in order]
    assert lengths == [sorted(row, reverse=True) for row in lengths]
    sizes = {"batch_size": 24, "micro_batch_size": micro, "workers": 0, "longest_first": True, "start_step": 2}
    split = [flat(training(pairs, rank, world, **sizes), 4) for rank in range(world)]
    for k in range(4):
        rows = [iter(rank[k]) for rank in split]
        joined = [next(row) for _ in range(24 // micro // world) for row in rows for _ in range(micro)]
        assert joined == order[2 + k]


def test_a_substitute_takes_the_place_of_its_bad_sample_in_the_longest_first():
    pairs = worded()
    sizes = {"batch_size": 24, "micro_batch_size": 6, "workers": 0, "longest_first": True, "max_bad_fraction": 1.0}
    (good,) = flat(training(pairs, **sizes), 1)
    place = next(i for i, sample in enumerate(good) if sample[0] == good[7][0])
    bad = pairs.ids.index(good[7][0])
    (replaced,) = flat(training(worded(errors={bad: BadImage("cut off")}), **sizes), 1)
    assert [i for i, (ours, theirs) in enumerate(zip(replaced, good, strict=True)) if ours != theirs] == [place]
    assert replaced[place][0] not in {sample[0] for sample in good}


def test_the_longest_first_read_few_columns_that_are_padding():
    pairs, sizes = worded(images=1536), {"batch_size": 768, "micro_batch_size": 48, "workers": 0, "image_size": 1}
    computed, tokens = columns(training(pairs, **sizes), 2)
    assert computed > 1.5 * tokens
    computed, same_tokens = columns(training(pairs, longest_first=True, **sizes), 2)
    assert same_tokens == tokens
    assert computed < 1.1 * tokens
    rounded, same_tokens = columns(training(pairs, longest_first=True, text_multiple=8, **sizes), 2)
    assert same_tokens == tokens
    assert computed < rounded < 1.25 * tokens
    assert rounded % (8 * 48) == 0


def test_a_caption_is_encoded_once_for_its_place():
    encoded = []

    def encode(caption: str) -> list[int]:
        encoded.append(caption)
        return Letters().encode(caption)

    order = LongestFirst(["one", "three", "fourteen", "four"], encode)
    assert order(np.array([0, 1, 3])).tolist() == [1, 3, 0]
    assert order(np.array([3, 0, 2, 1])).tolist() == [2, 1, 3, 0]
    assert sorted(encoded) == ["four", "fourteen", "one", "three"]


def test_a_batch_of_many_captions_is_ordered_by_their_bytes_and_none_is_encoded(monkeypatch):
    monkeypatch.setattr(collate, "ENCODED", 3)

    def encode(caption: str) -> list[int]:
        raise AssertionError(caption)

    order = LongestFirst(["one", "three", "été", "fourteen"], encode)
    assert order(np.array([0, 1, 2, 3])).tolist() == [3, 1, 2, 0]  # 8, 5, 5 and 3 bytes
