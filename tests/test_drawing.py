"""A figure on the report's page: small, and to the eye what was drawn."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from harness.figures import draw
from harness.report import drawing

SVG = "{http://www.w3.org/2000/svg}"


def wrapped(body: str) -> str:
    head = (
        '<?xml version="1.0"?>\n<svg xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg">\n'
    )
    return f"{head}<metadata>when</metadata>{body}</svg>"


@pytest.fixture(scope="module")
def figure() -> Figure:
    fig = Figure(figsize=(4, 3))
    left, right = fig.subplots(1, 2)
    x = np.arange(5)
    for line in range(3):
        left.errorbar(x, x + line, 0.5 + x / 10, marker="o", capsize=2, label=f"line {line}")
    left.axhspan(1, 2, alpha=0.07)
    right.imshow(x.reshape(1, 5), interpolation="none", aspect="auto")
    return fig


def test_words_stay_and_places_are_rounded() -> None:
    small = drawing.smaller(
        wrapped('<g id="text_1">\n <text style="font: 8px; opacity: 0.07" x="10.256">0.25, a: b; c</text>\n</g>')
    )
    assert ">0.25, a: b; c</text>" in small and 'x="10.3"' in small and "font:8px;opacity:0.07" in small
    assert "text_1" not in small and "when" not in small and "<g" not in small


def test_a_cap_is_a_stroke_at_its_place_and_joins_its_neighbours() -> None:
    body = (
        '<defs><path id="mcap0000000" d="M 2 0 L -2 0" style="stroke: #d55e00"/></defs>'
        '<g clip-path="url(#pabcdefabcd)">'
        '<use xlink:href="#mcap0000000" x="10" y="20.25" style="fill: #d55e00"/>'
        '<use xlink:href="#mcap0000000" x="30.5" y="7" style="fill: #d55e00"/></g>'
        '<defs><clipPath id="pabcdefabcd"><rect width="50" height="50"/></clipPath></defs>'
    )
    root = ElementTree.fromstring(drawing.smaller(wrapped(body)))
    [path] = root.iter(f"{SVG}path")
    assert path.attrib == {"d": "M12 20.2h-4M32.5 7h-4", "style": "stroke:#d55e00", "clip-path": "url(#p0)"}
    assert [clip.get("id") for clip in root.iter(f"{SVG}clipPath")] == ["p0"]


def test_what_shows_through_is_not_joined() -> None:
    line = '<path d="M 0 0 L 9 9" style="opacity: 0.5; stroke: #000000"/>'
    assert drawing.smaller(wrapped(2 * line)).count("<path") == 2


def test_a_group_that_says_something_stays() -> None:
    small = drawing.smaller(wrapped('<g id="a" transform="scale(2)"><path d="M 0 0 L 9 9"/></g>'))
    assert '<g transform="scale(2)"><path d="M0 0l9 9"/></g>' in small


def places(path: str) -> list[tuple[float, float]]:
    """The points that a path of lines goes through."""
    found, at = [], np.zeros(2)
    for command, numbers in re.findall(r"([MLlhv])([^MLlhv]*)", path):
        values = [float(number) for number in re.findall(r"-?\d*\.?\d+", numbers)]
        across = values if command == "h" else [0.0] if command == "v" else values[::2]
        down = values if command == "v" else [0.0] if command == "h" else values[1::2]
        for step in zip(across, down, strict=True):
            at = np.array(step) if command in "ML" else at + step
            found.append(tuple(at.round(1)))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_a_path_told_from_point_to_point_goes_through_the_same_points(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.integers(-30, 31, size=(40, 2)) / 10
    commands = ["M", *rng.choice(["L", "L", "L", "M"], size=39)]
    path = " ".join(f"{command} {x:g} {y:g}" for command, (x, y) in zip(commands, points, strict=True))
    wanted = [
        tuple(point)
        for i, point in enumerate(points.round(1))
        if commands[i] == "M" or i == 0 or tuple(point) != tuple(points[i - 1])
    ]
    assert places(drawing._short(path)) == wanted


def test_curves_keep_their_numbers() -> None:
    assert drawing._short("M 0 3 C 0.8 3 1.6 2.7 2 -2 z ") == "M0 3C0.8 3 1.6 2.7 2 -2z"


def test_a_figure_keeps_its_marks_bars_words_and_maps(figure: Figure) -> None:
    plain = draw.encoded(figure, "svg", page=True).decode()
    small = drawing.svg(figure)
    assert len(small) < 0.5 * len(plain)
    root, before = ElementTree.fromstring(small), ElementTree.fromstring(plain)
    assert [text.text for text in root.iter(f"{SVG}text")] == [text.text for text in before.iter(f"{SVG}text")]
    assert len(list(root.iter(f"{SVG}use"))) == 15  # markers; caps are strokes
    assert sum(path.get("d", "").count("h-4") for path in root.iter(f"{SVG}path")) == 30
    [image] = [each for group in root.iter(f"{SVG}g") if group.get("clip-path") for each in group.iter(f"{SVG}image")]
    assert image.get("width") == "5" and "clip-path" not in image.attrib  # it would be stretched with the image
    ids = {each.get("id") for each in root.iter() if each.get("id")}
    led = set(re.findall(r'(?:href="#|url\(#)(\w+)', small))
    assert led == ids and "opacity:0.07" in small.replace("fill-", "").replace("stroke-", "")
    assert drawing.svg(figure) == small
