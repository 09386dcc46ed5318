"""From one segment's run to the next: by who waits, by the run's own last task, and by both at once; always one run.

What is handed over is written by the real stage into a real S3 server.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from pipelines.attending import attend
from pipelines.cluster import Cluster, connect
from pipelines.compiling import compile_pipeline
from pipelines.seaweed import BUCKET, SeaweedFS
from pipelines.segments import handed, parameters_from, segments
from pipelines.submitting import Order, Submission, submit
from tests.pipelines.kfp_server import KfpServer
from vapo.errors import UserError
from vapo.recipe import Recipe, Section, load_recipe
from vapo.segments import hand_off
from vapo.stage import execute

SECRET = "chain.secret=vapo-segments"
TOKEN = "the-chains-token"
HandsOver = Callable[..., dict[str, Any]]


@pytest.fixture
def store(seaweed: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{tmp_path.name}"


def recipe_of(store: str, *settings: str) -> Recipe:
    return load_recipe("tiny", [f"runtime.store={store}", "iterations=2", "iterations_per_run=1", *settings])


@pytest.fixture
def cluster(kfp: KfpServer) -> Cluster:
    return connect(kfp.url)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=160)


@pytest.fixture
def hands_over(store: str, tmp_path: Path) -> HandsOver:
    """What the task hand-off of segment 1 does; `stopped`: the target is reached."""

    def done(chain: str, *, stopped: bool = False) -> dict[str, Any]:
        path = tmp_path / "handed_over"
        names = handed(True)
        sources = {
            name: {"uri": f"{store}/artifacts/{name}", "sha256": f"{number:064x}", "record": f"{number + 100:064x}"}
            for number, name in enumerate(names)
        }
        where = {"store": store, "chain": chain, "segment": 1, "segments": 2, "stopped": stopped}
        hand_off(Section(), handed_over=path, sources=sources, **where, **dict.fromkeys(names, tmp_path))
        return json.loads(path.read_text())

    return done


def in_the_cluster(
    kfp: KfpServer, run: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """What the task next-segment of a run does there, with its Secret; returns what it left.

    Its parameters are the run's: those that were given, else the pipeline's defaults.
    """
    version = kfp.versions[run["pipeline_version_reference"]["pipeline_version_id"]]
    spec = version["pipeline_spec"]["pipeline_spec"]
    task = spec["root"]["dag"]["tasks"]["next-segment"]["inputs"]["parameters"]
    defaults = {k: v.get("defaultValue") for k, v in spec["root"]["inputDefinitions"]["parameters"].items()}
    known = defaults | run["runtime_config"]["parameters"]
    own = ("recipe", "submission")  # besides, what its pod's placeholders need
    values = {name: known[task[name]["componentInputParameter"]] for name in own}
    section = json.loads(task["section"]["runtimeValue"]["constant"]) | {"api": kfp.url}
    (folder / "token").write_text(TOKEN)
    monkeypatch.setenv("VAPO_KFP_TOKEN_FILE", str(folder / "token"))
    outputs = {"submitted": str(folder / "submitted" / "submitted")}
    inputs = {"handed_over": {"path": str(folder / "handed_over")}}
    made = execute(
        {
            "stage": "next_segment",
            "section": json.dumps(section),
            "parameters": values,
            "inputs": inputs,
            "outputs": outputs,
            "asked": 0.0,
        }
    )
    assert set(made) == {"submitted"}
    monkeypatch.delenv("VAPO_KFP_TOKEN_FILE")
    return json.loads(Path(outputs["submitted"]).read_text())


def one_version_behind(kfp: KfpServer, name: str) -> dict[str, Any]:
    return next(run for run in kfp.runs.values() if run["display_name"] == name)


def test_who_waits_submits_the_next_segment(
    kfp: KfpServer, cluster: Cluster, store: str, console: Console, hands_over: HandsOver
) -> None:
    kfp.scenario = [("SUCCEEDED", [])]
    order = Order("mine", "runner")
    first = submit(recipe_of(store), cluster, order, name="chain").run
    said = hands_over("chain")
    attend(cluster, first, console, 0.01)
    assert [run["display_name"] for run in kfp.runs.values()] == ["chain-1", "chain-2"]
    second = one_version_behind(kfp, "chain-2")
    assert second["state"] == "SUCCEEDED"
    given = second["runtime_config"]["parameters"]
    assert parameters_from(said).items() <= given.items()
    assert json.loads(given["submission"])["experiment"] == "mine"
    assert (second["service_account"], second["description"]) == ("runner", "segment 2 of 2 of chain")
    assert second["experiment_id"] == first.experiment_id
    assert [pipeline["name"] for pipeline in kfp.pipelines.values()] == ["vapo-tiny"]
    assert "run chain-2: succeeded" in console.file.getvalue()
    # Attaching once more to the first finds what is there.
    attend(cluster, first, console, 0.01)
    assert len(kfp.runs) == 2


def test_the_runs_last_task_submits_the_next_segment(
    kfp: KfpServer,
    cluster: Cluster,
    store: str,
    console: Console,
    hands_over: HandsOver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With its own token; and whoever waits follows, creates nothing, and needs no way into the store."""
    kfp.scenario = [("SUCCEEDED", [])]
    first = submit(recipe_of(store, SECRET), cluster, Order("mine", "runner"), name="chain").run
    said = hands_over("chain")
    submitted = in_the_cluster(kfp, kfp.runs[first.run_id], tmp_path, monkeypatch)
    second = one_version_behind(kfp, "chain-2")
    assert submitted == {"run": second["run_id"], "name": "chain-2", "segment": 2}
    assert {header for _, header in kfp.asked} == {"", f"Bearer {TOKEN}"}
    assert parameters_from(said).items() <= second["runtime_config"]["parameters"].items()
    assert (second["service_account"], second["experiment_id"]) == ("runner", first.experiment_id)
    # The task may be tried again: it finds the run that it had created.
    assert in_the_cluster(kfp, kfp.runs[first.run_id], tmp_path, monkeypatch) == submitted
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    attend(cluster, first, console, 0.01)
    assert kfp.count("run_service_create_run") == len(kfp.runs) == 2
    assert "run chain-2: succeeded" in console.file.getvalue()


def test_what_the_cluster_compiles_is_what_was_compiled_here(
    kfp: KfpServer, cluster: Cluster, store: str, hands_over: HandsOver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next segment's pipeline is made of the recipe that the run carries: same content, same cache."""
    recipe = recipe_of(store, SECRET)
    first: Submission = submit(recipe, cluster, Order(), name="chain")
    hands_over("chain")
    in_the_cluster(kfp, kfp.runs[first.run.run_id], tmp_path, monkeypatch)
    reference = one_version_behind(kfp, "chain-2")["pipeline_version_reference"]
    uploaded = kfp.versions[reference["pipeline_version_id"]]["pipeline_spec"]
    compiled = list(yaml.safe_load_all(compile_pipeline(recipe, share=True, segment=segments(recipe)[1])))
    assert [uploaded["pipeline_spec"], uploaded["platform_spec"]] == compiled


@pytest.mark.parametrize("settings", [(), (SECRET,)])
def test_a_chain_that_has_reached_its_target(
    kfp: KfpServer, cluster: Cluster, store: str, console: Console, hands_over: HandsOver, settings: tuple[str, ...]
) -> None:
    kfp.scenario = [("SUCCEEDED", [])]
    recipe = recipe_of(store, "target_accuracy=0.9", *settings)
    first = submit(recipe, cluster, Order(), name="chain").run
    hands_over("chain", stopped=True)
    attend(cluster, first, console, 0.01)
    assert len(kfp.runs) == 1
    assert "no segment 2 of 2 follows: the target accuracy was reached" in console.file.getvalue()


def test_without_the_stores_credentials(
    kfp: KfpServer,
    cluster: Cluster,
    store: str,
    console: Console,
    hands_over: HandsOver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kfp.scenario = [("SUCCEEDED", [])]
    first = submit(recipe_of(store), cluster, Order(), name="chain").run
    with pytest.raises(UserError, match="segment 1 of chain has handed nothing over there"):
        attend(cluster, first, console, 0.01)
    hands_over("chain")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match=f"AWS_SECRET_ACCESS_KEY must be set .*'vapo watch {first.run_id} --host"):
        attend(cluster, first, console, 0.01)
    assert len(kfp.runs) == 1


def test_a_parameter_of_a_stage_that_later_segments_lack(kfp: KfpServer, cluster: Cluster, store: str) -> None:
    """What the first run was given for its base model says nothing to the second, and is no mistake there."""
    with pytest.raises(UserError, match="the pipeline has no such parameter"):
        submit(recipe_of(store), cluster, Order(parameters={"base_model_memory": "1Gi"}))
    facts = {name: {"uri": "s3://b/x", "sha256": "0", "record": "1"} for name in handed(True)}
    said = {"chain": "chain", "segment": 1, "segments": 2, "stopped": False, "artifacts": facts}
    made = submit(recipe_of(store), cluster, Order(parameters={"base_model_memory": "1Gi"}), handed_over=said)
    assert made.run.display_name == "chain-2"


# The task in the graph


def test_the_task_stands_where_another_segment_follows(store: str) -> None:
    recipe = recipe_of(store, SECRET)
    first, last = (list(yaml.safe_load_all(compile_pipeline(recipe, share=True, segment=s))) for s in segments(recipe))
    assert "next-segment" not in last[0]["root"]["dag"]["tasks"]
    task = first[0]["root"]["dag"]["tasks"]["next-segment"]
    assert task["dependentTasks"] == ["hand-off"]
    assert not task["cachingOptions"].get("enableCache")  # a chain that is served from the cache goes on all the same
    without = compile_pipeline(recipe_of(store), share=True, segment=segments(recipe)[0])
    assert "next-segment" not in without
    assert "vapo-segments" not in without


def test_the_token_is_mounted_into_that_task_alone(store: str) -> None:
    recipe = recipe_of(store, SECRET)
    document, platforms = yaml.safe_load_all(compile_pipeline(recipe, share=True, segment=segments(recipe)[0]))
    executors = platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    (label,) = [name for name, found in executors.items() if "secretAsVolume" in found]
    (mounted,) = executors[label]["secretAsVolume"]
    assert (mounted["secretName"], mounted["optional"]) == ("vapo-segments", False)
    with_file = {
        name: variable["value"]
        for name, executor in document["deploymentSpec"]["executors"].items()
        for variable in executor["container"].get("env", [])
        if variable["name"] == "VAPO_KFP_TOKEN_FILE"
    }
    assert with_file == {label: f"{mounted['mountPath']}/VAPO_KFP_TOKEN"}
