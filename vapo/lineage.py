"""The record every stage leaves beside its outputs: inputs, outputs, digests, section, seed, versions, times."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vapo import __version__
from vapo.tables import write_text

FILE = "record.json"
LIBRARIES = ("kfp", "numpy", "pyarrow", "tokenizers", "torch", "transformers")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that shape results, without importing them."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


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
