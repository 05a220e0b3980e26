"""Decode attention inside the Hugging Face module, on a CPU. The fused GPU step is in test_kernels_triton_step.py."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, StaticCache

from harness.execution.decode_loop import DecodeLoop
from harness.execution.fused_step import decode_attention
from harness.execution.layouts import own_gemv
from harness.model.families import view_of


def tiny(family):
    if family == "llama":
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = LlamaForCausalLM(config)
    else:
        config = OPTConfig(
            vocab_size=64,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=64,
        )
        model = OPTForCausalLM(config)
    for p in model.parameters():
        p.data.mul_(3 if p.dim() > 1 else 1)
    return model.eval()


def cache_of(model, static):
    return StaticCache(config=model.config, max_cache_len=24) if static else DynamicCache()


@torch.no_grad()
def logits(model, ids, static, tokens=5):
    cache = cache_of(model, static)
    seen = [model(ids, past_key_values=cache, use_cache=True).logits[:, -1:]]
    for _ in range(tokens):
        seen.append(model(seen[-1].argmax(-1), past_key_values=cache, use_cache=True).logits)
    return torch.cat(seen, 1)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_attention_kernel_equals_the_modules_own(family, static, batch):
    model = tiny(family)
    ids = torch.randint(3, 64, (batch, 9))
    want = logits(model, ids, static)
    with decode_attention(model):
        got = logits(model, ids, static)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model, ids, static), want)


@torch.no_grad()
def test_padding_keeps_its_mask():
    model = tiny("llama")
    ids = torch.randint(3, 64, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    one_more = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)

    def run():
        cache = DynamicCache()
        token = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        return model(token, attention_mask=one_more, past_key_values=cache, use_cache=True).logits

    want = run()
    with decode_attention(model):
        torch.testing.assert_close(run(), want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_loop_decodes_greedily_and_rewinds():
    model = tiny("llama")
    ids = torch.randint(3, 64, (1, 9))
    want = logits(model, ids, True)
    cache = cache_of(model, True)
    token = model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    with decode_attention(model):
        loop = DecodeLoop(view_of(model), cache, token)
        for _ in range(2):
            got = torch.cat([loop.step().clone() for _ in range(5)], 1)
            torch.testing.assert_close(got, want[:, 1:], rtol=1e-4, atol=1e-4)
            loop.rewind(9, token)


@torch.no_grad()
def test_loop_decodes_a_batch_on_the_kernels_layout():
    """What a GPU captures above batch 1."""
    model = tiny("llama")
    ids = torch.randint(3, 64, (3, 9))
    want = logits(model, ids, True)
    cache = cache_of(model, True)
    view = view_of(model)
    with own_gemv(view, limits={}):
        token = model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        loop = DecodeLoop(view, cache, token)
        got = torch.cat([loop.step().clone() for _ in range(5)], 1)
    torch.testing.assert_close(got, want[:, 1:], rtol=1e-4, atol=1e-4)
