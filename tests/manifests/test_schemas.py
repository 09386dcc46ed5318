"""The kept schemas are those that were published: every field of the models, and the rules beyond fields."""

from __future__ import annotations

import json
from typing import Any

import pytest

from manifests.schemas import KEPT, kept, schema_faults

QUEUE: dict[str, Any] = {
    "apiVersion": "kueue.x-k8s.io/v1beta2",
    "kind": "ClusterQueue",
    "metadata": {"name": "q"},
    "spec": {
        "resourceGroups": [
            {"coveredResources": ["cpu"], "flavors": [{"name": "f", "resources": [{"name": "cpu", "nominalQuota": 4}]}]}
        ]
    },
}


def test_every_custom_kind_has_one() -> None:
    assert {kind.rpartition("/")[2] for kind in kept()} == {
        *("ResourceFlavor", "ClusterQueue", "LocalQueue", "Pipeline", "PipelineVersion"),
        *("TrainJob", "TrainingRuntime", "ClusterTrainingRuntime"),
    }


def test_the_trainers_are_those_of_its_models() -> None:
    """The fields, and which are required, as the published Python models have them."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    schemas = json.loads((KEPT / "trainer.json").read_text())["$defs"]
    prefixes = {"jobset": "JobsetV1alpha2", "volcano": "SchedulingV1beta1"}
    compared = 0
    for name, schema in schemas.items():
        group, _, kind = name.rpartition(".")
        fields = getattr(models, prefixes.get(group, "TrainerV1alpha1") + kind).model_fields
        assert set(schema["properties"]) == {field.alias or key for key, field in fields.items()}, name
        required = {field.alias or key for key, field in fields.items() if field.is_required()}
        assert set(schema.get("required", [])) == required, name
        assert schema["additionalProperties"] is False
        compared += 1
    assert compared > 30


def test_a_queue_without_a_cohort_borrows_nothing() -> None:
    assert schema_faults(QUEUE) == ()
    borrowing = json.loads(json.dumps(QUEUE))
    borrowing["spec"]["resourceGroups"][0]["flavors"][0]["resources"][0]["borrowingLimit"] = 2
    assert schema_faults(borrowing)
    borrowing["spec"]["cohortName"] = "everybody"
    assert schema_faults(borrowing) == ()
    assert schema_faults({**QUEUE, "spec": {**QUEUE["spec"], "cohort": "everybody"}})  # its name in v1beta1


@pytest.mark.parametrize(
    ("toleration", "well"),
    [
        ({"key": "k", "operator": "Exists"}, True),
        ({"key": "k", "value": "v", "effect": "NoSchedule"}, True),
        ({"operator": "Exists"}, True),
        ({"value": "v"}, False),
        ({"key": "k", "operator": "Exists", "value": "v"}, False),
        ({"key": "k", "tolerationSeconds": 5}, False),
        ({"key": "k", "effect": "Never"}, False),
    ],
)
def test_a_flavors_tolerations(toleration: dict[str, Any], well: bool) -> None:
    flavor = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "ResourceFlavor", "metadata": {"name": "f"}}
    assert (not schema_faults({**flavor, "spec": {"tolerations": [toleration]}})) == well


def test_an_unknown_kind_is_refused() -> None:
    thing = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "Queue", "metadata": {"name": "q"}}
    assert len(schema_faults(thing)) == 2  # of two versions of Kubernetes
