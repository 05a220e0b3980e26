"""Bits per byte divides by the text's own bytes, whatever a tokenizer makes of a character."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from harness.data import text
from harness.data.token_bytes import tokens_and_bytes
from harness.model.families import view_of
from harness.model.step import Policy
from harness.probes import perplexity
from tests import tiny

CHINESE = (
    "我们在公园里看到了一只猫🐈和两只狗🐕，它们一起玩耍🎉。\n天气很好☀️，孩子们在草地上放风筝🪁，老人们打太极拳。" * 3
)
LATIN = "The naïve café — “quoted” — costs 5 € a day.\n" * 20


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_level(trim: bool) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([CHINESE], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return wrapped(made)


def metaspace(normalizer: normalizers.Normalizer | None = None) -> PreTrainedTokenizerFast:
    """As LLaMA 2's: words with their blank, and bytes where a character is unknown."""
    letters = sorted(set(LATIN.replace(" ", "▁")) | {"我", "们"})
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {letter: 256 + number for number, letter in enumerate(letters)} | {"<unk>": 999}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    if normalizer is not None:
        made.normalizer = normalizer
    return wrapped(made)


def unigram() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"])
    made.train_from_iterator([CHINESE, LATIN], trainer)
    return wrapped(made)


MAKERS = {
    "byte level": lambda: byte_level(False),
    "byte level, trimmed": lambda: byte_level(True),
    "metaspace": metaspace,
    "metaspace, NFC": lambda: metaspace(normalizers.NFC()),
    "unigram, NFKC": unigram,
}


@pytest.fixture(scope="module", params=["embedded", *MAKERS])
def any_tokenizer(request, tokenizer):
    return tokenizer if request.param == "embedded" else MAKERS[request.param]()


def spelt(token: str) -> int:
    """Bytes of a token of a vocabulary with byte fallback."""
    return 1 if token.startswith("<0x") else len(token.replace("▁", " ").encode())


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_every_byte_of_a_text_belongs_to_one_token(any_tokenizer, string):
    ids, sizes = tokens_and_bytes(any_tokenizer, string)
    assert len(ids) == len(sizes) and min(sizes, default=0) >= 0
    assert ids == any_tokenizer(string, add_special_tokens=False)["input_ids"]
    if string in any_tokenizer.decode(ids):  # nothing at its end was thrown away
        assert sum(sizes) == len(string.encode())


@pytest.mark.parametrize("string", [CHINESE, LATIN])
def test_windows_count_the_texts_own_bytes_and_no_replacement_characters(any_tokenizer, string):
    windows = text.text_windows(any_tokenizer, string, 32)
    whole = tokens_and_bytes(any_tokenizer, string)[1]
    assert sum(whole) == len(string.encode())
    assert windows.bytes.sum() == sum(whole[: windows.tokens.numel()])
    pieces = any_tokenizer.convert_ids_to_tokens(windows.tokens.flatten().tolist())
    if any(piece.startswith("<0x") for piece in pieces):  # spells bytes; its first is a blank of its own
        assert windows.bytes.flatten().tolist()[2:] == [spelt(piece) for piece in pieces][2:]


def test_a_byte_level_token_has_as_many_bytes_as_it_spells():
    made = byte_level(True)
    windows = text.text_windows(made, CHINESE, 32)
    pieces = made.convert_ids_to_tokens(windows.tokens.flatten().tolist())
    assert windows.bytes.flatten().tolist() == [len(piece) for piece in pieces]
    decoded = sum(len(made.decode(window[1:].tolist()).encode()) for window in windows.tokens)
    assert decoded > windows.bytes[:, 1:].sum(), "this text would show the fault"


def test_tokens_of_one_character_share_its_bytes():
    made = metaspace()
    ids, sizes = tokens_and_bytes(made, "a🎉我d")
    assert made.convert_ids_to_tokens(ids) == ["▁", "a", "<0xF0>", "<0x9F>", "<0x8E>", "<0x89>", "我", "d"]
    assert sizes[2:] == [1, 1, 1, 1, 3, 1] and sum(sizes) == 9


def test_a_tokenizer_that_says_nothing_has_no_bits_per_byte():
    class Slow:
        is_fast = False

        def __call__(self, string, **_):
            return {"input_ids": list(range(len(string)))}

        def convert_ids_to_tokens(self, ids):
            return ["▁?" for _ in ids]

    windows = text.text_windows(Slow(), "abcdefgh", 4)
    assert windows.bytes is None and windows.first(1, "x").tokens.tolist() == [[0, 1, 2, 3]]


def test_bits_per_byte_rests_on_them(tokenizer):
    view = view_of(tiny.make("llama", vocabulary=len(tokenizer)))
    windows = text.text_windows(tokenizer, CHINESE, 32)
    rows, samples, _ = perplexity.measure(view, [], Policy(), windows, 0, {}, longest=512)
    row = next(row for row in rows if row["metric"] == "bits_per_byte")
    pieces = [tokenizer.convert_ids_to_tokens(window[1:].tolist()) for window in windows.tokens]
    own = sum(len(piece) for window in pieces for piece in window)
    assert row["n"] == own
    assert row["value"] == pytest.approx(samples["nll"].sum() / math.log(2) / own)
    assert sum(len(tokenizer.decode(window[1:].tolist()).encode()) for window in windows.tokens) > own
