"""A training that is cut into runs is the same training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.compiling import compile_pipeline
from pipelines.local import local_image
from pipelines.segments import Segment, handed, parameters_from, segments
from tests.compiled import execute
from tests.running import sha256, untimed
from vapo.lineage.graph import node_at, read_nodes, trace
from vapo.recipe import load_recipe

WITHOUT_CRITIC = ("advantages.estimator=group_normalised", "value_pretraining.max_steps=0")


@pytest.mark.parametrize(
    ("iterations", "expected"),
    [
        (3, [Segment(1, 1, 3, 1)]),
        (4, [Segment(1, 1, 4, 1)]),
        (5, [Segment(1, 1, 4, 2), Segment(2, 5, 1, 2)]),
        (12, [Segment(1, 1, 4, 3), Segment(2, 5, 4, 3), Segment(3, 9, 4, 3)]),
    ],
)
def test_segments_cover_all_iterations(iterations: int, expected: list[Segment]) -> None:
    found = segments(load_recipe("tiny", [f"iterations={iterations}", "iterations_per_run=4"]))
    assert list(found) == expected
    assert [segment.ends for segment in found] == [*([False] * (len(found) - 1)), True]
    assert found[-1].last == iterations


def compiled(*settings: str, **options: Any) -> list[dict[str, Any]]:
    recipe = load_recipe("tiny", ["iterations=4", "iterations_per_run=2", *settings])
    irs = [compile_pipeline(recipe, "python", segment=segment, **options) for segment in segments(recipe)]
    return [next(iter(yaml.safe_load_all(ir))) for ir in irs]


def shown(document: dict[str, Any]) -> set[str]:
    return {task["taskInfo"]["name"] for task in document["root"]["dag"]["tasks"].values()}


def test_only_the_last_segment_reports() -> None:
    first, last = compiled()
    begins = {"problems", "base-model", "history", "evaluation-000", "value-pretraining"}
    assert shown(first) == {*begins, "iterations-001-002", "hand-off"}
    imports = {f"import-{name.replace('_', '-')}" for name in handed(True)}
    assert shown(last) == {*imports, "take-over", "iterations-003-004", "report"}
    assert first["pipelineInfo"]["name"] == last["pipelineInfo"]["name"]  # a cluster's cache is the pipeline's


@pytest.mark.parametrize("critic", [True, False])
def test_a_segment_gets_as_parameters_what_the_one_before_wrote(critic: bool) -> None:
    first, last = compiled(*([] if critic else WITHOUT_CRITIC))
    task = first["root"]["dag"]["tasks"]["hand-off"]["inputs"]
    assert set(task["artifacts"]) == set(handed(critic))
    artifacts = {name: {"uri": f"s3://b/{name}", "sha256": "5", "record": "7"} for name in task["artifacts"]}
    given = parameters_from({"chain": "c", "segment": 1, "segments": 2, "stopped": False, "artifacts": artifacts})
    asked = last["root"]["inputDefinitions"]["parameters"]
    assert {name for name, found in asked.items() if "defaultValue" not in found} == {"store", *given}
    assert json.loads(given["handed_over"]) == {key: {"sha256": "5", "record": "7"} for key in handed(critic)}
    assert given["policy_uri"] == "s3://b/policy"
    sections = {name for name in asked if name.endswith("_section")}
    assert {name: asked[name] for name in sections} == {
        name: first["root"]["inputDefinitions"]["parameters"][name] for name in sections
    }


def test_importers_read_their_address_from_the_roots_parameters() -> None:
    """The backend looks nowhere else, and resolves no parameter in an importer's metadata."""
    _, last = compiled(share=True)
    tasks = {task["taskInfo"]["name"]: task for task in last["root"]["dag"]["tasks"].values()}
    for name in handed(True):
        task = tasks[f"import-{name.replace('_', '-')}"]
        assert task["inputs"]["parameters"] == {"uri": {"componentInputParameter": f"{name}_uri"}}
    specs = [e["importer"] for e in last["deploymentSpec"]["executors"].values() if "importer" in e]
    assert specs
    assert all("metadata" not in spec for spec in specs)
    assert {spec["artifactUri"]["runtimeParameter"] for spec in specs} == {"uri"}


@pytest.mark.slow
def test_two_segments_are_one_run(tmp_path: Path) -> None:
    """Policy, critic and history are the same to the byte, and lineage leads from the last policy to the prompts."""
    settings = ["iterations=4", "iterations_per_block=2", "iterations_per_run=2", "runtime.threads=1"]
    recipe = load_recipe("tiny", [*settings, "evaluation.every=4"])
    image = local_image()
    whole = execute(compile_pipeline(recipe, image), tmp_path)
    first, second = segments(recipe)
    begun = execute(compile_pipeline(recipe, image, segment=first), tmp_path, chain="a")
    said = json.loads(Path(begun["handed_over"].path).read_text())
    assert (said["chain"], said["segment"], said["segments"], said["stopped"]) == ("a", 1, 2, False)
    for name, found in said["artifacts"].items():
        assert sha256(Path(found["uri"])) == found["sha256"], name
    ir = compile_pipeline(recipe, image, segment=second)
    ended = execute(ir, tmp_path, **parameters_from(said))
    assert Path(ended["policy"].path) != Path(whole["policy"].path)
    assert sha256(Path(ended["policy"].path)) == sha256(Path(whole["policy"].path))
    assert sha256(_critic(ended)) == sha256(_critic(whole))
    assert untimed(Path(ended["history"].path)) == untimed(Path(whole["history"].path))

    graph = trace(read_nodes(tmp_path / ".vapo" / "artifacts"), node_at(Path(ended["page"].path).parent), "page")
    assert graph.unknown == ()
    stages = [node.record.stage for node in graph.nodes]
    assert {"take_over", "problems", "base_model", "value_pretraining"} <= set(stages)
    assert sorted(node.record.iteration for node in graph.nodes if node.record.stage == "ppo_update") == [1, 2, 3, 4]

    changed = json.loads(json.dumps(said))
    changed["artifacts"]["policy"]["sha256"] = "0" * 64
    with pytest.raises(RuntimeError, match="take-over"):
        execute(ir, tmp_path, **parameters_from(changed))


def _critic(outputs: dict[str, Any]) -> Path:
    return node_at(Path(outputs["policy"].path).parent).path_of("new_critic")
