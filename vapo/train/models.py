"""Policy and critic as transformers models, loaded from checkpoints and saved to them, and their forward passes."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vapo.errors import UserError
from vapo.store import Manifest, open_checkpoint, read_manifest, save_checkpoint
from vapo.train.batches import MicroBatch
from vapo.train.optimizer import Optimizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


class Checkpoint:
    """A checkpoint's files laid out in a temporary folder, for as long as the `with` block lasts."""

    def __init__(self, manifest: Path, kind: str) -> None:
        self.manifest: Manifest = read_manifest(manifest, kind)
        self._scratch = tempfile.TemporaryDirectory()
        self.folder = Path(self._scratch.name)

    def __enter__(self) -> Checkpoint:
        open_checkpoint(self.manifest, self.folder)
        return self

    def __exit__(self, *exc: object) -> None:
        self._scratch.cleanup()


def load_policy(folder: Path) -> nn.Module:
    """The policy: a causal language model in float32, every dropout off."""
    from transformers import AutoModelForCausalLM

    return _ready(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True))


def load_critic(folder: Path) -> nn.Module:
    """The critic: a backbone with one value per token; the head is in float32."""
    from transformers import AutoModelForTokenClassification

    return _ready(AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float32, local_files_only=True))


def critic_from_policy(folder: Path) -> nn.Module:
    """A critic with the policy's backbone and a zero head: it values everything at 0."""
    from transformers import AutoConfig, AutoModelForTokenClassification

    config = AutoConfig.from_pretrained(folder, local_files_only=True, num_labels=1)
    config.classifier_dropout = 0.0
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)  # that the head is new is what we want
    critic = AutoModelForTokenClassification.from_pretrained(
        folder, config=config, dtype=torch.float32, local_files_only=True
    )
    logger.setLevel(level)
    nn.init.zeros_(critic.score.weight)
    nn.init.zeros_(critic.score.bias)
    return _ready(critic)


def response_logits(policy: Any, batch: MicroBatch) -> Tensor:
    """Logits [n, V] of the positions that predict the response tokens; no other position meets the vocabulary.

    Right padding and causal attention: no real token sees a padded one, so no mask is needed.
    """
    hidden = policy.model(input_ids=batch.tokens, use_cache=False).last_hidden_state
    return policy.lm_head(hidden[batch.row_index, batch.column_index]).float()


def response_logprobs(policy: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """(logprobs [n] of the response tokens, entropy [n] of the distributions they come from)."""
    log_probabilities = response_logits(policy, batch).log_softmax(-1)
    logprobs = log_probabilities.gather(-1, batch.targets[:, None])[:, 0]
    entropy = -(log_probabilities.detach().exp() * log_probabilities.detach()).sum(-1)
    return logprobs, entropy


def response_values(critic: Any, batch: MicroBatch) -> Tensor:
    """V before each response token is emitted: [n], from the position that predicts it."""
    hidden = critic.model(input_ids=batch.tokens, use_cache=False).last_hidden_state
    return critic.score(hidden[batch.row_index, batch.column_index].float())[:, 0]


def save_model(
    model: Any,
    manifest: Path,
    *,
    kind: str,
    store: str,
    tokenizer: Path,
    facts: dict[str, Any],
    optimizer: Optimizer | None = None,
) -> Manifest:
    """Save a model in Hugging Face layout with the tokenizer from folder `tokenizer`, and its optimiser's state."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model.save_pretrained(folder)
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)
        if optimizer is not None:
            optimizer.save(folder / "optimizer")
        return save_checkpoint(folder, manifest, store=store, kind=kind, facts=facts)


def check_same_tokenizer(policy: Checkpoint, critic: Checkpoint) -> None:
    """Policy and critic must read text alike.

    Raises:
        UserError: their tokenizers differ.
    """
    digests = [{f.path: f.sha256 for f in c.manifest.files}.get("tokenizer.json", "none") for c in (policy, critic)]
    if digests[0] != digests[1]:
        raise UserError(
            f"policy and critic have different tokenizers ({digests[0][:12]} and {digests[1][:12]}): "
            "pretrain the critic from this policy"
        )


def _ready(model: Any) -> nn.Module:
    """Every dropout off: the ratio in the first epoch is exactly 1."""
    model.eval()
    return model
