"""The optimiser: a resumed run is the uninterrupted one, warm-up as stated, and nothing infinite is applied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vapo.errors import UserError
from vapo.train.optimizer import Optimizer
from vapo.train.state import State, write_facts, write_fragments

SETTINGS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "warmup_steps": 4, "max_grad_norm": 1.0}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))


def gradient(net: nn.Module, step: int) -> None:
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
    net(inputs).square().mean().backward()


def run(net: nn.Module, optimizer: Optimizer, steps: range) -> list[float]:
    norms = []
    for step in steps:
        gradient(net, step)
        norms.append(optimizer.step())
    return norms


def save(optimizer: Optimizer, folder: Path) -> None:
    write_fragments(folder, optimizer.fragments(), 0, 1)
    write_facts(folder, steps=optimizer.steps)


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("at", [1, 3, 9])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, at: int) -> None:
    """Inside the warm-up and after it: moments, step count and learning rate all continue."""
    whole = model()
    norms = run(whole, Optimizer(whole, **SETTINGS), range(10))
    first = model()
    optimizer = Optimizer(first, **SETTINGS)
    run(first, optimizer, range(at))
    save(optimizer, tmp_path / "state")
    second = model()
    second.load_state_dict(first.state_dict())
    resumed = Optimizer(second, **SETTINGS)
    resumed.restore(State(tmp_path / "state"))
    assert resumed.steps == at
    assert run(second, resumed, range(at, 10)) == norms[at:]
    assert torch.equal(weights(second), weights(whole))
    assert not torch.equal(weights(first), weights(whole))


def test_saving_changes_nothing_and_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    one, other = model(), model()
    watched, plain = Optimizer(one, **SETTINGS), Optimizer(other, **SETTINGS)
    run(one, watched, range(3))
    for name in "ab":
        save(watched, tmp_path / name)
    for name in ("rank-00000-of-00001.safetensors", "state.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    run(one, watched, range(3, 6))
    run(other, plain, range(6))
    assert torch.equal(weights(one), weights(other))


def moved_by(optimizer: Optimizer, weight: nn.Parameter, scale: float = 1.0) -> float:
    """How far one step with gradient 1 moves the weight: without decay Adam moves it by the learning rate."""
    before = weight.item()
    weight.grad = torch.ones(1)
    optimizer.step(scale)
    return before - weight.item()


def scalar(**changed: float) -> tuple[nn.Module, nn.Parameter, Optimizer]:
    net = nn.Module()
    net.weight = nn.Parameter(torch.zeros(1))
    settings = {"lr": 1e-2, "weight_decay": 0.0, "warmup_steps": 4, "max_grad_norm": 10.0} | changed
    return net, net.weight, Optimizer(net, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [(4, [0.25, 0.5, 0.75, 1, 1, 1]), (0, [1, 1, 1]), (1, [1, 1, 1])],
)
def test_warmup_then_constant(warmup: int, expected: list[float]) -> None:
    _, weight, optimizer = scalar(warmup_steps=warmup)
    assert [moved_by(optimizer, weight) / 1e-2 for _ in expected] == pytest.approx(expected, rel=1e-4)


def test_scale_multiplies_the_learning_rate() -> None:
    _, weight, optimizer = scalar(warmup_steps=0)
    assert [moved_by(optimizer, weight, s) / 1e-2 for s in (1, 0.1, 1)] == pytest.approx([1, 0.1, 1], rel=1e-4)


def test_weight_decay_is_decoupled() -> None:
    """A weight without gradient shrinks by lr * decay, whatever the moments say."""
    _, weight, optimizer = scalar(warmup_steps=0, weight_decay=0.5)
    weight.data.fill_(2.0)
    weight.grad = torch.zeros(1)
    optimizer.step()
    assert weight.item() == pytest.approx(2.0 * (1 - 1e-2 * 0.5), rel=1e-6)


def test_the_norm_is_the_one_before_clipping_and_long_gradients_are_cut() -> None:
    """Adam hides a constant scale, so the second moment is looked at: it holds the clipped gradient."""
    net = nn.Module()
    net.weight = nn.Parameter(torch.zeros(2))
    optimizer = Optimizer(net, lr=1e-2, weight_decay=0.0, warmup_steps=0, max_grad_norm=1.0)
    net.weight.grad = torch.tensor([30.0, 40.0])
    assert optimizer.step() == pytest.approx(50.0)
    second = optimizer.adamw.state[net.weight]["exp_avg_sq"]
    torch.testing.assert_close(second, 0.05 * torch.tensor([0.36, 0.64]))
    net.weight.grad = torch.tensor([0.3, 0.4])
    assert optimizer.step() == pytest.approx(0.5)


def test_gradients_are_cleared() -> None:
    net = model()
    optimizer = Optimizer(net, **SETTINGS)
    run(net, optimizer, range(1))
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_not_finite_is_refused(value: float) -> None:
    net = model()
    optimizer = Optimizer(net, **SETTINGS)
    run(net, optimizer, range(2))
    before = weights(net)
    gradient(net, 2)
    next(net.parameters()).grad[0, 0] = value  # type: ignore[index]
    with pytest.raises(
        UserError, match=r"norm is (nan|inf) at optimiser step 3, from a batch: lower the learning rate \(0\.01"
    ):
        optimizer.step()
    assert torch.equal(weights(net), before)
    assert optimizer.steps == 2
