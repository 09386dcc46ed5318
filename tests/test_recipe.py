"""The recipe: the paper's defaults, faults named with their cure, and nothing heavy imported to read one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from vapo import recipe
from vapo.errors import UserError
from vapo.recipe import Recipe, available_recipes, find_recipe, load_recipe, override, parse_recipe, read_resolved

ROOT = Path(__file__).parent.parent
SMALLEST: dict[str, Any] = {"problems": {"examples": 10}}


def fault(data: dict[str, Any]) -> str:
    """The one line that refuses `data`."""
    with pytest.raises(UserError) as error:
        parse_recipe(data, "test")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_recipes_are_shipped() -> None:
    assert {"demo", "tiny"} <= set(available_recipes())


@pytest.mark.parametrize("name", available_recipes())
def test_shipped_recipes_load(name: str) -> None:
    found = load_recipe(name)
    assert found.name == name
    assert load_recipe(str(find_recipe(name))) == found


def test_defaults_are_the_papers() -> None:
    """VAPO (arXiv 2504.05118) section 5; evaluation as in AIME 2024's column."""
    found = Recipe.model_validate(SMALLEST)
    assert (found.ppo_update.clip_low, found.ppo_update.clip_high) == (0.2, 0.28)
    assert found.ppo_update.positive_lm_coef == 0.1
    assert found.ppo_update.loss_aggregation == "token"
    assert (found.ppo_update.actor_lr, found.ppo_update.critic_lr) == (1e-6, 2e-6)
    assert (found.ppo_update.mini_batch, found.ppo_update.epochs) == (512, 1)
    assert found.ppo_update.value_clip is None
    assert (found.rollout.prompts, found.rollout.samples) == (512, 16)
    assert (found.rollout.temperature, found.rollout.top_p) == (1.0, 1.0)
    assert (found.advantages.lambda_critic, found.advantages.alpha) == (1.0, 0.05)
    assert found.advantages.lambda_policy == "length_adaptive"
    assert found.advantages.whiten is False
    assert (found.value_pretraining.steps, found.value_pretraining.lr) == (50, 2e-6)
    assert found.value_pretraining.init == "reward_model"
    assert (found.evaluation.samples, found.evaluation.temperature, found.evaluation.top_p) == (32, 1.0, 0.7)
    assert (found.verification.reward_correct, found.verification.reward_wrong) == (1.0, -1.0)


def test_frozen() -> None:
    found = load_recipe("tiny")
    with pytest.raises(ValidationError, match="frozen"):
        found.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        found.rollout.samples = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", available_recipes())
def test_json_round_trip(name: str, tmp_path: Path) -> None:
    found = load_recipe(name)
    (tmp_path / "recipe.json").write_text(found.model_dump_json())
    assert read_resolved(tmp_path / "recipe.json") == found
    for section, kind in Recipe.model_fields.items():
        if isinstance(kind.annotation, type) and issubclass(kind.annotation, recipe.Section):
            part = getattr(found, section)
            assert kind.annotation.model_validate_json(part.model_dump_json()) == part


@pytest.mark.parametrize("content", ["", "{", "\xff"])
def test_a_damaged_resolved_recipe(tmp_path: Path, content: str) -> None:
    (tmp_path / "recipe.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"cannot read .*recipe\.json"):
        read_resolved(tmp_path / "recipe.json")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"ppo_update": {"clip_hihg": 0.3}}, "unknown key 'ppo_update.clip_hihg': did you mean 'clip_high'?"),
        ({"rolout": {}}, "unknown key 'rolout': did you mean 'rollout'?"),
        ({"advantages": {"lamda_policy": 0.9}}, "did you mean 'lambda_policy'?"),
        ({"advantages": {"zzz": 0.9}}, "known keys: alpha, lambda_critic, lambda_policy, token_budget, whiten"),
    ],
)
def test_a_misspelt_key(data: dict[str, Any], said: str) -> None:
    assert said in fault(SMALLEST | data)


@pytest.mark.parametrize(
    ("section", "settings", "said"),
    [
        ("problems", {"source": "file"}, "problems.path is empty"),
        ("problems", {"source": "file", "path": "x", "examples": 5}, "set it to 0"),
        ("problems", {"examples": 9, "min_steps": 9, "max_steps": 8}, "min_steps 9 is above problems.max_steps 8"),
        ("problems", {"source": "file", "path": "x"}, "base_model.path is empty: give the folder"),
        ("problems", {"examples": 0}, "set problems.examples"),
        ("problems", {"examples": 9, "train": 511}, "rollout.prompts 512 is above problems.train 511"),
        ("base_model", {"hidden_size": 30, "heads": 4}, "choose a multiple of 2 x heads (8)"),
        ("base_model", {"hidden_size": 12, "heads": 4}, "choose a multiple of 2 x heads (8)"),  # 3 per head: odd
        ("rollout", {"temperature": 0.7}, "training samples at 1.0"),
        ("rollout", {"top_p": 0.7}, "set evaluation.temperature"),
        ("rollout", {"prompts": 31, "samples": 16}, "mini_batch 512 is above the 496 responses"),
        ("verification", {"reward_correct": -1.0}, "reward_correct -1.0 must be above reward_wrong -1.0"),
        ("verification", {"reward_correct": 0, "reward_wrong": 1}, "must be above"),
        ("advantages", {"lambda_policy": 1.5}, "lambda_policy 1.5 must lie in [0, 1]"),
        ("advantages", {"lambda_policy": -0.1}, "must lie in [0, 1]"),
    ],
)
def test_settings_that_contradict(section: str, settings: dict[str, Any], said: str) -> None:
    assert said in fault(SMALLEST | {section: settings})


@pytest.mark.parametrize(
    "data",
    [
        {"problems": {"source": "file", "path": "x"}, "base_model": {"path": "y"}},
        {"base_model": {"path": "y"}},
        SMALLEST | {"rollout": {"prompts": 32, "samples": 16}},
        SMALLEST | {"advantages": {"lambda_policy": 0}},
        SMALLEST | {"advantages": {"lambda_policy": 1}},
        SMALLEST | {"base_model": {"hidden_size": 8, "heads": 4}},
        {"problems": {"examples": 9, "min_steps": 9, "max_steps": 9, "train": 512}},
    ],
)
def test_settings_at_the_edge_are_fine(data: dict[str, Any]) -> None:
    assert isinstance(parse_recipe(data, "test"), Recipe)


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ({"ppo_update": {"clip_low": 1.0}}, "ppo_update.clip_low = 1.0:"),
        ({"rollout": {"samples": 0}}, "rollout.samples = 0:"),
        ({"rollout": {"samples": "many"}}, "rollout.samples = 'many':"),
        ({"rollout": {"samples": 2.5}}, "rollout.samples = 2.5:"),
        ({"rollout": 3}, "rollout = 3:"),
        ({"ppo_update": {"actor_lr": float("nan")}}, "ppo_update.actor_lr = nan:"),
        ({"ppo_update": {"actor_lr": float("inf")}}, "ppo_update.actor_lr = inf:"),
        ({"advantages": {"lambda_policy": "adaptive"}}, "advantages.lambda_policy = 'adaptive':"),
        ({"seed": -1}, "seed = -1:"),
        ({"name": "My run"}, "name = 'My run':"),
    ],
)
def test_a_value_that_does_not_fit_is_named(data: dict[str, Any], where: str) -> None:
    assert where in fault(SMALLEST | data)


def test_all_faults_are_told_at_once() -> None:
    said = fault(SMALLEST | {"rollout": {"samples": 0}, "seed": -1, "rolout": {}})
    assert all(words in said for words in ("rollout.samples", "seed", "'rolout'"))


@pytest.mark.parametrize(
    ("text", "section", "key", "value"),
    [
        ("rollout.samples=8", "rollout", "samples", 8),
        ("ppo_update.actor_lr=3e-4", "ppo_update", "actor_lr", 3e-4),
        ("ppo_update.clip_high = 0.3", "ppo_update", "clip_high", 0.3),
        ("advantages.whiten=true", "advantages", "whiten", True),
        ("advantages.lambda_policy=0.95", "advantages", "lambda_policy", 0.95),
        ("advantages.lambda_policy=length_adaptive", "advantages", "lambda_policy", "length_adaptive"),
        ("report.title=two words = one title", "report", "title", "two words = one title"),
        ('report.title="7"', "report", "title", "7"),
    ],
)
def test_set(text: str, section: str, key: str, value: object) -> None:
    plain = load_recipe("tiny")
    found = load_recipe("tiny", [text])
    assert getattr(getattr(found, section), key) == value
    assert type(getattr(getattr(found, section), key)) is type(value)
    assert {name for name in Recipe.model_fields if getattr(found, name) != getattr(plain, name)} <= {section}
    assert override(plain, [text]) == found


def test_set_at_the_top_and_the_last_one_wins() -> None:
    found = load_recipe("tiny", ["seed=5", "name=other", "seed=6"])
    assert (found.seed, found.name) == (6, "other")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed", "write --set section.key=value"),
        ("=3", "write --set section.key=value"),
        ("rollout.=3", "write --set section.key=value"),
        ("a.b.c=3", "write --set section.key=value"),
        ("seed.x=3", "'seed' is not a section"),
        ("rollout.sampels=3", "did you mean 'samples'?"),
        ("rollout.samples=x", "rollout.samples = 'x'"),
    ],
)
def test_wrong_set(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("seed = 3\n[problems]\nexamples = 10\n")
    with pytest.raises(UserError) as error:
        load_recipe(str(tmp_path / "mine.toml"), [text])
    assert said in str(error.value)


def test_no_such_recipe() -> None:
    with pytest.raises(UserError, match=r"no recipe named 'dmeo': there are \[.*'demo'"):
        load_recipe("dmeo")
    with pytest.raises(UserError, match=r"recipe file nowhere/mine\.toml is not there"):
        load_recipe("nowhere/mine.toml")


@pytest.mark.parametrize("content", [b"seed = ", b"\xff\xfe", b"seed = 1\nseed = 2"])
def test_a_file_that_is_not_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"mine\.toml is not valid TOML"):
        load_recipe(str(path))


def test_a_file_is_its_runs_name_unless_it_says_another(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[problems]\nexamples = 10\n")
    assert load_recipe(str(path)).name == "mine"
    path.write_text('name = "other"\n[problems]\nexamples = 10\n')
    assert load_recipe(str(path)).name == "other"


def test_sampling_for_evaluation_and_pretraining() -> None:
    found = load_recipe("tiny", ["evaluation.temperature=0.5", "evaluation.top_p=0.6", "evaluation.samples=3"])
    evaluation = found.rollout_for_evaluation()
    assert (evaluation.prompts, evaluation.samples) == (found.problems.heldout, 3)
    assert (evaluation.temperature, evaluation.top_p) == (0.5, 0.6)
    assert evaluation.max_new_tokens == found.rollout.max_new_tokens
    pretraining = found.rollout_for_value_pretraining()
    assert (pretraining.prompts, pretraining.samples) == (8, 2)
    assert (pretraining.temperature, pretraining.top_p) == (1.0, 1.0)


@pytest.mark.parametrize("module", ["vapo.recipe", "pipelines", "pipelines.training", "components", "vapo.cli"])
def test_reading_a_recipe_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert module in loaded
    assert loaded.isdisjoint({"torch", "transformers", "numba", "plotly", "vapo.rl", "vapo.train", "vapo.rollout"})
