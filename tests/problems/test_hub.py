"""Data sets of the hub: what is asked of `datasets`, rows with their place, and faults in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vapo.errors import UserError
from vapo.problems.collection import collect
from vapo.problems.hub import read_hub
from vapo.problems.templates import renderer
from vapo.recipe import Problems

NAME = "owner/name"
ROWS = [{"prompt": f"{i} + 1 =", "ground_truth": str(i + 1)} for i in range(4)]


def section(**keys: Any) -> Problems:
    return Problems(source="hub", path=NAME, **keys)


def test_a_local_folder_through_the_package(tmp_path: Path) -> None:
    """`datasets` reads a folder as it reads the hub."""
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        lines = [json.dumps({**row, "split": split}) for row in ROWS]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    found = list(read_hub(section(), str(tmp_path / "data"), "test", "problems.path"))
    assert [dict(row.values) for row in found] == [{**row, "split": "test"} for row in ROWS]
    with pytest.raises(UserError, match=r"problems\.path '.*data', split 'gone': cannot be read from the hub"):
        list(read_hub(section(), str(tmp_path / "data"), "gone", "problems.path"))


@pytest.mark.parametrize(("name", "revision"), [(NAME, None), (f"{NAME}@3fa2", "3fa2")])
@pytest.mark.parametrize(("keys", "subset"), [({}, None), ({"hub_subset": "en"}, "en")])
def test_what_is_asked_for(name: str, revision: str | None, keys: dict[str, str], subset: str | None) -> None:
    """A stream, of the commit that is named, by the arguments that load_dataset has."""
    asked: list[Any] = []

    def load(*arguments: Any, **named: Any) -> list[dict[str, str]]:
        asked.append((arguments, named))
        return ROWS

    given = section(**keys)
    rows = read_hub(given, name, "test", "problems.path", load)
    found = collect(rows, 0, given, renderer(given), name)
    assert [p.ground_truth for p in found.problems] == ["1", "2", "3", "4"]
    assert asked == [((NAME, subset), {"split": "test", "revision": revision, "streaming": True})]


def test_a_row_is_named_by_its_place() -> None:
    rows = read_hub(section(), NAME, "train", "problems.path", lambda *_, **__: [*ROWS, {"prompt": "x"}])
    with pytest.raises(UserError, match=r"^owner/name train: row 5: column 'ground_truth': found none"):
        collect(rows, 0, section(), renderer(section()), NAME)


def broken(error: Exception) -> Iterator[dict[str, str]]:
    yield ROWS[0]
    raise error


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no route\nto host"),
        FileNotFoundError("no such data set"),
        ValueError("unknown split"),
        OSError(),
    ],
)
def test_what_cannot_be_read(error: Exception) -> None:
    rows = read_hub(section(), NAME, "train", "problems.heldout_path", lambda *_, **__: broken(error))
    assert next(rows).values == ROWS[0]
    with pytest.raises(UserError) as fault:
        next(rows)
    assert str(fault.value).startswith("problems.heldout_path 'owner/name', split 'train': cannot be read from the hub")
    assert str(fault.value).endswith("check name, subset, split and connection")
    assert "\n" not in str(fault.value)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"problems\.source 'hub' needs the package 'datasets': pip install datasets"):
        next(read_hub(section(), NAME, "train", "problems.path"))
