"""Records in a store, as a cluster's tasks leave them: found by run and by digest, verified where the artifacts are."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.compiling import compile_pipeline
from pipelines.lineage import lineage_in
from pipelines.seaweed import BUCKET, SeaweedFS
from tests.lineage.conftest import Made
from tests.running import assert_refused, vapo
from vapo.errors import UserError
from vapo.lineage.graph import read_nodes
from vapo.lineage.record import Record, as_text, digest_of
from vapo.lineage.records import STORE, Records
from vapo.lineage.verify import verify
from vapo.recipe import Problems, load_recipe
from vapo.stage import Job, execute

RUN, EARLIER = "5f0c1f9e-2b7a-4a52-9d7e-0d5b7a3c9e11", "1a0c1f9e-2b7a-4a52-9d7e-0d5b7a3c9e22"
SALT = "c1c9a8de-8f5e-4b44-b9a3-4bfa2a1f3f6e"


@dataclass
class Cluster:
    """What a run on a cluster leaves: records in one place of a bucket, artifacts in another, checkpoints' objects."""

    server: SeaweedFS
    store: str
    uris: dict[str, str]  # of every artifact, by "STAGE/NAME"

    def key(self, artifact: str) -> str:
        return self.uris[artifact].split("/", 3)[3]

    def change(self, artifact: str, content: bytes | None) -> None:
        import io

        client = self.server.client()
        client.remove_object(BUCKET, self.key(artifact))
        if content is not None:
            client.put_object(BUCKET, self.key(artifact), io.BytesIO(content), len(content))


@pytest.fixture
def cluster(made: Made, seaweed: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The lineage of `made` as Kubeflow's launcher leaves it; an earlier run made the problems and the base model."""
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("VAPO_CACHE", raising=False)
    store, root = f"s3://{BUCKET}/{tmp_path.name}/store", f"{tmp_path.name}/artifacts"
    client, records = seaweed.client(), Records(store)
    renamed: dict[str, str] = {}
    uris: dict[str, str] = {}
    for node in sorted(read_nodes(made.root), key=lambda node: node.record.started):
        record = node.record
        run = EARLIER if record.stage in ("problems", "base_model") else RUN
        data = record.model_dump(mode="json") | {"run": run}
        for name, output in data["outputs"].items():
            key = f"{root}/vapo-x/{run}/{record.stage}/{SALT}/{name}"
            client.fput_object(BUCKET, key, output["path"])
            uris[f"{record.stage}/{name}"] = output["uri"] = f"s3://{BUCKET}/{key}"
            output["path"] = f"/gone/{name}"
        for source in data["inputs"].values():
            source["record"] = renamed[source["record"]]
        kept = Record.model_validate(data)
        if record.stage != "other":
            records.add(kept)
        renamed[node.digest] = digest_of(as_text(kept))
    shutil.rmtree(made.root)
    return Cluster(seaweed, store, uris)


def test_a_run_leads_back_through_what_earlier_runs_left(cluster: Cluster) -> None:
    graph = lineage_in(cluster.store, RUN)
    assert [node.name for node in graph.nodes] == [
        "report",
        "ppo_update of iteration 1",
        "rollout of iteration 1",
        "base_model",
        "problems",
    ]
    assert graph.target == "page"
    assert graph.unknown == ()
    assert {node.record.run for node in graph.nodes} == {RUN, EARLIER}
    assert verify(graph) == []
    policy = lineage_in(cluster.store, RUN, iteration=1)
    assert (policy.target, len(policy.nodes)) == ("new_policy", 4)
    assert lineage_in(cluster.store, policy.sha256[:8]).nodes == policy.nodes


@pytest.mark.parametrize("content", [None, b"tampered"])
def test_what_was_removed_or_altered_in_the_bucket_is_named(cluster: Cluster, content: bytes | None) -> None:
    cluster.change("rollout/rollouts", content)
    wrong = verify(lineage_in(cluster.store, RUN))
    assert len(wrong) == 3
    assert wrong[0].startswith(
        "rollout of iteration 1: rollouts " + ("is missing" if content is None else "was changed")
    )
    assert cluster.uris["rollout/rollouts"] in wrong[0]
    assert wrong[1].startswith("ppo_update of iteration 1: made from rollouts")


def test_a_checkpoints_object_is_recomputed_too(cluster: Cluster, made: Made) -> None:
    (stored,) = (path for path in made.store.glob("objects/*/*") if path.read_text() == "second")
    stored.write_text("others")
    wrong = verify(lineage_in(cluster.store, RUN))
    assert wrong[0].startswith("ppo_update of iteration 1: new_policy: policy checkpoint")
    assert "model.safetensors" in wrong[0]


def test_a_record_that_was_altered_is_as_good_as_not_there(cluster: Cluster) -> None:
    prefix = f"{cluster.store.split('/', 3)[3]}/records"
    node = next(node for node in lineage_in(cluster.store, RUN).nodes if node.record.stage == "problems")
    cluster.uris["record"] = f"s3://{BUCKET}/{prefix}/{node.digest}.json"
    cluster.change("record", as_text(node.record.model_copy(update={"seed": 4})).encode())
    graph = lineage_in(cluster.store, RUN)
    assert len(graph.nodes) == 4
    assert all(line.startswith("no record of who made") for line in verify(graph))


def test_the_command_line_reads_the_bucket(cluster: Cluster, tmp_path: Path) -> None:
    given = ("--store", cluster.store, "--workdir", tmp_path / "w")
    variables = cluster.server.environment
    done = vapo("lineage", RUN, *given, "--verify", "--html", tmp_path / "x.html", **variables)
    assert done.returncode == 0, done.stderr
    assert "5 stages, 5 artifacts, all as recorded" in done.stdout
    assert RUN in (tmp_path / "x.html").read_text()
    cluster.change("problems/prompts", None)
    done = vapo("lineage", RUN, *given, "--verify", **variables)
    assert done.returncode == 1
    assert done.stderr.startswith(f"problems: prompts is missing: {cluster.uris['problems/prompts']}")
    assert_refused(vapo("lineage", "no-such", *given, **variables), "no record of run 'no-such'", EARLIER, RUN)


# What a stage does


def problems_job(folder: Path, run: str) -> dict[str, Any]:
    section = Problems(train=8, heldout=4, examples=2, min_steps=3, max_steps=4).model_dump_json()
    outputs = {name: str(folder / name) for name in ("train_prompts", "heldout_prompts", "examples", "metrics")}
    uris = {name: f"minio://mlpipeline/v2/artifacts/vapo-x/{run}/problems/{SALT}/{name}" for name in outputs}
    return asdict(Job("problems", section, {"seed": 3}, {}, outputs, time.time(), "image:1", uris))


@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_a_stage_keeps_its_record(
    where: str, seaweed: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    store = f"s3://{BUCKET}/{tmp_path.name}" if where == "bucket" else str(tmp_path / "kept")
    monkeypatch.setenv(STORE, store)
    found = execute(problems_job(tmp_path / "task", RUN))
    (digest,) = {facts["record"] for facts in found.values()}
    records = Records(store)
    assert records.runs() == {RUN}
    assert records.of_run(RUN).keys() == {digest}
    assert as_text(records.get([digest])[digest]) == (tmp_path / "task" / "record.json").read_text()
    assert found["examples"]["lineage"]["run"] == RUN
    assert json.loads((tmp_path / "task" / "record.json").read_text())["parents"] == []


@pytest.mark.parametrize(
    ("store", "variables", "said"),
    [
        ("s3://no-such-bucket/x", {}, "there is no bucket 'no-such-bucket'"),
        (f"s3://{BUCKET}/x", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "refused the credentials"),
        ("/proc/none", {}, f"{STORE}=/proc/none: cannot keep the stage's record there"),
    ],
)
def test_a_record_that_cannot_be_kept_fails_the_stage(
    store: str,
    variables: dict[str, str],
    said: str,
    seaweed: SeaweedFS,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {**seaweed.environment, **variables, STORE: store}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        execute(problems_job(tmp_path, RUN))


@pytest.mark.parametrize(
    ("store", "share", "wanted"),
    [
        (f"s3://{BUCKET}/x", True, {f"s3://{BUCKET}/x"}),
        (f"s3://{BUCKET}/x", False, {None}),
        ("/a/folder", True, {None}),
    ],
)
def test_on_a_cluster_every_stage_keeps_its_record_where_the_checkpoints_are(
    store: str, share: bool, wanted: set[str | None]
) -> None:
    ir = next(yaml.safe_load_all(compile_pipeline(load_recipe("tiny", [f"runtime.store={store}"]), share=share)))
    containers = [executor["container"] for executor in ir["deploymentSpec"]["executors"].values()]
    assert len(containers) >= 10
    assert {{v["name"]: v["value"] for v in container["env"]}.get(STORE) for container in containers} == wanted
