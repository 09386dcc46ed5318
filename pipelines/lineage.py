"""What `vapo lineage` is asked for: from a run's name, a path or a digest to the graph of all that led to it."""

from collections.abc import Sequence

from pipelines.ledger import tasks_of
from pipelines.seaweed import BUCKET
from pipelines.stores import EMBEDDED
from pipelines.workdir import Workdir, ended
from vapo.errors import UserError
from vapo.lineage.graph import Graph, Node, find_artifact, node_at, nodes_of, read_nodes, trace
from vapo.lineage.records import Records
from vapo.stage import METRICS

POLICIES = {"ppo_update": "new_policy", "base_model": "policy"}


def lineage_of(workdir: Workdir, what: str, iteration: int | None = None) -> Graph:
    """The graph behind an artifact of a working directory.

    Args:
        what: a run's name: then its page, to which everything in it led, or its policy after `iteration`; or as in
            `find_artifact`.

    Raises:
        UserError: there is no such run, iteration or artifact; what there is is listed.
    """
    nodes = _nodes_in(workdir)
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
    return graph if iteration is None else _policy_after(iteration, what, graph, nodes)


def lineage_in(store: str, what: str, iteration: int | None = None) -> Graph:
    """The graph behind an artifact of a run on a cluster, from the records in its store.

    Args:
        what: a run's ID: then what it made last, or its policy after `iteration`; or the beginning of an artifact's
            sha256.

    Raises:
        UserError: no record of the run, no such artifact; or the store cannot be read.
    """
    records = Records(store)
    if what not in records.runs():
        if iteration is not None or not set(what) <= set("0123456789abcdef"):
            records.of_run(what)  # says which runs there are
        nodes = nodes_of(records.all())
        return trace(nodes, *find_artifact(nodes, what))
    own = records.of_run(what)
    nodes = nodes_of(records.led_to(own))
    last = max((node for node in nodes if node.digest in own), key=lambda node: (node.record.ended, node.digest))
    graph = trace(nodes, last, next(iter(last.record.outputs)))
    return graph if iteration is None else _policy_after(iteration, what, graph, nodes)


def store_of(graph: Graph) -> str:
    """The store that must be open to read a graph's checkpoints, as `stores.opened` takes it: the embedded or none."""
    stores = {node.record.parameters.get("store") for node in graph.nodes}
    return EMBEDDED if f"s3://{BUCKET}" in stores else ""


def _nodes_in(workdir: Workdir) -> list[Node]:
    """All records: where outputs lie beside them, and those whose outputs were taken away since."""
    beside = read_nodes(workdir.artifacts)
    known = {node.digest for node in beside}
    return beside + [node for node in nodes_of(Records(str(workdir.records)).all()) if node.digest not in known]


def _policy_after(iteration: int, run: str, graph: Graph, nodes: Sequence[Node]) -> Graph:
    policies = {node.record.iteration: node for node in graph.nodes if node.record.stage in POLICIES}
    if iteration not in policies:
        raise UserError(f"--iteration {iteration}: run {run!r} has policies after iterations {sorted(policies)}")
    found = policies[iteration]
    return trace(nodes, found, POLICIES[found.record.stage])
