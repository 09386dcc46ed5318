"""Adapters: what they change, what they leave alone, and that they go on from update to update."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from vapo.errors import UserError
from vapo.recipe import Advantages, PpoUpdate, Train, ValuePretraining
from vapo.schemas import EXPERIENCE
from vapo.store import open_checkpoint
from vapo.tables import ragged, read_table, write_table
from vapo.train.advantages import advantages
from vapo.train.experience import values_of
from vapo.train.lora import add_adapters, merged
from vapo.train.ppo_update import ppo_update
from vapo.train.value_pretraining import value_pretraining

from .conftest import LENGTHS, World

peft = pytest.importorskip("peft", reason="pip install 'vapo[lora]'")
TRAIN = Train(lora_rank=2, lora_alpha=8, lora_targets=("q_proj", "down_proj"))
DISTINCT = [7, 1, 12, 3, 5, 15, 9, 2, 20, 4, 17, 24]  # with the prompts no two rows are equally long


def update(world: World, name: str, *, after: str = "", train: Train = TRAIN, **changed: Any) -> dict[str, Any]:
    """An update that leaves `<name>_policy` and `<name>_critic`, of the world's models or of those called `after`."""
    source = {kind: world.root / (f"{after}_{kind}" if after else kind) for kind in ("policy", "critic")}
    section = PpoUpdate(**{"mini_batch": 12, "actor_lr": 1e-2, "critic_lr": 1e-2, "warmup_steps": 2, **changed})
    return ppo_update(
        section.model_copy(update={"train": train}),
        rollouts=world.rollouts,
        rewards=world.rewards,
        experience=world.experience,
        **source,
        reference=world.policy,
        new_policy=world.root / f"{name}_policy",
        new_critic=world.root / f"{name}_critic",
        iteration=2 if after else 1,
        seed=0,
        store=world.objects,
    )


@pytest.fixture(autouse=True)
def _experience(world: World) -> None:
    tables = {"rollouts": world.rollouts, "rewards": world.rewards, "experience": world.experience}
    advantages(Advantages(alpha=0.3), **tables, critic=world.critic, iteration=1)


def without_advantages(world: World) -> None:
    """Only the positive examples and the values teach: then two epochs are two updates."""
    world.write_rollouts(DISTINCT)
    _experience.__wrapped__(world)
    table = read_table(world.experience, EXPERIENCE)
    columns: dict[str, Any] = {name: table[name] for name in table.column_names}
    values, offsets = ragged(table, "advantages")
    write_table(world.experience, EXPERIENCE, {**columns, "advantages": (np.zeros_like(values), offsets)})


def changed_between(world: World, before: str, after: str) -> set[str]:
    """Names of the weights that differ; both models have the same."""
    one, other = (world.model(name).state_dict() for name in (before, after))
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_merging_is_pefts(world: World) -> None:
    """With adapters that are not zero: the same weights as peft's own merge, under the plain model's names."""
    model = world.model("policy")
    add_adapters(model, TRAIN, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    theirs = copy.deepcopy(model)
    for module in theirs.modules():
        if hasattr(module, "merge"):
            module.merge()
    plain = world.model("policy").state_dict()
    found = merged(dict(model.named_parameters()), TRAIN)
    assert found.keys() == plain.keys()
    expected = {name.replace(".base_layer.", "."): p for name, p in theirs.named_parameters() if "lora_" not in name}
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
        assert torch.equal(weight, plain[name]) == (not any(t in name for t in TRAIN.lora_targets))


def test_only_targets_and_the_value_head_change(world: World) -> None:
    metrics = update(world, "new")
    assert all(np.isfinite(value) for value in metrics.values() if value is not None)
    targets = {f"model.layers.{i}.{part}.weight" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")}
    assert changed_between(world, "policy", "new_policy") == targets
    assert changed_between(world, "critic", "new_critic") == targets | {"score.weight", "score.bias"}


def test_a_change_has_the_adapters_rank(world: World) -> None:
    update(world, "new", epochs=4)
    before, after = (world.model(name).state_dict() for name in ("policy", "new_policy"))
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        singular = torch.linalg.svdvals((after[name] - before[name]).double())
        assert singular[1] > 1e-4
        assert singular[2] < 1e-6


def test_the_first_ratio_is_exactly_1(world: World) -> None:
    assert update(world, "new")["approx_kl"] == 0.0


def test_the_next_update_goes_on_with_the_same_adapters_to_the_bit(world: World) -> None:
    """Two steps in one update, or one, a checkpoint, and one more; the base is stored once, as it was."""
    without_advantages(world)
    update(world, "whole", epochs=2)
    update(world, "begun")
    assert update(world, "resumed", after="begun")["steps"] == 2
    for kind in ("policy", "critic"):
        files = [{f.path: f.sha256 for f in world.manifest(f"{n}_{kind}").files} for n in ("whole", "resumed", "begun")]
        for found in files:
            found.pop("optimizer/state.json")
        assert files[1] == files[0]
        assert files[2] != files[0]
        first = {f.path: f.sha256 for f in world.manifest(kind).files}
        for found in files:
            assert found["optimizer/base/model.safetensors"] == first["model.safetensors"]


def test_it_learns_over_updates(world: World) -> None:
    """Five updates one after the other bring values to their targets; the rank bounds the change all the same."""
    errors, after = [], ""
    targets = np.repeat(world.data.rewards, LENGTHS)
    for number in range(5):
        update(world, f"u{number}", after=after)
        after = f"u{number}"
        values = np.concatenate(values_of(world.reader(f"{after}_critic"), world.data, np.arange(12), 10**6))
        errors.append(float(np.mean((values - targets) ** 2)))
    assert np.isfinite(errors).all()
    assert errors[-1] < 0.8 * errors[0]
    name = "model.layers.0.mlp.down_proj.weight"
    change = world.model("u4_critic").state_dict()[name] - world.model("critic").state_dict()[name]
    assert torch.linalg.svdvals(change.double())[2] < 1e-6


def test_the_checkpoint_is_a_plain_model(world: World, tmp_path: Path) -> None:
    """transformers loads it without peft, and the rollout's decoder reads the same file."""
    update(world, "new")
    folder = open_checkpoint(world.manifest("new_policy"), tmp_path / "new")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.state_dict().keys() == world.model("policy").state_dict().keys()
    assert not list(folder.glob("adapter*"))


def test_value_pretraining_with_adapters(world: World) -> None:
    """The critic's backbone is the policy's but for the targets; it starts PPO without any training state."""
    section = ValuePretraining(init="policy", min_steps=4, max_steps=4, must_beat_mean=False, mini_batch=6, lr=1e-2)
    tables = {"rollouts": world.rollouts, "rewards": world.rewards, "pretraining": world.root / "pretraining"}
    value_pretraining(
        section.model_copy(update={"train": TRAIN, "measure_every": 4}),
        **tables,
        policy=world.policy,
        critic=world.root / "first_critic",
        seed=0,
        store=world.objects,
    )
    changed = changed_between(world, "zero_critic", "first_critic")
    assert changed
    assert all("score" in name or "q_proj" in name or "down_proj" in name for name in changed)
    assert not [f.path for f in world.manifest("first_critic").files if f.path.startswith("optimizer/")]


def test_another_rank_than_the_states_is_refused(world: World) -> None:
    update(world, "new")
    with pytest.raises(UserError, match=r"policy was trained with train.lora_rank 2, this run sets 0: set it back"):
        update(world, "next", after="new", train=Train())


def test_a_layer_that_is_not_there_is_refused(world: World) -> None:
    with pytest.raises(UserError, match=r"train.lora_targets \['c_attn'\]: the model has no such layer; it has"):
        update(world, "new", train=Train(lora_rank=2, lora_targets=("q_proj", "c_attn")))
