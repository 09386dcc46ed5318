"""The concatenation stage: the tables of all shards of a draw become the one that a single task would have made."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from vapo import recipe
from vapo.errors import UserError
from vapo.rollout.streaming import write_groups
from vapo.schemas import ROLLOUTS
from vapo.tables import read_table


def concatenation(
    section: recipe.Rollout,
    *,
    rollouts: Path,
    iteration: int,
    purpose: str,
    previous_rollouts: Path | None = None,
    **parts: Path,
) -> dict[str, float]:
    """Write ROLLOUTS of an iteration's draws so far; returns what one rollout task would: it is counted in the rows.

    The tables are mapped, and their rows go to disk a record batch at a time.

    Args:
        previous_rollouts: those of the draws before.
        parts: parts_0, parts_1, ...: each shard's new rows, in order; metrics_of_parts_0, ...: its metrics as JSON.

    Returns:
        Besides, `seconds` of work of all shards together, and those of the slowest one.
    """
    del iteration, purpose  # for the record
    tables = _numbered(parts, "parts")
    spent = [_seconds(path) for path in _numbered(parts, "metrics_of_parts")]
    before = [previous_rollouts] if previous_rollouts else []
    groups = itertools.chain.from_iterable(_groups(path, section.samples) for path in (*before, *tables))
    found = write_groups(rollouts, groups)
    return found | {"seconds": sum(spent), "slowest_shard_seconds": max(spent), "shards": len(tables)}


def _groups(path: Path, samples: int) -> Iterator[pa.Table]:
    """The rows of one prompt after the other."""
    table = read_table(path, ROLLOUTS)
    if len(table) % samples:
        raise UserError(f"{path}: {len(table)} rows are no whole groups of rollout.samples {samples}: sample it again")
    for first in range(0, len(table), samples):
        yield table.slice(first, samples)


def _numbered(paths: dict[str, Path], name: str) -> list[Path]:
    return [paths[f"{name}_{number}"] for number in range(sum(key.rpartition("_")[0] == name for key in paths))]


def _seconds(path: Path) -> float:
    seconds: float = json.loads(path.read_text(encoding="utf-8"))["seconds"]
    return seconds
