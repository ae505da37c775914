"""The index finds what comparing every image finds, and knows whose embeddings it holds."""

import copy
import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grr.checkpoint.model_folder import save_model
from grr.checkpoint.run_lock import RunLock
from grr.cli import main
from grr.data.image_files import find_images
from grr.data.images import load_image
from grr.inference import index
from grr.inference.index import Index, as_text, embed_files, look_up, open_index
from grr.inference.pretrained import find_pretrained, fingerprint, load_pretrained

COLOURS = ("red", "green", "blue", "yellow", "white", "black")


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    """Each colour twice, and a file that is no image."""
    (tmp_path / "pictures").mkdir()
    for name in COLOURS:
        for i in range(2):
            Image.new("RGB", (20, 20), name).save(tmp_path / f"pictures/{name}{i}.png")
    (tmp_path / "pictures/no.png").write_bytes(b"no")
    return find_images(tmp_path / "pictures")


@pytest.fixture(scope="module")
def another(colour_run, tmp_path_factory) -> Path:
    """The same model, one of whose weights is another."""
    folder = tmp_path_factory.mktemp("another") / "model"
    model = load_pretrained(colour_run).model
    with torch.no_grad():
        model.contrastive_pooler.queries[0, 0] += 0.1
    save_model(
        folder, model, json.loads((colour_run / "model/config.json").read_text()), colour_run / "tokenizer.model"
    )
    return folder


def made_of(parts: list[torch.Tensor]) -> Index:
    count = sum(map(len, parts))
    return Index(Path("nowhere"), "", "", [f"{i}.jpg" for i in range(count)], [part.numpy() for part in parts])


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    q=st.integers(1, 3),
    top=st.integers(1, 12),
    chunk=st.integers(1, 10),
    copies=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_search_equals_brute_force_for_any_chunks_and_keeps_the_order_of_equal_images(
    lengths, q, top, chunk, copies, seed
):
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    images = F.normalize(torch.randn(count, 8, generator=generator), dim=1)
    if copies:  # few different images, many times
        images = images[torch.randint(0, min(3, count), (count,), generator=generator)]
    queries = F.normalize(torch.randn(q, 8, generator=generator), dim=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "CHUNK", chunk)
        found = made_of(list(images.split(lengths))).search(queries, top=top)
    exact = images.double() @ queries.double().T  # [n, q]
    for j, hits in enumerate(found):
        rows = [int(hit.file.removesuffix(".jpg")) for hit in hits]
        assert len(rows) == min(top, count) == len(set(rows))
        near = [round(exact[i, j].item(), 7) for i in range(count)]  # equal images, whatever sums were rounded to
        assert rows == sorted(range(count), key=lambda i: (-near[i], i))[:top]
        assert [hit.score for hit in hits] == pytest.approx([exact[i, j].item() for i in rows], abs=1e-6)


@pytest.mark.parametrize(
    ("queries", "top", "message"),
    [
        (torch.ones(1, 8), 1, "queries must be of unit length"),
        (torch.full((1, 8), torch.nan), 1, "queries must be of unit length"),
        (torch.ones(1, 7), 1, r"queries must be \[q, 8\], the width of the index, got \[1, 7\]"),
        (torch.eye(8), 0, "top must be at least 1, got top=0"),
    ],
)
def test_a_query_of_another_width_or_length_is_refused(queries, top, message):
    with pytest.raises(ValueError, match=f"search: {message}"):
        made_of([torch.eye(8)]).search(queries, top=top)


def test_stored_embeddings_equal_those_of_single_images(trained, pictures, tmp_path, colour_run):
    outcome = embed_files(trained, pictures, tmp_path / "index", colour_run)
    assert (outcome.done, outcome.before, list(outcome.bad)) == (12, 0, [str(tmp_path / "pictures/no.png")])
    opened = open_index(tmp_path / "index", trained)
    assert opened.files == [file for file in pictures if "no.png" not in file]
    stored = np.load(tmp_path / "index/part_00000.npy")
    assert stored.dtype == np.float32
    with torch.no_grad():
        for file, row in zip(opened.files, stored, strict=True):
            alone = trained.model.encode_image(load_image(file, size=32).unsqueeze(0))[0]
            torch.testing.assert_close(torch.from_numpy(row), alone, atol=1e-5, rtol=1e-5)
    assert "no.png" in (tmp_path / "index/left_out.json").read_text()
    assert isinstance(opened.parts[0], np.memmap)


def test_texts_and_images_find_the_images_of_their_colour(trained, pictures, tmp_path, colour_run):
    embed_files(trained, pictures, tmp_path / "index", colour_run)
    Image.new("RGB", (50, 30), "yellow").save(tmp_path / "asked.jpg")
    (tmp_path / "bad.jpg").touch()
    found, bad = look_up(
        trained,
        open_index(tmp_path / "index", trained),
        ["a blue picture", "a black picture"],
        [str(tmp_path / "bad.jpg"), str(tmp_path / "asked.jpg")],
        top=2,
    )
    assert [(one.is_image, [Path(hit.file).name for hit in one.hits]) for one in found] == [
        (False, ["blue0.png", "blue1.png"]),
        (False, ["black0.png", "black1.png"]),
        (True, ["yellow0.png", "yellow1.png"]),
    ]
    assert bad == {str(tmp_path / "bad.jpg"): "not a readable image: the file is empty"}
    assert as_text(found[:1]).splitlines()[0] == "a blue picture"
    assert as_text(found[:1]).splitlines()[1].endswith("blue0.png")
    with pytest.raises(ValueError, match="look_up: a text must not be blank, got ' '"):
        look_up(trained, open_index(tmp_path / "index"), [" "])


def test_results_have_paths_relative_to_the_working_directory(trained, pictures, tmp_path, colour_run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    embed_files(trained, find_images("pictures"), "index", colour_run)
    found, _ = look_up(trained, open_index("index"), ["a red picture"], top=1)
    assert found[0].hits[0].file == str(tmp_path / "pictures/red0.png")
    assert as_text(found).endswith("  pictures/red0.png")


def test_a_killed_run_continues_after_its_last_part(trained, pictures, tmp_path, colour_run, monkeypatch):
    monkeypatch.setattr(index, "PART", 4)
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    embed_files(trained, pictures, whole, colour_run)
    assert len(list(whole.glob("part_*.npy"))) == 4

    def killed(source: Path, target: Path) -> None:  # when the second part has its embeddings, and not yet their names
        if target.name == "part_00001.json":
            raise KeyboardInterrupt
        os.replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            embed_files(trained, pictures, folder, colour_run)
    assert len(open_index(folder)) == 4
    outcome = embed_files(trained, pictures, folder, colour_run)
    assert (outcome.done, outcome.before) == (12, 4)
    assert open_index(folder).files == open_index(whole).files
    for name in ("part_00000.npy", "part_00001.npy", "part_00002.npy", "part_00003.npy"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_new_images_and_repaired_ones_are_added(trained, pictures, tmp_path, colour_run):
    embed_files(trained, pictures[:5], tmp_path / "index", colour_run)
    Image.new("RGB", (9, 9), "red").save(tmp_path / "pictures/no.png")
    outcome = embed_files(trained, pictures, tmp_path / "index", colour_run)
    assert (outcome.done, outcome.before, outcome.bad) == (13, 5, {})
    assert sorted(open_index(tmp_path / "index").files) == pictures
    assert json.loads((tmp_path / "index/left_out.json").read_text()) == {}


def test_an_index_of_another_model_is_refused(trained, another, pictures, tmp_path, colour_run):
    embed_files(trained, pictures, tmp_path / "index", colour_run)
    other = load_pretrained(another)
    message = rf"index must hold embeddings of this model, \w+, got those of \w+ from {colour_run}; use that model, or"
    for use in (
        lambda: open_index(tmp_path / "index", other),
        lambda: embed_files(other, pictures, tmp_path / "index", another),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    assert len(open_index(tmp_path / "index", trained)) == 12


def test_a_fingerprint_depends_on_neither_the_path_nor_the_precision(colour_run, another, tmp_path):
    shutil.copytree(colour_run / "model", tmp_path / "copy")
    mine = fingerprint(load_pretrained(colour_run))
    assert fingerprint(load_pretrained(tmp_path / "copy")) == mine
    assert fingerprint(load_pretrained(colour_run, dtype=torch.bfloat16)) == mine
    assert fingerprint(load_pretrained(another)) != mine
    cut = load_pretrained(find_pretrained(colour_run).path)._replace(crop="center")
    assert fingerprint(cut) != mine


def test_a_missing_an_empty_and_a_newer_index_have_different_errors(trained, tmp_path, colour_run):
    with pytest.raises(FileNotFoundError, match=r"holds no index; make one with grr embed"):
        open_index(tmp_path)
    (tmp_path / "no.png").touch()
    assert embed_files(trained, [str(tmp_path / "no.png")], tmp_path / "index", colour_run).status == 1
    with pytest.raises(ValueError, match="is an index without images"):
        open_index(tmp_path / "index")
    file = tmp_path / "index/index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
    with pytest.raises(ValueError, match="has format 2, this version reads 1; upgrade GRR"):
        open_index(tmp_path / "index")
    file.write_text("{")
    with pytest.raises(ValueError, match="is not the description of an index"):
        open_index(tmp_path / "index")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "part_00000.npy").unlink(),
        lambda folder: (folder / "part_00000.npy").write_bytes((folder / "part_00000.npy").read_bytes()[:300]),
        lambda folder: (folder / "part_00000.json").write_text('["a.jpg"]'),
        lambda folder: (folder / "part_00000.json").write_text("["),
        lambda folder: (folder / "part_00000.json").write_text("[" * 100_000),
        lambda folder: (folder / "part_00000.json").write_text(json.dumps([["a.jpg"]] * 12)),
        lambda folder: np.save(folder / "part_00000.npy", np.zeros((12, 64), np.float16)),
        lambda folder: np.save(folder / "part_00000.npy", np.full((12, 64), np.nan, np.float32)),
        lambda folder: np.save(folder / "part_00000.npy", np.zeros((12, 64), np.float32)),
        lambda folder: np.save(folder / "part_00000.npy", np.full((12, 64), 1e30, np.float32)),
        lambda folder: np.save(folder / "part_00000.npy", np.array([None] * 12), allow_pickle=True),
        lambda folder: np.savez((folder / "part_00000.npy").open("wb"), np.zeros((12, 64), np.float32)),
        lambda folder: ((folder / "part_00000.npy").unlink(), os.mkfifo(folder / "part_00000.npy")),
    ],
)
def test_a_damaged_part_is_named_with_the_remedy(trained, pictures, tmp_path, colour_run, damage):
    embed_files(trained, pictures, tmp_path / "index", colour_run)
    damage(tmp_path / "index")
    with pytest.raises(ValueError, match=r"part_00000 is damaged.*; delete part_00000.json and embed its images again"):
        open_index(tmp_path / "index")
    (tmp_path / "index/part_00000.json").unlink()
    assert embed_files(trained, pictures, tmp_path / "index", colour_run).done == 12


def test_parts_of_different_widths_are_refused(trained, pictures, tmp_path, colour_run, monkeypatch):
    monkeypatch.setattr(index, "PART", 6)
    embed_files(trained, pictures, tmp_path / "index", colour_run)
    np.save(tmp_path / "index/part_00001.npy", np.eye(5, dtype=np.float32))
    with pytest.raises(ValueError, match=r"embeddings of one width, got \d+ and 5 in .*part_00001.npy; delete part_00"):
        open_index(tmp_path / "index")


@pytest.mark.parametrize("content", ['{"format": 1}', '{"format": 1, "model": 3, "model_path": []}', "[" * 100_000])
def test_a_description_of_another_shape_is_refused(trained, pictures, tmp_path, colour_run, content):
    embed_files(trained, pictures, tmp_path / "index", colour_run)
    (tmp_path / "index/index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index.json is not the description of an index"):
        open_index(tmp_path / "index", trained)


def test_unfinished_files_of_a_killed_run_are_removed_by_the_next(trained, pictures, tmp_path, colour_run):
    embed_files(trained, pictures, tmp_path / "index", colour_run)
    kept = {file.name for file in (tmp_path / "index").iterdir()}
    for name in ("part_00007.json.tmp", "left_out.json.tmp", "part_00007.npy"):
        (tmp_path / "index" / name).write_bytes(b"half")
    embed_files(trained, pictures, tmp_path / "index", colour_run)
    assert {file.name for file in (tmp_path / "index").iterdir()} == kept


def test_a_model_whose_embeddings_are_not_finite_writes_no_index(trained, pictures, tmp_path, colour_run):
    ruined = copy.deepcopy(trained.model)
    with torch.no_grad():
        ruined.contrastive_pooler.queries.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"embed_images: .* must be finite, got NaN .* for '.*black0.png'"):
        embed_files(trained._replace(model=ruined), pictures, tmp_path / "index", colour_run)
    assert list((tmp_path / "index").glob("part_*")) == []


def test_two_processes_do_not_write_one_index(trained, pictures, tmp_path, colour_run, monkeypatch):
    monkeypatch.setattr(index, "RunLock", functools.partial(RunLock, patience=0.0))
    with RunLock(tmp_path), pytest.raises(BlockingIOError, match="is being written by process"):
        embed_files(trained, pictures, tmp_path, colour_run)


def test_the_command_prints_the_error_in_one_line(pictures, tmp_path, colour_run, monkeypatch, capsys):
    monkeypatch.setattr(index, "RunLock", functools.partial(RunLock, patience=0.0))
    with RunLock(tmp_path / "index"):
        assert main(["embed", str(colour_run), pictures[0], "--index", str(tmp_path / "index")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"grr embed: RunLock: {tmp_path / 'index'} is being written by process {os.getpid()} on")
    assert said.count("\n") == 1
