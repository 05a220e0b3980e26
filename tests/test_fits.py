"""Fits are made once, whoever asks, and made again where they were damaged."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch

from harness.results.store import Store
from tests.one_cell import ROOT


def test_a_fit_is_made_once_and_read_back(store: Store) -> None:
    state = {"w": torch.randn(3, 4), "n": torch.tensor(7), "h": torch.ones(2, dtype=torch.bfloat16)}
    first = store.fits.get("k", lambda: state)
    again = Store(store.root).fits.get("k", lambda: pytest.fail("made twice"))
    assert store.fits.made() == ["k"]
    for name, tensor in state.items():
        assert torch.equal(first[name], tensor) and torch.equal(again[name], tensor)
        assert again[name].dtype == tensor.dtype
    assert store.fits.get("nothing", dict) == {} == store.fits.get("nothing", lambda: pytest.fail("made twice"))


@pytest.mark.parametrize("damage", ["cut", "altered", "emptied"])
def test_a_damaged_fit_is_made_again(store: Store, damage: str) -> None:
    store.fits.get("k", lambda: {"w": torch.zeros(100)})
    path = store.root / "fits/k.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-50]
    elif damage == "altered":
        content[-1] ^= 1
    else:
        content.clear()
    path.write_bytes(content)
    assert torch.equal(store.fits.get("k", lambda: {"w": torch.ones(100)})["w"], torch.ones(100))
    assert store.fits.made() == ["k", "k"]


def test_threads_that_want_one_fit_wait_for_it(store: Store) -> None:
    def make() -> dict[str, torch.Tensor]:
        time.sleep(0.1)
        return {"w": torch.ones(1)}

    threads = [threading.Thread(target=store.fits.get, args=("k", make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.fits.made() == ["k"]


def test_a_fit_that_fails_leaves_nothing(store: Store) -> None:
    with pytest.raises(ZeroDivisionError):
        store.fits.get("k", lambda: 1 / 0)
    assert store.fits.made() == []
    assert not list(store.root.glob("fits/*.safetensors"))


HOLDER = """
import sys, time
from harness.results.store import Store
def make():
    print("making", flush=True)
    time.sleep(600)
Store(sys.argv[1]).fits.get("k", make)
"""


def test_a_process_that_dies_while_it_makes_a_fit_holds_nobody_up(store: Store) -> None:
    command = [sys.executable, "-c", HOLDER, str(store.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"making\n"
        holder.kill()
    assert store.fits.get("k", lambda: {"w": torch.ones(1)})["w"] == 1
    assert store.fits.made() == ["k"]
