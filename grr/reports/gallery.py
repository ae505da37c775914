"""Pages of a user's images: with their captions, with their classes, or as the results of a search."""

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from itertools import chain
from pathlib import Path

from torch import Tensor

from grr.data.image_files import thumbnails
from grr.data.records import Records
from grr.inference.index import SearchResult
from grr.inference.results import Row
from grr.reports.charts import percent
from grr.reports.page import header, section, write_page
from grr.reports.samples import picture, similarity

BELOW = "Below each image its caption; where it was scored, its log-likelihood per token and its cosine with the image"
SHOWN = 400  # images on a page: about 4 MB
NAMED = 200  # files that could not be read


def write_captions(path: Path, rows: Iterable[Row], *facts: str) -> Path:
    """Write a page of images and their captions from rows {"file", "caption"} or {"file", "error"}; return its path.

    The page holds thumbnails of the first 400 images, and the rows are not held in memory. facts: texts for its head,
    such as the model's name.
    """
    note = f"{BELOW}, then the name of the file."
    return _write(path, "Captions", note, rows, facts)


def write_shard_captions(path: Path, shown: Iterable[tuple[Row, Tensor | str]], records: Records, *facts: str) -> Path:
    """Write a page of some images of shards and their captions, and of the counts of all; return its path.

    shown: rows with thumbnails, or with the reason why there is none.
    """
    figures = [_figure(row, image) for row, image in shown]
    note = f"{BELOW}, then the name of the file. These are {len(figures):,} of {records.read:,}."
    images = f"<section><p>{note}</p><div class=captions>{''.join(figures)}</div></section>" if figures else ""
    reasons = [
        f"<li>{count:,} images: {escape(reason)}: {escape(', '.join(records.names[reason][:5]))}</li>"
        for reason, count in records.skipped.most_common(NAMED)
    ]
    reasons += [f"<li>{escape(damage)}</li>" for damage in records.damaged[:NAMED]]
    skipped = section("Images without a caption", "", f"<ul class=notes>{''.join(reasons)}</ul>") if reasons else ""
    counts = [f"{records.total:,} images", f"{records.skipped.total():,} of them without a caption"]
    return write_page(path, "Captions", header("Captions", *facts, *counts), images, skipped)


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


def _write(path: Path, title: str, note: str, rows: Iterable[Row], facts: Sequence[str]) -> Path:
    good, bad, filtered, count = list[Row](), list[Row](), 0, Counter[bool]()
    for row in rows:
        if "filtered" in row:
            filtered += 1
            continue
        wrong = "error" in row
        count[wrong] += 1
        some, most = (bad, NAMED) if wrong else (good, SHOWN)
        if len(some) < most:
            some.append(row)
    if count[False] > SHOWN:
        note += f" These are the first {SHOWN:,} of {count[False]:,}."
    pictures = thumbnails(row["file"] for row in good)
    figures = [_figure(row, image) for row, (_, image) in zip(good, pictures, strict=True)]
    counts = [f"{count[False]:,} images"]
    counts += [f"{filtered:,} without a caption"] if filtered else []
    counts += [f"{count[True]:,} could not be read"] if bad else []
    images = f"<section><p>{note}</p><div class=captions>{''.join(figures)}</div></section>" if good else ""
    return write_page(path, title, header(title, *facts, *counts), images, _show_bad(bad, count[True]))


def _figure(row: Row, image: Tensor | str) -> str:
    if "caption" in row:
        several = isinstance(row["caption"], list)
        texts = row["caption"] if several else [row["caption"]]
        scores = [_scores(row, i if several else None) for i in range(len(texts))]
        text = "".join(
            f"<p class=written>{escape(caption) or '<i>(empty)</i>'}{score}</p>"
            for caption, score in zip(texts, scores, strict=True)
        )
        alt = texts[0]
    else:
        (first, *others), (p, *less) = row["classes"], row["probabilities"]
        text = f"<p class=written>{escape(first)} <i>{percent(p)}</i></p>"
        rest = " <i>·</i> ".join(f"{escape(name)}&nbsp;{percent(q)}" for name, q in zip(others, less, strict=True))
        text += f"<p class=true>{rest}</p>" if rest else ""
        alt = first
    return f"<figure>{_picture(image, alt)}<figcaption>{text}{_name(row['file'])}</figcaption></figure>"


def _scores(row: Row, i: int | None) -> str:
    """Returns the scores of a row's caption, of its i-th if it has several; empty without scores."""
    if "likelihood" not in row:
        return ""
    likelihood, cosine = (row[key] if i is None else row[key][i] for key in ("likelihood", "cosine"))
    return f" <i>{likelihood:.2f} · {cosine:.2f}</i>"


def _picture(image: Tensor | str, alt: str) -> str:
    return f"<div class=gone>{escape(image)}</div>" if isinstance(image, str) else picture(image, alt)


def _name(file: str) -> str:
    return f'<p class=name title="{escape(file)}">{escape(Path(file).name)}</p>'


def _show_bad(bad: Sequence[Row], count: int) -> str:
    """Returns the first bad files, of `count`."""
    if not bad:
        return ""
    more = f"<li>and {count - NAMED:,} more</li>" if count > NAMED else ""
    items = "".join(f"<li>{escape(row['file'])}: {escape(row['error'])}</li>" for row in bad)
    return section("Files that could not be read", "", f"<ul class=notes>{items}{more}</ul>")
