"""The colours of charts, told apart by every eye, in both themes: CIEDE2000 under simulated colour blindness."""

import re
from itertools import combinations
from math import atan2, cos, degrees, exp, hypot, radians, sin, sqrt
from pathlib import Path

import numpy as np
import pytest

import grr.reports
from grr.reports.charts import COLORS

# Machado, Oliveira and Fernandes 2009, table of severity 1.0, on linear RGB
VISIONS = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
WHITE = np.array([0.95047, 1.0, 1.08883])


def linear(colour: str) -> np.ndarray:
    """#rrggbb -> linear RGB."""
    c = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> tuple[float, float, float]:
    """Linear RGB -> CIELAB under D65."""
    t = XYZ @ rgb.clip(0, 1) / WHITE
    x, y, z = np.where(t > 216 / 24389, np.cbrt(t), (24389 / 27 * t + 16) / 116)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def ciede2000(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    """The colour difference of two colours in CIELAB (Sharma, Wu and Dalal 2005)."""
    (l1, a1, b1), (l2, a2, b2) = one, other
    c = (hypot(a1, b1) + hypot(a2, b2)) / 2
    stretch = 1.5 - 0.5 * sqrt(c**7 / (c**7 + 25**7))
    a1, a2 = stretch * a1, stretch * a2
    c1, c2 = hypot(a1, b1), hypot(a2, b2)
    h1, h2 = degrees(atan2(b1, a1)) % 360, degrees(atan2(b2, a2)) % 360
    turn = (h2 - h1 + 180) % 360 - 180 if c1 * c2 else 0.0
    hue = (h1 + turn / 2) % 360 if c1 * c2 else h1 + h2
    light, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    t = 1 - 0.17 * cos(radians(hue - 30)) + 0.24 * cos(radians(2 * hue))
    t += 0.32 * cos(radians(3 * hue + 6)) - 0.2 * cos(radians(4 * hue - 63))
    dl = (l2 - l1) / (1 + 0.015 * (light - 50) ** 2 / sqrt(20 + (light - 50) ** 2))
    dc = (c2 - c1) / (1 + 0.045 * chroma)
    dh = 2 * sqrt(c1 * c2) * sin(radians(turn / 2)) / (1 + 0.015 * chroma * t)
    twist = 60 * exp(-(((hue - 275) / 25) ** 2))
    return sqrt(dl**2 + dc**2 + dh**2 - 2 * sqrt(chroma**7 / (chroma**7 + 25**7)) * sin(radians(twist)) * dc * dh)


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [  # of the test data of Sharma, Wu and Dalal 2005
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, -1.3802, -84.2814), (50, 0, -82.7485), 1.0000),
        ((50, 2.49, -0.001), (50, -2.49, 0.0009), 7.1792),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((22.7233, 20.0904, -46.694), (23.0331, 14.973, -42.5619), 2.0373),
        ((2.0776, 0.0795, -1.135), (0.9033, -0.0636, -0.5514), 0.9082),
    ],
)
def test_the_colour_difference_is_the_published_one(one, other, difference):
    assert ciede2000(one, other) == pytest.approx(difference, abs=1e-4)


def themes() -> dict[str, dict[str, str]]:
    css = Path(grr.reports.__file__).with_name("page.css").read_text()
    parts = zip(("light", "dark"), css.split("@media (prefers-color-scheme: dark)"), strict=True)
    return {theme: dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", part)) for theme, part in parts}


def contrast(one: str, other: str) -> float:
    low, high = sorted(float(XYZ[1] @ linear(colour)) + 0.05 for colour in (one, other))
    return high / low


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("vision", VISIONS)
def test_all_colours_of_a_chart_differ_in_every_eye(theme, vision):
    """A comparison may use all ten colours, a training chart the first two or the next two, a matrix b and right."""
    names = {*COLORS, "right"}
    seen = {
        name: np.array(VISIONS[vision]) @ linear(colour) for name, colour in themes()[theme].items() if name in names
    }
    colours = {name: lab(rgb) for name, rgb in seen.items()}
    differences = {a + b: ciede2000(colours[a], colours[b]) for a, b in [*combinations(COLORS, 2), ("b", "right")]}
    assert min(differences.values()) > 10, min(differences, key=differences.__getitem__)
    assert min(differences[pair] for pair in ("ab", "cd")) > 16


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_colour_of_a_chart_stands_out_from_the_page(theme):
    colours = themes()[theme]
    assert all(contrast(colours[name], colours["page"]) >= 3 for name in (*COLORS, "right"))  # WCAG 2.2, 1.4.11
    assert all(contrast(colours[name], colours["page"]) >= 4.5 for name in ("ink", "soft"))  # 1.4.3
