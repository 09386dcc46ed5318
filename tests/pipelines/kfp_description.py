"""The published description of the v2beta1 API: operations and schemas, read out of kfp-server-api.

It ships no OpenAPI file, but code that was generated from it and is nothing else: the operations' paths, parameters and
types stand in the API classes, the schemas in the models' `openapi_types` and `attribute_map`.
"""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from kfp_server_api import api, models

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")
PRIMITIVES = {"str": str, "int": int, "bool": bool, "float": (int, float)}


@dataclass(frozen=True)
class Operation:
    """One path and method."""

    name: str  # say "run_service_get_run"
    method: str
    path: str  # say "/apis/v2beta1/runs/{run_id}"
    query: dict[str, str]  # parameter -> type
    body: str  # type, or empty
    file: str  # name of the uploaded file's field, or empty
    response: str

    def matches(self, method: str, path: str) -> dict[str, str] | None:
        """The path's parameters, if this is its operation."""
        pattern = re.sub(
            r"\\{([\w.]+)\\}", lambda name: f"(?P<{name[1].replace('.', '_')}>[^/:]+)", re.escape(self.path)
        )
        found = re.fullmatch(pattern, path)
        return found.groupdict() if found and method == self.method else None


@cache
def operations() -> tuple[Operation, ...]:
    """Everything that the server can be asked."""
    found = []
    for _, service in inspect.getmembers(api, inspect.isclass):
        for name, function in inspect.getmembers(service, inspect.isfunction):
            if name.endswith("_with_http_info"):
                found.append(_operation(name.removesuffix("_with_http_info"), inspect.getsource(function)))
    return tuple(found)


def _operation(name: str, source: str) -> Operation:
    path, method = re.search(r"'(/apis/[^']*)', '([A-Z]+)'", source).groups()
    types = dict(re.findall(r":type (\w+): (\S+)", source))
    body = re.search(r"body_params = local_var_params\['(\w+)'\]", source)
    file = re.search(r"local_var_files\['(\w+)'\]", source)
    return Operation(
        name,
        method,
        path,
        {
            wire: types[python]
            for python, wire in re.findall(
                r"local_var_params\['(\w+)'\][^\n]*\n\s+query_params.append\(\('([\w.]+)'", source
            )
        },
        types[body[1]] if body else "",
        file[1] if file else "",
        re.search(r"response_type='([^']+)'", source)[1],
    )


def find(method: str, path: str) -> tuple[Operation, dict[str, str]] | None:
    """The operation of a request, and its path's parameters."""
    for operation in operations():
        if (parameters := operation.matches(method, path)) is not None:
            return operation, parameters
    return None


def faults(value: Any, kind: str, where: str) -> list[str]:
    """What is wrong with a JSON value of a type: nothing is coerced, and no unknown field is let through."""
    if kind == "object":
        return []
    if inner := re.fullmatch(r"list\[(.*)\]", kind):
        if not isinstance(value, list):
            return [f"{where} is no list: {value!r}"]
        return [fault for i, item in enumerate(value) for fault in faults(item, inner[1], f"{where}[{i}]")]
    if inner := re.fullmatch(r"dict\(str, (.*)\)", kind):
        if not isinstance(value, dict):
            return [f"{where} is no object: {value!r}"]
        return [fault for key, item in value.items() for fault in faults(item, inner[1], f"{where}.{key}")]
    if kind == "datetime":
        fits = isinstance(value, str) and TIME.fullmatch(value)
        return [] if fits else [f"{where} is no time: {value!r}"]
    if kind in PRIMITIVES:
        fits = isinstance(value, PRIMITIVES[kind]) and (kind == "bool" or not isinstance(value, bool))
        return [] if fits else [f"{where} is no {kind}: {value!r}"]
    model = getattr(models, kind)
    if allowed := getattr(model, "allowable_values", None):
        return [] if value in allowed else [f"{where} is none of {allowed}: {value!r}"]
    if not isinstance(value, dict):
        return [f"{where} is no {kind}: {value!r}"]
    types = {wire: model.openapi_types[name] for name, wire in model.attribute_map.items()}
    found = [f"{where}.{key}: {kind} has no such field" for key in value if key not in types]
    return found + [
        fault for key, item in value.items() if key in types for fault in faults(item, types[key], f"{where}.{key}")
    ]


def query_faults(operation: Operation, given: dict[str, str]) -> list[str]:
    """What is wrong with a request's query."""
    found = [f"{operation.name} takes no {name!r}" for name in given if name not in operation.query]
    found += [
        f"{operation.name}: {name} is no int: {value!r}"
        for name, value in given.items()
        if operation.query.get(name) == "int" and not value.isdigit()
    ]
    if "filter" in given:
        found += faults(json.loads(given["filter"]), "V2beta1Filter", "filter")
    return found
