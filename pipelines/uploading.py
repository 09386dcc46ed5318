"""What a run on a cluster is made of: the pipeline, its version by content, the experiment; each made once."""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kfp_server_api import V2beta1Experiment, V2beta1Pipeline

from pipelines.cluster import Cluster, Exists, Missing, NoAnswer

WAITS = (2.0, 5.0, 10.0)  # seconds until we look whether something was made whose answer did not come


def pipeline_named(cluster: Cluster, name: str) -> str:
    """The ID of the pipeline whose versions a recipe's are; the cluster's cache is by its name."""
    calls, place = cluster.client.pipelines, where(cluster)
    described = "VAPO: value-based augmented PPO, arXiv 2504.05118; its versions are named by their content"
    new = V2beta1Pipeline(name=name, display_name=name, description=described, **place)

    def look() -> str | None:
        try:
            return cluster.call(calls.pipeline_service_get_pipeline_by_name, name, **place).pipeline_id
        except Missing:
            return None

    def create() -> str:
        return cluster.call(calls.pipeline_service_create_pipeline, new).pipeline_id

    return _unique(look, create)


def version_of(cluster: Cluster, pipeline_id: str, pipeline: str, ir: str) -> tuple[str, str, bool]:
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


def experiment_named(cluster: Cluster, name: str) -> str:
    """The ID of the experiment of that name, made if it is not there."""
    calls, place = cluster.client.experiments, where(cluster)

    def look() -> str | None:
        named = equals("display_name", name)
        found = cluster.call(calls.experiment_service_list_experiments, filter=named, **place).experiments
        return found[0].experiment_id if found else None

    def create() -> str:
        new = V2beta1Experiment(display_name=name, **place)
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


def where(cluster: Cluster) -> dict[str, str]:
    """The argument that says the namespace, where there are several."""
    return {"namespace": cluster.namespace} if cluster.namespace else {}


def equals(key: str, value: str) -> str:
    """The API's filter for one field."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": key, "string_value": value}]})
