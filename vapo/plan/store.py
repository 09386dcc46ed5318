"""Bytes that go into the store and out of it: checkpoints with their training state, and tables."""

from __future__ import annotations

from dataclasses import dataclass

from vapo.plan.models import Shape
from vapo.plan.throughput import Lengths
from vapo.recipe import Recipe, Train


@dataclass(frozen=True)
class Checkpoint:
    """Bytes of a policy's or critic's files."""

    model: float  # safetensors in the precision that it is trained in
    state: float  # moments, and masters where the model's files do not hold them; sharded over ranks

    @property
    def total(self) -> float:
        """All of it."""
        return self.model + self.state


def checkpoint(shape: Shape, kind: str, train: Train) -> Checkpoint:
    """What vapo/train/checkpoints.py writes after an update; of LoRA the base, which never changes, only once."""
    total = shape.parameters(kind)
    pure = train.engine == "deepspeed" and train.dtype == "bf16"
    trained = shape.adapter_parameters(train.lora_rank, train.lora_targets) if train.lora_rank else total
    masters = 4 if pure or train.lora_rank else 0
    return Checkpoint(total * (2.0 if pure else 4.0), trained * (8.0 + masters))


@dataclass(frozen=True)
class Tables:
    """Bytes of an iteration's tables, as Arrow writes their columns (vapo/schemas.py)."""

    rollouts: float
    rewards: float
    experience: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.rollouts + self.rewards + self.experience


def tables(rows: int, lengths: Lengths, text: float) -> Tables:
    """Of so many responses.

    ROLLOUTS has 4 bytes for a token of the prompt; token, logprob and its text for one of the response; about 60 of
    names for a row. EXPERIENCE has three float32 for a token of the response. REWARDS has about 60 bytes for a row.
    """
    return Tables(
        rows * (4 * lengths.prompt + (8 + text) * lengths.mean + 60), rows * 60.0, rows * (12 * lengths.mean + 30)
    )


@dataclass(frozen=True)
class Iteration:
    """New bytes in the store after an iteration; nothing is overwritten, `vapo gc` takes away what no run refers to."""

    policy: Checkpoint
    critic: Checkpoint | None
    tables: Tables

    @property
    def total(self) -> float:
        """All of them."""
        return self.policy.total + (self.critic.total if self.critic else 0.0) + self.tables.total

    @property
    def models(self) -> float:
        """Without training states: what must stay to look at every iteration."""
        return self.policy.model + (self.critic.model if self.critic else 0.0) + self.tables.total


def iteration(recipe: Recipe, shape: Shape, lengths: Lengths, text: float) -> Iteration:
    """What one iteration leaves."""
    rows = recipe.rollout.prompts * recipe.rollout.samples * recipe.rollout.draws
    critic = checkpoint(shape, "critic", recipe.train) if recipe.has_critic else None
    return Iteration(checkpoint(shape, "policy", recipe.train), critic, tables(rows, lengths, text))
