"""Index of image embeddings on disk, with exact search by text or image."""

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from grr.checkpoint.finite import check_finite_outputs
from grr.checkpoint.run_lock import RunLock
from grr.data.image_files import batches, read_images
from grr.evaluation.retrieval import whole_numbers
from grr.evaluation.zero_shot import embed_texts
from grr.files.atomic import fsync, write_atomic
from grr.files.printable import printable
from grr.files.regular import open_regular_file, read_regular_file
from grr.inference.captioner import Captioner
from grr.inference.pretrained import fingerprint
from grr.inference.results import Outcome
from grr.parallel.device import where_float64_is

FORMAT = 1
BATCH = 50  # images at a time
PART = 1000  # images that are written together, so at most as many are lost by a kill
CHUNK = 16_384  # images compared with all queries at a time
MAX_JSON = 2**26  # bytes of a file of names; 1000 names of the longest allowed paths take 25 million
MAX_DEVIATION = 0.02  # of the length of an embedding from 1; bfloat16 rounds to 0.004


class Hit(NamedTuple):
    """Image in the result of a search."""

    file: str  # absolute path at the time of embedding
    score: float  # cosine similarity


class SearchResult(NamedTuple):
    """Query, a text or an image file, and its hits, best first."""

    query: str
    is_image: bool
    hits: list[Hit]


@dataclass
class Index:
    """Memory-mapped embeddings of n images by one model; a search holds one chunk of them in memory."""

    folder: Path
    model: str  # fingerprint of the model
    model_path: str  # at the time of embedding
    files: list[str]  # [n] absolute paths, in the order of the embeddings
    parts: list[NDArray[np.float32]]  # [m, e] each, unit length

    def __len__(self) -> int:
        return len(self.files)

    def search(self, queries: Tensor, *, top: int = 10) -> list[list[Hit]]:
        """Returns the `top` images nearest to each query, best first: [q, e] of unit length -> q lists.

        Every image is compared. Scores are sums without rounding, so they depend neither on chunks nor on the machine;
        images of equal score keep the order of embedding. Computed on the device of the queries, if it has float64.
        Raises ValueError if top < 1, or if queries are not finite, of unit length and of the width of the index.
        """
        queries = where_float64_is(queries)
        self._check(queries, top)
        wanted = whole_numbers(queries, longest=1.0)  # [q, e]
        best = wanted.new_empty(len(wanted), 0)
        rows = torch.empty(len(wanted), 0, dtype=torch.long, device=wanted.device)
        start = 0
        for part in self.parts:
            for first in range(0, len(part), CHUNK):
                some = whole_numbers(torch.from_numpy(part[first : first + CHUNK]).to(wanted.device), longest=1.0)
                here = torch.arange(start + first, start + first + len(some), device=wanted.device)
                scores = torch.cat((best, wanted @ some.T), 1)  # [q, top + chunk], earlier images to the left
                ids = torch.cat((rows, here.expand(len(wanted), -1)), 1)
                best, order = (x[:, :top] for x in scores.sort(dim=1, descending=True, stable=True))
                rows = ids.gather(1, order)
            start += len(part)
        unit = float(whole_numbers(torch.ones(1, 1), longest=1.0))
        return [
            [Hit(self.files[i], score / unit**2) for i, score in zip(*one, strict=True)]
            for one in zip(rows.tolist(), best.tolist(), strict=True)
        ]

    def _check(self, queries: Tensor, top: int) -> None:
        if top < 1:
            raise ValueError(f"search: top must be at least 1, got {top=}")
        e = self.parts[0].shape[1]
        if queries.dim() != 2 or queries.shape[1] != e:
            raise ValueError(f"search: queries must be [q, {e}], the width of the index, got {list(queries.shape)}")
        if not ((queries.double().norm(dim=1) - 1).abs() < 1e-3).all():  # NaN is not less
            raise ValueError("search: queries must be of unit length; use those of encode_text or encode_image")


def open_index(folder: str | Path, trained: Captioner | None = None) -> Index:
    """Open an index for search; with `trained`, check that it holds embeddings of that model.

    Raises FileNotFoundError if the folder does not hold an index, ValueError if the index is empty, damaged, of a newer
    version, or of another model.
    """
    folder = Path(folder)
    description = _read_description(folder)
    if trained is not None:
        _check_model(folder, description, trained)
    files: list[str] = []
    parts: list[NDArray[np.float32]] = []
    for file in _parts(folder):
        names, embeddings = _read_part(file)
        if parts and embeddings.shape[1] != parts[0].shape[1]:
            raise ValueError(
                f"open_index: all parts must have embeddings of one width, got {parts[0].shape[1]} and "
                f"{embeddings.shape[1]} in {file.with_suffix('.npy')}; delete {file.name} and embed its images again"
            )
        if names:
            files += names
            parts.append(embeddings)
    if not files:
        raise ValueError(f"open_index: {folder} is an index without images; embed some with grr embed")
    return Index(folder, description["model"], description["model_path"], files, parts)


def embed_files(
    trained: Captioner,
    files: Sequence[str],
    folder: str | Path,
    model_path: str | Path,
    *,
    batch_size: int = BATCH,
    progress: bool = False,
) -> Outcome:
    """Add image files to the index in folder, which is created if needed; files that are in it are skipped.

    The index is written in parts of up to 1000 images, each complete or absent, so a killed run continues after the
    last part. An unreadable file does not end the run; left_out.json names them. model_path: where a search finds the
    model. Raises ValueError if the index is damaged or of another model, BlockingIOError if another process writes it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with RunLock(folder):
        if (folder / "index.json").exists():
            _check_model(folder, _read_description(folder), trained)
        else:
            description = {
                "format": FORMAT,
                "model": fingerprint(trained),
                "model_path": str(Path(model_path).absolute()),
            }
            _write_json(folder / "index.json", description)
        _remove_leftovers(folder)
        known = {name for file in _parts(folder) for name in _read_part(file)[0]}
        wanted = [str(Path(file).absolute()) for file in files]
        left = [name for name in dict.fromkeys(wanted) if name not in known]
        before, bad = len(wanted) - len(left), dict[str, str]()
        with tqdm(total=len(wanted), initial=before, desc="embeddings", unit="image", disable=not progress) as bar:
            for some in batches(left, PART):
                names, embeddings = list[str](), list[Tensor]()
                for good, unit, unread in embed_images(trained, some, batch_size=batch_size):
                    names += good
                    embeddings += [unit.cpu()] if good else []
                    bad |= unread
                    bar.update(len(good) + len(unread))
                if names:
                    _write_part(folder, names, torch.cat(embeddings))
        _write_json(folder / "left_out.json", bad)
    return Outcome(len(wanted) - len(bad), before, bad)


def look_up(
    trained: Captioner, index: Index, texts: Sequence[str], images: Sequence[str] = (), *, top: int = 10
) -> tuple[list[SearchResult], dict[str, str]]:
    """Search an index by texts and image files: returns a result per query, in order, and unreadable files -> cause.

    Raises ValueError if a text is blank, or as `Index.search` does.
    """
    if blank := [text for text in texts if not text.strip()]:
        raise ValueError(f"look_up: a text must not be blank, got {blank[0]!r}; write what to search for")
    model, tokenizer, _, _ = trained
    queries = [embed_texts(model, tokenizer, texts, next(model.parameters()).device)] if texts else []
    named, bad = [(text, False) for text in texts], dict[str, str]()
    for good, embeddings, unread in embed_images(trained, images):
        named += [(file, True) for file in good]
        queries += [embeddings] if good else []
        bad |= unread
    hits = index.search(torch.cat(queries), top=top) if queries else []
    return [SearchResult(*query, some) for query, some in zip(named, hits, strict=True)], bad


def as_text(results: Sequence[SearchResult]) -> str:
    """Returns the results for a terminal; files below the working directory have relative paths."""
    blocks = []
    for result in results:
        lines = [f"  {hit.score:6.3f}  {printable(_relative(hit.file))}" for hit in result.hits]
        blocks.append("\n".join([printable(result.query), *lines]))
    return "\n\n".join(blocks)


@torch.no_grad()
def embed_images(
    trained: Captioner, files: Iterable[str], *, batch_size: int = BATCH
) -> Iterator[tuple[list[str], Tensor, dict[str, str]]]:
    """Embed image files; yield for each batch the readable files, float32 [b, e] of unit length, and unreadable files.

    Raises ValueError if the model computes NaN or infinity.
    """
    model, _, image_size, crop = trained
    device = next(model.parameters()).device
    for good, pixels, bad in read_images(files, image_size=image_size, crop=crop, batch_size=batch_size):
        embeddings = torch.empty(0) if pixels is None else model.encode_image(pixels.to(device)).float()
        if good:
            check_finite_outputs("embed_images", embeddings, good)
        yield good, embeddings, bad


def _relative(file: str) -> str:
    path, working = Path(file), Path.cwd()
    return str(path.relative_to(working)) if path.is_relative_to(working) else file


# --- on disk: index.json, and of each part its embeddings, part_00000.npy, and then its files, part_00000.json -------


def _parts(folder: Path) -> list[Path]:
    """Returns the .json files of the parts, in the order in which they were written."""
    numbered = {
        int(match[1]): file
        for file in folder.glob("part_*.json")
        if (match := re.fullmatch(r"part_(\d{5,9})\.json", file.name))
    }
    return [numbered[number] for number in sorted(numbered)]


def _write_part(folder: Path, names: list[str], embeddings: Tensor) -> None:
    number = 1 + max((int(file.stem.removeprefix("part_")) for file in _parts(folder)), default=-1)
    file = folder / f"part_{number:05d}.npy"
    content = io.BytesIO()  # np.save into a file hides the error of a full disk
    np.save(content, embeddings.numpy(), allow_pickle=False)
    file.write_bytes(content.getbuffer())  # becomes a part when its names are written
    fsync(file)
    _write_json(file.with_suffix(".json"), names)


def _remove_leftovers(folder: Path) -> None:
    """Remove unfinished files and embeddings without names, which a killed run left. The caller holds the lock."""
    whole = {file.with_suffix(".npy").name for file in _parts(folder)}
    for file in [*folder.glob("*.json.tmp"), *folder.glob("part_*.npy")]:
        if file.name not in whole:
            file.unlink()


def _read_part(file: Path) -> tuple[list[str], NDArray[np.float32]]:
    """Read and check a part: m names, and finite float32 embeddings of unit length, [m, e]."""
    try:
        names = json.loads(read_regular_file(file, MAX_JSON))
        open_regular_file(file.with_suffix(".npy")).close()
        # mmap_mode "c", copy on write, because torch warns about read-only arrays
        embeddings = np.load(file.with_suffix(".npy"), mmap_mode="c", allow_pickle=False)
        _check_part(names, embeddings)
    except (OSError, ValueError, TypeError, EOFError, RecursionError) as error:
        raise ValueError(
            f"open_index: {file.with_suffix('')} is damaged: {error}; delete {file.name} and embed its images again"
        ) from error
    return names, embeddings


def _check_part(names: Any, embeddings: Any) -> None:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("it must have a list of file names")
    if not isinstance(embeddings, np.ndarray):
        raise ValueError(f"it must have one array of embeddings, got {type(embeddings).__name__}")
    if embeddings.ndim != 2 or len(embeddings) != len(names) or embeddings.dtype != np.float32:
        raise ValueError(f"it has {len(names)} files and {embeddings.dtype} embeddings {list(embeddings.shape)}")
    for first in range(0, len(embeddings), CHUNK):
        lengths = np.linalg.norm(embeddings[first : first + CHUNK].astype(np.float64), axis=1)
        if len(wrong := np.flatnonzero(~(np.abs(lengths - 1) < MAX_DEVIATION))):  # NaN is not less
            raise ValueError(
                "embeddings must be finite and of length 1, got a length of "
                f"{lengths[wrong[0]]:.3g} in row {first + wrong[0]}"
            )


def _read_description(folder: Path) -> dict[str, Any]:
    file = folder / "index.json"
    if not file.exists():
        raise FileNotFoundError(f"open_index: {folder} holds no index; make one with grr embed")
    try:
        description = dict(json.loads(read_regular_file(file, MAX_JSON)))
        version, model, path = (description[key] for key in ("format", "model", "model_path"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"open_index: {file} is not the description of an index ({error!r}); restore it, or embed into a new folder"
        ) from error
    if version != FORMAT:
        raise ValueError(f"open_index: {file} has format {version!r}, this version reads {FORMAT}; upgrade GRR")
    if not isinstance(model, str) or not isinstance(path, str):
        raise ValueError(
            f"open_index: {file} is not the description of an index: model and model_path must be strings, got "
            f"{model!r} and {path!r}; restore it, or embed into a new folder"
        )
    return description


def _check_model(folder: Path, description: dict[str, Any], trained: Captioner) -> None:
    mine = fingerprint(trained)
    if description["model"] != mine:
        raise ValueError(
            f"open_index: {folder} must hold embeddings of this model, {mine}, got those of {description['model']} "
            f"from {description['model_path']}; use that model, or embed the images again into another folder"
        )


def _write_json(file: Path, value: Any) -> None:
    write_atomic(file, json.dumps(value, indent=1))  # ASCII: a file's name need not be UTF-8
