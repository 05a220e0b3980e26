"""The tiles of the Triton kernels, tried one by one: `python -m bench.gpu_kernels --tune`."""

# ruff: noqa: B023  (every lambda here runs before its loop goes on)
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import kernels.cuda as kc
from bench.gpu_common import HIDDEN, NEURONS, Bench, Columns, timed


def tune(bench: Bench) -> None:
    """Candidate tiles of every kernel: what the defaults in kernels/cuda were chosen from."""
    from kernels.cuda import compact
    from kernels.cuda.attention import attend_step
    from kernels.cuda.column import batch, column, column_list
    from kernels.cuda.column_kernels import SCALAR
    from kernels.cuda.rows import neurons, rows
    from kernels.cuda.step import rms_norm

    half = torch.float16

    def attempt(
        what: str, tile: tuple, floor_bytes: float, copies: int, call: Callable[[int], Any], **facts: Any
    ) -> None:
        try:
            us = timed([lambda i=i: call(i) for i in range(copies)], 5)
            bench.add("tune", us, floor_bytes, kernel=what, tile=tile, **facts)
        except Exception as e:  # a tile that does not compile or fit is a result too
            bench.rows.append({"table": "tune", "kernel": what, "tile": tile, "failed": repr(e)[:300], **facts})

    masked = [(64, 32, 64), (64, 32, 32), (128, 32, 32), (128, 16, 32), (128, 16, 16), (64, 64, 64), (256, 16, 16)]
    for n, k in ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)):
        c = Columns(n, k, half)
        size = n * k * 2
        for zeros in (0, 50, 65, 80, 90):
            t, kept = c.at(zeros)
            facts = {"n": n, "k": k, "zeros_percent": zeros}
            for tile in masked if zeros in (0, 50, 65) else ():
                attempt(
                    "masked",
                    tile,
                    size * kept,
                    c.copies,
                    lambda i: column(c.x[i], c.pool[i], t[i], y=c.y[i], accumulate=True, tile=tile),
                    **facts,
                )
            if k == 11008 and zeros == 50:
                x32 = c.x.float()
                hidden = F.silu(c.x)
                t_hidden = hidden.float().abs().quantile(0.5, dim=1, keepdim=True)
                ones = torch.ones_like(x32)
                for tile in masked:
                    attempt(
                        "masked glu",
                        tile,
                        size * kept,
                        c.copies,
                        lambda i: column(
                            x32[i], c.pool[i], t_hidden[i], y=c.y[i], up=ones[i], act="silu", accumulate=True, tile=tile
                        ),
                        **facts,
                    )
            for unroll, blocks in ((8, 4), (8, 3), (4, 4), (4, 8), (16, 2), (16, 3), (8, 5)) if zeros >= 50 else ():
                attempt(
                    "compact",
                    (unroll, blocks),
                    size * kept,
                    c.copies,
                    lambda i: compact.launch(
                        c.x[i],
                        None,
                        t[i],
                        c.pool[i],
                        None,
                        c.y[i],
                        None,
                        test=SCALAR.value,
                        edges=(1 << 30, 1 << 30),
                        act=0,
                        partials=False,
                        tile=(unroll, blocks),
                    ),
                    **facts,
                )
            if zeros in (50, 80):
                attempt(
                    "op",
                    (),
                    size * kept,
                    c.copies,
                    lambda i: kc.column_gemv(c.x[i], c.pool[i], t[i], None, zeros / 100),
                    **facts,
                )
                lists = [(c.x[i].float().abs() > t[i]).nonzero().flatten().int() for i in range(c.copies)]
                m = lists[0].numel()
                for tile in [(64, 32, m // 32), (64, 16, m // 16), (128, 16, m // 32), (128, 16, m // 16)]:
                    attempt(
                        "list",
                        tile,
                        size * kept,
                        c.copies,
                        lambda i: column_list(c.x[i], c.pool[i], lists[i], y=c.y[i], accumulate=True, tile=tile),
                        **facts,
                    )
        w = c.pool.view(c.copies, n, k)
        y = torch.empty(n, dtype=half, device="cuda")
        for tile in ((2, 2048, 8), (1, 4096, 8), (1, 4096, 16), (1, 8192, 16), (1, 2048, 8)):
            attempt("rows", tile, size, c.copies, lambda i: rows(c.x[i], w[i], y=y, tile=tile), n=n, k=k)
        if n == 12288:
            x = torch.randn(c.copies, 4, k, device="cuda").half()
            t = torch.tensor(0.6745, device="cuda")
            sums = torch.zeros(4, n, device="cuda")
            for tile in ((128, 32, 1024, 4), (64, 32, 256, 1), (128, 32, 512, 4), (128, 16, 256, 2), (64, 64, 1024, 4)):
                attempt(
                    "batch 4",
                    tile,
                    size * 0.9375,
                    c.copies,
                    lambda i: batch(x[i], c.pool[i], t, y=sums, accumulate=True, tile=tile),
                    n=n,
                    k=k,
                )
        bench.save()
    copies = 10
    gate, up = (torch.randn(copies, NEURONS, HIDDEN, dtype=half, device="cuda") for _ in range(2))
    x = torch.randn(copies, HIDDEN, device="cuda").half()
    h = torch.empty(NEURONS, dtype=half, device="cuda")
    for inactive in (0, 50, 80):
        m = round(NEURONS * (1 - inactive / 100))
        lists = [torch.randperm(NEURONS, device="cuda")[:m].sort().values.int() for _ in range(copies)]
        for tile in ((1, 2048, 4), (2, 1024, 4), (1, 4096, 8), (1, 4096, 4)):
            attempt(
                "neurons",
                tile,
                2 * m * HIDDEN * 2,
                copies,
                lambda i: neurons(x[i], gate[i], up[i], h=h, act="silu", idx=lists[i] if inactive else None, tile=tile),
                inactive_percent=inactive,
            )
    heads, d = 32, 128
    for context in (512, 4096):
        copies = max(4, 10**9 // (2 * heads * context * d * 2))
        k, v = (torch.randn(copies, 1, heads, context + 64, d, dtype=half, device="cuda") for _ in range(2))
        qkv = torch.randn(3 * heads * d, device="cuda")
        cos = torch.rand(d, device="cuda").half()
        out = torch.empty(heads * d, dtype=half, device="cuda")
        length = torch.tensor(context + 7, device="cuda")
        for tile in (
            (32, 16, 1),
            (64, 16, 1),
            (16, 32, 1),
            (32, 32, 1),
            (64, 32, 1),
            (16, 16, 1),
            (16, 32, 2),
            (16, 64, 4),
        ):
            attempt(
                "attend_step",
                tile,
                2 * heads * context * d * 2,
                copies,
                lambda i: attend_step(qkv, cos, cos, k[i], v[i], length, out, n_heads=heads, scale=0.09, tile=tile),
                context=context,
            )
    x32, y16 = torch.randn(HIDDEN, device="cuda"), torch.empty(HIDDEN, dtype=half, device="cuda")
    attempt("rms_norm", (), 0, 100, lambda _: rms_norm(x32, y16, 1e-5, y16))
