"""Where a stage keeps what it has finished before its end, so that an execution after a kill finds it again.

Every execution of a task gets a new output folder, so unfinished work lives elsewhere: in a folder whose name is a
digest of everything that shapes the stage's result. Another recipe, input, seed or version of vapo has another folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vapo.tables import write_text

PLACE = "VAPO_PARTIAL"  # environment variable: a folder that outlives executions; without it nothing is found again


@contextmanager
def partial_folder(identity: Mapping[str, Any]) -> Iterator[Path]:
    """The folder of what was finished under this identity; it vanishes when the block ends well.

    It is held by one process at a time, and free again however that process ends. Who finds it held works in a
    temporary folder, as without VAPO_PARTIAL.

    Args:
        identity: everything that shapes the result, as JSON takes it: {"stage": "rollout", "seed": 0, ...}.
    """
    place = os.environ.get(PLACE)
    if place:
        text = json.dumps(identity, indent=1, sort_keys=True)
        folder = Path(place) / f"{identity['stage']}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        with _held(folder) as mine:
            if mine:
                write_text(folder / "identity.json", text + "\n")
                yield folder
                shutil.rmtree(folder)
                return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


def is_held(folder: Path) -> bool:
    """Whether a process works in this folder."""
    with _held(folder) as mine:
        return not mine


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Whether this process holds the folder now; it does so until the block ends, or the process does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _lock(folder, descriptor)
    finally:
        os.close(descriptor)


def _lock(folder: Path, descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Who held it a moment ago may have removed it since: then what is locked has no name any more.
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    except (BlockingIOError, FileNotFoundError):
        return False
