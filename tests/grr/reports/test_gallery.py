"""The pages show each image beside what was said of it, and need nothing but themselves."""

import base64
import io
import re
import weakref
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from grr.inference.index import Hit, SearchResult
from grr.reports import gallery
from grr.reports.gallery import write_captions, write_classes, write_hits

ODD = 'new\nline & <b>"ü.png'


class Page(HTMLParser):
    """The pictures of a page, their texts, and every address that it names."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.images: list[tuple[Image.Image, str]] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.add(tag)
        values = dict(attributes)
        self.addresses += [values[key] for key in ("src", "href") if key in values]
        if tag == "img":
            data = base64.b64decode(values["src"].partition(",")[2])
            self.images.append((Image.open(io.BytesIO(data)), values["alt"]))

    def handle_data(self, data) -> None:
        self.text += data


def pictures(folder: Path, *names: str) -> list[str]:
    for name in names:
        Image.new("RGB", (600, 300), name.split(".")[0]).save(folder / name)
    return [str(folder / name) for name in names]


def colour(image: Image.Image) -> tuple[int, ...]:
    return tuple(round(value / 255) for value in image.getpixel((1, 1)))


def test_captions_stand_beside_their_images_and_bad_files_at_the_end(tmp_path):
    red, blue = pictures(tmp_path, "red.png", "blue.png")
    odd = str(tmp_path / ODD)
    Image.new("RGB", (4, 4), "lime").save(odd)
    rows = [
        {"file": red, "caption": "one <i>"},
        {"file": "torn.jpg", "error": "cut & gone"},
        {"file": blue, "caption": "two"},
        {"file": odd, "caption": ""},
    ]
    page = Page(write_captions(tmp_path / "page.html", rows, "runs/<mine>"))
    assert [(colour(image), image.size, alt) for image, alt in page.images] == [
        ((1, 0, 0), (224, 112), "one <i>"),
        ((0, 0, 1), (224, 112), "two"),
        ((0, 1, 0), (4, 4), ""),
    ]
    for text in ("one <i>", "(empty)", ODD, "runs/<mine>", "3 images", "1 could not be read", "torn.jpg: cut & gone"):
        assert text in page.text
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)


def test_an_image_that_is_gone_leaves_its_place(tmp_path):
    rows = [{"file": str(tmp_path / "gone.png"), "caption": "it was here"}]
    page = Page(write_captions(tmp_path / "page.html", rows))
    assert page.images == []
    assert re.search(r"No such file or directory\s*it was here\s*gone.png", page.text)


def test_a_page_of_many_images_says_how_many_it_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "SHOWN", 2)
    monkeypatch.setattr(gallery, "NAMED", 1)
    rows = [{"file": file, "caption": "x"} for file in pictures(tmp_path, "red.png", "blue.png", "lime.png")]
    page = Page(write_captions(tmp_path / "page.html", rows + [{"file": "a", "error": "b"}] * 3))
    assert len(page.images) == 2
    assert "These are the first 2 of 3." in page.text
    assert "and 2 more" in page.text


def test_classes_stand_with_their_probabilities(tmp_path):
    (red,) = pictures(tmp_path, "red.png")
    rows = [{"file": red, "classes": ["fox", "<owl>"], "probabilities": [0.75, 0.2]}]
    page = Page(write_classes(tmp_path / "page.html", rows))
    assert [(colour(image), alt) for image, alt in page.images] == [((1, 0, 0), "fox")]
    assert "fox 75.0\u202f%" in page.text
    assert "<owl>\u00a020.0\u202f%" in page.text


def test_hits_stand_in_order_below_what_was_looked_for(tmp_path):
    red, blue = pictures(tmp_path, "red.png", "blue.png")
    found = [SearchResult("<what>", False, [Hit(blue, 0.5), Hit(red, -0.25)]), SearchResult(red, True, [Hit(red, 1.0)])]
    page = Page(write_hits(tmp_path / "page.html", found, "among 2 images"))
    assert [colour(image) for image, _ in page.images] == [(0, 0, 1), (1, 0, 0), (1, 0, 0), (1, 0, 0)]
    assert re.search(r"<what>\s*0\.500\s*blue.png\s*−0\.250\s*red.png\s*images like this one", page.text)
    assert re.search(r"images like this one\s*red.png\s*1\.000\s*red.png", page.text)
    assert "what" not in page.tags


def test_scores_and_several_captions_are_shown_and_filtered_images_counted(tmp_path):
    red, blue = pictures(tmp_path, "red.png", "blue.png")
    rows = [
        {"file": red, "caption": ["one", "other"], "likelihood": [-1.234, -2.5], "cosine": [0.31, 0.1]},
        {"file": blue, "filtered": "cosine below 0.2", "rejected": ["two"], "likelihood": -1.0, "cosine": 0.1},
    ]
    page = Page(write_captions(tmp_path / "page.html", rows))
    assert [(colour(image), text) for image, text in page.images] == [((1, 0, 0), "one")]
    assert "one -1.23 · 0.31other -2.50 · 0.10" in page.text
    assert "1 without a caption" in page.text
    assert "two" not in page.text


def test_a_page_holds_the_rows_that_it_shows_and_no_others(tmp_path):
    """However many rows are read: memory must not grow with the number of images."""

    class Counted(dict):
        pass

    (red,) = pictures(tmp_path, "red.png")
    alive, most = weakref.WeakSet(), 0

    def rows():
        nonlocal most
        for i in range(3000):
            key = "error" if i % 3 == 0 else "caption"
            row = Counted({"file": red, key: "x"})
            row.__class__.__hash__ = object.__hash__
            alive.add(row)
            most = max(most, len(alive))
            yield row

    path = write_captions(tmp_path / "page.html", rows())
    assert most <= gallery.SHOWN + gallery.NAMED + 2
    text = Page(path).text
    assert "These are the first 400 of 2,000" in text
    assert "1,000 could not be read" in text
    assert "and 800 more" in text
