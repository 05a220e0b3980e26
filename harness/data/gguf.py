"""GGUF files as Hugging Face folders: weights de-quantised once, into the cache.

Values of 4 to 6 bits (d * q + m, with scale and offset in fp16) are stored in bfloat16, which rounds them to 8
significant bits. Files of 8 bits, fp16 and fp32 are stored as fp32, which keeps every value. transformers reads config
and tokenizer out of the file; its words on what it can't read are passed on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from harness.errors import ConfigError

RECIPE = 1  # raise it when the conversion below changes what it writes
EXACT = {"F32", "F16", "Q8_0", "Q8_1", "Q8_K", "F64"}  # types whose values bfloat16 would round away


def dequantise(file: Path, built: Path, dtype: str | None = None) -> None:
    """Write the model of a GGUF file to the folder `built`. dtype: of the weights; None: see the module.

    Raises ConfigError where the file is no GGUF file, or one of an architecture that transformers can't read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _parsed_once():
        facts = read(file)
        try:
            # Without dequantize=True transformers 5 keeps a quantised wrapper that can't be saved.
            model: Any = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=getattr(torch, dtype or facts["dtype"]),
                quantization_config=GgufConfig(dequantize=True),
            )
            tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except (ValueError, KeyError, NotImplementedError, AttributeError, TypeError) as error:
            raise ConfigError(f"{file.name} can't be read: {' '.join(str(error).split())[:300]}") from error
    if facts["pre"] == "smollm":
        _split_digits(tokenizer)
    # llama.context_length of the file; else "unlimited" would hide a prompt that is too long.
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(built)
    tokenizer.save_pretrained(built)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Let all who read the file inside share one reader: config, weights and tokenizer are each read by another of
    transformers' functions, and going through 150,000 tokens of a vocabulary in Python takes half of the conversion.
    """
    import gguf

    reader = gguf.GGUFReader
    setattr(gguf, "GGUFReader", cache(reader))  # noqa: B010 - mypy knows a class there
    try:
        yield
    finally:
        setattr(gguf, "GGUFReader", reader)  # noqa: B010


def read(file: Path) -> dict[str, Any]:
    """Facts of a GGUF file: the dtype to store it in, its kind (Q4_K_M, or most weights' type), its pre-tokenizer."""
    from gguf import GGUFReader, LlamaFileType

    try:
        reader = GGUFReader(str(file))  # a string, as transformers gives it
        sizes: dict[str, int] = {}
        for tensor in reader.tensors:
            own = tensor.tensor_type.name
            sizes[own] = sizes.get(own, 0) + int(tensor.n_elements)
        field = reader.fields.get("tokenizer.ggml.pre")
        pre = None if field is None else field.contents()
        told = reader.fields.get("general.file_type")
        kind = (
            None if told is None else LlamaFileType(told.contents()).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        )
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ConfigError(f"{file} is no GGUF file that can be read: {' '.join(str(error).split())[:200]}") from error
    most = max(sizes, key=lambda kind: sizes[kind]) if sizes else "F32"
    return {"dtype": "float32" if most in EXACT else "bfloat16", "kind": kind or most, "pre": pre}


def _split_digits(tokenizer: Any) -> None:
    """The file names the pre-tokenizer "smollm": each digit apart, then GPT-2's split; transformers drops the digits.

    That changes how blanks and newlines before a digit are split.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
