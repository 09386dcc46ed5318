"""Whether two artifacts of the same kind are the same: byte for byte, or but for the times that some of them hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vapo.schemas import HISTORY, name_of
from vapo.store import sha256_of

SAME, TIMES, DIFFERS = "same bytes", "same but for times", "differs"
TIME = "seconds"  # what metrics that are measured times end with, say "rollout/slowest_shard_seconds"


def likeness(old: Path, new: Path) -> str:
    """One of SAME, TIMES, DIFFERS. Stages measure how long they took: metrics, and HISTORY made of them, hold that."""
    if sha256_of(old) == sha256_of(new):
        return SAME
    found = timeless(old)
    return TIMES if found is not None and found == timeless(new) else DIFFERS


def timeless(path: Path) -> Any:
    """What metrics or a HISTORY say but for times; None for anything else."""
    if is_table(path):
        found = table_at(path)
        if name_of(found.schema) != name_of(HISTORY):
            return None
        return found.filter(pc.invert(pc.ends_with(found["name"], TIME))).replace_schema_metadata(None)
    with path.open("rb") as file:
        if file.read(1) != b"{":
            return None
    metrics = json.loads(path.read_text(encoding="utf-8"))
    untimed = {name: value for name, value in metrics.items() if not name.endswith(TIME)}
    return untimed if TIME in metrics else None


def is_table(path: Path) -> bool:
    """Whether a file is an Arrow IPC file."""
    with path.open("rb") as file:
        return file.read(6) == b"ARROW1"


def table_at(path: Path) -> pa.Table:
    """A table, memory-mapped, whatever its schema."""
    with pa.memory_map(str(path), "r") as source:
        return pa.ipc.open_file(source).read_all()
