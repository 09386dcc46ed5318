"""Names that objects use of one another: accounts, roles, Secrets, ConfigMaps, claims, queues, services, images."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from manifests.pod_security import containers_of, labels_of, pods_of
from manifests.render import Object
from manifests.schemas import name_of
from pipelines.images import references

NAMESPACE = "vapo"
GUIDE = Path(__file__).resolve().parent.parent / "docs" / "cluster.md"
CLUSTER_SCOPED = {"Namespace", "ClusterRole", "ClusterRoleBinding", "ResourceFlavor", "ClusterQueue"}
DEFAULT_REPOSITORY = "workflows.argoproj.io/default-artifact-repository"
REPOSITORY = {"endpoint", "bucket", "region", "insecure", "keyFormat", "accessKeySecret", "secretKeySecret"}
PROVIDER = {"endpoint", "region", "disableSSL", "forcePathStyle", "maxRetries", "credentials"}


class Things:
    """The objects of a kustomization by kind and name."""

    def __init__(self, objects: list[Object]) -> None:
        self.objects = objects
        self.names = {(thing["kind"], thing["metadata"]["name"]) for thing in objects}

    def of(self, *kinds: str) -> list[Object]:
        """Those of some kinds."""
        return [thing for thing in self.objects if thing["kind"] in kinds]

    def missing(self, user: str, kind: str, name: str) -> Iterator[str]:
        """A fault if there is none of that kind and name."""
        if (kind, name) not in self.names:
            there = sorted(known for found, known in self.names if found == kind)
            yield f"{user}: there is no {kind} {name!r}, there are {there}"

    def pods(self) -> list[tuple[str, Object]]:
        """(whose, template) of every pod."""
        return [(name_of(thing), pod) for thing in self.objects for pod in pods_of(thing)]

    def volume_templates(self) -> set[str]:
        """Names of the volumes that StatefulSets make for their pods."""
        sets = self.of("StatefulSet")
        return {claim["metadata"]["name"] for s in sets for claim in s["spec"].get("volumeClaimTemplates") or []}


def documented_secrets(guide: str) -> dict[str, set[str]]:
    """The Secrets that the guide's commands make, and their keys."""
    secrets: dict[str, set[str]] = {}
    for command in re.findall(r"create secret generic ((?:.*\\\n)*.*)", guide):
        name = command.split()[0]
        keys = re.findall(r"--from-(?:literal|file)=([\w.-]+)=", command)
        secrets.setdefault(name, set()).update(keys)
    return secrets


def reference_faults(objects: list[Object], guide: str | None = None, alone: bool = True) -> Iterator[str]:
    """What names something that is not there.

    Args:
        guide: the text of docs/cluster.md, which makes the Secrets.
        alone: whether the objects are all that there is; False: they are added to an overlay.
    """
    things = Things(objects)
    secrets = documented_secrets(GUIDE.read_text(encoding="utf-8") if guide is None else guide)
    yield from _place_faults(things)
    for user, pod in things.pods():
        yield from _pod_faults(things, user, pod["spec"], secrets, alone)
        yield from _image_faults(user, pod["spec"])
    yield from _role_faults(things, secrets)
    yield from _store_faults(things, secrets)
    yield from _queue_faults(things)
    yield from _service_faults(things)


def _place_faults(things: Things) -> Iterator[str]:
    for thing in things.objects:
        namespace = thing["metadata"].get("namespace")
        wanted = None if thing["kind"] in CLUSTER_SCOPED else NAMESPACE
        if namespace != wanted:
            yield f"{name_of(thing)}: its namespace is {namespace!r}, not {wanted!r}"
        if thing["kind"] == "Secret":
            yield f"{name_of(thing)}: Secrets are made by a command of docs/cluster.md and never written down"
    keys = Counter(name_of(thing) for thing in things.objects)
    yield from (f"{key}: {count} times" for key, count in keys.items() if count > 1)


def _pod_faults(things: Things, user: str, spec: Object, secrets: dict[str, set[str]], alone: bool) -> Iterator[str]:
    if account := spec.get("serviceAccountName"):
        yield from things.missing(user, "ServiceAccount", account)
    for volume in spec.get("volumes") or []:
        claim = (volume.get("persistentVolumeClaim") or {}).get("claimName")
        if claim and alone:
            yield from things.missing(user, "PersistentVolumeClaim", claim)
        if name := (volume.get("configMap") or {}).get("name"):
            yield from things.missing(user, "ConfigMap", name)
        if name := (volume.get("secret") or {}).get("secretName"):
            yield from _secret_faults(user, secrets, name)
    volumes = {volume["name"] for volume in spec.get("volumes") or []}
    volumes |= things.volume_templates()
    for container in containers_of(spec):
        for mount in container.get("volumeMounts") or []:
            if mount["name"] not in volumes:
                yield f"{user}: container {container['name']} mounts {mount['name']!r}, which is no volume"
        for variable in container.get("env") or []:
            source = variable.get("valueFrom") or {}
            if reference := source.get("secretKeyRef"):
                yield from _secret_faults(user, secrets, reference["name"], reference["key"])
            if reference := source.get("configMapKeyRef"):
                yield from things.missing(user, "ConfigMap", reference["name"])
        for source in container.get("envFrom") or []:
            if "secretRef" in source:
                yield from _secret_faults(user, secrets, source["secretRef"]["name"])
            if "configMapRef" in source:
                yield from things.missing(user, "ConfigMap", source["configMapRef"]["name"])


def _secret_faults(user: str, secrets: dict[str, set[str]], name: str, *keys: str) -> Iterator[str]:
    if name not in secrets:
        yield f"{user}: no command of docs/cluster.md makes Secret {name!r}, only {sorted(secrets)}"
    elif unknown := set(keys) - secrets[name]:
        yield f"{user}: Secret {name!r} of docs/cluster.md has no key {sorted(unknown)}, only {sorted(secrets[name])}"


def _image_faults(user: str, spec: Object) -> Iterator[str]:
    """Our own images are those that pipelines run in; others have a tag or a digest that says which."""
    own = references()
    for container in containers_of(spec):
        image = container["image"]
        kind = re.search(r"(?:^|/)vapo-(\w+)(?:[:@]|$)", image)
        if kind and own.get(kind[1]) != image:
            yield f"{user}: image {image!r} is not that of references.toml, {own.get(kind[1])!r}: make manifests"
        tagged = "@sha256:" in image or (":" in image.rpartition("/")[2] and not image.endswith(":latest"))
        if not kind and not tagged:
            yield f"{user}: image {image!r} says no version"


def _role_faults(things: Things, secrets: dict[str, set[str]]) -> Iterator[str]:
    for binding in things.of("RoleBinding", "ClusterRoleBinding"):
        user = name_of(binding)
        yield from things.missing(user, binding["roleRef"]["kind"], binding["roleRef"]["name"])
        for subject in binding["subjects"]:
            yield from things.missing(user, subject["kind"], subject["name"])
            if subject.get("namespace") != NAMESPACE:
                yield f"{user}: the namespace of {subject['name']} is {subject.get('namespace')!r}, not {NAMESPACE!r}"
    for role in things.of("Role", "ClusterRole"):
        for rule in role["rules"]:
            for key in ("apiGroups", "resources", "verbs"):
                if "*" in rule[key]:
                    yield f"{name_of(role)}: {key} must not be *"
            for name in rule.get("resourceNames") or []:
                if "secrets" in rule["resources"]:
                    yield from _secret_faults(name_of(role), secrets, name)
                if "configmaps" in rule["resources"]:
                    yield from things.missing(name_of(role), "ConfigMap", name)
            if {"secrets", "configmaps"} & set(rule["resources"]) and not rule.get("resourceNames"):
                yield f"{name_of(role)}: {rule['resources']} without resourceNames means all of them"


def _store_faults(things: Things, secrets: dict[str, set[str]]) -> Iterator[str]:
    """Two ConfigMaps are YAML in a string, which nobody but Kubeflow's launchers and Argo's controller would read."""
    configs = {thing["metadata"]["name"]: thing for thing in things.of("ConfigMap")}
    if ("Namespace", NAMESPACE) in things.names:
        for name in ("kfp-launcher", "artifact-repositories"):
            yield from things.missing("the namespace", "ConfigMap", name)
    if config := configs.get("kfp-launcher"):
        yield from _launcher_faults(things, config, secrets)
    if config := configs.get("artifact-repositories"):
        yield from _archive_faults(things, config, secrets)


def _launcher_faults(things: Things, config: Object, secrets: dict[str, set[str]]) -> Iterator[str]:
    root, user = config["data"]["defaultPipelineRoot"], name_of(config)
    providers: dict[str, Any] = yaml.safe_load(config["data"]["providers"])
    if root.partition("://")[0] not in providers:
        yield f"{user}: defaultPipelineRoot is {root}, but providers are {sorted(providers)}"
    for name, provider in providers.items():
        default = provider["default"]
        if unknown := default.keys() - PROVIDER:
            yield f"{user}: providers.{name}.default has no {sorted(unknown)}"
        for key, kind in (("endpoint", str), ("region", str), ("disableSSL", bool), ("forcePathStyle", bool)):
            if not isinstance(default.get(key), kind):
                yield f"{user}: providers.{name}.default.{key} must be a {kind.__name__}"
        reference = default["credentials"]["secretRef"]
        keys = reference["accessKeyKey"], reference["secretKeyKey"]
        yield from _secret_faults(user, secrets, reference["secretName"], *keys)
        yield from _endpoint_faults(things, user, str(default.get("endpoint")))


def _archive_faults(things: Things, config: Object, secrets: dict[str, set[str]]) -> Iterator[str]:
    user, chosen = name_of(config), (config["metadata"].get("annotations") or {}).get(DEFAULT_REPOSITORY)
    if chosen not in config["data"]:
        yield f"{user}: the annotation names repository {chosen!r}, there are {sorted(config['data'])}"
    for text in config["data"].values():
        bucket: dict[str, Any] = yaml.safe_load(text)["s3"]
        if unknown := bucket.keys() - REPOSITORY:
            yield f"{user}: s3 has no {sorted(unknown)}"
        for key in ("accessKeySecret", "secretKeySecret"):
            yield from _secret_faults(user, secrets, bucket[key]["name"], bucket[key]["key"])
        yield from _endpoint_faults(things, user, bucket["endpoint"])


def _endpoint_faults(things: Things, user: str, endpoint: str) -> Iterator[str]:
    """An address inside the cluster is that of a Service of the namespace, and of a port of it."""
    host, _, port = endpoint.partition(":")
    if not host.endswith(".svc.cluster.local"):
        return
    service, namespace = host.split(".")[:2]
    found = [s["spec"]["ports"] for s in things.of("Service") if s["metadata"]["name"] == service]
    ports = [str(entry["port"]) for entries in found for entry in entries]
    if namespace != NAMESPACE or port not in ports:
        yield f"{user}: endpoint {endpoint}: Service {service} has ports {ports}"


def _queue_faults(things: Things) -> Iterator[str]:
    for queue in things.of("LocalQueue"):
        yield from things.missing(name_of(queue), "ClusterQueue", queue["spec"]["clusterQueue"])
    for queue in things.of("ClusterQueue"):
        for group in queue["spec"]["resourceGroups"]:
            for flavor in group["flavors"]:
                yield from things.missing(name_of(queue), "ResourceFlavor", flavor["name"])
                listed = [resource["name"] for resource in flavor["resources"]]
                if listed != group["coveredResources"]:
                    yield f"{name_of(queue)}: flavor {flavor['name']} lists {listed}, not {group['coveredResources']}"


def _service_faults(things: Things) -> Iterator[str]:
    for service in things.of("Service"):
        user, selector = name_of(service), service["spec"]["selector"].items()
        served = [pod["spec"] for _, pod in things.pods() if selector <= labels_of(pod).items()]
        if not served:
            yield f"{user}: its selector matches no pod"
        ports = [port for spec in served for c in containers_of(spec) for port in c.get("ports") or []]
        names = {str(port.get("name")) for port in ports}
        for port in service["spec"]["ports"]:
            if isinstance(port.get("targetPort"), str) and port["targetPort"] not in names:
                yield f"{user}: targetPort {port['targetPort']!r} is no port of its pods, which have {sorted(names)}"
    for workload in things.of("StatefulSet"):
        yield from things.missing(name_of(workload), "Service", workload["spec"]["serviceName"])
        wanted = workload["spec"]["selector"]["matchLabels"].items()
        if not wanted <= labels_of(workload["spec"]["template"]).items():
            yield f"{name_of(workload)}: its selector does not match its own pods"
