"""docs/algorithm.md names keys, functions and tests that exist, and a test for every point."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from vapo.recipe import Recipe, Section, available_recipes

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
NAMES = set(re.findall(r"`([^`]+)`", PAGE))
TESTS = {
    node.name
    for path in (ROOT / "tests").rglob("test_*.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef)
}
FIELDS = {name: field.annotation for name, field in Recipe.model_fields.items()}


def sections() -> dict[str, type[Section]]:
    return {n: kind for n, kind in FIELDS.items() if isinstance(kind, type) and issubclass(kind, Section)}


def test_every_key_is_the_recipes() -> None:
    keys = {name for name in NAMES if re.fullmatch(r"[a-z_]+\.[a-z_]+", name) and name.split(".")[0] in FIELDS}
    assert len(keys) > 25
    for key in keys:
        section, name = key.split(".")
        assert name in sections()[section].model_fields, key


def test_every_function_is_where_it_is_said_to_be() -> None:
    places = [name.split(": ") for name in NAMES if re.fullmatch(r"vapo/\S+\.py: \w+", name)]
    assert len(places) > 15
    for path, function in places:
        found = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
        assert function in {n.name for n in found if isinstance(n, ast.FunctionDef)}, (path, function)


def test_every_test_is_there() -> None:
    named = {name for name in NAMES if re.fullmatch(r"test_\w+", name)}
    assert len(named) > 40
    assert named <= TESTS


@pytest.mark.parametrize("point", range(1, 21))
def test_every_point_has_its_tests_on_the_page(point: int) -> None:
    own = {name for name in TESTS if name.startswith(f"test_point_{point:02d}_")}
    assert own
    assert own <= NAMES


def test_every_recipe_of_the_ablation_is_shipped() -> None:
    assert {"ppo", "vc_ppo", "grpo", "dapo"} <= NAMES & set(available_recipes())
    assert sum(name.startswith("vapo_without_") for name in available_recipes()) == 7


def test_no_algorithm_is_known_by_name_below_the_recipe() -> None:
    """One code path: nothing in vapo, components or pipelines compares or looks up a recipe's name."""
    algorithms = {
        name for name in available_recipes() if name not in {"tiny", "demo", "vapo"}
    }  # the last is the package, too
    sources = [path for folder in ("vapo", "components", "pipelines") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 50
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = [*node.comparators, node.left] if isinstance(node, ast.Compare) else []
            parts += node.keys if isinstance(node, ast.Dict) else []
            leaves = [leaf for part in parts if part is not None for leaf in ast.walk(part)]
            assert not [leaf for leaf in leaves if isinstance(leaf, ast.Constant) and leaf.value in algorithms], path
