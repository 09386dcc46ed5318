"""A small decoder for Qwen2 and Llama checkpoints: the transformer's forward pass with a key-value cache.

It reads the same folder that transformers and vLLM load. Axes: B rows, T new positions, S cached positions, H query
heads, G key-value heads, D head size. Rows are padded on the left, so that all rows write the same cache column.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from vapo.errors import UserError
from vapo.recipe import ARCHITECTURES


@dataclass
class Cache:
    """Keys and values of every layer, [B, G, S_max, D] each; the first `length` columns are filled."""

    keys: list[Tensor]
    values: list[Tensor]
    padding: Tensor  # [B], padded columns at the left of each row
    length: int = 0

    @property
    def columns(self) -> int:
        """S_max: how many columns there is room for."""
        return self.keys[0].shape[2]

    def keep(self, rows: Tensor, columns: int) -> None:
        """Hold these rows [B'] (some may repeat) with room for `columns` in all.

        One layer is copied after another, so that what is needed besides for a moment is one layer's room.
        """
        for tensors in (self.keys, self.values):
            for i, old in enumerate(tensors):
                new = torch.empty((len(rows), old.shape[1], columns, old.shape[3]))
                torch.index_select(old[:, :, : self.length], 0, rows, out=new[:, :, : self.length])
                tensors[i] = new
        self.padding = self.padding[rows]


class Decoder:
    """Weights of one checkpoint, ready to decode in float32."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("model_type")
        if kind not in ARCHITECTURES:
            raise UserError(f"rollout.engine 'cpu' decodes {ARCHITECTURES}, the checkpoint is {kind!r}: convert it")
        if config.get("use_sliding_window"):
            raise UserError("rollout.engine 'cpu' has no sliding-window attention: set use_sliding_window to false")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise UserError(f"rollout.engine 'cpu' has no rope type {rope_type!r}, only 'default'")
        if config.get("hidden_act", "silu") != "silu":
            raise UserError(f"rollout.engine 'cpu' knows hidden_act 'silu', found {config['hidden_act']!r}")
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.head_size = config.get("head_dim") or config["hidden_size"] // self.heads
        self.max_positions = config["max_position_embeddings"]
        self.epsilon = config["rms_norm_eps"]
        theta = rope.get("rope_theta") or config.get("rope_theta", 10000.0)
        self.inverse_frequency = theta ** -(torch.arange(0, self.head_size, 2).float() / self.head_size)
        weights: dict[str, Tensor] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            weights.update({name: tensor.float() for name, tensor in load_file(shard).items()})
        self.embedding = weights["model.embed_tokens.weight"]
        self.head = weights.get("lm_head.weight", self.embedding)
        self.final_norm = weights["model.norm.weight"]
        self.layers = [_layer(weights, i) for i in range(config["num_hidden_layers"])]

    def new_cache(self, padding: Tensor, columns: int) -> Cache:
        """An empty cache for rows with this left padding [B]."""
        shape = (len(padding), self.kv_heads, columns, self.head_size)
        return Cache([torch.empty(shape) for _ in self.layers], [torch.empty(shape) for _ in self.layers], padding)

    def forward(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Logits [B, V] after the last of the new tokens [B, T]; the cache takes them in."""
        rows, width = tokens.shape
        start, end = cache.length, cache.length + width
        columns = torch.arange(start, end)
        angles = (columns[None] - cache.padding[:, None]).clamp_min(0)[..., None] * self.inverse_frequency
        cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))  # [B, 1, T, D]
        mask = self._mask(cache.padding, columns, end)
        hidden = self.embedding[tokens]
        for i, layer in enumerate(self.layers):
            x = self._norm(hidden, layer["input_norm"])
            x = F.linear(x, layer["qkv"], layer.get("qkv_bias"))
            x = x.view(rows, width, self.heads + 2 * self.kv_heads, self.head_size).transpose(1, 2)
            keys, values = cache.keys[i][:, :, :end], cache.values[i][:, :, :end]
            query_and_key, values[:, :, start:] = x.split([self.heads + self.kv_heads, self.kv_heads], 1)
            query, keys[:, :, start:] = _rotate(query_and_key, cos, sin).split([self.heads, self.kv_heads], 1)
            x = F.scaled_dot_product_attention(
                query, keys, values, attn_mask=mask, enable_gqa=self.heads != self.kv_heads
            )
            hidden = hidden + F.linear(x.transpose(1, 2).reshape(rows, width, -1), layer["out"], layer.get("out_bias"))
            x = self._norm(hidden, layer["post_norm"])
            gate, up = F.linear(x, layer["gate_up"], layer.get("gate_up_bias")).chunk(2, -1)
            hidden = hidden + F.linear(F.silu(gate) * up, layer["down"], layer.get("down_bias"))
        cache.length = end
        return F.linear(self._norm(hidden[:, -1], self.final_norm), self.head)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.epsilon)

    def _mask(self, padding: Tensor, columns: Tensor, end: int) -> Tensor | None:
        """[B, 1, T, S], 0 where a position may look at a column, else -inf: causal, and not at padding.

        Added to the scores by every layer as it is; one of truth values each layer would turn into this first.
        """
        if len(columns) == 1 and not padding.any():
            return None
        keys = torch.arange(end)
        hidden = keys[None, None] < padding[:, None, None]
        if len(columns) > 1:
            hidden = hidden | (keys[None, None] > columns[None, :, None])
            # A padded position looks at itself: its output is never read, and a row without any column would give NaN.
            hidden = hidden & (keys[None, None] != columns[None, :, None])
        return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def _layer(weights: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """One layer's weights with the projections that share an input joined into one matrix."""
    prefix = f"model.layers.{index}."
    joined = {
        "qkv": [f"self_attn.{p}_proj" for p in "qkv"],
        "out": ["self_attn.o_proj"],
        "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "down": ["mlp.down_proj"],
    }
    layer = {
        "input_norm": weights[f"{prefix}input_layernorm.weight"],
        "post_norm": weights[f"{prefix}post_attention_layernorm.weight"],
    }
    for name, parts in joined.items():
        layer[name] = torch.cat([weights[f"{prefix}{part}.weight"] for part in parts])
        if f"{prefix}{parts[0]}.bias" in weights:
            layer[f"{name}_bias"] = torch.cat([weights[f"{prefix}{part}.bias"] for part in parts])
    return layer
