"""Times differ whenever a stage runs again: they alone make no difference."""

from __future__ import annotations

import json
from pathlib import Path

from vapo.compare.artifacts import DIFFERS, SAME, TIMES, likeness
from vapo.schemas import HISTORY
from vapo.tables import write_table


def history(path: Path, accuracy: float, seconds: float) -> Path:
    rows = {"iteration": [1, 1], "stage": ["a", "a"], "name": ["accuracy", "seconds"], "value": [accuracy, seconds]}
    write_table(path, HISTORY, rows)
    return path


def metrics(path: Path, **values: float) -> Path:
    path.write_text(json.dumps({**values, "rollout/seconds": hash(path), "slowest_shard_seconds": hash(path)}))
    return path


def test_histories(tmp_path: Path) -> None:
    first = history(tmp_path / "1", 0.5, 1.0)
    assert likeness(first, history(tmp_path / "2", 0.5, 1.0)) == SAME
    assert likeness(first, history(tmp_path / "3", 0.5, 2.0)) == TIMES
    assert likeness(first, history(tmp_path / "4", 0.6, 1.0)) == DIFFERS


def test_metrics(tmp_path: Path) -> None:
    first = metrics(tmp_path / "1", accuracy=0.5, seconds=1.0)
    assert likeness(first, metrics(tmp_path / "2", accuracy=0.5, seconds=2.0)) == TIMES
    assert likeness(first, metrics(tmp_path / "3", accuracy=0.6, seconds=2.0)) == DIFFERS
    assert likeness(first, metrics(tmp_path / "4", accuracy=0.5)) == DIFFERS


def test_other_files_are_compared_by_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("<html>1")
    (tmp_path / "b").write_text("<html>2")
    assert likeness(tmp_path / "a", tmp_path / "b") == DIFFERS
