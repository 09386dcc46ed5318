"""[train]: one home for how training runs, told to the training stages alone."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipelines.compiling import compile_pipeline
from pipelines.training import training_pipeline
from vapo.errors import UserError
from vapo.recipe import Recipe, Train, load_recipe, override, parse_recipe

STAGES = ("value_pretraining", "advantages", "ppo_update")
WITHOUT_CRITIC = ("advantages.estimator=group_centred", "value_pretraining.max_steps=0")


def parameters(recipe: Recipe) -> dict[str, Any]:
    """The compiled pipeline's parameters: what its tasks' caches depend on."""
    import yaml

    (ir, *_) = yaml.safe_load_all(compile_pipeline(recipe, "image", training_pipeline))
    found: dict[str, Any] = ir["root"]["inputDefinitions"]["parameters"]
    return {name: value.get("defaultValue") for name, value in found.items()}


def test_a_change_reaches_the_training_stages_and_no_other() -> None:
    before, after = (parameters(load_recipe("tiny", set_)) for set_ in ((), ("train.ranks=2",)))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"{stage}_section" for stage in STAGES} | {"recipe_json"}
    for stage in STAGES:
        assert json.loads(after[f"{stage}_section"])["train"]["ranks"] == 2


def test_without_a_critic_nothing_is_launched_for_advantages() -> None:
    recipe = load_recipe("tiny", (*WITHOUT_CRITIC, "train.ranks=2"))
    assert recipe.for_stage("advantages").train.in_process
    assert not recipe.for_stage("ppo_update").train.in_process


def test_the_defaults_are_not_written_into_the_sections() -> None:
    """So that their text, which the cache goes by, is what it was; and nothing is stated twice."""
    recipe = load_recipe("tiny")
    for stage in STAGES:
        assert "train" not in json.loads(recipe.for_stage(stage).model_dump_json())  # type: ignore[arg-type]
    document = json.loads(load_recipe("tiny", ("train.ranks=2",)).model_dump_json())
    assert document["train"]["ranks"] == 2
    assert [section for section, keys in document.items() if isinstance(keys, dict) and "ranks" in str(keys)] == [
        "train"
    ]


def test_a_resolved_recipe_is_read_and_overridden_again() -> None:
    recipe = load_recipe("tiny", ("train.engine=deepspeed", "train.zero_stage=3", "train.lora_rank=4"))
    again = parse_recipe(json.loads(recipe.model_dump_json()), "again")
    assert again == recipe
    assert override(recipe, ("train.zero_stage=2",)).for_stage("ppo_update").train.zero_stage == 2


@pytest.mark.parametrize("stage", STAGES)
def test_it_is_set_in_one_place_only(stage: str) -> None:
    with pytest.raises(UserError, match=rf"{stage}.train is filled from the section \[train\]: set the keys there"):
        parse_recipe({"base_model": {"path": "x"}, stage: {"train": {"ranks": 2}}}, "here")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"zero_stage": 2}, "train.zero_stage 2 is DeepSpeed's: set train.engine to 'deepspeed'"),
        ({"offload": "cpu"}, "train.offload 'cpu' is DeepSpeed's: set train.engine to 'deepspeed'"),
        ({"engine": "deepspeed", "offload": "cpu"}, "train.offload 'cpu' needs train.zero_stage 1, 2 or 3"),
        ({"engine": "deepspeed", "dtype": "bf16"}, "train.zero_stage 0 with dtype 'bf16': DeepSpeed would add up"),
        ({"engine": "fsdp"}, "train.engine = 'fsdp'"),
        ({"ranks": 0}, "train.ranks = 0"),
        ({"zero": 3}, "unknown key 'train.zero'"),
        ({"lora_targets": []}, "train.lora_targets"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_recipe({"base_model": {"path": "x"}, "train": settings}, "here")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_who_is_alone_needs_no_launcher() -> None:
    assert Train().in_process
    assert Train(dtype="bf16", lora_rank=4).in_process
    for settings in ({"ranks": 2}, {"nodes": 2}, {"engine": "deepspeed"}):
        assert not Train(**settings).in_process  # type: ignore[arg-type]
