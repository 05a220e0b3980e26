"""The map in CONTRIBUTING.md is the one that the import graph gives."""

from __future__ import annotations

from tests import house_map


def test_the_map_is_drawn_from_the_house_as_it_stands():
    page = house_map.PAGE.read_text()
    assert page == house_map.written(page), "draw it anew: make written, or python -m tests.house_map"


def test_an_arrow_that_another_leads_to_is_left_out():
    graph = {"top": {"middle", "ground"}, "middle": {"ground"}, "ground": set()}
    assert house_map.nearest("top", graph) == ["middle"]
    assert house_map.nearest("middle", graph) == ["ground"]
    assert house_map.nearest("ground", graph) == []


def test_every_room_says_what_is_there():
    assert all(house_map.about(room) for room in house_map.uses())
