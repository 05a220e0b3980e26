"""Files of others: damage is one sentence, and memory that runs short is no damage."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from harness import reading
from harness.errors import DamagedError
from harness.reading import undamaged
from harness.results.collect import DERIVED, relate
from harness.results.rows import COLUMNS, to_frame


@pytest.mark.parametrize("error", [MemoryError(), pa.ArrowMemoryError("malloc of size 4611686018427387904 failed")])
def test_a_file_that_asks_for_more_than_a_whole_one_may_is_altered(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(DamagedError, match="rows.parquet can't be read, it is cut short or altered"), undamaged(path):
        raise error


@pytest.mark.parametrize("error", [MemoryError("no room"), pa.ArrowMemoryError("malloc of size 9 failed")])
def test_where_a_whole_file_would_not_fit_either_it_is_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setattr(reading, "_LEAST", 1 << 62)  # more than there is anywhere
    with pytest.raises(MemoryError), undamaged(path, (OSError, pa.ArrowException)):
        raise error


def test_a_stored_table_is_typed_as_a_collected_one() -> None:
    assert {name: str(kind) for name, kind in relate(to_frame([]), {}).dtypes.items()} == COLUMNS | DERIVED
