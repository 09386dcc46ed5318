"""Rows of JSONL, CSV and Parquet files, read as a stream: memory does not grow with the file."""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vapo.errors import UserError
from vapo.problems.rows import Row

BATCH = 1024  # rows of a Parquet file in memory at once ...
BUFFER = 1 << 20  # ... and bytes of each of its columns: a row group may be as large as the file

Wanted = Callable[[Sequence[str]], set[str]]  # from a file's columns to those that are read


def find_files(pattern: str, key: str) -> list[Path]:
    """The files that a path or a pattern such as data/*.parquet names, in order of their names.

    Raises:
        UserError: there is none, or not of a kind that can be read; says so of the recipe's `key`.
    """
    found = [Path(pattern)] if Path(pattern).exists() else [Path(name) for name in sorted(glob.glob(pattern))]  # noqa: PTH207
    if not found:
        raise UserError(f"{key} {pattern!r}: no such file: give a JSONL, CSV or Parquet file, or a pattern of them")
    for path in found:
        if path.is_dir():
            raise UserError(f"{key} {pattern!r}: {path} is a directory: name its files, say {path / '*.parquet'}")
        if path.suffix.lower() not in FORMATS:
            raise UserError(f"{key} {pattern!r}: {path} ends in {path.suffix!r}: name a file {sorted(FORMATS)}")
    return found


def read_rows(path: Path, wanted: Wanted) -> Iterator[Row]:
    """All rows of a file in order; `wanted` chooses columns where leaving the others out saves reading them.

    Raises:
        UserError: the file cannot be read, is damaged, or is not UTF-8; names file and line.
    """
    try:
        yield from FORMATS[path.suffix.lower()](path, wanted)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read ({reason}): check that it is whole and what its name says") from None


def count_rows(path: Path) -> int:
    """About how many rows there are: exactly for Parquet, the lines otherwise."""
    if path.suffix.lower() == ".parquet":
        try:
            return int(pq.read_metadata(path).num_rows)
        except (pa.ArrowException, OSError):
            return 0  # read_rows says what is wrong with it
    with path.open("rb") as handle:
        return sum(block.count(b"\n") for block in iter(lambda: handle.read(BUFFER), b""))


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends; only "\\n" ends one: JSON texts may hold the others of Unicode."""
    with path.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8 ({error}): save it as UTF-8") from None


def _jsonl(path: Path, wanted: Wanted) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also an integer of more digits than Python reads
            yield Row(place, (), {}, f"not JSON ({error}): write one object per line")
            continue
        if isinstance(values, dict):
            yield Row(place, values.keys(), values)
        else:
            yield Row(place, (), {}, f"expected an object, found {type(values).__name__}: write one object per line")


def _csv(path: Path, wanted: Wanted) -> Iterator[Row]:
    """Comma-separated with a header; cells are texts, and one in quotes may hold commas and new lines."""
    reader = csv.reader(_lines(path), strict=True)
    names: list[str] = []
    while True:
        place = f"{path}:{reader.line_num + 1}"  # where the row begins
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{place}: not CSV ({error}): quote cells that hold quotes, commas or new lines") from None
        if cells is None:
            return
        if not cells:
            continue
        if not names:
            names = _unlike(path, cells)
        elif len(cells) != len(names):
            yield Row(place, names, {}, f"{len(cells)} cells under a header of {len(names)} columns: quote commas")
        else:
            yield Row(place, names, dict(zip(names, cells, strict=True)))


def _parquet(path: Path, wanted: Wanted) -> Iterator[Row]:
    with pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:  # pre_buffer keeps all it reads
        names = _unlike(path, file.schema_arrow.names)
        read = [name for name in names if name in wanted(names)]
        number = 0
        for batch in file.iter_batches(BATCH, columns=read, use_threads=False):
            for values in _records(batch):
                number += 1
                fault = "" if isinstance(values, dict) else f"not UTF-8 ({values})"
                yield Row(f"{path}: row {number}", names, values if isinstance(values, dict) else {}, fault)


def _records(batch: pa.RecordBatch) -> Iterator[dict[str, object] | UnicodeDecodeError]:
    """A batch's rows; where texts are no UTF-8, which Parquet does not check, row by row."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            yield error
        else:
            for i in range(len(batch)):
                yield from _records(batch.slice(i, 1))


def _unlike(path: Path, names: Sequence[str]) -> list[str]:
    """The names of a file's columns, each of which stands there once."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: columns {twice} stand there twice: rename one of each")
    return list(names)


FORMATS: dict[str, Callable[[Path, Wanted], Iterator[Row]]] = {
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".parquet": _parquet,
}
