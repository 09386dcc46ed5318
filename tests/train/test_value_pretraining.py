"""Value-pretraining: the policy is only read, held-out prompts only measure, and the best critic is what is left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vapo.errors import UserError
from vapo.recipe import ValuePretraining
from vapo.rl.diagnostics import explained_variance
from vapo.seeds import derive
from vapo.train.experience import Rollouts, values_of
from vapo.train.value_pretraining import _step, split_by_prompt, value_pretraining

from .conftest import World

SETTINGS: dict[str, Any] = {
    "init": "policy",
    "steps": 6,
    "mini_batch": 6,
    "measure_every": 2,
    "heldout_share": 0.25,
    "lr": 1e-2,
}


def run(world: World, name: str = "new_critic", seed: int = 0, **changed: Any) -> dict[str, float | None]:
    return value_pretraining(
        ValuePretraining(**{**SETTINGS, **changed}),
        rollouts=world.rollouts,
        rewards=world.rewards,
        policy=world.policy,
        critic=world.root / name,
        seed=seed,
        store=world.objects,
    )


def heldout_of(world: World, share: float = 0.25, seed: int = 0) -> np.ndarray:
    """The rows that the stage holds out."""
    generator = np.random.default_rng(derive(seed, "value_pretraining", "batches"))
    return split_by_prompt(world.data, share, generator)[1]


def test_the_policy_is_only_read(world: World) -> None:
    """Its manifest and every stored byte of it are what they were."""
    manifest, stored = world.policy.read_bytes(), world.stored()
    run(world)
    assert world.policy.read_bytes() == manifest
    assert {name: world.stored()[name] for name in stored} == stored


@pytest.mark.parametrize("init", ["policy", "reward_model"])
def test_the_same_seed_gives_the_same_critic(world: World, init: str) -> None:
    metrics = [
        run(world, name, seed, init=init, reward_model_steps=2)
        for name, seed in (("critic_a", 0), ("critic_b", 0), ("critic_c", 1))
    ]
    assert metrics[0] == metrics[1]
    assert world.manifest("critic_a") == world.manifest("critic_b")
    assert world.manifest("critic_a").digest != world.manifest("critic_c").digest


def test_the_critic_belongs_to_its_policy_and_carries_its_tokenizer(world: World) -> None:
    run(world)
    found = world.manifest("new_critic")
    assert found.facts == {"policy": world.manifest("policy").digest, "steps": 0}
    digests = [{f.path: f.sha256 for f in world.manifest(n).files}["tokenizer.json"] for n in ("policy", "new_critic")]
    assert digests[0] == digests[1]
    assert not [f.path for f in found.files if f.path.startswith("optimizer/")]  # PPO starts the critic's afresh


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.99])
def test_the_split_is_by_prompt_and_complete(world: World, share: float) -> None:
    data = world.data
    train, heldout = split_by_prompt(data, share, np.random.default_rng(0))
    assert sorted([*train, *heldout]) == list(range(12))
    prompts = [{data.prompt_ids[r] for r in rows} for rows in (train, heldout)]
    assert prompts[0].isdisjoint(prompts[1])
    assert len(prompts[1]) == {0.01: 1, 0.25: 1, 0.5: 2, 0.99: 3}[share]


def test_one_prompt_cannot_be_split(world: World) -> None:
    world.write_rollouts([3, 4, 5])
    with pytest.raises(UserError, match=r"value_pretraining\.prompts: 1 distinct prompts cannot be split"):
        run(world)


def test_what_is_reported_is_the_kept_critics(world: World) -> None:
    metrics = run(world)
    rows, data = heldout_of(world), world.data
    predicted = values_of(world.model("new_critic"), data, rows, 10**6)
    values = np.concatenate([predicted[r] for r in rows])
    targets = np.repeat(data.rewards[rows], data.lengths[rows])
    assert metrics["value_loss"] == pytest.approx(0.5 * float(np.mean((values - targets) ** 2)), rel=1e-5)
    assert metrics["explained_variance"] == pytest.approx(explained_variance(values, targets), rel=1e-4)
    assert metrics["heldout_rows"] == len(rows)


def test_the_best_is_kept_not_the_last(world: World) -> None:
    """A learning rate that ruins everything: the critic that valued everything at 0 is left, at step 0."""
    metrics = run(world, lr=1.0)
    assert metrics["kept_step"] == 0
    assert metrics["value_loss"] == 0.5  # rewards are +1 and -1
    assert not np.concatenate(values_of(world.model("new_critic"), world.data, np.arange(12), 10**6)).any()


def test_it_learns_what_the_prompt_decides(world: World) -> None:
    """Returns follow from the prompt's first token: seen in training, they are valued right for new responses."""
    world.write_rollouts([2] * 150, by_prompt=True)
    metrics = run(world, steps=40, mini_batch=45, measure_every=10)
    assert metrics["value_loss"] is not None
    assert metrics["value_loss"] < 0.25  # a constant has 0.5
    variance = metrics["explained_variance"]
    assert variance is not None
    assert variance > 0.5


def test_undefined_explained_variance_is_none(world: World) -> None:
    world.write_rollouts(correct=[True] * 12)
    assert run(world)["explained_variance"] is None


def test_heldout_rows_teach_nothing(world: World) -> None:
    """Other rewards on the held-out prompts give other measures and the same critic."""
    rows, losses = heldout_of(world), []
    for name, reward in (("critic_a", 1.0), ("critic_b", 0.5)):
        world.write_rollouts(rewards=[reward if r in rows else (1.0 if r % 3 == 0 else -1.0) for r in range(12)])
        metrics = run(world, name, lr=1e-3, measure_every=6)
        assert metrics["kept_step"] == 6
        losses.append(metrics["value_loss"])
    assert losses[0] != losses[1]
    assert world.manifest("critic_a").digest == world.manifest("critic_b").digest


class Recorder:
    """Stands for an optimiser: takes the gradient and changes nothing."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.gradient = torch.empty(0)

    def step(self) -> None:
        self.gradient = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
        self.model.zero_grad()


def gradient(world: World, data: Rollouts, budget: int, rows: np.ndarray, *, last: bool) -> torch.Tensor:
    model = world.model("critic")
    recorder: Any = Recorder(model)
    tokens = _step(model, recorder, data, rows, budget, last_token_only=last)
    assert tokens == data.lengths[rows].sum()
    assert recorder.gradient.abs().sum() > 0
    return recorder.gradient


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("budget", [1, 40])
def test_a_steps_gradient_does_not_depend_on_the_budget(world: World, budget: int, last: bool) -> None:
    rows = np.array([4, 0, 8, 1, 11, 6])
    whole = gradient(world, world.data, 10**6, rows, last=last)
    torch.testing.assert_close(gradient(world, world.data, budget, rows, last=last), whole, rtol=0, atol=1e-6)


def test_a_reward_model_learns_from_the_last_token_alone(world: World) -> None:
    """Its gradient is that of 0.5 (V - reward)^2 at each response's last position, mean over responses."""
    rows, data = np.array([4, 0, 8, 1]), world.data
    found = gradient(world, data, 10**6, rows, last=True)
    model = world.model("critic")
    for row in rows:
        sequence = torch.tensor(np.concatenate([data.prompts[row], data.responses[row]]))[None].long()
        value = model(sequence).logits[0, -2, 0]
        (0.5 * (value - float(data.rewards[row])) ** 2 / len(rows)).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
