"""A Kubeflow Pipelines server in memory: every request and every answer is held against the published description.

What breaks the description is refused and kept in `violations`. Runs do not execute anything: with each look at it a
run advances by one step of the `scenario`.
"""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from tests.pipelines.kfp_description import Operation, faults, find, query_faults

OUTPUT_ONLY = {"run_id", "state", "created_at", "finished_at", "error", "run_details", "state_history"}
TYPES = {"STRING": str, "NUMBER_INTEGER": int, "NUMBER_DOUBLE": (int, float), "BOOLEAN": bool}
ENDED = ("SUCCEEDED", "FAILED", "CANCELED")
Step = tuple[str, list[tuple[str, str]]]  # a run's state, and (name, state) of its tasks


class Refused(Exception):
    """An answer other than 200, as the server's gateway writes it."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass
class Fault:
    """What goes wrong with one request: a status instead of an answer, or a connection that breaks off."""

    method: str
    path: str  # pattern
    status: int = 0  # 0: the connection breaks off in mid-answer
    done: bool = False  # whether the request was carried out all the same


@dataclass
class KfpServer:
    """Its state, and how it behaves."""

    multi_user: bool = False
    tokens: tuple[str, ...] = ()  # that are let in; none: everybody is
    forbidden: tuple[str, ...] = ()  # namespaces
    scenario: list[Step] = field(default_factory=lambda: [("PENDING", []), ("RUNNING", []), ("SUCCEEDED", [])])
    page: str = ""  # a web page that is the answer to everything
    version: int = 2
    faults: list[Fault] = field(default_factory=list)
    url: str = ""
    pipelines: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, dict[str, Any]] = field(default_factory=dict)
    experiments: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)  # (operation, its Authorization header)
    violations: list[str] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    clock: datetime = datetime(2026, 11, 22, tzinfo=UTC)

    def count(self, operation: str) -> int:
        """How often it was asked for."""
        return sum(name == operation for name, _ in self.asked)

    def now(self) -> str:
        self.clock += timedelta(seconds=1)
        return self.clock.isoformat().replace("+00:00", "Z")

    # Operations, each named as in the description.

    def healthz_service_get_healthz(self) -> Any:
        return {"multi_user": self.multi_user, "pipeline_store": "database"}

    def pipeline_service_get_pipeline_by_name(self, name: str, namespace: str = "") -> Any:
        self._allowed(namespace)
        return self._one(self.pipelines, f"pipeline {name}", name=name, namespace=namespace)

    def pipeline_service_create_pipeline(self, body: dict[str, Any]) -> Any:
        self._allowed(body.get("namespace", ""))
        name = body.get("name") or body.get("display_name")
        return self._new(self.pipelines, "pipeline_id", {"namespace": "", **body, "name": name}, "name", "namespace")

    def pipeline_service_list_pipeline_versions(self, pipeline_id: str, **query: str) -> Any:
        self._one(self.pipelines, "pipeline", pipeline_id=pipeline_id)
        return self._page("pipeline_versions", self.versions, query, pipeline_id=pipeline_id)

    def pipeline_service_get_pipeline_version(self, pipeline_id: str, pipeline_version_id: str) -> Any:
        return self._one(self.versions, "version", pipeline_id=pipeline_id, pipeline_version_id=pipeline_version_id)

    def upload_pipeline_version(self, file: str, pipelineid: str, name: str, display_name: str = "") -> Any:
        self._one(self.pipelines, "pipeline", pipeline_id=pipelineid)
        documents = list(yaml.safe_load_all(file))
        json_format.ParseDict(documents[0], pipeline_spec_pb2.PipelineSpec())
        spec = {"pipeline_spec": documents[0], **({"platform_spec": documents[1]} if documents[1:] else {})}
        new = {"pipeline_id": pipelineid, "name": name, "display_name": display_name or name, "pipeline_spec": spec}
        return self._new(self.versions, "pipeline_version_id", new, "name", "pipeline_id")

    def experiment_service_list_experiments(self, namespace: str = "", **query: str) -> Any:
        self._allowed(namespace)
        return self._page("experiments", self.experiments, query, namespace=namespace)

    def experiment_service_create_experiment(self, body: dict[str, Any]) -> Any:
        self._allowed(body.get("namespace", ""))
        new = {"namespace": "", "storage_state": "AVAILABLE", **body}
        return self._new(self.experiments, "experiment_id", new, "display_name", "namespace")

    def run_service_create_run(self, body: dict[str, Any], experiment_id: str = "") -> Any:
        if wrong := OUTPUT_ONLY & set(body):
            raise Refused(400, 3, f"the server says {sorted(wrong)}, not the client")
        if not body.get("display_name"):
            raise Refused(400, 3, "The run name is empty. Please specify a valid name")
        self._one(self.experiments, "experiment", experiment_id=body.get("experiment_id") or experiment_id)
        version = self._one(self.versions, "version", **body["pipeline_version_reference"])
        self._check_parameters(version["pipeline_spec"]["pipeline_spec"], body["runtime_config"].get("parameters", {}))
        # A task's time in the year 1 is how the server says that it has not ended.
        return self._new(
            self.runs,
            "run_id",
            {**body, "state": "PENDING", "scheduled_at": self.now(), "finished_at": "1970-01-01T00:00:00Z"},
        )

    def run_service_get_run(self, run_id: str, experiment_id: str = "") -> Any:
        run = self._one(self.runs, f"run {run_id}", run_id=run_id)
        if run["state"] == "CANCELING":
            run["state"] = "CANCELED"
        if run["state"] not in ENDED:
            step = self.steps.get(run_id, 0)
            self.steps[run_id] = min(step + 1, len(self.scenario) - 1)
            self._advance(run, *self.scenario[step])
        return run

    def run_service_list_runs(self, namespace: str = "", experiment_id: str = "", **query: str) -> Any:
        if self.multi_user and not namespace and not experiment_id:
            raise Refused(400, 3, "ListRuns must filter by namespace or experiment in multi-user mode")
        self._allowed(namespace, given=bool(namespace))
        return self._page("runs", self.runs, query, **({"experiment_id": experiment_id} if experiment_id else {}))

    def run_service_terminate_run(self, run_id: str, experiment_id: str = "") -> Any:
        run = self._one(self.runs, f"run {run_id}", run_id=run_id)
        if run["state"] in ENDED:
            raise Refused(400, 9, f"Failed to terminate run {run_id}: it has ended")
        run["state"] = "CANCELING"
        return {}

    def run_service_retry_run(self, run_id: str, experiment_id: str = "") -> Any:
        run = self._one(self.runs, f"run {run_id}", run_id=run_id)
        if run["state"] not in ("FAILED", "CANCELED"):
            raise Refused(400, 9, "Workflow must be Failed/Error to retry")
        run["state"], self.steps[run_id] = "RUNNING", 0
        run.pop("error", None)
        return {}

    # What they share.

    def _advance(self, run: dict[str, Any], state: str, tasks: list[tuple[str, str]]) -> None:
        """The state of a step; of a task the real server tells its name, state, times and children, and no more."""
        run["state"] = state
        if state in ENDED:
            run["finished_at"] = self.now()
        run["run_details"] = {
            "task_details": [
                {
                    "run_id": run["run_id"],
                    "task_id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{run['run_id']}/{number}")),
                    "display_name": name,
                    "create_time": run["created_at"],
                    "start_time": f"2026-11-22T01:00:{number:02d}Z",
                    "end_time": "0001-01-01T00:00:00Z"
                    if state in ("RUNNING", "PENDING")
                    else f"2026-11-22T01:04:{number:02d}Z",
                    "state": state,
                    "child_tasks": [{"pod_name": f"vapo-{number + 1}"}],
                }
                for number, (name, state) in enumerate(tasks)
            ]
        }

    def _check_parameters(self, spec: dict[str, Any], given: dict[str, Any]) -> None:
        known = spec["root"]["inputDefinitions"]["parameters"]
        for name, value in given.items():
            if name not in known:
                raise Refused(400, 3, f"unknown parameter {name}")
            if not isinstance(value, TYPES[known[name]["parameterType"]]):
                raise Refused(400, 3, f"input parameter {name} requires type {known[name]['parameterType']}")
        wanting = [
            n for n, p in known.items() if n not in given and "defaultValue" not in p and not p.get("isOptional")
        ]
        if wanting:
            raise Refused(400, 3, f"parameters {wanting} are required")

    def _allowed(self, namespace: str, *, given: bool = True) -> None:
        if given and self.multi_user and not namespace:
            raise Refused(400, 3, "Namespace is empty in multi-user mode")
        if not self.multi_user and namespace:
            raise Refused(400, 3, "In single-user mode, the request shouldn't contain namespace")
        if namespace in self.forbidden:
            raise Refused(403, 7, f"{self.asked[-1][1]} is not authorized to access namespace {namespace}")

    def _one(self, kind: dict[str, dict[str, Any]], what: str, **fields: str) -> dict[str, Any]:
        for found in kind.values():
            if all(found.get(name, "") == value for name, value in fields.items()):
                return found
        raise Refused(404, 5, f"{what} not found")

    def _new(self, kind: dict[str, dict[str, Any]], key: str, new: dict[str, Any], *unique: str) -> dict[str, Any]:
        if unique and any(all(found[name] == new[name] for name in unique) for found in kind.values()):
            raise Refused(409, 6, f"{new[unique[0]]} exists already")
        made = {key: str(uuid.uuid4()), "created_at": self.now(), **new}
        kind[made[key]] = made
        return made

    def _page(self, name: str, kind: dict[str, dict[str, Any]], query: dict[str, str], **fields: str) -> dict[str, Any]:
        found = [item for item in kind.values() if all(item.get(k, "") == v for k, v in fields.items())]
        for predicate in json.loads(query.get("filter", "{}")).get("predicates", []):
            assert predicate["operation"] == "EQUALS", predicate
            found = [item for item in found if item[predicate["key"]] == predicate["string_value"]]
        if query.get("sort_by"):
            column, _, direction = query["sort_by"].partition(" ")
            found.sort(key=lambda item: item[column], reverse=direction == "desc")
        begin, size = int(query.get("page_token") or 0), int(query.get("page_size") or 20)
        rest = {"next_page_token": str(begin + size)} if begin + size < len(found) else {}
        return {name: found[begin : begin + size], "total_size": len(found), **rest}

    def answer(self, method: str, target: str, headers: Any, body: bytes) -> tuple[int, Any, bool]:
        """(status, what is sent, whether the connection breaks off in mid-answer)."""
        parsed = urlsplit(target)
        with self.lock:
            fault = next((f for f in self.faults if f.method == method and re.search(f.path, parsed.path)), None)
            if fault:
                self.faults.remove(fault)
                if not fault.done:
                    return fault.status or 200, {"message": "the gateway gave up"}, not fault.status
            try:
                status, found = 200, self._answer(method, parsed.path, dict(parse_qsl(parsed.query)), headers, body)
            except Refused as error:
                status, found = error.status, {"error": error.message, "code": error.code, "message": error.message}
            if fault:
                return fault.status or 200, found, not fault.status
            return status, found, False

    def _answer(self, method: str, path: str, query: dict[str, str], headers: Any, body: bytes) -> Any:
        if self.version == 1:
            if path == "/apis/v1beta1/healthz":
                return {"multi_user": False}
            raise Refused(404, 5, "Not Found")
        operation, parameters = find(method, path) or (None, {})
        if operation is None:
            raise self._violation(f"{method} {path}: there is no such operation")
        bearer = headers.get("Authorization", "")
        self.asked.append((operation.name, bearer))
        if self.tokens and bearer.removeprefix("Bearer ") not in self.tokens:
            raise Refused(401, 16, f"the token {bearer} has expired")
        if wrong := query_faults(operation, query):
            raise self._violation("; ".join(wrong))
        named: dict[str, Any] = {**{k: unquote(v) for k, v in parameters.items()}, **query}
        if operation.file:
            named["file"] = _uploaded(headers["Content-Type"], body, operation.file)
        elif operation.body:
            named["body"] = self._body(operation, body)
        elif body:
            raise self._violation(f"{operation.name} takes no body: {body!r}")
        answer = getattr(self, operation.name)(**named)
        if wrong := faults(answer, operation.response, operation.response):
            raise self._violation(f"this server's own answer: {wrong}")
        return answer

    def _body(self, operation: Operation, body: bytes) -> Any:
        if not body:
            raise self._violation(f"{operation.name} needs a body")
        found = json.loads(body)
        if wrong := faults(found, operation.body, operation.body):
            raise self._violation("; ".join(wrong))
        return found

    def _violation(self, text: str) -> Refused:
        self.violations.append(text)
        return Refused(400, 3, text)


def _uploaded(content_type: str, body: bytes, name: str) -> str:
    """The file of a multipart form."""
    message = BytesParser().parsebytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
    parts = {part.get_param("name", header="content-disposition"): part for part in message.get_payload()}
    assert set(parts) == {name}, parts
    return parts[name].get_payload(decode=True).decode()


def _handler(server: KfpServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if server.page:
                self._send(200, "text/html; charset=utf-8", server.page.encode(), broken=False)
                return
            status, found, broken = server.answer(self.command, self.path, self.headers, body)
            self._send(status, "application/json", json.dumps(found).encode(), broken=broken)

        do_GET = do_POST = do_DELETE = do_PATCH = _serve

        def _send(self, status: int, kind: str, text: bytes, *, broken: bool) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text[: len(text) // 2] if broken else text)
            if broken:
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            return

    return Handler


@contextmanager
def serving(server: KfpServer) -> Iterator[KfpServer]:
    """The server on a port of this machine; at the end, nothing must have broken the description."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
    assert not server.violations, server.violations


def tasks(*states: tuple[str, str]) -> list[tuple[str, str]]:
    """A step's tasks as the real server lists them: a driver and an executor to each, and the root."""
    found = [("root-driver", "SUCCEEDED"), ("root", "RUNNING")]
    for name, state in states:
        found += [(f"{name}-driver", "SUCCEEDED"), (name, state), ("executor", state)]
    return found
