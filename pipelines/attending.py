"""What `vapo submit`, `watch`, `stop` and `retry` do and say, one function each."""

from typing import Any

import yaml
from rich.console import Console

from pipelines.chaining import link_of, next_run
from pipelines.cluster import Cluster
from pipelines.compiling import stages_of
from pipelines.figures import Figures
from pipelines.following import follow
from pipelines.runs import find_run, get_run, retry_run, spec_of, stop_run
from pipelines.submitting import Order, new_name, submit
from vapo.errors import Detached
from vapo.recipe import Recipe


def submit_and_show(
    recipe: Recipe, cluster: Cluster, order: Order, console: Console, every: float | None, *, ir: str = ""
) -> None:
    """Create a run, of another pipeline than the recipe's if `ir` is one, and say where it is; then show it, if `every`
    says how often to look (seconds).
    """
    name = new_name(recipe)
    try:
        made = submit(recipe, cluster, order, name=name, ir=ir)
    except KeyboardInterrupt:
        raise Detached(
            f"interrupted while submitting: 'vapo watch {name} {cluster.options()}' tells whether there is a run"
        ) from None
    _say(console, f"pipeline {made.pipeline} {made.version}: {'uploaded' if made.uploaded else 'is there already'}")
    _say(console, f"run {made.run.display_name} {made.run.run_id}")
    _say(console, cluster.address(f"runs/details/{made.run.run_id}"))
    if every:
        attend(cluster, made.run, console, every)
        return
    _say(console, f"'vapo watch {made.run.run_id} {cluster.options()}' shows it")
    link = link_of(made.run, spec_of(cluster, made.run))
    if link and not link.by_itself:
        _say(console, f"it is segment 1 of {link.of}; who watches it starts the next (or chain.secret lets it do so)")


def attend(cluster: Cluster, run: Any, console: Console, every: float) -> None:
    """Show a run until it has ended, and then the next ones of its chain; raises what `follow` and `next_run` do."""
    while True:
        spec = spec_of(cluster, run)
        planned = stages_of(yaml.safe_dump(spec)) if spec else {}
        store = _store(run, spec)
        figures = Figures(store, run.run_id, console) if store else None
        run = follow(cluster, run, console, planned, every, figures)
        link = link_of(run, spec) if spec else None
        if not link:
            return
        try:
            following = next_run(cluster, run, link, lambda line: _say(console, line))
        except KeyboardInterrupt:
            raise Detached(
                f"run {run.display_name} has succeeded, and segment {link.number + 1} may not be there yet: "
                f"'vapo watch {run.run_id} {cluster.options()}' goes on"
            ) from None
        if not following:
            return
        run = following


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


def _store(run: Any, spec: dict[str, Any]) -> str:
    """Where a run's checkpoints and records lie: its parameter, else the pipeline's."""
    given = (run.runtime_config.parameters or {}) if run.runtime_config else {}
    defaults = spec.get("root", {}).get("inputDefinitions", {}).get("parameters", {})
    found: str = given.get("store") or defaults.get("store", {}).get("defaultValue", "")
    return found


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
