"""The CPU part of docs/latency.md says what the committed runs say, misses included."""

from __future__ import annotations

from typing import Any

from tests import latency_page


def row(variant: str, **figures: float) -> dict[str, Any]:
    return {"variant": variant, "tokens_per_second": 10.0, "bits_a_weight": 4.5, "roofline_share": 0.7, **figures}


def run() -> dict[str, Any]:
    one = {
        "threads": 1,
        "clock": "thread CPU",
        "read_bytes_per_s": 1e10,
        "rows": [
            row("fused dense"),
            row("fused TEAL", **{"over fused dense": 1.625, "over llama.cpp Q4_0": 2.0}),
            row("fused int4 TEAL", **{"over llama.cpp Q4_0": 1.3, "over llama.cpp Q4_1": 1.36}),
            row("llama.cpp Q4_0", **{"over llama.cpp Q4_0": 1.0}),
        ],
    }
    two = one | {"threads": 2, "clock": "wall", "rows": [row("fused dense", **{"over one thread": 0.99})]}
    return {
        "model": "m", "dtype": "bfloat16", "skipped": 0.49, "environment": {"cpu": "a"}, "instruction_set": "avx2",
        "load_average": [0.1, 1.0], "steps": [one, two],
    }  # fmt: skip


def test_the_page_is_that_of_the_committed_runs() -> None:
    page = latency_page.PAGE.read_text()
    assert latency_page.written(page) == page, "run `make written`"


def test_misses_are_named_and_figures_are_the_runs() -> None:
    text = latency_page.run_section(run())
    assert "| fused TEAL | 10.0 | 4.50 | 70 % | 1.62x | 2.00x |" in text
    assert "Goals met: 3 of 5. fused dense 70 % of the byte roofline (goal 75 %); fused int4 TEAL 1.30x over" in text
    assert "Goals met: 0 of 1. fused dense 0.99x over one thread (goal 1.00x)." in text


def test_low_bit_products_that_miss_their_goal_are_named() -> None:
    own = {"model": "7B", "bits": 4, "dense_roofline": 0.6, "half_roofline": 0.5, "goal": 1.4}
    rows = [
        own | {"kernel": "columns up", "half_over_dense": 1.5},
        own | {"kernel": "rows up", "half_over_dense": 1.39},
    ]
    text = latency_page.kernel_section({"kernels": rows, "environment": {"cpu": "a processor"}})
    assert "one thread, a processor:" in text
    assert "| 7B | int4 | 1.50x (60 % / 50 %) | 1.39x (60 % / 50 %) |" in text
    assert text.endswith("Missed: 7B int4 rows up.")
