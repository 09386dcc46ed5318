"""How two tables of one schema differ, column by column: in which rows, and by how much; no Python object per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True)
class Column:
    """How a column differs. `values` are its numbers, one per row or token; the last three are absolute differences
    over the values that can be compared: not in rows of different length, not where one of both is NaN.
    """

    name: str
    rows: int  # in which it differs
    values: int | None = None  # that can be compared; None: no numbers
    differing: int | None = None  # of these
    mean: float | None = None
    std: float | None = None
    largest: float | None = None

    @property
    def equal(self) -> bool:
        """Whether it is the same in every row."""
        return self.rows == 0


@dataclass(frozen=True)
class Difference:
    """Of two tables: their rows, and if they have equally many, every column."""

    rows: tuple[int, int]
    columns: tuple[Column, ...]


def difference(old: pa.Table, new: pa.Table) -> Difference:
    """Compare row by row; columns that only one of both has are left out."""
    if old.num_rows != new.num_rows:
        return Difference((old.num_rows, new.num_rows), ())
    names = [name for name in old.column_names if name in new.column_names]
    columns = tuple(_column(name, _whole(old[name]), _whole(new[name])) for name in names)
    return Difference((old.num_rows, new.num_rows), columns)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    found = column.combine_chunks()
    return found.chunk(0) if isinstance(found, pa.ChunkedArray) and found.num_chunks else found


def _column(name: str, old: pa.Array, new: pa.Array) -> Column:
    if not pa.types.is_list(old.type):
        changed = _changed(old, new)
        return Column(name, _count(changed), *_sizes(old, new, changed))
    unlike = pc.not_equal(pc.list_value_length(old), pc.list_value_length(new))
    alike = pc.invert(unlike)
    old, new = old.filter(alike), new.filter(alike)  # rows of one length: their values stand side by side
    values = pc.list_flatten(old), pc.list_flatten(new)
    changed = _changed(*values)
    rows = pc.count_distinct(pc.list_parent_indices(old).filter(changed)).as_py()
    found = _sizes(*values, changed)
    if pa.types.is_integer(values[0].type):  # tokens: which are others is all that their numbers tell
        found = found[:2]
    return Column(name, _count(unlike) + rows, *found)


def _changed(old: pa.Array, new: pa.Array) -> pa.Array:
    """Where two columns differ; NaN equals NaN."""
    changed = pc.not_equal(old, new)
    if pa.types.is_floating(old.type):
        changed = pc.and_(changed, pc.invert(pc.and_(pc.is_nan(old), pc.is_nan(new))))
    return changed


def _sizes(old: pa.Array, new: pa.Array, changed: pa.Array) -> tuple[Any, ...]:
    """What `Column` holds of numbers: values, differing, mean, std, largest."""
    if not (pa.types.is_floating(old.type) or pa.types.is_integer(old.type)):
        return ()
    sizes = np.abs(_numbers(new) - _numbers(old))
    sizes[~changed.to_numpy(zero_copy_only=False)] = 0.0  # also where both are NaN, or infinite
    known = sizes[np.isfinite(sizes)]
    if not len(known):
        return len(sizes), _count(changed), None, None, None
    return len(sizes), _count(changed), float(known.mean()), float(known.std()), float(known.max())


def _numbers(values: pa.Array) -> np.ndarray:
    return values.to_numpy(zero_copy_only=False).astype(np.float64)


def _count(flags: pa.Array) -> int:
    return int(pc.sum(flags).as_py() or 0)
