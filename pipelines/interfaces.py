"""Which component runs a stage again: the one in its folder whose inputs and outputs are those that its record has."""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

import components
from vapo.errors import UserError
from vapo.lineage.graph import Node

ARTIFACTS = {
    kind.schema_title: kind for kind in (dsl.Artifact, dsl.Dataset, dsl.HTML, dsl.Markdown, dsl.Metrics, dsl.Model)
}


@cache
def variants() -> Mapping[str, tuple[BaseComponent, ...]]:
    """Stage -> its components: those of components/STAGE/, say ppo_update with and without a critic."""
    found: dict[str, list[BaseComponent]] = {}
    for stage in pkgutil.iter_modules(components.__path__, "components."):
        if not stage.ispkg:
            continue
        for module in pkgutil.iter_modules(importlib.import_module(stage.name).__path__, f"{stage.name}."):
            members = vars(importlib.import_module(module.name)).values()
            of_stage = found.setdefault(stage.name.rpartition(".")[2], [])
            of_stage += [member for member in members if isinstance(member, BaseComponent)]
    return MappingProxyType({stage: tuple(of_stage) for stage, of_stage in found.items()})


def component_of(node: Node) -> BaseComponent:
    """The component that takes what a recorded execution took and makes what it made.

    Raises:
        UserError: there is none: the record was left by another version of vapo.
    """
    record = node.record
    for component in variants().get(record.stage, ()):
        spec = component.component_spec
        taken = {name: given for name, given in (spec.inputs or {}).items() if is_artifact(given)}
        needed = {name for name, given in taken.items() if not given.optional}
        made = {name for name, given in (spec.outputs or {}).items() if is_artifact(given)}
        if needed <= record.inputs.keys() <= taken.keys() and record.outputs.keys() == made:
            return component
    raise UserError(
        f"{node.name} took {sorted(record.inputs)} and made {sorted(record.outputs)} with vapo {record.vapo}, which no "
        f"component of this version does: take that version"
    )


def artifact_class(component: BaseComponent, name: str) -> type[dsl.Artifact]:
    """The class of an artifact that a component takes, say dsl.Dataset."""
    return ARTIFACTS[component.component_spec.inputs[name].type.partition("@")[0]]


def parameters_for(component: BaseComponent, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded values of the parameters that a component takes, which counts iterations within a block."""
    values = {"handed_over": "{}", **recorded}  # digests come with the inputs
    if "iteration" in values:
        values |= {"block_start": values["iteration"], "offset": 0}
    return {name: value for name, value in values.items() if name in (component.component_spec.inputs or {})}


def is_artifact(given: Any) -> bool:
    """Whether an input or output of a component is an artifact rather than a parameter."""
    return str(given.type).partition("@")[0] in ARTIFACTS
