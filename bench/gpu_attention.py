"""Decode attention that skips KV reads, and the whole step around it, by batch and context.

    python -m bench.gpu_attention --out results/bench/gpu_attention.json

Shapes of Llama-2-7B (32 KV heads) and of Llama-3-8B (8 KV groups), random weights, bf16. Each sequence drops KV groups
of its own. Before anything is timed its kernel is compared with the definition (`checks`).

  attention  one layer's decode attention over a filled cache: torch's SDPA (flash, cuDNN), our kernel with everything
             kept, with half of the groups dropped by flags, and with half of the blocks of V below the skip-softmax
             threshold
  step       the whole decode step of the Hugging Face module in a CUDA graph (harness/execution/fused_batch.py): dense
             with SDPA, dense with our kernel at 0 %, and with routers that keep half of the KV groups, whose scores and
             choice are made inside the step. At batch 1 also the tuned dense step of bench/gpu_decode.py
  union      column kernel on inputs that drop half of the channels independently, batches 1 to 16: the share of
             channels that a step reads, measured and 1 - s^B, and its time beside the library's dense product

Times are medians of paired rounds, in
another order each round; ratios are medians over rounds. Floor: bytes read over the read bandwidth of the same run.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels.cuda as kc
from bench.gpu_batch_step import (
    LIBRARY,
    SHAPES,
    Fused,
    against_single,
    check_blocks,
    model_of,
    routers_of,
    sdpa,
    single_steps,
    steps,
)
from bench.gpu_pairs import DEVICE, DTYPE, HEAD_DIM, Bench, Cache, captured
from harness.execution.fused_batch import batch_decode
from kernels import reference

BATCHES, CONTEXTS = (16, 32, 8, 64, 1), (8192, 2048, 16384)
BLOCK = 64


def half_dropped(batch: int, groups: int) -> Tensor:
    """Flags bool [batch, groups, 1] with half of each sequence's groups kept, others for each sequence."""
    keep = torch.rand(batch, groups, device=DEVICE).argsort(1) < groups // 2
    return keep[..., None]


def attention(bench: Bench, memory: Cache, heads: int, groups: int, batch: int, context: int) -> None:
    """One layer's attention: the library's, ours with all kept, ours with half of the groups dropped."""
    pairs = memory.layers(batch, groups, context, 64)  # in turn: no cache may keep a short context
    k, v = pairs[0]
    q = torch.randn(batch, heads, 1, HEAD_DIM, device=DEVICE).to(DTYPE)
    keep = half_dropped(batch, groups)
    at = f"{heads}/{groups} heads, batch {batch}, context {context}"
    few = slice(0, 2)
    want = [reference.decode_attention(q[few], k[few], v[few], torch.tensor(context), m) for m in (None, keep[few])]
    calls: dict[str, Callable[[int], Any]] = {}
    for name, backend in LIBRARY.items():
        try:
            with sdpa_kernel(backend):
                bench.check(f"{name}, {at}", sdpa(q, k, v)[few], want[0])
        except RuntimeError as failure:
            bench.record["failed"][f"{name}, {at}"] = str(failure)[-300:]
            continue
        calls[name] = lambda i, backend=backend: _with_backend(backend, q, *pairs[i % len(pairs)])
    bench.check(f"kernel, {at}", kc.decode_attention(q, k, v, context)[few], want[0])
    bench.check(f"half of the groups, {at}", kc.decode_attention(q, k, v, context, keep)[few], want[1])
    calls["kernel 0%"] = lambda i: kc.decode_attention(q, *pairs[i % len(pairs)], context)
    calls["half of the groups"] = lambda i: kc.decode_attention(q, *pairs[i % len(pairs)], context, keep)
    size = 2.0 * k.nbytes
    dense = [name for name in calls if name != "half of the groups"]
    floors = dict.fromkeys(calls, size) | {"half of the groups": size / 2}
    repeats = max(2, int(3e-3 / (size / bench.rate)))
    graphs = {name: captured(call, repeats) for name, call in calls.items()}
    bench.compare("attention", graphs, floors, dense, heads=heads, groups=groups, batch=batch, context=context)


def _with_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(q, k, v)


def tiles(bench: Bench, memory: Cache, heads: int, groups: int, batch: int, context: int) -> None:
    """What other tiles (splits, entries, warps) of the kernel would give, dense and with half of the groups dropped."""
    k, v = memory.layers(batch, groups, context, 1)[0]
    q = torch.randn(batch, heads, 1, HEAD_DIM, device=DEVICE).to(DTYPE)
    keep = half_dropped(batch, groups)
    ours = ((4, 16, 1), (64, 16, 1), (16, 32, 2), (16, 64, 4), (64, 64, 4))
    for tile in ours if heads == groups else ((16, 64, 4), (64, 64, 4), (16, 128, 8), (16, 32, 4)):
        calls: dict[str, Callable[[int], Any]] = {
            "kernel 0%": lambda _, tile=tile: kc.decode_attention(q, k, v, context, tile=tile),
            "half of the groups": lambda _, tile=tile: kc.decode_attention(q, k, v, context, keep, tile=tile),
        }
        graphs = {name: captured(call, 3) for name, call in calls.items()}
        floors = {"kernel 0%": 2.0 * k.nbytes, "half of the groups": 1.0 * k.nbytes}
        facts = {"heads": heads, "groups": groups, "batch": batch, "context": context, "tile": str(tile)}
        bench.compare("tiles", graphs, floors, ["kernel 0%"], **facts)


def skip_softmax(bench: Bench, memory: Cache, heads: int, groups: int, batch: int, context: int) -> None:
    """Half of the blocks of V below the threshold: every second block's keys are zero, the others lie along q."""
    k, v = memory.layers(batch, groups, context, 1)[0]
    q = torch.randn(batch, heads, 1, HEAD_DIM, device=DEVICE).to(DTYPE)
    log_scale = torch.tensor(float(context)).log().item() - 4.0  # ln(lambda) = -4
    saved = k.clone()
    toward = q.view(batch, groups, -1, HEAD_DIM).float().mean(2)[:, :, None, None]
    blocks = k.view(batch, groups, -1, BLOCK, HEAD_DIM)
    blocks.mul_(0.1)
    blocks[:, :, ::2] += (toward * 12 / toward.square().sum(-1, keepdim=True) * HEAD_DIM**0.5).to(DTYPE)
    at, few = f"{heads}/{groups} heads, batch {batch}, context {context}", slice(0, 2)
    try:
        for kept, scale in (("all", -50.0), ("half", log_scale)):
            want = reference.skip_softmax(q[few], k[few], v[few], torch.tensor(context), scale, BLOCK)
            got = kc.skip_softmax(q, k, v, context, scale, BLOCK)
            bench.check(f"skip softmax, {kept} of V, {at}", got[few], want)
        logits = q[:1, :1].float() @ k[:1, :1].float().transpose(-1, -2) * HEAD_DIM**-0.5
        peaks = logits.view(-1, BLOCK).amax(-1)
        read = (peaks - peaks.cummax(0).values >= log_scale - torch.tensor(float(context)).log()).float().mean().item()
        bench.record["checks"][f"share of V read by a head, {at}"] = read
        calls: dict[str, Callable[[int], Any]] = {
            "kernel 0%": lambda _: kc.decode_attention(q, k, v, context),
            "skip softmax, all of V": lambda _: kc.skip_softmax(q, k, v, context, -50.0, BLOCK),
            "skip softmax, half of V": lambda _: kc.skip_softmax(q, k, v, context, log_scale, BLOCK),
        }
        size = 2.0 * k.nbytes
        floors = dict.fromkeys(calls, size) | {"skip softmax, half of V": 0.75 * size}
        graphs = {name: captured(call, 3) for name, call in calls.items()}
        facts = {"heads": heads, "groups": groups, "batch": batch, "context": context}
        bench.compare("skip softmax", graphs, floors, ["kernel 0%"], **facts)
    finally:
        k.copy_(saved)


def union(bench: Bench, n: int = 12288, k: int = 4096, share: float = 0.5) -> None:
    """Column kernel on batches of 1 to 16 with independent inputs: the union of kept channels, and its time."""
    wt = torch.empty(8, k, n, dtype=DTYPE, device=DEVICE).normal_(0, k**-0.5)
    for batch in (1, 2, 4, 8, 16):
        x = torch.randn(8, batch, k, device=DEVICE).to(DTYPE)
        t = x.float().abs().flatten().quantile(share)
        read = (x.float().abs() > t).any(1).float().mean().item()
        want = torch.where(x[0].float().abs() > t, x[0], 0).double() @ wt[0].double()
        bench.check(f"column kernel, batch {batch}", kc.column_gemv(x[0], wt[0], t), want)
        calls: dict[str, Callable[[int], Any]] = {
            "dense, library": lambda i, x=x: torch.mm(x[i % 8], wt[i % 8]),
            "dense, kernel 0%": lambda i, x=x: kc.dense_gemv(x[i % 8], wt[i % 8]),
            "half of the channels": lambda i, x=x, t=t: kc.column_gemv(x[i % 8], wt[i % 8], t),
        }
        graphs = {name: captured(call, 32) for name, call in calls.items()}
        size = 2.0 * n * k
        floors = dict.fromkeys(calls, size) | {"half of the channels": size * read}
        facts = {"shape": f"{n}x{k}", "batch": batch, "union": read, "independent": 1 - share**batch}
        bench.compare("union", graphs, floors, list(calls)[:2], **facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/bench/gpu_attention.json"))
    parser.add_argument("--seconds", type=float, default=160.0, help="no new part begins later than this")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--memory", type=float, default=36e9, help="bytes for the KV caches")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs an NVIDIA GPU")
    torch.manual_seed(0)
    bench, memory = Bench(__doc__, args.out, args.seconds), Cache(args.memory)
    for place, shape in enumerate(SHAPES):
        heads, groups = SHAPES[shape][:2]
        bench.part(f"attention, {shape}, 16, 8192", partial(attention, bench, memory, heads, groups, 16, 8192))
        view = model_of(shape, args.layers)
        routers = routers_of(view)
        with batch_decode(view, routers) as blocks:
            fused = Fused(view, blocks, routers)
            bench.part(f"check of {shape}", partial(check_blocks, bench, fused))
            if f"check of {shape}" in bench.record["failed"]:
                continue
            points = [(b, c) for b in BATCHES for c in CONTEXTS] if not place else [(16, 8192), (64, 8192), (32, 16384)]
            for number, (batch, context) in enumerate(points):
                bench.part(f"step, {shape}, {batch}, {context}", partial(steps, bench, memory, fused, batch, context))
                if number == 0:
                    bench.part(f"skip softmax, {shape}", partial(skip_softmax, bench, memory, heads, groups, 16, 8192))
                if number == min(4, len(points) - 1):
                    bench.part(f"tiles, {shape}", partial(tiles, bench, memory, heads, groups, 16, 8192))
        if not place:
            bench.part("step of one sequence", partial(single_steps, bench, memory, view, CONTEXTS))
            against_single(bench.record["rows"])
        del view, blocks, routers, fused
        gc.collect()
        torch.cuda.empty_cache()
    bench.part("skip softmax, groups", partial(skip_softmax, bench, memory, 32, 8, 64, 16384))
    bench.part("union", partial(union, bench))
    for batch in BATCHES:
        for context in CONTEXTS:
            for heads, groups in ((32, 32), (32, 8)):
                name = f"attention, {heads}/{groups}, {batch}, {context}"
                bench.part(name, partial(attention, bench, memory, heads, groups, batch, context))
    bench.save()
    raise SystemExit(1 if bench.record["failed"] else 0)


if __name__ == "__main__":
    main()
