"""End to end decode of the Hugging Face module at the shape of Llama-2-7B, batch 1, random weights.

    python -m bench.gpu_decode --out results/bench/gpu_decode.json

`LlamaForCausalLM` itself with transformers' StaticCache, one CUDA graph around the step (greedy token and position
advance inside). Variants differ in how the projections run; norm, attention, embedding and greedy choice are the same
fused kernels in all of them:

  library   cuBLAS, merged q/k/v and gate/up
  rows      the tuned dense baseline, row-major Triton kernels
  columns   the column kernels on W^T: dense, with thresholds that keep everything (0 %), and with a threshold for
            each projection and layer. "Tuned dense" in the ratios is the faster of the two dense forms

Thresholds are set layer by layer on random tokens so that the requested share of every projection's input is dropped
(inputs already sparse), and the achieved share is counted on other tokens. Floor: bytes of kept weights, of the head
and of the cache over the read bandwidth measured in the same run. Before timing, single blocks are compared with the
module's own masked forward on the same inputs.
"""

from __future__ import annotations

import argparse
import time
import traceback
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import kernels.cuda as kc
from bench.gpu_common import error
from bench.record import where, write
from harness.execution.decode_loop import DecodeLoop
from harness.execution.fused_step import fast_decode
from harness.model.families import view_of
from harness.model.view import View

NEW_TOKENS = 32
REPEATS = 5


def llama_2_7b(dtype: torch.dtype, layers: int) -> View:
    """The shape of Llama-2-7B with random weights, built on the GPU."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=8192, rms_norm_eps=1e-5,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return view_of(model, "llama-2-7b shape")


class Masks:
    """Hooks that threshold the inputs of projections: while fitting they set the thresholds, afterwards they count."""

    def __init__(self, view: View, sparsity: float) -> None:
        self.view, self.sparsity = view, sparsity
        self.thresholds: dict[tuple[str, int], float] = {}
        self.fitting = True
        self.kept: dict[tuple[str, int], float] = {}

    def __enter__(self) -> Masks:
        self.handles = [
            module.register_forward_pre_hook(lambda _, args, key=(name, layer): self.mask(key, args[0]))
            for layer, block in enumerate(self.view.blocks)
            for name, module in block.projections()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def mask(self, key: tuple[str, int], x: Tensor) -> tuple[Tensor]:
        magnitude = x.float().abs()
        if self.fitting:
            flat = magnitude.flatten()
            self.thresholds[key] = flat.kthvalue(max(1, round(flat.numel() * self.sparsity))).values.item()
        keep = magnitude > self.thresholds[key]
        self.kept[key] = keep.float().mean().item()
        return (torch.where(keep, x, 0),)


@torch.no_grad()
def fit(view: View, sparsity: float) -> tuple[dict[tuple[str, int], float], dict[tuple[str, int], float]]:
    """Thresholds for a share of dropped channels, and the share kept by projection and layer on other tokens."""
    with Masks(view, sparsity) as masks:
        tokens = torch.randint(0, 32000, (2, 1, 64), device="cuda")
        view.model(tokens[0], logits_to_keep=1)
        masks.fitting = False
        view.model(tokens[1], logits_to_keep=1)
    return masks.thresholds, masks.kept


def dropped_share(view: View, kept: dict[tuple[str, int], float]) -> float:
    """Share of the blocks' linear weights that a token does not touch."""
    weights = sum(view.weights(name) * share for (name, _), share in kept.items())
    return 1 - weights / (view.block_weights * view.n_layers)


def touched(view: View, kept: dict[tuple[str, int], float], context: int) -> float:
    """Bytes that one step must read."""
    bytes_each = torch.finfo(view.dtype).bits // 8
    weights = sum(
        view.weights(name) * kept.get((name, layer), 1.0)
        for layer, block in enumerate(view.blocks)
        for name, _ in block.projections()
    )
    head = view.model.get_output_embeddings().weight.numel()
    cache = 2 * view.n_layers * view.n_kv_heads * view.head_dim * (context + NEW_TOKENS / 2)
    return (weights + head + cache) * bytes_each


@torch.no_grad()
def prefilled(view: View, context: int) -> tuple[StaticCache, Tensor]:
    torch.manual_seed(context)
    cache = StaticCache(config=view.model.config, max_cache_len=context + NEW_TOKENS + 2)
    prompt = torch.randint(0, 32000, (1, context), device="cuda")
    logits = view.model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return cache, logits[:, -1:].argmax(-1)


@torch.no_grad()
def block_outputs(view: View, layers: list[int], x: Tensor) -> dict[int, Tensor]:
    """What single blocks add to the residual stream at a cache of 37 random tokens, float64."""
    position = torch.tensor([[37]], device="cuda")
    rotary = view.model.model.rotary_emb(x, position)
    out = {}
    for layer in layers:
        torch.manual_seed(layer)
        cache = StaticCache(config=view.model.config, max_cache_len=64)
        filled = torch.randn(1, view.n_kv_heads, 37, view.head_dim, device="cuda").to(view.dtype)
        cache.layers[layer].update(filled, filled.flip(-1))
        arguments = {"attention_mask": None, "position_ids": position, "past_key_values": cache, "use_cache": True}
        if view.model.config._attn_implementation == "sdpa":
            arguments["attention_mask"] = (torch.arange(64, device="cuda") <= 37)[None, None, None]
        y = view.blocks[layer].layer(x.clone(), position_embeddings=rotary, **arguments)
        out[layer] = y.double() - x.double()
    return out


@torch.no_grad()
def masked_outputs(view: View, layers: list[int], thresholds: dict, x: Tensor) -> dict[int, Tensor]:
    """The same with every projection's input cut at its threshold; without thresholds nothing is."""
    with Masks(view, 0.0) as masks:
        masks.fitting, masks.thresholds = False, thresholds
        if not thresholds:
            masks.thresholds = {(n, i): -1.0 for i, b in enumerate(view.blocks) for n, _ in b.projections()}
        return block_outputs(view, layers, x)


def moved(x: Tensor) -> Tensor:
    """x with every entry moved by about one rounding."""
    return (x.float() * (1 + torch.finfo(x.dtype).eps / 2 * torch.randn_like(x.float()))).to(x.dtype)


@torch.no_grad()
def block_errors(view: View, linear: str, thresholds: dict) -> dict[str, dict[str, float]]:
    """What single blocks add to the residual stream, fused against masked, on the same input and cache: relative error.

    `one rounding` is the yardstick: the same masked block on an input moved by about one rounding. A threshold is a
    discontinuity, so both flip entries near it; neither error is that of a kernel alone (see bench/gpu_kernels.py).
    """
    layers = sorted({0, view.n_layers // 2, view.n_layers - 1})
    x = torch.randn(1, 1, view.d_model, device="cuda").to(view.dtype)
    want, near = (masked_outputs(view, layers, thresholds, each) for each in (x, moved(x)))
    with fast_decode(view, linear, thresholds):
        fused = block_outputs(view, layers, x)
    return {
        str(layer): {"fused": error(fused[layer], want[layer]), "one rounding": error(near[layer], want[layer])}
        for layer in layers
    }


def token_ms(loop: DecodeLoop, context: int, token: Tensor) -> float:
    """Milliseconds a token, over NEW_TOKENS of them after the context."""
    loop.rewind(context, token)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(NEW_TOKENS):
        loop.step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / NEW_TOKENS


@torch.no_grad()
def time_steps(view: View, context: int) -> list[float]:
    """Milliseconds a token: one value for each of REPEATS runs of NEW_TOKENS tokens from the same context."""
    cache, token = prefilled(view, context)
    loop = DecodeLoop(view, cache, token)
    times = [token_ms(loop, context, token) for _ in range(REPEATS + 1)]
    assert torch.isfinite(loop.logits).all()
    return times[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/bench/gpu_decode.json"))
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--rounds", type=int, default=2, help="times that every variant is set up and timed, in turn")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs an NVIDIA GPU")
    torch.manual_seed(0)
    view = llama_2_7b(getattr(torch, args.dtype), args.layers)
    rate = kc.read_bandwidth("cuda", 0.3)
    variants: dict[str, tuple[str, float | None]] = {"cublas": ("library", None)}
    variants |= {"dense rows": ("rows", None), "dense columns": ("columns", None)}
    variants |= {f"sparse {s:.0%}": ("columns", s) for s in (0.0, 0.25, 0.40, 0.50, 0.65)}
    keep_all = {(name, layer): -1.0 for layer, block in enumerate(view.blocks) for name, _ in block.projections()}
    fits = {s: fit(view, s) if s else (keep_all if s == 0.0 else {}, {}) for _, s in variants.values()}
    record: dict[str, Any] = {
        "what": __doc__,
        "environment": where(),
        "device": torch.cuda.get_device_name(),
        "read_bytes_per_s": rate,
        "dtype": args.dtype,
        "layers": args.layers,
        "new_tokens": NEW_TOKENS,
        "achieved": {f"{s:.0%}": dropped_share(view, k) for s, (_, k) in fits.items() if k},
        "failed": {},
        "block_errors": {},
        "rows": [],
    }

    runs: dict[tuple[str, int], list[float]] = {}
    for number in range(args.rounds):
        for name, (linear, sparsity) in variants.items():
            thresholds, kept = fits[sparsity]
            start = time.time()
            try:
                if number == 0:
                    record["block_errors"][name] = block_errors(view, linear, thresholds)
                with fast_decode(view, linear, thresholds, sparsity or 0.0):
                    for context in args.contexts:
                        runs.setdefault((name, context), []).extend(time_steps(view, context))
            except Exception:
                record["failed"][name] = traceback.format_exc()[-1500:]
                print(record["failed"][name], flush=True)
            torch.cuda.empty_cache()
            print(f"round {number} {name}: {time.time() - start:.1f} s", flush=True)
        record["rows"] = []
        for (name, context), times in runs.items():
            ms = median(times)
            floor = touched(view, fits[variants[name][1]][1], context) / rate * 1e3
            row = {"variant": name, "context": context, "ms": ms, "tokens_per_s": 1e3 / ms, "floor_ms": floor}
            row |= {"share_of_floor": floor / ms, "spread": (max(times) - min(times)) / ms, "runs": times}
            bases = {"cublas": ["cublas"], "sparse 0%": ["sparse 0%"], "tuned dense": ["dense rows", "dense columns"]}
            for base, names in bases.items():  # tuned dense: the faster of the two layouts
                theirs = [median(runs[n, context]) for n in names if (n, context) in runs]
                if theirs:
                    row[f"over {base}"] = min(theirs) / ms
            record["rows"].append(row)
        write(args.out, record)
    for row in record["rows"]:
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items() if k != "runs"})
    print(record["block_errors"], record["achieved"])
    raise SystemExit(1 if record["failed"] else 0)


if __name__ == "__main__":
    main()
