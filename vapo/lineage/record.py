"""The record every stage leaves beside its outputs: inputs, outputs, digests, section, seed, versions, times.

Records refer to one another: an input names the digest of the record that made it, so a record stands for everything
that led to it, and nothing can be changed behind it without being seen. They need no metadata service.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

import vapo
from vapo.errors import UserError
from vapo.lineage.software import commit, library_versions
from vapo.tables import write_text

FILE = "record.json"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Part):
    """An input as the stage found it."""

    path: str = Field(description="where it lay for the stage: a file, or a local copy of an object")
    uri: str = Field("", description="where it is kept")
    sha256: str
    bytes: int
    record: str = Field("", description="sha256 of the record of the stage that made it")


class Product(_Part):
    """An output as the stage left it."""

    path: str
    uri: str = ""
    sha256: str
    bytes: int
    rows: int | None = Field(None, description="of a table")


class Host(_Part):
    """The machine that did the work."""

    name: str
    machine: str
    cpus: int
    accelerators: tuple[str, ...] = ()


class Record(_Part):
    """One execution of one stage; times are Unix seconds."""

    format: Literal[2] = 2
    stage: str
    iteration: int
    purpose: str
    seed: int | None
    parameters: dict[str, JsonValue]
    section: dict[str, JsonValue] = Field(description="its part of the recipe")
    section_sha256: str
    inputs: dict[str, Source]
    outputs: dict[str, Product]
    metrics: dict[str, float]
    started: float
    ended: float
    seconds: float = Field(description="of work, without reading and checking the inputs")
    vapo: str
    commit: str = Field(description="of vapo's source, with -dirty if files differ from it; empty: not in a checkout")
    image: str
    python: str
    libraries: dict[str, str]
    host: Host


def write_record(
    folder: Path,
    *,
    stage: str,
    parameters: Mapping[str, Any],
    section: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, Any]],
    outputs: Mapping[str, Mapping[str, Any]],
    metrics: Mapping[str, float],
    image: str,
    started: float,
    ended: float,
    seconds: float,
) -> str:
    """Write `record.json` into `folder`, last and atomically; returns the sha256 of the file.

    Args:
        inputs: name -> path, sha256, uri, and the digest of the record that made it.
        outputs: name -> path, sha256, bytes, uri.
    """
    made = Record(
        stage=stage,
        iteration=parameters.get("iteration", 0),
        purpose=parameters.get("purpose", ""),
        seed=parameters.get("seed"),
        parameters=dict(parameters),
        section=dict(section),
        section_sha256=hashlib.sha256(json.dumps(section, sort_keys=True).encode()).hexdigest(),
        inputs={name: Source(**found, bytes=Path(found["path"]).stat().st_size) for name, found in inputs.items()},
        outputs={name: Product(**found, rows=_rows(Path(found["path"]))) for name, found in outputs.items()},
        metrics=dict(metrics),
        started=started,
        ended=ended,
        seconds=seconds,
        vapo=vapo.__version__,
        commit=commit(),
        image=image,
        python=platform.python_version(),
        libraries=library_versions(),
        host=_host(),
    )
    text = json.dumps(made.model_dump(mode="python"), indent=1, sort_keys=True) + "\n"
    write_text(folder / FILE, text)
    return hashlib.sha256(text.encode()).hexdigest()


def read_record(path: Path) -> Record:
    """Read a record.

    Raises:
        UserError: it is absent, or not a record of this format.
    """
    try:
        return Record.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot read the record {path} ({reason}): run its pipeline again") from None


def _rows(path: Path) -> int | None:
    """Rows of an Arrow file; None of any other."""
    with path.open("rb") as file:
        if file.read(6) != b"ARROW1":
            return None
    with pa.memory_map(str(path), "r") as source:
        table = pa.ipc.open_file(source)
        return sum(table.get_batch(i).num_rows for i in range(table.num_record_batches))


@cache
def _host() -> Host:
    return Host(
        name=platform.node(),
        machine=f"{platform.system()} {platform.machine()}",
        cpus=os.cpu_count() or 1,
        accelerators=_accelerators(),
    )


def _accelerators() -> tuple[str, ...]:
    """Names of the CUDA devices, where torch is imported already: a stage without it does not import it for this."""
    import sys

    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
