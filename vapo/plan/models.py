"""A model's shape and number of parameters: from its config.json, a published one by its name, or the recipe."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vapo.errors import UserError
from vapo.recipe import ARCHITECTURES, Recipe

DEMO_VOCABULARY = 101  # words of the chain problems, more or less: it weighs nothing

# config.json of what is published, by the end of base_model.path: hidden_size, num_hidden_layers, num_attention_heads,
# num_key_value_heads, intermediate_size, vocab_size, tie_word_embeddings. Layers and heads stand in table 1 of
# Qwen2.5's technical report (arXiv 2412.15115), the rest in the Hugging Face configs.
PUBLISHED = {
    "Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "Qwen2.5-1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "Qwen2.5-3B": (2048, 36, 16, 2, 11008, 151936, True),
    "Qwen2.5-7B": (3584, 28, 28, 4, 18944, 152064, False),
    "Qwen2.5-14B": (5120, 48, 40, 8, 13824, 152064, False),
    "Qwen2.5-32B": (5120, 64, 40, 8, 27648, 152064, False),
    "Qwen2.5-72B": (8192, 80, 64, 8, 29568, 152064, False),
}


@dataclass(frozen=True)
class Shape:
    """A decoder of the kind that Qwen2 and Llama are: grouped queries, a gated feed-forward, RMSNorm."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool  # the head is the embedding
    bias: bool  # of queries, keys and values (Qwen2)

    @property
    def queries(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Of one layer: attention, feed-forward, two norms."""
        attention = 2 * self.hidden * (self.queries + self.keys)
        biases = (self.queries + 2 * self.keys) * self.bias
        return attention + biases + 3 * self.hidden * self.intermediate + 2 * self.hidden

    def small(self, most: int) -> int:
        """Elements of all parameters of the backbone that have at most so many."""
        h, q, k, i = self.hidden, self.queries, self.keys, self.intermediate
        of_layer = [h, h, *([q, k, k] if self.bias else []), h * q, h * k, h * k, q * h, h * i, h * i, i * h]
        return h * (h <= most) + self.layers * sum(size for size in of_layer if size <= most)

    @property
    def embedding(self) -> int:
        """Elements of the embedding, or of the vocabulary head."""
        return self.vocabulary * self.hidden

    @property
    def backbone(self) -> int:
        """Parameters without a head."""
        return self.embedding + self.layers * self.layer_parameters + self.hidden

    def parameters(self, kind: str = "policy") -> int:
        """Of the policy, or of the critic, whose head has one output."""
        if kind == "critic":
            return self.backbone + self.hidden + 1
        return self.backbone + (0 if self.tied else self.embedding)

    def adapter_parameters(self, rank: int, targets: tuple[str, ...]) -> int:
        """Of LoRA adapters on these layers."""
        h, q, k, i = self.hidden, self.queries, self.keys, self.intermediate
        sizes = {"q_proj": h + q, "k_proj": h + k, "v_proj": h + k, "o_proj": q + h}
        sizes |= {"gate_proj": h + i, "up_proj": h + i, "down_proj": i + h}
        return self.layers * rank * sum(sizes.get(name, 0) for name in targets)


def shape_of(recipe: Recipe) -> Shape:
    """The base model's.

    Raises:
        UserError: base_model.path holds no config.json of a Qwen2 or Llama, and names no model that is published.
    """
    section = recipe.base_model
    if not section.path:
        return Shape(
            "the recipe's own",
            section.hidden_size,
            section.layers,
            section.heads,
            section.heads,
            section.hidden_size // section.heads,
            section.feed_forward,
            DEMO_VOCABULARY,
            tied=False,
            bias=False,
        )
    file = Path(section.path) / "config.json"
    if file.is_file():
        return shape_from(json.loads(file.read_text(encoding="utf-8")), Path(section.path).name)
    name = Path(section.path).name
    if name not in PUBLISHED:
        raise UserError(
            f"base_model.path {section.path!r}: there is no config.json, and of published models these are known: "
            f"{', '.join(PUBLISHED)}: give the folder of the checkpoint, or of its config.json alone"
        )
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    config = dict(zip((*keys, "vocab_size", "tie_word_embeddings"), PUBLISHED[name], strict=True))
    return shape_from({"model_type": "qwen2", **config}, name)


def shape_from(config: dict[str, Any], name: str) -> Shape:
    """The shape that a config.json states."""
    if config.get("model_type") not in ARCHITECTURES:
        raise UserError(f"{name}: model_type {config.get('model_type')!r} is none of {list(ARCHITECTURES)}")
    heads = config["num_attention_heads"]
    return Shape(
        name,
        config["hidden_size"],
        config["num_hidden_layers"],
        heads,
        config.get("num_key_value_heads") or heads,
        config.get("head_dim") or config["hidden_size"] // heads,
        config["intermediate_size"],
        config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        bias=config["model_type"] == "qwen2",
    )
