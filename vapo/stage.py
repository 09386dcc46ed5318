"""What the body of every component calls: check the inputs, do the stage's work, leave digests and a record.

Nothing heavy is imported before a job is executed: with a warm worker at hand, a component's own process never does it.
"""

from __future__ import annotations

import importlib
import json
import os
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from vapo import worker
from vapo.errors import UserError, as_user_error
from vapo.progress import ATTENDED, emit, leave_with_reader

METRICS = "metrics"  # the output that holds a stage's numbers as JSON


class Artifact(Protocol):
    """What kfp hands to a component: a place and its metadata."""

    path: str
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A stage's function, its section in vapo.recipe, and whether it needs torch: then it waits for a warm worker."""

    module: str
    function: str
    section: str
    torch: bool


STAGES = {
    "problems": Stage("vapo.problems.make", "problems", "Problems", torch=False),
    "base_model": Stage("vapo.train.base_model", "base_model", "BaseModelSection", torch=True),
    "rollout": Stage("vapo.rollout.generate", "rollout", "Rollout", torch=True),
    "verification": Stage("vapo.problems.verification", "verification", "Verification", torch=False),
    "value_pretraining": Stage("vapo.train.value_pretraining", "value_pretraining", "ValuePretraining", torch=True),
    "advantages": Stage("vapo.train.advantages", "advantages", "Advantages", torch=True),
    "ppo_update": Stage("vapo.train.ppo_update", "ppo_update", "PpoUpdate", torch=True),
    "evaluation": Stage("vapo.evaluate.accuracy", "evaluation", "Evaluation", torch=False),
    "history": Stage("vapo.report.history", "history", "Section", torch=False),
    "report": Stage("vapo.report.stage", "report", "Report", torch=False),
}


@dataclass(frozen=True)
class Job:
    """One execution of a stage, in a form that passes between processes as JSON."""

    stage: str
    section: str
    parameters: dict[str, Any]
    inputs: dict[str, dict[str, str]]  # name -> {"path", "sha256"}
    outputs: dict[str, str]  # name -> path
    asked: float  # Unix time at which the component began


def run(
    stage: str,
    *,
    section: str,
    parameters: Mapping[str, Any],
    inputs: Mapping[str, Artifact | None],
    outputs: Mapping[str, Artifact],
) -> None:
    """Run a stage inside a component: `section` is its part of the recipe as JSON.

    Afterwards every output's metadata holds its sha256 and size, and the metrics, where the Kubeflow UI shows them.
    """
    if os.environ.get(ATTENDED):
        leave_with_reader()
    job = Job(
        stage,
        section,
        dict(parameters),
        {
            name: {"path": artifact.path, "sha256": str(artifact.metadata.get("sha256", ""))}
            for name, artifact in inputs.items()
            if artifact is not None
        },
        {name: artifact.path for name, artifact in outputs.items()},
        time.time(),
    )
    result = _by_worker(job) or execute(asdict(job))
    for name, artifact in outputs.items():
        artifact.metadata.update(result[name])


def _by_worker(job: Job) -> dict[str, dict[str, Any]] | None:
    """The metadata of every output, or None when there is no warm worker to do the job."""
    address = os.environ.get(worker.ADDRESS)
    if not address or not worker.ready(address, patience=60.0 if STAGES[job.stage].torch else 0.0):
        return None
    try:
        return worker.submit(address, asdict(job))
    except ConnectionRefusedError:  # it was killed: the stage can do without
        return None


def execute(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Do a job in this process; returns the metadata of every output.

    What the user can cure is printed as one `error` event before it propagates.
    """
    job = Job(**data)
    try:
        return _execute(job)
    except BaseException as error:
        cure = as_user_error(error)
        last = traceback.format_exception_only(error)[-1].strip()
        emit("error", stage=job.stage, **_where(job), user=cure is not None, message=str(cure or last))
        raise


def _execute(job: Job) -> dict[str, dict[str, Any]]:
    from vapo import recipe
    from vapo.lineage import write_record
    from vapo.store import sha256_of
    from vapo.tables import write_text
    from vapo.train.installed import check_installed

    emit("start", stage=job.stage, **_where(job))
    stage = STAGES[job.stage]
    section = getattr(recipe, stage.section).model_validate_json(job.section or "{}")
    if isinstance(section, recipe.TrainingSection):
        check_installed(section.train)
    for name, source in job.inputs.items():
        _verify(name, source)
    work_started, clock = time.time(), time.monotonic()
    paths = {name: Path(source["path"]) for name, source in job.inputs.items()}
    targets = {name: Path(path) for name, path in job.outputs.items() if name != METRICS}
    if isinstance(section, recipe.TrainingSection) and not section.train.in_process:
        from vapo.train.launch import launch

        found = launch(job.stage, section, paths, targets, job.parameters)
    else:
        function = getattr(importlib.import_module(stage.module), stage.function)
        found = function(section, **paths, **targets, **job.parameters)
    seconds = time.monotonic() - clock
    metrics = {name: float(value) for name, value in found.items() if value is not None}
    if METRICS in job.outputs:
        write_text(Path(job.outputs[METRICS]), json.dumps({**metrics, "seconds": seconds}, indent=1) + "\n")
    facts = {
        name: {"sha256": sha256_of(Path(path)), "bytes": Path(path).stat().st_size}
        for name, path in job.outputs.items()
    }
    folder = Path(next(iter(job.outputs.values()))).parent
    write_record(
        folder,
        stage=job.stage,
        parameters=job.parameters,
        section=json.loads(job.section or "{}"),
        inputs=job.inputs,
        outputs={name: {"path": job.outputs[name], **fact} for name, fact in facts.items()},
        metrics=metrics,
        started=work_started,
        seconds=seconds,
    )
    emit("end", stage=job.stage, **_where(job), seconds=seconds, before=work_started - job.asked, metrics=metrics)
    where = {"stage": job.stage, "iteration": job.parameters.get("iteration", 0)}
    return {name: {**fact, **where, **(metrics if name == METRICS else {})} for name, fact in facts.items()}


def _where(job: Job) -> dict[str, Any]:
    return {"iteration": job.parameters.get("iteration", 0), "purpose": job.parameters.get("purpose", "")}


def _verify(name: str, source: dict[str, str]) -> None:
    """An input must still be what its writer left: kfp's cache trusts an address whatever lies there."""
    from vapo.store import sha256_of

    path = Path(source["path"])
    if not path.is_file():
        raise UserError(f"input {name}: {path} is not there: run the stage that writes it")
    if source["sha256"] and sha256_of(path) != source["sha256"]:
        raise UserError(
            f"input {name}: {path} was changed since it was written (sha256 expected {source['sha256'][:12]}): "
            "restore it, or run again with --fresh"
        )
