"""A compiled pipeline as the objects Pipeline and PipelineVersion, for a cluster that keeps pipelines in Kubernetes."""

import hashlib
import re
from typing import Any

import yaml

API = "pipelines.kubeflow.org/v2beta1"
LABELS = {"app.kubernetes.io/managed-by": "vapo", "app.kubernetes.io/part-of": "vapo"}
# Text that Go's YAML would read as a number or a truth value where Python's reads text: it is quoted.
AMBIGUOUS = re.compile(r"[-+.0-9].*|[yn]|(yes|no|on|off|true|false|null|nan|inf)|~|", re.IGNORECASE)

_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # with libyaml where there is one: 8 times faster


class _Writer(_Dumper):  # type: ignore[misc]
    """Text stays text, whoever reads it."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        style = '"' if AMBIGUOUS.fullmatch(text) else None
        node: yaml.ScalarNode = self.represent_scalar("tag:yaml.org,2002:str", text, style=style)
        return node

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Writer.add_representer(str, _Writer.represent_str)


def version_of(ir: str) -> str:
    """The version's name: the beginning of the IR's sha256, so that a changed recipe is a new version."""
    return hashlib.sha256(ir.encode()).hexdigest()[:16]


def kubernetes_objects(ir: str) -> list[dict[str, Any]]:
    """The Pipeline and the PipelineVersion of an IR, its documents as objects.

    A version is never changed (the cluster refuses it), so its name holds the hash of its content: applying an
    unchanged recipe again changes nothing. Its display name is that by which `vapo submit` finds it.

    Args:
        ir: YAML text of one document, or of two: the second configures the platform.
    """
    spec, *platforms = yaml.load_all(ir, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    pipeline, version = spec["pipelineInfo"]["name"], version_of(ir)
    described = spec["pipelineInfo"].get("description", "")
    described = {"description": described} if described else {}
    platform = {"platformSpec": platforms[0]} if platforms else {}
    return [
        {
            "apiVersion": API,
            "kind": "Pipeline",
            "metadata": {"name": pipeline, "labels": LABELS},
            "spec": described,
        },
        {
            "apiVersion": API,
            "kind": "PipelineVersion",
            "metadata": {"name": f"{pipeline}-{version}", "labels": LABELS},
            "spec": {
                **described,
                "displayName": version,
                "pipelineName": pipeline,
                "pipelineSpec": spec,
                **platform,
            },
        },
    ]


def as_text(ir: str) -> str:
    """The objects as one YAML file, the Pipeline first: its version is refused without it."""
    text: str = yaml.dump_all(kubernetes_objects(ir), Dumper=_Writer, sort_keys=True, width=120)
    return text
