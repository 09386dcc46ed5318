"""Problem files: what is read, what is refused and where, and that memory does not grow with a file."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapo.errors import UserError
from vapo.problems import files
from vapo.problems.files import count_rows, find_files, read_rows

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"prompt": f"What is {i} + {i}?", "ground_truth": str(2 * i)} for i in range(5)]


def rows(path: Path) -> list[dict[str, Any]]:
    found = list(read_rows(path, set))
    assert not any(row.fault for row in found)
    return [dict(row.values) for row in found]


def places(path: Path) -> list[str]:
    return [row.place.removeprefix(str(path)) for row in read_rows(path, set)]


def jsonl(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines), encoding="utf-8")
    return path


def parquet(path: Path, found: list[dict[str, Any]] | pa.Table, **options: Any) -> Path:
    pq.write_table(found if isinstance(found, pa.Table) else pa.Table.from_pylist(found), path, **options)
    return path


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        list(read_rows(path, set))
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(str(path))


# Which files


def test_a_pattern_names_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "e.jsonl", "a.jsonl", "d.jsonl", "f.jsonl", "c.csv"):
        (tmp_path / name).touch()
    assert find_files(f"{tmp_path}/*.jsonl", "k") == [tmp_path / f"{name}.jsonl" for name in "abdef"]
    assert find_files(f"{tmp_path}/c.csv", "k") == [tmp_path / "c.csv"]
    (tmp_path / "[a].jsonl").touch()  # a file's own name comes before what it means as a pattern
    assert find_files(f"{tmp_path}/[a].jsonl", "k") == [tmp_path / "[a].jsonl"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gone.jsonl", "no such file: give a JSONL, CSV or Parquet file"),
        ("*.parquet", "no such file"),
        ("folder", "is a directory: name its files, say"),
        ("a.tsv", "ends in '.tsv': name a file ['.csv', '.jsonl', '.ndjson', '.parquet']"),
        ("fold*", "is a directory"),
    ],
)
def test_what_is_no_file_of_problems(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.tsv").touch()
    with pytest.raises(UserError) as error:
        find_files(f"{tmp_path}/{name}", "problems.heldout_path")
    assert str(error.value).startswith(f"problems.heldout_path '{tmp_path}/{name}': ")
    assert said in str(error.value)


# The three formats say the same


def test_the_same_rows_from_every_format(tmp_path: Path) -> None:
    a, b = jsonl(tmp_path / "a.jsonl", *ROWS), parquet(tmp_path / "b.PARQUET", ROWS)
    c = tmp_path / "c.csv"
    with c.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    assert rows(a) == rows(b) == rows(c) == ROWS
    assert (count_rows(a), count_rows(b), count_rows(c)) == (5, 5, 6)  # lines, and exactly
    assert places(a) == [f":{i}" for i in range(1, 6)]
    assert places(b) == [f": row {i}" for i in range(1, 6)]
    assert places(c) == [f":{i}" for i in range(2, 7)]  # as an editor counts


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)


@given(st.lists(st.tuples(CELLS, CELLS), max_size=5))
def test_any_text_survives_csv(tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]]) -> None:
    """Quotes, commas, carriage returns and new lines within cells."""
    path = tmp_path_factory.mktemp("csv") / "p.csv"
    buffer = io.StringIO(newline="")
    csv.writer(buffer, quoting=csv.QUOTE_ALL).writerows([("prompt", "ground_truth"), *cells])
    path.write_bytes(buffer.getvalue().encode("utf-8-sig"))
    assert [tuple(row.values()) for row in rows(path)] == cells


@given(st.lists(st.dictionaries(CELLS, CELLS | st.integers() | st.none(), max_size=3), max_size=5), st.booleans())
def test_any_object_survives_jsonl(
    tmp_path_factory: pytest.TempPathFactory, found: list[dict[str, Any]], ascii_only: bool
) -> None:
    """Unicode's own line ends may stand in JSON as they are."""
    path = tmp_path_factory.mktemp("jsonl") / "p.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\r\n" for row in found)
    path.write_bytes(text.encode("utf-8-sig"))
    assert rows(path) == found


def test_a_row_of_csv_is_where_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(b'prompt,ground_truth\r\n"one\r\ntwo",1\r\n\r\nthree,3\r\n')
    assert places(path) == [":2", ":5"]
    assert rows(path) == [{"prompt": "one\r\ntwo", "ground_truth": "1"}, {"prompt": "three", "ground_truth": "3"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_an_empty_file_has_no_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"p{suffix}"
    for content in (b"", b"\n\n", b"\xef\xbb\xbf"):
        path.write_bytes(content)
        assert rows(path) == []


def test_only_wanted_columns_of_parquet_are_read(tmp_path: Path) -> None:
    path = parquet(tmp_path / "p.parquet", [{"a": "1", "b": {"c": 2, "d": 3}, "e": b"\xff"}])
    (row,) = read_rows(path, lambda names: {"a", "b", "absent"})
    assert row.values == {"a": "1", "b": {"c": 2, "d": 3}}
    assert list(row.names) == ["a", "b", "e"]


# Rows that are wrong: the others are read


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "x"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON"),
        (["x", "7"], "expected an object, found list: write one object per line"),
        ("7", "expected an object, found int"),
    ],
)
def test_a_bad_line(tmp_path: Path, line: object, said: str) -> None:
    found = list(read_rows(jsonl(tmp_path / "p.jsonl", ROWS[0], "", line, ROWS[1]), set))
    assert [row.place[-8:] for row in found] == [".jsonl:1", ".jsonl:3", ".jsonl:4"]
    assert [bool(row.fault) for row in found] == [False, True, False]
    assert said in found[1].fault
    assert "\n" not in found[1].fault


@pytest.mark.parametrize(("cells", "count"), [("x", 1), ("x,7,8", 3)])
def test_a_row_of_csv_with_too_few_or_too_many_cells(tmp_path: Path, cells: str, count: int) -> None:
    path = tmp_path / "p.csv"
    path.write_text(f"prompt,ground_truth\na,1\n{cells}\nb,2\n")
    found = list(read_rows(path, set))
    assert [row.fault for row in found] == ["", f"{count} cells under a header of 2 columns: quote commas", ""]


def test_texts_of_parquet_that_are_no_utf8(tmp_path: Path) -> None:
    texts = pa.StringArray.from_buffers(3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb"))
    found = list(read_rows(parquet(tmp_path / "p.parquet", pa.table({"prompt": texts})), set))
    assert [row.values for row in found] == [{"prompt": "a"}, {}, {"prompt": "b"}]
    assert "not UTF-8" in found[1].fault
    assert found[1].place.endswith("row 2")


# Files that are wrong


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("content", ["café".encode("latin-1"), '{"prompt": "x"}'.encode("utf-16"), b"\x80"])
def test_not_utf8(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"p{suffix}"
    path.write_bytes(b"\n" + content)
    said = refused(path)
    assert said.startswith(":2: not UTF-8")
    assert said.endswith("save it as UTF-8")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'prompt,ground_truth\n"never ends,7\n', ":2: not CSV (unexpected end of data)"),
        (b'prompt,ground_truth\n"a"b,7\n', ":2: not CSV"),
        (b"prompt,ground_truth\na,1\rb,2\n", ":2: not CSV"),
        (b"prompt,ground_truth\n" + b"x" * 200_000 + b",7\n", ":2: not CSV (field larger"),
        (b"prompt,a,prompt,a\n1,2,3,4\n", ": columns ['a', 'prompt'] stand there twice"),
    ],
)
def test_damaged_csv(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(content)
    assert refused(path).startswith(said)


def test_damaged_parquet(tmp_path: Path) -> None:
    path = parquet(tmp_path / "p.parquet", [{"prompt": os.urandom(200).hex()} for _ in range(100)])
    whole = path.read_bytes()
    for content in (b"", b"PAR1", b'{"prompt": 1}', whole[:-20], whole[: len(whole) // 2], whole[4:]):
        path.write_bytes(content)
        assert "cannot be read (" in refused(path)
        assert count_rows(path) in (0, 100)
    twice = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], ["prompt", "prompt"])
    assert "columns ['prompt'] stand there twice" in refused(parquet(path, twice))


@given(position=st.integers(4, 3000), byte=st.integers(0, 255))
def test_parquet_with_one_byte_changed(tmp_path_factory: pytest.TempPathFactory, position: int, byte: int) -> None:
    """It is read, or it is refused in one line."""
    folder = tmp_path_factory.mktemp("parquet")
    content = bytearray(parquet(folder / "p.parquet", ROWS * 40, use_dictionary=False).read_bytes())
    content[position % len(content)] = byte
    (folder / "p.parquet").write_bytes(content)
    said = ""
    try:
        assert all(row.place for row in read_rows(folder / "p.parquet", set))
    except UserError as error:
        said = str(error)
    assert "\n" not in said


# Memory

READ = """
import resource, sys
from pathlib import Path
from vapo.recipe import Problems
from vapo.problems.collection import read_problems
from vapo.problems.templates import renderer

def read(path):
    section = Problems(source="file", path=path)
    found = read_problems(section, path, "problems.path", renderer(section))
    return found.rows, len(found.problems), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

print(*read(sys.argv[1]), *read(sys.argv[2]), file=sys.stderr)
"""


@pytest.mark.slow
def test_two_million_rows_take_no_more_memory_than_their_problems(tmp_path: Path) -> None:
    """As DAPO-Math-17k is published: 1,791,700 rows are 17,917 prompts, each 100 times; here a few more."""
    count, times = 17_917, 112
    page = pa.table(
        {
            "data_source": ["math_dapo"] * count,
            "prompt": [[{"content": f"Problem {i}: {'x' * 400}", "role": "user"}] for i in range(count)],
            "reward_model": [{"ground_truth": str(i), "style": "rule-lighteval/MATH_v2"} for i in range(count)],
            "extra_info": [{"index": str(i)} for i in range(count)],
        }
    )
    once, often = parquet(tmp_path / "once.parquet", page), tmp_path / "often.parquet"
    with pq.ParquetWriter(often, page.schema) as writer:
        for _ in range(times):
            writer.write_table(page)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(once), str(often)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    first_rows, first_prompts, before, all_rows, all_prompts, after = map(int, done.stderr.split())
    assert (first_rows, first_prompts) == (count, count)
    assert (all_rows, all_prompts) == (count * times, count)
    assert count * times > 2_000_000
    assert often.stat().st_size > 60 << 20
    assert after - before < 30 << 10  # KiB: two copies of the problems, and batches


def test_a_row_group_is_not_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it is."""
    monkeypatch.setattr(files, "BUFFER", 1 << 16)
    page = pa.table({"prompt": [os.urandom(500).hex() for _ in range(20_000)]})
    path = parquet(tmp_path / "p.parquet", page, use_dictionary=False, compression="none", row_group_size=20_000)
    assert pq.read_metadata(path).num_row_groups == 1
    del page
    start = pa.total_allocated_bytes()
    highest = max(pa.total_allocated_bytes() - start for _ in read_rows(path, set))
    assert highest < 6 << 20  # of 20 MB
