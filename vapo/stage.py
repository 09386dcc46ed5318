"""What the body of every component calls: check the inputs, do the stage's work, leave digests and a record.

Nothing heavy is imported before a job is executed: with a warm worker at hand, a component's own process never does it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from vapo import worker
from vapo.errors import UserError, as_user_error
from vapo.progress import ATTENDED, emit, leave_with_reader

IMAGE = "VAPO_IMAGE"  # environment variable of every task: the image that it runs in
PLACEHOLDER = re.compile(r"\{\{\$\.inputs\.parameters\['(.+)'\]\}\}")
METRICS = "metrics"  # the output that holds a stage's numbers as JSON
LINEAGE = "lineage"  # the output that shows all that led to a stage's inputs


class Artifact(Protocol):
    """What kfp hands to a component: a place and its metadata."""

    path: str
    uri: str
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A stage's function, its section in vapo.recipe, and whether it needs torch: then it waits for a warm worker.

    One that is `resumable` also takes `partial`: a folder in which it finds what it had finished when it was killed.
    One that is `informed` also takes `sources`: what is known of each input, its uri, sha256 and record.
    """

    module: str
    function: str
    section: str
    torch: bool
    resumable: bool = False
    informed: bool = False


STAGES = {
    "problems": Stage("vapo.problems.make", "problems", "Problems", torch=False),
    "base_model": Stage("vapo.train.base_model", "base_model", "BaseModelSection", torch=True, resumable=True),
    "rollout": Stage("vapo.rollout.generate", "rollout", "Rollout", torch=True, resumable=True),
    "concatenation": Stage("vapo.rollout.concatenation", "concatenation", "Rollout", torch=False),
    "verification": Stage("vapo.problems.verification", "verification", "Verification", torch=False),
    "value_pretraining": Stage(
        "vapo.train.value_pretraining", "value_pretraining", "ValuePretraining", torch=True, resumable=True
    ),
    "advantages": Stage("vapo.train.advantages", "advantages", "Advantages", torch=True),
    "ppo_update": Stage("vapo.train.ppo_update", "ppo_update", "PpoUpdate", torch=True, resumable=True),
    "evaluation": Stage("vapo.evaluate.accuracy", "evaluation", "Evaluation", torch=False),
    "history": Stage("vapo.report.history", "history", "Section", torch=False),
    "report": Stage("vapo.report.stage", "report", "Report", torch=False),
    "hand_off": Stage("vapo.segments", "hand_off", "Section", torch=False, informed=True),
    "take_over": Stage("vapo.segments", "take_over", "Section", torch=False),
    "next_segment": Stage("pipelines.next_segment", "next_segment", "Chain", torch=False),  # compiles and submits
}


@dataclass(frozen=True)
class Job:
    """One execution of a stage, in a form that passes between processes as JSON."""

    stage: str
    section: str
    parameters: dict[str, Any]
    inputs: dict[str, dict[str, str]]  # name -> {"path", "sha256", "uri", "record"}; all but the path may be unknown
    outputs: dict[str, str]  # name -> path
    asked: float  # Unix time at which the component began
    image: str = ""  # that the component runs in
    uris: dict[str, str] = field(default_factory=dict)  # name of an output -> where it will be kept


def run(
    stage: str,
    *,
    section: str,
    parameters: Mapping[str, Any],
    inputs: Mapping[str, Artifact | list[Artifact] | None],
    outputs: Mapping[str, Artifact],
    known: str = "{}",
) -> None:
    """Run a stage inside a component: `section` is its part of the recipe as JSON.

    Args:
        inputs: of a list each has the input's name with its number behind: parts_0, parts_1, ...
        known: sha256 and record of inputs whose metadata may not say them, by name, as JSON.

    Afterwards every output's metadata holds its sha256 and size and the sha256 of the record of what was done; that of
    the metrics their numbers, and that of one output, its `bearer`, the record itself: the Kubeflow UI shows them.
    """
    if os.environ.get(ATTENDED):
        leave_with_reader()
    digests: dict[str, dict[str, str]] = json.loads(known)
    job = Job(
        stage,
        section,
        dict(parameters),
        {
            name: {
                "path": artifact.path,
                "uri": artifact.uri,
                **{key: str(artifact.metadata.get(key, "")) for key in ("sha256", "record")},
                **digests.get(name, {}),
            }
            for name, artifact in _one_by_one(inputs)
        },
        {name: artifact.path for name, artifact in outputs.items()},
        time.time(),
        _image(),
        {name: artifact.uri for name, artifact in outputs.items()},
    )
    result = _by_worker(job) or execute(asdict(job))
    for name, artifact in outputs.items():
        artifact.metadata.update(result[name])


def _one_by_one(inputs: Mapping[str, Artifact | list[Artifact] | None]) -> Iterator[tuple[str, Artifact]]:
    for name, given in inputs.items():
        if isinstance(given, list):
            yield from ((f"{name}_{number}", artifact) for number, artifact in enumerate(given))
        elif given is not None:
            yield name, given


def _image() -> str:
    """The image that this process runs in. Where it is a parameter of the pipeline the variable names that parameter:
    kfp fills placeholders in the arguments of this process, but not in its environment.
    """
    said = os.environ.get(IMAGE, "")
    if not (parameter := PLACEHOLDER.fullmatch(said)):
        return said
    given = json.loads(sys.argv[sys.argv.index("--executor_input") + 1])
    image: str = given["inputs"]["parameterValues"][parameter[1]]
    return image


def _by_worker(job: Job) -> dict[str, dict[str, Any]] | None:
    """The metadata of every output, or None when there is no warm worker to do the job."""
    address = os.environ.get(worker.ADDRESS)
    if not address or _wants_a_fresh_process(job):
        return None
    if not worker.ready(address, patience=60.0 if STAGES[job.stage].torch else 0.0):
        return None
    try:
        return worker.submit(address, asdict(job))
    except ConnectionRefusedError:  # it was killed: the stage can do without
        return None


def _wants_a_fresh_process(job: Job) -> bool:
    """vLLM looks into every module that is imported, and stumbles over llvmlite, which the warm worker has imported
    (numba's: `vars()` of one of its objects is no dictionary); and its workers start from a process like this one.
    """
    return job.stage == "rollout" and json.loads(job.section or "{}").get("engine") == "vllm"


def execute(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Do a job in this process; returns the metadata of every output.

    What the user can cure is printed as one `error` event before it propagates.
    """
    from vapo.lineage.openlineage import told

    job = Job(**data)
    try:
        with told(job) as complete:
            made = _execute(job)
            complete(made)
        return made
    except BaseException as error:
        cure = as_user_error(error)
        last = traceback.format_exception_only(error)[-1].strip()
        emit("error", stage=job.stage, **_where(job), user=cure is not None, message=str(cure or last))
        raise


def _execute(job: Job) -> dict[str, dict[str, Any]]:
    from vapo import recipe
    from vapo.lineage.record import in_metadata, write_record
    from vapo.lineage.records import kept
    from vapo.partial import PLACE, partial_folder
    from vapo.store import sha256_of
    from vapo.tables import write_text
    from vapo.train.installed import check_installed

    emit("start", stage=job.stage, **_where(job))
    stage = STAGES[job.stage]
    section = getattr(recipe, stage.section).model_validate_json(job.section or "{}")
    if isinstance(section, recipe.TrainingSection):
        check_installed(section.train)
    inputs = {name: {**source, "sha256": _verified(name, source)} for name, source in job.inputs.items()}
    work_started, clock = time.time(), time.monotonic()
    paths = {name: Path(source["path"]) for name, source in job.inputs.items()}
    targets = {name: Path(path) for name, path in job.outputs.items() if name not in (METRICS, LINEAGE)}
    told = {"sources": inputs} if stage.informed else {}
    with ExitStack() as stack:
        if stage.resumable and os.environ.get(PLACE):  # without it nothing would find the folder again
            paths["partial"] = stack.enter_context(partial_folder(_identity(job, inputs)))
        found = _work(job, section, paths, targets, told)
        seconds = time.monotonic() - clock
        metrics = {name: float(value) for name, value in found.items() if value is not None}
        if METRICS in job.outputs:
            text = json.dumps({"seconds": seconds, **metrics}, indent=1) + "\n"
            write_text(Path(job.outputs[METRICS]), text)
        if LINEAGE in job.outputs:
            write_text(Path(job.outputs[LINEAGE]), _lineage(job))
        facts = {
            name: {"sha256": sha256_of(Path(path)), "bytes": Path(path).stat().st_size}
            for name, path in job.outputs.items()
        }
        record, digest = write_record(
            Path(next(iter(job.outputs.values()))).parent,
            stage=job.stage,
            parameters=job.parameters,
            section=json.loads(job.section or "{}"),
            inputs=inputs,
            outputs={
                name: {"path": job.outputs[name], "uri": job.uris.get(name, ""), **fact} for name, fact in facts.items()
            },
            metrics=metrics,
            image=job.image,
            started=work_started,
            ended=time.time(),
            seconds=seconds,
        )
        if records := kept():
            records.add(record)
    before = work_started - job.asked
    emit("end", stage=job.stage, **_where(job), seconds=seconds, before=before, metrics=metrics, record=digest)
    where = {"stage": job.stage, "iteration": job.parameters.get("iteration", 0), "record": digest}
    described = {name: {**fact, **where, **(metrics if name == METRICS else {})} for name, fact in facts.items()}
    described[bearer(facts)]["lineage"] = in_metadata(record)
    return described


def bearer(outputs: Iterable[str]) -> str:
    """The output whose metadata holds the whole record: the last one but the metrics, of which the UI makes a table.

    One alone, since the metadata of all inputs of a task is an argument of its process.
    """
    return [name for name in outputs if name != METRICS][-1]


def _work(
    job: Job, section: Any, paths: Mapping[str, Path], targets: Mapping[str, Path], told: Mapping[str, Any]
) -> dict[str, float | None]:
    """Call the stage's function, here or in ranks of their own; returns its metrics."""
    from vapo import recipe

    stage = STAGES[job.stage]
    if isinstance(section, recipe.TrainingSection) and not section.train.in_process:
        from vapo.train.launch import launch

        return launch(job.stage, section, paths, targets, job.parameters)
    function = getattr(importlib.import_module(stage.module), stage.function)
    metrics: dict[str, float | None] = function(section, **paths, **targets, **job.parameters, **told)
    return metrics


def _lineage(job: Job) -> str:
    """A page that shows every stage that led to the inputs, from the records that VAPO_RECORDS holds."""
    from vapo.lineage.graph import nodes_of, trace_all
    from vapo.lineage.page import page
    from vapo.lineage.records import kept

    records = kept()
    made = {source["record"]: name for name, source in job.inputs.items() if source.get("record")}
    nodes = nodes_of(records.led_to(records.get(made))) if records else []
    found = trace_all(nodes, [node for node in nodes if node.digest in made], f"what the {job.stage} shows")
    known = {node.digest for node in nodes}
    return page(replace(found, unknown=(*found.unknown, *(made[digest] for digest in made.keys() - known))))


def _identity(job: Job, inputs: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Everything that shapes a stage's result."""
    from vapo.lineage.software import library_versions, source_digest

    return {
        "stage": job.stage,
        "section": json.loads(job.section or "{}"),
        "parameters": job.parameters,
        "inputs": {name: source["sha256"] for name, source in inputs.items()},
        "vapo": source_digest(),
        "libraries": library_versions(),
    }


def _where(job: Job) -> dict[str, Any]:
    where = {"iteration": job.parameters.get("iteration", 0), "purpose": job.parameters.get("purpose", "")}
    shards = {key: job.parameters[key] for key in ("shard", "shards") if job.parameters.get("shards", 1) > 1}
    return where | shards


def _verified(name: str, source: dict[str, str]) -> str:
    """The sha256 of an input, which must be what its writer left: kfp's cache trusts an address whatever is there."""
    from vapo.store import sha256_of

    path = Path(source["path"])
    if not path.is_file():
        raise UserError(f"input {name}: {path} is not there: run the stage that writes it")
    found = sha256_of(path)
    if source.get("sha256") not in (None, "", found):
        raise UserError(
            f"input {name}: {path} was changed since it was written (sha256 expected {source['sha256'][:12]}): "
            "restore it, or run again with --fresh"
        )
    return found
