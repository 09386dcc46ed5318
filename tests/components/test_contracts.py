"""Every component is the interface of one stage function, and nothing more."""

import ast
import importlib
import inspect
import sys
import typing
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl, local

from components.image import IMAGE
from tests.running import ROOT, events_in
from vapo import recipe
from vapo.recipe import Problems
from vapo.stage import METRICS, STAGES

FOLDERS = sorted(path.parent for path in (ROOT / "components").glob("*/component.py"))
NAMES = [folder.name for folder in FOLDERS]
PYTHON = {"String": str, "Integer": int, "Float": float, "Boolean": bool}
OPEN = {"history", "report"}  # stages whose function takes **kwargs


def component(name: str) -> Any:
    return getattr(importlib.import_module(f"components.{name}.component"), name)


def spec(name: str) -> Any:
    return component(name).component_spec


def stage_function(name: str) -> Any:
    pytest.importorskip("torch")
    stage = STAGES[name]
    return getattr(importlib.import_module(stage.module), stage.function)


def parameters_of(name: str) -> dict[str, type]:
    """A component's parameters with their Python types."""
    found = spec(name).inputs or {}
    return {key: PYTHON[value.type] for key, value in found.items() if "@" not in value.type}


def artifacts_of(name: str) -> dict[str, Any]:
    return {key: value for key, value in (spec(name).inputs or {}).items() if "@" in value.type}


def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / "components" / name / "component.py").read_text())


def call_in_body(name: str) -> dict[str, Any]:
    """The one call in a component's body: its stage, section, and names passed as parameters, inputs, outputs."""
    function = next(node for node in tree(name).body if isinstance(node, ast.FunctionDef))
    docstring, imported, statement = function.body
    assert isinstance(docstring.value, ast.Constant)
    assert ast.unparse(imported) == "from vapo.stage import run"
    call = statement.value
    assert isinstance(call, ast.Call)
    assert ast.unparse(call.func) == "run"
    found: dict[str, Any] = {"stage": ast.literal_eval(call.args[0])}
    for keyword in call.keywords:
        if isinstance(keyword.value, ast.Dict):
            keys, values = map(ast.literal_eval, keyword.value.keys), map(ast.unparse, keyword.value.values)
            passed = dict(zip(keys, values, strict=True))
            assert all(key == value for key, value in passed.items()), passed  # nothing changes its name on the way
            found[keyword.arg] = set(passed)
        else:
            found[keyword.arg] = ast.unparse(keyword.value)
    return found


def test_every_stage_has_a_component_and_the_reverse() -> None:
    assert set(NAMES) == set(STAGES)


@pytest.mark.parametrize("name", NAMES)
def test_component_is_named_after_its_folder(name: str) -> None:
    assert component(name).name == name.replace("_", "-")
    assert component(name).python_func.__name__ == name
    assert call_in_body(name)["stage"] == name


@pytest.mark.parametrize("name", NAMES)
def test_body_passes_on_everything_that_comes_in(name: str) -> None:
    call = call_in_body(name)
    passed = set(call["parameters"])
    if call["section"] == "section":
        passed.add("section")
    else:
        assert (name, call["section"]) == ("history", "''")
    assert passed == set(parameters_of(name))
    assert call["inputs"] == set(artifacts_of(name))
    assert call["outputs"] == set(spec(name).outputs)


@pytest.mark.parametrize("name", NAMES)
def test_stage_function_takes_what_the_component_passes(name: str) -> None:
    call, function = call_in_body(name), stage_function(name)
    signature, hints = inspect.signature(function), typing.get_type_hints(function)
    section, *rest = signature.parameters.values()
    assert section.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert hints[section.name] is getattr(recipe, STAGES[name].section)
    paths = call["inputs"] | (call["outputs"] - {METRICS})
    wanted: dict[str, Any] = dict.fromkeys(paths, Path)
    wanted |= {key: kind for key, kind in parameters_of(name).items() if key in call["parameters"]}
    named = {p.name: p for p in rest if p.kind is inspect.Parameter.KEYWORD_ONLY}
    open_ended = [p for p in rest if p.kind is inspect.Parameter.VAR_KEYWORD]
    assert len(named) + len(open_ended) == len(rest)
    assert bool(open_ended) == (name in OPEN)
    if open_ended:
        assert set(named) <= set(wanted)
        assert hints[open_ended[0].name] is Path
        assert {wanted[key] for key in set(wanted) - set(named)} == {Path}
    else:
        assert set(named) == set(wanted)
    for key, parameter in named.items():
        optional = key in artifacts_of(name) and artifacts_of(name)[key].optional
        assert hints[key] == ((wanted[key] | None) if optional else wanted[key]), key
        assert (parameter.default is None) == optional, key
    assert hints["return"] in (dict[str, float], dict[str, float | None])


def test_the_page_asks_for_what_the_report_component_passes() -> None:
    """The stage hands its **kwargs on."""
    from vapo.report.page import report as page

    call = call_in_body("report")
    asked = {p.name for p in inspect.signature(page).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert asked == (call["inputs"] - {"policy"}) | {"tokenizer", "page", "recipe"}


@pytest.mark.parametrize("name", NAMES)
def test_image_is_ours_and_nothing_is_installed_at_run_time(name: str) -> None:
    container = spec(name).implementation.container
    assert container.image == IMAGE
    command = " ".join([*container.command, *container.args])
    assert "pip" not in command.replace("pipeline", "")
    decorator = next(node for node in tree(name).body if isinstance(node, ast.FunctionDef)).decorator_list[0]
    assert ast.unparse(decorator) == "dsl.component(base_image=IMAGE, install_kfp_package=False)"


def test_image_is_one_that_the_subprocess_runner_takes() -> None:
    assert "python" in IMAGE


@pytest.mark.parametrize("name", NAMES)
def test_module_level_imports_kfp_and_the_standard_library(name: str) -> None:
    for node in tree(name).body:
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules = [node.module or ""]
        else:
            continue
        for module in modules:
            known = module.split(".")[0] in sys.stdlib_module_names | {"kfp"}
            assert known or module == "components.image", module


def test_the_image_name_needs_no_import() -> None:
    body = ast.parse((ROOT / "components" / "image.py").read_text()).body
    assert not [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_an_output_of_every_stage_but_the_report(name: str) -> None:
    outputs = spec(name).outputs
    metrics = [key for key, value in outputs.items() if value.type.startswith("system.Metrics")]
    assert metrics == ([] if name == "report" else [METRICS])


def test_history_takes_the_metrics_of_every_stage_that_has_them() -> None:
    inputs = artifacts_of("history")
    metrics = {key for key, value in inputs.items() if value.type.startswith("system.Metrics")}
    assert metrics == set(STAGES) - {"history", "report"}
    assert set(inputs) - metrics == {"previous"}
    assert all(value.optional for value in inputs.values())


@pytest.mark.parametrize("name", NAMES)
def test_what_draws_random_numbers_has_the_seed_in_its_cache_key(name: str) -> None:
    drawing = {"problems", "base_model", "rollout", "value_pretraining", "ppo_update"}
    assert ("seed" in parameters_of(name)) == (name in drawing)


def test_a_task_with_metrics_is_served_from_the_cache(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    problems = component("problems")

    @dsl.pipeline(name="one-task")
    def one_task(section: str, seed: int):
        problems(section=section, seed=seed)

    def run(seed: int) -> Counter[str]:
        local.init(
            runner=local.SubprocessRunner(use_venv=False),
            pipeline_root=str(tmp_path / "artifacts"),
            enable_caching=True,
            cache_root=str(tmp_path / "cache"),
        )
        section = Problems(train=8, heldout=4, examples=2, min_steps=3, max_steps=4)
        one_task(section=section.model_dump_json(), seed=seed)
        return Counter(event["stage"] for event in events_in(capfd.readouterr().out) if event["vapo"] == "end")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("TMPDIR", str(tmp_path))
        patch.setattr(local.config.LocalExecutionConfig, "instance", None)
        assert run(seed=1) == Counter(problems=1)
        assert run(seed=1) == Counter()
        assert run(seed=2) == Counter(problems=1)
