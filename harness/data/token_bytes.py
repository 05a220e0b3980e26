"""How many bytes of a text each of its tokens stands for: what bits per byte divides by.

A token may be a part of a character. Decoded by itself it becomes U+FFFD, which has three bytes whatever the part has:
so nothing is decoded here, and the text's own bytes are shared out among its tokens.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np


def tokens_and_bytes(tokenizer: Any, text: str) -> tuple[list[int], list[int] | None]:
    """Ids of a text without special tokens, and for each how many of the text's UTF-8 bytes it stands for.

    A byte-level tokenizer says which bytes (unless it rewrites the text first). Others say which characters: those from
    the end of the token before, and where several tokens make one character they share its bytes evenly. None in place
    of the bytes where the tokenizer says neither.
    """
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    ids = list(encoded["input_ids"])
    sizes = _byte_level(tokenizer.convert_ids_to_tokens(ids), text)
    if sizes is None and fast:
        sizes = _by_characters(np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 1], text)
    return ids, sizes


@cache
def _alphabet() -> dict[str, int]:
    """Byte-level BPE's characters for bytes: a printable one stands for itself, the others are numbered from U+0100."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def _byte_level(tokens: list[str], text: str) -> list[int] | None:
    """A character of the vocabulary for a byte of the text, if that is what these tokens are."""
    alphabet = _alphabet()
    try:
        spelt = bytes(alphabet[character] for token in tokens for character in token)
    except KeyError:
        return None
    return [len(token) for token in tokens] if spelt == text.encode() else None


def _by_characters(ends: np.ndarray, text: str) -> list[int]:
    """ends: int64 [tokens], the character of the text at which each token ends."""
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (code_points >= 0x80) + (code_points >= 0x800) + (code_points >= 0x10000).astype(np.int64)
    reached = np.maximum.accumulate(ends) if len(ends) else ends
    byte = np.concatenate([[0], np.cumsum(widths)])[reached]  # of the text, that each token reaches
    new = np.diff(byte, prepend=0)
    # A token that reaches no further than the one before is a part of the same character.
    starts = np.flatnonzero((new > 0) | (np.arange(len(new)) == 0))
    several = np.diff(starts, append=len(new))
    place = np.arange(len(new)) - np.repeat(starts, several)
    total, among = np.repeat(new[starts], several), np.repeat(several, several)
    return (total * (place + 1) // among - total * place // among).tolist()
