"""Shared fixtures. Tests never touch the network; the embedded model comes from the cache that set-up filled."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Files that take longest begin first, so that no worker ends long after the others (`--no-loadscope-reorder` lets xdist
# keep this order; it would begin with the files of most tests).
LONGEST = (
    *("slurm", "cli", "chaos", "notebooks", "families_matrix", "training", "clean", "kernels_triton_step"),
    *("kernels_triton_parts", "kernels_triton", "kernels_cpu", "kernels_cpu_loaded", "kernels_cpu_edges"),
    *("lowbit", "experiments", "simulation", "heads_by_sequence", "methods", "families", "bad_input", "users_walk"),
    *("html_report", "archive", "fused_cpu", "kv_skip", "lm", "wheel", "store", "text", "manual"),
)


def pytest_collection_modifyitems(items):
    """Sort files by how long they take, and nothing within a file."""
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def embedded_dir():
    """Folder of the embedded model."""
    from harness.data.assets import embedded_model_dir

    return embedded_model_dir()


@pytest.fixture(scope="session")
def tokenizer(embedded_dir):
    """The embedded model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded_dir)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tokenizer):
    """A tiny random Llama with the real tokenizer, as a local folder."""
    from tests.tiny import save_with_tokenizer

    return save_with_tokenizer(tmp_path_factory.mktemp("tiny"), tokenizer)


@pytest.fixture(scope="session")
def forks():
    """What commands are forked from, with all imports done."""
    from tests.forks import Forks

    kept = Forks()
    yield kept
    kept.close()


@pytest.fixture
def store(tmp_path: Path):
    """A store in a new folder."""
    from harness.results.store import Store

    return Store(tmp_path / "results")


@pytest.fixture(params=["avx512vnni", "avx512", "avx2", "generic"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine has, while the test runs."""
    from kernels.cpu import instruction_set

    before = instruction_set()
    try:
        instruction_set(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    instruction_set(before)


@pytest.fixture
def poisoned_outputs() -> Iterator[None]:
    """Every new tensor starts as NaN: an output that a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def runner(tiny_folder, forks, tmp_path: Path):
    """run.py on a tiny model, in an empty folder."""
    from tests.runner import Runner

    return Runner(tiny_folder, tmp_path, forks)
