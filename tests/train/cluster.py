"""A small Kubernetes API server for the calls that TrainJobs need: it keeps what it is sent; tests set the pods."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

TRAINER = "/apis/trainer.kubeflow.org/v1alpha1"
JOBS = f"{TRAINER}/namespaces/team/trainjobs"
PODS = "/api/v1/namespaces/team/pods"
NODE_SELECTOR = "jobset.sigs.k8s.io/replicatedjob-name in (dataset-initializer, model-initializer, launcher, node)"


class FakeCluster:
    """What the API server knows. `on_create` is called when a TrainJob was made."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, list[str]] = {}
        self.runtimes = {"torch-distributed": runtime("torch-distributed", "torch"), "jax": runtime("jax", "jax")}
        self.refusals: dict[tuple[str, str], tuple[int, str]] = {}  # (verb, path) -> (status, message)
        self.requests: list[tuple[str, str]] = []
        self.log_ended = threading.Event()
        self.log_breaks = False  # the stream ends after what there is
        self.on_create: Any = lambda name: None

    def answer(self, verb: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        """(status, body) of an answer."""
        self.requests.append((verb, path))
        if (verb, path) in self.refusals:
            status, message = self.refusals[verb, path]
            return status, {"kind": "Status", "status": "Failure", "code": status, "message": message}
        if found := re.fullmatch(rf"{TRAINER}/clustertrainingruntimes/([\w-]+)", path):
            return self._one(self.runtimes, found[1])
        if path == f"{TRAINER}/clustertrainingruntimes":
            return 200, {"metadata": {}, "items": list(self.runtimes.values())}
        if path == f"{TRAINER}/namespaces/team/trainingruntimes":
            return 200, {"metadata": {}, "items": []}
        if verb == "POST" and path == JOBS:
            return self._create(body)
        if found := re.fullmatch(rf"{JOBS}/([\w-]+)", path):
            if verb == "DELETE" and found[1] in self.jobs:
                self.pods = {name: pod for name, pod in self.pods.items() if not name.startswith(found[1])}
                return 200, self.jobs.pop(found[1])
            if verb == "PATCH" and found[1] in self.jobs:
                self.jobs[found[1]]["metadata"].update(body["metadata"])
            return self._one(self.jobs, found[1])
        if path == PODS:
            job = re.search(r"jobset-name=([\w-]+)", query["labelSelector"][0])
            assert job
            assert query["labelSelector"][0].endswith(NODE_SELECTOR)
            return 200, {"metadata": {}, "items": [p for n, p in self.pods.items() if n.startswith(job[1])]}
        if found := re.fullmatch(rf"{PODS}/([\w-]+)", path):
            return self._one(self.pods, found[1])
        return self._one({}, path)

    def _create(self, body: Any) -> tuple[int, Any]:
        name = body["metadata"]["name"]
        if name in self.jobs:
            return 409, {"kind": "Status", "code": 409, "message": f"trainjobs {name} already exists"}
        metadata = {**body["metadata"], "namespace": "team", "creationTimestamp": "2026-11-22T12:00:00Z"}
        made = self.jobs[name] = {**body, "metadata": metadata}
        self.on_create(name)
        return 201, made

    @staticmethod
    def _one(things: dict[str, Any], name: str) -> tuple[int, Any]:
        missing = {"kind": "Status", "code": 404, "message": f"{name} not found"}
        return (200, things[name]) if name in things else (404, missing)

    def set_pod(self, name: str, number: int, phase: str, **status: Any) -> None:
        """A pod of a TrainJob's node."""
        labels = {
            "jobset.sigs.k8s.io/jobset-name": name,
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": str(number),
        }
        self.pods[f"{name}-node-0-{number}-x"] = {
            "metadata": {"name": f"{name}-node-0-{number}-x", "namespace": "team", "labels": labels},
            "spec": {"containers": [{"name": "node", "image": "vapo:1"}]},
            "status": {"phase": phase, **status},
        }

    def condition(self, name: str, kind: str, reason: str, message: str) -> None:
        """A condition of the TrainJob that holds."""
        entry = {"type": kind, "status": "True", "reason": reason, "message": message}
        entry["lastTransitionTime"] = "2026-11-22T12:00:01Z"
        self.jobs[name].setdefault("status", {}).setdefault("conditions", []).append(entry)


def runtime(name: str, framework: str) -> dict[str, Any]:
    """A ClusterTrainingRuntime as Kubeflow Trainer 2 installs them."""
    container = {"name": "node", "image": "pytorch/pytorch:latest"}
    template = {
        "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
        "spec": {"template": {"spec": {"containers": [container]}}},
    }
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "ClusterTrainingRuntime",
        "metadata": {"name": name, "labels": {"trainer.kubeflow.org/framework": framework}},
        "spec": {
            "mlPolicy": {"numNodes": 1, "torch": {}},
            "template": {"spec": {"replicatedJobs": [{"name": "node", "template": template}]}},
        },
    }


@contextmanager
def serving_cluster(folder: Path) -> Iterator[tuple[FakeCluster, Path]]:
    """The cluster on a free port of loopback, and a kubeconfig that names it."""
    cluster = FakeCluster()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            parts = urlsplit(self.path)
            if parts.path.endswith("/log"):
                return self._log(parts.path.split("/")[-2])
            text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, found = cluster.answer(self.command, parts.path, parse_qs(parts.query), json.loads(text or "null"))
            body = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return None

        do_GET = do_POST = do_DELETE = do_PATCH = _do

        def _log(self, pod: str) -> None:
            """Lines as they come, until the pod has ended."""
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            sent = 0
            while True:
                last = cluster.log_ended.wait(0.02) or cluster.log_breaks
                lines = cluster.logs.get(pod, [])
                for line in lines[sent:]:
                    self.wfile.write(f"{line}\n".encode())
                self.wfile.flush()
                sent = len(lines)
                if last:
                    self.close_connection = True
                    return

        def log_message(self, *args: Any) -> None:
            """Not a word."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = folder / "kubeconfig"
    address = f"http://127.0.0.1:{server.server_address[1]}"
    context = {"name": "here", "context": {"cluster": "here", "user": "me", "namespace": "team"}}
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "here", "cluster": {"server": address}}],
        "users": [{"name": "me", "user": {}}],
        "contexts": [context],
        "current-context": "here",
    }
    config.write_text(json.dumps(document))
    try:
        yield cluster, config
    finally:
        cluster.log_ended.set()
        server.shutdown()
        server.server_close()
