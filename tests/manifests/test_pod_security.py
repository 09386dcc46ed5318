"""`restricted`, field by field: a pod that keeps to it, and one change for each rule of the standard."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from manifests.pod_security import ours, restricted

POD: dict[str, Any] = {
    "automountServiceAccountToken": False,
    "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
    "containers": [
        {
            "name": "main",
            "image": "x:1",
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            },
        }
    ],
    "volumes": [{"name": "scratch", "emptyDir": {}}],
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The pod with one field set; "main" stands for its container."""
    pod: Any = copy.deepcopy(POD)
    *folders, last = path.split(".")
    place = pod
    for folder in folders:
        place = place["containers"][0] if folder == "main" else place.setdefault(folder, {})
    place[last] = value
    return dict(pod)


RULES = [
    ("hostNetwork", True, "hostNetwork"),
    ("hostPID", True, "hostPID"),
    ("hostIPC", True, "hostIPC"),
    ("main.securityContext.privileged", True, "privileged"),
    ("main.securityContext.allowPrivilegeEscalation", True, "allowPrivilegeEscalation"),
    ("main.securityContext.capabilities", {"drop": ["NET_RAW"]}, "capabilities.drop"),
    ("main.securityContext.capabilities", {"drop": ["ALL"], "add": ["SYS_PTRACE"]}, "capabilities.add"),
    ("main.securityContext.procMount", "Unmasked", "procMount"),
    ("main.securityContext.runAsUser", 0, "runAsUser"),
    ("main.securityContext.runAsNonRoot", False, "runAsNonRoot"),
    ("securityContext.runAsNonRoot", None, "runAsNonRoot"),
    ("securityContext.runAsUser", 0, "runAsUser"),
    ("securityContext.seccompProfile", None, "seccompProfile"),
    ("main.securityContext.seccompProfile", {"type": "Unconfined"}, "seccompProfile"),
    ("securityContext.appArmorProfile", {"type": "Unconfined"}, "appArmorProfile"),
    ("securityContext.seLinuxOptions", {"type": "spc_t"}, "seLinuxOptions"),
    ("securityContext.seLinuxOptions", {"user": "root"}, "seLinuxOptions"),
    ("securityContext.sysctls", [{"name": "kernel.msgmax", "value": "1"}], "sysctl"),
    ("securityContext.windowsOptions", {"hostProcess": True}, "hostProcess"),
    ("main.ports", [{"containerPort": 1, "hostPort": 1}], "hostPort"),
    ("main.livenessProbe", {"httpGet": {"port": 1, "host": "127.0.0.1"}}, "httpGet.host"),
    ("main.lifecycle", {"preStop": {"tcpSocket": {"port": 1, "host": "x"}}}, "tcpSocket.host"),
    ("volumes", [{"name": "disk", "hostPath": {"path": "/"}}], "hostPath"),
    ("volumes", [{"name": "disk", "nfs": {"path": "/", "server": "x"}}], "nfs"),
    ("initContainers", [{"name": "first", "image": "x:1"}], "container first: allowPrivilegeEscalation"),
]


def test_a_pod_that_keeps_to_it() -> None:
    assert list(restricted(POD, {})) == list(ours(POD)) == []
    bound = changed("main.securityContext.capabilities", {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]})
    assert list(restricted(bound, {})) == []


@pytest.mark.parametrize(("path", "value", "said"), RULES)
def test_a_rule(path: str, value: Any, said: str) -> None:
    found = list(restricted(changed(path, value), {}))
    assert found
    assert any(said in fault for fault in found), found


def test_apparmor_by_annotation() -> None:
    key = "container.apparmor.security.beta.kubernetes.io/main"
    assert list(restricted(POD, {"annotations": {key: "runtime/default"}})) == []
    assert len(list(restricted(POD, {"annotations": {key: "unconfined"}}))) == 1


def test_our_own_rules() -> None:
    assert len(list(ours(changed("main.securityContext.readOnlyRootFilesystem", False)))) == 1
    assert len(list(ours(changed("automountServiceAccountToken", True)))) == 1
