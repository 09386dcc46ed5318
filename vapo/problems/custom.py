"""A grader of the user's own: a function by its dotted path or its file; it is user code, and it runs.

The function gets (response, ground_truth) and returns a bool, a score in [0, 1] or a vapo.problems.grading.Verdict.
It runs in a grading worker, with that worker's limits: no network, no subprocess, no files written.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from vapo.errors import UserError
from vapo.problems.grading import WHYS, Verdict

FORM = 'write "package.module:function" or "path/to/file.py:function"'


@lru_cache(maxsize=1)
def load(path: str) -> Callable[[str, str], Any]:
    """The function that `path` names.

    Raises:
        UserError: no such file or module, no such function, not callable, or the import fails.
    """
    where = f"verification.custom {path!r}"
    place, _, name = path.rpartition(":")
    if not place or not name:
        raise UserError(f"{where}: {FORM}")
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except FileNotFoundError:
        raise UserError(f"{where}: {Path(place).resolve()} is not there: check the path; {FORM}") from None
    except ModuleNotFoundError as error:
        raise UserError(f"{where}: {error}: install it, or run where it can be imported; {FORM}") from None
    except Exception as error:  # noqa: BLE001 - user code may raise anything
        raise UserError(f"{where}: importing it fails: {type(error).__name__}: {error}: mend {place}") from None
    function = getattr(module, name, None)
    if not callable(function):
        found = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise UserError(f"{where}: {place} has no function {name!r}, it has {found[:10]}: {FORM}")
    return function


def ready() -> bool:
    """Nothing but an answer: a worker that gives it has loaded the function."""
    return True


def judge(path: str, response: str, truth: str) -> dict[str, Any] | float:
    """What the user's function says: a score in [0, 1] or a Verdict as a dict.

    Raises:
        TypeError: it returned something else.
        ValueError: a score outside [0, 1], or a Verdict that contradicts itself.
    """
    said = load(path)(response, truth)
    if isinstance(said, Verdict):
        if said.why not in WHYS or said.correct != (said.why == "matched"):
            raise ValueError(f"{path} returned {said}: why must be one of {WHYS}, and matched when it is correct")
        return asdict(said)
    try:
        score = float(said)  # numpy's too
    except (TypeError, ValueError):
        raise TypeError(
            f"{path} returned {type(said).__name__}: return a bool, a score in [0, 1] or a Verdict"
        ) from None
    if isinstance(said, str) or math.isnan(score) or not 0 <= score <= 1:
        raise ValueError(f"{path} returned {said!r}: return a bool, a score in [0, 1] or a Verdict")
    return score


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(path)
    spec = importlib.util.spec_from_file_location(f"vapo_custom_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
