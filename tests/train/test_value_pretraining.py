"""Value-pretraining: the policy is only read, held-out prompts only measure, and the best critic is what is left."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from vapo.errors import UserError
from vapo.recipe import Advantages, Train, ValuePretraining
from vapo.rl.diagnostics import explained_variance
from vapo.schemas import EXPERIENCE, PRETRAINING
from vapo.seeds import derive
from vapo.tables import ragged, read_table
from vapo.train.advantages import advantages
from vapo.train.engine import TorchEngine
from vapo.train.experience import Rollouts, values_of
from vapo.train.models import Forward
from vapo.train.value_pretraining import _step, plateaued, split_by_prompt, value_pretraining

from .conftest import World

SETTINGS: dict[str, Any] = {
    "init": "policy",
    "min_steps": 6,
    "max_steps": 6,
    "must_beat_mean": False,
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
        pretraining=world.root / f"{name}-pretraining",
        seed=seed,
        store=world.objects,
    )


def heldout_of(world: World, share: float = 0.25, seed: int = 0) -> np.ndarray:
    """The rows that the stage holds out."""
    generator = np.random.default_rng(derive(seed, "value_pretraining", "batches"))
    return split_by_prompt(world.data, share, generator)[1]


def test_point_12_the_policy_is_byte_identical_through_pretraining(world: World) -> None:
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
def test_point_13_the_split_is_by_prompt_and_complete(world: World, share: float) -> None:
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
    predicted = values_of(world.reader("new_critic"), data, rows, 10**6)
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
    assert not np.concatenate(values_of(world.reader("new_critic"), world.data, np.arange(12), 10**6)).any()


def test_it_learns_what_the_prompt_decides(world: World) -> None:
    """Returns follow from the prompt's first token: seen in training, they are valued right for new responses."""
    world.write_rollouts([2] * 150, by_prompt=True)
    metrics = run(world, min_steps=40, max_steps=40, mini_batch=45, measure_every=10, must_beat_mean=True)
    assert metrics["value_loss"] is not None
    assert metrics["value_loss"] < 0.25  # a constant has 0.5
    variance = metrics["explained_variance"]
    assert variance is not None
    assert variance > 0.5


def test_point_11_undefined_explained_variance_is_none(world: World) -> None:
    world.write_rollouts(correct=[True] * 12)
    assert run(world)["explained_variance"] is None


def test_heldout_rows_teach_nothing(world: World) -> None:
    """Other rewards on the held-out prompts give other measures and the same critic."""
    rows, losses = heldout_of(world), []
    for name, reward in (("critic_a", -1.0), ("critic_b", -0.5)):
        world.write_rollouts(rewards=[reward if r in rows else (1.0 if r % 3 == 0 else -1.0) for r in range(12)])
        metrics = run(world, name, lr=1e-3, measure_every=6)
        assert metrics["kept_step"] == 6
        losses.append(metrics["value_loss"])
    assert losses[0] != losses[1]
    assert world.manifest("critic_a").digest == world.manifest("critic_b").digest


class Recorder(TorchEngine):
    """Takes the gradient and changes nothing."""

    gradient = torch.empty(0)

    def step(self, *, batch: str) -> float:
        parameters = list(self.module.parameters())
        self.gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        self.module.zero_grad()
        return 0.0


def gradient(world: World, data: Rollouts, budget: int, rows: np.ndarray, *, last: bool) -> torch.Tensor:
    settings = {"lr": 1e-3, "weight_decay": 0.0, "warmup_steps": 0, "max_grad_norm": 1.0}
    recorder = Recorder(Forward(world.model("critic"), "critic"), Train(), **settings)
    _step(recorder, data, rows, budget, last_token_only=last)
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


def steps_of(world: World, name: str = "new_critic") -> list[dict[str, Any]]:
    """The rows of PRETRAINING."""
    return read_table(world.root / f"{name}-pretraining", PRETRAINING).to_pylist()


def test_every_step_is_on_record(world: World) -> None:
    """Loss and explained variance of each mini-batch before its step, and of the held-out rows every few steps."""
    metrics = run(world)
    rows = steps_of(world)
    assert [row["step"] for row in rows if row["rows"] == "mini-batch"] == [0, 1, 2, 3, 4, 5]
    heldout = [row for row in rows if row["rows"] == "held-out"]
    assert [row["step"] for row in heldout] == [0, 2, 4, 6]
    assert heldout[0]["value_loss"] == 0.5  # a zero critic, rewards +1 and -1
    assert heldout[0]["explained_variance"] == 0.0
    kept = next(row for row in heldout if row["step"] == metrics["kept_step"])
    assert kept["value_loss"] == pytest.approx(metrics["value_loss"])
    assert kept["value_loss"] == min(row["value_loss"] for row in heldout)
    assert metrics["steps"] == 6


def test_undefined_on_record_is_nan(world: World) -> None:
    world.write_rollouts(correct=[True] * 12)
    run(world)
    assert all(math.isnan(row["explained_variance"]) for row in steps_of(world))


@pytest.mark.parametrize(
    ("losses", "flat"),
    [
        ([1.0], False),
        ([1.0, 1.0], False),  # two measurements without progress are needed
        ([1.0, 1.0, 1.0], True),
        ([1.0, 0.995, 0.991], True),  # less than 1 % lower
        ([1.0, 0.995, 0.98], False),
        ([1.0, 0.5, 0.6, 0.7], True),
        ([0.5, 1.0, 0.9, 0.8], True),  # falling, but not below the best
        ([1.0, 0.5, 0.6, 0.4], False),
    ],
)
def test_a_plateau(losses: list[float], flat: bool) -> None:
    assert plateaued(losses, patience=2, tolerance=0.01) is flat


def test_it_stops_on_a_plateau_between_the_two_bounds(world: World) -> None:
    """A learning rate that moves nothing is a plateau from the start."""
    settings: dict[str, Any] = {"lr": 1e-12, "measure_every": 1, "patience": 2, "max_steps": 9}
    assert [run(world, min_steps=n, **settings)["steps"] for n in (0, 5, 9)] == [2, 5, 9]


def test_progress_goes_on_to_the_last_step(world: World) -> None:
    world.write_rollouts([2] * 150, by_prompt=True)
    settings: dict[str, Any] = {"lr": 3e-3, "mini_batch": 45, "measure_every": 5, "patience": 2}
    assert run(world, min_steps=5, max_steps=25, **settings)["steps"] == 25


def test_it_fails_if_it_never_beats_the_mean(world: World) -> None:
    """Both losses, the steps, and the cure; no critic is left that a later stage could take."""
    with pytest.raises(UserError) as error:
        run(world, lr=1.0, must_beat_mean=True)
    said = str(error.value)
    assert "never beat a constant: held-out value loss 0.5 at best in 6 steps, predicting the mean has 0." in said
    assert "raise value_pretraining.prompts, max_steps 6 or lr 1" in said
    assert not (world.root / "new_critic").exists()
    assert run(world, lr=1.0)["kept_step"] == 0


def test_the_mean_is_what_training_rows_show(world: World) -> None:
    """Predicting the mean return of the training tokens at every held-out token."""
    metrics, rows, data = run(world), heldout_of(world), world.data
    train = np.setdiff1d(np.arange(12), rows)
    mean = np.repeat(data.rewards[train], data.lengths[train]).mean()
    returns = np.repeat(data.rewards[rows], data.lengths[rows])
    assert metrics["value_loss_of_a_constant"] == pytest.approx(0.5 * np.mean((returns - mean) ** 2), rel=1e-5)


@pytest.mark.parametrize(("correct", "reward"), [(True, "1"), (False, "-1")])
def test_equal_rewards_teach_nothing(world: World, correct: bool, reward: str) -> None:
    """A critic that predicts the constant has loss 0: that is not convergence."""
    world.write_rollouts(correct=[correct] * 12)
    with pytest.raises(UserError, match=f"all 12 responses have reward {reward}; take problems"):
        run(world, must_beat_mean=True)


def test_off_leaves_what_init_makes(world: World) -> None:
    """max_steps = 0, one of the leave-one-outs: no step, no failure."""
    for init, zero in (("policy", True), ("reward_model", False)):
        metrics = run(world, init=init, reward_model_steps=2, min_steps=50, max_steps=0, must_beat_mean=True)
        assert (metrics["steps"], metrics["kept_step"]) == (0, 0)
        values = np.concatenate(values_of(world.reader("new_critic"), world.data, np.arange(12), 10**6))
        assert (not values.any()) is zero


@pytest.mark.parametrize("init", ["policy", "reward_model"])
def test_a_loss_that_is_not_finite_names_step_and_rollouts(world: World, init: str) -> None:
    rewards = [1e30 if r == 8 else 1.0 for r in range(12)]
    world.write_rollouts(rewards=rewards)
    with pytest.raises(
        UserError, match=r"the value loss is inf at optimiser step 1 of value-pretraining, from .*1/p2/2"
    ):
        run(world, init=init, reward_model_steps=1, mini_batch=12, heldout_share=0.01, token_budget=1)


def test_point_10_pretraining_has_the_rewards_of_the_update(world: World) -> None:
    """Shaped ones, unlike +1 and -1: a zero critic's first loss is theirs, and value targets are the same numbers."""
    shaped = [0.75 if r % 3 == 0 else -1.5 for r in range(12)]
    world.write_rollouts(rewards=shaped)
    run(world)
    rows, data = heldout_of(world), world.data
    returns = np.repeat(np.float32(shaped)[rows], data.lengths[rows])
    assert steps_of(world)[0]["value_loss"] == pytest.approx(0.5 * np.mean(returns**2))
    advantages(
        Advantages(),
        rollouts=world.rollouts,
        rewards=world.rewards,
        critic=world.root / "new_critic",
        experience=world.experience,
        iteration=1,
    )
    targets, offsets = ragged(read_table(world.experience, EXPERIENCE), "value_targets")
    np.testing.assert_array_equal(targets[offsets[:-1]], np.float32(shaped))
