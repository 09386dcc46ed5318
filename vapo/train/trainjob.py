"""A TrainJob on a Kubernetes cluster through the kubeflow SDK: made or found again, followed, explained, deleted."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from vapo.errors import UserError

CREATED, RUNNING, COMPLETE, FAILED, GONE = "Created", "Running", "Complete", "Failed", "Gone"
NODE = "node"  # what the Trainer calls the replicated job, its container and (node-0, node-1, ...) the steps
SECRETS = "/var/run/secrets/vapo"  # where a node finds the Secret's keys as files, each named like a variable
PASSED = ("AWS_ENDPOINT_URL", "AWS_REGION", "MINIO_ENDPOINT", "MINIO_REGION")  # to the nodes: none is secret
LABELS = {"app.kubernetes.io/managed-by": "vapo", "app.kubernetes.io/part-of": "vapo"}
RUN_LABEL = "pipeline/runid"  # Kubeflow Pipelines puts it on every pod of a run
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
HOPELESS = {  # reasons that a container waits for and that no waiting will change -> the cure
    "CreateContainerConfigError": "make what it names, often the Secret train.secret, in this namespace",
    "ErrImageNeverPull": "set train.image to an image that the nodes can pull",
    "ImagePullBackOff": "set train.image to an image that the nodes can pull, by digest if you can",
    "InvalidImageName": "set train.image to an image that the nodes can pull",
}


@dataclass(frozen=True)
class Wanted:
    """What a TrainJob is to be; `command` is what every node runs."""

    name: str
    stage: str
    nodes: int
    command: tuple[str, ...]
    image: str = ""
    resources: dict[str, str | int] = field(default_factory=dict)
    secret: str = ""
    queue: str = ""
    time_limit: int = 0


class TrainJobs(Protocol):
    """Where TrainJobs run: a cluster, or processes of this machine."""

    pause: float  # seconds between two looks at a job

    def named(self, name: str) -> str:
        """The name for a job that all its attempts share, or that this process alone uses."""

    def start(self, wanted: Wanted) -> None:
        """Make the job. What stands in its way and a user can cure is a UserError."""

    def found(self, name: str) -> bool:
        """Whether a job of this name is under way; one that has ended is deleted."""

    def state(self, name: str) -> str:
        """CREATED, RUNNING, COMPLETE, FAILED or GONE."""

    def lines(self, name: str, ended: threading.Event) -> Iterator[str]:
        """What node 0 prints, while it does so, until it has ended."""

    def waits_for(self, name: str) -> str:
        """What keeps a job from running; empty: nothing that is known.

        Raises:
            UserError: it would wait for ever.
        """

    def why_failed(self, name: str) -> str:
        """What the cluster says of a job that failed."""

    def delete(self, name: str) -> None:
        """End the job, whether it runs or not; none of that name is fine."""


def missing_sdk() -> UserError:
    """Several nodes without the SDK."""
    return UserError("train.nodes is above 1, but the kubeflow SDK is not installed: pip install 'vapo[trainer]'")


class Cluster:
    """TrainJobs in a namespace of the cluster that this pod, or KUBECONFIG, belongs to."""

    pause = 5.0

    def __init__(self, runtime: str, namespace: str = "") -> None:
        """Connect, and look the runtime up.

        Raises:
            UserError: no SDK, no cluster, no access, or no such runtime.
        """
        try:
            from kubeflow.trainer import KubernetesBackendConfig, TrainerClient
            from kubernetes.config import ConfigException
        except ModuleNotFoundError:
            raise missing_sdk() from None
        # It warns where an account may not read a ConfigMap of the Trainer's own namespace, and hardly one may.
        logging.getLogger("kubeflow.trainer.backends.kubernetes.backend").setLevel(logging.ERROR)
        try:
            self.client = TrainerClient(KubernetesBackendConfig(namespace=namespace or None))
        except ConfigException as error:
            raise UserError(
                f"train.nodes is above 1, but there is no Kubernetes cluster here ({error}): run the pipeline on a "
                "cluster, set KUBECONFIG, or set train.nodes to 1"
            ) from None
        backend = self.client.backend
        self.custom, self.core, self.namespace = backend.custom_api, backend.core_api, backend.namespace
        try:
            self.runtime = self.client.get_runtime(runtime)
        except (RuntimeError, TimeoutError) as error:
            raise self._no_runtime(runtime, error) from error
        if self.runtime.trainer.framework != "torch":
            raise UserError(
                f"train.runtime {runtime!r} is for {self.runtime.trainer.framework}, not torch: "
                "name a runtime with mlPolicy.torch, such as 'torch-distributed'"
            )

    def _no_runtime(self, runtime: str, error: Exception) -> UserError:
        status = status_of(error)
        if status is None:
            return UserError(
                f"train.nodes is above 1, but the Kubernetes API does not answer ({said(error)}): check KUBECONFIG and "
                "the network, or set train.nodes to 1"
            )
        if status in (401, 403):
            return UserError(
                f"the account of this stage may not read training runtimes ({said(error)}): let it get and list "
                "trainingruntimes and clustertrainingruntimes, get, create, patch and delete trainjobs, get and list "
                "pods, and get pods/log"
            )
        if status == 404:
            try:
                names = sorted(found.name for found in self.client.list_runtimes())
            except (RuntimeError, TimeoutError):
                return UserError(
                    f"train.runtime {runtime!r}: there is no such training runtime, nor any other: install Kubeflow "
                    "Trainer 2, or set train.nodes to 1"
                )
            return UserError(f"train.runtime {runtime!r}: there is no such training runtime; there are {names}")
        return UserError(f"train.runtime {runtime!r}: the Kubernetes API answered {status}: {said(error)}")

    def named(self, name: str) -> str:
        """As it is: an attempt finds the job of the one before."""
        return name

    def start(self, wanted: Wanted) -> None:
        """Create the TrainJob; it is deleted with this pod, if this is one of a cluster's."""
        from kubeflow.trainer import options
        from kubeflow.trainer.types.types import CustomTrainerContainer

        pod = self._own_pod()
        trainer = CustomTrainerContainer(
            image=wanted.image or self._own_image(pod),
            num_nodes=wanted.nodes,
            resources_per_node=dict(wanted.resources) or None,
            env={"PYTHONUNBUFFERED": "1", **{name: os.environ[name] for name in PASSED if name in os.environ}},
        )
        chosen = [
            options.Name(wanted.name),
            options.Labels(self._labels(wanted, pod)),
            options.TrainerCommand(list(wanted.command)),
            _patch(wanted.secret),
        ]
        if wanted.time_limit:
            chosen.append(options.ActiveDeadlineSeconds(wanted.time_limit))
        try:
            self.client.train(runtime=self.runtime, trainer=trainer, options=chosen)
        except (RuntimeError, TimeoutError) as error:
            status = status_of(error)
            if status == 409:  # another attempt of this very task made it in between
                return
            if status in (400, 401, 403, 422):
                raise UserError(
                    f"the cluster refuses TrainJob {wanted.name}: {said(error)}: change [train] in the recipe, or the "
                    "rights and quota of namespace " + self.namespace
                ) from error
            raise
        if pod is not None:
            self._own(wanted.name, pod)

    def found(self, name: str) -> bool:
        """Whether the TrainJob is under way. One that ended, or is being deleted, is waited for to be gone."""
        while (job := self._raw(name)) is not None:
            ended = {c["type"] for c in _conditions(job) if c["status"] == "True"} & {COMPLETE, FAILED}
            if not ended and "deletionTimestamp" not in job["metadata"]:
                pod = self._own_pod()
                if pod is not None:
                    self._own(name, pod)
                return True
            self.delete(name)
            time.sleep(self.pause)
        return False

    def state(self, name: str) -> str:
        """As the SDK says it, and GONE."""
        try:
            return str(self.client.get_job(name).status)
        except RuntimeError as error:
            if status_of(error) == 404:
                return GONE
            raise

    def lines(self, name: str, ended: threading.Event) -> Iterator[str]:
        """The log of node 0's pod. A stream that breaks is read again from where it was; a new pod from its start."""
        shown, pod = 0, ""
        while True:
            try:
                step = self._step(name)
                if step is not None and step.pod_name != pod:
                    shown, pod = 0, step.pod_name
                for number, line in enumerate(self.client.get_job_logs(name, follow=True), start=1):
                    if number > shown:
                        shown = number
                        yield line
                if step is not None and step.status in ("Succeeded", "Failed"):
                    return
            except (RuntimeError, TimeoutError):  # not started yet, gone, or the connection broke
                pass
            if ended.wait(self.pause / 5):
                return

    def _step(self, name: str) -> Any:
        return next((step for step in self.client.get_job(name).steps if step.name == f"{NODE}-0"), None)

    def waits_for(self, name: str) -> str:
        """A queue, a node with room, an image: what conditions and pods say."""
        job = self._raw(name)
        if job is None:
            return ""
        for condition in _conditions(job):
            if condition["type"] == "Suspended" and condition["status"] == "True":
                return f"the TrainJob is suspended, by a queue or by hand: {condition.get('message', '')}"
        pods = self._pods(name)
        for pod in pods:
            for state in pod.status.container_statuses or []:
                if state.state.waiting is not None and state.state.waiting.reason in HOPELESS:
                    reason, message = state.state.waiting.reason, state.state.waiting.message
                    raise UserError(
                        f"TrainJob {name} cannot start: {pod.metadata.name}: {reason}: {message}: {HOPELESS[reason]}"
                    )
        for pod in pods:
            for condition in pod.status.conditions or []:
                if condition.type == "PodScheduled" and condition.status == "False":
                    return f"{pod.metadata.name}: {condition.reason}: {condition.message}"
            for state in pod.status.container_statuses or []:
                if state.state.waiting is not None:
                    return f"{pod.metadata.name}: {state.state.waiting.reason}"
        return "" if pods else "no pod was made yet"

    def why_failed(self, name: str) -> str:
        """The job's own condition, and how the containers of its pods ended."""
        job = self._raw(name)
        reasons = [
            f"{c.get('reason', '')}: {c.get('message', '')}"
            for c in (_conditions(job) if job else [])
            if c["type"] == FAILED and c["status"] == "True"
        ]
        for pod in self._pods(name):
            if pod.status.reason:  # evicted, lost its node
                reasons.append(f"{pod.metadata.name}: {pod.status.reason}: {pod.status.message}")
            for state in pod.status.container_statuses or []:
                end = state.state.terminated or (state.last_state and state.last_state.terminated)
                if end is not None and end.exit_code != 0:
                    reasons.append(f"{pod.metadata.name}: {end.reason}, exit code {end.exit_code}")
        return "; ".join(dict.fromkeys(reasons)) or "the cluster gives no reason"

    def delete(self, name: str) -> None:
        """Delete the TrainJob; its pods go with it."""
        try:
            self.client.delete_job(name)
        except RuntimeError as error:
            if status_of(error) != 404:
                raise

    def _labels(self, wanted: Wanted, pod: Any) -> dict[str, str]:
        run = (pod.metadata.labels or {}).get(RUN_LABEL) if pod is not None else None
        return {
            **LABELS,
            "app.kubernetes.io/component": wanted.stage,
            **({RUN_LABEL: run} if run else {}),
            **({QUEUE_LABEL: wanted.queue} if wanted.queue else {}),
        }

    def _own_pod(self) -> Any:
        """The pod that this process runs in, or None outside a cluster."""
        name = os.environ.get("KFP_POD_NAME")
        if not name:
            return None
        with _errors_of_the_sdk():
            return self.core.read_namespaced_pod(name, self.namespace)

    def _own_image(self, pod: Any) -> str:
        if pod is None:
            raise UserError(
                "train.image is empty, and this process runs in no pod whose image could be taken: set train.image"
            )
        containers = {container.name: container.image for container in pod.spec.containers}
        return str(containers.get("main") or next(iter(containers.values())))

    def _own(self, name: str, pod: Any) -> None:
        """Have the cluster delete the job when this pod is deleted: a launcher that is killed cannot do it."""
        owner = {"apiVersion": "v1", "kind": "Pod", "name": pod.metadata.name, "uid": pod.metadata.uid}
        self._custom("patch", name, body={"metadata": {"ownerReferences": [owner]}})

    def _raw(self, name: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = self._custom("get", name)
        except RuntimeError as error:
            if status_of(error) == 404:
                return None
            raise
        return found

    def _custom(self, verb: str, name: str, **more: Any) -> Any:
        from kubeflow.trainer.constants.constants import GROUP, TRAINJOB_PLURAL, VERSION

        call = getattr(self.custom, f"{verb}_namespaced_custom_object")
        with _errors_of_the_sdk():
            return call(
                group=GROUP, version=VERSION, namespace=self.namespace, plural=TRAINJOB_PLURAL, name=name, **more
            )

    def _pods(self, name: str) -> list[Any]:
        from kubeflow.trainer.constants.constants import POD_LABEL_SELECTOR

        selector = POD_LABEL_SELECTOR.format(trainjob_name=name)
        with _errors_of_the_sdk():
            return list(self.core.list_namespaced_pod(self.namespace, label_selector=selector).items)


@contextmanager
def _errors_of_the_sdk() -> Iterator[None]:
    """Errors of our own calls as the SDK has those of its: a RuntimeError with the cause."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except (ApiException, HTTPError) as error:
        raise RuntimeError(said(error)) from error


def status_of(error: BaseException) -> int | None:
    """The HTTP status that the SDK's error comes from; None: no answer came."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and status:
        return status
    return status_of(error.__cause__) if error.__cause__ is not None else None


def said(error: BaseException) -> str:
    """The API server's own sentence, or that of the innermost error, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(getattr(error, "reason", None) or error)
    with suppress(ValueError):
        text = json.loads(getattr(error, "body", None) or "{}").get("message") or text
    return " ".join(text.split())


def _conditions(job: dict[str, Any]) -> list[dict[str, Any]]:
    return job.get("status", {}).get("conditions") or []


def _patch(secret: str) -> Any:
    """Shared memory for the ranks of a node, and the Secret as files: a TrainJob cannot take a variable from one."""
    from kubeflow.trainer import options

    volumes: list[dict[str, Any]] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
    mounts: list[dict[str, Any]] = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    if secret:
        volumes.append({"name": "secret", "secret": {"secretName": secret}})
        mounts.append({"name": "secret", "mountPath": SECRETS, "readOnly": True})
    pod = options.PodSpecPatch(volumes=volumes, containers=[options.ContainerPatch(name=NODE, volume_mounts=mounts)])
    job = options.JobTemplatePatch(spec=options.JobSpecPatch(template=options.PodTemplatePatch(spec=pod)))
    jobs = options.JobSetSpecPatch(replicated_jobs=[options.ReplicatedJobPatch(name=NODE, template=job)])
    return options.RuntimePatch(options.TrainingRuntimeSpecPatch(template=options.JobSetTemplatePatch(spec=jobs)))
