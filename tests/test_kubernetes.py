"""What Kubernetes would refuse is refused before it: the key, the value and the cure in one line."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import DefaultContext, localcontext
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kubernetes.utils.quantity import parse_quantity

from vapo.errors import UserError
from vapo.kubernetes import quantity
from vapo.recipe import Recipe, StageResources, parse_recipe
from vapo.stage import STAGES

SMALLEST: dict[str, Any] = {"problems": {"examples": 10}}
GPU = {"accelerator": "nvidia.com/gpu", "accelerators": 8}
NODES = {"nodes": 2, "backend": "process"}


def parsed(**sections: Any) -> Recipe:
    return parse_recipe(SMALLEST | sections, "here")


def fault(**sections: Any) -> str:
    with pytest.raises(UserError) as error:
        parsed(**sections)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(autouse=True, scope="module")
def usual_precision() -> Iterator[None]:
    """reasoning-gym, if another test has imported it, leaves fewer digits to everybody's decimals."""
    with localcontext(DefaultContext):
        yield


@pytest.mark.parametrize("text", ["8", "0.5", ".5", "8.", "500m", "64Gi", "64G", "1.5Ti", "1e3", "12E", "3e-2", "7k"])
def test_quantities_mean_what_they_mean_in_kubernetes(text: str) -> None:
    assert quantity(text) == parse_quantity(text)


@given(st.text("0123456789.KMGTPEkmnuibBeE+ ,-", max_size=7))
def test_no_quantity_means_another_number_in_kubernetes(text: str) -> None:
    found = quantity(text)
    assert found is None or found == parse_quantity(text)


@pytest.mark.parametrize(
    "text", ["64GB", "8 Gi", "1,5", "64gi", "64K", "-1", "+1", "", "Gi", "1e3Gi", "8Gib", "1e", "."]
)
def test_no_quantities(text: str) -> None:
    assert quantity(text) is None


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"memory": "64GB"},
            "rollout.memory '64GB' is no quantity of memory: write bytes as Kubernetes does, say '64Gi'",
        ),
        ({"memory": "8 Gi"}, "rollout.memory '8 Gi' is no quantity"),
        ({"memory": "0"}, "rollout.memory '0' is no quantity"),
        ({"memory": 64}, "rollout.memory '64' is 64 bytes, in which nothing runs: write bytes"),
        ({"memory": "500m"}, "rollout.memory '500m' is 0.500 bytes, in which nothing runs"),
        ({"shared_memory": "1,5Gi"}, "rollout.shared_memory '1,5Gi' is no quantity of memory"),
        ({"shared_memory": "9Gi", "memory": "8Gi"}, "shared_memory '9Gi' is above memory '8Gi', of which it is a part"),
        ({"cpu": "1,5"}, "rollout.cpu '1,5' is no quantity of CPU: write cores, say '8', '0.5' or '500m'"),
        ({"cpu": 0}, "rollout.cpu '0' is no quantity of CPU"),
        ({"cpu": -2}, "rollout.cpu '-2' is no quantity of CPU"),
        ({"cpu": True}, "rollout.cpu = True: input should be a valid string"),
        ({"accelerator": "nvidia.com/gpu"}, "accelerators 0 with accelerator 'nvidia.com/gpu': say how many, or leave"),
        (
            {"accelerators": 8},
            "rollout.accelerator is empty with accelerators 8: name the device, say 'nvidia.com/gpu'",
        ),
        (GPU | {"accelerators": -1}, "rollout.accelerators = -1: input should be greater than or equal to 0"),
        (GPU | {"accelerator": "gpu"}, "rollout.accelerator 'gpu' has no domain: write it as the cluster's nodes do"),
        (GPU | {"accelerator": "nvidia.com/gpu/a"}, "'nvidia.com/gpu/a' is no resource's name: write domain/name"),
        (
            {"node_selector": {"pool": "a" * 64}},
            f"rollout.node_selector.pool '{'a' * 64}' is no value of a label: use at",
        ),
        ({"node_selector": {"pool": "two words"}}, "node_selector.pool 'two words' is no value of a label"),
        ({"node_selector": {"a/b/c": "x"}}, "rollout.node_selector: the label 'a/b/c': use at most 63 letters"),
        (
            {"tolerations": [{"key": "a", "effect": "No"}]},
            "tolerations.0.effect = 'No': input should be '', 'NoSchedule'",
        ),
        ({"tolerations": [{"key": "a", "operator": "In"}]}, "operator = 'In': input should be 'Equal' or 'Exists'"),
        (
            {"tolerations": [{"key": "a", "efect": ""}]},
            "'resources.rollout.tolerations.0.efect': did you mean 'effect'?",
        ),
        (
            {"tolerations": [{"effect": "NoSchedule"}]},
            "a key is wanted; without one, for every taint, operator must be",
        ),
        ({"tolerations": [{"key": "a", "operator": "Exists", "value": "x"}]}, "operator 'Exists' takes no value"),
        ({"tolerations": [{"key": "a", "tolerationSeconds": 5}]}, "tolerationSeconds is for effect 'NoExecute': leave"),
        ({"tolerations": [{"key": "a b"}]}, "rollout.tolerations: the label 'a b': use at most 63"),
        (
            {"queue": "My_queue"},
            "rollout.queue 'My_queue' is no name in Kubernetes: use at most 253 lower-case letters",
        ),
        ({"queue": "q" * 64}, "has 64 characters: pods carry it as a label, which takes 63"),
        (
            {"cache_volume": "a.b"},
            "rollout.cache_volume 'a.b' is no name in Kubernetes: use at most 63 lower-case letters",
        ),
        ({"time_limit": -1}, "rollout.time_limit = -1: input should be greater than or equal to 0"),
        ({"retries": -1}, "rollout.retries = -1"),
        ({"image": "Vapo:1"}, "rollout.image 'Vapo:1' is no image: write registry.example/team/vapo:1.0"),
    ],
)
def test_pods_that_kubernetes_would_refuse(asked: dict[str, Any], said: str) -> None:
    assert said in fault(resources={"rollout": asked})
    assert said.replace("rollout", "every") in fault(resources={"every": asked})


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"train": {"resources": {"memory": "200GB"}}}, "train.resources.memory '200GB' is no quantity of memory"),
        ({"train": {"resources": {"cpu": "16 cores"}}}, "train.resources.cpu '16 cores' is no quantity of CPU"),
        ({"train": {"resources": {"gpu": 8}}}, "train.resources: the resource 'gpu' has no domain"),
        ({"train": {"resources": {"nvidia.com/gpu": "0.5"}}}, "gpu '0.5' is no whole number: devices are not shared"),
        ({"train": {"resources": {"nvidia.com/gpu": -1}}}, "train.resources.nvidia.com/gpu -1 is no whole number"),
        ({"train": {"queue": "a_b"}}, "train.queue 'a_b' is no name in Kubernetes"),
        ({"train": {"secret": "A"}}, "train.secret 'A' is no name in Kubernetes"),
        ({"train": {"namespace": "a.b"}}, "train.namespace 'a.b' is no name in Kubernetes: use at most 63"),
        ({"train": {"runtime": "torch distributed"}}, "train.runtime 'torch distributed' is no name"),
        ({"train": {"image": "a b"}}, "train.image 'a b' is no image"),
        ({"train": {"time_limit": -1}}, "train.time_limit = -1"),
        ({"runtime": {"secret": "-a"}}, "runtime.secret '-a' is no name in Kubernetes"),
        ({"runtime": {"image": "vapo:"}}, "runtime.image 'vapo:' is no image"),
        (
            {"train": NODES, "resources": {"ppo_update": GPU}},
            "resources.ppo_update.accelerators 8 with train.nodes 2: its pod only launches a TrainJob, whose nodes",
        ),
        (
            {"train": {"ranks": 9}, "resources": {"advantages": GPU}},
            "resources.advantages.accelerators 8 is below train.ranks 9, one for each process: raise it, or lower",
        ),
        (
            {"rollout": {"engine": "vllm", "tensor_parallel": 9}, "resources": {"rollout": GPU}},
            "resources.rollout.accelerators 8 is below rollout.tensor_parallel 9",
        ),
    ],
)
def test_the_rest_of_what_a_cluster_is_asked_for(sections: dict[str, Any], said: str) -> None:
    assert said in fault(**sections)


def test_what_kubernetes_takes() -> None:
    taint = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}
    asked = {
        **GPU,
        "image": "registry.example:5000/team/vapo-cpu:1.0@sha256:0a",
        "cpu": 8,
        "memory": "1.5Ti",
        "shared_memory": 1e9,
        "node_selector": {"topology.kubernetes.io/zone": "a-1", "empty": ""},
        "tolerations": [taint, {"operator": "Exists"}, {"key": "dedicated", "value": "rl"}],
        "queue": "team.rl",
        "cache_volume": "vapo-cache",
    }
    found = parsed(resources={"rollout": asked}, train={"resources": {"cpu": 16, "hugepages-2Mi": "1Gi"}})
    pods = found.resources.of("rollout")
    assert (pods.cpu, pods.shared_memory) == ("8", "1000000000.0")
    assert found.resources.of("history").cpu == ""


def test_every_stage_has_a_table() -> None:
    assert set(StageResources.model_fields) == {*STAGES, "every"}


def test_a_stages_own_table_is_above_that_of_every_stage() -> None:
    every = {"cpu": 4, "memory": "8Gi", "retries": 2}
    found = parsed(resources={"every": every, "rollout": GPU | {"cpu": 40}}).resources
    assert (found.of("rollout").cpu, found.of("rollout").memory, found.of("rollout").accelerators) == ("40", "8Gi", 8)
    assert (found.of("report").cpu, found.of("report").retries, found.of("report").accelerators) == ("4", 2, 0)
