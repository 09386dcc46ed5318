"""A flat pipeline that executes recorded tasks again: importers bring what they took, components do what they did."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from pipelines.choosing import shards_of
from pipelines.interfaces import artifact_class, component_of, parameters_for
from pipelines.sampling import shared
from pipelines.signature import pipeline_of
from vapo.errors import UserError
from vapo.lineage.graph import Node

DIGITS = 8  # of a sha256 in a parameter's name


@dataclass(frozen=True)
class Again:
    """A recorded execution, and the section and parameters that it is repeated with."""

    node: Node
    section: dict[str, Any]
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Given:
    """An artifact that comes from outside: who made it (None: no record tells), as which output, and what it must be.

    `uri` is where it lay for the stage that took it.
    """

    maker: Node | None
    output: str
    sha256: str
    record: str
    uri: str

    @property
    def parameter(self) -> str:
        """The name of the pipeline's parameter that says where it lies now, say "rollouts_2f32dc37_596b56f6"."""
        return f"{self.output}_{self.sha256[:DIGITS]}_{self.record[:DIGITS] or 'unknown'}"

    def __str__(self) -> str:
        """As messages name it, say "rollouts of rollout of iteration 3"."""
        return f"{self.output} of {self.maker.name}" if self.maker else f"{self.output} ({self.uri})"


@dataclass(frozen=True)
class Redoing:
    """A pipeline, what each of its tasks repeats, and the artifacts that it imports."""

    pipeline: BaseComponent
    tasks: dict[str, Again]  # by the task's name in the pipeline, but for shards: their concatenation's record says
    given: tuple[Given, ...]


def redoing(
    name: str,
    again: Sequence[Again],
    nodes: Sequence[Node],
    place_of: Callable[[Given], str],
    *,
    linked: bool,
    anew: Collection[str] = (),
) -> Redoing:
    """The pipeline of these executions.

    An importer carries the digests of what it brings, so that every stage verifies what it reads, and the records of
    the new tasks lead to those of the old ones. A concatenation comes after a loop that samples its shards.

    Args:
        name: of the pipeline: a cluster's cache is per name.
        again: what was made first first; with a concatenation its shards.
        nodes: all records there are.
        place_of: where an artifact lies now: the default of the parameter of its importer.
        linked: a task takes what the tasks before it make; False: every task but a concatenation takes what was
            recorded.
        anew: digests of records whose tasks no cache may serve.

    Raises:
        UserError: a record of a shard, or the component that made something, is gone.
    """
    looped = {digest for task in again for digest in shards_of(task.node)}
    inside = {task.node.digest for task in again} if linked else looped
    by_digest = {node.digest: node for node in nodes}
    repeated = {task.node.digest: task for task in again}
    for task in again:
        if not repeated.keys() >= set(shards_of(task.node)):
            raise UserError(
                f"{task.node.name}: the record of one of its shards is gone: do it again by 'vapo run' or "
                "'vapo submit', where the cache serves what stays the same"
            )
    given: dict[str, Given] = {}
    for task in again:
        for label, source in task.node.record.inputs.items():
            if source.record not in inside:
                found = _given(label, source, by_digest.get(source.record))
                given[found.parameter] = found
    tasks: dict[str, Again] = {}

    def redo(**where: Any) -> dict[str, Any]:
        made: dict[str, Any] = {}  # by record: the new task in its place
        brought: dict[str, Any] = {}  # by parameter: the importer
        for task in again:
            if task.node.digest in looped:
                continue
            shards = [repeated[digest] for digest in shards_of(task.node)]
            first = shards[0] if shards else task  # shards differ in their number alone
            component = component_of(first.node)
            inputs = {}
            for label, source in first.node.record.inputs.items():
                maker = by_digest.get(source.record)
                if maker and source.record in inside:
                    inputs[label] = made[source.record].outputs[_output(maker, source)]
                    continue
                parameter = _given(label, source, maker).parameter
                if parameter not in brought:
                    facts = {"sha256": source.sha256, "record": source.record}
                    kind = artifact_class(component, label)
                    brought[parameter] = dsl.importer(where[parameter], kind, metadata=facts)
                inputs[label] = brought[parameter].output
            values = {**first.parameters, "section": json.dumps(first.section, separators=(",", ":"))}
            if "store" in values:
                values["store"] = where["store"]
            values = parameters_for(component, values)
            if shards:
                common = {name: value for name, value in values.items() if name not in ("shard", "shards")}
                part, done = shared(len(shards), **common, **inputs)
                part.set_caching_options(enable_caching=first.node.digest not in anew)
            else:
                done = component(**values, **inputs)
            done.set_caching_options(enable_caching=task.node.digest not in anew)
            made[task.node.digest] = done
            tasks[done.name] = task
        return {}

    takes = {"store": str, **{key: (str, place_of(found)) for key, found in sorted(given.items())}}
    pipeline = pipeline_of(redo, name, "Recorded tasks, executed again", takes, {})
    return Redoing(pipeline, tasks, tuple(given.values()))


def _given(label: str, source: Any, maker: Node | None) -> Given:
    output = _output(maker, source) if maker else label
    return Given(maker, output, source.sha256, source.record, source.uri or source.path)


def _output(maker: Node, source: Any) -> str:
    """Which output of a task an input was: the one of that content, and of that name where there are several."""
    same = [name for name, output in maker.record.outputs.items() if output.sha256 == source.sha256]
    if not same:
        raise UserError(f"{maker.name} made nothing with the sha256 {source.sha256[:12]} that its record is named for")
    named = [name for name in same if source.uri.rstrip("/").endswith(f"/{name}")]
    return (named or same)[0]
