"""A lineage as lines that a terminal shows: every stage with its inputs and who made them, the last one first."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from vapo.lineage.graph import Graph, Node

DIGITS = 12  # of a sha256: what `vapo lineage` takes back


def lines(graph: Graph) -> Iterator[str]:
    """The artifact, then every stage that led to it."""
    yield f"{graph.target} {graph.sha256[:DIGITS]}: {len(graph.nodes)} stages led to it"
    for number, node in enumerate(graph.nodes, start=1):
        yield f"{number:4d} {node.name}"
        yield f"       {_facts(node)}"
        for name, source in sorted(node.record.inputs.items()):
            maker = graph.number_of(source.record)
            made_by = "no record" if maker is None else f"{maker} {graph.nodes[maker - 1].name}"
            yield f"       <- {name} {source.sha256[:DIGITS]} from {made_by}"
        for name, output in sorted(node.record.outputs.items()):
            rows = "" if output.rows is None else f", {output.rows} rows"
            yield f"       -> {name} {output.sha256[:DIGITS]} ({output.bytes} bytes{rows})"


def _facts(node: Node) -> str:
    r = node.record
    when = datetime.fromtimestamp(r.started, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    source = f"vapo {r.vapo}" + (
        f" {r.commit[:DIGITS]}{'-dirty' if r.commit.endswith('-dirty') else ''}" if r.commit else ""
    )
    parts = [
        *([f"seed {r.seed}"] if r.seed is not None else []),
        f"section {r.section_sha256[:DIGITS]}",
        source,
        *([r.image] if r.image else []),
        f"{when}, {r.seconds:.1f} s",
    ]
    return " · ".join(parts)
