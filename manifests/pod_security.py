"""The Pod Security Standard `restricted`, field by field, and our own: a read-only root and no token without need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from manifests.render import Object
from manifests.schemas import name_of

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
}
PROFILES = {"RuntimeDefault", "Localhost"}
SELINUX = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}


def pods_of(thing: Object) -> list[Object]:
    """The pod templates in an object, each {metadata, spec}."""
    spec = thing.get("spec") or {}
    match thing.get("kind"):
        case "Pod":
            return [thing]
        case "Deployment" | "StatefulSet" | "DaemonSet" | "Job" | "ReplicaSet":
            return [spec["template"]]
        case "CronJob":
            return [spec["jobTemplate"]["spec"]["template"]]
        case "TrainingRuntime" | "ClusterTrainingRuntime":
            return [job["template"]["spec"]["template"] for job in spec["template"]["spec"]["replicatedJobs"]]
    return []


def pod_faults(thing: Object) -> Iterator[str]:
    """What the admission controller would refuse of an object's pods, and what we do."""
    for pod in pods_of(thing):
        for fault in (*restricted(pod["spec"], (pod.get("metadata") or {})), *ours(pod["spec"])):
            yield f"{name_of(thing)}: {fault}"


def labels_of(pod: Object) -> dict[str, str]:
    """The labels of a pod template."""
    return dict((pod.get("metadata") or {}).get("labels") or {})


def containers_of(spec: Object) -> list[Object]:
    """All containers of a pod."""
    return [c for key in ("initContainers", "containers", "ephemeralContainers") for c in spec.get(key) or []]


def restricted(spec: Object, metadata: Object) -> Iterator[str]:
    """Where a pod leaves the standard; https://kubernetes.io/docs/concepts/security/pod-security-standards."""
    pod = spec.get("securityContext") or {}
    contexts = [("the pod", pod)]
    contexts += [(f"container {c['name']}", c.get("securityContext") or {}) for c in containers_of(spec)]
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            yield f"{key} must not be true"
    for volume in spec.get("volumes") or []:
        for kind in volume.keys() - {"name"} - VOLUMES:
            yield f"volume {volume['name']} is a {kind}: only {sorted(VOLUMES)}"
    for sysctl in pod.get("sysctls") or []:
        if sysctl["name"] not in SYSCTLS:
            yield f"sysctl {sysctl['name']} is not a safe one"
    for key, value in (metadata.get("annotations") or {}).items():
        if key.startswith("container.apparmor.security.beta.kubernetes.io/") and value.split("/")[0] not in (
            "runtime",
            "localhost",
        ):
            yield f"annotation {key}: {value!r}"
    for name, context in contexts:
        yield from _context_faults(name, context)
    for container in containers_of(spec):
        yield from _container_faults(container, pod)


def _context_faults(name: str, context: dict[str, Any]) -> Iterator[str]:
    """What pods and containers share."""
    if context.get("runAsUser") == 0:
        yield f"{name}: runAsUser must not be 0"
    if context.get("runAsNonRoot") is False:
        yield f"{name}: runAsNonRoot must not be false"
    if (context.get("windowsOptions") or {}).get("hostProcess"):
        yield f"{name}: windowsOptions.hostProcess must not be true"
    for key in ("seccompProfile", "appArmorProfile"):
        if (profile := context.get(key)) is not None and profile.get("type") not in PROFILES:
            yield f"{name}: {key}.type must be one of {sorted(PROFILES)}"
    linux = context.get("seLinuxOptions") or {}
    if linux.get("type", "") not in SELINUX or linux.get("user") or linux.get("role"):
        yield f"{name}: seLinuxOptions must have no user, no role and a container's type"


def _container_faults(container: Object, pod: dict[str, Any]) -> Iterator[str]:
    name, context = f"container {container['name']}", container.get("securityContext") or {}
    if context.get("privileged"):
        yield f"{name}: privileged must not be true"
    if context.get("allowPrivilegeEscalation") is not False:
        yield f"{name}: allowPrivilegeEscalation must be false"
    if context.get("procMount", "Default") != "Default":
        yield f"{name}: procMount must be Default"
    capabilities = context.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or []):
        yield f"{name}: capabilities.drop must hold ALL"
    if set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}:
        yield f"{name}: capabilities.add may hold NET_BIND_SERVICE alone"
    if context.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield f"{name}: runAsNonRoot must be true, here or in the pod"
    if not (context.get("seccompProfile") or pod.get("seccompProfile")):
        yield f"{name}: seccompProfile must be set, here or in the pod"
    if any(port.get("hostPort") for port in container.get("ports") or []):
        yield f"{name}: hostPort must not be set"
    hooks = [container.get(key) for key in ("livenessProbe", "readinessProbe", "startupProbe")]
    hooks += list((container.get("lifecycle") or {}).values())
    for hook in hooks:
        for kind in ("httpGet", "tcpSocket"):
            if isinstance(hook, dict) and ((hook.get(kind) or {}).get("host")):
                yield f"{name}: {kind}.host must not be set"


def ours(spec: Object) -> Iterator[str]:
    """What the standard does not ask, and we do."""
    for container in containers_of(spec):
        if (container.get("securityContext") or {}).get("readOnlyRootFilesystem") is not True:
            yield f"container {container['name']}: readOnlyRootFilesystem must be true"
    if spec.get("automountServiceAccountToken") is not False:
        yield "automountServiceAccountToken must be false: no pod of the manifests calls the Kubernetes API"
