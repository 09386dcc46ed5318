"""A pipeline whose inputs and outputs are data: kfp reads both from a function's signature, which is made here."""

import inspect
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Any, NamedTuple

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

Types = Mapping[str, Any]  # name -> kfp's annotation, or (annotation, default)


def pipeline_of(
    build: Callable[..., Mapping[str, Any]], name: str, description: str, takes: Types, gives: Types
) -> BaseComponent:
    """The pipeline whose tasks `build` makes.

    Whether there is a critic, or an evaluation, changes what comes in and goes out. As `def` statements that would be
    a copy of the pipeline for each.

    Args:
        build: is called with every input by its name and returns every output by its name.
        takes: the inputs.
        gives: the outputs.
    """

    def body(*values: Any) -> Any:
        found = build(**dict(zip(takes, values, strict=True)))
        return outputs(**found) if gives else None

    outputs = NamedTuple("Outputs", list(gives.items()))  # type: ignore[misc]
    body.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [_parameter(key, found) for key, found in takes.items()], return_annotation=outputs if gives else None
    )
    made: BaseComponent = dsl.pipeline(name=name, description=description)(body)
    return made


def _parameter(name: str, found: Any) -> Parameter:
    annotation, default = found if isinstance(found, tuple) else (found, Parameter.empty)
    return Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation, default=default)
