"""Read and write the tables: Arrow IPC, memory-mapped, schema checked at both ends, written beside and renamed."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from vapo.errors import UserError
from vapo.schemas import FORMAT, VERSION, name_of

if TYPE_CHECKING:
    import torch


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it becomes `path` when the block ends well, and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file so that a reader sees all of it or none."""
    with atomic_path(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_table(path: Path, schema: pa.Schema, columns: Mapping[str, Any]) -> pa.Table:
    """Write `columns` as a table of `schema`, in one record batch; returns it.

    Args:
        columns: one entry per column of the schema: a sequence of B values, an Arrow array, or for a ragged
            column also a pair (values [N], offsets [B+1]) of numpy arrays.

    Raises:
        UserError: a column is missing, unknown, of another type or length; names table and column.
    """
    table = _checked(path, schema, columns)
    with table_writer(path, schema) as write:
        write(table)
    return table


@contextmanager
def table_writer(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """Write a table batch after batch, so that only one of them is ever in memory: the block gets a function that
    appends a table of `schema`. The file is there when the block ends well.
    """
    with atomic_path(path) as beside, pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        yield writer.write_table


def _checked(path: Path, schema: pa.Schema, columns: Mapping[str, Any]) -> pa.Table:
    name = name_of(schema)
    unknown = sorted(set(columns) - set(schema.names))
    missing = sorted(set(schema.names) - set(columns))
    if unknown or missing:
        raise UserError(f"{path}: table {name}: missing columns {missing}, unknown columns {unknown}")
    arrays = []
    for field in schema:
        try:
            arrays.append(_array(columns[field.name], field.type))
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError) as error:
            raise UserError(f"{path}: table {name}: column {field.name}: expected {field.type}: {error}") from None
        if missing_values := _nulls(arrays[-1]):
            raise UserError(f"{path}: table {name}: column {field.name}: {missing_values} values are missing")
    lengths = {field.name: len(array) for field, array in zip(schema, arrays, strict=True)}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{path}: table {name}: columns differ in length: {lengths}")
    return pa.Table.from_arrays(arrays, schema=schema)


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Memory-map a table of `schema`: nothing is copied, and the columns are read-only.

    Raises:
        UserError: the file is absent, truncated, foreign, or of another schema; names file, column,
            expected and found.
    """
    name = name_of(schema)
    try:
        source = pa.memory_map(str(path), "r")
    except FileNotFoundError:
        raise UserError(f"{path}: expected table {name}, found no file: run the stage that writes it") from None
    except OSError as error:
        raise UserError(f"{path}: expected table {name}, cannot open it: {error}") from None
    try:
        table = pa.ipc.open_file(source).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{path}: expected table {name} as an Arrow IPC file, found {source.size()} bytes that are truncated or "
            f"of another format ({str(error).splitlines()[0]}): run the stage that writes it again"
        ) from None
    found = name_of(table.schema)
    if found != name:
        raise UserError(f"{path}: expected table {name}, found {f'table {found}' if found else 'a foreign Arrow file'}")
    version = (table.schema.metadata or {}).get(VERSION, b"?")
    if version != FORMAT:
        raise UserError(f"{path}: table {name}: expected format {FORMAT.decode()}, found {version.decode()}")
    for field in schema:
        index = table.schema.get_field_index(field.name)
        if index < 0:
            raise UserError(f"{path}: table {name}: expected column {field.name} ({field.type}), found none")
        if table.schema.field(index).type != field.type:
            raise UserError(
                f"{path}: table {name}: column {field.name}: expected {field.type}, "
                f"found {table.schema.field(index).type}"
            )
    extra = sorted(set(table.schema.names) - set(schema.names))
    if extra:
        raise UserError(f"{path}: table {name}: expected no further columns, found {extra}")
    return table


def check_joined(path: Path, table: pa.Table, rollouts: pa.Table) -> None:
    """Rows of `table` must be those of `rollouts`, in order.

    Raises:
        UserError: another number of rows or another `rollout_id` somewhere.
    """
    if table.column("rollout_id").equals(rollouts.column("rollout_id")):
        return
    if len(table) != len(rollouts):
        raise UserError(f"{path}: column rollout_id: expected {len(rollouts)} rows as in ROLLOUTS, found {len(table)}")
    ours, theirs = table.column("rollout_id").to_pylist(), rollouts.column("rollout_id").to_pylist()
    row = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    raise UserError(f"{path}: column rollout_id: row {row}: expected {theirs[row]}, found {ours[row]}")


def flat(table: pa.Table, column: str) -> np.ndarray:
    """A column of numbers as numpy [B], without a copy when it is one chunk of a fixed-width type."""
    array = _one_chunk(table, column)
    return array.to_numpy(zero_copy_only=not pa.types.is_boolean(array.type))


def ragged(table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """A ragged column as (values [N], offsets [B+1]) without a copy; row i is values[offsets[i]:offsets[i+1]]."""
    array = _one_chunk(table, column)
    offsets = array.offsets.to_numpy(zero_copy_only=True)
    return array.values.to_numpy(zero_copy_only=True), offsets


def rows(table: pa.Table, column: str) -> list[np.ndarray]:
    """A ragged column as B views [T] into the mapped file."""
    values, offsets = ragged(table, column)
    return [values[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def to_torch(array: np.ndarray) -> torch.Tensor:
    """A tensor over the same memory. It is read-only: torch cannot express that, so do not write to it."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def offsets_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Offsets [B+1] int32 of rows with these lengths [B]."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise UserError(f"{offsets[-1]} tokens in one table: at most {np.iinfo(np.int32).max}; lower rollout.prompts")
    return offsets.astype(np.int32)


def _one_chunk(table: pa.Table, column: str) -> pa.Array:
    chunked = table.column(column)
    if chunked.num_chunks == 1:
        return chunked.chunk(0)
    return pa.concat_arrays(chunked.chunks) if chunked.num_chunks else pa.array([], chunked.type)


def _nulls(array: pa.Array) -> int:
    """How many values are missing, inside the lists of a ragged column too."""
    return array.null_count + (array.flatten().null_count if pa.types.is_list(array.type) else 0)


def _array(column: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(column, tuple) and pa.types.is_list(kind):
        values, offsets = column
        if offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
            raise pa.ArrowInvalid(f"offsets {offsets[0]} to {offsets[-1]} do not cut {len(values)} values into rows")
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, kind.value_type), type=kind)
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, pa.Array):
        return column.cast(kind)
    return pa.array(column, kind)


__all__ = [
    "atomic_path",
    "check_joined",
    "flat",
    "offsets_of",
    "ragged",
    "read_table",
    "rows",
    "table_writer",
    "to_torch",
    "write_table",
    "write_text",
]
