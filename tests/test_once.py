"""What is kept of a table, and for how long."""

from __future__ import annotations

import gc

import pandas as pd
import pytest

from harness.results.collect import headline
from harness.results.once import once, remembering
from tests import synthetic


def test_one_table_is_asked_once_and_another_or_another_way_again() -> None:
    asked: list[tuple[int, bool]] = []

    @once
    def size(table: pd.DataFrame, twice: bool = False) -> int:
        asked.append((len(table), twice))
        return len(table) * (1 + twice)

    few, many = pd.DataFrame({"x": [1]}), pd.DataFrame({"x": [1, 2]})
    with remembering():
        assert [size(few), size(few), size(many), size(few, True), size(few, twice=True)] == [1, 1, 2, 2, 2]
        assert asked == [(1, False), (2, False), (1, True), (1, True)]
        with remembering():
            assert size(few) == 1 and len(asked) == 4
    few.loc[1] = 3  # who works with a table himself may change it in place
    assert size(few) == 2 and len(asked) == 5


def test_a_table_that_lies_where_one_has_gone_is_not_taken_for_it() -> None:
    @once
    def total(table: pd.DataFrame) -> int:
        return int(table["x"].sum())

    with remembering():
        for number in range(50):
            assert total(pd.DataFrame({"x": [number]})) == number


def test_who_changes_a_headline_changes_his_own() -> None:
    table = synthetic.table()
    with remembering():
        mine = headline(table)
        mine["method"] = "spoilt"
        assert "spoilt" not in set(headline(table)["method"])


@pytest.mark.parametrize("collecting", [True, False])
def test_garbage_is_looked_for_afterwards_if_it_was_before(collecting: bool) -> None:
    was = gc.isenabled()
    try:
        (gc.enable if collecting else gc.disable)()
        with pytest.raises(KeyError), remembering():
            with remembering():
                pass
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == collecting
    finally:
        (gc.enable if was else gc.disable)()
