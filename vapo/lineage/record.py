"""The record every stage leaves beside its outputs: inputs, outputs, digests, section, seed, versions, times.

Records refer to one another: an input names the digest of the record that made it, so a record stands for everything
that led to it, and nothing can be changed behind it without being seen. They need no metadata service. Their schema is
docs/record.schema.json; `python -m vapo.lineage.record` prints it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

import vapo
from vapo.errors import UserError
from vapo.lineage.software import commit, library_versions
from vapo.tables import write_text

FILE = "record.json"
IN_METADATA = 5000  # bytes of a record as JSON that an artifact's metadata takes at most; see `in_metadata`
TOKENS = ("response_tokens", "advantages")  # columns with one value for each token of a response
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


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
    tokens: int | None = Field(None, description="of the responses in a table")


class Host(_Part):
    """The machine that did the work."""

    name: str
    machine: str
    cpus: int
    accelerators: tuple[str, ...] = ()


class Record(_Part):
    """One execution of one stage; times are Unix seconds. Format 2 had no run, parents and tokens."""

    format: Literal[2, 3] = 3
    run: str = Field("", description="of the pipeline: a run ID on a cluster, the folder of the run's artifacts here")
    stage: str
    iteration: int
    purpose: str
    seed: int | None
    parameters: dict[str, JsonValue]
    section: dict[str, JsonValue] = Field(description="its part of the recipe")
    section_sha256: str
    inputs: dict[str, Source]
    outputs: dict[str, Product]
    parents: tuple[str, ...] = Field((), description="sha256 of the records of all stages that made inputs, sorted")
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
) -> tuple[Record, str]:
    """Write `record.json` into `folder`, last and atomically; returns the record and its digest: the file's sha256.

    Args:
        inputs: name -> path, sha256, uri, and the digest of the record that made it.
        outputs: name -> path, sha256, bytes, uri.
    """
    made = Record(
        run=run_of(next(iter(outputs.values()))["uri"]),
        stage=stage,
        iteration=parameters.get("iteration", 0),
        purpose=parameters.get("purpose", ""),
        seed=parameters.get("seed"),
        parameters=dict(parameters),
        section=dict(section),
        section_sha256=hashlib.sha256(json.dumps(section, sort_keys=True).encode()).hexdigest(),
        inputs={name: Source(**found, bytes=Path(found["path"]).stat().st_size) for name, found in inputs.items()},
        outputs={name: _product(found) for name, found in outputs.items()},
        parents=tuple(sorted({found["record"] for found in inputs.values() if found.get("record")})),
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
    text = as_text(made)
    write_text(folder / FILE, text)
    return made, digest_of(text)


def as_text(record: Record) -> str:
    """A record as it is written."""
    return json.dumps(record.model_dump(mode="python"), indent=1, sort_keys=True) + "\n"


def digest_of(text: str) -> str:
    """What others call a record by: the sha256 of its text."""
    return hashlib.sha256(text.encode()).hexdigest()


def run_of(uri: str) -> str:
    """The run that an artifact's URI tells; empty if it tells none.

    Kubeflow's driver puts outputs at ROOT/PIPELINE/RUN/TASK/SALT/NAME, older ones without the salt; run and salt are
    UUIDs (provisionOutputs in backend/src/v2/driver). kfp.local: ROOT/PIPELINE-TIME/TASK/NAME.
    """
    *folders, _ = uri.rpartition("://")[2].rstrip("/").split("/")
    above = 2 if folders and _UUID.fullmatch(folders[-1]) else 1
    return folders[-above - 1] if len(folders) > above else ""


def in_metadata(record: Record) -> dict[str, JsonValue]:
    """A record as an artifact's metadata holds it, where the Kubeflow UI shows it: at most IN_METADATA bytes.

    The metadata of all inputs is part of one argument of a task's process, and Linux takes 128 KiB for one. What is
    left out of a longer record is named in `left_out`; all of it stands in the records store.
    """
    whole = record.model_dump(mode="json")
    for part in (*whole["inputs"].values(), *whole["outputs"].values()):
        if part["uri"]:
            del part["path"]  # of a pod that is gone
    left_out: list[str] = []
    for name in ("", "metrics", "section", "parameters", "libraries", "inputs", "outputs"):
        if name:
            whole.pop(name)
            left_out.append(name)
        found: dict[str, JsonValue] = {**whole, **({"left_out": [*left_out]} if left_out else {})}
        if len(json.dumps(found)) <= IN_METADATA:
            return found
    return {"stage": record.stage, "left_out": ["everything"]}


def schema() -> dict[str, Any]:
    """The JSON schema of a record file."""
    found = Record.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found, "title": "Record of a stage of vapo"}


def read_record(path: Path) -> Record:
    """Read a record.

    Raises:
        UserError: it is absent, or not a record of this format.
    """
    try:
        return parse_record(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UserError(f"cannot read the record {path} ({error}): run its pipeline again") from None


def parse_record(text: str, where: str) -> Record:
    """A record from its text; `where` it stood is for the message.

    Raises:
        UserError: it is not a record of this format.
    """
    try:
        return Record.model_validate(json.loads(text))
    except (ValueError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot read the record {where} ({reason}): run its pipeline again") from None


def _product(found: Mapping[str, Any]) -> Product:
    """An output with its rows, if it is an Arrow file, and its tokens, if that holds responses."""
    path = Path(found["path"])
    with path.open("rb") as file:
        if file.read(6) != b"ARROW1":
            return Product(**found)
    with pa.memory_map(str(path), "r") as source:
        table = pa.ipc.open_file(source)
        batches = [table.get_batch(i) for i in range(table.num_record_batches)]
        column = next((name for name in TOKENS if name in table.schema.names), None)
        tokens = [pc.sum(pc.list_value_length(batch[column])).as_py() or 0 for batch in batches if column]
        return Product(**found, rows=sum(batch.num_rows for batch in batches), tokens=sum(tokens) if column else None)


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
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(schema(), indent=1, sort_keys=True) + "\n")
