"""A page that nothing can break out of, whose curves are the numbers of the log."""

import base64
import io
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grr.evaluation.examples import Answer, AttentionMaps, Caption, Examples, Match, Retrieval
from grr.reports.charts import Level, Series
from grr.reports.charts import chart as draw
from grr.reports.training import write_report

VOID = {"meta", "img"}
HOSTILE = """</title></pre></script><script>alert(1)</script><img src=x onerror="alert(1)">' " &amp; &lt; -->"""


class Page(HTMLParser):
    """Elements with their attributes and the text inside them; fails where a tag is not closed by its own."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[int] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(len(self.elements))
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_endtag(self, tag):
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data):
        for element in self.open:
            self.texts[element] += data

    def text(self, tag: str, class_: str | None = None) -> list[str]:
        return [
            text
            for (name, attributes), text in zip(self.elements, self.texts, strict=True)
            if name == tag and attributes.get("class") == class_
        ]


def train(step: int, **values: float | None) -> dict:
    return {
        "split": "train",
        "step": step,
        "epoch": step / 100,
        "loss": 3.0,
        "contrastive_loss": 1.0,
        "captioning_loss": 1.0,
        "perplexity": math.e,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "samples_per_second": 400.0,
        "data_wait": 0.01,
    } | values


def validation(step: int, **values: float | None) -> dict:
    recalls = {f"{way}_r{k}": k / 20 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    losses = {"loss": 3.5, "contrastive_loss": 1.2, "captioning_loss": 1.1, "perplexity": 3.0}
    found = {"caption_exact": 0.25, "num_eval_images": 500}
    return {"split": "validation", "step": step, "epoch": step / 100} | losses | recalls | found | values


def report(folder: Path, rows: list[dict], *, title: str = "a run", examples: Examples | None = None) -> str:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_report(folder, title=title, examples=examples)
    assert path == folder / "report.html"
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith("report")) == ["report.html"]
    return path.read_text(encoding="utf-8")


def picture(seed: int = 0, height: int = 12, width: int = 16) -> torch.Tensor:
    """Smooth, so that a JPEG keeps it."""
    corner = torch.rand(1, 3, 2, 2, generator=torch.Generator().manual_seed(seed)) * 255
    return torch.nn.functional.interpolate(corner, (height, width), mode="bilinear")[0].to(torch.uint8)


def examples_saying(text: str, right: int = 1) -> Examples:
    images = [picture(seed) for seed in range(3)]
    scores, ranks = [0.5, 0.25, -0.125], [1, 2, 3 if right != 2 else 1234]
    retrieval = Retrieval(
        text,
        images[0],
        [Match(images[i], scores[i], ranks[i], i == right) for i in range(3)],
        [Match(text, scores[i], ranks[i], i == right) for i in range(3)],
    )
    return Examples(
        [retrieval],
        [Caption(images[0], text, ["other", text], name=text)],
        similarities=torch.tensor([[0.75]]),
        attention=[
            AttentionMaps(images[0], [text, text], torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)))
        ],
        distinct_captions=1,
        written_captions=2,
        training=[(images[1], text)],
    )


def chart(page: str, title: str) -> str:
    return next(figure for figure in page.split("<figure ") if f"<h3>{title}<" in figure)


def points(chart: str, kind: str) -> np.ndarray:
    """[n, 2]: the points of one curve as someone with a ruler reads them, off the labels of the axes alone."""
    path = re.search(rf'<path class="{kind}" d="([^"]*)"', chart).group(1)
    drawn = np.array(re.findall(r"([\d.]+) ([\d.]+)", path), dtype=float)
    across = re.findall(r"<text class=step x=([\d.]+) y=\d+>([^<]+)<", chart)
    up = re.findall(r'<text x=\d+ y=([\d.]+) dy="[^"]*">([^<]+)<', chart)
    log = json.loads(re.search(r"data-scale='([^']*)'", chart).group(1))["log"]
    return np.stack([ruler(across, drawn[:, 0], log=False), ruler(up, drawn[:, 1], log=log)], axis=1)


def ruler(ticks: list[tuple[str, str]], at: np.ndarray, *, log: bool) -> np.ndarray:
    units = {"k": "e3", "M": "e6"}
    places = np.array([float(place) for place, _ in ticks])
    labels = np.array(
        [float(re.sub("[kM]$", lambda m: units[m[0]], x.replace("−", "-").replace(",", ""))) for _, x in ticks]
    )
    labels = np.log(labels) if log else labels
    slope = (labels[-1] - labels[0]) / (places[-1] - places[0])
    read = labels[0] + slope * (at - places[0])
    return np.exp(read) if log else read


@given(text=st.text(min_size=1).filter(lambda text: "\r" not in text and "\0" not in text))
def test_what_a_caption_says_is_shown_as_said_and_changes_nothing_else(text):
    with TemporaryDirectory() as name:
        pages = []
        for said in (text, "plain"):
            (Path(name) / "config.yaml").write_text(said, encoding="utf-8")
            pages.append(Page(report(Path(name), [train(1)], title=said, examples=examples_saying(said))))
    page, plain = pages
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    assert [sorted(a) for _, a in page.elements] == [sorted(a) for _, a in plain.elements]
    assert page.text("title") == page.text("h1") == page.text("blockquote") == page.text("pre") == [text]
    assert page.text("th")[1:] == [text]  # a row of the similarities
    assert [
        a["aria-label"].partition(": most")[0] for _, a in page.elements if "attention" in str(a.get("aria-label"))
    ] == ([f"attention for {text}"] * 2)
    assert page.text("p", "written") == [f"{text} ✓"]


@given(values=st.lists(st.floats(0.01, 1000), min_size=2, max_size=40), every=st.integers(1, 50_000))
@pytest.mark.parametrize(
    ("title", "key"),
    [
        ("Loss", "loss"),
        ("Throughput", "samples_per_second"),
        ("Gradient norm", "grad_norm"),
        ("Perplexity", "perplexity"),
    ],
)
def test_a_curve_read_off_its_axes_is_the_log(title, key, values, every):
    rows = [train(every * (i + 1), **{key: value}) for i, value in enumerate(values)]
    with TemporaryDirectory() as name:
        figure = chart(report(Path(name), rows), title)
    log = title in ("Gradient norm", "Perplexity")
    steps = every * np.arange(1, len(values) + 1)
    for kind in ("faint a", "line a"):
        read = points(figure, kind)
        np.testing.assert_allclose(read[:, 0], steps, atol=1e-4 * steps[-1])
        seen, true = (np.log(read[:, 1]), np.log(values)) if log else (read[:, 1], np.array(values))
        axis = [0, *true] if title == "Throughput" else true  # whose axis starts at 0; places have two decimals
        np.testing.assert_allclose(seen, true, atol=2e-4 * max(np.ptp(axis), 0.1 * abs(true).max(), 0.1))


@given(values=st.lists(st.floats(0.1, 100), min_size=120, max_size=300))
def test_the_line_through_noise_is_the_exponential_mean(values):
    with TemporaryDirectory() as name:
        page = report(Path(name), [train(i + 1, samples_per_second=v) for i, v in enumerate(values)])
    read = points(chart(page, "Throughput"), "line a")[:, 1]
    decay = 1 - 100 / len(values)
    for i in (0, 7, len(values) - 1):
        weights = decay ** np.arange(i, -1, -1)
        assert read[i] == pytest.approx(np.average(values[: i + 1], weights=weights), abs=2e-4 * max(values))


def test_what_the_pointer_shows_is_what_the_axes_say(tmp_path):
    rows = [train(10 * i, grad_norm=float(i), loss=12.0 - i) for i in range(1, 11)]
    page = report(tmp_path, rows)
    for title in ("Loss", "Gradient norm"):
        figure = chart(page, title)
        scale = json.loads(re.search(r"data-scale='([^']*)'", figure).group(1))
        drawn = np.array(re.findall(r"([\d.]+) ([\d.]+)", re.search(r'"line a" d="([^"]*)"', figure).group(1)), float)
        (x0, x1, left, right), (y0, y1, bottom, top) = scale["x"], scale["y"]
        steps = x0 + (drawn[:, 0] - left) / (right - left) * (x1 - x0)
        values = y0 + (drawn[:, 1] - bottom) / (top - bottom) * (y1 - y0)
        values = 10**values if scale["log"] else values
        np.testing.assert_allclose(np.stack([steps, values], 1), points(figure, "line a"), rtol=2e-3)


def test_a_validation_and_the_way_to_go_are_told_in_figures(tmp_path):
    (tmp_path / "config.yaml").write_text("run:\n  epochs: 6\n  max_steps: null\n")
    rows = [train(150), validation(150, loss=4.0), train(300), validation(300, text_to_image_r1=0.934)]
    page = Page(report(tmp_path, rows))
    header = page.text("header")[0]
    assert "step 300 of 600" in header
    assert "epoch 3.0" in header
    assert page.text("dd") == [
        "93.4\u202f%chance 0.2\u202f%R@5 25.0\u202f%R@10 50.0\u202f%",
        "5.0\u202f%chance 0.2\u202f%R@5 25.0\u202f%R@10 50.0\u202f%",
        "25.0\u202f%first validation, step 150: 25.0\u202f%",
        "3.000first validation, step 150: 3.000",
        "1.200first validation, step 150: 1.200",
        "3.500first validation, step 150: 4.000",
    ]
    assert "of 250" in report_header(tmp_path, "run:\n  epochs: 6\n  max_steps: 250\n", rows)


def test_a_model_that_was_kept_stands_beside_the_start(tmp_path):
    kept = validation(300, loss=1.5, best_step=200) | {"split": "final"}
    page = report(tmp_path, [validation(0, loss=9.5), validation(200, loss=1.5), validation(300, loss=2.5), kept])
    assert "The model in model/, of step 200, retrieval among 500 images." in page
    assert "The lowest validation loss, 1.500, was at step 200; it was 2.500 at step 300" in page
    assert "the run overfits after step 200" in page
    assert "<dt>Loss</dt><dd><b>1.500</b><small>first validation, step 0: 9.500</small></dd>" in page


@pytest.mark.parametrize("steps", [[10], [10, 10], [10, 20]], ids=str)
def test_a_number_has_a_note_only_of_another_validation(tmp_path, steps):
    kept = validation(steps[-1], loss=1.5, best_step=10) | {"split": "final"}
    page = report(tmp_path, [*[validation(step, loss=1.5) for step in steps], kept])
    assert "<dt>Loss</dt><dd><b>1.500</b></dd>" in page


def test_a_later_validation_is_compared_with_the_one_before(tmp_path):
    page = report(tmp_path, [validation(step, loss=5 - step / 100) for step in (100, 200, 300)])
    assert "<dt>Loss</dt><dd><b>2.000</b><small>validation before, step 200: 3.000</small></dd>" in page


@given(peak=st.floats(1e-6, 2e-2))
def test_the_labels_of_an_axis_have_one_notation_and_are_exact(peak):
    curve = Series("train", "a", np.array([1.0, 9.0]), np.array([peak / 3, peak]))
    figure = draw("Learning rate", [curve], unit="", low=0)
    ticks = re.findall(r'<text x=\d+ y=([\d.]+) dy=".35em">([^<]+)<', figure)
    assert len({"e" in label for _, label in ticks if label != "0"}) == 1
    assert len({label for _, label in ticks}) == len(ticks)
    values = [float(label.replace("−", "-")) for _, label in ticks]
    np.testing.assert_allclose(np.diff(values), values[-1] / (len(values) - 1), rtol=1e-6)


@pytest.mark.parametrize(("kept", "side", "place"), [(9, "left", 43), (2, "right", 384), (None, "left", 43)])
def test_the_label_of_a_level_is_away_from_the_line_of_the_kept_step(kept, side, place):
    curve = Series("train", "a", np.array([1.0, 9.0]), np.array([1.0, 2.0]))
    figure = draw("Loss", [curve], unit="nats", levels=[Level("chance", 1.5)], best_step=kept)
    assert f"<text class={side} x={place} " in figure.split("level soft")[1]


def test_tables_that_a_phone_cuts_off_have_a_note(tmp_path):
    page = Page(report(tmp_path, [], examples=examples_saying("a fox")))
    assert page.text("p", "sideways") == ["Scroll the table sideways."]
    style = page.text("style")[0]
    assert "section > .sideways { display: none" in style
    assert "section > .sideways { display: block" in style.split("max-width: 760px")[1]


def test_a_run_whose_last_validation_is_the_lowest_does_not_overfit(tmp_path):
    page = report(tmp_path, [validation(100, loss=2.0), validation(200, loss=2.5), validation(300, loss=1.5)])
    assert "overfits" not in page


def test_a_loss_says_its_weights_and_each_contrastive_curve_its_chance_level(tmp_path):
    told = {"contrastive_weight": 2.0, "captioning_weight": 1.0}
    rows = [train(10) | told | {"contrastive_batch": 768}, validation(10) | told | {"contrastive_batch": 500}]
    page = report(tmp_path, rows)
    assert "Loss = 2 × contrastive + 1 × captioning" in page
    contrastive = chart(page, "Contrastive loss")
    assert "chance among 768 pairs, 2 ln 768" in contrastive
    assert "chance among 500 pairs, 2 ln 500" in contrastive
    (tmp_path / "config.yaml").write_text("loss: {contrastive: sigmoid}")
    assert "chance among" not in chart(report(tmp_path, rows), "Contrastive loss")  # its chance level is another


@given(low=st.floats(0.1, 3.0), size=st.integers(2, 10_000))
def test_a_chance_level_lies_where_its_value_is_on_the_axis(low, size):
    curve = Series("train", "a", np.array([1.0, 9.0]), np.array([low, low + 1]))
    figure = draw("Contrastive loss", [curve], unit="nats", levels=[Level("chance", 2 * math.log(size), "a")])
    (height,) = re.findall(r'class="level a"><path d="M40 ([\d.]+)H', figure)
    scale = json.loads(re.search(r"data-scale='(.*?)'", figure)[1])["y"]
    value = scale[0] + (scale[2] - float(height)) / (scale[2] - scale[3]) * (scale[1] - scale[0])
    assert value == pytest.approx(2 * math.log(size), abs=0.001 * (scale[1] - scale[0]))


@pytest.mark.parametrize("config", ["run: [", "- a list", "run: 3", "", HOSTILE, "run:\n  epochs: ${nowhere}\n"])
def test_a_config_that_cannot_be_read_is_shown_and_no_more(tmp_path, config):
    assert " of " not in report_header(tmp_path, config, [train(10)])


def report_header(folder: Path, config: str, rows: list[dict]) -> str:
    (folder / "config.yaml").write_text(config)
    page = Page(report(folder, rows))
    assert page.text("pre") == [config]
    return page.text("header")[0]


@pytest.mark.parametrize("right", [0, 1, 2])
def test_the_right_one_is_marked_has_its_rank_and_each_image_is_the_one_handed_over(tmp_path, right):
    page = Page(report(tmp_path, [], examples=examples_saying("a fox", right)))
    found = [a for tag, a in page.elements if tag == "li"][:6]  # three images, three captions
    assert [i for i, a in enumerate(found) if a.get("class") == "right"] == [right, 3 + right]
    late = " rank 1,234" if right == 2 else ""
    scores = ["0.500", "0.250", f"−0.125{late}"]
    scores[right] = f"✓ {scores[right]}"
    facts = len(page.text("p", "facts")[0].split("·"))
    assert page.text("span")[facts : facts + 6] == scores * 2
    shown = [a for tag, a in page.elements if tag == "img"]
    assert all(a["alt"] for a in shown)
    for attributes, seed in zip(
        shown, [0, 1, 2, 0, 0, 0, 1], strict=True
    ):  # found, asked, of the matrix, captioned, training
        kind, data = attributes["src"].split(",")
        assert kind == "data:image/jpeg;base64"
        seen = torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(data))))).permute(2, 0, 1)
        assert (seen.float() - picture(seed).float()).abs().mean() < 4


def test_a_map_is_drawn_over_its_image_patch_by_patch(tmp_path):
    shown = examples_saying("fox")
    maps = shown.attention[0].maps
    maps[1] = torch.zeros(3, 4)
    maps[1, 2, 0] = 0.9
    maps[1, 0, 1] = 0.3
    page = Page(report(tmp_path, [], examples=shown))
    layers = [a["href"] for tag, a in page.elements if tag == "image"]
    assert [layer.partition(",")[0] for layer in layers] == ["data:image/jpeg;base64"] + 2 * ["data:image/png;base64"]
    assert [a["href"] for tag, a in page.elements if tag == "use"] == ["#attended-0"]
    shade = np.array(Image.open(io.BytesIO(base64.b64decode(layers[2].partition(",")[2]))))
    assert shade.shape == (3, 4, 2)
    np.testing.assert_allclose(shade[..., 1] / shade.max(), 1 - maps[1].numpy() / 0.9, atol=0.01)
    assert "attention for fox: most at the bottom left" in [a.get("aria-label") for _, a in page.elements]


def test_chance_and_the_kept_step_are_drawn_where_they_are(tmp_path):
    rows = [validation(100 * i, num_eval_images=4, best_step=200) for i in range(1, 5)]
    source = report(tmp_path, rows)
    for title, unit in (("Loss", "nats"), ("R@1", "%"), ("Contrastive loss", "nats"), ("Perplexity", "logarithmic")):
        figure = chart(source, title)
        (at,) = re.findall(r'<g class=best><path d="M([\d.]+) ', figure)
        steps = re.findall(r"<text class=step x=([\d.]+) y=\d+>([^<]+)<", figure)
        assert dict(steps)[at] == "200"
        assert "kept: step 200" in figure
        assert f">{unit}<" in figure
        assert ">optimizer step<" in figure
    (height,) = re.findall(r'class="level soft"><path d="M40 ([\d.]+)H', chart(source, "R@1"))
    ticks = re.findall(r'<text x=\d+ y=([\d.]+) dy=".35em">([^<]+)<', chart(source, "R@1"))
    assert ruler(ticks, np.array([float(height)]), log=False)[0] == pytest.approx(25, abs=0.1)
    assert "chance among 4 images" in source


def test_only_a_caption_equal_to_a_reference_up_to_spaces_gets_its_mark(tmp_path):
    captions = [
        Caption(picture(), written, ["a fox", "the  red fox"])
        for written in ("a fox", "the red fox", "A fox", "a fo", "")
    ]
    captions.append(Caption(picture(), "", []))
    page = Page(report(tmp_path, [], examples=Examples([], captions)))
    assert ["✓" in text for text in page.text("p", "written")] == [True, True, False, False, False, False]


def test_right_answers_are_told_in_figures_and_only_they_get_their_mark(tmp_path):
    rows = [
        {"split": split, "step": step, "loss": 2.0, "accuracy": step / 40, "text_only_accuracy": 0.125}
        for step in (10, 20)
        for split in ("train", "validation")
    ]
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    shown = [Answer(image, HOSTILE, "fox", "fox"), Answer(image, "why", HOSTILE, "owl"), Answer(image, "", "bee", None)]
    source = report(tmp_path, rows, examples=Examples([], [], shown))
    page = Page(source)
    assert page.text("p", "written") == ["fox ✓", HOSTILE, "bee"]
    assert page.text("p", "true") == [HOSTILE, "why", "owl", "", "none of the classes"]
    tile = page.text("dl")[0]
    assert all(
        told in tile for told in ("50.0", "12.5\u202f% from the texts alone", "first validation, step 10: 25.0\u202f%")
    )
    assert "Accuracy: train from 25.00 to 50.00; validation from 25.00 to 50.00" in source


def test_a_large_image_is_reduced_and_keeps_its_shape(tmp_path):
    page = Page(report(tmp_path, [], examples=Examples([], [Caption(picture(0, 600, 900), "a", ["a"])])))
    [shown] = [a for tag, a in page.elements if tag == "img"]
    assert (shown["width"], shown["height"]) == ("224", "149")


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    source = report(tmp_path, [train(1), validation(1)], title=HOSTILE, examples=examples_saying(HOSTILE))
    page = Page(source)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "base")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "data", "poster"):
            assert attributes.get(name, "data:").startswith(("data:", "#"))
    assert "default-src 'none'" in source
    assert not re.search(r"https?:|url\(|@import|//\w+\.", re.sub(r"base64,[^\"]*", "", source))


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [train(1)],
        [validation(0)],
        [train(0, epoch=0.0)],
        [train(10, loss=None, contrastive_loss=None, lr=None, epoch=None, grad_norm=math.inf, perplexity=math.nan)],
        [validation(10, caption_exact=None, num_eval_images=None, text_to_image_r1=None, text_to_image_r5=None)],
        [{"split": "train", "step": 5}, {"split": "validation", "step": 5}],
        [train(10, grad_norm=0.0, loss=-3.0, samples_per_second=0.0)],
    ],
)
def test_a_run_that_has_just_begun_has_a_page(tmp_path, rows):
    source = report(tmp_path, rows, examples=Examples([], []))
    Page(source)
    assert not re.search(r"nan|inf\b|None", source.split("</style>")[1].split("<script>")[0])
    assert ("no numbers yet" in source) == (not rows)


def test_a_folder_without_any_file_has_a_page(tmp_path):
    Page(write_report(tmp_path, title="nothing", examples=None).read_text())


def test_half_a_surrogate_pair_does_not_end_the_run(tmp_path):
    assert Page(report(tmp_path, [], examples=examples_saying("a \ud83d fox"))).text("blockquote") == ["a ? fox"]


def test_a_reader_never_meets_half_a_page(tmp_path, monkeypatch):
    old, replace, seen = report(tmp_path, [train(1)]), os.replace, []

    def spy(source, target):
        seen.append((Path(source).read_text(encoding="utf-8"), Path(target).read_text(encoding="utf-8")))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    new = report(tmp_path, [train(1), train(2)])
    assert seen == [(new, old)]
    assert new.endswith("</html>\n")


def test_a_long_run_has_a_small_page_that_keeps_its_last_and_its_greatest(tmp_path):
    rows = [train(i + 1, grad_norm=1 + i % 7 / 7, loss=3 - i / 10_000, lr=1e-3 - i / 1e8) for i in range(20_000)]
    rows[12_345]["grad_norm"] = 900.0
    page = report(tmp_path, rows + [validation(i) for i in range(100, 20_001, 100)])
    assert len(page) < 150_000
    for title in ("Loss", "Gradient norm", "Learning rate"):
        assert 200 < len(points(chart(page, title), "line a")) <= 300
    spike = points(chart(page, "Gradient norm"), "faint a")
    assert len(spike) <= 300
    assert spike[:, 1].max() == pytest.approx(900, rel=0.01)
    assert spike[spike[:, 1].argmax(), 0] == pytest.approx(12_346, abs=2)
    assert points(chart(page, "Loss"), "faint a")[-1] == pytest.approx([20_000, 1.0001], rel=1e-3)


def test_before_the_first_validation_the_page_shows_training_images_with_their_captions(tmp_path):
    pairs = [(picture(seed), f"caption {seed}") for seed in range(2)]
    page = Page(report(tmp_path, [], examples=Examples([], [], training=pairs)))
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert [image["alt"] for image in images] == ["caption 0", "caption 1"] == page.text("p", "true")
    assert not (tmp_path / "examples.jsonl").exists()  # nothing was written yet
