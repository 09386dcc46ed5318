"""A recipe becomes a run on a cluster: uploaded once per content, created once per name, whatever the network does."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from kfp_server_api import V2beta1Run

from pipelines import submitting, uploading
from pipelines.cluster import Cluster, NoAnswer, connect
from pipelines.compiling import compile_pipeline
from pipelines.parameters import arguments_of, parsed
from pipelines.submitting import Order, create_once, named, submit
from tests.pipelines.kfp_server import Fault, KfpServer
from vapo.errors import UserError
from vapo.recipe import Recipe, load_recipe

RUNS, PIPELINES = r"/runs$", r"/pipelines$"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("tiny", ["runtime.store=s3://bucket/prefix"])


@pytest.fixture
def cluster(kfp: KfpServer, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setattr(uploading, "WAITS", (0.01,) * 3)
    return connect(kfp.url)


def test_what_is_submitted(kfp: KfpServer, cluster: Cluster, recipe: Recipe) -> None:
    made = submit(recipe, cluster, Order("mine", "runner"))
    (run,), (version,), (experiment,) = kfp.runs.values(), kfp.versions.values(), kfp.experiments.values()
    assert (run["run_id"], run["experiment_id"]) == (made.run.run_id, experiment["experiment_id"])
    assert run["display_name"].startswith("tiny-20")
    assert run["service_account"] == "runner"
    assert run["pipeline_version_reference"]["pipeline_version_id"] == version["pipeline_version_id"]
    assert experiment["display_name"] == "mine"
    compiled = compile_pipeline(recipe, share=True)
    assert version["name"] == hashlib.sha256(compiled.encode()).hexdigest()[:16] == made.version
    parameters = version["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
    assert parameters["store"]["defaultValue"] == "s3://bucket/prefix"


def test_the_same_recipe_is_uploaded_once(kfp: KfpServer, cluster: Cluster, recipe: Recipe) -> None:
    first, second = (submit(recipe, cluster, Order()) for _ in range(2))
    assert (first.uploaded, second.uploaded) == (True, False)
    assert kfp.count("upload_pipeline_version") == 1
    assert kfp.count("experiment_service_create_experiment") == 1
    assert len({run["pipeline_version_reference"]["pipeline_version_id"] for run in kfp.runs.values()}) == 1
    assert len(kfp.runs) == 2


def test_a_changed_recipe_is_another_version_of_the_same_pipeline(
    kfp: KfpServer, cluster: Cluster, recipe: Recipe
) -> None:
    """The cluster's cache is by the pipeline's name: a new pipeline would compute everything again."""
    submit(recipe, cluster, Order())
    changed = load_recipe("tiny", ["runtime.store=s3://bucket/prefix", "ppo_update.clip_high=0.3"])
    assert submit(changed, cluster, Order()).uploaded
    assert [pipeline["name"] for pipeline in kfp.pipelines.values()] == ["vapo-tiny"]
    assert len(kfp.versions) == 2


def test_with_many_users_everything_is_in_the_namespace(kfp: KfpServer, cluster: Cluster, recipe: Recipe) -> None:
    kfp.multi_user = True
    submit(recipe, connect(kfp.url, namespace="me"), Order())
    assert {found["namespace"] for found in (*kfp.pipelines.values(), *kfp.experiments.values())} == {"me"}


def test_a_forbidden_namespace(kfp: KfpServer, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server sends the token back, and nobody sees it."""
    monkeypatch.setenv("VAPO_KFP_TOKEN", "a-token")
    kfp.multi_user, kfp.forbidden = True, ("theirs",)
    with pytest.raises(UserError, match=r"forbids it in namespace 'theirs' \(403: Bearer \*\*\* is not authorized"):
        submit(recipe, connect(kfp.url, namespace="theirs"), Order())


@pytest.mark.parametrize("store", ["", "s3", "/data/store"])
def test_a_store_that_pods_do_not_share(kfp: KfpServer, cluster: Cluster, store: str) -> None:
    with pytest.raises(UserError, match=r"runtime.store = .*give a bucket, --store s3://bucket/prefix"):
        submit(load_recipe("tiny", [f"runtime.store={store!r}"]), cluster, Order())
    assert not kfp.pipelines


# Parameters


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["rollout_memory"], "write --param name=value"),
        (["no_such=1"], "the pipeline has no such parameter"),
        (["seed=1"], "the recipe says it: use --set"),
        (["rollout_section={}"], "the recipe says it: use --set"),
    ],
)
def test_a_wrong_parameter(cluster: Cluster, recipe: Recipe, texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        submit(recipe, cluster, Order(parameters=parsed(texts)))


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("STRING", "128Gi", "128Gi"),
        ("STRING", "7", "7"),
        ("NUMBER_INTEGER", "7", 7),
        ("NUMBER_DOUBLE", "7", 7),
        ("BOOLEAN", "true", True),
        ("STRUCT", '{"a": 1}', {"a": 1}),
        ("NUMBER_INTEGER", "7.5", None),
        ("NUMBER_INTEGER", "true", None),
        ("BOOLEAN", "yes", None),
    ],
)
def test_a_parameter_has_the_pipelines_type(kind: str, text: str, value: Any) -> None:
    ir = f"root: {{inputDefinitions: {{parameters: {{rollout_memory: {{parameterType: {kind}}}}}}}}}"
    if value is None:
        with pytest.raises(UserError, match=f"--param rollout_memory={text}: it must be a "):
            arguments_of(ir, {"rollout_memory": text})
    else:
        assert arguments_of(ir, {"rollout_memory": text}) == {"rollout_memory": value}


# Created once


@pytest.mark.parametrize("fault", [{"done": True}, {}, {"status": 504, "done": True}, {"status": 503}])
@pytest.mark.parametrize("path", [RUNS, PIPELINES, "/upload_version$", "/experiments$"])
def test_an_answer_that_does_not_come(
    kfp: KfpServer, cluster: Cluster, recipe: Recipe, path: str, fault: dict[str, Any]
) -> None:
    """The connection breaks off in mid-answer, or the gateway gives up; the request was done, or not."""
    kfp.faults.append(Fault("POST", path, **fault))
    made = submit(recipe, cluster, Order())
    assert not kfp.faults
    assert [len(kind) for kind in (kfp.pipelines, kfp.versions, kfp.experiments, kfp.runs)] == [1, 1, 1, 1]
    assert list(kfp.runs) == [made.run.run_id]


def test_it_gives_up_and_says_how_to_look(kfp: KfpServer, cluster: Cluster, recipe: Recipe) -> None:
    kfp.faults += [Fault("POST", RUNS) for _ in range(20)]
    with pytest.raises(NoAnswer, match="did not answer whether it created the run 'tiny-1': 'vapo watch tiny-1 --host"):
        submit(recipe, cluster, Order(), name="tiny-1")
    assert len(kfp.faults) == 20 - 1 - len(uploading.WAITS)


def test_a_name_that_is_there_is_not_created_again(kfp: KfpServer, cluster: Cluster, recipe: Recipe) -> None:
    first, second = (submit(recipe, cluster, Order(), name="chain-2") for _ in range(2))
    assert first.run.run_id == second.run.run_id
    assert len(kfp.runs) == 1


def test_two_at_once(kfp: KfpServer, cluster: Cluster, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both look, and find nothing, before either creates: one run is left, and both know it."""
    both_have_looked, looked = threading.Barrier(2, timeout=60), threading.local()

    def looking(*arguments: Any) -> list[Any]:
        found = named(*arguments)
        if not hasattr(looked, "once"):
            looked.once = True
            both_have_looked.wait()
        return found

    run = another(kfp.runs[submit(recipe, cluster, Order(), name="chain-1").run.run_id], "chain-2")
    monkeypatch.setattr(submitting, "named", looking)
    with ThreadPoolExecutor(2) as pool:
        kept = [found.run_id for found in pool.map(lambda _: create_once(cluster, run), range(2))]
    created = [found for found in kfp.runs.values() if found["display_name"] == "chain-2"]
    assert len(created) == 2
    assert [found["run_id"] for found in created if found["state"] == "PENDING"] == [kept[0]] == [kept[1]]


def another(body: dict[str, Any], name: str) -> V2beta1Run:
    """A run like one that is there, yet to be created."""
    fields = ("experiment_id", "pipeline_version_reference", "runtime_config")
    return V2beta1Run(display_name=name, **{field: body[field] for field in fields})


def test_two_at_once_keep_the_first(kfp: KfpServer, cluster: Cluster, recipe: Recipe) -> None:
    """Both look, both find nothing, both create: what remains running is the first one's, for both."""
    made = submit(recipe, cluster, Order(), name="chain-2")
    body = kfp.runs[made.run.run_id]
    twin = dict(body, run_id="ffffffff-0000-4000-8000-000000000000", created_at=body["created_at"])
    kfp.runs[twin["run_id"]] = twin
    kept = create_once(cluster, another(body, "chain-2"))
    first, second = sorted(kfp.runs)
    assert kept.run_id == first
    assert (kfp.runs[first]["state"], kfp.runs[second]["state"]) == ("PENDING", "CANCELING")
