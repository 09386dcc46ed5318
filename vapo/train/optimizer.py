"""AdamW with a learning rate that warms up and stays, gradient clipping, and refusal of what is not finite."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from vapo.errors import UserError
from vapo.train.ranks import add_up_gradients, rank
from vapo.train.state import Fragment, State

BETAS = (0.9, 0.95)
MOMENTS = ("exp_avg", "exp_avg_sq")


def warmed_up(lr: float, steps: int, warmup_steps: int) -> float:
    """The learning rate of the step after `steps` steps: linear over `warmup_steps`, then constant."""
    return lr * min(1.0, (steps + 1) / max(warmup_steps, 1))


def check_norm(norm: float, step: int, batch: str, lr: float) -> None:
    """Refuse a gradient norm that is not finite (DeepSpeed says -1 then).

    Raises:
        UserError: names the step and the rollouts.
    """
    if not 0 <= norm < float("inf"):
        raise UserError(
            f"the gradient's norm is {'inf' if norm == -1 else norm} at optimiser step {step}, from {batch}: lower the "
            f"learning rate ({lr}) or look at these rows; the last checkpoint is kept"
        )


class Optimizer:
    """One model's optimiser; `steps` counts the steps since it began, over all iterations."""

    def __init__(
        self, model: nn.Module, *, lr: float, weight_decay: float, warmup_steps: int, max_grad_norm: float
    ) -> None:
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.names, self.parameters = [name for name, _ in trained], [parameter for _, parameter in trained]
        self.lr, self.warmup_steps, self.max_grad_norm = lr, warmup_steps, max_grad_norm
        self.adamw = torch.optim.AdamW(self.parameters, lr=lr, betas=BETAS, weight_decay=weight_decay, fused=True)
        self.steps = 0

    def step(self, scale: float = 1.0, *, batch: str = "a batch") -> float:
        """Clip, update, clear; returns the gradient norm before clipping. `scale` multiplies the learning rate.

        Where this process is one of several ranks, their gradients are added up first.

        Args:
            batch: what the gradient came from, for the error.

        Raises:
            UserError: the gradient is not finite; nothing was updated.
        """
        add_up_gradients(self.parameters)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
        check_norm(norm, self.steps + 1, batch, self.lr)
        for group in self.adamw.param_groups:
            group["lr"] = scale * warmed_up(self.lr, self.steps, self.warmup_steps)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.steps += 1
        return norm

    def forget(self) -> None:
        """Begin anew with the weights as they are: no moments, no steps."""
        self.adamw.state.clear()
        self.steps = 0

    def fragments(self, *, weights: bool = False) -> Iterator[Fragment]:
        """Every parameter's state, whole and on rank 0: all ranks have the same."""
        if rank():
            return
        for name, parameter in zip(self.names, self.parameters, strict=True):
            tensors = {key: self.adamw.state[parameter][key].flatten() for key in MOMENTS}
            yield Fragment(name, 0, {**tensors, **({"weight": parameter.flatten()} if weights else {})})

    def restore(self, state: State) -> None:
        """Take up the moments and steps of a state, and weights where it has them."""
        self.steps = int(state.facts["steps"])
        for name, parameter in zip(self.names, self.parameters, strict=True):
            moments = {key: state.read(name, key, 0, parameter.numel()) for key in MOMENTS}
            self.adamw.state[parameter] = {
                "step": torch.tensor(float(self.steps), device=parameter.device),
                **{key: moment.view_as(parameter).to(parameter.device) for key, moment in moments.items()},
            }
            if f"{name}/weight" in state:
                parameter.data.copy_(state.read(name, "weight", 0, parameter.numel()).view_as(parameter))
