"""The decode step of a batch whose sequences drop KV groups of their own, for bench/gpu_attention.py.

In a step the layers' caches share memory where they would not fit: every layer still reads its whole cache, and between
two reads of the same bytes lies far more than the second-level cache holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from bench.gpu_common import error
from bench.gpu_pairs import DEVICE, DTYPE, HEAD_DIM, Bench, Cache, Call
from harness.execution import masked_heads
from harness.execution.decode_loop import DecodeLoop
from harness.execution.fused_batch import BatchBlock, Router
from harness.execution.fused_step import fast_decode
from harness.model.families import view_of
from harness.model.sees import INPUT
from harness.model.step import Policy, Step
from harness.model.view import View
from kernels.cuda.attention import rotated
from kernels.cuda.common import DTYPES

SHAPES = {"llama-2-7b": (32, 32, 11008, 32000), "llama-3-8b": (32, 8, 14336, 128256)}  # heads, groups, d_ff, vocabulary
D_MODEL = 4096
LIBRARY = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
SPARE = 16  # entries of a cache for the tokens of a timed run


@triton.jit
def append_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, length_ptr, row, k_batch, k_head, H, G,
    D: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip  # noqa: ANN001, ANN201
    """What a library's attention needs before it: one head of q rotated, or of k and v appended to the cache."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, one = tl.arange(0, D), tl.arange(0, 1)
    cos, sin = tl.load(cos_ptr + d).to(tl.float32), tl.load(sin_ptr + d).to(tl.float32)
    source = qkv_ptr + b * row
    entry = tl.load(length_ptr).to(tl.int64) * D + d
    if h < H:
        tl.store(q_ptr + (b * H + h) * D + d, tl.sum(rotated(source, h + one, d, one == 0, cos, sin, D, DT, True), 0))
    elif h < H + G:
        k = tl.sum(rotated(source, h + one, d, one == 0, cos, sin, D, DT, True), 0)
        tl.store(k_ptr + b * k_batch + (h - H) * k_head + entry, k)
    else:
        tl.store(v_ptr + b * k_batch + (h - H - G) * k_head + entry, tl.load(source + h * D + d))


class Library:
    """Dense attention of torch inside a fused block, over a cache of a fixed length."""

    def __init__(self, view: View, backend: SDPBackend, entries: int) -> None:
        self.view, self.backend, self.entries = view, backend, entries

    def __call__(self, qkv: Tensor, cos: Tensor, sin: Tensor, cache: Any, length: Tensor) -> Tensor:
        h, g, b = self.view.n_heads, self.view.n_kv_heads, len(qkv)
        q = qkv.new_empty(b, h, 1, HEAD_DIM)
        k, v = cache.keys, cache.values
        append_kernel[(b, h + 2 * g)](
            qkv, cos, sin, q, k, v, length, qkv.stride(0), k.stride(0), k.stride(1), h, g, D=HEAD_DIM, DT=DTYPES[DTYPE],
            num_warps=1,
        )  # fmt: skip
        with sdpa_kernel(self.backend):
            out = sdpa(q, k[:, :, : self.entries], v[:, :, : self.entries])
        return out.transpose(1, 2).reshape(b, -1)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def model_of(shape: str, layers: int) -> View:
    """A model of this shape with random weights, built on the GPU."""
    heads, groups, d_ff, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=D_MODEL, intermediate_size=d_ff, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=32768, rms_norm_eps=1e-5,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(DEVICE):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return view_of(model, f"{shape} shape")


def routers_of(view: View) -> dict[int, Router]:
    """Random routers that keep half of the KV groups, in every layer but the first (as Polar Sparsity does)."""
    weight = torch.randn(view.n_layers, view.n_kv_heads, view.d_model, device=DEVICE).to(DTYPE) * D_MODEL**-0.5
    zero = torch.zeros(view.n_kv_heads, dtype=DTYPE, device=DEVICE)
    return {layer: Router(weight[layer], zero, view.n_kv_heads // 2) for layer in range(1, view.n_layers)}


def static_cache(view: View, memory: Cache, batch: int, context: int) -> StaticCache:
    """A cache that holds `context` random entries; layers share memory where there is not enough."""
    cache = StaticCache(config=view.model.config, max_cache_len=context + SPARE)
    pairs = memory.layers(batch, view.n_kv_heads, context + SPARE, view.n_layers)
    for number, layer in enumerate(cache.layers):
        layer.dtype, layer.device, layer.batch_size, layer.num_heads = DTYPE, view.device, batch, view.n_kv_heads
        layer.k_head_dim = layer.v_head_dim = HEAD_DIM
        layer.keys, layer.values = pairs[number % len(pairs)]
        layer.cumulative_length = torch.tensor(context, device=DEVICE)
        layer.is_initialized = True
    return cache


@dataclass(frozen=True)
class Fused:
    """A model, its fused blocks, and the routers that they may take."""

    view: View
    blocks: list[BatchBlock]
    routers: dict[int, Router]


@contextmanager
def variant(blocks: list[BatchBlock], routers: dict[int, Router], attend: Any = None) -> Iterator[None]:
    """The blocks with these routers, or another attention, until the context ends."""
    for block in blocks:
        block.router, block.attend = routers.get(block.layer), attend
    try:
        yield
    finally:
        for block in blocks:
            block.router, block.attend = None, None


@torch.no_grad()
def check_blocks(bench: Bench, fused: Fused) -> None:
    """What single blocks add to the residual stream: fused against the module, dense and masked by the same routers."""
    batch, past = 8, 37
    view, blocks, routers = fused.view, fused.blocks, fused.routers
    # small, or the sum would round what the block adds
    x = (torch.randn(batch, 1, view.d_model, device=DEVICE) / 64).to(DTYPE)
    position = torch.tensor([[past]], device=DEVICE)
    rotary = view.model.model.rotary_emb(x, position)
    memory = Cache(2e8)
    yes = torch.ones(batch, 1, dtype=torch.bool, device=DEVICE)
    step = Step(valid=yes, decode=yes, position=position.expand(batch, 1), sparse=None, past=past, input_ids=None)
    clear: dict[int, Tensor] = {}  # sequences whose choice does not hang on a rounding

    def run(layer: int) -> Tensor:
        cache = static_cache(view, memory, batch, past)
        mask = (torch.arange(past + SPARE, device=DEVICE) <= past).expand(batch, 1, 1, -1)
        arguments = {"attention_mask": mask, "position_ids": position, "past_key_values": cache, "use_cache": True}
        out = view.blocks[layer].layer(x.clone(), position_embeddings=rotary, **arguments)
        return (out - x).double()

    def decide(layer: int, seen: Tensor, step: Step) -> Tensor:
        router = routers[layer]
        scores = F.linear(seen, router.weight, router.bias).float()
        best = scores.sort(dim=-1, descending=True, stable=True)
        edge = best.values[..., router.top - 1] - best.values[..., router.top]
        clear[layer] = (edge > 2**-5 * best.values.abs().amax(-1)).flatten()
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best.indices[..., : router.top], True)
        return kept.repeat_interleave(view.group_size, -1)

    for layer in sorted({1, view.n_layers // 2, view.n_layers - 1}):
        with variant(blocks, {}):
            dense = run(layer)
        with variant(blocks, routers):
            skipped = run(layer)
        own = view.blocks[layer].layer.__dict__.pop("forward")
        try:
            bench.check(f"{view.name}, layer {layer}, dense", dense, run(layer))
            with view.tracker.tracking(Policy("decode")):
                with masked_heads.skipping(view, INPUT, decide, "mask_output"):
                    view.tracker.step = step
                    masked = run(layer)
        finally:
            view.blocks[layer].layer.forward = own
        at = clear[layer]
        if at.any():
            bench.check(f"{view.name}, layer {layer}, half of the groups", skipped[at], masked[at])


def step_bytes(view: View, batch: int, context: int, kept: float) -> float:
    """Bytes that one step reads: block weights, the head, the kept share of the cache of all layers but the first."""
    head = view.model.get_output_embeddings().weight.numel()
    cache = 2 * batch * context * view.n_kv_heads * HEAD_DIM * (1 + (view.n_layers - 1) * kept)
    return 2.0 * (view.block_weights * view.n_layers + head + cache)


def looped(loop: DecodeLoop, context: int, tokens: Tensor, repeats: int) -> Call:
    """A run of `repeats` tokens from the context, with the graph that was captured."""

    def run() -> int:
        loop.rewind(context, tokens)
        for _ in range(repeats):
            loop.step()
        return repeats

    return run


@torch.no_grad()
def steps(bench: Bench, memory: Cache, fused: Fused, batch: int, context: int) -> None:
    """The whole step: SDPA, our attention at 0 %, and half of the KV groups."""
    view, blocks, routers = fused.view, fused.blocks, fused.routers
    tokens = torch.randint(0, view.model.config.vocab_size, (batch, 1), device=DEVICE)
    library = min((r for r in bench.record["rows"] if r["table"] == "attention" and r["variant"] in LIBRARY),
                  key=lambda row: row["us"] / row["floor_us"], default={"variant": "flash"})["variant"]  # fmt: skip
    own = {
        f"dense, {library}": ({}, Library(view, LIBRARY[library], context + 1)),
        "dense, kernel 0%": ({}, None),
        "half of the groups": (routers, None),
    }
    dense, sparse = (step_bytes(view, batch, context, kept) for kept in (1.0, 0.5))
    repeats = min(SPARE - 2, max(1, int(8e-3 / (dense / bench.rate))))
    calls: dict[str, Call] = {}
    logits = {}
    for name, (chosen, attend) in own.items():
        with variant(blocks, chosen, attend):
            loop = DecodeLoop(view, static_cache(view, memory, batch, context), tokens)
        calls[name] = looped(loop, context, tokens, repeats)
        loop.rewind(context, tokens)
        logits[name] = loop.step().clone()
    names = list(own)
    assert all(torch.isfinite(y).all() for y in logits.values())
    where = f"{view.name}, batch {batch}, context {context}"
    bench.record["checks"][f"{where}, logits of both dense steps"] = error(logits[names[0]], logits[names[1]].double())
    floors = {name: sparse if name == names[-1] else dense for name in names}
    bench.compare("step", calls, floors, names[:2], shape=view.name, batch=batch, context=context)


@torch.no_grad()
def single_steps(bench: Bench, memory: Cache, view: View, contexts: tuple[int, ...]) -> None:
    """The tuned dense step for one sequence, to compare the batch's step at batch 1 with."""
    with fast_decode(view, "columns"):
        for context in contexts:
            tokens = torch.zeros(1, 1, dtype=torch.long, device=DEVICE)
            loop = DecodeLoop(view, static_cache(view, memory, 1, context), tokens)
            floor = {"dense columns": step_bytes(view, 1, context, 1.0)}
            calls = {"dense columns": looped(loop, context, tokens, 4)}
            bench.compare("step", calls, floor, ["dense columns"], shape=view.name, batch=1, context=context)


def against_single(rows: list[dict[str, Any]]) -> None:
    """Give the batch's steps at batch 1 their ratio to the tuned step of one sequence, of medians, where it is faster.

    The two run on copies of the weights in other layouts, never at once, so their rounds are not paired.
    """
    steps = [row for row in rows if row["table"] == "step" and row["batch"] == 1]
    single = {(row["shape"], row["context"]): row["us"] for row in steps if row["variant"] == "dense columns"}
    for row in steps:
        best = single.get((row["shape"], row["context"]))
        if best is not None and row["variant"] != "dense columns":
            row["over dense columns"] = best / row["us"]
            row["over tuned dense"] = min(row["over tuned dense"], best / row["us"])
