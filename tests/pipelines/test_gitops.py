"""Pipeline and PipelineVersion: valid, named by content, and the same to Go's YAML as to Python's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.compiling import compile_pipeline
from pipelines.gitops import as_text, kubernetes_objects, version_of
from vapo.cli import main
from vapo.recipe import load_recipe

PLATFORM = {"platforms": {"kubernetes": {"deploymentSpec": {"executors": {"exec-a": {"podMetadata": {}}}}}}}


@pytest.fixture(scope="module")
def ir() -> str:
    return compile_pipeline(load_recipe("tiny"), share=True)


def test_they_are_valid_and_hold_the_pipeline_as_objects(ir: str) -> None:
    schemas = pytest.importorskip("manifests.schemas")
    two = yaml.safe_dump_all([*list(yaml.safe_load_all(ir))[:1], PLATFORM])
    for text in (ir, two):
        pipeline, version = kubernetes_objects(text)
        assert schemas.schema_faults(pipeline) == schemas.schema_faults(version) == ()
        documents = list(yaml.safe_load_all(text))
        assert version["spec"]["pipelineSpec"] == documents[0]
        assert version["spec"].get("platformSpec") == (documents[1] if documents[1:] else None)
        assert version["spec"]["pipelineName"] == pipeline["metadata"]["name"] == "vapo-tiny"
        broken = {**version, "spec": {**version["spec"], "pipelineSpec": json.dumps(documents[0])}}
        assert schemas.schema_faults(broken)


def test_a_version_is_named_by_its_content(ir: str) -> None:
    again = compile_pipeline(load_recipe("tiny"), share=True)
    changed = compile_pipeline(load_recipe("tiny", ["ppo_update.clip_high=0.3"]), share=True)
    assert as_text(ir) == as_text(again)
    assert version_of(ir) != version_of(changed)
    longest = compile_pipeline(load_recipe("tiny", [f"name={'a' * 40}"]), share=True)
    for text in (ir, changed, longest):
        pipeline, version = kubernetes_objects(text)
        assert version["metadata"]["name"] == f"{pipeline['metadata']['name']}-{version_of(text)}"
        assert len(version["metadata"]["name"]) <= 63


def test_text_stays_text_to_go(tmp_path: Path) -> None:
    """What looks like a number to one YAML and like text to the other; kubectl's own reader decides."""
    pytest.importorskip("manifests.render")
    from manifests.render import rendered

    values: list[Any] = ["1e-06", "1e3", "0o17", "017", "0x1F", "1_000", "+1", ".5", ".inf", "yes", "n", "On", "~", ""]
    values += ["null", "NULL", "2026-11-22", "12:30:45", "- a", "a: b", "# c", "text", "two\nlines\n", "µ", " blank "]
    values += [1, 0.5, True, None, {"b": ["c"]}]
    ir = yaml.safe_dump({"pipelineInfo": {"name": "vapo-x"}, "values": values})
    (tmp_path / "objects.yaml").write_text(as_text(ir), encoding="utf-8")
    (tmp_path / "kustomization.yaml").write_text("resources: [objects.yaml]\n")
    version = next(thing for thing in rendered(tmp_path) if thing["kind"] == "PipelineVersion")
    by_python = yaml.safe_load_all((tmp_path / "objects.yaml").read_text(encoding="utf-8"))
    read = [thing["spec"]["pipelineSpec"]["values"] for thing in by_python if thing["kind"] == "PipelineVersion"]
    assert version["spec"]["pipelineSpec"]["values"] == read[0] == values


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["vapo", "compile", "tiny", "--format", "kubernetes"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "tiny-kubernetes.yaml: " in capsys.readouterr().out
    kinds = [thing["kind"] for thing in yaml.safe_load_all(Path("tiny-kubernetes.yaml").read_text())]
    assert kinds == ["Pipeline", "PipelineVersion"]
    assert not Path("tiny.yaml").exists()
