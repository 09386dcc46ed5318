"""OpenLineage events of a stage, as an HTTP server gets them; and what a stage does when there is none."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.running import environment, events_in
from vapo.lineage.openlineage import configured, dataset
from vapo.recipe import Problems, Verification
from vapo.schemas import PROMPTS
from vapo.stage import Job, execute

openlineage = pytest.importorskip("openlineage.client")
RUN, SALT = "5f0c1f9e-2b7a-4a52-9d7e-0d5b7a3c9e11", "c1c9a8de-8f5e-4b44-b9a3-4bfa2a1f3f6e"
ROOT = f"s3://a-bucket/artifacts/vapo-x/{RUN}/problems/{SALT}"
SECTION = Problems(train=8, heldout=4, examples=2, min_steps=3, max_steps=4).model_dump_json()


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What a server got at the path that Marquez has."""
    got: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(201 if self.path == "/api/v1/lineage" else 404)
            self.end_headers()
            got.append(body)

        def log_message(self, *arguments: Any) -> None:
            del arguments

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name in (
        "OPENLINEAGE__TRANSPORT__TRANSPORTS__DEFAULT_HTTP__TYPE",
        "OPENLINEAGE__TRANSPORT__TRANSPORTS__DEFAULT_HTTP__URL",
    ):
        monkeypatch.setenv(name, "")  # the library sets them; afterwards they are gone
        monkeypatch.delenv(name)
    monkeypatch.setenv("OPENLINEAGE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield got
    server.shutdown()
    thread.join()
    server.server_close()


def job(folder: Path) -> dict[str, Any]:
    outputs = {name: str(folder / name) for name in ("train_prompts", "heldout_prompts", "examples", "metrics")}
    uris = {name: f"{ROOT}/{name}" for name in outputs}
    return asdict(Job("problems", SECTION, {"seed": 3}, {}, outputs, time.time(), "image:1", uris))


def check(event: dict[str, Any]) -> None:
    """What OpenLineage's specification requires, checked by the library's own classes."""
    from openlineage.client import event_v2, facet_v2

    UUID(event["run"]["runId"])
    made = event_v2.RunEvent(
        eventTime=event["eventTime"],
        run=event_v2.Run(event["run"]["runId"]),
        job=event_v2.Job(event["job"]["namespace"], event["job"]["name"]),
        eventType=event_v2.RunState[event["eventType"]],
    )
    assert made.schemaURL == event["schemaURL"]
    assert event["producer"].startswith("urn:vapo:")
    facets = [*event["run"]["facets"].values(), *event["job"]["facets"].values()]
    for part in event["inputs"] + event["outputs"]:
        assert part["namespace"]
        assert part["name"]
        facets += [*part.get("facets", {}).values(), *part.get("outputFacets", {}).values()]
    for facet in facets:
        assert facet["_producer"]
        assert facet["_schemaURL"].startswith("https://openlineage.io/spec/facets/")
    parent = event["run"]["facets"]["parent"]
    facet_v2.parent_run.Run(parent["run"]["runId"])


def test_a_stage_starts_and_completes(target: list[dict[str, Any]], tmp_path: Path) -> None:
    found = execute(job(tmp_path))
    assert [event["eventType"] for event in target] == ["START", "COMPLETE"]
    for event in target:
        check(event)
        assert (event["job"]["namespace"], event["job"]["name"]) == ("vapo", "problems")
        assert event["run"]["facets"]["parent"]["run"]["runId"] == RUN
        tags = {tag["key"]: tag["value"] for tag in event["run"]["facets"]["tags"]["tags"]}
        assert tags["image"] == "image:1"
        assert tags["seed"] == "3"
        assert "sourceCodeLocation" not in event["job"]["facets"]  # a repository's address may hold credentials
    assert target[0]["run"]["runId"] == target[1]["run"]["runId"]
    outputs = {output["name"].rpartition("/")[2]: output for output in target[1]["outputs"]}
    assert {output["namespace"] for output in outputs.values()} == {"s3://a-bucket"}
    prompts = outputs["train_prompts"]
    assert prompts["name"] == f"artifacts/vapo-x/{RUN}/problems/{SALT}/train_prompts"
    assert prompts["facets"]["version"]["datasetVersion"] == found["train_prompts"]["sha256"]
    assert [field["name"] for field in prompts["facets"]["schema"]["fields"]] == PROMPTS.names
    assert prompts["outputFacets"]["outputStatistics"]["rowCount"] == 8
    assert prompts["outputFacets"]["outputStatistics"]["size"] == found["train_prompts"]["bytes"]
    assert "schema" not in outputs["metrics"]["facets"]


def test_a_stage_that_fails_says_why_and_what_it_read(target: list[dict[str, Any]], tmp_path: Path) -> None:
    execute(job(tmp_path / "problems"))
    target.clear()
    missing = str(tmp_path / "rollouts")
    prompts = {"path": str(tmp_path / "problems" / "train_prompts"), "uri": f"{ROOT}/train_prompts", "sha256": "0" * 64}
    inputs = {"prompts": prompts, "rollouts": {"path": missing, "uri": missing}}
    outputs = {"rewards": str(tmp_path / "rewards")}
    parameters = {"iteration": 1, "purpose": "evaluation"}
    failing = asdict(Job("verification", Verification().model_dump_json(), parameters, inputs, outputs, time.time()))
    with pytest.raises(ValueError, match="prompts"):
        execute(failing)
    assert [event["eventType"] for event in target] == ["START", "FAIL"]
    for event in target:
        check(event)
        assert event["job"]["name"] == "verification.evaluation"
    assert "was changed since it was written" in target[1]["run"]["facets"]["errorMessage"]["message"]
    assert [(part["namespace"], part["name"].rpartition("/")[2]) for part in target[1]["inputs"]] == [
        ("s3://a-bucket", "train_prompts"),
        ("file", "rollouts"),
    ]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("OPENLINEAGE_URL", "no URL at all", "OpenLineage events are not sent: "),
        ("OPENLINEAGE__TRANSPORT", '{"type": "unheard-of"}', "OpenLineage events are not sent: "),
        ("OPENLINEAGE_URL", "http://127.0.0.1:9", "OpenLineage events are not sent: "),
    ],
)
def test_what_is_wrong_with_the_target_is_one_warning(
    name: str,
    value: str,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    target: list[dict[str, Any]],
) -> None:
    monkeypatch.delenv("OPENLINEAGE_URL")
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__TRANSPORTS__DEFAULT_HTTP__RETRY", '{"total": 0}')
    monkeypatch.setenv(name, value)
    assert execute(job(tmp_path)).keys() == {"train_prompts", "heldout_prompts", "examples", "metrics"}
    warnings = [event for event in events_in(capsys.readouterr().out) if event["vapo"] == "warning"]
    assert len(warnings) == 1
    assert warnings[0]["message"].startswith(said)
    assert "\n" not in warnings[0]["message"]
    assert target == []


def test_a_library_that_is_missing_is_one_warning_with_the_cure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, target: list[dict[str, Any]]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "openlineage"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Hidden(), *sys.meta_path])
    execute(job(tmp_path))
    (warning,) = (event for event in events_in(capsys.readouterr().out) if event["vapo"] == "warning")
    assert "pip install 'vapo[openlineage]'" in warning["message"]
    assert target == []


class _Hidden:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "openlineage":
            raise ModuleNotFoundError(f"No module named {name!r}", name="openlineage")


def test_without_a_target_nothing_is_imported(tmp_path: Path) -> None:
    program = (
        "import json, sys; from vapo.stage import execute; execute(json.loads(sys.argv[1]));"
        "sys.exit(any(name.startswith(('openlineage', 'requests')) for name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(job(tmp_path))],
        env={**environment(), "HOME": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0


def test_where_a_target_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not configured()
    (tmp_path / "openlineage.yml").write_text("transport: {type: console}")
    assert configured()
    monkeypatch.setenv("OPENLINEAGE_DISABLED", "true")
    assert not configured()


def test_names_of_datasets() -> None:
    assert dataset("minio://mlpipeline/v2/x") == ("minio://mlpipeline", "v2/x")
    assert dataset("/a/b") == ("file", "/a/b")
    assert dataset("file:///a/b") == ("file", "/a/b")
