"""Sections of a page that show single samples: retrieval, captions, answers, attention and similarities."""

import base64
import io
from collections.abc import Sequence
from html import escape

import torch
from PIL import Image
from torch import Tensor

from grr.data.images import THUMBNAIL
from grr.evaluation.examples import Answer, AttentionMaps, Caption, Examples, Match, Retrieval
from grr.reports.page import scrolling, section

SMALL = 144  # pixels of an image that is shown beside others in a row
DIM = 165  # of 255: how dark a patch without attention is
DEEPEST = 0.45  # share of colour in the cell of the highest similarity, on which text is still read


def show_examples(examples: Examples) -> str:
    """All sections of the examples that there are, as HTML."""
    return "\n".join(
        [
            show_retrievals(examples.retrievals),
            show_similarities(examples.retrievals, examples.similarities),
            show_captions(examples.captions, _distinct(examples)),
            show_attention(examples.attention),
            show_answers(examples.answers),
            show_training(examples.training),
        ]
    )


def show_retrievals(retrievals: Sequence[Retrieval]) -> str:
    """For each pair the images nearest to its caption, beside the captions nearest to its image."""
    items = []
    for one in retrievals:
        found = "".join(map(_found_image, one.images))
        sentences = "".join(map(_found_caption, one.captions))
        items.append(
            f"<article><blockquote>{escape(one.caption)}</blockquote>"
            f'<ol class=found style="--columns:{len(one.images)}">{found}</ol></article>'
            f"<article class=asked>{picture(one.image, one.caption, side=SMALL)}"
            f"<ol class=sentences>{sentences}</ol></article>"
        )
    note = (
        "A caption and the images nearest to it, then its image and the captions nearest to that, nearest first, with "
        "the cosine similarity. ✓ marks the right one, which follows with its rank if it is not among the nearest five."
    )
    return section(
        "Retrieval in both directions", note, f"<div class=retrievals>{''.join(items)}</div>" if items else ""
    )


def show_similarities(retrievals: Sequence[Retrieval], similarities: Tensor | None) -> str:
    """The cosine similarities of all captions and all images of some pairs, as a table."""
    if similarities is None or not retrievals:
        return ""
    images = "".join(f"<th scope=col>{picture(one.image, one.caption, side=SMALL)}</th>" for one in retrievals)
    highest = max(similarities.max().item(), 1e-6)
    rows = ""
    for i, one in enumerate(retrievals):
        cells = ""
        for j, value in enumerate(similarities[i].tolist()):
            share = DEEPEST * max(value, 0.0) / highest
            cells += f'<td{" class=right" if i == j else ""} style="--share:{share:.0%}">{similarity(value)}</td>'
        rows += f"<tr><th scope=row>{escape(one.caption)}</th>{cells}</tr>"
    table = f"<table class=matrix><thead><tr><td></td>{images}</tr></thead><tbody>{rows}</tbody></table>"
    note = "The cosine similarity of each caption above with each of the images; the pairs are on the diagonal."
    return section("Similarity of the pairs shown", note, scrolling(table))


def show_captions(captions: Sequence[Caption], distinct: str = "") -> str:
    """Images with the captions that the model wrote and their references. distinct: a sentence of the note."""
    items = []
    for one in captions:
        first, *others = one.references or [""]
        exact = _words(one.written) in map(_words, one.references)
        written = f"<p class=written>{escape(one.written) or '<i>(empty)</i>'}"
        written += ' <b class=check title="equal to a reference">✓</b></p>' if exact else "</p>"
        more = "".join(f"<li>{escape(other)}</li>" for other in others)
        more = f"<details><summary>{len(others)} more</summary><ul>{more}</ul></details>" if more else ""
        items.append(
            f"<figure>{picture(one.image, first)}<figcaption>{written}<p class=true>{escape(first)}</p>{more}"
            "</figcaption></figure>"
        )
    note = f"Below each image the caption that the model writes, then its reference; ✓ where they are equal. {distinct}"
    return section("Images and their captions", note, f"<div class=captions>{''.join(items)}</div>" if items else "")


def show_answers(answers: Sequence[Answer]) -> str:
    """Images with the text about them, the predicted class, and the right one where it is another."""
    items = []
    for one in answers:
        right = "none of the classes" if one.right is None else one.right
        check = ' <b class=check title="right">✓</b>' if one.given == one.right else ""
        items.append(
            f"<figure>{picture(one.image, f'{one.text}: {right}')}<figcaption>"
            f"<p class=true>{escape(one.text)}</p><p class=written>{escape(one.given)}{check}</p>"
            f"{'' if check else f'<p class=true>{escape(right)}</p>'}</figcaption></figure>"
        )
    note = "Below each image its text, then the predicted class: ✓ where it is right, else the right one below it."
    return section("Predicted classes", note, f"<div class=captions>{''.join(items)}</div>" if items else "")


def show_training(pairs: Sequence[tuple[Tensor, str]]) -> str:
    """Training images with their captions."""
    items = "".join(
        f"<figure>{picture(image, caption)}<figcaption><p class=true>{escape(caption)}</p></figcaption></figure>"
        for image, caption in pairs
    )
    note = "Images of the training data with their captions. What the model writes follows at the first validation."
    return section("Training data", note, f"<div class=captions>{items}</div>" if items else "")


def show_attention(maps: Sequence[AttentionMaps]) -> str:
    """Images with one map for each word of their caption: the darker a patch, the less the decoder attended to it."""
    items = ""
    for number, one in enumerate(maps):
        words = "".join(
            f"<li>{_overlay(one, number, w, word)}<span>{escape(word)}</span></li>" for w, word in enumerate(one.words)
        )
        items += f"<ol class=words>{words}</ol>"
    note = (
        "The caption that the model writes, word by word. A patch is the brighter, the more the decoder attends to it "
        "while it writes the word: the attention to the queries of the pooler, averaged over heads and layers, times "
        "that of the queries to the patches. The brightest patch of each map is the one with the most attention."
    )
    return section("Attention for each word", note, items)


def picture(image: Tensor, alt: str, *, side: int = THUMBNAIL) -> str:
    """uint8 [3, h, w] -> an <img> that holds its own JPEG, reduced to at most `side` pixels a side, never enlarged."""
    data, width, height = _jpeg(image, side)
    crisp = " class=pixels" if max(width, height) < SMALL // 2 else ""
    return f'<img src="{data}"{crisp} width={width} height={height} alt="{escape(alt)}">'


def similarity(value: float) -> str:
    """A cosine similarity with three decimals."""
    return f"{value:.3f}".replace("-", "−")


def _found_image(match: Match[Tensor]) -> str:
    alt = f"rank {match.rank}, similarity {similarity(match.score)}{', the right image' if match.right else ''}"
    return f"<li{_right(match)}>{picture(match.candidate, alt, side=SMALL)}<span>{_score(match)}</span></li>"


def _found_caption(match: Match[str]) -> str:
    return f"<li{_right(match)}><span>{_score(match)}</span> {escape(match.candidate)}</li>"


def _right(match: Match[Tensor] | Match[str]) -> str:
    return " class=right" if match.right else ""


def _score(match: Match[Tensor] | Match[str]) -> str:
    score = f"<b>✓ {similarity(match.score)}</b>" if match.right else similarity(match.score)
    return f"{score} <em>rank {match.rank:,}</em>" if match.rank > 5 else score


def _distinct(examples: Examples) -> str:
    if not examples.written_captions:
        return ""
    return f"The model wrote {examples.distinct_captions:,} distinct captions for {examples.written_captions:,} images."


def _words(caption: str) -> str:
    return " ".join(caption.split())


def _overlay(maps: AttentionMaps, number: int, w: int, word: str) -> str:
    """An image below the map of word w; the image is in the page once, at the first word."""
    height, width = maps.image.shape[1:]
    size = f'width="{width}" height="{height}"'
    name = f"attended-{number}"
    image = f'<use href="#{name}"/>'
    if w == 0:
        image = f'<image id="{name}" href="{_jpeg(maps.image, THUMBNAIL)[0]}" {size}/>'
    label = escape(f"attention for {word}: most at the {_place(maps.maps[w])}")
    return (
        f'<svg viewBox="0 0 {width} {height}" role=img aria-label="{label}">{image}'
        f'<image href="{_shade(maps.maps[w])}" {size} preserveAspectRatio="none"/></svg>'
    )


def _shade(attention: Tensor) -> str:
    """float [rows, columns] -> a PNG of as many pixels, black, the more transparent, the more attention."""
    alpha = (DIM * (1 - attention / attention.max())).round().to(torch.uint8)
    pixels = torch.stack([torch.zeros_like(alpha), alpha], dim=-1)  # [rows, columns, 2]: grey and alpha
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _place(attention: Tensor) -> str:
    """In which ninth of the image the most attention is, in words."""
    row, column = divmod(int(attention.argmax()), attention.shape[1])
    vertical = ("top", "middle", "bottom")[3 * row // attention.shape[0]]
    return f"{vertical} {('left', 'centre', 'right')[3 * column // attention.shape[1]]}"


def _jpeg(image: Tensor, side: int) -> tuple[str, int, int]:
    """uint8 [3, h, w] -> a JPEG of at most `side` pixels a side as a data URI, its width and its height."""
    small = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}", small.width, small.height
