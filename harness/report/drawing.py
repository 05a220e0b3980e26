"""Figures as SVG for a page: to the eye what matplotlib draws, in half of its bytes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from matplotlib.figure import Figure

from harness import figures

CLIP, STYLE = "clip-path", "style"
STROKE = re.compile(r"\s*M (\S+) (\S+)\s+L (\S+) (\S+)\s*")
POINT = re.compile(r"([ML]) (\S+) (\S+)\s*")


def svg(fig: Figure) -> str:
    """The figure as SVG on no ground of its own; equal figures give equal bytes."""
    return smaller(figures.draw.encoded(fig, "svg", page=True).decode())


def smaller(drawing: str) -> str:
    """An SVG without what no reader sees: parts of a tenth of a pixel, names, groups, its preamble.

    An error bar and its caps, an element each as matplotlib writes them, become one path with those beside them; looks
    and clips that occur again and again are told once.
    """
    root = ElementTree.fromstring(drawing)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {name.rpartition("}")[2]: text for name, text in element.attrib.items()}
        element.attrib = attributes if element.tag == "image" else {n: _rounded(text) for n, text in attributes.items()}
        element.tail = element.tail if element.tag == "tspan" else None
        element.text = element.text if element.tag in ("text", "tspan", STYLE) else None
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
    marks = {f"#{mark.get('id')}": mark for mark in root.iter("path") if "id" in mark.attrib}
    body = _joined(_as_strokes(each, marks) for each in _leaves(root))
    used = {element.get("href") for leaf in body for element in leaf.iter()}
    defined = [*root.iter("clipPath"), *(mark for name, mark in marks.items() if name in used)]
    head = Element("defs")
    head.extend([*root.iter(STYLE), *defined])
    root[:] = [head, *_gathered(body, CLIP)]
    for row in [root, *root.findall("g")]:
        row[:] = _gathered(row, STYLE, "use")
    _tell_looks_once(root, head)
    _shorten_names(root, defined)
    for path in root.iter("path"):
        path.set("d", _short(path.get("d", "")))
    root.set("xmlns", "http://www.w3.org/2000/svg")
    return ElementTree.tostring(root, encoding="unicode").replace(" />", "/>")


def _rounded(text: str) -> str:
    """An attribute with tenths of a pixel. Words between tags have none, a tick at 0.25 is no 0.2; nor has opacity."""
    text = re.sub(r"(?<!opacity: )-?\b\d+\.\d{2,}", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), text)
    return re.sub(r"; stroke-line(cap|join): (square|miter)", "", text).replace("; ", ";").replace(": ", ":")


def _leaves(parent: Element, clip: str | None = None) -> Iterator[Element]:
    """What is drawn, in order, each with its own clip; groups that have nothing but a name are left out."""
    for child in parent:
        if child.tag in ("metadata", "defs"):
            continue
        child.attrib.pop("id", None)
        if child.tag == "g" and not child.attrib.keys() - {CLIP}:
            yield from _leaves(child, child.get(CLIP, clip))
            continue
        if clip and "transform" in child.attrib:  # the clip is not turned and stretched with it
            group = Element("g", {CLIP: clip})
            group.append(child)
            yield group
            continue
        if clip:
            child.set(CLIP, clip)
        yield child


def _as_strokes(element: Element, marks: dict[str, Element]) -> Element:
    """A mark that is one stroke, the cap of an error bar or a tick, as a path of its own; all else as it is."""
    mark = marks.get(element.get("href", ""))
    ends = None if mark is None else STROKE.fullmatch(mark.get("d", ""))
    if mark is None or ends is None:
        return element
    x, y = float(element.get("x", 0)), float(element.get("y", 0))
    places = [round(float(end) + (y if odd else x), 1) for end, odd in zip(ends.groups(), (0, 1, 0, 1), strict=True)]
    look = _look(element) | _look(mark)
    look.pop("fill", None)  # a stroke holds no ground
    facts = {"d": "M {:g} {:g} L {:g} {:g}".format(*places), STYLE: ";".join(map(":".join, look.items()))}
    return Element("path", facts | ({CLIP: element.attrib[CLIP]} if CLIP in element.attrib else {}))


def _look(element: Element) -> dict[str, str]:
    rules = (rule.partition(":") for rule in element.get(STYLE, "").split(";"))
    return {name.strip(): value.strip() for name, _, value in rules if value}


def _joined(elements: Iterable[Element]) -> list[Element]:
    """Strokes in a row that look alike as one path, unless they are translucent: where they cross it would show."""
    joined: list[Element] = []
    for element in elements:
        same = joined and _all_but_place(joined[-1]) == _all_but_place(element)
        if same and _is_stroke(element) and _is_stroke(joined[-1]):
            joined[-1].set("d", f"{joined[-1].get('d')} {element.get('d')}")
        else:
            joined.append(element)
    return joined


def _all_but_place(element: Element) -> dict[str, str]:
    return {name: text for name, text in element.attrib.items() if name != "d"}


def _is_stroke(element: Element) -> bool:
    return (
        element.tag == "path" and "opacity" not in element.get(STYLE, "") and not STROKE.sub("", element.get("d", "z"))
    )


def _gathered(row: Iterable[Element], name: str, tag: str = "") -> list[Element]:
    """Elements in a row, those in turn that share an attribute in a group that has it instead of them.

    tag: the only elements that are gathered.
    """

    def shared(element: Element) -> str | None:
        text = element.get(name) if tag in ("", element.tag) else None
        return None if text and "opacity" in text else text  # a group is translucent as a whole

    gathered: list[Element] = []
    for text, some in groupby(row, shared):
        elements = list(some)
        if text is not None and len(elements) > 1:
            for element in elements:
                del element.attrib[name]
            group = Element("g", {name: text})
            group.extend(elements)
            elements = [group]
        gathered += elements
    return gathered


def _tell_looks_once(root: Element, head: Element) -> None:
    """Looks that occur again and again become classes."""
    counts = Counter(element.get(STYLE) for element in root.iter() if STYLE in element.attrib)
    names = {look: f"s{n}" for n, look in enumerate(look for look, count in counts.items() if count > 1)}
    for element in root.iter():
        if element.get(STYLE) in names:
            element.set("class", names[element.attrib.pop(STYLE)])
    rules = Element(STYLE)
    rules.text = "".join(f".{name}{{{look}}}" for look, name in names.items())
    head.append(rules)


def _shorten_names(root: Element, defined: Iterable[Element]) -> None:
    """Names of marks and clips in two letters where they have eleven."""
    names = {str(each.get("id")): f"{str(each.get('id'))[0]}{n:x}" for n, each in enumerate(defined)}
    for element in root.iter():
        for attribute in ("id", "href", CLIP):
            if attribute in element.attrib:
                element.set(
                    attribute, re.sub(r"\w{6,}", lambda name: names.get(name[0], name[0]), element.attrib[attribute])
                )


def _short(path: str) -> str:
    """A path of lines told from point to point, in tenths of a pixel; of any other only the blanks go."""
    points = POINT.findall(path)
    if POINT.sub("", path):
        return re.sub(r"\s*([A-Za-z])\s*", r"\1", path).strip()
    told, (x0, y0), last = [], (0, 0), ""
    for command, *place in points:
        x, y = (round(10 * float(number)) for number in place)
        across, down = x - x0, y - y0
        if command == "M":
            step = f"M{_tenths(x)}{_after(_tenths(y))}"
        elif across and down:
            step = f"l{_tenths(across)}{_after(_tenths(down))}"
        elif across or down:
            step = f"h{_tenths(across)}" if across else f"v{_tenths(down)}"
        else:
            continue
        told.append(_after(step[1:]) if step[0] == last == "l" else step)
        (x0, y0), last = (x, y), step[0]
    return "".join(told)


def _tenths(number: int) -> str:
    return re.sub(r"^(-?)0(?=\.)", r"\1", f"{number / 10:g}")


def _after(text: str) -> str:
    """What follows a number needs a blank, if no sign sets it off."""
    return text if text.startswith("-") else f" {text}"
