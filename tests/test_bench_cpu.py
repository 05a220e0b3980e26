"""What bench.cpu_step makes of its times, and what a GGUF file costs a step to read."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from bench.cpu_step import row_of
from bench.peers import weights_read


def test_ratios_are_above_one_for_the_faster_and_paired_by_round() -> None:
    times = {
        "HF eager dense": [8.0, 80.0, 8.0],
        "fused dense": [2.0, 20.0, 2.0],
        "fused TEAL": [1.0, 10.0, 1.0],
        "fused TEAL, one thread": [0.5, 5.0, 0.5],
        "llama.cpp Q4_0": [3.0, 30.0, 3.0],
    }
    row = row_of("fused TEAL", 1e6, 16.0, times, [4e6, 4e5, 4e6], ["llama.cpp Q4_0"])
    assert (row["tokens_per_second"], row["milliseconds"], row["megabytes"]) == (1.0, 1000.0, 1.0)
    assert row["roofline_share"] == 0.25, "what the bytes take at the round's own bandwidth, over what it took"
    assert (row["over HF eager dense"], row["over fused dense"], row["over llama.cpp Q4_0"]) == (8.0, 2.0, 3.0)
    assert row["over one thread"] == 0.5


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_is_read_where_it_is_the_head(tmp_path: Path, tied: bool) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    shapes = {"token_embd.weight": (10, 32), "blk.0.ffn_up.weight": (64, 32), "output_norm.weight": (32,)}
    for name, shape in (shapes if tied else shapes | {"output.weight": (10, 32)}).items():
        writer.add_tensor(name, np.zeros(shape, dtype=np.float16 if name.startswith("blk") else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    size, bits = weights_read(tmp_path / "a.gguf")
    assert size == 10 * 32 * 4 + 64 * 32 * 2
    assert bits == pytest.approx(8 * size / (10 * 32 + 64 * 32))
