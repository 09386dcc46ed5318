"""What `vapo submit`, `watch`, `stop` and `retry` do and say, one function each."""

from collections.abc import Mapping
from typing import Any

import yaml
from rich.console import Console

from pipelines.cluster import Cluster
from pipelines.compiling import stages_of
from pipelines.following import follow
from pipelines.runs import find_run, get_run, retry_run, stop_run
from pipelines.submitting import new_name, submit
from vapo.errors import Detached
from vapo.recipe import Recipe


def submit_and_show(
    recipe: Recipe,
    cluster: Cluster,
    console: Console,
    every: float | None,
    *,
    parameters: Mapping[str, str],
    experiment: str,
    service_account: str,
    ir: str = "",
) -> None:
    """Create a run and say where it is; then show it, if `every` says how often to look (seconds)."""
    name = new_name(recipe)
    try:
        made = submit(
            recipe,
            cluster,
            name=name,
            parameters=parameters,
            experiment=experiment,
            service_account=service_account,
            ir=ir,
        )
    except KeyboardInterrupt:
        raise Detached(
            f"interrupted while submitting: 'vapo watch {name} {cluster.options()}' tells whether there is a run"
        ) from None
    _say(console, f"pipeline {made.pipeline} {made.version}: {'uploaded' if made.uploaded else 'is there already'}")
    _say(console, f"run {made.run.display_name} {made.run.run_id}")
    _say(console, cluster.address(f"runs/details/{made.run.run_id}"))
    if every:
        attend(cluster, made.run, console, every)
    else:
        _say(console, f"'vapo watch {made.run.run_id} {cluster.options()}' shows it")


def attend(cluster: Cluster, run: Any, console: Console, every: float) -> None:
    """Show a run until it has ended; raises what `follow` does."""
    follow(cluster, run, console, _planned(cluster, run), every)


def stop_and_tell(cluster: Cluster, what: str, console: Console) -> None:
    """End a run, and say what stays of it."""
    run = find_run(cluster, what)
    if stop_run(cluster, run):
        _say(
            console,
            f"run {run.display_name} is being stopped; artifacts, checkpoints and cache of its finished tasks stay: "
            f"'vapo retry {run.run_id} {cluster.options()}' goes on from there",
        )
    else:
        _say(console, f"run {run.display_name} had ended before: {run.state.lower()}")


def retry_and_show(cluster: Cluster, what: str, console: Console, every: float | None) -> None:
    """Let a run go on that failed; then show it, if `every` says how often to look (seconds)."""
    run = find_run(cluster, what)
    retry_run(cluster, run)
    _say(console, f"run {run.display_name} goes on: {cluster.address(f'runs/details/{run.run_id}')}")
    if every:
        attend(cluster, get_run(cluster, run.run_id), console, every)


def _planned(cluster: Cluster, run: Any) -> dict[str, int]:
    """How many tasks of each stage the run's pipeline has, from the version that it was made of."""
    reference = run.pipeline_version_reference
    if not reference:
        return {}
    version = cluster.call(
        cluster.client.pipelines.pipeline_service_get_pipeline_version,
        reference.pipeline_id,
        reference.pipeline_version_id,
    )
    found = version.pipeline_spec or {}
    spec = found.get("pipeline_spec", found)  # with a platform's settings it stands beside them
    return stages_of(yaml.safe_dump(spec)) if "root" in spec else {}


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
