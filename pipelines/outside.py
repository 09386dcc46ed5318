"""What a recipe names outside the pipeline is part of its tasks' cache keys, so that a changed file is read again."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

# A variable of a task's environment that nobody reads: it is part of its cache key. kfp's own cache_key would not do,
# since in kfp.local it stands in place of image, settings and inputs, not beside them.
READS = "VAPO_READS"


def stamp(paths: Sequence[str]) -> str:
    """What tells that something at these paths was changed: names, sizes and times of change."""
    found = [
        [(p.name, stat.st_size, stat.st_mtime_ns) for p in files_of(Path(path)) for stat in (p.stat(),)]
        for path in paths
    ]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def files_of(path: Path) -> list[Path]:
    """The file, all files of a folder, or those that a name with a * means."""
    if path.is_file():
        return [path]
    found = path.rglob("*") if path.is_dir() else path.parent.glob(path.name)
    return sorted(p for p in found if p.is_file())
