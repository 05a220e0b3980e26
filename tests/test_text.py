"""Text for perplexity and calibration: whole, apart from each other, cut into exact windows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.data import text
from harness.errors import ConfigError
from harness.run import session


class Letters:
    """A tokenizer with one token a letter."""

    def __call__(self, string, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in string]}


def test_evaluation_text_is_boolqs_passages(tokenizer):
    whole = text.evaluation_text()
    assert whole.count("\n") == 2937
    assert whole.startswith("All biomass goes through")
    assert text.token_windows(tokenizer, whole, 512).shape == (741, 512)


def test_calibration_text_shares_no_long_run_with_the_evaluation_text():
    stories = text.calibration_text()
    assert len(stories) == 748089  # one story of 499 is in boolq, too
    scored = set(text._runs(text.evaluation_text()))
    assert text.calibration_text("squad") != stories
    assert not scored & set(text._runs(stories)) and not scored & set(text._runs(text.calibration_text("squad")))


def test_the_same_text_comes_back_from_the_cache():
    first = text.text_hash(text.calibration_text("coqa"))
    text.calibration_text.cache_clear()
    assert text.text_hash(text.calibration_text("coqa")) == first


def test_a_passage_that_shares_a_long_run_with_a_scored_document_is_dropped(monkeypatch):
    run = " ".join(f"w{number}" for number in range(13))
    docs = {"test": [{"choices": {"text": [f"Before, {run.upper()}; after"]}, "label": 1}]}
    monkeypatch.setattr(text, "local_tasks", lambda: ["some_task"])
    monkeypatch.setattr(text, "local_docs", lambda name: docs)
    short = run.rsplit(" ", 1)[0]
    assert text._unscored([f"x {run} y", f"x {short} y", "z"]) == [f"x {short} y", "z"]


def test_windows_of_several_texts_take_turns():
    first, second = (text.Windows(torch.arange(2 * n).view(n, 2) + 100 * n, None, n) for n in (2, 4))
    found = text.in_turns([first, second])
    assert found.available == 6 and found.bytes is None
    assert found.tokens[:, 0].tolist() == [200, 400, 202, 402, 404, 406]
    assert text.in_turns([first]) is first


def test_a_mixture_is_named_by_its_texts_and_asks_each_once(monkeypatch):
    monkeypatch.setattr(text, "calibration_text", lambda name: f"{name} " * 30)
    words = Words()
    session._windows.cache_clear()
    session._tokens.cache_clear()
    learnt_from = {"path": None, "text": ["coqa", "squad"], "tokens": 50, "window": 10}
    assert session._calibration_windows(words, learnt_from).shape == (5, 10)
    session._check_length(words, None, ("coqa", "squad"), 10, 6)
    with pytest.raises(ConfigError, match="calibration asks for 70 tokens but the text has only 60"):
        session._check_length(words, None, ("coqa", "squad"), 10, 7)


def test_an_unknown_text_is_a_config_error():
    with pytest.raises(ConfigError, match="calibration text pile is unknown: choose one of coqa, squad"):
        text.calibration_text("pile")


@given(
    string=st.text(alphabet="abcdef", min_size=1, max_size=60),
    length=st.integers(1, 7),
    skip=st.integers(0, 4),
    count=st.none() | st.integers(1, 5),
)
def test_windows_are_consecutive_and_whole(string, length, skip, count):
    whole = len(string) // length
    if skip + (count or 1) > whole:
        with pytest.raises(ConfigError):
            text.token_windows(Letters(), string, length, count, skip)
        return
    windows = text.token_windows(Letters(), string, length, count, skip)
    rows = whole - skip if count is None else count
    assert windows.shape == (rows, length)
    assert "".join(map(chr, windows.flatten().tolist())) == string[skip * length : (skip + rows) * length]


def test_too_little_text_is_one_clear_sentence():
    with pytest.raises(ConfigError, match="^calibration asks for 40 tokens but the text has only 25$"):
        text.token_windows(Letters(), "a" * 25, 10, count=3, skip=1)
    with pytest.raises(ConfigError, match="^perplexity asks for 100 tokens but the text has only 25$"):
        text.token_windows(Letters(), "a" * 25, 100, what="perplexity")


def test_own_text_reads_utf8(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("grüße\n", encoding="utf-8")
    assert text.own_text(path) == "grüße\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "can't be read: No such file"), (b"\xff\xfe\xfa", "is not UTF-8 text"), (b" \n", "is empty")],
)
def test_own_text_that_is_no_text_is_a_config_error(tmp_path, content, message):
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        text.own_text(path)


def test_text_hash_is_sha256():
    assert text.text_hash("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


class Words:
    """A tokenizer of words, which counts what it has cut."""

    def __init__(self):
        self.cut = 0

    def __call__(self, string, **_):
        self.cut += len(string)
        return {"input_ids": [0] * len(string.split())}

    def convert_ids_to_tokens(self, ids):
        return ["no bytes"] * len(ids)


def test_whether_a_long_text_is_long_enough_is_read_off_its_beginning(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("four " * 10_000)
    words = Words()
    session._check_length(words, str(path), None, 10, 20)
    assert 0 < words.cut < 2_000
    session._check_length(words, str(path), None, 100, 100)  # exactly as long as asked for
    with pytest.raises(ConfigError, match=r"perplexity asks for 10100 tokens but the text has only 10000 in windows"):
        session._check_length(words, str(path), None, 100, 101)
    long = "incomprehensibilities " * 100  # fewer tokens than its length lets expect
    path.write_text(long)
    with pytest.raises(ConfigError, match="has only 100 "):
        session._check_length(Words(), str(path), None, 10, 11)
