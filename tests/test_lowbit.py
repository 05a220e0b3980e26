"""Low-bit lines: the format, and the kernels against their plain definition on every instruction set."""

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kernels import lowbit

FEW = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**31)
NARROW = 1e-4  # of a result: one of its 16-bit integers may round to the other side, by 1 of 32767


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off(y: torch.Tensor, expected: torch.Tensor, x: torch.Tensor) -> float:
    """The error over the result's size, or over what weights of unit normals make of x where its sums cancel."""
    size = max(expected.double().norm().item(), x.double().norm().item() * expected.numel() ** 0.5)
    return (y.double() - expected.double()).norm().item() / max(size, 1e-9)


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)).item()


@pytest.mark.parametrize("bits", [4, 8])
@given(st.integers(1, 40), st.integers(1, 300), st.floats(1e-6, 1e6), seeds)
@example(23, 1, 1.0, 14400776)  # a weight 20,000 times smaller than the largest at its place
@FEW
def test_a_weight_is_off_by_half_a_step_at_most(bits, lines, width, scale, seed) -> None:
    """Half the group's scale; int4 has no +8, so the opposite of its largest weight may be off by a whole one.

    And by what the scale's own 16 bits leave: of the largest scale at its place in any line half a bit, times the code.
    """
    w = scale * normal(seed, lines, width)
    packed = lowbit.pack(w, bits)
    groups = torch.nn.functional.pad(w, (0, -width % 32)).unflatten(-1, (-1, 32))
    step = groups.abs().amax(-1) / (8 if bits == 4 else 127)
    off = torch.nn.functional.pad(packed.values() - w, (0, -width % 32)).unflatten(-1, (-1, 32)).abs().amax(-1)
    of_scale = packed.peaks[0, : groups.shape[1]] * (8 if bits == 4 else 127) / 2**16
    assert (off <= step * (1.01 if bits == 4 else 0.51) + 1.01 * of_scale).all()
    assert packed.line_bytes % 64 == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_bits_of_a_weight(bits) -> None:
    """On the shapes of real models what is read comes to the bits, half a bit of scales and little padding."""
    packed = lowbit.pack(normal(0, 64, 8960), bits)
    assert bits + 0.5 <= 8 * packed.line_bytes / 8960 < bits + 0.55


@pytest.mark.parametrize("bits", [4, 8])
@given(st.integers(1, 600), st.integers(1, 300), st.floats(-0.1, 2), st.booleans(), seeds)
@FEW
def test_columns(isa, bits, k, n, t, per_channel, seed) -> None:
    """Integer for integer what the definition says; it says what a product with the weights' values does."""
    x, packed = normal(seed, 1, 1, k), lowbit.pack(normal(seed + 1, k, n), bits)
    limit = t * torch.rand(k, generator=torch.Generator().manual_seed(seed)) if per_channel else torch.tensor(t)
    y = lowbit.columns(x, packed, limit)
    assert y.shape == (1, 1, n)
    kept = torch.where(x.abs() > limit, x, 0)
    assert off(y, lowbit.reference_columns(x, packed, limit), kept) < NARROW
    exact = kept.flatten() @ packed.values()
    size = max(exact.norm().item(), kept.norm().item() * n**0.5)  # sums may cancel
    assert (y.flatten() - exact).norm() <= 2e-3 * size + 1e-12


@pytest.mark.parametrize("bits", [4, 8])
@given(st.integers(1, 300), st.integers(1, 300), st.floats(0, 1), st.booleans(), seeds)
@FEW
def test_lists_of_channels_and_of_rows(isa, bits, k, n, share, narrow, seed) -> None:
    dtype = torch.bfloat16 if narrow else torch.float32
    packed = lowbit.pack(normal(seed, k, n), bits)
    idx = (torch.rand(k, generator=torch.Generator().manual_seed(seed)) < share).nonzero().flatten().int()
    x, z = normal(seed + 1, 1, k).to(dtype), normal(seed + 2, 1, n).to(dtype)
    bar = 8e-3 if narrow else NARROW
    kept = x[:, idx.long()]
    assert off(lowbit.columns(x, packed, idx=idx), lowbit.reference_columns(x, packed, idx=idx), kept) < bar
    assert off(lowbit.rows(z, packed, idx), lowbit.reference_rows(z, packed, idx), z) < bar
    exact = packed.values() @ z.flatten().float()
    assert (
        error(lowbit.rows(z, packed), exact.view(1, k)) < 2e-3 + bar + 2e-3 * z.float().norm() * n**0.5 / exact.norm()
    )


def test_panels_are_the_same_product(isa) -> None:
    w, x = normal(0, 70, 1024), normal(1, 70)
    packed = lowbit.pack(w, 4, panel=256)
    assert torch.equal(packed.values(), lowbit.pack(w, 4).values())
    assert error(lowbit.columns(x, packed), x @ packed.values()) < 1e-3


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_sums_do_not_overflow(isa, bits) -> None:
    """All inputs and all weights as large as can be, of one sign, on more lines than one block of sums holds."""
    packed = lowbit.pack(-torch.ones(1100, 40), bits)
    y = lowbit.columns(torch.ones(1100), packed)
    assert torch.allclose(y, torch.full((40,), -1100.0), rtol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_few_outliers_leave_the_others_their_bits(isa, bits) -> None:
    """As in the second layer of Qwen2.5-Coder-1.5B: an activation 80 times the rest, lines of unlike scales."""
    x = normal(0, 1, 1, 512)
    x[..., [7, 300]] *= 80 / x[..., [7, 300]].abs()
    w = normal(1, 512, 96)
    w[3] *= 30  # what the other lines' scales are counted in
    w[[7, 300]] *= 0.01
    packed = lowbit.pack(w, bits)
    y = lowbit.columns(x, packed)
    assert error(y, x @ packed.values()) < 3e-3
    assert error(y, lowbit.reference_columns(x, packed)) < NARROW
    assert int(lowbit.outliers(x.flatten(), 512).sum()) == 2
    assert not lowbit.outliers(normal(2, 512), 512).any()  # among alike values none is


def test_skipped_lines_are_not_read(isa) -> None:
    """Bytes of a dropped line do not reach the result, whatever they are."""
    w, x = normal(0, 50, 130), normal(1, 50)
    packed = lowbit.pack(w, 4)
    keep = x.abs() > 0.8
    other = packed.codes.clone()
    other[:, ~keep] = 0xFF
    changed = lowbit.Packed(other, packed.peaks, 4, packed.width)
    limit = torch.tensor(0.8)
    assert torch.equal(lowbit.columns(x, packed, limit), lowbit.columns(x, changed, limit))


def test_a_nan_shows_and_zeros_give_zero(isa) -> None:
    packed = lowbit.pack(normal(0, 10, 40), 8)
    x = torch.zeros(10)
    assert torch.equal(lowbit.columns(x, packed), torch.zeros(40))
    assert torch.equal(lowbit.rows(torch.zeros(40), packed), torch.zeros(10))
    x[3] = torch.nan
    assert lowbit.columns(x, packed, torch.tensor(0.5)).isnan().all()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="4 or 8 bits"):
        lowbit.pack(torch.ones(4, 4), 2)
    packed = lowbit.pack(torch.ones(4, 40), 4)
    with pytest.raises(RuntimeError, match="one row of 4"):
        lowbit.columns(torch.ones(5), packed)
    with pytest.raises(IndexError):
        lowbit.rows(torch.ones(40), packed, torch.tensor([4]))
