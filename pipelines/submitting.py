"""From a recipe to a run on a cluster: uploaded once per content, created once per name."""

import hashlib
import json
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from kfp_server_api import (
    V2beta1Experiment,
    V2beta1Pipeline,
    V2beta1PipelineVersionReference,
    V2beta1Run,
    V2beta1RuntimeConfig,
)

from pipelines.cluster import Cluster, Exists, Missing, NoAnswer
from pipelines.compiling import compile_pipeline
from vapo.errors import UserError
from vapo.recipe import Recipe

WAITS = (2.0, 5.0, 10.0)  # seconds until we look whether a run was created whose answer did not come
BUCKETS = ("s3://", "minio://")
TYPES: dict[str, type | tuple[type, ...]] = {  # of parameters, as JSON has them
    "NUMBER_INTEGER": int,
    "NUMBER_DOUBLE": (int, float),
    "BOOLEAN": bool,
    "LIST": list,
    "STRUCT": dict,
}


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
    *,
    parameters: Mapping[str, str] | None = None,
    experiment: str = "",
    service_account: str = "",
    name: str = "",
    ir: str = "",
) -> Submission:
    """Create a run of a recipe's pipeline.

    Args:
        parameters: run-time parameters of the pipeline, as text; the recipe's own are the recipe's.
        experiment: its name, made if it is not there; empty: the pipeline's.
        name: of the run; one that is there already is returned as it is. Empty: a new one.
        ir: the pipeline; empty: the recipe's.

    Raises:
        UserError: a parameter is unknown or does not fit, the store is none, or the server refuses.
    """
    if not recipe.runtime.store.startswith(BUCKETS):
        raise UserError(
            f"runtime.store = {recipe.runtime.store!r}: pods share no folder: give a bucket, --store s3://bucket/prefix"
        )
    ir = ir or compile_pipeline(recipe, share=True)
    arguments = arguments_of(ir, parameters or {})
    pipeline = f"vapo-{recipe.name}"
    pipeline_id = _pipeline(cluster, pipeline)
    version, version_id, uploaded = _version(cluster, pipeline_id, pipeline, ir)
    run = V2beta1Run(
        display_name=name or new_name(recipe),
        experiment_id=_experiment(cluster, experiment or pipeline),
        pipeline_version_reference=V2beta1PipelineVersionReference(
            pipeline_id=pipeline_id, pipeline_version_id=version_id
        ),
        runtime_config=V2beta1RuntimeConfig(parameters=arguments),
        service_account=service_account or None,
    )
    return Submission(create_once(cluster, run), pipeline, version, uploaded)


def new_name(recipe: Recipe) -> str:
    """A run's name that no other has, say "demo-20261122-221530-5f1c"."""
    return f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


def create_once(cluster: Cluster, run: V2beta1Run) -> Any:
    """The run of that name in its experiment: the one that is there, else a new one.

    The server takes any number of runs of one name. So we look before creating, after an answer that did not come, and
    after creating: should two have been made at once, everybody keeps the first and stops the others.
    """
    found = _named(cluster, run)
    for wait in (0.0, *WAITS):
        if found:
            break
        time.sleep(wait)
        found = _named(cluster, run) if wait else found
        if not found:
            with suppress(NoAnswer):
                cluster.call(cluster.client.runs.run_service_create_run, run)
                found = _named(cluster, run)
    if not found:
        raise NoAnswer(
            f"{cluster.host} did not answer whether it created the run {run.display_name!r}: "
            f"'vapo watch {run.display_name} {cluster.options()}' tells"
        )
    first, *others = found
    for other in others:
        cluster.call(cluster.client.runs.run_service_terminate_run, other.run_id)
    return first


def _named(cluster: Cluster, run: V2beta1Run) -> list[Any]:
    """The runs of that name in its experiment, the first one first."""
    answer = cluster.call(
        cluster.client.runs.run_service_list_runs,
        experiment_id=run.experiment_id,
        filter=equals("display_name", run.display_name),
        page_size=100,
    )
    return sorted(answer.runs or [], key=lambda found: (found.created_at, found.run_id))


def _pipeline(cluster: Cluster, name: str) -> str:
    """The ID of the pipeline whose versions a recipe's are; the cluster's cache is by its name."""
    calls, where = cluster.client.pipelines, _where(cluster)
    described = "VAPO: value-based augmented PPO, arXiv 2504.05118; its versions are named by their content"
    new = V2beta1Pipeline(name=name, display_name=name, description=described, **where)

    def look() -> str | None:
        try:
            return cluster.call(calls.pipeline_service_get_pipeline_by_name, name, **where).pipeline_id
        except Missing:
            return None

    def create() -> str:
        return cluster.call(calls.pipeline_service_create_pipeline, new).pipeline_id

    return _unique(look, create)


def _version(cluster: Cluster, pipeline_id: str, pipeline: str, ir: str) -> tuple[str, str, bool]:
    """The name and ID of the version with this content, and whether it had to be uploaded."""
    name = hashlib.sha256(ir.encode()).hexdigest()[:16]
    uploaded = []

    def look() -> str | None:
        calls, named = cluster.client.pipelines, equals("display_name", name)
        found = cluster.call(calls.pipeline_service_list_pipeline_versions, pipeline_id, filter=named).pipeline_versions
        return found[0].pipeline_version_id if found else None

    def create() -> str:
        uploaded.append(name)
        with tempfile.TemporaryDirectory(prefix="vapo-") as folder:
            path = Path(folder) / f"{pipeline}.yaml"
            path.write_text(ir, encoding="utf-8")
            upload = cluster.client.pipeline_uploads.upload_pipeline_version
            made = cluster.call(upload, str(path), name=name, display_name=name, pipelineid=pipeline_id)
        return made.pipeline_version_id

    return name, _unique(look, create), bool(uploaded)


def _experiment(cluster: Cluster, name: str) -> str:
    """The ID of the experiment of that name, made if it is not there."""
    calls, where = cluster.client.experiments, _where(cluster)

    def look() -> str | None:
        named = equals("display_name", name)
        found = cluster.call(calls.experiment_service_list_experiments, filter=named, **where).experiments
        return found[0].experiment_id if found else None

    def create() -> str:
        new = V2beta1Experiment(display_name=name, **where)
        return cluster.call(calls.experiment_service_create_experiment, new).experiment_id

    return _unique(look, create)


def _unique(look: Callable[[], str | None], create: Callable[[], str]) -> str:
    """What has its name to itself: the server refuses a second one, so it may be created until it is there."""
    for wait in (0.0, *WAITS):
        time.sleep(wait)
        if there := look():
            return there
        try:
            return create()
        except (Exists, NoAnswer) as error:  # somebody was quicker; or it was done, unheard
            last = error
    raise last


def _where(cluster: Cluster) -> dict[str, str]:
    return {"namespace": cluster.namespace} if cluster.namespace else {}


def equals(key: str, value: str) -> str:
    """The API's filter for one field."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": key, "string_value": value}]})


def arguments_of(ir: str, given: Mapping[str, str]) -> dict[str, Any]:
    """Run-time parameters in the types that the pipeline asks for.

    Raises:
        UserError: it has no such parameter, the recipe sets it, or the text is no value of its type.
    """
    spec = next(iter(yaml.load_all(ir, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))))
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    free = [name for name in parameters if not _of_recipe(name)]
    found: dict[str, Any] = {}
    for name, text in given.items():
        if name not in parameters:
            raise UserError(f"--param {name}={text}: the pipeline has no such parameter: there are {sorted(free)}")
        if name not in free:
            raise UserError(f"--param {name}: the recipe says it: use --set section.key=value")
        found[name] = _typed(name, text, parameters[name]["parameterType"])
    return found


def parsed(texts: Iterable[str]) -> dict[str, str]:
    """`name=value` texts as a dictionary."""
    pairs = {}
    for text in texts:
        name, equal, value = text.partition("=")
        if not equal or not name.strip():
            raise UserError(f"--param {text}: write --param name=value, say --param rollout_memory=128Gi")
        pairs[name.strip()] = value.strip()
    return pairs


def _of_recipe(name: str) -> bool:
    return name in ("store", "seed", "recipe_json", "wanted_groups") or name.endswith("_section")


def _typed(name: str, text: str, kind: str) -> Any:
    if kind == "STRING":
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "BOOLEAN"):
        raise UserError(f"--param {name}={text}: it must be a {kind.lower().replace('_', ' ')}")
    return value
