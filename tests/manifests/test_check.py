"""Every overlay is well; every kind of mistake in a file of it is refused, and the message says where."""

from __future__ import annotations

from pathlib import Path

import pytest

from manifests.check import faults, main
from manifests.render import kustomizations, rendered

BASE, MINIO, TRAINER, KUEUE = "base", "components/minio", "components/trainer", "components/kueue"

BREAKS = [  # (overlay, file, what stands there, what stands there instead, what is said)
    # schemas of core kinds: a field that there is not, a type, a missing field
    ("gpu", f"{MINIO}/minio.yaml", "readinessProbe:", "readynessProbe:", "'readynessProbe' was unexpected"),
    ("gpu", f"{MINIO}/minio.yaml", "replicas: 1", "replicas: one", "spec.replicas: 'one' is not"),
    ("gpu", f"{BASE}/network.yaml", "protocol: UDP", "protocoll: UDP", "NetworkPolicy dns"),
    ("gpu", f"{BASE}/runner.yaml", "kind: Role\n  name: vapo-runner", "kind: Role", "RoleBinding vapo-runner: roleRef"),
    # schemas of custom kinds
    (
        "kueue",
        f"{KUEUE}/queues.yaml",
        "queueingStrategy: BestEffortFIFO",
        "queueingStrategy: FIFO",
        "'FIFO' is not one",
    ),
    ("kueue", f"{KUEUE}/queues.yaml", "clusterQueue: vapo", "clusterqueue: vapo", "'clusterqueue' was unexpected"),
    (
        "kueue",
        f"{KUEUE}/flavors.yaml",
        "operator: Exists",
        "operator: Exists\n      value: x",
        "ResourceFlavor vapo-gpu",
    ),
    (
        "kueue",
        f"{KUEUE}/queues.yaml",
        "kueue.x-k8s.io/v1beta2\nkind: Local",
        "kueue.x-k8s.io/v1\nkind: Local",
        "schema",
    ),
    ("trainer", f"{TRAINER}/runtime.yaml", "torch: {}", "torch: {numProcPerNode: auto}", "'numProcPerNode' was unexp"),
    ("trainer", f"{TRAINER}/runtime.yaml", "image: vapo-train", "images: vapo-train", "'images' was unexp"),
    # quantities, which are text to the schemas
    ("gpu", "components/gpu/quota.yaml", '"32"', '"32x"', "'32x' is no quantity"),
    ("gpu", "components/gpu/quota.yaml", '"32"', '"3.2"', "a device is not divided"),
    ("gpu", f"{MINIO}/minio.yaml", "memory: 8Gi", "memory: 8GiB", "'8GiB' is no quantity"),
    # PodSecurity, in a pod and in a TrainingRuntime
    (
        "gpu",
        f"{MINIO}/bucket.yaml",
        "runAsNonRoot: true",
        "fsGroup: 1",
        "Job vapo-bucket: container bucket: runAsNonRoot",
    ),
    ("gpu", f"{MINIO}/minio.yaml", "drop: [ALL]", "add: [CHOWN]", "capabilities.drop must hold ALL"),
    ("trainer", f"{TRAINER}/runtime.yaml", "type: RuntimeDefault", "type: Unconfined", "seccompProfile.type"),
    ("trainer", f"{TRAINER}/runtime.yaml", "emptyDir: {}", "hostPath: {path: /}", "volume scratch is a hostPath"),
    # names
    (
        "gpu",
        f"{BASE}/runner.yaml",
        "kind: ServiceAccount\n    name: vapo-runner",
        "kind: ServiceAccount\n    name: x",
        "'x'",
    ),
    ("gpu", f"{MINIO}/minio.yaml", "key: MINIO_SECRET_KEY", "key: SECRET_KEY", "has no key ['SECRET_KEY']"),
    ("gpu", f"{MINIO}/bucket.yaml", "name: vapo-store", "name: store", "makes Secret 'store'"),
    ("gpu", f"{MINIO}/bucket.yaml", "image: vapo-cpu", "image: other/vapo-cpu:0.0.9", "not that of references.toml"),
    ("gpu", f"{MINIO}/minio.yaml", ":RELEASE.2025-09-07T16-13-09Z", "", "says no version"),
    ("gpu", f"{MINIO}/launcher.yaml", "minio://vapo", "s3://vapo", "providers are ['minio']"),
    ("gpu", f"{MINIO}/launcher.yaml", "disableSSL", "disableSsl", "has no ['disableSsl']"),
    ("gpu", f"{MINIO}/launcher.yaml", "local:9000", "local:9001", "Service minio has ports ['9000']"),
    ("gpu", f"{MINIO}/launcher.yaml", "key: MINIO_ACCESS_KEY", "key: accesskey", "has no key ['accesskey']"),
    ("gpu", f"{MINIO}/launcher.yaml", "artifact-repository: vapo", "artifact-repository: minio", "repository 'minio'"),
    ("gpu", f"{MINIO}/launcher.yaml", "name: artifact-repositories", "name: repositories", "no ConfigMap 'artifact-r"),
    ("gpu", f"{MINIO}/minio.yaml", "targetPort: s3", "targetPort: http", "targetPort 'http' is no port"),
    ("gpu", f"{BASE}/segments.yaml", "  namespace: vapo\n", "", "its namespace is None"),
    ("trainer", f"{TRAINER}/runtime.yaml", "serviceAccountName: vapo-node", "serviceAccountName: node", "'node'"),
    ("kueue", f"{KUEUE}/queues.yaml", "name: vapo-gpu", "name: vapo-gpus", "no ResourceFlavor 'vapo-gpus'"),
    (
        "kueue",
        f"{KUEUE}/queues.yaml",
        "coveredResources: [cpu, memory, nv",
        "coveredResources: [memory, cpu, nv",
        "lists",
    ),
    # rights that are wider than they look
    ("gpu", f"{BASE}/runner.yaml", "    resourceNames: [vapo-store]\n", "", "without resourceNames means all of them"),
    ("gpu", f"{BASE}/segments.yaml", "verbs: [create,", 'verbs: ["*", create,', "verbs must not be *"),
    # the network
    ("gpu", f"{BASE}/network.yaml", "key: workflows.argoproj.io/workflow", "key: workflow", "matches no pod"),
    (
        "gpu",
        f"{BASE}/network.yaml",
        "component: metadata-grpc-server",
        "component: mlmd",
        "matches no pod of namespace",
    ),
    ("gpu", f"{BASE}/network.yaml", "port: 8887", "port: 8889", "listen on [8887, 8888], not [8889]"),
    ("gpu", f"{MINIO}/network.yaml", "port: 9000", "port: 9001", "port 9000, which no policy lets in"),
    ("gpu", f"{MINIO}/network.yaml", "port: 9000", "port: 9001", "port 9001, which no policy lets out"),
    ("gpu", f"{BASE}/network.yaml", "policyTypes: [Ingress, Egress]", "policyTypes: [Egress]", "no policy denies all"),
]


@pytest.mark.parametrize("folder", kustomizations(), ids=lambda folder: folder.name)
def test_it_is_well(folder: Path) -> None:
    objects = rendered(folder)
    assert objects
    assert list(faults(objects, alone=folder.name != "files")) == []


@pytest.mark.parametrize(("overlay", "file", "there", "instead", "said"), BREAKS)
def test_a_mistake_is_refused(copy: Path, overlay: str, file: str, there: str, instead: str, said: str) -> None:
    path = copy / file
    text = path.read_text()
    assert there in text
    path.write_text(text.replace(there, instead, 1))
    found = list(faults(rendered(copy / "overlays" / overlay)))
    assert any(said in fault for fault in found), found


def test_the_command_says_what_is_wrong_and_fails(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "components/kueue/queues.yaml").write_text("- nothing\n")
    (copy / "components/gpu/quota.yaml").write_text(
        (copy / "components/gpu/quota.yaml").read_text().replace("ResourceQuota", "Resourcequota")
    )
    assert main(copy) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "overlays/kind: 25 objects, 0 faults" in lines
    assert "overlays/kueue: 0 objects, 1 faults" in lines
    assert any("'Resourcequota' is not one of" in line for line in lines)


def test_a_secret_is_not_written_down(copy: Path) -> None:
    secret = "---\napiVersion: v1\nkind: Secret\nmetadata: {name: vapo-store, namespace: vapo}\nstringData: {a: b}\n"
    path = copy / "base/cache.yaml"
    path.write_text(path.read_text() + secret)
    found = list(faults(rendered(copy / "overlays/gpu")))
    assert any("never written down" in fault for fault in found), found
