"""The Triton kernels on the shapes of a 7B model, against cuBLAS, a tuned dense kernel and the byte floor.

    python -m bench.gpu_kernels --out results/bench/gpu_kernels.json

A time is the median replay of a CUDA graph that calls the kernel once for each of many weight copies (2 GB, far past
the L2 cache), each with an input and so a zero pattern of its own, divided by the number of copies. Zeroing, list
building inside the kernel and the final rounding are part of what is timed unless the row says otherwise:

  op           the public function: 16-bit result, any state cleared inside
  accumulate   the form of the fused decode step: adds into an fp32 accumulator that an earlier kernel cleared
  list         `accumulate` from a channel list that is given
  repeatable   `op` in its bitwise repeatable mode (two launches)

Floor: bytes of the kept weights over the read bandwidth measured in the same run. Errors: ||y - ref|| / ||ref|| against
float64, outputs filled with NaN before.
"""

# ruff: noqa: B023, F821  (every lambda here runs before its loop goes on)
from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.cuda as kc
from bench.gpu_common import HIDDEN, NEURONS, POOL_BYTES, SHAPES, ZEROS, Bench, Columns, error, timed
from bench.gpu_tune import tune


def dense(bench: Bench, c: Columns) -> dict[str, float]:
    """cuBLAS and the tuned dense kernels on one shape, us."""
    rows = c.pool.view(c.copies, c.n, c.k)
    forms = {
        "cublas": lambda i: F.linear(c.x[i], rows[i]),
        "dense_rows": lambda i: kc.dense_gemv_rows(c.x[i], rows[i]),
        "dense_columns": lambda i: kc.dense_gemv(c.x[i], c.pool[i]),
    }
    times = {}
    for name, form in forms.items():
        times[name] = timed([lambda i=i, form=form: form(i) for i in range(c.copies)])
        facts = {"n": c.n, "k": c.k, "dtype": str(c.dtype), "kernel": name, "zeros_percent": 0}
        bench.add("dense", times[name], c.n * c.k * 2, **facts)
    return times


def column_table(bench: Bench, c: Columns, zeros_list: tuple[int, ...], forms: tuple[str, ...]) -> None:
    from kernels.cuda.column import COMPACT_FROM, column, column_list

    base = dense(bench, c)
    for zeros in zeros_list:
        t, kept = c.at(zeros)
        packs = zeros / 100 >= COMPACT_FROM
        lists = [(c.x[i].float().abs() > t[i]).nonzero().flatten().int() for i in range(c.copies)]

        def op(i: int) -> Tensor:
            return kc.column_gemv(c.x[i], c.pool[i], t[i], None, zeros / 100)  # noqa: B023

        def accumulate(i: int) -> Tensor:
            return column(c.x[i], c.pool[i], t[i], y=c.y[i], accumulate=True, expected_sparsity=zeros / 100)  # noqa: B023

        def given(i: int) -> Tensor:
            return column_list(c.x[i], c.pool[i], lists[i], y=c.y[i], accumulate=True)  # noqa: B023

        calls = {"op": op, "accumulate": accumulate, "list": given, "repeatable": op}
        want = c.want(t)
        for form in forms:
            torch.use_deterministic_algorithms(form == "repeatable")
            us = timed([lambda i=i, f=calls[form]: f(i) for i in range(c.copies)])
            if form in ("op", "repeatable"):
                y = torch.full((c.n,), torch.nan, device="cuda")
                wrong = error(column(c.x[0], c.pool[0], t[0], y=y, expected_sparsity=zeros / 100), want)
            else:
                c.y.zero_()
                wrong = error(calls[form](0), want)
            torch.use_deterministic_algorithms(False)
            own = min(base["dense_rows"], base["dense_columns"])
            bench.add(
                "column", us, c.n * c.k * 2 * kept, n=c.n, k=c.k, dtype=str(c.dtype), kernel=form,
                form="list" if form == "list" else "compact" if packs else "masked",
                zeros_percent=zeros, kept=kept, over_own_dense=own / us, over_cublas=base["cublas"] / us, error=wrong,
            )  # fmt: skip


def mlp_table(bench: Bench) -> None:
    from kernels.cuda.column import column_list
    from kernels.cuda.rows import neurons

    dtype = torch.float16
    copies = max(4, POOL_BYTES // (3 * NEURONS * HIDDEN * 2))
    gate, up, down = (
        torch.empty(copies, NEURONS, HIDDEN, dtype=dtype, device="cuda").normal_(0, HIDDEN**-0.5) for _ in range(3)
    )
    x = torch.randn(copies, HIDDEN, device="cuda").to(dtype)
    row = NEURONS * HIDDEN * 2
    all_of_it = torch.arange(NEURONS, dtype=torch.int32, device="cuda")

    def cublas(i: int) -> Tensor:
        gu = F.linear(x[i], both[i])
        return F.linear(F.silu(gu[:NEURONS]) * gu[NEURONS:], down[i].view(HIDDEN, NEURONS))

    h = torch.empty(NEURONS, dtype=dtype, device="cuda")
    residual = torch.zeros(HIDDEN, device="cuda")

    def step_form(i: int, idx: Tensor) -> Tensor:
        """As a fused decode step runs it: down adds into the fp32 residual stream."""
        neurons(x[i], gate[i], up[i], h=h, act="silu", idx=idx)
        return column_list(h, down[i], idx, y=residual, by_position=True, accumulate=True)

    both = torch.cat([gate, up], 1)
    us_cublas = timed([lambda i=i: cublas(i) for i in range(copies)])
    del both
    us_own = timed([lambda i=i: kc.neuron_mlp(x[i], gate[i], up[i], down[i], all_of_it, "silu") for i in range(copies)])
    bench.add("mlp", us_cublas, 3 * row, kernel="cublas", inactive_percent=0)
    bench.add("mlp", us_own, 3 * row, kernel="neuron_mlp", inactive_percent=0, over_cublas=us_cublas / us_own)
    for inactive in ZEROS[1:]:
        m = round(NEURONS * (1 - inactive / 100))
        lists = [torch.randperm(NEURONS, device="cuda")[:m].sort().values.int() for _ in range(copies)]
        us = timed([lambda i=i: kc.neuron_mlp(x[i], gate[i], up[i], down[i], lists[i], "silu") for i in range(copies)])
        us_step = timed([lambda i=i: step_form(i, lists[i]) for i in range(copies)])
        bench.add(
            "mlp", us_step, 3 * row * m / NEURONS, kernel="accumulate", inactive_percent=inactive,
            over_own_dense=us_own / us_step, over_cublas=us_cublas / us_step,
        )  # fmt: skip
        idx = lists[0]
        g, u = (F.linear(x[0].double(), w[0][idx].double()).to(dtype) for w in (gate, up))
        want = (F.silu(g.double()).to(dtype) * u).double() @ down[0][idx].double()
        wrong = error(kc.neuron_mlp(x[0], gate[0], up[0], down[0], idx, "silu"), want)
        bench.add(
            "mlp", us, 3 * row * m / NEURONS, kernel="neuron_mlp", inactive_percent=inactive,
            over_own_dense=us_own / us, over_cublas=us_cublas / us, error=wrong,
        )  # fmt: skip
    for inactive in ZEROS[1:]:
        a = F.silu(torch.stack([F.linear(x[i], gate[i]) for i in range(copies)]))
        t = a.float().abs().quantile(inactive / 100, dim=1)
        kept = (a.float().abs() > t[:, None]).float().mean().item()
        us = timed([lambda i=i: kc.cats_mlp(x[i], gate[i], up[i], down[i], t[i], "silu") for i in range(copies)])
        bench.add(
            "cats", us, row * (1 + 2 * kept), kernel="cats_mlp", inactive_percent=inactive, kept=kept,
            over_own_dense=us_own / us, over_cublas=us_cublas / us,
        )  # fmt: skip


def batch_table(bench: Bench, c: Columns) -> None:
    rows = c.pool.view(c.copies, c.n, c.k)
    for b in (1, 2, 4, 8, 16):
        x = torch.randn(c.copies, b, c.k, device="cuda").to(c.dtype)
        t = x.float().abs().flatten(1).quantile(0.5, dim=1)[:, None]
        union = (x.float().abs() > t[:, None]).any(1).float().mean().item()
        us = timed([lambda i=i: kc.column_gemv(x[i], c.pool[i], t[i]) for i in range(c.copies)])
        us_cublas = timed([lambda i=i: F.linear(x[i], rows[i]) for i in range(c.copies)])
        want = torch.where(x[0].float().abs() <= t[0], 0, x[0]).double() @ c.pool[0].double()
        bench.add(
            "batch", us, c.n * c.k * 2 * union, n=c.n, k=c.k, dtype=str(c.dtype), batch=b, zeros_percent=50,
            columns_read=union, cublas_us=us_cublas, over_cublas=us_cublas / us,
            error=error(kc.column_gemv(x[0], c.pool[0], t[0]), want),
        )  # fmt: skip


def attention_table(bench: Bench) -> None:
    heads, d = 32, 128
    for context in (512, 4096):
        copies = max(4, 10**9 // (2 * heads * context * d * 2))
        k, v = (torch.randn(copies, 1, heads, context + 64, d, dtype=torch.float16, device="cuda") for _ in range(2))
        q = torch.randn(copies, 1, heads, 1, d, dtype=torch.float16, device="cuda")
        length = torch.tensor(context, device="cuda")
        us = timed([lambda i=i: kc.decode_attention(q[i], k[i], v[i], length) for i in range(copies)])  # noqa: B023
        bench.add("attention", us, 2 * heads * context * d * 2, kernel="decode_attention", context=context, heads=heads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/bench/gpu_kernels.json"))
    parser.add_argument("--tune", action="store_true", help="time candidate tiles instead of the tables")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs an NVIDIA GPU")
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = False  # or the repeatable mode is timed with torch's fills
    bench = Bench(args.out)
    every = ("op", "accumulate", "list", "repeatable")
    steps: dict[str, Callable[[], None]] = {"tune": lambda: tune(bench)} if args.tune else {}
    if not args.tune:
        for n, k in SHAPES:
            steps[f"column {n}x{k}"] = lambda n=n, k=k: column_table(bench, Columns(n, k, torch.float16), ZEROS, every)
        steps["mlp"] = lambda: mlp_table(bench)
        for n, k in SHAPES[:2] + SHAPES[3:]:
            steps[f"batch {n}x{k}"] = lambda n=n, k=k: batch_table(bench, Columns(n, k, torch.float16))
        steps["attention"] = lambda: attention_table(bench)
        for n, k in SHAPES:
            steps[f"bf16 {n}x{k}"] = lambda n=n, k=k: column_table(
                bench, Columns(n, k, torch.bfloat16), (0, 50, 80), ("op", "accumulate")
            )
    failed = 0
    for name, step in steps.items():
        start = time.time()
        try:
            step()
        except Exception:
            failed += 1
            traceback.print_exc()
        bench.save()
        torch.cuda.empty_cache()
        print(f"{name}: {time.time() - start:.1f} s", flush=True)
    for row in bench.rows:
        short = {k: round(v, 3) if isinstance(v, float) and v > 1e-3 else v for k, v in row.items()}
        print(json.dumps(short))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
