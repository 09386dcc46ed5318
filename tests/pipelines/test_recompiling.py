"""A rerun for a cluster: importers of the recorded URIs in a pipeline of the run's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp.components import load_component_from_text

from pipelines.recompiling import recompiled, tasks_in
from tests.pipelines.conftest import Undisturbed
from tests.pipelines.kfp_server import KfpServer
from tests.running import assert_refused, folder_of, vapo
from vapo.errors import UserError
from vapo.lineage.record import as_text, digest_of
from vapo.lineage.records import Records

pytestmark = pytest.mark.slow
RUN = "5f1c2d3e-0000-4000-8000-000000000001"


@pytest.fixture(scope="module")
def bucket(undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> str:
    return as_left_by_a_cluster(undisturbed.workdir, tmp_path_factory.mktemp("records"))


def as_left_by_a_cluster(workdir: Path, folder: Path) -> str:
    """A store in a folder with the records of the run in a working directory: every URI in them is in a bucket."""
    store = str(folder)
    records, new = Records(store), {"": ""}
    found = Records(str(workdir / ".vapo"))
    page = next(p for p in (workdir / ".vapo" / "artifacts").glob("*/report/record.json"))
    own = found.led_to(found.get([digest_of(page.read_text())]))
    for digest, record in sorted(own.items(), key=lambda item: item[1].ended):

        def moved(part: Any) -> Any:
            return part.model_copy(update={"uri": f"s3://bucket/root/vapo-tiny/{RUN}/{Path(part.path).name}"})

        inputs = {
            name: moved(source).model_copy(update={"record": new[source.record]})
            for name, source in record.inputs.items()
        }
        outputs = {name: moved(product) for name, product in record.outputs.items()}
        update = {"inputs": inputs, "outputs": outputs, "run": RUN}
        if record.stage == "report":
            recipe = json.loads(str(record.parameters["recipe"]))
            recipe["runtime"]["store"] = "s3://bucket/root"
            update["parameters"] = {**record.parameters, "recipe": json.dumps(recipe)}
        records.add(record.model_copy(update=update))
        new[digest] = digest_of(as_text(record.model_copy(update=update)))
    return store


def compiled(bucket: str, *arguments: Any) -> tuple[dict[str, Any], str]:
    """The first document, and the text."""
    _, ir = recompiled(*tasks_in(bucket, RUN), *arguments)
    load_component_from_text(ir)
    return next(iter(yaml.safe_load_all(ir))), ir


def test_a_stage_takes_what_was_recorded(bucket: str) -> None:
    document, _ = compiled(bucket, "advantages")
    root, executors = document["root"], document["deploymentSpec"]["executors"]
    assert document["pipelineInfo"]["name"] == "vapo-tiny"
    defaults = {name: given.get("defaultValue") for name, given in root["inputDefinitions"]["parameters"].items()}
    assert defaults["store"] == "s3://bucket/root"
    task = root["dag"]["tasks"]["advantages"]
    assert not task["cachingOptions"].get("enableCache", False)
    taken = task["inputs"]["artifacts"]
    assert taken.keys() == {"rollouts", "rewards", "critic"}
    nodes, _ = tasks_in(bucket, RUN)
    recorded = next(node.record for node in nodes if node.record.stage == "advantages")
    for name, given in taken.items():
        importer = root["dag"]["tasks"][given["taskOutputArtifact"]["producerTask"]]
        component = document["components"][importer["componentRef"]["name"]]
        spec = executors[component["executorLabel"]]["importer"]
        source = recorded.inputs[name]
        assert spec["metadata"] == {"sha256": source.sha256, "record": source.record}
        assert spec["artifactUri"] == {"runtimeParameter": "uri"}  # a parameter of the DAG that it stands in
        assert defaults[importer["inputs"]["parameters"]["uri"]["componentInputParameter"]] == source.uri
        assert "reimport" not in spec
    parameters = {
        name: value["runtimeValue"]["constant"]
        for name, value in task["inputs"]["parameters"].items()
        if "runtimeValue" in value
    }
    assert (parameters["block_start"], parameters["offset"]) == (1, 0)
    assert json.loads(parameters["section"]) == recorded.section


def test_what_follows_takes_what_was_made_before(bucket: str) -> None:
    document, _ = compiled(bucket, "advantages", None, "", True, ["advantages.alpha=0.5"])
    tasks = document["root"]["dag"]["tasks"]
    stages = {name for name in tasks if not name.startswith("importer")}
    assert stages == {
        *("advantages", "ppo-update", "history", "history-2", "rollout", "verification", "evaluation", "report"),
    }
    update = tasks["ppo-update"]["inputs"]["artifacts"]
    assert update["experience"]["taskOutputArtifact"]["producerTask"] == "advantages"
    assert update["policy"]["taskOutputArtifact"]["producerTask"].startswith("importer")
    assert tasks["ppo-update"]["cachingOptions"]["enableCache"]
    section = tasks["advantages"]["inputs"]["parameters"]["section"]["runtimeValue"]["constant"]
    assert json.loads(section)["alpha"] == 0.5


def test_the_command_writes_it(bucket: str, tmp_path: Path) -> None:
    file = tmp_path / "again.yaml"
    done = vapo("rerun", RUN, "--stage", "report", "--store", bucket, "--compile", file)
    assert done.returncode == 0, done.stderr
    assert load_component_from_text(file.read_text()).name == "vapo-tiny"
    assert_refused(vapo("rerun", "nobody", "--stage", "report", "--store", bucket, "--compile", file), "nobody", RUN)


def test_it_is_submitted_as_a_version_of_the_pipeline(bucket: str, kfp: KfpServer) -> None:
    done = vapo("rerun", RUN, "--stage", "advantages", "--store", bucket, "--host", kfp.url)
    assert done.returncode == 0, done.stderr
    (pipeline,), (version,), (run,) = kfp.pipelines.values(), kfp.versions.values(), kfp.runs.values()
    assert pipeline["name"] == "vapo-tiny"
    names = ("pipeline_id", "pipeline_version_id")
    assert run["pipeline_version_reference"] == {name: version[name] for name in names}
    assert run["run_id"] in done.stdout
    asked = version["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
    parameters = {name: given["defaultValue"] for name, given in asked.items()}
    parameters |= run["runtime_config"].get("parameters", {})
    recorded = next(node.record for node in tasks_in(bucket, RUN)[0] if node.record.stage == "advantages")
    uris = {value for value in parameters.values() if "://" in str(value)}
    assert uris == {"s3://bucket/root", *(source.uri for source in recorded.inputs.values())}
    # Another rerun is another version of the same pipeline, since the cluster's cache is per pipeline.
    assert vapo("rerun", RUN, "--stage", "report", "--store", bucket, "--host", kfp.url).returncode == 0
    assert (len(kfp.pipelines), len(kfp.versions), len(kfp.runs)) == (1, 2, 2)


def test_what_no_pod_can_read_is_refused(undisturbed: Undisturbed) -> None:
    store = undisturbed.workdir / ".vapo"
    page = next(store.glob("artifacts/*/report/record.json"))
    with pytest.raises(UserError, match=r"no pod can read"):
        recompiled(*tasks_in(str(store), json.loads(page.read_text())["run"]), "advantages")
    done = vapo("rerun", folder_of(undisturbed.done.stdout).name, "--stage", "report", "--compile", "x.yaml")
    assert_refused(done, "--store")
