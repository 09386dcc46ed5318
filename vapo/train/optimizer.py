"""AdamW with warmup-constant learning rate and gradient clipping, whose state is saved as safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vapo.errors import UserError
from vapo.train.ranks import add_up_gradients


class Optimizer:
    """One model's optimiser; `steps` counts the steps since it began, over all iterations."""

    def __init__(
        self, model: nn.Module, *, lr: float, weight_decay: float, warmup_steps: int, max_grad_norm: float
    ) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.parameters = [parameter for _, parameter in model.named_parameters()]
        self.lr, self.warmup_steps, self.max_grad_norm = lr, warmup_steps, max_grad_norm
        self.adamw = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
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
        if not norm < float("inf"):
            raise UserError(
                f"the gradient's norm is {norm} at optimiser step {self.steps + 1}, from {batch}: lower the learning "
                f"rate ({self.lr}) or look at these rows; the last checkpoint is kept"
            )
        for group in self.adamw.param_groups:
            group["lr"] = self.lr * scale * min(1.0, (self.steps + 1) / max(self.warmup_steps, 1))
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.steps += 1
        return norm

    def save(self, folder: Path) -> None:
        """Write moments and step count into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            state = self.adamw.state[parameter]
            tensors[f"{name}/exp_avg"] = state["exp_avg"]
            tensors[f"{name}/exp_avg_sq"] = state["exp_avg_sq"]
        save_file(tensors, folder / "adamw.safetensors")
        (folder / "state.json").write_text(json.dumps({"steps": self.steps}) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> bool:
        """Take up the state that `save` left in `folder`; False when there is none (a fresh start)."""
        if not (folder / "state.json").is_file():
            return False
        self.steps = json.loads((folder / "state.json").read_text(encoding="utf-8"))["steps"]
        tensors = load_file(folder / "adamw.safetensors")
        for name, parameter in zip(self.names, self.parameters, strict=True):
            self.adamw.state[parameter] = {
                "step": torch.tensor(float(self.steps)),
                "exp_avg": tensors[f"{name}/exp_avg"],
                "exp_avg_sq": tensors[f"{name}/exp_avg_sq"],
            }
        return True
