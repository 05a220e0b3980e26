"""Files of a folder that may be anybody's: JSON, YAML, Parquet, CSV and safetensors, none of which can carry code.

What is cut short, altered or of another form is one sentence, a `DamagedError` that names the file.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import DamagedError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

# What the libraries below raise for bytes that are none of their format. Nothing of ours runs where these are caught.
_OF_BYTES = (OSError, ValueError, OverflowError, RecursionError, EOFError)
_OF_TABLES = (*_OF_BYTES, TypeError, KeyError, IndexError, AttributeError, NotImplementedError)
_EXPANDS, _LEAST = 8, 1 << 26  # bytes that one of a whole file may become; that any file may ask for
_TAIL, _MAGIC = 12, b"PAR1"  # the least that a Parquet file has; how it begins and ends


@contextlib.contextmanager
def undamaged(path: Path, kinds: tuple[type[BaseException], ...] = _OF_BYTES) -> Iterator[None]:
    """Turn these errors into one sentence that names the file. Memory that runs short is no damage: MemoryError."""
    try:
        yield
    except DamagedError:
        raise
    except (MemoryError, *kinds) as error:
        if isinstance(error, MemoryError) and not _claims_too_much(path):
            raise
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise DamagedError(f"{path} can't be read, it is cut short or altered: {said}") from error


def _claims_too_much(path: Path) -> bool:
    """Whether a file for which memory did not suffice is altered: for a whole one of its size there is enough."""
    try:
        bytearray(max(_LEAST, _EXPANDS * path.stat().st_size))  # never touched, so it costs nothing
    except (MemoryError, OverflowError, OSError):
        return False
    return True


def json_of(text: str | bytes, path: Path) -> dict[str, Any]:
    """The JSON object that was read from `path`."""
    with undamaged(path):
        found = json.loads(text)
        _plain(found)
    if not isinstance(found, dict):
        raise DamagedError(f"{path} can't be read: it holds no JSON object")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object."""
    with undamaged(path):
        content = path.read_bytes()
    return json_of(content, path)


def read_yaml(path: Path) -> dict[str, Any]:
    """A file's YAML mapping, of what JSON can say: no tags, and no aliases, by which a line unfolds to gigabytes."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("an alias in a stored config")
            return super().compose_node(parent, index)

    with undamaged(path, (*_OF_TABLES, yaml.YAMLError)):
        found = yaml.load(path.read_bytes(), Loader)  # a SafeLoader
        _plain(found)
    if not isinstance(found, dict):
        raise DamagedError(f"{path} can't be read: it holds no mapping")
    return found


def _plain(value: Any) -> None:
    """Raise ValueError or RecursionError for what can't be written as JSON in UTF-8 again."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"a key that is no text: {key!r}")
            key.encode()
            _plain(inner)
    elif isinstance(value, list):
        for inner in value:
            _plain(inner)
    elif not (value is None or isinstance(value, bool | int | float)):
        raise ValueError(f"{type(value).__name__} has no form in JSON")


def read_parquet(
    path: Path, columns: Sequence[str] | None = None, kinds: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """A Parquet file, or some of its columns. kinds: column -> dtype that they are to have."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = list(kinds) if columns is None and kinds is not None else columns
    with undamaged(path, (*_OF_TABLES, pa.ArrowException)):
        file = pq.ParquetFile(path)  # of a table, pandas would take "name=value" in the path for a column
        if lacking := sorted(set(wanted or ()) - set(file.schema_arrow.names)):
            raise DamagedError(f"{path} can't be read: it lacks the columns {', '.join(lacking)}")
        frame = file.read(None if wanted is None else list(wanted)).to_pandas()
        if wanted is not None:
            frame = frame[list(wanted)]
        for name in frame.columns:
            if not isinstance(name, str):
                raise ValueError(f"a column's name is no text: {name!r}")
        return frame if kinds is None else _as(frame, kinds)


def read_csv(path: Path, **options: Any) -> pd.DataFrame:
    """A CSV file, compressed or not."""
    import zlib

    import pandas as pd

    with undamaged(path, (*_OF_TABLES, zlib.error)):
        return pd.read_csv(path, **options)


def typed(frame: pd.DataFrame, kinds: Mapping[str, str], path: Path) -> pd.DataFrame:
    """The frame with these dtypes. path: where it was read from."""
    with undamaged(path, _OF_TABLES):
        return _as(frame, kinds)


def _as(frame: pd.DataFrame, kinds: Mapping[str, str]) -> pd.DataFrame:
    return frame.astype(dict(kinds))


def read_tensors(path: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """A safetensors file, on the CPU. names: those that must be there."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with undamaged(path, (*_OF_BYTES, SafetensorError, KeyError, TypeError)):
        found = load_file(path)
    if lacking := sorted(set(names or ()) - set(found)):
        raise DamagedError(f"{path} can't be read: it lacks {', '.join(lacking)}")
    return found


def tensors_of(content: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of the content that was read from `path`."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    with undamaged(path, (*_OF_BYTES, SafetensorError, KeyError, TypeError)):
        return load(content)


def ends_well(path: Path) -> bool:
    """Whether a Parquet or safetensors file is there and as long as it says: one look that finds what was cut short."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if path.suffix != ".safetensors":
                file.seek(max(0, size - len(_MAGIC)))
                return size >= _TAIL and file.read() == _MAGIC
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                return False
            places = [at["data_offsets"][1] for name, at in json.loads(file.read(length)).items() if name[:2] != "__"]
            return size == 8 + length + max(places, default=0)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return False
