"""Pages of a user's images: with their captions, with their classes, or as the results of a search."""

from collections.abc import Sequence
from html import escape
from itertools import chain
from pathlib import Path

from torch import Tensor

from grr.data.image_files import thumbnails
from grr.inference.index import SearchResult
from grr.inference.results import Row
from grr.reports.charts import percent
from grr.reports.page import header, section, write_page
from grr.reports.samples import picture, similarity

SHOWN = 400  # images on a page: about 4 MB
NAMED = 200  # files that could not be read


def write_captions(path: Path, rows: Sequence[Row], *facts: str) -> Path:
    """Write a page of images and their captions from rows {"file", "caption"} or {"file", "error"}; return its path.

    The page holds thumbnails of the first 400 images. facts: texts for its head, such as the model's name.
    """
    note = "Below each image its caption, then the name of the file."
    return _write(path, "Captions", note, rows, facts)


def write_classes(path: Path, rows: Sequence[Row], *facts: str) -> Path:
    """Write a page of images and their likeliest classes, as `write_captions` does, from rows {"file", "classes",
    "probabilities"}."""
    note = "Below each image the likeliest class, then the classes next to it, then the name of the file."
    return _write(path, "Classes", note, rows, facts)


def write_hits(path: Path, results: Sequence[SearchResult], *facts: str) -> Path:
    """Write a page of queries, texts or images, and the images nearest to each; return its path."""
    files = chain.from_iterable(
        [*([one.query] if one.is_image else []), *(hit.file for hit in one.hits)] for one in results
    )
    shown = dict(thumbnails(dict.fromkeys(files)))
    items = []
    for one in results:
        asked = f"<blockquote>{escape(one.query)}</blockquote>"
        if one.is_image:
            image = _picture(shown[one.query], one.query)
            asked = f"<div class=like><span>images like this one</span>{image}{_name(one.query)}</div>"
        hits = [
            (_picture(shown[hit.file], f"rank {place}"), similarity(hit.score), hit.file)
            for place, hit in enumerate(one.hits, 1)
        ]
        listed = "".join(f"<li>{image}<span>{score}</span>{_name(file)}</li>" for image, score, file in hits)
        items.append(f"<article>{asked}<ol>{listed}</ol></article>")
    note = "The images nearest to each query, nearest first, with the cosine similarity."
    listing = section("Results", note, f"<div class=hits>{''.join(items)}</div>")
    title = f"“{results[0].query}”" if len(results) == 1 and not results[0].is_image else "Search"
    return write_page(path, title, header(title, *facts), listing)


def _write(path: Path, title: str, note: str, rows: Sequence[Row], facts: Sequence[str]) -> Path:
    good, bad = ([row for row in rows if ("error" in row) == wrong] for wrong in (False, True))
    if len(good) > SHOWN:
        note += f" These are the first {SHOWN:,} of {len(good):,}."
    pictures = thumbnails(row["file"] for row in good[:SHOWN])
    figures = [_figure(row, image) for row, (_, image) in zip(good[:SHOWN], pictures, strict=True)]
    counts = [f"{len(good):,} images", *([f"{len(bad):,} could not be read"] if bad else [])]
    images = f"<section><p>{note}</p><div class=captions>{''.join(figures)}</div></section>" if good else ""
    return write_page(path, title, header(title, *facts, *counts), images, _show_bad(bad))


def _figure(row: Row, image: Tensor | str) -> str:
    if "caption" in row:
        text = f"<p class=written>{escape(row['caption']) or '<i>(empty)</i>'}</p>"
        alt = row["caption"]
    else:
        (first, *others), (p, *less) = row["classes"], row["probabilities"]
        text = f"<p class=written>{escape(first)} <i>{percent(p)}</i></p>"
        rest = " <i>·</i> ".join(f"{escape(name)}&nbsp;{percent(q)}" for name, q in zip(others, less, strict=True))
        text += f"<p class=true>{rest}</p>" if rest else ""
        alt = first
    return f"<figure>{_picture(image, alt)}<figcaption>{text}{_name(row['file'])}</figcaption></figure>"


def _picture(image: Tensor | str, alt: str) -> str:
    return f"<div class=gone>{escape(image)}</div>" if isinstance(image, str) else picture(image, alt)


def _name(file: str) -> str:
    return f'<p class=name title="{escape(file)}">{escape(Path(file).name)}</p>'


def _show_bad(bad: Sequence[Row]) -> str:
    if not bad:
        return ""
    more = f"<li>and {len(bad) - NAMED:,} more</li>" if len(bad) > NAMED else ""
    items = "".join(f"<li>{escape(row['file'])}: {escape(row['error'])}</li>" for row in bad[:NAMED])
    return section("Files that could not be read", "", f"<ul class=notes>{items}{more}</ul>")
