"""The runs of a cluster by name or ID: find one, stop it, try it again."""

import re
from collections.abc import Callable
from typing import Any

from pipelines.cluster import Cluster, Missing, NoAnswer
from vapo.errors import UserError

ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
PAGE, LOOKED_AT = 100, 1000  # the latest runs are looked through
SHOWN = 5


def find_run(cluster: Cluster, what: str) -> Any:
    """The run that an ID means, or its beginning, or a name, or its beginning.

    Raises:
        UserError: there is none, or several; the message lists the latest, or those.
    """
    if ID.fullmatch(what):
        try:
            return get_run(cluster, what)
        except Missing:
            pass
    runs = _latest(cluster)
    for fits in (_is, _begins):
        found = [run for run in runs if fits(what, run)]
        if len(found) == 1:
            return get_run(cluster, found[0].run_id)
        if found:
            raise UserError(f"run {what!r} means {len(found)} runs: {_shown(found)}: write more of the ID")
    there = f"the latest are {_shown(runs)}" if runs else "there are none"
    raise UserError(f"there is no run {what!r} on {cluster.host}: {there}")


def get_run(cluster: Cluster, run_id: str) -> Any:
    """The run of an ID, with its tasks."""
    return cluster.call(cluster.client.runs.run_service_get_run, run_id)


def spec_of(cluster: Cluster, run: Any) -> dict[str, Any]:
    """The IR that a run was made of; empty if it was not made of an uploaded version."""
    reference = run.pipeline_version_reference
    if not reference:
        return {}
    version = cluster.call(
        cluster.client.pipelines.pipeline_service_get_pipeline_version,
        reference.pipeline_id,
        reference.pipeline_version_id,
    )
    found: dict[str, Any] = version.pipeline_spec or {}
    spec: dict[str, Any] = found.get("pipeline_spec", found)  # with a platform's settings it stands beside them
    return spec if "root" in spec else {}


def stop_run(cluster: Cluster, run: Any) -> bool:
    """End a run's pods; whether there was anything to end."""
    if run.state in ENDED:
        return False
    _ask(cluster, cluster.client.runs.run_service_terminate_run, run)
    return True


def retry_run(cluster: Cluster, run: Any) -> None:
    """Let a run that failed or was stopped go on with what is missing.

    Raises:
        UserError: it did not fail.
    """
    if run.state not in ("FAILED", "CANCELED"):
        raise UserError(
            f"run {run.display_name!r} is {run.state}: only one that failed or was stopped can be tried again"
        )
    _ask(cluster, cluster.client.runs.run_service_retry_run, run)


def _ask(cluster: Cluster, function: Callable[..., Any], run: Any) -> None:
    """Ask for a change of a run's state; if the answer does not come, its state tells whether it was heard."""
    try:
        cluster.call(function, run.run_id)
    except NoAnswer:
        if get_run(cluster, run.run_id).state == run.state:
            raise


def _latest(cluster: Cluster) -> list[Any]:
    """The latest runs first."""
    found: list[Any] = []
    token = ""
    where = {"namespace": cluster.namespace} if cluster.namespace else {}
    while len(found) < LOOKED_AT:
        page = cluster.call(
            cluster.client.runs.run_service_list_runs,
            page_size=PAGE,
            sort_by="created_at desc",
            **where,
            **({"page_token": token} if token else {}),
        )
        found += page.runs or []
        token = page.next_page_token
        if not token:
            break
    return found


def _is(what: str, run: Any) -> bool:
    return what in (run.run_id, run.display_name)


def _begins(what: str, run: Any) -> bool:
    return bool(what) and (run.run_id.startswith(what) or run.display_name.startswith(what))


def _shown(runs: list[Any]) -> str:
    lines = [f"{run.display_name} ({run.run_id[:8]}, {run.state})" for run in runs[:SHOWN]]
    return ", ".join(lines) + (" and others" if len(runs) > SHOWN else "")
