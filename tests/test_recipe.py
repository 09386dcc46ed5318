"""The recipe: the paper's defaults, faults named with their cure, and nothing heavy imported to read one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
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


def refused(path: Path) -> str:
    """The one line that refuses a recipe file."""
    with pytest.raises(UserError) as error:
        load_recipe(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def settings(found: Recipe) -> dict[str, Any]:
    """Every setting of a run by `section.key`, apart from the two that only name it."""
    flat: dict[str, Any] = {}
    for key, value in found.model_dump(mode="json").items():
        flat |= (
            {f"{key}.{name}": of_name for name, of_name in value.items()} if isinstance(value, dict) else {key: value}
        )
    return {key: value for key, value in flat.items() if key not in ("name", "report.title")}


def differing(name: str, other: str) -> dict[str, Any]:
    """The settings of recipe `name` that another has otherwise."""
    one, two = settings(load_recipe(name)), settings(load_recipe(other))
    assert one.keys() == two.keys()
    return {key: value for key, value in one.items() if value != two[key]}


# What is shipped. VAPO (arXiv 2504.05118) table 1: each of the seven techniques left out, by its settings.

WITHOUT: dict[str, dict[str, Any]] = {
    "value_pretraining": {"value_pretraining.max_steps": 0},
    "decoupled_gae": {"advantages.lambda_critic": 0.95},
    "length_adaptive_gae": {"advantages.lambda_policy": 0.95},
    "clip_higher": {"ppo_update.clip_high": 0.2},
    "token_level_loss": {"ppo_update.loss_aggregation": "sample"},
    "positive_example_lm_loss": {"ppo_update.positive_lm_coef": 0.0},
    "group_sampling": {"rollout.prompts": 512, "rollout.samples": 1},
}
SHIPPED = {"vapo", "ppo", "vc_ppo", "grpo", "dapo", "qwen2.5_32b_aime", "demo", "tiny"}


def test_recipes_are_shipped() -> None:
    assert set(available_recipes()) == SHIPPED | {f"vapo_without_{technique}" for technique in WITHOUT}


@pytest.mark.parametrize("name", available_recipes())
def test_shipped_recipes_load(name: str) -> None:
    found = load_recipe(name)
    assert found.name == name.replace("_", "-").replace(".", "-")
    assert load_recipe(str(find_recipe(name))) == found


def test_shipped_recipes_have_names_and_titles_of_their_own() -> None:
    found = [load_recipe(name) for name in available_recipes()]
    assert len({recipe.name for recipe in found}) == len(found)
    titles = [recipe.report.title for recipe in found if recipe.name not in ("vapo", "demo")]  # these two are one run
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("technique", WITHOUT)
def test_leaving_one_technique_out_changes_its_settings_alone(technique: str) -> None:
    assert differing(f"vapo_without_{technique}", "vapo") == WITHOUT[technique]


def test_without_group_sampling_there_are_as_many_responses() -> None:
    alone, groups = load_recipe("vapo_without_group_sampling").rollout, load_recipe("vapo").rollout
    assert alone.prompts * alone.samples == groups.prompts * groups.samples
    assert groups.samples > 1


def test_vapo_has_all_seven_techniques() -> None:
    found = load_recipe("vapo")
    assert found.value_pretraining.max_steps > 0
    assert found.advantages.estimator == "gae"
    assert (found.advantages.lambda_critic, found.advantages.lambda_policy) == (1.0, "length_adaptive")
    assert (found.ppo_update.clip_low, found.ppo_update.clip_high) == (0.2, 0.28)
    assert (found.ppo_update.loss_aggregation, found.ppo_update.positive_lm_coef) == ("token", 0.1)


def test_ppo_leaves_out_all_seven() -> None:
    assert differing("ppo", "vapo") == {key: value for part in WITHOUT.values() for key, value in part.items()}


def test_vc_ppo_is_ppo_with_pretraining_and_decoupled_gae() -> None:
    assert differing("vc_ppo", "ppo") == {"value_pretraining.max_steps": 60, "advantages.lambda_critic": 1.0}
    vapo = settings(load_recipe("vapo"))
    assert all(vapo[key] == value for key, value in differing("vc_ppo", "ppo").items())


def test_grpo_has_groups_for_a_critic() -> None:
    assert differing("grpo", "vapo") == {
        "advantages.estimator": "group_normalised",
        "value_pretraining.max_steps": 0,
        "ppo_update.clip_high": 0.2,
        "ppo_update.loss_aggregation": "sample",
        "ppo_update.positive_lm_coef": 0.0,
    }
    assert not load_recipe("grpo").has_critic
    assert load_recipe("vapo").has_critic


def test_dapo_is_grpo_with_its_four_techniques() -> None:
    """Clip-higher, dynamic sampling, token-level loss, soft overlong punishment: DAPO (arXiv 2503.14476) section 3."""
    assert differing("dapo", "grpo") == {
        "ppo_update.clip_high": 0.28,
        "ppo_update.loss_aggregation": "token",
        "rollout.prompts": 24,
        "rollout.draws": 4,
        "advantages.keep_groups": 64,
        "verification.overlong_tokens": 248,
        "verification.overlong_cache": 50,
    }
    found, grpo = load_recipe("dapo"), load_recipe("grpo")
    assert found.advantages.keep_groups == grpo.rollout.prompts  # it trains on as many groups
    assert found.verification.overlong_tokens == found.rollout.max_new_tokens
    assert not found.has_critic


def test_demo_and_vapo_are_one_run_by_two_names() -> None:
    demo, vapo = load_recipe("demo"), load_recipe("vapo")
    assert demo.model_copy(update={"name": "vapo"}) == vapo
    assert (demo.name, vapo.name) == ("demo", "vapo")


# The published run: VAPO (arXiv 2504.05118) section 5 and table 1.

PUBLISHED: dict[str, Any] = {
    "problems.heldout": 30,  # AIME 2024
    "rollout.prompts": 512,
    "rollout.samples": 16,
    "value_pretraining.init": "reward_model",
    "value_pretraining.min_steps": 50,
    "value_pretraining.max_steps": 50,
    "advantages.lambda_critic": 1.0,
    "advantages.lambda_policy": "length_adaptive",
    "advantages.alpha": 0.05,
    "ppo_update.mini_batch": 512,
    "ppo_update.clip_low": 0.2,
    "ppo_update.clip_high": 0.28,
    "ppo_update.loss_aggregation": "token",
    "ppo_update.positive_lm_coef": 0.1,
    "ppo_update.actor_lr": 1e-6,
    "ppo_update.critic_lr": 2e-6,
    "evaluation.samples": 32,
    "evaluation.temperature": 1.0,
    "evaluation.top_p": 0.7,
}
AIME = "qwen2.5_32b_aime"
WHERE = {"problems.source", "report.title"}  # they say where data lie and what the page is called


def comments(text: str) -> dict[str, str]:
    """The comment behind every `key = value` of a recipe's text, by `section.key`; "" where there is none."""
    found, section = {}, ""
    for line in text.splitlines():
        if heading := re.fullmatch(r"\[([\w.]+)\]", line.strip()):
            section = f"{heading[1]}."
        elif setting := re.fullmatch(r"""("[^"]+"|\w+) *= *(?:"[^"]*"|[^"#]*?) *(?:# *(.*))?""", line.strip()):
            found[section + setting[1].strip('"')] = setting[2] or ""
        else:
            assert not line.strip() or line.startswith("#"), line
    return found


def stated(text: str) -> dict[str, Any]:
    """What a recipe's text itself says, by `section.key`."""

    def flat(table: dict[str, Any], before: str) -> Iterator[tuple[str, Any]]:
        for key, value in table.items():
            if isinstance(value, dict):
                yield from flat(value, f"{before}{key}.")
            else:
                yield before + key, value

    return dict(flat(tomllib.loads(text), ""))


def test_the_published_run_states_every_published_number() -> None:
    text = find_recipe(AIME).read_text()
    found = stated(text)
    assert {key: found.get(key) for key in PUBLISHED} == PUBLISHED
    resolved = settings(load_recipe(AIME))
    assert {key: resolved[key] for key in PUBLISHED} == PUBLISHED


def test_the_published_run_says_of_all_else_whose_it_is() -> None:
    text = find_recipe(AIME).read_text()
    said = comments(text)
    assert said.keys() == stated(text).keys()  # the parser missed nothing
    for key in said.keys() - PUBLISHED.keys() - WHERE:
        assert re.search(r"\bours\b|\bDAPO\b|\bVC-PPO\b|\b5,000 optimiser steps\b", said[key]), (key, said[key])
    for key in PUBLISHED:
        assert not re.match("ours", said[key]), key


def test_the_published_run_makes_5000_optimiser_steps() -> None:
    found = load_recipe(AIME)
    per_iteration = found.rollout.prompts * found.rollout.samples // found.ppo_update.mini_batch
    assert per_iteration == 16
    assert 0 <= 5000 - found.iterations * per_iteration < per_iteration


def test_the_published_run_reads_the_published_files() -> None:
    found = load_recipe(AIME).problems
    assert (found.source, found.ground_truths) == ("file", "integer")
    assert (found.path, found.heldout_path) == ("data/dapo-math-17k.parquet", "data/aime-2024.parquet")
    assert found.prompt_column == found.ground_truth_column == found.family_column == ""  # known by their schema
    assert (found.train, found.heldout, found.skip_bad_rows) == (17917, 30, False)


def test_the_published_run_has_nothing_that_vapo_has_not() -> None:
    """No KL term, no entropy bonus, no dual clip, no dynamic sampling, no punishment of length."""
    found = settings(load_recipe(AIME))
    off = ("kl_coef", "entropy_coef", "dual_clip", "importance_cap", "value_clip")
    assert [found[f"ppo_update.{key}"] for key in off] == [0] * len(off)
    assert (found["advantages.keep_groups"], found["verification.overlong_tokens"]) == (0, 0)
    assert (found["advantages.estimator"], found["advantages.whiten"]) == ("gae", False)


# One recipe extends another


def test_a_recipe_extends_one_that_is_shipped(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.toml", 'extends = "tiny"\nseed = 3\n[rollout]\nsamples = 2\n')
    parent, found = load_recipe("tiny"), load_recipe(str(path))
    wanted = parent.model_copy(
        update={"name": "mine", "seed": 3, "rollout": parent.rollout.model_copy(update={"samples": 2})}
    )
    assert found == wanted
    assert found.rollout.prompts == 8  # the parent's; the default is another
    assert found.evaluation.samples == 2


def test_a_recipe_extends_a_file_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the command is given, and before a shipped recipe of that name."""
    write(tmp_path / "recipes" / "tiny.toml", 'extends = "tiny"\n[rollout]\nsamples = 3\n[evaluation]\nsamples = 5\n')
    path = write(tmp_path / "recipes" / "mine.toml", 'extends = "tiny.toml"\n[rollout]\nmax_new_tokens = 50\n')
    write(tmp_path / "tiny.toml", "seed = 9\n")
    monkeypatch.chdir(tmp_path)
    for name in (str(path), "recipes/mine.toml"):
        found = load_recipe(name)
        assert (found.rollout.samples, found.rollout.max_new_tokens, found.evaluation.samples) == (3, 50, 5)
        assert (found.seed, found.rollout.prompts) == (0, 8)


def test_extending_a_name_never_means_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "tiny", "seed = 9\n")
    assert load_recipe(str(write(tmp_path / "mine.toml", 'extends = "tiny"\n'))).seed == 0


def test_three_generations_the_youngest_wins(tmp_path: Path) -> None:
    write(tmp_path / "a.toml", 'extends = "tiny"\n[ppo_update]\nclip_low = 0.1\nclip_high = 0.3\nepochs = 2\n')
    write(tmp_path / "b.toml", 'extends = "a.toml"\n[ppo_update]\nclip_high = 0.4\nepochs = 3\n')
    path = write(tmp_path / "c.toml", 'extends = "b.toml"\n[ppo_update]\nepochs = 4\n')
    found = load_recipe(str(path)).ppo_update
    assert (found.clip_low, found.clip_high, found.epochs, found.mini_batch) == (0.1, 0.4, 4, 16)
    assert load_recipe(str(path), ["ppo_update.epochs=5"]).ppo_update.epochs == 5


def test_a_name_is_not_inherited(tmp_path: Path) -> None:
    parent = write(tmp_path / "parent.toml", 'name = "chosen"\nextends = "tiny"\n')
    child = write(tmp_path / "child.toml", 'extends = "parent.toml"\n')
    assert (load_recipe(str(parent)).name, load_recipe(str(child)).name) == ("chosen", "child")
    write(child, 'extends = "parent.toml"\nname = "own"\n')
    assert load_recipe(str(child)).name == "own"


@pytest.mark.parametrize(
    ("stem", "name"),
    [("My_Run", "my-run"), ("qwen2.5 32B", "qwen2-5-32b"), ("_a__b_", "a-b"), ("größe", "gr-e"), ("7", "7")],
)
def test_a_name_is_made_from_the_files(tmp_path: Path, stem: str, name: str) -> None:
    assert load_recipe(str(write(tmp_path / f"{stem}.toml", 'extends = "tiny"\n'))).name == name


@pytest.mark.parametrize("stem", ["__", "a" * 41])
def test_a_file_whose_name_makes_none(tmp_path: Path, stem: str) -> None:
    path = tmp_path / f"{stem}.toml"
    made = "" if stem == "__" else stem
    assert f"{stem}.toml: name = {made!r}: string should" in refused(write(path, 'extends = "tiny"\n'))
    assert load_recipe(str(write(path, 'extends = "tiny"\nname = "short"\n'))).name == "short"


def test_a_recipe_that_extends_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", 'extends = "a.toml"\n')
    assert f"recipe {path} extends itself: by way of a.toml" in refused(path)


def test_recipes_that_extend_one_another(tmp_path: Path) -> None:
    """However the way round is written."""
    (tmp_path / "sub").mkdir()
    write(tmp_path / "a.toml", 'extends = "b.toml"\n')
    write(tmp_path / "b.toml", 'extends = "sub/../c.toml"\n')
    write(tmp_path / "c.toml", 'extends = "../' + tmp_path.name + '/a.toml"\n')
    assert "a.toml extends itself: by way of a.toml, b.toml, c.toml" in refused(tmp_path / "a.toml")


@pytest.mark.parametrize("extended", ["nosuch", "nosuch.toml", "", ".", "sub", "elsewhere.toml", "demo.toml"])
def test_a_parent_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extended: str) -> None:
    """A file is looked for beside the child, not where the command is given."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "cwd").mkdir()
    write(tmp_path / "cwd" / "elsewhere.toml", 'extends = "tiny"\n')
    monkeypatch.chdir(tmp_path / "cwd")
    path = write(tmp_path / "mine.toml", f'extends = "{extended}"\n')
    said = refused(path)
    assert f"recipe {path}: extends = {extended!r}:" in said
    assert all(name in said for name in available_recipes())


@pytest.mark.parametrize(("extended", "shown"), [("3", "3"), ('["tiny"]', "['tiny']"), ("true", "True")])
def test_a_parent_that_is_no_name(tmp_path: Path, extended: str, shown: str) -> None:
    path = write(tmp_path / "mine.toml", f"extends = {extended}\n")
    assert refused(path) == f"recipe {path}: extends = {shown}: give a recipe's name or a .toml file beside this one"


def test_faults_of_a_parent(tmp_path: Path) -> None:
    """What is no TOML is told of the file that is none; a setting that does not fit, of the recipe that is run."""
    path = write(tmp_path / "mine.toml", 'extends = "parent.toml"\n')
    write(tmp_path / "parent.toml", "seed = = 1\n")
    assert f"recipe {tmp_path / 'parent.toml'} is not valid TOML" in refused(path)
    write(tmp_path / "parent.toml", 'extends = "tiny"\n[rolout]\n')
    assert "recipe mine.toml: unknown key 'rolout': did you mean 'rollout'?" in refused(path)


def test_a_section_that_is_none_does_not_vanish(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.toml", 'extends = "tiny"\nrollout = 3\n')
    assert "rollout = 3: " in refused(path)


def test_extends_is_for_files() -> None:
    with pytest.raises(UserError, match="unknown key 'extends'"):
        load_recipe("tiny", ["extends=demo"])


# Defaults


def test_defaults_are_the_papers() -> None:
    """VAPO (arXiv 2504.05118) section 5; evaluation as in AIME 2024's column."""
    found = Recipe.model_validate(SMALLEST)
    assert (found.ppo_update.clip_low, found.ppo_update.clip_high) == (0.2, 0.28)
    assert found.ppo_update.positive_lm_coef == 0.1
    assert found.ppo_update.loss_aggregation == "token"
    assert (found.ppo_update.actor_lr, found.ppo_update.critic_lr) == (1e-6, 2e-6)
    assert (found.ppo_update.mini_batch, found.ppo_update.epochs) == (512, 1)
    assert (found.rollout.prompts, found.rollout.samples) == (512, 16)
    assert (found.rollout.temperature, found.rollout.top_p) == (1.0, 1.0)
    assert (found.advantages.lambda_critic, found.advantages.alpha) == (1.0, 0.05)
    assert found.advantages.lambda_policy == "length_adaptive"
    assert found.advantages.whiten is False
    assert (found.value_pretraining.min_steps, found.value_pretraining.lr) == (50, 2e-6)
    assert found.value_pretraining.init == "reward_model"
    assert found.advantages.estimator == "gae"
    assert (found.evaluation.samples, found.evaluation.temperature, found.evaluation.top_p) == (32, 1.0, 0.7)
    assert (found.verification.reward_correct, found.verification.reward_wrong) == (1.0, -1.0)


def test_what_the_paper_does_not_have_is_off() -> None:
    """0 is off everywhere."""
    found = settings(Recipe.model_validate(SMALLEST))
    update = ("dual_clip", "importance_cap", "kl_coef", "entropy_coef", "value_clip")
    assert [found[f"ppo_update.{key}"] for key in update] == [0] * 5
    assert (found["advantages.keep_groups"], found["verification.overlong_tokens"]) == (0, 0)
    assert found["verification.overlong_cache"] == 4096  # DAPO's
    assert found["ppo_update.kl_estimator"] == "k3"
    assert found["problems.heldout_path"] == ""
    assert (found["problems.template"], found["problems.chat_template_from"]) == ("{prompt}", "")
    assert found["problems.skip_bad_rows"] is False


def test_value_pretraining_stops_by_what_it_measures() -> None:
    """VC-PPO (arXiv 2503.01491) overfits after 150 steps; all else is ours."""
    found = Recipe.model_validate(SMALLEST).value_pretraining
    assert (found.max_steps, found.patience, found.tolerance, found.must_beat_mean) == (150, 4, 0.01, True)
    assert 0 < found.heldout_share < 1


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
        ({"advantages": {"zzz": 0.9}}, "known keys: alpha, drop_truncated, estimator, keep_groups, lambda_critic, "),
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
        ("problems", {"examples": 9, "train": 511}, "draws up to 512 prompts (rollout.prompts x rollout.draws), above"),
        ("base_model", {"hidden_size": 30, "heads": 4}, "choose a multiple of 2 x heads (8)"),
        ("base_model", {"hidden_size": 12, "heads": 4}, "choose a multiple of 2 x heads (8)"),  # 3 per head: odd
        ("rollout", {"temperature": 0.7}, "training samples at 1.0"),
        ("rollout", {"top_p": 0.7}, "set evaluation.temperature"),
        ("rollout", {"prompts": 31, "samples": 16}, "mini_batch 512 is above the 496 responses"),
        ("verification", {"reward_correct": -1.0}, "reward_correct -1.0 must be above reward_wrong -1.0"),
        ("verification", {"reward_correct": 0, "reward_wrong": 1}, "must be above"),
        ("advantages", {"lambda_policy": 1.5}, "lambda_policy 1.5 must lie in [0, 1]"),
        ("advantages", {"lambda_policy": -0.1}, "must lie in [0, 1]"),
        (
            "problems",
            {"examples": 9, "heldout_path": "h.jsonl"},
            "heldout_path 'h.jsonl' is for source 'file' or 'hub': set problems.source",
        ),
        ("problems", {"examples": 9, "path": "x"}, "problems.path 'x' is for source 'file' or 'hub'"),
        ("problems", {"examples": 9, "template": "Q: {prompt}"}, "is for source 'file' or 'hub' or 'reasoning_gym'"),
        ("problems", {"source": "file", "path": "x", "hub_split": "test"}, "hub_split 'test' is for source 'hub'"),
        ("problems", {"source": "file", "path": "x", "families": {"gcd": {}}}, "is for source 'reasoning_gym'"),
        ("problems", {"source": "reasoning_gym", "families": {"gcd": {}}, "skip_bad_rows": True}, "skip_bad_rows True"),
        ("problems", {"source": "hub"}, "source is 'hub' but problems.path is empty"),
        ("problems", {"source": "reasoning_gym"}, "problems.families is empty: name some, say {chain_sum = {}}"),
        ("problems", {"source": "reasoning_gym", "families": {"gcd": {}}}, "base_model.path is empty: give the folder"),
        ("problems", {"source": "hub", "path": "x", "template": "Q:"}, "template 'Q:' must hold {prompt} once"),
        ("problems", {"source": "hub", "path": "x", "template": "{prompt}{prompt}"}, "must hold {prompt} once"),
        ("verification", {"overlong_tokens": 4096}, "overlong_cache 4096 must be below overlong_tokens 4096"),
        (
            "verification",
            {"overlong_tokens": 9, "overlong_cache": 10},
            "overlong_cache 10 must be below overlong_tokens 9",
        ),
        ("verification", {"grader": "custom"}, "custom '' with grader 'custom': grader 'custom' and the path"),
        ("verification", {"custom": "a:b"}, "custom 'a:b' with grader 'answer_line'"),
        ("verification", {"format_pattern": "x"}, "format_pattern 'x' with format_reward 0: set both, or neither"),
        ("verification", {"format_reward": 1}, "format_pattern '' with format_reward 1.0"),
        (
            "verification",
            {"format_pattern": "(", "format_reward": 1},
            "format_pattern '(' is no regular expression: missing )",
        ),
        (
            "verification",
            {"overlong_tokens": 20481},
            "overlong_tokens 20481 is above rollout.max_new_tokens 20480: no response gets there; lower it",
        ),
        ("value_pretraining", {"max_steps": 30}, "min_steps 50 is above max_steps 30: lower it"),
        ("value_pretraining", {"min_steps": 151}, "min_steps 151 is above max_steps 150: lower it"),
        (
            "advantages",
            {"estimator": "group_normalised"},
            "'group_normalised' has no critic, but value_pretraining.max_steps is 150: set it to 0, or estimator to",
        ),
        ("advantages", {"keep_groups": 513}, "keep_groups 513 is above rollout.prompts 512 x rollout.draws 1"),
        ("rollout", {"draws": 2}, "draws 2: drawing ends when advantages.keep_groups is reached, but that is 0"),
        ("advantages", {"keep_groups": 31}, "mini_batch 512 is above the 496 responses"),
        ("ppo_update", {"mini_batch": 8193}, "mini_batch 8193 is above the 8192 responses"),
        ("ppo_update", {"dual_clip": 1}, "dual_clip 1.0 must be above 1 (say 3), or 0: off"),
        ("ppo_update", {"dual_clip": 0.01}, "dual_clip 0.01 must be above 1"),
        ("ppo_update", {"importance_cap": 0.99}, "importance_cap 0.99 must be at least 1 (say 2), or 0: off"),
        ("ppo_update", {"importance_cap": 0.01}, "importance_cap 0.01 must be at least 1"),
        ("rollout", {"record_batch": 255}, "record_batch 255 is below batch_size 256: raise it, or lower batch_size"),
        ("rollout", {"tensor_parallel": 2}, "tensor_parallel 2 is for engine 'vllm', but rollout.engine is 'cpu'"),
        ("rollout", {"gpu_memory": 0.5}, "gpu_memory 0.5 is for engine 'vllm'"),
        ("rollout", {"dtype": "bfloat16"}, "dtype 'bfloat16' is for engine 'vllm'"),
        ("rollout", {"max_model_length": 9}, "max_model_length 9 is for engine 'vllm'"),
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
        SMALLEST | {"advantages": {"keep_groups": 32}},
        SMALLEST | {"advantages": {"keep_groups": 512}},
        SMALLEST | {"advantages": {"estimator": "group_normalised"}, "value_pretraining": {"max_steps": 0}},
        SMALLEST | {"advantages": {"estimator": "group_centred"}, "value_pretraining": {"max_steps": 0}},
        {"problems": {"source": "file", "path": "x", "heldout_path": "z"}, "base_model": {"path": "y"}},
        {"problems": {"source": "hub", "path": "x/y@z", "hub_split": "test"}, "base_model": {"path": "y"}},
        {"problems": {"source": "reasoning_gym", "families": {"gcd": {"max_value": 9}}}, "base_model": {"path": "y"}},
        SMALLEST | {"value_pretraining": {"max_steps": 0, "min_steps": 50}},
        SMALLEST | {"value_pretraining": {"max_steps": 50}},
        SMALLEST | {"verification": {"overlong_tokens": 20480}},
        SMALLEST | {"verification": {"overlong_tokens": 4097}},
        SMALLEST | {"verification": {"grader": "math", "answer_in": ["line", "boxed"], "max_error_share": 1}},
        SMALLEST | {"verification": {"grader": "custom", "custom": "a.py:b"}},
        SMALLEST | {"verification": {"format_pattern": "x", "format_reward": -1}},
        SMALLEST | {"ppo_update": {"dual_clip": 1.01, "importance_cap": 1}},
        SMALLEST | {"ppo_update": {"dual_clip": 0, "importance_cap": 0, "mini_batch": 8192}},
        SMALLEST | {"base_model": {"hidden_size": 8, "heads": 4}},
        {"problems": {"examples": 9, "min_steps": 9, "max_steps": 9, "train": 512}},
    ],
)
def test_settings_at_the_edge_are_fine(data: dict[str, Any]) -> None:
    assert isinstance(parse_recipe(data, "test"), Recipe)


@pytest.mark.parametrize(
    ("advantages", "said"),
    [
        (
            {"estimator": "group_normalised"},
            "'group_normalised' compares the responses to a prompt, but rollout.samples is 1: sample at least 2",
        ),
        ({"estimator": "group_centred"}, "estimator 'group_centred' compares"),
        (
            {"keep_groups": 512},
            "correct and wrong responses, but rollout.samples is 1: sample at least 2, or set keep_groups to 0",
        ),
    ],
)
def test_a_group_of_one(advantages: dict[str, Any], said: str) -> None:
    data = {"rollout": {"samples": 1}, "value_pretraining": {"max_steps": 0}, "advantages": advantages}
    ((key, value),) = advantages.items()
    told = fault(SMALLEST | data)
    assert told.startswith(f"test: advantages.{key} {value!r} ")
    assert said in told
    assert parse_recipe(SMALLEST | data | {"rollout": {"samples": 2}}, "test").rollout.samples == 2
    assert parse_recipe(SMALLEST | data | {"advantages": {}}, "test").rollout.samples == 1


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ({"ppo_update": {"clip_low": 1.0}}, "ppo_update.clip_low = 1.0: input should be less than 1"),
        ({"ppo_update": {"clip_low": 1.2}}, "ppo_update.clip_low = 1.2: input should be less than 1"),
        ({"advantages": {"alpha": 0}}, "advantages.alpha = 0: input should be greater than 0"),
        ({"advantages": {"alpha": -0.05}}, "advantages.alpha = -0.05: input should be greater than 0"),
        ({"advantages": {"keep_groups": -1}}, "advantages.keep_groups = -1:"),
        (
            {"advantages": {"estimator": "grpo"}},
            "advantages.estimator = 'grpo': input should be 'gae', 'group_normalised' or 'group_centred'",
        ),
        ({"ppo_update": {"kl_estimator": "k4"}}, "ppo_update.kl_estimator = 'k4': input should be 'k1', 'k2' or 'k3'"),
        *(
            ({"ppo_update": {key: -0.1}}, f"ppo_update.{key} = -0.1: input should be greater than or equal to 0")
            for key in ("dual_clip", "importance_cap", "kl_coef", "entropy_coef", "value_clip")
        ),
        ({"verification": {"overlong_tokens": -1}}, "verification.overlong_tokens = -1:"),
        ({"verification": {"grader": "eval"}}, "verification.grader = 'eval':"),
        ({"verification": {"answer_in": ["last number"]}}, "verification.answer_in"),
        ({"verification": {"max_error_share": 1.1}}, "verification.max_error_share = 1.1:"),
        ({"verification": {"time_limit": 0}}, "verification.time_limit = 0:"),
        ({"verification": {"min_score": 0}}, "verification.min_score = 0:"),
        ({"verification": {"overlong_cache": 0}}, "verification.overlong_cache = 0: input should be greater than 0"),
        ({"value_pretraining": {"max_steps": -1}}, "value_pretraining.max_steps = -1:"),
        ({"value_pretraining": {"patience": 0}}, "value_pretraining.patience = 0:"),
        ({"value_pretraining": {"tolerance": 1}}, "value_pretraining.tolerance = 1:"),
        ({"value_pretraining": {"must_beat_mean": "perhaps"}}, "value_pretraining.must_beat_mean = 'perhaps':"),
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
        ("advantages.keep_groups=7", "advantages", "keep_groups", 7),
        ("ppo_update.value_clip=0.2", "ppo_update", "value_clip", 0.2),
        ("value_pretraining.must_beat_mean=true", "value_pretraining", "must_beat_mean", True),
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


def test_set_in_a_table_of_a_section(tmp_path: Path) -> None:
    found = load_recipe("tiny", ["resources.rollout.cpu=8", "train.resources.memory=9Gi"])
    assert (found.resources.rollout.cpu, found.train.resources) == ("8", {"memory": "9Gi"})
    (tmp_path / "mine.toml").write_text('extends = "qwen2.5_32b_aime"\n[resources.rollout]\nmemory = "640Gi"\n')
    rollout = load_recipe(str(tmp_path / "mine.toml"), ["resources.rollout.cpu=50"]).resources.rollout
    assert (rollout.cpu, rollout.memory, rollout.accelerators) == ("50", "640Gi", 4)


def test_set_at_the_top_and_the_last_one_wins() -> None:
    found = load_recipe("tiny", ["seed=5", "name=other", "seed=6"])
    assert (found.seed, found.name) == (6, "other")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed", "write --set section.key=value"),
        ("=3", "write --set section.key=value"),
        ("rollout.=3", "write --set section.key=value"),
        ("a.b.c.d=3", "write --set section.key=value"),
        ("a.b.c=3", "unknown key 'a'"),
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
    assert (found.evaluation.confidence, found.evaluation.resamples) == (0.95, 2000)
    for setting in ("confidence=1.0", "confidence=0.4", "resamples=99", "samples=0", "top_p=0"):
        with pytest.raises(UserError, match=f"evaluation.{setting.partition('=')[0]} = "):
            load_recipe("tiny", [f"evaluation.{setting}"])
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
