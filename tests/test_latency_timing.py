"""The clock, memory and others at work, with times that are made up. No test waits, none looks at how fast it was."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import pytest

from harness.probes import latency
from harness.probes.latency import energy, timing, watch
from harness.probes.latency import rows as latency_rows
from harness.probes.latency.timing import Sample
from harness.probes.latency.variants import Variant
from harness.results.rows import make_row
from tests import tiny
from tests.timed import CONFIG, fitted_teal, planned


@pytest.fixture(scope="module")
def teal():
    return fitted_teal()


def test_each_round_begins_with_another_variant_and_pairs_all():
    """A variant that always follows another meets the same cache, the same heat. Rounds stay paired."""
    order: list[int] = []

    def runs(place):
        def once():
            order.append(place)
            return Sample(first=1.0, steps=[float(place + 1)] * 2)

        return once

    seen: list[int] = []
    timings = timing.interleave([runs(i) for i in range(3)], 3, 0.0, after_round=lambda: seen.append(len(order)))
    assert [order[i : i + 3] for i in range(0, len(order), 3)] == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]
    assert seen == [6, 9, 12], "after every round but the warm-up"
    assert [t.rounds for t in timings] == [[1.0] * 3, [2.0] * 3, [3.0] * 3]
    assert timing.ratio(timings[2], timings[0]) == 3.0


def test_rounds_go_on_until_there_is_enough_time_to_decode():
    timings = timing.interleave([lambda: Sample(0.1, [0.5, 0.5])] * 2, repeats=2, min_seconds=4.5)
    assert [len(t.rounds) for t in timings] == [5, 5], "a second a round, five for 4.5 seconds"


def test_peak_memory_is_each_variants_own(teal, monkeypatch):
    """A counter that only rises, as a GPU's does, must be reset for each, once it is attached."""
    view, _ = teal
    peak = {"now": 0, "peak": 0}

    def attaches(size):
        @contextmanager
        def attach():
            peak["peak"] = max(peak["peak"], 10 * size)  # what laying out weights takes for a moment is not the step's
            peak["now"] = size
            yield

        return attach

    def decode(*args):
        peak["peak"] = max(peak["peak"], peak["now"])
        return Sample(0.1, [0.1])

    monkeypatch.setattr(timing, "generate", decode)
    memory = watch.Memory("peak_memory", lambda: peak.update(peak=0), lambda: peak["peak"])
    variants = [Variant("dense", attaches(500)), Variant("kernel", attaches(200))]
    runs = [partial(timing.run, view, tiny.tokens(1, 4), 5, variant, memory) for variant in variants]
    assert [t.memory for t in timing.interleave(runs, 2, 0.0)] == [500, 200]


class Others:
    """Seconds that pass, and what others do meanwhile."""

    def __init__(self, unit, every, *seen):
        self.time, self.seen = 0.0, list(seen)
        self.watch = watch.Watch(lambda: self.seen.pop(0), unit, every, clock=lambda: self.time)

    def wait(self, seconds, at_once=False):
        self.time += seconds
        self.watch.look(at_once)


def test_who_comes_during_the_run_is_seen():
    others = Others("cores", 1.0, 0.0, 0.1, 1.3, 50.0)
    others.wait(0.5)
    others.wait(0.5)
    others.wait(2.0)
    others.wait(0.01, at_once=True)  # too short a look for clocks that tick: counted by its length, never the most
    assert [seen for _, seen in others.watch.looks] == [0.1, 1.3, 50.0]
    assert others.watch.most == 1.3
    assert others.watch.mean == pytest.approx((0.1 + 2 * 1.3 + 0.5) / 3.01)
    assert others.watch.words() == "other processes took 1.1 cores, at most 1.3"
    quiet = Others("cores", 1.0, 0.0, 0.2)
    quiet.wait(1.0)
    assert quiet.watch.words() is None
    gpu = Others("processes", 5.0, 0.0, 2.0, 0.0)
    gpu.wait(6.0)
    gpu.wait(1.0, at_once=True)
    assert gpu.watch.words() == "2 other processes on the GPU"
    before = Others("processes", 5.0, 1.0)
    assert before.watch.words() == "1 other processes on the GPU", "there when the run began"
    unknown = Others("processes", 5.0, float("nan"))
    assert "can't be told" in unknown.watch.words(), "not knowing is not the same as nobody"


def rapl(root, domain, **counters):
    folder = root / domain
    folder.mkdir()
    for file, text in counters.items():
        (folder / file).write_text(f"{text}\n")
    return folder


def test_rapl_counts_packages_and_memory_once_and_goes_on_when_full(tmp_path):
    one = rapl(tmp_path, "intel-rapl:0", name="package-0", energy_uj=900, max_energy_range_uj=1000)
    rapl(tmp_path, "intel-rapl:0:0", name="core", energy_uj=5, max_energy_range_uj=1000)  # part of the package
    memory = rapl(tmp_path, "intel-rapl:0:1", name="dram", energy_uj=0, max_energy_range_uj=1000)
    meter = energy.cpu_meter(tmp_path)
    assert meter.what == "the whole processor and memory by RAPL" and meter.read() == 0
    (one / "energy_uj").write_text("400")
    (memory / "energy_uj").write_text("50")
    assert meter.read() == pytest.approx(550e-6)
    (one / "max_energy_range_uj").unlink()
    assert energy.cpu_meter(tmp_path) is None, "not for this user to read"
    assert energy.cpu_meter(tmp_path / "none") is None


def test_joules_a_token_are_those_of_decode_steps_where_the_device_counts_them(teal, monkeypatch):
    """A counter that rises by 3 J at each look, twice a run; rounds too short for the counter have no row."""
    view, fitted = teal
    looks: list[float] = []

    def read():
        looks.append(3.0 * len(looks))
        return looks[-1]

    variants = planned(view, fitted)[:2]
    told = {}
    for every in (0.0, 1e6):
        monkeypatch.setattr(latency_rows, "meter_of", lambda devices, own=every: energy.Meter(read, "a toy", own))
        rows = latency.measure(view, variants, tiny.tokens(2, 64), CONFIG | {"batch": [1, 2]})
        told[every] = [make_row(cell_id="c", **r) for r in rows if r["metric"] == "energy_per_token"]
    steps = CONFIG["new_tokens"] - 1
    assert [(r["batch"], r["value"], r["unit"], r["n"]) for r in told[0.0]] == [
        (b, pytest.approx(3.0 / (b * steps)), "J/token", b * steps * CONFIG["repeats"]) for b in (1, 1, 2, 2)
    ]
    assert all("counted: a toy" in r["message"] for r in told[0.0])
    assert told[1e6] == [] and len(looks) == 2 * 2 * 2 * 2 * (CONFIG["repeats"] + 1)
    monkeypatch.setattr(latency_rows, "meter_of", lambda devices: None)
    rows = latency.measure(view, variants, tiny.tokens(2, 64), CONFIG)
    assert not [r for r in rows if r["metric"] == "energy_per_token"]


def test_what_others_take_is_the_machines_time_less_our_own(monkeypatch):
    moments = iter([(0.0, 10.0, 1.0), (4.0, 16.0, 5.0)])
    monkeypatch.setattr(watch.CpuNeighbours, "_counters", lambda self: next(moments))
    assert watch.CpuNeighbours()() == pytest.approx((6.0 - 4.0) / 4.0)


def test_every_grid_point_has_a_row_about_others(teal, monkeypatch):
    view, fitted = teal
    monkeypatch.setattr(latency_rows, "watch", lambda device: watch.Watch(lambda: 1.5, "cores", every=0.0))
    rows = latency.measure(view, planned(view, fitted)[:1], tiny.tokens(2, 64), CONFIG | {"batch": [1, 2]})
    about = [make_row(cell_id="c", **r) for r in rows if r["metric"] == "disturbance"]
    assert [(r["batch"], r["value"], r["unit"]) for r in about] == [(1, 1.5, "cores"), (2, 1.5, "cores")]
    assert all("took 1.5 cores" in r["message"] for r in rows if r["metric"] == "tpot_median")
