"""reasoning-gym's own scorers, with what some of them would do to a model's text taken away; in a grading worker alone.

Nine families' scorers hand the answer to Python's eval, four of them directly and five through sympy.parse_expr: here
the first read literals only, and the second text without names, attributes or strings that reach beyond algebra.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import keyword
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

SCORED = 1.0 - 1e-9
NONSENSE = "∅ no answer ∅"
READS_LITERALS = (  # modules whose scorers call eval on the answer
    "reasoning_gym.algorithmic.binary_matrix",
    "reasoning_gym.algorithmic.number_sorting",
    "reasoning_gym.algorithmic.spiral_matrix",
    "reasoning_gym.algorithmic.string_insertion",
    "reasoning_gym.games.n_queens",
)
READS_ALGEBRA = (  # modules whose scorers call sympy's parse_expr, which is eval too, by a name of their own
    "reasoning_gym.games.countdown",
    "reasoning_gym.games.puzzle24",
)
FUNCTIONS = frozenset(
    re.findall(
        r"\w+", "sin cos tan sec csc cot asin acos atan sinh cosh tanh asinh acosh atanh exp log ln sqrt Abs pi E I"
    )
)
ALGEBRA = re.compile(r"[A-Za-z0-9_\s.+\-*/^(),=]*")
REACHES_OUT = re.compile(r"__|\.\s*[A-Za-z_]|[A-Za-z_)]\s*\.")
NAME = re.compile(r"[A-Za-z_]\w*")


def prepare(scorers: list[list[str]]) -> None:
    """Import reasoning-gym, seal it and make the scorers that will be asked, before workers are forked."""
    _seal()
    for dataset, config in scorers:
        try:
            _scorer(dataset, config)
        except Exception:  # noqa: BLE001 - `check` says which row has it, and what is wrong
            continue


def check(truth: str) -> str:
    """What is wrong with a ground truth, or "": its scorer must be there and find the entry's own answer right."""
    _seal()
    try:
        found = json.loads(truth)
        score = _scorer(*_named(found))
    except Exception as error:  # noqa: BLE001 - a foreign constructor may raise anything
        return f"names no scorer of reasoning-gym ({type(error).__name__}: {error})"
    own = found["entry"].get("answer")
    if own is None:  # a puzzle with many solutions and none written down
        return ""
    scores = [_score(score, own, entry) for entry in _readings(found["entry"])]
    return "" if max(scores) >= SCORED else f"has answer {str(own)[:80]!r}, which its own scorer gives {max(scores)}"


def judge(truth: str, answer: str) -> float | str:
    """The scorer's score in [0, 1] for an answer, or "unparseable" if it cannot read it.

    A scorer that finds nonsense right (game_of_life_halting compares bool(answer) with bool(text)) is not asked: then
    the answer must be the entry's own.
    """
    _seal()
    found = json.loads(truth)
    score, entry = _scorer(*_named(found)), _entry(truth)
    own = entry.get("answer")
    if _score(score, NONSENSE, entry) >= SCORED:
        return float(isinstance(own, str) and answer.strip().casefold() == own.strip().casefold())
    try:
        return min(max(float(score(answer, entry)), 0.0), 1.0)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - the entry is sound (see check), so it is the answer that it cannot read
        return "unparseable"


@lru_cache(maxsize=256)
def _entry(truth: str) -> dict[str, Any]:
    """The entry as its scorer reads it."""
    found = json.loads(truth)
    score = _scorer(*_named(found))
    readings = _readings(found["entry"])
    return max(readings, key=lambda entry: _score(score, entry.get("answer"), entry))


def _readings(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The entry as JSON has it, and with tuples for lists: JSON knows none, and arc's boards are tuples."""
    return [entry, {**entry, "metadata": _tuples(entry.get("metadata"))}]


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(v) for key, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _score(score: Callable[[Any, Any], float], answer: Any, entry: dict[str, Any]) -> float:
    try:
        return float(score(answer, entry))
    except Exception:  # noqa: BLE001 - a foreign scorer may raise anything at a text it cannot read
        return 0.0


def _named(found: dict[str, Any]) -> tuple[str, str]:
    return found["dataset"], json.dumps(found.get("config", {}), sort_keys=True)


@lru_cache(maxsize=256)
def _scorer(dataset: str, config: str) -> Callable[[Any, Any], float]:
    reasoning_gym = importlib.import_module("reasoning_gym")
    return reasoning_gym.create_dataset(dataset, **json.loads(config)).score_answer


@lru_cache(maxsize=1)
def _seal() -> None:
    """Take eval away from what reads answers, in this process."""
    for name in READS_LITERALS:
        vars(importlib.import_module(name))["eval"] = ast.literal_eval
    for name in READS_ALGEBRA:
        vars(importlib.import_module(name))["parse_expr"] = _parse_expr
    vars(importlib.import_module("sympy"))["parse_expr"] = _parse_expr


def _parse_expr(text: str, local_dict: dict[str, Any] | None = None, **options: Any) -> Any:
    """sympy's parse_expr for algebra alone.

    Raises:
        ValueError: the text holds more than numbers, unknowns and well-known functions.
    """
    sympy = importlib.import_module("sympy")
    if not ALGEBRA.fullmatch(text) or REACHES_OUT.search(text):
        raise ValueError("more than algebra")
    for name in set(NAME.findall(text)) - FUNCTIONS - set(local_dict or {}):
        if keyword.iskeyword(name) or hasattr(sympy, name) or hasattr(builtins, name):
            raise ValueError(f"{name} is no unknown and no function of algebra")
    return importlib.import_module("sympy.parsing.sympy_parser").parse_expr(text, local_dict=local_dict, **options)
