"""A whole run whose rollouts are shared by two tasks trains the same models as one in which one task samples all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.compiling import compile_pipeline, stages_of
from tests.pipelines.conftest import Undisturbed
from tests.running import TINY, executed, records, sha256, vapo
from vapo.errors import UserError
from vapo.lineage.record import FILE
from vapo.recipe import load_recipe

NOT_THE_WHOLES = ("seconds", "shards", "slowest_shard_seconds")


def of_stage(workdir: Path, stage: str) -> list[dict[str, Any]]:
    """A stage's records in the order in which they ran."""
    return sorted((r for r in records(workdir).values() if r["stage"] == stage), key=lambda r: str(r["started"]))


def files_of(manifest: dict[str, Any]) -> dict[str, str]:
    return {file["path"]: file["sha256"] for file in json.loads(Path(manifest["path"]).read_text())["files"]}


@pytest.mark.slow
def test_two_shards_train_the_same_models(undisturbed: Undisturbed, sharded: Undisturbed) -> None:
    counts = executed(sharded.folder)
    assert (counts["rollout"], counts["concatenation"], counts["verification"]) == (8, 4, 4)
    ((one,), (two,)) = (of_stage(workdir, "ppo_update") for workdir in (undisturbed.pristine, sharded.workdir))
    for name in ("new_policy", "new_critic"):
        assert files_of(one["outputs"][name]) == files_of(two["outputs"][name])
    wholes = of_stage(sharded.workdir, "concatenation")
    for whole, single in zip(wholes, of_stage(undisturbed.pristine, "rollout"), strict=True):
        assert whole["parameters"]["purpose"] == single["parameters"]["purpose"]
        found = {name: value for name, value in whole["metrics"].items() if name not in NOT_THE_WHOLES}
        assert found == pytest.approx(single["metrics"], rel=1e-5)
    # A concatenation names the records of its shards, and lineage leads through it.
    shards = {sha256(folder / FILE) for folder, r in records(sharded.workdir).items() if r["stage"] == "rollout"}
    named = {source["record"] for whole in wholes for source in whole["inputs"].values()}
    assert named == shards
    assert len(shards) == 8
    verified = vapo("lineage", sharded.folder.name, "--verify", "--workdir", sharded.workdir)
    assert (verified.returncode, "all as recorded" in verified.stdout) == (0, True)
    # A second run is served from the cache.
    again = vapo("run", *TINY, "--set", "rollout.shards=2", "--workdir", sharded.workdir)
    assert "0 tasks executed" in again.stdout


def loops(document: dict[str, Any]) -> list[tuple[str, list[int], dict[str, Any]]]:
    return [
        (name, json.loads(task["parameterIterator"]["items"]["raw"]), task.get("iteratorPolicy", {}))
        for component in (document["root"], *document["components"].values())
        for name, task in component.get("dag", {}).get("tasks", {}).items()
        if "parameterIterator" in task
    ]


def test_shards_are_a_loop_over_numbers_in_training_pretraining_and_evaluation() -> None:
    settings = ["iterations=3", "rollout.shards=4", "problems.heldout=3", "evaluation.every=1", "rollout.draws=2"]
    recipe = load_recipe("vapo", [*settings, "advantages.keep_groups=32", "value_pretraining.prompts=100"])
    ir = compile_pipeline(recipe, share=True)
    found = loops(next(iter(yaml.safe_load_all(ir))))
    assert sorted(items for _, items, _ in found) == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert all(not policy for *_, policy in found)  # all at once on a cluster ...
    here = loops(next(iter(yaml.safe_load_all(compile_pipeline(recipe)))))
    assert all(policy == {"parallelismLimit": 1} for *_, policy in here)  # ... one after the other here
    counts = stages_of(ir)
    assert counts["rollout"] == 3 * 2 * 4 + 4 * 3 + 4
    assert counts["concatenation"] == 3 * 2 + 4 + 1


def test_one_shard_is_no_loop() -> None:
    ir = compile_pipeline(load_recipe("vapo", ["iterations=2"]), share=True)
    assert not loops(next(iter(yaml.safe_load_all(ir))))
    assert "concatenation" not in stages_of(ir)


def test_more_shards_than_prompts() -> None:
    with pytest.raises(UserError, match=r"rollout\.shards 9 is above rollout\.prompts 8: lower it"):
        load_recipe("tiny", ["rollout.shards=9", "rollout.prompts=8"])
