"""What a row says was skipped, counted again by plain hooks where projections read: none of it is the ledger's."""

from __future__ import annotations

from collections import Counter

import pytest

from harness.execution.attach import attached
from harness.execution.method import Method
from harness.model.step import Policy
from harness.model.view import View
from harness.probes.sparsity import measure
from methods.chess import Chess
from methods.dejavu import DejaVu
from methods.prox import Prox
from tests import tiny

LAYERS, HEADS = tiny.SIZES["num_hidden_layers"], tiny.SIZES["num_attention_heads"]
D, FF = tiny.SIZES["hidden_size"], tiny.SIZES["intermediate_size"]
RANK = 8
Zeros = Counter[str]  # by projection, of all layers and tokens


def seen(view: View, fitted, windows) -> Zeros:
    """Zeros that reach q, o and down, and heads of which nothing reaches o."""
    zeros: Zeros = Counter()

    def see(name: str):
        def hook(_, args) -> None:
            x = args[0]
            zeros[name] += int((x == 0).sum())
            if name == "o_proj":
                zeros["heads"] += int((x.unflatten(-1, (HEADS, -1)) == 0).all(-1).sum())

        return hook

    with attached(view, fitted, Policy()):
        handles = [
            module.register_forward_pre_hook(see(name))
            for layer in view.model.model.layers
            for part in (layer.self_attn, layer.mlp)
            for name, module in part.named_children()
            if name in ("q_proj", "o_proj", "down_proj")
        ]
        for window in windows.split(4):
            view.model(window, use_cache=False)
        for handle in handles:
            handle.remove()
    return zeros


def chess(zeros: Zeros) -> tuple[int, int]:
    """A neuron's row of up and column of down, the gate being read whole; inputs of q and of o. Deciding reads none."""
    return zeros["down_proj"] * 2 * D + zeros["q_proj"] * D + zeros["o_proj"] * D, 0


def prox(zeros: Zeros) -> tuple[int, int]:
    """A neuron's rows of gate and up and its column of down. A quarter of half of gate and up, and a scale a row."""
    return zeros["down_proj"] * 3 * D, LAYERS * 2 * (FF * D // 8 + FF)


def dejavu(zeros: Zeros) -> tuple[int, int]:
    """As much, and a head's rows of q and columns of o. A predictor of two maps of neurons, of one of heads."""
    head = 2 * D * (D // HEADS)
    return zeros["down_proj"] * 3 * D + zeros["heads"] * head, LAYERS * (RANK * (D + FF) + D * HEADS)


@pytest.mark.parametrize(
    ("method", "by_hand"),
    [
        (Chess(0.4), chess),
        (Chess(0.4, attention=False), chess),
        (Prox(0.4), prox),
        (DejaVu(0.4, rank=RANK, epochs=1), dejavu),
    ],
    ids=["chess", "chess without attention", "prox", "dejavu"],
)
def test_a_row_says_what_hooks_of_ones_own_count(method: Method, by_hand) -> None:
    view = tiny.view("llama")
    fitted = [(method, method.fit(view, tiny.calibration(view)))]
    windows = tiny.tokens(6, 32)
    layers = view.model.model.layers
    weights = sum(p.numel() for layer in layers for name, p in layer.named_parameters() if name.endswith("proj.weight"))
    skipped, overhead = by_hand(seen(view, fitted, windows))
    rows = {
        row["metric"]: row["value"]
        for row in measure(view, fitted, Policy(), windows)
        if (row["site"], row["step_phase"], row["layer"]) == ("model", "all", None)
    }
    share = (skipped / windows.numel() - overhead) / weights
    assert rows["achieved"] == pytest.approx(share, abs=1e-9)
    assert rows["skipped_weights"] == pytest.approx(share * weights * windows.numel())
    assert 0.05 < share + overhead / weights < 0.5
