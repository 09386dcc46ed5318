"""Policy and critic as transformers models, loaded from checkpoints and saved to them, and their forward passes."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vapo.errors import UserError
from vapo.rl.logprobs import token_logprobs
from vapo.store import Manifest, model_only, open_checkpoint, read_manifest, save_checkpoint
from vapo.train.batches import MicroBatch

LOGITS_AT_ONCE = 2**25  # 128 MiB of float32: 220 tokens of a vocabulary of 151,936, all tokens of a small one
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    "generation_config.json",
)
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


class ValueHead(nn.Linear):
    """A linear head that computes in float32 whatever the model's precision is."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Values [..., 1] of hidden states [..., H]."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float(), self.bias.float())


class Forward(nn.Module):
    """A model with what is asked of it, so that an engine can wrap the two: the policy's logprobs, the critic's values.

    The options are those of `response_logprobs` or `response_values`.
    """

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model = model
        self.run: Any = {"policy": response_logprobs, "critic": response_values}[kind]

    def forward(self, batch: MicroBatch, **options: Any) -> Any:
        """What the model says about a micro-batch."""
        return self.run(self.model, batch, **options)


class Checkpoint:
    """A checkpoint's files laid out in a temporary folder, for as long as the `with` block lasts.

    Who does not go on with its training has no use for the training state, which is six times the model: `state`.
    """

    def __init__(self, manifest: Path, kind: str, *, state: bool = True) -> None:
        self.manifest: Manifest = read_manifest(manifest, kind)
        self._want = (lambda path: True) if state else model_only
        self._scratch = tempfile.TemporaryDirectory()
        self.folder = Path(self._scratch.name)

    def __enter__(self) -> Checkpoint:
        open_checkpoint(self.manifest, self.folder, self._want)
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

    return _critic(AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float32, local_files_only=True))


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
    return _critic(critic)


def response_hidden(policy: Any, batch: MicroBatch) -> Tensor:
    """Last hidden states [n, H] of the positions that predict the response tokens: no other meets the vocabulary.

    Right padding and causal attention: no real token sees a padded one, so no mask is needed.
    """
    hidden: Tensor = policy.model(input_ids=batch.tokens, use_cache=False).last_hidden_state
    return hidden[batch.row_index, batch.column_index]


def response_logprobs(
    policy: Any, batch: MicroBatch, *, entropy_gradient: bool = False, most_tokens: int = 0
) -> tuple[Tensor, Tensor]:
    """(logprobs [n] of the response tokens, entropy [n] of the distributions they come from).

    Args:
        most_tokens: response tokens of the largest micro-batch of several ranks: they call the head equally often.
    """
    chunk = max(1, LOGITS_AT_ONCE // policy.config.vocab_size)
    hidden, calls = response_hidden(policy, batch), -(-most_tokens // chunk)
    return token_logprobs(policy.lm_head, hidden, batch.targets, chunk, entropy_gradient=entropy_gradient, calls=calls)


def response_values(critic: Any, batch: MicroBatch, *, most_tokens: int = 0) -> Tensor:
    """V before each response token is emitted: [n], from the position that predicts it."""
    del most_tokens  # the head is called once
    return critic.score(response_hidden(critic, batch).float())[:, 0]


def write_model(model: Any, folder: Path, *, weights: dict[str, Tensor], tokenizer: Path) -> None:
    """Write a model in Hugging Face layout, with `weights` for its own, and the tokenizer from folder `tokenizer`."""
    model.save_pretrained(folder, state_dict=weights)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)


def save_model(
    model: nn.Module, manifest: Path, *, kind: str, store: str, tokenizer: Path, facts: dict[str, Any]
) -> Manifest:
    """Save a whole model without training state as a checkpoint."""
    with tempfile.TemporaryDirectory() as scratch:
        write_model(model, Path(scratch), weights=dict(model.named_parameters()), tokenizer=tokenizer)
        return save_checkpoint(Path(scratch), manifest, store=store, kind=kind, facts=facts)


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


def _critic(model: Any) -> nn.Module:
    """A critic whose head is in float32."""
    head = ValueHead(model.score.in_features, model.score.out_features)
    head.weight, head.bias = model.score.weight, model.score.bias
    model.score = head
    return _ready(model)


def _ready(model: Any) -> nn.Module:
    """Every dropout off: the ratio in the first epoch is exactly 1."""
    model.eval()
    return model
