"""Every component is the interface of one stage function, and nothing more.

A name here is a stage's, or stage/variant for another component of that stage (ppo_update/without_critic).
"""

import ast
import importlib
import inspect
import sys
import typing
from collections import Counter
from collections.abc import Mapping
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
PLAIN = [folder.name for folder in FOLDERS]
FILES = sorted(path for folder in FOLDERS for path in folder.glob("*.py"))  # images/ is no stage
VARIANTS = [f"{path.parent.name}/{path.stem}" for path in FILES if path.stem not in ("component", "__init__")]
NAMES = PLAIN + VARIANTS
PYTHON = {"String": str, "Integer": int, "Float": float, "Boolean": bool}
RETURNED = "return float(metrics.metadata['accuracy'])"
ITERATION = "block_start + offset"
UNMEASURED = {"report", "hand_off", "take_over", "next_segment"}  # stages without metrics
OPEN = {"concatenation", "history", "report", "hand_off", "take_over"}  # stages whose function takes **kwargs


def stage_of(name: str) -> str:
    return name.partition("/")[0]


def file_of(name: str) -> Path:
    return ROOT / "components" / stage_of(name) / f"{name.partition('/')[2] or 'component'}.py"


def component(name: str) -> Any:
    module = importlib.import_module(f"components.{stage_of(name)}.{file_of(name).stem}")
    return getattr(module, stage_of(name))


def spec(name: str) -> Any:
    return component(name).component_spec


def stage_function(name: str) -> Any:
    pytest.importorskip("torch")
    stage = STAGES[stage_of(name)]
    return getattr(importlib.import_module(stage.module), stage.function)


def parameters_of(name: str) -> dict[str, type]:
    """A component's parameters with their Python types."""
    found = spec(name).inputs or {}
    return {key: PYTHON[value.type] for key, value in found.items() if "@" not in value.type}


def artifacts_of(name: str) -> dict[str, Any]:
    return {key: value for key, value in (spec(name).inputs or {}).items() if "@" in value.type}


def optional_of(stage: str) -> set[str]:
    """Artifacts that a stage can do without: an optional input, or one that a variant of its component leaves out."""
    variants = [name for name in NAMES if stage_of(name) == stage]
    all_of = [set(artifacts_of(name)) | set(spec(name).outputs) for name in variants]
    optional = {key for name in variants for key, value in artifacts_of(name).items() if value.optional}
    return optional | (set.union(*all_of) - set.intersection(*all_of))


def tree(name: str) -> ast.Module:
    return ast.parse(file_of(name).read_text())


def call_in_body(name: str) -> dict[str, Any]:
    """The one call in a component's body: its stage, section, and names passed as parameters, inputs, outputs."""
    function = next(node for node in tree(name).body if isinstance(node, ast.FunctionDef))
    docstring, imported, statement, *returned = function.body
    # The only parameter that comes out of a stage: the graph may stop at an accuracy.
    assert list(map(ast.unparse, returned)) == ([RETURNED] if name == "evaluation" else [])
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
            # Nothing changes its name on the way; which iteration it is, the graph says in two parts.
            assert all(value == (ITERATION if key == "iteration" else key) for key, value in passed.items()), passed
            found[keyword.arg] = set(passed)
        else:
            found[keyword.arg] = ast.unparse(keyword.value)
    return found


def test_every_stage_has_a_component_and_the_reverse() -> None:
    assert set(PLAIN) == set(STAGES)
    assert VARIANTS == ["ppo_update/without_critic", "take_over/without_critic"]


def test_what_a_stage_can_do_without() -> None:
    of_a_critic = {"critic", "pretraining"}
    found = {name: optional_of(name) for name in PLAIN if name != "history"}
    assert {name: optional for name, optional in found.items() if optional} == {
        "advantages": {"critic"},
        "concatenation": {"previous_rollouts"},
        "hand_off": of_a_critic,
        "take_over": of_a_critic | {f"new_{name}" for name in of_a_critic},
        "ppo_update": {"critic", "new_critic"},
        "report": {"pretraining", "prompts"}
        | {f"{when}_{table}" for when in ("first", "last") for table in ("rollouts", "rewards", "experience")},
        "rollout": {"previous_rollouts", "previous_rewards"},
    }


@pytest.mark.parametrize(
    ("name", "inputs", "outputs"),
    [
        ("ppo_update", {"critic"}, {"new_critic"}),
        ("take_over", {"critic", "pretraining"}, {"new_critic", "new_pretraining"}),
    ],
)
def test_without_critic_is_the_same_minus_the_critic(name: str, inputs: set[str], outputs: set[str]) -> None:
    """In kfp an optional input is possible, an optional output is not: hence a second component of one stage."""
    whole, without = spec(name), spec(f"{name}/without_critic")
    assert without.name == whole.name
    assert without.inputs == {key: value for key, value in whole.inputs.items() if key not in inputs}
    assert without.outputs == {key: value for key, value in whole.outputs.items() if key not in outputs}
    assert inputs <= set(whole.inputs)
    assert outputs <= set(whole.outputs)
    signatures = [inspect.signature(component(each).python_func) for each in (name, f"{name}/without_critic")]
    parameters = [[str(p) for p in signature.parameters.values()] for signature in signatures]
    assert parameters[1] == [text for text in parameters[0] if text.split(":")[0] not in inputs | outputs]


def test_value_pretraining_writes_its_measures_for_the_report() -> None:
    made, shown = spec("value_pretraining").outputs["pretraining"], artifacts_of("report")["pretraining"]
    assert made.type == shown.type == "system.Dataset@0.0.1"


@pytest.mark.parametrize("name", NAMES)
def test_component_is_named_after_its_folder(name: str) -> None:
    assert component(name).name == stage_of(name).replace("_", "-")
    assert component(name).python_func.__name__ == stage_of(name)
    assert call_in_body(name)["stage"] == stage_of(name)


@pytest.mark.parametrize("name", NAMES)
def test_body_passes_on_everything_that_comes_in(name: str) -> None:
    call = call_in_body(name)
    passed = set(call["parameters"])
    if "iteration" in passed:
        passed = passed - {"iteration"} | {"block_start", "offset"}
    if call["section"] == "section":
        passed.add("section")
    else:
        assert stage_of(name) in ("history", "hand_off", "take_over")
        assert call["section"] == "''"
    if "known" in call:
        passed.add(call["known"])
    assert passed == set(parameters_of(name))
    assert call["inputs"] == set(artifacts_of(name))
    assert call["outputs"] == {key for key, found in spec(name).outputs.items() if "@" in found.type}


@pytest.mark.parametrize("name", NAMES)
def test_stage_function_takes_what_the_component_passes(name: str) -> None:
    call, function = call_in_body(name), stage_function(name)
    signature, hints = inspect.signature(function), typing.get_type_hints(function)
    section, *rest = signature.parameters.values()
    assert section.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert hints[section.name] is getattr(recipe, STAGES[stage_of(name)].section)
    left_out = optional_of(stage_of(name)) - call["inputs"] - call["outputs"]
    paths = call["inputs"] | (call["outputs"] - {METRICS}) | left_out
    wanted: dict[str, Any] = dict.fromkeys(paths, Path)
    given = {**parameters_of(name), "iteration": int}
    wanted |= {key: kind for key, kind in given.items() if key in call["parameters"]}
    resumable = {"partial"} if STAGES[stage_of(name)].resumable else set()  # vapo.stage gives it, not the component
    wanted |= dict.fromkeys(resumable, Path)
    if STAGES[stage_of(name)].informed:
        wanted["sources"] = Mapping[str, Mapping[str, str]]
    named = {p.name: p for p in rest if p.kind is inspect.Parameter.KEYWORD_ONLY}
    open_ended = [p for p in rest if p.kind is inspect.Parameter.VAR_KEYWORD]
    assert len(named) + len(open_ended) == len(rest)
    assert bool(open_ended) == (stage_of(name) in OPEN)
    if open_ended:
        assert set(named) <= set(wanted)
        assert hints[open_ended[0].name] is Path
        assert {wanted[key] for key in set(wanted) - set(named)} == {Path}
    else:
        assert set(named) == set(wanted)
    for key, parameter in named.items():
        optional = key in optional_of(stage_of(name)) | resumable
        assert hints[key] == ((wanted[key] | None) if optional else wanted[key]), key
        assert (parameter.default is None) == optional, key
    assert hints["return"] in (dict[str, float], dict[str, float | None])


def test_the_page_asks_for_what_the_report_component_passes() -> None:
    """The stage hands its **kwargs on."""
    from vapo.report.page import report as page

    call = call_in_body("report")
    asked = {p.name: p for p in inspect.signature(page).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert set(asked) == (call["inputs"] - {"policy"}) | {"tokenizer", "page", "recipe"}
    assert {name for name, p in asked.items() if p.default is None} == optional_of("report")
    hints = typing.get_type_hints(page)
    assert all(hints[name] == Path | None for name in optional_of("report"))


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
def test_metrics_are_an_output_of_every_stage_that_measures(name: str) -> None:
    outputs = spec(name).outputs
    metrics = [key for key, value in outputs.items() if value.type.startswith("system.Metrics")]
    assert metrics == ([] if stage_of(name) in UNMEASURED else [METRICS])


def test_history_takes_the_metrics_of_every_stage_that_has_them() -> None:
    inputs = artifacts_of("history")
    metrics = {key for key, value in inputs.items() if value.type.startswith("system.Metrics")}
    assert metrics == set(STAGES) - {"concatenation", "history"} - UNMEASURED
    assert set(inputs) - metrics == {"previous"}
    assert all(value.optional for value in inputs.values())


@pytest.mark.parametrize("name", NAMES)
def test_what_draws_random_numbers_has_the_seed_in_its_cache_key(name: str) -> None:
    drawing = {"problems", "base_model", "rollout", "value_pretraining", "ppo_update", "evaluation"}
    assert ("seed" in parameters_of(name)) == (stage_of(name) in drawing)


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
