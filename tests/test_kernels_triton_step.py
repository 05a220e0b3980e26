"""The Hugging Face module with fused blocks against itself, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from harness.errors import UnsupportedError
from harness.execution.decode_loop import DecodeLoop
from harness.execution.fused_step import fast_decode
from harness.model.families import view_of
from methods.spon import biased
from tests import tiny
from tests.interpreter import error, interpreted, run_interpreted, starts_it


@starts_it
def test_in_the_interpreter():
    run_interpreted(__file__)


class TestFusedDecode:
    TOKENS = 2

    @pytest.fixture
    def view(self):

        config = LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
        )
        model = LlamaForCausalLM(config).eval().half()
        for p in model.parameters():
            p.data.mul_(3 if p.dim() > 1 else 1)
        return view_of(model)

    @torch.no_grad()
    def logits(self, view, loop=False):

        cache = StaticCache(config=view.model.config, max_cache_len=9 + self.TOKENS)
        prompt = torch.arange(9)[None]
        out = view.model(prompt, past_key_values=cache, use_cache=True).logits[:, -1:]
        seen = [out]
        steps = DecodeLoop(view, cache, out.argmax(-1)) if loop else None
        for _ in range(self.TOKENS):
            if steps is not None:
                out = steps.step().clone()
            else:
                out = view.model(out.argmax(-1), past_key_values=cache, use_cache=True).logits
            seen.append(out)
        if steps is not None:
            with pytest.raises(RuntimeError, match="full"):
                steps.step()
        return torch.cat(seen, 1).double()

    @interpreted
    @pytest.mark.parametrize("linear", ["columns", "rows", "library"])
    def test_equals_the_module_and_leaves_it_as_it_was(self, view, linear):
        want = self.logits(view)
        with fast_decode(view, linear):
            assert error(self.logits(view, loop=linear == "columns"), want) <= 3e-3
        assert torch.equal(self.logits(view), want)
        assert all(m.weight.is_contiguous() for block in view.blocks for _, m in block.projections())

    @interpreted
    @pytest.mark.parametrize("linear", ["columns", "rows", "library"])
    def test_qwen2s_biases_are_a_part_of_the_step(self, linear):
        view = tiny.view("qwen2", hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1)
        view.model.half()
        assert view.blocks[0].q.bias is not None and view.blocks[0].q.bias.abs().sum() > 0
        want = self.logits(view)
        with fast_decode(view, linear):
            assert error(self.logits(view, loop=True), want) <= 3e-3

    @interpreted
    def test_constants_folded_into_biases_are_a_part_of_the_step(self, view):
        """As SPON and combined leave the model, while they are attached."""
        constants = {
            (name, layer): torch.randn(module.out_features).half() * 0.3
            for layer, block in enumerate(view.blocks)
            for name, module in block.projections()
        }
        bare = self.logits(view)
        with biased(view, constants):
            want = self.logits(view)
            assert error(bare, want) > 0.1
            with fast_decode(view):
                assert error(self.logits(view), want) <= 3e-3
        assert torch.equal(self.logits(view), bare)

    @interpreted
    def test_thresholds_drop_what_masked_execution_drops(self, view):
        limits = {(name, 0): 0.3 for name in ("q", "v", "gate", "up", "down")} | {("o", 1): torch.rand(32) * 0.1}

        def masked(module, args, t):
            return (torch.where(args[0].float().abs() <= t, 0, args[0]),)

        handles = [
            getattr(view.blocks[layer], name).register_forward_pre_hook(lambda m, a, t=t: masked(m, a, t))
            for (name, layer), t in limits.items()
        ]
        self.TOKENS = 1
        want = self.logits(view)
        for handle in handles:
            handle.remove()
        handles = [
            getattr(view.blocks[layer], name).register_forward_pre_hook(
                lambda m, a, t=t: masked(m, a, t) if a[0].shape[1] > 1 else None
            )
            for (name, layer), t in limits.items()
        ]  # the prompt takes the module's own path
        with fast_decode(view, "columns", limits):
            got = self.logits(view)
        for handle in handles:
            handle.remove()
        assert error(got, want) <= 1e-2

    @interpreted
    def test_other_families_are_refused(self, view):
        from harness.execution.fused_step import fast_decode

        view.family = "opt"
        with pytest.raises(UnsupportedError, match="opt"), fast_decode(view):
            pass
