"""What a decision sees: one value object, refused where it says nothing."""

import pytest

from harness.model.sees import INPUT, Sees, residual


@pytest.mark.parametrize(("point", "back"), [("input", 1), ("gate", 2), ("residual", -1)])
def test_only_the_residual_stream_lies_blocks_back(point, back):
    with pytest.raises(ValueError, match=f"{back} blocks back at {point}"):
        Sees(point, back)


def test_it_is_a_value():
    assert residual(2) == Sees("residual", 2) != residual(1)
    assert {INPUT: 1}[Sees("input")] == 1
    assert str(residual(2)) == "residual, 2 blocks back" and str(INPUT) == "input"
