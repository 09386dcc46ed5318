"""Rows of problem sets, wherever they come from: values, the place where they stand, and the columns that hold what."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from vapo import recipe


class BadRow(ValueError):
    """What is wrong with one row: a sentence that begins with its column."""


class Row(NamedTuple):
    """One row of a problem set."""

    place: str  # say "train.jsonl:3" or "train.parquet: row 3", counted from 1
    names: Collection[str]  # the columns there are; `values` may hold only those that are read
    values: Mapping[str, Any]
    fault: str = ""  # why it could not be read


class Columns(NamedTuple):
    """Names of columns, or dotted paths into nested ones."""

    prompt: str
    ground_truth: str
    family: str


PLAIN = Columns("prompt", "ground_truth", "family")
# DAPO-Math-17k and AIME-2024 as ByteDance Seed and Tsinghua publish them (DAPO, arXiv 2503.14476): columns data_source,
# prompt, ability, reward_model and extra_info; the last is never read, so its index may be of any type.
PUBLISHED = Columns("prompt", "reward_model.ground_truth", "data_source")


def columns_of(section: recipe.Problems, names: Collection[str]) -> Columns:
    """Where a row with columns `names` holds what: as the recipe says, otherwise as the layout that it is known by."""
    known = PUBLISHED if "reward_model" in names else PLAIN
    return Columns(
        section.prompt_column or known.prompt,
        section.ground_truth_column or known.ground_truth,
        section.family_column or known.family,
    )


def top(path: str, names: Collection[str]) -> str:
    """The column that a dotted path begins in; a column whose own name holds dots comes first."""
    return path if path in names else path.split(".")[0]


def value_at(row: Row, path: str) -> Any:
    """What a row holds at a dotted path.

    Raises:
        BadRow: nothing is there.
    """
    found: Any = row.values
    for part in [path] if path in row.names else path.split("."):
        if not isinstance(found, dict) or part not in found:
            raise BadRow(f"column {path!r}: found none (columns {sorted(row.names)})")
        found = found[part]
    return found


def text_at(row: Row, path: str) -> str:
    """The text at a dotted path; an integer is its digits, other numbers have no single text.

    Raises:
        BadRow: nothing is there, or something else.
    """
    found = value_at(row, path)
    if isinstance(found, int) and not isinstance(found, bool):
        return str(found)
    if isinstance(found, str) and found.strip():
        return found
    raise BadRow(f"column {path!r}: expected a text, found {shown(found)}")


def shown(value: object) -> str:
    """A value in a message: all of it if it is short."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:60]} ... ({len(text)} characters)"
