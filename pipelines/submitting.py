"""From a recipe to a run on a cluster: uploaded once per content, created once per name."""

import json
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from kfp_server_api import V2beta1PipelineVersionReference, V2beta1Run, V2beta1RuntimeConfig

from pipelines import uploading
from pipelines.cluster import Cluster, NoAnswer
from pipelines.compiling import compile_pipeline
from pipelines.parameters import arguments_of
from pipelines.segments import Segment, parameters_from, segments
from pipelines.uploading import equals, experiment_named, pipeline_named, version_of
from vapo.errors import UserError
from vapo.recipe import Recipe

BUCKETS = ("s3://", "minio://")


@dataclass(frozen=True)
class Order:
    """How a run is asked for beside its recipe; every run of a chain knows it, and asks for the next in the same way.

    Empty: the experiment of the pipeline's name, the installation's service account, the server's one namespace.
    """

    experiment: str = ""
    service_account: str = ""
    namespace: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)  # of the pipeline, as text


@dataclass(frozen=True)
class Submission:
    """A run that was created, and whether its pipeline had to be uploaded."""

    run: Any  # V2beta1Run
    pipeline: str
    version: str
    uploaded: bool


def submit(
    recipe: Recipe,
    cluster: Cluster,
    order: Order,
    *,
    name: str = "",
    handed_over: Mapping[str, Any] | None = None,
    ir: str = "",
) -> Submission:
    """Create a run of a recipe's pipeline: the first of its chain, if its iterations take several.

    Args:
        name: of the run, or of the chain; what is there already is returned as it is. Empty: a new one.
        handed_over: what the segment before has handed over: then it is the one after it.
        ir: the pipeline, for all iterations in one run; empty: the recipe's.

    Raises:
        UserError: a parameter is unknown or does not fit, the store is none, or the server refuses.
    """
    if not recipe.runtime.store.startswith(BUCKETS):
        raise UserError(
            f"runtime.store = {recipe.runtime.store!r}: pods share no folder: give a bucket, --store s3://bucket/prefix"
        )
    parts = (Segment(1, 1, recipe.iterations, 1),) if ir else segments(recipe)
    part = parts[handed_over["segment"]] if handed_over else parts[0]  # that counts from 1
    chain = handed_over["chain"] if handed_over else name or new_name(recipe)
    ir = ir or compile_pipeline(recipe, share=True, segment=part if part.of > 1 else None)
    arguments = arguments_of(ir, order.parameters, later=bool(handed_over))
    if part.of > 1:
        arguments |= {"chain": chain, "submission": json.dumps(asdict(order), sort_keys=True)}
    if handed_over:
        arguments |= parameters_from(handed_over)
    pipeline = f"vapo-{recipe.name}"
    pipeline_id = pipeline_named(cluster, pipeline)
    version, version_id, uploaded = version_of(cluster, pipeline_id, pipeline, ir)
    run = V2beta1Run(
        display_name=name_in_chain(chain, part),
        description=f"segment {part.number} of {part.of} of {chain}" if part.of > 1 else None,
        experiment_id=experiment_named(cluster, order.experiment or pipeline),
        pipeline_version_reference=V2beta1PipelineVersionReference(
            pipeline_id=pipeline_id, pipeline_version_id=version_id
        ),
        runtime_config=V2beta1RuntimeConfig(parameters=arguments),
        service_account=order.service_account or None,
    )
    return Submission(create_once(cluster, run), pipeline, version, uploaded)


def new_name(recipe: Recipe) -> str:
    """A run's name that no other has, say "demo-20261122-221530-5f1c"."""
    return f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


def name_in_chain(chain: str, segment: Segment) -> str:
    """A segment's run, say "demo-20261122-221530-5f1c-2": whoever creates it looks for this name first."""
    return f"{chain}-{segment.number}" if segment.of > 1 else chain


def create_once(cluster: Cluster, run: V2beta1Run) -> Any:
    """The run of that name in its experiment: the one that is there, else a new one.

    The server takes any number of runs of one name. So we look before creating, after an answer that did not come, and
    after creating: should two have been made at once, everybody keeps the first and stops the others.
    """
    found = named(cluster, run.experiment_id, run.display_name)
    for wait in (0.0, *uploading.WAITS):
        if found:
            break
        time.sleep(wait)
        found = named(cluster, run.experiment_id, run.display_name) if wait else found
        if not found:
            with suppress(NoAnswer):
                cluster.call(cluster.client.runs.run_service_create_run, run)
                found = named(cluster, run.experiment_id, run.display_name)
    if not found:
        raise NoAnswer(
            f"{cluster.host} did not answer whether it created the run {run.display_name!r}: "
            f"'vapo watch {run.display_name} {cluster.options()}' tells"
        )
    first, *others = found
    for other in others:
        cluster.call(cluster.client.runs.run_service_terminate_run, other.run_id)
    return first


def named(cluster: Cluster, experiment_id: str, name: str) -> list[Any]:
    """The runs of that name in an experiment, the first one first."""
    answer = cluster.call(
        cluster.client.runs.run_service_list_runs,
        experiment_id=experiment_id,
        filter=equals("display_name", name),
        page_size=100,
    )
    return sorted(answer.runs or [], key=lambda found: (found.created_at, found.run_id))
