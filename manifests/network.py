"""NetworkPolicies: selectors that match pods, and ways that are open at both ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from manifests.pod_security import labels_of
from manifests.references import NAMESPACE, Things
from manifests.render import Object
from manifests.schemas import name_of

HOME = "kubernetes.io/metadata.name"
MADE = {  # pods that others make in the namespace, by the labels that they always have
    "pods of a run": {"workflows.argoproj.io/workflow": "some-run"},
    "nodes of a TrainJob": {"jobset.sigs.k8s.io/replicatedjob-name": "node"},
}
OUTSIDE = {  # namespace -> pods there: labels and ports, as Kubeflow Pipelines 2.17 installs them
    "kubeflow": [
        ({"app": "ml-pipeline"}, {8887, 8888}),
        ({"app": "ml-pipeline-ui"}, set[int]()),
        ({"component": "metadata-grpc-server"}, {8080}),
    ],
    "kube-system": [({"k8s-app": "kube-dns"}, {53})],
}
Flow = tuple[str, str, int | None]  # from, to, port; None: any


def matches(selector: Object, labels: dict[str, str]) -> bool:
    """A label selector, as Kubernetes reads it."""
    if not (selector.get("matchLabels") or {}).items() <= labels.items():
        return False
    for wanted in selector.get("matchExpressions") or []:
        key, values = wanted["key"], wanted.get("values") or []
        match wanted["operator"]:
            case "Exists":
                fits = key in labels
            case "DoesNotExist":
                fits = key not in labels
            case "In":
                fits = labels.get(key) in values
            case "NotIn":
                fits = labels.get(key) not in values
            case other:
                raise ValueError(f"operator {other!r}")
        if not fits:
            return False
    return True


def network_faults(objects: list[Object]) -> Iterator[str]:
    """Policies that select nothing, ports that nobody listens on, and ways that are open at one end only."""
    things = Things(objects)
    policies = things.of("NetworkPolicy")
    if not policies:
        return
    pods = MADE | {user: labels for user, pod in things.pods() if (labels := labels_of(pod))}
    denied = [p for p in policies if not p["spec"]["podSelector"] and not {"ingress", "egress"} & p["spec"].keys()]
    if not any(set(p["spec"]["policyTypes"]) == {"Ingress", "Egress"} for p in denied):
        yield "no policy denies all ingress and egress, so the others open nothing"
    ways: dict[str, set[Flow]] = {"ingress": set(), "egress": set()}
    for policy in policies:
        spec, user = policy["spec"], name_of(policy)
        here = [name for name, labels in pods.items() if matches(spec["podSelector"], labels)]
        if not here:
            yield f"{user}: its podSelector matches no pod"
        for direction, end in (("ingress", "from"), ("egress", "to")):
            if spec.get(direction) and direction.capitalize() not in spec["policyTypes"]:
                yield f"{user}: has {direction} rules, but policyTypes are {spec['policyTypes']}"
            for rule in spec.get(direction) or []:
                ports = [port["port"] for port in rule.get("ports") or []] or [None]
                for peer in rule[end]:
                    there, faults = _peers(peer, ports, pods, direction)
                    yield from (f"{user}: {fault}" for fault in faults)
                    ways[direction] |= {
                        (a, b, port)
                        for mine in here
                        for other in there
                        for a, b in [(other, mine) if direction == "ingress" else (mine, other)]
                        for port in ports
                    }
    for a, b, port in sorted(ways["egress"] - ways["ingress"], key=str):
        yield f"{a} may send to {b}, port {port}, which no policy lets in"
    for a, b, port in sorted(ways["ingress"] - ways["egress"], key=str):
        yield f"{b} lets {a} in, port {port}, which no policy lets out"


def _peers(
    peer: Object, ports: list[Any], pods: dict[str, dict[str, str]], direction: str
) -> tuple[list[str], list[str]]:
    """(pods of the namespace that a peer means, what is wrong with it)."""
    if "ipBlock" in peer:
        return [], []
    selector = peer.get("podSelector") or {}
    place = (peer.get("namespaceSelector") or {}).get("matchLabels", {}).get(HOME, NAMESPACE)
    if "namespaceSelector" not in peer:
        there = [name for name, labels in pods.items() if matches(selector, labels)]
        return there, [] if there else [f"{selector} matches no pod"]
    if place not in OUTSIDE:
        return [], [f"namespace {place!r} is none that is known: {sorted(OUTSIDE)}"]
    found = [listens for labels, listens in OUTSIDE[place] if matches(selector, labels)]
    wrong = [] if found else [f"{selector} matches no pod of namespace {place}"]
    listening: set[Any] = set().union(*found)
    if direction == "egress" and found and (deaf := set(ports) - listening):
        wrong.append(f"pods of namespace {place} listen on {sorted(listening)}, not {sorted(deaf, key=str)}")
    return [], wrong
