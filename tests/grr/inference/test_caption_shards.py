"""Captions of tar shards: each image exactly once, however the work is divided and interrupted."""

import copy
import io
import json
import random
import shutil
import tarfile
import tempfile
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from grr.checkpoint.run_lock import RunLock
from grr.data.formats.shards import are_shards, find_shards, webdataset
from grr.data.images import load_image
from grr.files.lock import lock
from grr.generation.generate import generate_several
from grr.inference.captioner import Captioner
from grr.inference.captioning import shards as module
from grr.inference.captioning.batches import CaptionOptions, caption_batches
from grr.inference.captioning.files import caption_files
from grr.inference.captioning.shard import PARTS, CaptionedShard, shard_images
from grr.inference.captioning.shards import caption_shard_images, caption_shards, caption_shares, divide
from grr.inference.results import read_results
from grr.models.builders import grr_coca_tiny
from grr.seeds import derive_seed
from grr.tokenizers import train_tokenizer

SAMPLED = {"temperature": 1.5, "max_new_tokens": 4}


def picture(number: int, suffix: str = "png") -> bytes:
    """An image of 12 pixels a side that no other number has."""
    file = io.BytesIO()
    colours = random.Random(number)
    image = Image.new("RGB", (12, 12), tuple(colours.randbytes(3)))
    image.paste(tuple(colours.randbytes(3)), (0, 0, 6, 12))
    image.save(file, {"png": "PNG", "jpg": "JPEG"}[suffix])
    return file.getvalue()


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if content == b"link":
                member.type, member.linkname, member.size = tarfile.SYMTYPE, "elsewhere", 0
            tar.addfile(member, io.BytesIO(content))


def sample(number: int) -> list[tuple[str, bytes]]:
    """A sample as img2dataset writes it."""
    key = f"{number:06d}"
    facts = {"caption": f"old {number}", "url": f"http://x/{number}", "width": 12}
    return [
        (f"{key}.png", picture(number)),
        (f"{key}.txt", f"old {number}".encode()),
        (f"{key}.json", json.dumps(facts).encode()),
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Captioner:
    """A random model whose captions differ from image to image."""
    words = [f"{a} {b}" for a in ("red", "big", "old") for b in ("fox", "owl", "boat")]
    tokenizer = train_tokenizer(words, tmp_path_factory.mktemp("words") / "t.model", vocab_size=60, context_length=16)
    torch.manual_seed(0)
    model = grr_coca_tiny(vocab_size=tokenizer.vocab_size, context_length=16, image_size=32)
    with torch.no_grad():
        model.generative_pooler.out.weight *= 5
        model.multimodal_decoder.head.weight *= 6
        for block in model.multimodal_decoder.blocks:
            block.cross_attention.out.weight *= 5
    return Captioner(model.eval(), tokenizer, 32, "squash")


def rows_in(folder: Path) -> list[dict]:
    """The rows of all complete shards."""
    return [row for file in sorted(folder.glob("*.jsonl")) for row in read_results(file)]


def outputs_of(folder: Path, shards: list[Path]) -> dict[Path, CaptionedShard]:
    """The files of shards, with tars."""
    return {shard: CaptionedShard(folder, shard, write_tar=True) for shard in shards}


def captioned_in(logs: list[Path]) -> list[str]:
    """The images that have a caption in the files of processes, once for each."""
    return [row["file"] for log in logs for row in read_results(log) if "error" not in row]


# Laws


@given(counts=st.lists(st.integers(0, 40), max_size=8), world=st.integers(1, 9))
def test_shares_are_equal_and_hold_each_image_once(counts, world):
    paths = [Path(f"{number}.tar") for number in range(len(counts))]
    shares = divide(list(zip(paths, counts, strict=True)), world)
    held = [(share.shard, i) for mine in shares for share in mine for i in range(share.start, share.stop)]
    assert held == [(path, i) for path, count in zip(paths, counts, strict=True) for i in range(count)]
    lengths = [sum(share.stop - share.start for share in mine) for mine in shares]
    assert max(lengths) - min(lengths) <= 1
    whole = {share.shard for mine in shares for share in mine if share.is_whole}
    assert all(sum(share.shard == shard for mine in shares for share in mine) == 1 for shard in whole)


@settings(max_examples=12)
@given(
    counts=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    worlds=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
)
def test_any_processes_batches_and_kills_write_the_same_captions_each_once(tiny, counts, worlds, seed):
    """The steps of all processes of a run in any order, each run but the last killed after any of them."""
    draw = random.Random(seed)
    options = CaptionOptions(num_captions=2)
    with tempfile.TemporaryDirectory() as place:
        shards = []
        for number, count in enumerate(counts):
            first = sum(counts[:number])
            members = [member for i in range(first, first + count) for member in sample(i)]
            if count > 2:
                members.append(("bad.png", b"not an image"))
            shards.append(Path(place, "in", f"{number:05d}.tar"))
            write_shard(shards[-1], members)
        expected = Path(place, "expected")
        caption_shards(tiny, shards, expected, SAMPLED, options=options, write_tar=True)
        folder = Path(place, "out")
        for round_, world in enumerate([*worlds, draw.randint(1, 3)]):
            killed = round_ < len(worlds)
            outputs = outputs_of(folder, shards)
            folder.mkdir(exist_ok=True)
            left = module._begin(folder, {"made": 1}, outputs)
            shares = divide([(shard, len(shard_images(shard)[0])) for shard in left], world)
            running = [
                caption_shares(
                    tiny,
                    mine,
                    outputs,
                    rank,
                    SAMPLED,
                    options,
                    batch_size=draw.randint(1, 4),
                )
                for rank, mine in enumerate(shares)
            ]
            steps = draw.randint(0, 6) if killed else 10**6
            while running and steps:
                steps -= 1
                process = draw.choice(running)
                if next(process, None) is None:
                    running.remove(process)
            for process in running:
                process.close()
            captioned = Counter(image for output in outputs.values() for image in captioned_in(output.logs()))
            assert set(captioned.values()) <= {1}  # no run captioned an image again
            if killed:
                for log in (folder / PARTS).glob("*.jsonl"):
                    content = log.read_bytes()
                    log.write_bytes(content[: len(content) - draw.randint(0, 30)])  # as if a write had not ended
                if draw.random() < 0.5:
                    (folder / "00000.tar.tmp").write_bytes(b"half")
            else:
                for shard in left:
                    if not outputs[shard].is_complete():
                        outputs[shard].finish()
        ours, theirs = ({file.name: file.read_bytes() for file in of.glob("0*.*")} for of in (folder, expected))
        ours.pop("00000.tar.tmp", None)
        assert ours == theirs
        assert not list((folder / PARTS).glob("*.jsonl"))
        rows = rows_in(folder)
        assert sorted(row["file"] for row in rows) == sorted(
            image.name for shard in shards for image in shard_images(shard)[0]
        )
        for shard in shards:
            facts = outputs[shard].facts()
            skipped = sum(one["count"] for one in facts["skipped"].values())
            assert facts["images"] == facts["read"] + skipped == len(shard_images(shard)[0])


# Agreement


@pytest.mark.parametrize("generation", [{}, {"num_beams": 3, "max_new_tokens": 5}, {"prefix": "red"}])
def test_captions_are_those_of_the_captioner_token_for_token(tiny, tmp_path, generation):
    write_shard(tmp_path / "in/0.tar", [member for i in range(9) for member in sample(i)])
    rows = [
        row for some in caption_shard_images(tiny, [tmp_path / "in/0.tar"], generation, batch_size=4) for row in some
    ]
    expected = tiny.caption([picture(i) for i in range(9)], **generation)
    assert [row["caption"] for row in rows] == expected
    assert [row["file"] for row in rows] == [f"0.tar/{i:06d}.png" for i in range(9)]
    assert len(set(expected)) > 2


def test_scores_are_the_likelihood_and_the_cosine_of_the_captions_own_words(tiny, tmp_path):
    images = [picture(i) for i in range(5)]
    read = lambda i: load_image(images[i], size=32, crop="squash")  # noqa: E731
    options = CaptionOptions(num_captions=3, scores=True)
    (rows,) = caption_batches(tiny, [list(range(5))], read, str, SAMPLED, options)
    tokenizer = tiny.tokenizer
    for number, row in rows:
        assert len(row["caption"]) == len(row["likelihood"]) == len(row["cosine"]) == 3
        for text, likelihood, cosine in zip(row["caption"], row["likelihood"], row["cosine"], strict=True):
            ids = tokenizer.encode(text)
            ids = torch.tensor([ids[: ids.index(tokenizer.eos_id) + 1]])
            with torch.no_grad():
                log_p = tiny.model(read(number).unsqueeze(0), ids[:, :-1]).logits.double().log_softmax(-1)
            of_tokens = log_p.gather(2, ids[:, 1:].unsqueeze(2))
            assert likelihood == pytest.approx(of_tokens.mean().item(), abs=1e-3)
            unit = tiny.embed_images(images[number]) @ tiny.embed_texts(text).T
            assert cosine == pytest.approx(unit.item(), abs=1e-3)


# Shards with faults


def test_all_images_are_captioned_or_skipped_with_a_reason_and_nothing_else_is_lost(tiny, tmp_path):
    members = [member for i in range(6) for member in sample(i)]
    members += [("torn.png", picture(7)[:60]), ("two.png", picture(8)), ("two.jpg", picture(8, "jpg"))]
    members += [("alone.png", picture(9)), ("no image.txt", b"words"), ("link.png", b"link"), ("000001.npy", b"more")]
    members += [("again.png", picture(10)), ("again.png", picture(11)), ("._0.png", b"macOS"), *sample(12)]
    shard, cut = tmp_path / "in/00000.tar", tmp_path / "in/00001.tar"
    write_shard(shard, members)
    write_shard(cut, [member for i in range(20, 30) for member in sample(i)])
    content = cut.read_bytes()
    cut.write_bytes(content[: content.index(b"000027.png") + 540])
    folder = tmp_path / "out"
    records, count = caption_shards(tiny, [shard, cut], folder, write_tar=True, batch_size=3)

    rows = {row["file"]: row for row in rows_in(folder)}
    assert count == len(rows) == records.total == 14 + 7
    assert records.read == 8 + 7  # 0 to 5, 12 and alone; 20 to 26
    assert records.skipped.total() == 6
    assert records.skipped["one of several images of a key"] == 4
    assert records.skipped["a symbolic link"] == 1
    assert "00000.tar/torn.png" in [name for reason in records.names for name in records.names[reason]]
    assert {name for name, row in rows.items() if "error" in row} == {
        f"00000.tar/{name}" for name in ("torn.png", "two.png", "two.jpg", "link.png", "again.png", "again.png #2")
    }
    (damage,) = records.damaged
    assert "00001.tar is damaged at byte" in damage
    assert "cut off" in damage

    pairs = webdataset(shards=str(folder))
    assert len(pairs) == 8 + 7 == pairs.records.read
    for i in range(len(pairs)):
        source, key = pairs.ids[i].split("/")
        assert pairs.captions[i] == rows[f"{source}.tar/{key}.png"]["caption"]
    with tarfile.open(shard) as before, tarfile.open(folder / "00000.tar") as after:
        assert after.extractfile("000003.png").read() == before.extractfile("000003.png").read() == picture(3)
        facts = json.load(after.extractfile("000003.json"))
        assert facts == {
            "caption": rows["00000.tar/000003.png"]["caption"],
            "old_caption": "old 3",
            "url": "http://x/3",
            "width": 12,
        }
        assert json.load(after.extractfile("alone.json"))["old_caption"] is None


def test_a_hole_in_a_shard_and_an_empty_one_are_reported(tiny, tmp_path):
    torn, empty = tmp_path / "in/00000.tar", tmp_path / "in/00001.tar"
    write_shard(torn, [(f"{i:06d}.png", picture(i) + bytes([1]) * 1000) for i in range(20)])
    content = torn.read_bytes()
    start = content.index(b"000009.png")
    torn.write_bytes(content[:start] + bytes(512) + content[start + 512 :])
    empty.write_bytes(b"")
    records, _ = caption_shards(tiny, [torn, empty], tmp_path / "out")
    assert records.total == 19
    assert records.damaged == [
        f"{torn} is damaged at byte {start:,}: zeros in the place of a header; the rest is used",
        f"{empty} is damaged at byte 0: the file is empty",
    ]


def test_captions_below_a_limit_are_marked_and_left_out_of_the_shards(tiny, tmp_path):
    shard = tmp_path / "in/00000.tar"
    write_shard(shard, [member for i in range(12) for member in sample(i)])
    for generation, number in (({}, 1), (SAMPLED, 3)):
        options = CaptionOptions(num_captions=number, scores=True)
        caption_shards(tiny, [shard], tmp_path / f"all{number}", generation, options=options)
        every = rows_in(tmp_path / f"all{number}")
        values = sorted(x for row in every for x in (row["cosine"] if number > 1 else [row["cosine"]]))
        options.min_cosine = least = values[len(values) // 2]
        folder = tmp_path / f"some{number}"
        records, _ = caption_shards(tiny, [shard], folder, generation, options=options, write_tar=True)
        kept, left_out = 0, 0
        for before, after in zip(every, rows_in(folder), strict=True):
            texts, cosines = (x if number > 1 else [x] for x in (before["caption"], before["cosine"]))
            good = [text for text, cosine in zip(texts, cosines, strict=True) if cosine >= least]
            assert after.get("rejected", []) == [t for t, c in zip(texts, cosines, strict=True) if c < least]
            assert after.get("caption") == ((good if number > 1 else good[0]) if good else None)
            assert ("filtered" in after) == (not good)
            kept, left_out = kept + bool(good and any(good)), left_out + (not good)
        assert kept > 0
        assert records.skipped[f"cosine below {least:g}"] == left_out
        assert records.total == 12 == records.read + records.skipped.total()
        pairs = webdataset(shards=str(folder))
        assert len(set(pairs.image_of.tolist())) == records.read == kept


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("scores", [False, True])
def test_empty_captions_are_dropped_and_an_image_without_another_is_skipped(tiny, tmp_path, number, scores):
    shard, folder = tmp_path / "in/00000.tar", tmp_path / "out"
    images = range(60)
    write_shard(shard, [member for i in images for member in sample(i)])
    pixels = torch.stack([load_image(picture(i), size=32, crop="squash") for i in images])
    tokenizer, model = tiny.tokenizer, copy.deepcopy(tiny.model)
    with torch.no_grad():  # many captions end before their first word
        first = model(pixels, torch.full((60, 1), tokenizer.bos_id)).logits[:, 0].argmax(1).mode().values
        model.multimodal_decoder.head.weight[tokenizer.eos_id] = model.multimodal_decoder.head.weight[first]
    trained, generation = tiny._replace(model=model), {"temperature": 0.5, "max_new_tokens": 1}
    keys = torch.tensor([derive_seed(0, f"00000.tar/{i:06d}.png") for i in images])
    drawn, _ = generate_several(model, pixels, tokenizer, generation, num_captions=number, keys=keys)
    expected = [[text for text in some if text] for some in drawn]
    assert expected != drawn
    empty = expected.count([])
    assert 0 < empty < 60

    options = CaptionOptions(num_captions=number, scores=scores)
    records, _ = caption_shards(trained, [shard], folder, generation, options=options, write_tar=True)
    for row, some in zip(rows_in(folder), expected, strict=True):
        assert row.get("caption", []) == (some if number > 1 or not some else some[0])
        assert row.get("filtered") == (None if some else "empty caption")
        assert ("cosine" in row) == (scores and some != [])
    assert (records.read, records.skipped) == (60 - empty, {"empty caption": empty})
    pairs = webdataset(shards=str(folder))
    assert len(set(pairs.image_of.tolist())) == 60 - empty
    assert pairs.skipped == 0


# Work


def test_the_images_of_the_next_batch_are_read_while_captions_are_written(tiny, tmp_path, monkeypatch):
    write_shard(tmp_path / "0.tar", [member for i in range(12) for member in sample(i)])
    read, begun = [], threading.Condition()
    real, number = module.read_shard_image, 0

    def reading(image, **options):
        with begun:
            read.append(image.name)
            begun.notify_all()
        return real(image, **options)

    monkeypatch.setattr(module, "read_shard_image", reading)
    encode = tiny.model.image_context

    def encoding(pixels):
        nonlocal number
        number += 1
        with begun:  # generation of batch k ends only when images of batch k + 1 were read
            assert begun.wait_for(lambda: len(read) >= min(12, 4 * number + 1), timeout=60)
        return encode(pixels)

    monkeypatch.setattr(tiny.model, "image_context", encoding)
    rows = [row for some in caption_shard_images(tiny, [tmp_path / "0.tar"], batch_size=4) for row in some]
    assert number == 3
    assert len(rows) == 12


# Errors


def test_other_settings_or_shards_are_refused_with_both_values(tiny, tmp_path):
    shard, folder = tmp_path / "in/00000.tar", tmp_path / "out"
    write_shard(shard, [member for i in range(3) for member in sample(i)])
    caption_shards(tiny, [shard], folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    for options, message in (
        ({"generation": {"num_beams": 2}}, r"\(generation.num_beams is not set there and 2 now\)"),
        ({"options": CaptionOptions(min_cosine=0.5)}, r"\(min_cosine is not set there and 0.5 now\)"),
        ({"write_tar": True}, r"\(write_tar is false there and true now\)"),
    ):
        with pytest.raises(
            ValueError, match=f"caption_shards: {folder} was written with other options {message}; set another folder,"
        ):
            caption_shards(tiny, [shard], folder, **options)
    write_shard(shard, [member for i in range(20) for member in sample(i)])
    with pytest.raises(ValueError, match=r"holds captions of another 00000.tar, of [\d,]+ bytes"):
        caption_shards(tiny, [shard], folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before


@pytest.mark.parametrize("generation", [{}, {"num_beams": 2}])
def test_more_captions_than_a_search_finds_are_refused(tiny, tmp_path, generation):
    write_shard(tmp_path / "in/00000.tar", sample(1))
    options = CaptionOptions(num_captions=3)
    with pytest.raises(ValueError, match=r"need sampling or as many beams, and at least one .*num_captions=3"):
        caption_shards(tiny, [tmp_path / "in/00000.tar"], tmp_path / "out", generation, options=options)
    assert not (tmp_path / "out").exists()  # before a shard is read


def test_a_prefix_that_leaves_no_room_is_refused_before_a_file_is_read(tiny, tmp_path):
    words = {"prefix": "red fox " * 20}
    with pytest.raises(ValueError, match="prefix must have fewer tokens than max_new_tokens"):
        caption_shards(tiny, [tmp_path / "missing.tar"], tmp_path / "out", words)
    with pytest.raises(ValueError, match="prefix must have fewer tokens than max_new_tokens"):
        caption_files(tiny, ["missing.jpg"], tmp_path / "out/captions.jsonl", words)
    assert not (tmp_path / "out").exists()


def test_folders_and_names_that_would_lose_data_are_refused(tiny, tmp_path):
    for name in ("a/00000.tar", "b/00000.tar"):
        write_shard(tmp_path / name, sample(1))
    with pytest.raises(ValueError, match=r"shards must have different names, got two 00000.tar"):
        caption_shards(tiny, find_shards(str(tmp_path / "*/*.tar")), tmp_path / "out")
    with pytest.raises(ValueError, match="the folder must not be that of the shards, got"):
        caption_shards(tiny, [tmp_path / "a/00000.tar"], tmp_path / "a")
    assert are_shards(str(tmp_path / "a"))
    assert are_shards(str(tmp_path / "a/{00000..00003}.tar"))
    assert not are_shards(str(tmp_path))
    (tmp_path / "a/photo.jpg").write_bytes(picture(1, "jpg"))
    with pytest.raises(ValueError, match=r"a folder must hold tar shards or images, got both in .*photo.jpg"):
        are_shards(str(tmp_path / "a"))


def test_a_process_that_outlived_its_run_keeps_others_from_its_folder(tiny, tmp_path, monkeypatch):
    shard, folder = tmp_path / "in/00000.tar", tmp_path / "out"
    write_shard(shard, sample(1))
    (folder / PARTS).mkdir(parents=True)
    monkeypatch.setattr(module, "refuse_other_writers", lambda files: real(files, patience=0.0))
    monkeypatch.setattr(module, "RunLock", lambda folder: RunLock(folder, patience=0.0))
    real = __import__("grr.checkpoint.run_lock", fromlist=["x"]).refuse_other_writers
    with (folder / PARTS / ".rank1.lock").open("ab") as held:
        lock(held.fileno())
        with pytest.raises(BlockingIOError, match=r"\.rank1\.lock must have no writer, got one of an earlier run"):
            caption_shards(tiny, [shard], folder)
    assert caption_shards(tiny, [shard], folder)[0].read == 1


def test_errors_of_an_interrupted_shard_are_tried_again_and_more_shards_are_added(tiny, tmp_path):
    shard, folder = tmp_path / "in/00000.tar", tmp_path / "out"
    write_shard(shard, [member for i in range(3) for member in sample(i)])
    outputs = {shard: CaptionedShard(folder, shard)}
    (folder / PARTS).mkdir(parents=True)
    outputs[shard].log(0).write_text('{"file": "00000.tar/000001.png", "error": "Input/output error"}\n')
    shutil.copy(shard, tmp_path / "in/00001.tar")
    made = module.captions_made_with(tiny, None, None) | {"write_tar": False}
    module.write_made_with(folder, made)
    assert caption_shards(tiny, [shard], folder)[0].skipped.total() == 0
    records, count = caption_shards(tiny, find_shards(str(tmp_path / "in")), folder)
    assert (records.read, count) == (6, 3)


@pytest.mark.parametrize("lost", ["00001.jsonl", "00001.tar"])
def test_a_shard_of_which_a_file_was_removed_is_captioned_again(tiny, tmp_path, lost):
    for number in range(3):
        write_shard(
            tmp_path / f"in/{number:05d}.tar", [m for i in range(3 * number, 3 * number + 3) for m in sample(i)]
        )
    shards, folder = find_shards(str(tmp_path / "in")), tmp_path / "out"
    caption_shards(tiny, shards, folder, write_tar=True)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / lost).unlink()
    left = module._begin(folder, json.loads(before["captions.made_with.json"]), outputs_of(folder, shards))
    assert left == [shards[1]]
    assert not (folder / "00001_stats.json").exists()  # a kill now leaves no counts of files that are not there
    records, count = caption_shards(tiny, shards, folder, write_tar=True)
    assert (records.read, count) == (9, 3)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
