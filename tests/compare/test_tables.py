"""Differences of tables against a loop over their rows."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapo.compare.tables import difference

FLOAT = st.one_of(st.sampled_from([0.0, 1.0, -2.5]), st.just(math.nan))
ROWS = st.lists(st.tuples(*[st.lists(FLOAT, max_size=3)] * 2), max_size=8)
RAGGED = pa.list_(pa.field("item", pa.float32(), nullable=False))


def table(**columns: pa.Array) -> pa.Table:
    return pa.table(columns)


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


@given(ROWS)
def test_ragged_columns_as_a_loop_compares_them(rows: list[tuple[list[float], list[float]]]) -> None:
    old, new = (pa.array([pair[i] for pair in rows], RAGGED) for i in (0, 1))
    # In several pieces, and cut out of a longer column: offsets that do not begin at 0.
    longer = pa.concat_arrays([pa.array([[9.0]], RAGGED), new])
    (found,) = difference(table(x=old), table(x=pa.chunked_array([longer[1:3], longer[3:]]))).columns
    pairs = [(a, b) for a, b in rows if len(a) == len(b)]
    values = [(x, y) for a, b in pairs for x, y in zip(a, b, strict=True)]
    differing = [pair for pair in values if not same(*pair)]
    unlike = sum(1 for a, b in rows if len(a) != len(b))
    assert found.rows == unlike + sum(any(not same(x, y) for x, y in zip(a, b, strict=True)) for a, b in pairs)
    assert found.equal == (found.rows == 0)
    assert (found.values, found.differing) == (len(values), len(differing))
    sizes = [0.0 if same(x, y) else abs(y - x) for x, y in values]
    known = [size for size in sizes if not math.isnan(size)]
    if known:
        wanted = (np.mean(known), np.std(known), np.max(known))
        assert (found.mean, found.std, found.largest) == pytest.approx(wanted)
    else:
        assert found.mean is None


def test_plain_columns() -> None:
    old = table(
        id=pa.array(["a", "b"]), n=pa.array([1, 2], pa.uint64()), x=pa.array([1.0, 2.0]), ok=pa.array([True] * 2)
    )
    new = table(
        id=pa.array(["a", "b"]), n=pa.array([1, 0], pa.uint64()), x=pa.array([1.0, 5.0]), ok=pa.array([True, False])
    )
    found = {column.name: column for column in difference(old, new).columns}
    assert found["id"].equal
    assert found["id"].values is None
    assert (found["ok"].rows, found["ok"].mean) == (1, None)
    assert (found["n"].differing, found["n"].largest) == (1, 2.0)
    assert (found["x"].rows, found["x"].mean, found["x"].std, found["x"].largest) == (1, 1.5, 1.5, 3.0)


def test_tokens_are_no_magnitudes() -> None:
    kind = pa.list_(pa.field("item", pa.int32(), nullable=False))
    (found,) = difference(table(t=pa.array([[1, 2], [3]], kind)), table(t=pa.array([[1, 9], [3, 4]], kind))).columns
    assert (found.rows, found.values, found.differing, found.mean) == (2, 2, 1, None)


def test_tables_of_different_length_are_not_compared_by_row() -> None:
    found = difference(table(x=pa.array([1.0])), table(x=pa.array([1.0, 2.0])))
    assert (found.rows, found.columns) == ((1, 2), ())


def test_no_rows() -> None:
    (found,) = difference(table(x=pa.array([], RAGGED)), table(x=pa.array([], RAGGED))).columns
    assert found.equal
