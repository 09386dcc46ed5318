"""Run-time parameters as the command line gives them, in the types that a pipeline asks for."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from vapo.errors import UserError

OF_THE_RECIPE = ("store", "seed", "wanted_groups", "target_accuracy", "recipe_json")
OF_THE_CHAIN = ("chain", "submission", "handed_over")
TYPES: dict[str, type | tuple[type, ...]] = {  # of parameters, as JSON has them
    "NUMBER_INTEGER": int,
    "NUMBER_DOUBLE": (int, float),
    "BOOLEAN": bool,
    "LIST": list,
    "STRUCT": dict,
}


def arguments_of(ir: str, given: Mapping[str, str], *, later: bool = False) -> dict[str, Any]:
    """Run-time parameters in the types that the pipeline asks for.

    Args:
        later: a later segment, which has fewer stages than the first: parameters of those are left out.

    Raises:
        UserError: it has no such parameter, the recipe sets it, or the text is no value of its type.
    """
    spec = next(iter(yaml.load_all(ir, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))))
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    free = sorted(name for name in parameters if not _said_elsewhere(name))
    found: dict[str, Any] = {}
    for name, text in given.items():
        if name not in parameters:
            if later:
                continue
            raise UserError(f"--param {name}={text}: the pipeline has no such parameter: there are {free}")
        if name not in free:
            raise UserError(f"--param {name}: the recipe says it: use --set section.key=value")
        found[name] = _typed(name, text, parameters[name]["parameterType"])
    return found


def parsed(texts: Iterable[str]) -> dict[str, str]:
    """`name=value` texts as a dictionary."""
    pairs = {}
    for text in texts:
        name, equal, value = text.partition("=")
        if not equal or not name.strip():
            raise UserError(f"--param {text}: write --param name=value, say --param rollout_memory=128Gi")
        pairs[name.strip()] = value.strip()
    return pairs


def _said_elsewhere(name: str) -> bool:
    return name in (*OF_THE_RECIPE, *OF_THE_CHAIN) or name.endswith(("_section", "_uri"))


def _typed(name: str, text: str, kind: str) -> Any:
    if kind == "STRING":
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "BOOLEAN"):
        raise UserError(f"--param {name}={text}: it must be a {kind.lower().replace('_', ' ')}")
    return value
