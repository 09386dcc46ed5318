"""OpenLineage events of every stage, for Marquez, DataHub and others, where the environment names a target.

The target is the library's own configuration: OPENLINEAGE_URL, OPENLINEAGE_CONFIG, OPENLINEAGE__..., or its file. Who
watches must not stop who works: whatever is wrong here is one warning, and the stage goes on. Without a target the
library is not even imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import NAMESPACE_URL, UUID, uuid5

import pyarrow as pa

import vapo
from vapo.lineage.record import run_of
from vapo.lineage.software import commit
from vapo.progress import emit

if TYPE_CHECKING:
    from vapo.stage import Job

NAMESPACE = "OPENLINEAGE_NAMESPACE"  # environment variable: of the jobs; as other integrations have it
FILES = (Path("openlineage.yml"), Path("~/.openlineage/openlineage.yml"))  # where the library looks
PRODUCER = f"urn:vapo:{vapo.__version__}"

Complete = Callable[[Mapping[str, Mapping[str, Any]]], None]


def configured() -> bool:
    """Whether there is a target."""
    if os.environ.get("OPENLINEAGE_DISABLED", "").lower() == "true":
        return False
    named = any(
        name in ("OPENLINEAGE_URL", "OPENLINEAGE_CONFIG") or name[:13] == "OPENLINEAGE__" for name in os.environ
    )
    return named or any(path.expanduser().is_file() for path in FILES)


@contextmanager
def told(job: Job) -> Iterator[Complete]:
    """Tell that a stage starts and how the block ends; the block calls what it gets with the outputs' metadata."""
    if not configured():
        yield lambda outputs: None
        return
    events = _Events(job)
    events.tell("START")
    made: dict[str, Mapping[str, Any]] = {}
    try:
        yield made.update
    except BaseException as error:
        events.tell("FAIL", error=error)
        raise
    events.tell("COMPLETE", made)


class _Events:
    """The events of one job; after the first that cannot be sent no other is tried."""

    def __init__(self, job: Job) -> None:
        self.job, self.client = job, None
        try:
            from openlineage.client import OpenLineageClient

            self.client = OpenLineageClient()
            location = self.client.config.facets.source_code_location
            if not location.repo_url:
                location.disabled = True  # it would send the origin of a repository as it is, credentials and all
        except ModuleNotFoundError as error:
            missing = "the package 'openlineage-python' is not installed: pip install 'vapo[openlineage]'"
            self._warn(missing if error.name == "openlineage" else str(error))
        except Exception as error:  # noqa: BLE001 - see above
            self._warn(error)

    def tell(
        self, kind: str, made: Mapping[str, Mapping[str, Any]] | None = None, error: BaseException | None = None
    ) -> None:
        if self.client is None:
            return
        try:
            self.client.emit(_event(self.job, kind, made or {}, error))
        except Exception as problem:  # noqa: BLE001 - see above
            self.client = None
            self._warn(problem)

    def _warn(self, error: Exception | str) -> None:
        reason = " ".join((str(error) or type(error).__name__).split())
        emit("warning", stage=self.job.stage, message=f"OpenLineage events are not sent: {reason}")


def _event(job: Job, kind: str, made: Mapping[str, Mapping[str, Any]], error: BaseException | None) -> Any:
    from openlineage.client.event_v2 import InputDataset, OutputDataset, Run, RunEvent, RunState
    from openlineage.client.event_v2 import Job as OfJob
    from openlineage.client.facet_v2 import error_message_run, job_type_job, output_statistics_output_dataset

    job_facets: dict[str, Any] = {
        "jobType": job_type_job.JobTypeJobFacet(processingType="BATCH", integration="VAPO", jobType="TASK")
    }
    run_facets: dict[str, Any] = _run_facets(job)
    if error is not None:
        run_facets["errorMessage"] = error_message_run.ErrorMessageRunFacet(
            message=f"{type(error).__name__}: {error}", programmingLanguage="PYTHON"
        )
    inputs = [
        InputDataset(
            *dataset(source.get("uri") or source["path"]), facets=_facets(source["path"], source.get("sha256"))
        )
        for source in job.inputs.values()
        for path in [source["path"]]
    ]
    outputs = []
    for name, path in job.outputs.items():
        facts = made.get(name, {})
        statistics: dict[str, Any] = {}
        if facts:
            statistics["outputStatistics"] = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
                size=facts["bytes"], rowCount=_rows(path)
            )
        named = dataset(job.uris.get(name) or path)
        outputs.append(OutputDataset(*named, facets=_facets(path, facts.get("sha256")), outputFacets=statistics))
    return RunEvent(
        eventType=RunState[kind],
        eventTime=datetime.now(UTC).isoformat(),
        run=Run(str(run_id(job)), run_facets),
        job=OfJob(_namespace(), _name(job), job_facets),
        inputs=inputs,
        outputs=outputs,
        producer=PRODUCER,
    )


def run_id(job: Job) -> UUID:
    """Of a task's execution: the same however often it is told, since it comes from where the outputs go."""
    first = next(iter(job.outputs))
    return uuid5(NAMESPACE_URL, job.uris.get(first) or job.outputs[first])


def dataset(uri: str) -> tuple[str, str]:
    """(namespace, name) of an artifact, by OpenLineage's naming: ("s3://bucket", "key"), ("file", "/path")."""
    parsed = urlsplit(uri)
    if parsed.netloc:
        return f"{parsed.scheme}://{parsed.netloc}", parsed.path.lstrip("/")
    return "file", parsed.path


def _namespace() -> str:
    return os.environ.get(NAMESPACE) or "vapo"


def _name(job: Job) -> str:
    purpose = job.parameters.get("purpose", "")
    return job.stage if purpose in ("", "training") else f"{job.stage}.{purpose}"


def _run_facets(job: Job) -> dict[str, Any]:
    from openlineage.client.facet_v2 import parent_run, processing_engine_run, tags_run

    tags = {"commit": commit(), "image": job.image, **{key: job.parameters.get(key) for key in ("iteration", "seed")}}
    given = {key: str(value) for key, value in tags.items() if value not in (None, "")}
    facets: dict[str, Any] = {
        "processing_engine": processing_engine_run.ProcessingEngineRunFacet(version=vapo.__version__, name="vapo"),
        "tags": tags_run.TagsRunFacet([tags_run.TagsRunFacetFields(k, v, "VAPO") for k, v in given.items()]),
    }
    first = next(iter(job.outputs))
    if run := run_of(job.uris.get(first) or job.outputs[first]):
        facets["parent"] = parent_run.ParentRunFacet(
            parent_run.Run(str(_as_uuid(run))), parent_run.Job(_namespace(), "pipeline")
        )
    return facets


def _as_uuid(run: str) -> UUID:
    """A cluster's run ID is one; the name of a run on this machine is made one."""
    try:
        return UUID(run)
    except ValueError:
        return uuid5(NAMESPACE_URL, run)


def _facets(path: str, sha256: str | None) -> dict[str, Any]:
    """The version of a dataset, if it is known, and the columns of a table, if it is there."""
    from openlineage.client.facet_v2 import dataset_version_dataset, schema_dataset

    facets: dict[str, Any] = {}
    if sha256:
        facets["version"] = dataset_version_dataset.DatasetVersionDatasetFacet(sha256)
        if (table := _table(path)) is not None:
            fields = [schema_dataset.SchemaDatasetFacetFields(field.name, str(field.type)) for field in table.schema]
            facets["schema"] = schema_dataset.SchemaDatasetFacet(fields)
    return facets


def _rows(path: str) -> int | None:
    table = _table(path)
    return None if table is None else sum(table.get_batch(i).num_rows for i in range(table.num_record_batches))


def _table(path: str) -> Any:
    """The reader of an Arrow file; None of any other."""
    if not Path(path).is_file():
        return None
    with Path(path).open("rb") as file:
        if file.read(6) != b"ARROW1":
            return None
    return pa.ipc.open_file(pa.memory_map(path, "r"))
