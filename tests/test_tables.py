"""Tables: what is written comes back from the mapped file itself, and a damaged or foreign file is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapo.errors import UserError
from vapo.schemas import EXPERIENCE, FORMAT, HISTORY, NAME, PROMPTS, REWARDS, TABLES, VERSION
from vapo.tables import (
    atomic_path,
    check_joined,
    flat,
    offsets_of,
    ragged,
    read_table,
    rows,
    to_torch,
    write_table,
    write_text,
)

LENGTHS = [3, 0, 5, 1]


def experience(lengths: list[int] = LENGTHS) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    offsets = offsets_of(lengths)
    columns = {
        name: (generator.normal(size=sum(lengths)).astype(np.float32), offsets)
        for name in ("values", "advantages", "value_targets")
    }
    ids = [f"1/p/{i}" for i in range(len(lengths))]
    trained = [i % 2 == 0 for i in range(len(lengths))]
    return {
        "rollout_id": ids,
        "trained": trained,
        "lambda_policy": np.linspace(0, 1, len(lengths), dtype=np.float32),
        **columns,
    }


def rewards(ids: list[str]) -> dict[str, Any]:
    count = len(ids)
    return {
        "rollout_id": ids,
        "correct": [True] * count,
        "reward": [1.0] * count,
        "extracted": ["7"] * count,
        "verdict": ["matched"] * count,
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A written EXPERIENCE table."""
    write_table(tmp_path / "experience.arrow", EXPERIENCE, experience())
    return tmp_path / "experience.arrow"


def leftovers(path: Path) -> list[Path]:
    return [p for p in path.parent.iterdir() if p != path]


def test_every_schema_carries_its_name_and_has_no_nullable_column() -> None:
    for name, schema in TABLES.items():
        assert schema.metadata == {NAME: name.encode(), VERSION: FORMAT}
        assert not any(field.nullable for field in schema)


def test_round_trip(path: Path) -> None:
    columns, table = experience(), read_table(path, EXPERIENCE)
    assert table.column("rollout_id").to_pylist() == columns["rollout_id"]
    np.testing.assert_array_equal(flat(table, "lambda_policy"), columns["lambda_policy"])
    for name in ("values", "advantages", "value_targets"):
        values, offsets = ragged(table, name)
        np.testing.assert_array_equal(values, columns[name][0])
        np.testing.assert_array_equal(offsets, columns[name][1])
        assert [len(row) for row in rows(table, name)] == LENGTHS
        np.testing.assert_array_equal(np.concatenate(rows(table, name)), columns[name][0])


@given(st.lists(st.lists(st.floats(width=32, allow_nan=False), max_size=9), max_size=6))
def test_lists_and_pairs_write_the_same_table(
    tmp_path_factory: pytest.TempPathFactory, values: list[list[float]]
) -> None:
    folder = tmp_path_factory.mktemp("tables")
    columns = experience([len(v) for v in values])
    columns["values"] = values
    write_table(folder / "lists", EXPERIENCE, columns)
    columns["values"] = (np.array([x for v in values for x in v], np.float32), offsets_of([len(v) for v in values]))
    write_table(folder / "pair", EXPERIENCE, columns)
    assert (folder / "lists").read_bytes() == (folder / "pair").read_bytes()
    assert read_table(folder / "pair", EXPERIENCE)["values"].to_pylist() == values


def test_reading_copies_nothing(path: Path) -> None:
    """No array owns memory, rows are views, and pyarrow allocated nothing."""
    before = pa.total_allocated_bytes()
    table = read_table(path, EXPERIENCE)
    values, offsets = ragged(table, "values")
    assert pa.total_allocated_bytes() == before
    for array in (values, offsets, flat(table, "lambda_policy"), *rows(table, "advantages")):
        assert not array.flags.owndata
        assert not array.flags.writeable
    for row in rows(table, "values"):
        assert np.shares_memory(row, values) or len(row) == 0
    assert np.shares_memory(ragged(table, "values")[0], values)


MAPS = Path("/proc/self/maps")


@pytest.mark.skipif(not MAPS.exists(), reason="the system does not list its mappings")
def test_arrays_and_tensors_lie_in_the_mapped_file(path: Path) -> None:
    table = read_table(path, EXPERIENCE)
    mapped = [
        tuple(int(address, 16) for address in line.split()[0].split("-"))
        for line in MAPS.read_text().splitlines()
        if line.endswith(str(path))
    ]
    values, _ = ragged(table, "values")
    for array in (values, flat(table, "lambda_policy"), to_torch(values).numpy()):
        address = array.__array_interface__["data"][0]
        assert any(start <= address and address + array.nbytes <= end for start, end in mapped)


def test_to_torch_shares_memory() -> None:
    array = np.arange(4, dtype=np.float32)
    tensor = to_torch(array)
    array[2] = 9.0
    assert tensor.tolist() == [0.0, 1.0, 9.0, 3.0]


def test_flat_reads_booleans(tmp_path: Path) -> None:
    columns = rewards(["a", "b", "c"]) | {"correct": [True, False, True]}
    write_table(tmp_path / "rewards", REWARDS, columns)
    found = flat(read_table(tmp_path / "rewards", REWARDS), "correct")
    assert found.dtype == bool
    assert found.tolist() == [True, False, True]


def test_same_columns_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_table(tmp_path / name, EXPERIENCE, experience())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_an_empty_table(tmp_path: Path) -> None:
    write_table(tmp_path / "t", EXPERIENCE, experience([]))
    table = read_table(tmp_path / "t", EXPERIENCE)
    assert len(table) == 0
    assert rows(table, "values") == []
    assert ragged(table, "values")[1].tolist() in ([], [0])
    assert flat(table, "lambda_policy").shape == (0,)


def test_an_arrow_column_is_written_as_it_is(path: Path, tmp_path: Path) -> None:
    table = read_table(path, EXPERIENCE)
    write_table(tmp_path / "again", EXPERIENCE, {name: table[name] for name in table.column_names})
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


FAULTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "text for a number": ({"lambda_policy": ["a", "b", "c", "d"]}, ["lambda_policy", "float"]),
    "number for a text": ({"rollout_id": [1, 2, 3, 4]}, ["rollout_id", "string"]),
    "number for a list": ({"values": [1.0, 2.0, 3.0, 4.0]}, ["values", "list"]),
    "null": ({"lambda_policy": [0.0, None, 1.0, 1.0]}, ["lambda_policy", "1 values are missing"]),
    "null list": ({"values": [[1.0], None, [], []]}, ["values", "1 values are missing"]),
    "null in a list": ({"values": [[1.0, None], [None], [], []]}, ["values", "2 values are missing"]),
    "another length": ({"lambda_policy": [0.0]}, ["lambda_policy", "differ in length", "'lambda_policy': 1"]),
    "another number of rows": ({"values": (np.zeros(2, np.float32), offsets_of([1, 1]))}, ["'values': 2"]),
    "offsets past the end": ({"values": (np.zeros(2, np.float32), offsets_of(LENGTHS))}, ["values", "9", "2"]),
    "values left over": ({"values": (np.zeros(20, np.float32), offsets_of(LENGTHS))}, ["values", "9", "20"]),
    "offsets that fall": (
        {"values": (np.zeros(4, np.float32), np.array([0, 4, 2, 4, 4], np.int32))},
        ["values", "offsets"],
    ),
    "unknown": ({"lamda": [0.0] * 4}, ["unknown columns ['lamda']"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_columns_are_refused_and_the_old_table_stays(path: Path, fault: str) -> None:
    before = path.read_bytes()
    changed, said = FAULTS[fault]
    with pytest.raises(UserError) as error:
        write_table(path, EXPERIENCE, experience() | changed)
    for words in [str(path), "EXPERIENCE", *said]:
        assert words in str(error.value)
    assert path.read_bytes() == before
    assert leftovers(path) == []


def test_a_missing_column(tmp_path: Path) -> None:
    columns = experience()
    del columns["advantages"]
    with pytest.raises(UserError, match=r"missing columns \['advantages'\]"):
        write_table(tmp_path / "t", EXPERIENCE, columns)
    assert not (tmp_path / "t").exists()


def refused(path: Path, *words: str) -> None:
    """Reading EXPERIENCE from `path` names the file and these words, in one line."""
    with pytest.raises(UserError) as error:
        read_table(path, EXPERIENCE)
    assert "\n" not in str(error.value)
    for expected in (str(path), *words):
        assert expected in str(error.value)


@pytest.mark.parametrize("tenths", range(10))
def test_a_truncated_file(path: Path, tenths: int) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * tenths // 10])
    refused(path, "expected table EXPERIENCE", f"{len(whole) * tenths // 10} bytes", "run the stage")


def test_a_file_without_its_last_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, "expected table EXPERIENCE", "truncated")


@pytest.mark.parametrize("hole", [8, 64, 256])
def test_a_file_with_a_hole(path: Path, hole: int) -> None:
    whole = path.read_bytes()
    third = len(whole) // 3
    path.write_bytes(whole[:third] + whole[third + hole :])
    refused(path, "expected table EXPERIENCE", "truncated or of another format")


def test_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("rollout_id,values\n" * 50)
    refused(tmp_path / "t", "expected table EXPERIENCE", "another format")


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    refused(tmp_path / "t", "expected table EXPERIENCE, found no file", "run the stage")
    refused(tmp_path, "expected table EXPERIENCE")


def foreign(path: Path, schema: pa.Schema, columns: dict[str, Any]) -> Path:
    """Write an Arrow file without any of our checks."""
    table = pa.table(columns).cast(schema)
    with pa.ipc.new_file(str(path), schema) as writer:
        writer.write_table(table)
    return path


def test_a_foreign_arrow_file(tmp_path: Path) -> None:
    foreign(tmp_path / "t", pa.schema([("values", pa.float32())]), {"values": [1.0]})
    refused(tmp_path / "t", "expected table EXPERIENCE, found a foreign Arrow file")


def test_another_table(tmp_path: Path) -> None:
    write_table(tmp_path / "t", REWARDS, rewards(["a"]))
    refused(tmp_path / "t", "expected table EXPERIENCE, found table REWARDS")


def plain(columns: dict[str, pa.DataType]) -> dict[str, Any]:
    return {name: pa.array([], kind) for name, kind in columns.items()}


KINDS = dict(zip(EXPERIENCE.names, EXPERIENCE.types, strict=True))


@pytest.mark.parametrize(
    ("kinds", "version", "said"),
    [
        (KINDS, b"0", [f"expected format {FORMAT.decode()}, found 0"]),
        ({k: v for k, v in KINDS.items() if k != "values"}, FORMAT, ["expected column values (list<", "found none"]),
        (KINDS | {"lambda_policy": pa.float64()}, FORMAT, ["column lambda_policy: expected float, found double"]),
        (KINDS | {"lambdas": pa.float64()}, FORMAT, ["expected no further columns, found ['lambdas']"]),
    ],
)
def test_another_schema(tmp_path: Path, kinds: dict[str, pa.DataType], version: bytes, said: list[str]) -> None:
    schema = pa.schema(list(kinds.items()), metadata={NAME: b"EXPERIENCE", VERSION: version})
    refused(foreign(tmp_path / "t", schema, plain(kinds)), "table EXPERIENCE", *said)


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(path: Path) -> None:
    before = path.read_bytes()

    def interrupted() -> None:
        with atomic_path(path) as beside:
            beside.write_bytes(b"half of it")
            assert path.read_bytes() == before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == before
    assert leftovers(path) == []


def test_a_write_appears_at_once_and_makes_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "text"
    with atomic_path(path) as beside:
        beside.write_text("new")
        assert not path.exists()
        assert beside.parent == path.parent  # a rename stays in one file system
    assert path.read_text() == "new"
    write_text(path, "newer λ")
    assert path.read_text(encoding="utf-8") == "newer λ"
    assert leftovers(path) == []


def test_a_reader_keeps_the_table_it_opened(path: Path) -> None:
    """Replaced, not overwritten: a mapping of the old file still holds the old values."""
    table = read_table(path, EXPERIENCE)
    before = ragged(table, "values")[0].copy()
    write_table(path, EXPERIENCE, experience([1]))
    np.testing.assert_array_equal(ragged(table, "values")[0], before)
    assert len(read_table(path, EXPERIENCE)) == 1


@given(st.lists(st.integers(0, 1000), max_size=30))
def test_offsets(lengths: list[int]) -> None:
    found = offsets_of(lengths)
    assert found.dtype == np.int32
    assert found[0] == 0
    assert np.diff(found).tolist() == lengths


def test_too_many_tokens_for_one_table() -> None:
    assert offsets_of([2**31 - 1])[-1] == 2**31 - 1
    with pytest.raises(UserError, match=r"2147483648 tokens .* rollout\.prompts"):
        offsets_of([2**31 - 1, 1])


def test_check_joined(tmp_path: Path) -> None:
    ids = ["a", "b", "c"]
    ours = write_table(tmp_path / "r", REWARDS, rewards(ids))
    check_joined(Path("rewards"), ours, write_table(tmp_path / "s", REWARDS, rewards(ids)))
    for theirs, said in (
        (["a", "c", "b"], "rewards: column rollout_id: row 1: expected c, found b"),
        (["a", "b"], "rewards: column rollout_id: expected 2 rows as in ROLLOUTS, found 3"),
    ):
        with pytest.raises(UserError) as error:
            check_joined(Path("rewards"), ours, write_table(tmp_path / "t", REWARDS, rewards(theirs)))
        assert str(error.value) == said


def test_ragged_of_several_chunks_and_of_a_slice(path: Path) -> None:
    """Tables put together or cut give the same rows as their parts."""
    table = read_table(path, EXPERIENCE)
    twice = pa.concat_tables([table, table])
    for one, other in zip(rows(twice, "values"), rows(table, "values") * 2, strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(rows(table.slice(1, 2), "values"), rows(table, "values")[1:3], strict=True):
        np.testing.assert_array_equal(one, other)


def test_text_survives(tmp_path: Path) -> None:
    """Whatever a model says: control characters, emptiness, other scripts."""
    texts = ["", "\x00\n\r\t", "数学 λ \u2028", "a" * 10_000]
    columns = {
        "prompt_id": [str(i) for i in range(4)],
        "prompt": texts,
        "ground_truth": texts[::-1],
        "family": ["f"] * 4,
        "difficulty": [0] * 4,
    }
    write_table(tmp_path / "p", PROMPTS, columns)
    assert read_table(tmp_path / "p", PROMPTS).to_pydict() == columns


def test_numbers_that_do_not_fit(tmp_path: Path) -> None:
    columns = {"iteration": [2**31], "stage": ["s"], "name": ["n"], "value": [1.0]}
    with pytest.raises(UserError, match="column iteration: expected int32"):
        write_table(tmp_path / "h", HISTORY, columns)
