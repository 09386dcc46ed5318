"""LoRA through peft: adapters beside frozen weights, and the weights with the adapters merged into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vapo import recipe
from vapo.errors import UserError

BASE, DOWN, UP = ".base_layer.", ".lora_A.default.", ".lora_B.default."  # in the names that peft gives


def add_adapters(model: Any, train: recipe.Train, seed: int) -> None:
    """Freeze the model and give it adapters that change nothing yet; a critic's head stays trained whole.

    Raises:
        UserError: a name in train.lora_targets is no layer of the model.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    unknown = sorted(set(train.lora_targets) - layers)
    if unknown:
        raise UserError(f"train.lora_targets {unknown}: the model has no such layer; it has {sorted(layers)}")
    torch.manual_seed(seed)
    config = LoraConfig(r=train.lora_rank, lora_alpha=train.lora_alpha, target_modules=list(train.lora_targets))
    inject_adapter_in_model(config, model)
    if hasattr(model, "score"):
        model.score.requires_grad_(True)
    model.eval()


def merged(weights: dict[str, Tensor], train: recipe.Train) -> dict[str, Tensor]:
    """Weights with peft's names as those of the plain model: W + alpha / rank * B A, added up in float32."""
    found = {}
    for name, weight in weights.items():
        if DOWN in name or UP in name:
            continue
        down = name.replace(BASE, DOWN)
        if BASE in name and down in weights:
            change = weights[name.replace(BASE, UP)].float() @ weights[down].float()
            weight = (weight.float() + train.lora_alpha / train.lora_rank * change).to(weight.dtype)
        found[name.replace(BASE, ".")] = weight
    return found
