"""Objects against schemas: core kinds strictly by kubernetes-validate, custom kinds by tests/manifests/schemas."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from manifests.render import Object

KEPT = Path(__file__).resolve().parent.parent / "tests" / "manifests" / "schemas"
VERSIONS = ("1.31", "1.37")  # the oldest and the newest Kubernetes that the objects are checked for
QUANTITY = re.compile(r"\+?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?")
QUANTITIES = ("requests", "limits", "hard", "capacity", "resourcesPerNode")  # maps of them


def name_of(thing: Object) -> str:
    """Say "Role vapo-runner"."""
    return f"{thing.get('kind', '?')} {(thing.get('metadata') or {}).get('name', '?')}"


def schema_faults(thing: Object) -> tuple[str, ...]:
    """What the API server would refuse: unknown fields, wrong types, missing fields, numbers that are none."""
    return _faults_of(json.dumps(thing, sort_keys=True))


@functools.cache  # overlays share most of their objects
def _faults_of(text: str) -> tuple[str, ...]:
    thing = json.loads(text)
    return (*_shape_faults(thing), *_quantity_faults(thing, name_of(thing), ""))


def _shape_faults(thing: Object) -> Iterator[str]:
    known = f"{thing.get('apiVersion')}/{thing.get('kind')}"
    if known in kept():
        yield from _custom_faults(thing, known)
    else:
        yield from _core_faults(thing)


def _core_faults(thing: Object) -> Iterator[str]:
    import kubernetes_validate

    for version in VERSIONS:
        try:
            kubernetes_validate.validate(thing, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{name_of(thing)}: {_where(error)}: {error.message} (Kubernetes {version})"
        except kubernetes_validate.SchemaNotFoundError as error:
            yield f"{name_of(thing)}: {error.message}, nor is there one in {KEPT.name}/"


def _custom_faults(thing: Object, known: str) -> Iterator[str]:
    for error in _validator(known).iter_errors(thing):
        yield f"{name_of(thing)}: {_where(error)}: {error.message}"


def _where(error: Any) -> str:
    return ".".join(map(str, error.absolute_path)) or "the object"


@functools.cache
def kept() -> dict[str, Path]:
    """Custom kinds, say "kueue.x-k8s.io/v1beta2/LocalQueue", and the file with their schema."""
    found: dict[str, Path] = {}
    for path in sorted(KEPT.glob("*.json")):
        found |= dict.fromkeys((kind for kind in _read(path) if kind != "$defs"), path)
    return found


@functools.cache
def _read(path: Path) -> dict[str, Any]:
    schemas: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return schemas


@functools.cache
def _validator(known: str) -> Any:
    from jsonschema import Draft202012Validator
    from referencing import Registry, Resource

    schemas = _read(kept()[known])
    folder = files("kubernetes_validate") / "kubernetes-json-schema" / f"v{VERSIONS[-1]}.0-local-strict"
    core = Resource.from_contents(json.loads((folder / "_definitions.json").read_text(encoding="utf-8")))
    return Draft202012Validator({**schemas[known], "$defs": schemas.get("$defs", {})}, registry=core @ Registry())


def _quantity_faults(value: Any, name: str, path: str) -> Iterator[str]:
    """Quantities are strings to the schemas; here they must be numbers, and devices whole ones."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _quantity_faults(item, name, f"{path}.{index}")
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        place = f"{path}.{key}".strip(".")
        if key in QUANTITIES and isinstance(item, dict):
            for resource, amount in item.items():
                if isinstance(amount, str | int | float) and (fault := _amount_fault(resource, amount)):
                    yield f"{name}: {place}.{resource}: {fault}"
        yield from _quantity_faults(item, name, place)


def _amount_fault(resource: str, amount: str | float) -> str:
    if not QUANTITY.fullmatch(str(amount)):
        return f"{amount!r} is no quantity, such as 500m, 2, 64Gi"
    device = "/" in resource and not resource.startswith("count/")
    whole = re.fullmatch(r"\d+(\.0*)?", str(amount))
    return f"{amount!r}: a device is not divided" if device and not whole else ""
