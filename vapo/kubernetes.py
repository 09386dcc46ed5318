"""What Kubernetes takes as a quantity, a name or a label, told before a cluster refuses it; nothing here asks one.

The rules are those of its API: k8s.io/apimachinery, pkg/api/resource/quantity.go and pkg/util/validation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vapo.recipe import Resources, Toleration

NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)(?:[eE]([+-]?\d{1,2}))?")
SUFFIXES = {
    **{suffix: Decimal(1024) ** power for power, suffix in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), 1)},
    **{suffix: Decimal(1000) ** power for power, suffix in enumerate(("k", "M", "G", "T", "P", "E"), 1)},
    **{suffix: Decimal(1000) ** -power for power, suffix in enumerate(("m", "u", "n"), 1)},
}
DNS_LABEL = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")
DNS_SUBDOMAIN = re.compile(r"(?=.{1,253}$)[a-z0-9](?:[-a-z0-9]*[a-z0-9])?(?:\.[a-z0-9](?:[-a-z0-9]*[a-z0-9])?)*")
PART = re.compile(
    r"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
)  # of a label: its value, its name without a domain
IMAGE = re.compile(  # as registries take it: distribution/reference
    r"(?:[A-Za-z0-9.-]+(?::\d+)?/)?[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*"
    r"(?::\w[\w.-]{0,127})?(?:@[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]+)?"
)
OWN = ("cpu", "memory", "ephemeral-storage")  # resources without a domain
CPU = "write cores, say '8', '0.5' or '500m'"
BYTES = "write bytes as Kubernetes does, say '64Gi' (64 x 2^30) or '64G' (64 x 10^9)"
NAME = "lower-case letters, digits and '-'"
LABEL = "at most 63 letters, digits, '-', '_' and '.', a letter or digit at both ends"


def quantity(text: str) -> Decimal | None:
    """The number that a quantity means: '64Gi' is 64 * 2^30, '500m' is 0.5; None: Kubernetes does not take it."""
    suffix = next((s for s in SUFFIXES if text.endswith(s)), "")
    found = NUMBER.fullmatch(text.removesuffix(suffix))
    if not found or (suffix and found[2]):
        return None
    return Decimal(found[1]) * Decimal(10) ** int(found[2] or 0) * SUFFIXES.get(suffix, Decimal(1))


def check_pods(where: str, asked: Resources) -> None:
    """What the pods of a stage ask for.

    Args:
        where: the recipe's table, say "resources.rollout".

    Raises:
        ValueError: Kubernetes would not take it; one line with key, value and cure.
    """
    check_image(f"{where}.image", asked.image)
    _check_cpu(f"{where}.cpu", asked.cpu)
    for key in ("memory", "shared_memory"):
        _check_bytes(f"{where}.{key}", getattr(asked, key))
    if asked.accelerator and not asked.accelerators:
        raise ValueError(
            f"{where}.accelerators 0 with accelerator {asked.accelerator!r}: say how many, or leave accelerator out"
        )
    if asked.accelerators and not asked.accelerator:
        raise ValueError(
            f"{where}.accelerator is empty with accelerators {asked.accelerators}: name the device, say "
            "'nvidia.com/gpu', or set accelerators to 0"
        )
    if asked.accelerator:
        _check_device(f"{where}.accelerator", asked.accelerator)
    if asked.memory and asked.shared_memory and _value(asked.shared_memory) > _value(asked.memory):
        raise ValueError(
            f"{where}.shared_memory {asked.shared_memory!r} is above memory {asked.memory!r}, of which it is a part: "
            "lower it, or raise memory"
        )
    for key, value in asked.node_selector.items():
        check_label(f"{where}.node_selector", key, value)
    for toleration in asked.tolerations:
        _check_toleration(f"{where}.tolerations", toleration)
    check_queue(f"{where}.queue", asked.queue)
    check_name(f"{where}.cache_volume", asked.cache_volume, DNS_LABEL)  # kfp names the pod's volume after the claim


def check_nodes(where: str, resources: Mapping[str, str | int]) -> None:
    """What each node of a TrainJob asks for; raises as `check_pods`."""
    for name, value in resources.items():
        key = f"{where}.{name}"
        if name == "cpu":
            _check_cpu(key, str(value))
        elif name in OWN or name.startswith("hugepages-"):
            _check_bytes(key, str(value))
        else:
            _check_device(f"{where}: the resource", name)
            if not str(value).isdecimal():
                raise ValueError(f"{key} {value!r} is no whole number: devices are not shared; write it as 8")


def check_image(key: str, image: str) -> None:
    """An image's reference, or nothing; raises as `check_pods`."""
    if image and not IMAGE.fullmatch(image):
        raise ValueError(
            f"{key} {image!r} is no image: write registry.example/team/vapo:1.0 or, for runs that can be repeated, "
            "registry.example/team/vapo@sha256:...; without spaces, names in lower case"
        )


def check_name(key: str, name: str, rule: re.Pattern[str] = DNS_SUBDOMAIN) -> None:
    """The name of an object in the cluster, or nothing; raises as `check_pods`."""
    if name and not rule.fullmatch(name):
        more, most = (" and '.'", 253) if rule is DNS_SUBDOMAIN else ("", 63)
        raise ValueError(
            f"{key} {name!r} is no name in Kubernetes: use at most {most} {NAME}{more}, a letter or digit at both ends"
        )


def check_queue(key: str, queue: str) -> None:
    """The name of a LocalQueue, which is the value of a label besides; raises as `check_pods`."""
    check_name(key, queue)
    if len(queue) > 63:
        raise ValueError(f"{key} {queue!r} has {len(queue)} characters: pods carry it as a label, which takes 63")


def check_label(key: str, name: str, value: str) -> None:
    """A label's name and value; raises as `check_pods`."""
    if not _qualified(name):
        raise ValueError(f"{key}: the label {name!r}: use {LABEL}; a domain and '/' may stand before it")
    if value and not PART.fullmatch(value):
        raise ValueError(f"{key}.{name} {value!r} is no value of a label: use {LABEL}")


def _qualified(name: str) -> bool:
    domain, slash, part = name.rpartition("/")
    return bool(PART.fullmatch(part)) and (not slash or bool(DNS_SUBDOMAIN.fullmatch(domain)))


def _check_device(key: str, name: str) -> None:
    if "/" not in name:
        raise ValueError(f"{key} {name!r} has no domain: write it as the cluster's nodes do, say 'nvidia.com/gpu'")
    if not _qualified(name):
        raise ValueError(f"{key} {name!r} is no resource's name: write domain/name, say 'nvidia.com/gpu'")


def _check_cpu(key: str, text: str) -> None:
    if text and not quantity(text):
        raise ValueError(f"{key} {text!r} is no quantity of CPU: {CPU}")


def _check_bytes(key: str, text: str) -> None:
    if not text:
        return
    value = quantity(text)
    if value is None or not value:
        raise ValueError(f"{key} {text!r} is no quantity of memory: {BYTES}")
    if value < 1 << 20:
        raise ValueError(f"{key} {text!r} is {value:f} bytes, in which nothing runs: {BYTES}")


def _value(text: str) -> Decimal:
    value = quantity(text)
    assert value is not None
    return value


def _check_toleration(key: str, toleration: Toleration) -> None:
    shown = toleration.model_dump(exclude_defaults=True)
    if toleration.operator == "Exists" and toleration.value:
        raise ValueError(f"{key} {shown}: operator 'Exists' takes no value: leave it out, or set operator to 'Equal'")
    if toleration.operator == "Equal" and not toleration.key:
        raise ValueError(f"{key} {shown}: a key is wanted; without one, for every taint, operator must be 'Exists'")
    if toleration.tolerationSeconds is not None and toleration.effect != "NoExecute":
        raise ValueError(f"{key} {shown}: tolerationSeconds is for effect 'NoExecute': leave it out")
    if toleration.key:
        check_label(key, toleration.key, toleration.value)
