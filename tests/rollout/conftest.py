"""Small random checkpoints as transformers writes them, in the variants that the decoder must read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

VOCABULARY = 24
EOS = 1
VARIANTS: dict[str, tuple[type, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, {"num_key_value_heads": 4}),
    "qwen2-grouped-tied": (Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-grouped": (LlamaConfig, {"num_key_value_heads": 2}),
    "llama-one-key-head-tied": (LlamaConfig, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-biases-wide-heads": (
        LlamaConfig,
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "head_dim": 12},
    ),
    "llama-other-rope-and-norm": (
        LlamaConfig,
        {"num_key_value_heads": 4, "rope_theta": 500.0, "rms_norm_eps": 1e-3},
    ),
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """checkpoint(variant) -> (folder, the transformers model); every parameter is random, biases and norms too."""
    made: dict[str, tuple[Path, Any]] = {}

    def make(variant: str) -> tuple[Path, Any]:
        if variant not in made:
            kind, changed = VARIANTS[variant]
            settings = {
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 48,
                "max_position_embeddings": 256,
                "tie_word_embeddings": False,
                "bos_token_id": None,
                "eos_token_id": EOS,
                "pad_token_id": 0,
            }
            torch.manual_seed(list(VARIANTS).index(variant))
            model = AutoModelForCausalLM.from_config(kind(**{**settings, **changed}), dtype=torch.float32).eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
            folder = tmp_path_factory.mktemp(variant)
            model.save_pretrained(folder, max_shard_size="20KB" if "biases" in variant else "5GB")
            made[variant] = folder, model
        return made[variant]

    return make
