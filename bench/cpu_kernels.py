"""The sparse CPU kernels against torch and our own dense kernels, on MLP shapes of 135M to 7B models.

    python -m bench.cpu_kernels --out results/bench/cpu_kernels.json

One thread. Each measurement sweeps all the matrices that fit into one 0.5 GiB pool, with an input and so a
zero pattern of its own for each, so that no cache helps. In each round every kernel and one plain read of the
pool take their turn; ratios are taken within a round, and the figures are medians over rounds. The clock is
the thread's CPU time: with one thread it is the wall time less what a neighbour took (`wall_over_cpu` tells
how much that was).

Batches of 2 to 16 rows with 50 % zeros each read the union of their channels: its size is `read_share`.

Rows of the projection "mlp" are a whole gated MLP: neurons from a list, or CATS (its gate stays dense). Those of "rows"
are listed rows of one matrix. Both stand against F.linear and the dense kernels for the same work.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from bench.rounds import in_turn, ratio, sweep
from kernels.cpu import instruction_set, stream

HIDDEN = {"135M": (576, 1536), "360M": (960, 2560), "1.1B": (2048, 5632), "7B": (4096, 11008)}
ZEROS = (0, 25, 40, 50, 65, 80, 90)
BATCHES = (2, 4, 8, 16)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
POOL_BYTES = 2**29 + 2**26
# at 50 % zeros: over F.linear, over own dense, share of the byte roofline by model
GOALS = {
    "fp32": (2.2, 1.5, {"135M": 0.70, "7B": 0.85}),
    "bf16": (2.4, 1.5, {"135M": 0.50, "1.1B": 0.65, "7B": 0.65}),
}


@dataclass(frozen=True)
class Row:
    """One kernel on one shape. Ratios are times over this kernel's time: above 1 this kernel is faster."""

    model: str
    projection: str  # up: hidden -> intermediate; down: the reverse; mlp: gate, up and down; rows: up from a row list
    inputs: int
    outputs: int
    dtype: str
    batch: int
    kernel: str
    zeros_percent: int  # of each row
    read_share: float  # of the weights, that the call must read; of a batch, by any of its rows
    microseconds: float
    over_linear: float
    over_own_dense: float
    roofline_share: float  # bytes of the weights that the call must read, over measured bandwidth x time
    wall_over_cpu: float
    read_bytes_per_s: float  # the measured bandwidth: median over the same rounds


def scaled_input(k: int, zeros: int, dtype: torch.dtype) -> Tensor:
    """A normal x [1, 1, k], scaled so that a threshold of 1 drops round(k * zeros / 100) of its channels."""
    x = torch.randn(1, 1, k)
    drop = round(k * zeros / 100)
    ranked = x.abs().flatten().sort().values
    return (x / ((ranked[drop - 1] + ranked[drop]) / 2 if drop else ranked[0] / 2)).to(dtype)


def measure(model: str, projection: str, pool: Tensor, dtype_name: str, rounds: int) -> list[Row]:
    """All the kernels on one shape, interleaved for `rounds` rounds after one round of warm-up."""
    hidden, intermediate = HIDDEN[model]
    k, n = (hidden, intermediate) if projection == "up" else (intermediate, hidden)
    dtype = DTYPES[dtype_name]
    copies = pool.numel() // (k * n)
    w = [m.view(n, k) for m in pool[: copies * k * n].view(copies, -1)]
    wt = [m.view(k, n) for m in w]
    t = torch.tensor(1.0)
    inputs = {z: [scaled_input(k, z, dtype) for _ in range(copies)] for z in ZEROS}
    used = {z: sum(int((x.abs() > t).sum()) for x in inputs[z]) for z in ZEROS}
    x0 = inputs[0]

    calls: dict[str, Callable[[int], object]] = {
        "linear": lambda i: F.linear(x0[i], w[i]),
        "dense_gemv": lambda i: kernels.dense_gemv(x0[i], wt[i]),
        "dense_gemv_rows": lambda i: kernels.dense_gemv_rows(x0[i], w[i]),
    }

    def column(x: list[Tensor], i: int) -> Tensor:
        return kernels.column_gemv(x[i], wt[i], t)

    calls |= {f"column_gemv {z}": partial(column, x) for z, x in inputs.items()}
    kept = {name: used[int(name.split()[1])] / copies / k if " " in name else 1.0 for name in calls}
    own = ("dense_gemv", "dense_gemv_rows")
    return timed((model, projection, k, n, dtype_name), calls, kept, own, pool[: copies * k * n], copies, rounds)


def measure_batches(model: str, projection: str, pool: Tensor, dtype_name: str, rounds: int) -> list[Row]:
    """The column kernel on 2 to 16 rows with 50 % zeros each, beside F.linear and our own dense product."""
    hidden, intermediate = HIDDEN[model]
    k, n = (hidden, intermediate) if projection == "up" else (intermediate, hidden)
    copies = pool.numel() // (k * n)
    flat = pool[: copies * k * n]
    wt = [m.view(k, n) for m in flat.view(copies, -1)]
    t = torch.tensor(1.0)
    rows: list[Row] = []
    for batch in BATCHES:
        x = [torch.cat([scaled_input(k, 50, DTYPES[dtype_name]) for _ in range(batch)]) for _ in range(copies)]
        calls: dict[str, Callable[[int], object]] = {
            "linear": lambda i, x=x: F.linear(x[i], wt[i].view(n, k)),
            "dense_gemv": lambda i, x=x: kernels.dense_gemv(x[i], wt[i]),
            "column_gemv 50": lambda i, x=x: kernels.column_gemv(x[i], wt[i], t),
        }
        union = sum(int((own.abs() > t).any(0).sum()) for own in x) / copies / k
        kept = {"linear": 1.0, "dense_gemv": 1.0, "column_gemv 50": union}
        shape = (model, projection, k, n, dtype_name)
        rows += timed(shape, calls, kept, ("dense_gemv",), flat, copies, rounds, batch=batch)
    return rows


def measure_mlp(model: str, pool: Tensor, dtype_name: str, rounds: int) -> list[Row]:
    """The neuron and CATS MLPs, then the row kernel on the gate alone."""
    hidden, neurons = HIDDEN[model]
    dtype = DTYPES[dtype_name]
    size = hidden * neurons
    copies = pool.numel() // (3 * size)
    flat = pool[: copies * 3 * size]
    gate, up, wt_down = (list(part.unbind()) for part in flat.view(copies, 3, neurons, hidden).unbind(1))
    down = [w.view(hidden, neurons) for w in wt_down]  # the same numbers read as a row-major matrix
    x = [torch.randn(1, 1, hidden).to(dtype) for _ in range(copies)]
    lists = {z: [some(neurons, z) for _ in range(copies)] for z in ZEROS[2:]}
    limits = {z: [limit_of(F.linear(a, w), z) for a, w in zip(x, gate, strict=True)] for z in ZEROS[2:]}
    everything = some(neurons, 0)

    def neuron(i: int, idx: Tensor) -> Tensor:
        return kernels.neuron_mlp(x[i], gate[i], up[i], wt_down[i], idx, "silu")

    calls: dict[str, Callable[[int], object]] = {
        "linear": lambda i: F.linear(F.silu(F.linear(x[i], gate[i])) * F.linear(x[i], up[i]), down[i]),
        "neuron_mlp": lambda i: neuron(i, everything),
    }
    kept = {"linear": 1.0, "neuron_mlp": 1.0}
    for z in ZEROS[2:]:
        share = len(lists[z][0]) / neurons
        calls[f"neuron_mlp {z}"] = lambda i, own=lists[z]: neuron(i, own[i])
        calls[f"cats_mlp {z}"] = lambda i, t=limits[z]: kernels.cats_mlp(x[i], gate[i], up[i], wt_down[i], t[i], "silu")
        kept |= {f"neuron_mlp {z}": share, f"cats_mlp {z}": (1 + 2 * share) / 3}
    shape = (model, "mlp", hidden, neurons, dtype_name)
    rows = timed(shape, calls, kept, ("neuron_mlp",), flat, copies, rounds, matrices=3)
    calls = {
        "linear": lambda i: F.linear(x[i // 3], matrices[i]),
        "dense_gemv_rows": lambda i: kernels.dense_gemv_rows(x[i // 3], matrices[i]),
    }
    matrices = [w for three in zip(gate, up, wt_down, strict=True) for w in three]
    for z in ZEROS[2:]:
        calls[f"row_gemv_index {z}"] = lambda i, own=lists[z]: kernels.row_gemv_index(
            x[i // 3], matrices[i], own[i // 3]
        )
    kept = {name: len(lists[int(name.split()[1])][0]) / neurons if " " in name else 1.0 for name in calls}
    shape = (model, "rows", hidden, neurons, dtype_name)
    return rows + timed(shape, calls, kept, ("dense_gemv_rows",), flat, 3 * copies, rounds)


def some(n: int, zeros: int) -> Tensor:
    """A random sorted list of all but `zeros` percent of n."""
    return torch.randperm(n)[: n - round(n * zeros / 100)].sort().values.int()


def limit_of(gate: Tensor, zeros: int) -> Tensor:
    """The threshold on act(gate) that drops `zeros` percent."""
    return F.silu(gate).float().abs().flatten().kthvalue(max(1, round(gate.numel() * zeros / 100))).values


def timed(
    shape: tuple[str, str, int, int, str],
    calls: dict[str, Callable[[int], object]],
    kept: dict[str, float],
    dense: tuple[str, ...],
    flat: Tensor,
    copies: int,
    rounds: int,
    matrices: int = 1,
    batch: int = 1,
) -> list[Row]:
    """Interleave the calls over all copies in `flat`, round after round, after one of warm-up.

    shape: (model, projection, inputs, outputs, dtype). kept: share of the weights that a call must read. dense: our own
    dense calls, of which the faster is the baseline. matrices: of that shape in one call. batch: rows of x in one call.
    """
    model, projection, k, n, dtype_name = shape
    sweeps = {"read": partial(sweep, lambda _: stream(flat), 1)}
    sweeps |= {name: partial(sweep, call, copies) for name, call in calls.items()}
    times = in_turn(sweeps, rounds)
    bandwidth = [flat.nbytes / seconds for seconds, _ in times.pop("read")]
    cpu = {name: [seconds / copies for seconds, _ in each] for name, each in times.items()}
    wall = {name: [seconds / copies for _, seconds in each] for name, each in times.items()}
    own = min(dense, key=lambda name: median(cpu[name]))
    rows = []
    for name in calls:
        kernel, _, level = name.partition(" ")
        zeros = int(level or 0)
        floor = [kept[name] * matrices * k * n * flat.element_size() / b for b in bandwidth]
        rows.append(
            Row(
                model,
                projection,
                k,
                n,
                dtype_name,
                batch,
                kernel,
                zeros,
                read_share=round(kept[name], 4),
                microseconds=round(median(cpu[name]) * 1e6, 2),
                over_linear=ratio(cpu["linear"], cpu[name]),
                over_own_dense=ratio(cpu[own], cpu[name]),
                roofline_share=ratio(floor, cpu[name]),
                wall_over_cpu=ratio(wall[name], cpu[name]),
                read_bytes_per_s=round(median(bandwidth)),
            )
        )
    print(
        f"{model} {projection} {dtype_name} x {batch}: {median(bandwidth) / 1e9:.1f} GB/s, own dense: {own}", flush=True
    )
    return rows


def environment(rounds: int) -> dict[str, object]:
    """What the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), None)
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "instruction_set": instruction_set(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average_before": [round(v, 2) for v in os.getloadavg()],
        "pool_bytes": POOL_BYTES,
        "rounds": rounds,
        "clock": "thread CPU time",
    }


def verdicts(rows: list[Row]) -> list[dict[str, object]]:
    """Each goal at 50 % zeros against the worst shape it covers."""
    found: list[dict[str, object]] = []
    for dtype, (linear, own, shares) in GOALS.items():
        half = [r for r in rows if (r.dtype, r.batch, r.kernel, r.zeros_percent) == (dtype, 1, "column_gemv", 50)]
        checks = [("over_linear", linear, half), ("over_own_dense", own, half)]
        checks += [("roofline_share", s, [r for r in half if r.model == m]) for m, s in shares.items()]
        for field, goal, covered in checks:
            for worst in sorted(covered, key=lambda r: getattr(r, field))[:1]:
                value, where = getattr(worst, field), f"{worst.model} {worst.projection}"
                found.append(
                    {
                        "dtype": dtype,
                        "figure": field,
                        "goal": goal,
                        "worst": value,
                        "at": where,
                        "met": value >= goal,
                    }
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="+", choices=HIDDEN, default=list(HIDDEN))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    env = environment(args.rounds)
    rows: list[Row] = []
    for name in args.dtypes:
        pool = torch.randn(POOL_BYTES // DTYPES[name].itemsize).to(DTYPES[name])
        for model in args.models:
            for projection in ("up", "down"):
                rows += measure(model, projection, pool, name, args.rounds)
                rows += measure_batches(model, projection, pool, name, args.rounds)
            rows += measure_mlp(model, pool, name, args.rounds)
    env["load_average_after"] = [round(v, 2) for v in os.getloadavg()]
    goals = verdicts(rows)
    print(f"{'':>14}  batch{'kernel':>16} zeros  read        us  /linear  /dense   roof  wall")
    for r in rows:
        print(
            f"{r.model:>4} {r.projection:<4} {r.dtype} {r.batch:>6}{r.kernel:>16} {r.zeros_percent:>4}% "
            f"{r.read_share:>5.2f} {r.microseconds:>9.1f} "
            f"{r.over_linear:>8.2f} {r.over_own_dense:>7.2f} {r.roofline_share:>6.2f} {r.wall_over_cpu:>5.2f}"
        )
    for g in goals:
        print("met   " if g["met"] else "MISSED", g)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps({"environment": env, "goals": goals}, indent=1).removesuffix("\n}")
        table = ",\n  ".join(json.dumps(asdict(r)) for r in rows)  # a row a line
        args.out.write_text(f'{head},\n "rows": [\n  {table}\n ]\n}}\n')


if __name__ == "__main__":
    main()
