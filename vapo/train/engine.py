"""The training engine: forward and backward over micro-batches and optimiser steps, in plain torch or in DeepSpeed.

A loss is a micro-batch's share of its WHOLE mini-batch's: engines add gradients up, over micro-batches and over ranks,
and never average. A stage runs its ranks through `turns`, hands losses to `backward` and calls `step` once for each
mini-batch. Results come back to the CPU, where all arithmetic on single tokens is done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vapo import recipe
from vapo.train.batches import MicroBatch, pad, plan
from vapo.train.models import Forward
from vapo.train.optimizer import Optimizer
from vapo.train.ranks import device, in_step, rank
from vapo.train.state import Fragment, State


@dataclass(frozen=True)
class Turn:
    """A micro-batch in its turn; all ranks take theirs at the same time."""

    batch: MicroBatch
    counts: bool  # False: this rank has none left, and takes part so that the others can gather weights
    most_tokens: int  # response tokens of the ranks' largest
    last: bool  # of the mini-batch


class Reader:
    """A model whose forward pass is all that is wanted."""

    def __init__(self, module: Forward, train: recipe.Train, *, in_step: bool = False) -> None:
        self.module: Any = module
        self.in_step = in_step  # whether ranks must take equally many turns
        self.autocast = train.dtype == "bf16" and train.engine == "torch"

    def turns(
        self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], rows: np.ndarray, budget: int
    ) -> Iterator[Turn]:
        """This rank's micro-batches of the rows, each of at most `budget` padded positions."""
        parts = list(in_step(plan(prompts, responses, rows, budget)))
        for number, (own, together) in enumerate(parts, start=1):
            if own is not None or self.in_step:
                batch = pad(prompts, responses, together[0][:1] if own is None else own)
                most = max(sum(len(responses[row]) for row in part) for part in together)
                yield Turn(batch, own is not None, most, number == len(parts))

    def __call__(self, turn: Turn, **options: Any) -> Any:
        """The model's forward pass over a micro-batch, see `Forward`; its tensors are on the CPU."""
        where = device()
        with torch.autocast(where.type, torch.bfloat16, enabled=self.autocast):
            found = self.module(turn.batch.to(where), most_tokens=turn.most_tokens, **options)
        return tuple(part.cpu() for part in found) if isinstance(found, tuple) else found.cpu()

    def close(self) -> None:
        """Give the memory back."""
        self.module = None
        torch.cuda.empty_cache()


class Engine(Reader, ABC):
    """A model that is trained; `steps` counts its optimiser steps over all iterations."""

    steps: int

    @abstractmethod
    def backward(self, loss: Tensor, turn: Turn) -> None:
        """Add a loss's gradient."""

    @abstractmethod
    def step(self, *, batch: str) -> float:
        """Add up over ranks, clip, update, clear; returns the gradient norm before clipping.

        Raises:
            UserError: the gradient is not finite; the message names the step and `batch`.
        """

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Every parameter, whole, on rank 0; nothing on the others. May be the live tensors."""

    @abstractmethod
    def fragments(self, *, weights: bool) -> Iterator[Fragment]:
        """This rank's part of the training state."""

    @abstractmethod
    def restore(self, state: State) -> None:
        """Take up a training state, whoever wrote it."""

    @abstractmethod
    def forget(self) -> None:
        """Begin anew with the weights as they are."""


class TorchEngine(Engine):
    """Plain torch: every rank holds the whole model in float32; bf16 is autocast, so its weights are the masters."""

    def __init__(self, module: Forward, train: recipe.Train, **settings: Any) -> None:
        super().__init__(module.to(device()), train)
        self.optimizer = Optimizer(module.model, **settings)

    @property
    def steps(self) -> int:  # type: ignore[override]
        """Optimiser steps since it began."""
        return self.optimizer.steps

    def backward(self, loss: Tensor, turn: Turn) -> None:
        """Add a loss's gradient."""
        del turn
        loss.backward()

    def step(self, *, batch: str) -> float:
        """See Engine."""
        return self.optimizer.step(batch=batch)

    def weights(self) -> dict[str, Tensor]:
        """See Engine."""
        return dict(self.module.model.named_parameters()) if rank() == 0 else {}

    def fragments(self, *, weights: bool) -> Iterator[Fragment]:
        """See Engine."""
        return self.optimizer.fragments(weights=weights)

    def restore(self, state: State) -> None:
        """See Engine."""
        self.optimizer.restore(state)

    def forget(self) -> None:
        """See Engine."""
        self.optimizer.forget()


def engine_of(
    module: Forward, train: recipe.Train, *, lr: float, weight_decay: float, warmup_steps: int, max_grad_norm: float
) -> Engine:
    """The engine that [train] names, for a model that is to be trained."""
    settings: dict[str, Any] = {
        "lr": lr,
        "weight_decay": weight_decay,
        "warmup_steps": warmup_steps,
        "max_grad_norm": max_grad_norm,
    }
    if train.activation_checkpointing:
        checkpoint_activations(module.model)
    if train.engine == "deepspeed":
        from vapo.train.zero import ZeroEngine

        return ZeroEngine(module, train, **settings)
    return TorchEngine(module, train, **settings)


def reader_of(module: Forward, train: recipe.Train) -> Reader:
    """The same for a model that is only read: sharded where ZeRO-3 would shard it."""
    module.requires_grad_(False)
    if train.engine == "deepspeed":
        from vapo.train.zero import zero_reader

        return zero_reader(module, train)
    return Reader(module.to(device()), train)


def checkpoint_activations(model: Any) -> None:
    """Have every layer computed again on the way back; the model stays as it is otherwise, without dropout."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.model.layers:
        layer.training = True  # transformers asks the layer itself, not what is in it
