"""What `vapo lineage` is asked for: from a run's name, a path or a digest to the graph of all that led to it."""

from pipelines.ledger import tasks_of
from pipelines.seaweed import BUCKET
from pipelines.stores import EMBEDDED
from pipelines.workdir import Workdir, ended
from vapo.errors import UserError
from vapo.lineage.graph import Graph, find_artifact, node_at, read_nodes, trace
from vapo.stage import METRICS


def lineage_of(workdir: Workdir, what: str, iteration: int | None = None) -> Graph:
    """The graph behind an artifact.

    Args:
        what: a run's name: then its page, to which everything in it led, or its policy after `iteration`; or as in
            `find_artifact`.

    Raises:
        UserError: there is no such run, iteration or artifact; what there is is listed.
    """
    nodes = read_nodes(workdir.artifacts)
    if not (workdir.root / what / "recipe.json").is_file():
        if iteration is not None:
            runs = [folder.name for folder in workdir.runs()]
            raise UserError(f"--iteration {iteration} is for a run's name, and {what!r} is none: there are {runs}")
        return trace(nodes, *find_artifact(nodes, what))
    if not (workdir.root / what / "report.html").is_file() and ended(workdir.root / what):
        task = tasks_of(workdir, workdir.root / what, nodes)[-1]  # of a rerun without the report
        graph = trace(nodes, task, min(task.record.outputs.keys() - {METRICS}, default=METRICS))
    else:
        graph = trace(nodes, node_at(workdir.last_task(what)), "page")
    if iteration is None:
        return graph
    stages = {"ppo_update": "new_policy", "base_model": "policy"}
    policies = {node.record.iteration: node for node in graph.nodes if node.record.stage in stages}
    if iteration not in policies:
        last = max(policies)
        raise UserError(f"--iteration {iteration}: run {what!r} has policies after iterations 0 to {last}")
    found = policies[iteration]
    return trace(nodes, found, stages[found.record.stage])


def store_of(graph: Graph) -> str:
    """The store that must be open to read a graph's checkpoints, as `stores.opened` takes it: the embedded or none."""
    stores = {node.record.parameters.get("store") for node in graph.nodes}
    return EMBEDDED if f"s3://{BUCKET}" in stores else ""
