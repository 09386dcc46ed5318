"""What is wrong with a training stage's inputs is said before it works, and what to lower when memory runs out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from vapo import recipe
from vapo.errors import UserError
from vapo.train.experience import Rollouts, named
from vapo.train.models import Checkpoint, check_same_tokenizer

NO_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")  # in the words of torch's allocators


def check_fits(data: Rollouts, model: Checkpoint) -> None:
    """The rollouts must be texts that the model can read.

    Raises:
        UserError: one is longer than the model has positions, or holds a token that it does not know.
    """
    config, kind = _config(model.folder), model.manifest.kind
    lengths = np.array([len(p) + len(r) for p, r in zip(data.prompts, data.responses, strict=True)])
    most = config.get("max_position_embeddings") or np.inf
    if (lengths > most).any():
        raise UserError(
            f"prompt and response are up to {lengths.max()} tokens long, the {kind} has {most} positions: "
            f"{named(data, np.flatnonzero(lengths > most))}; lower rollout.max_new_tokens, leave long prompts out, or "
            "take a model with more positions"
        )
    tokens = np.array(
        [max(p.max(initial=0), r.max(initial=0)) for p, r in zip(data.prompts, data.responses, strict=True)]
    )
    if (tokens >= config["vocab_size"]).any():
        raise UserError(
            f"token {tokens.max()} is beyond the {kind}'s vocabulary of {config['vocab_size']}: "
            f"{named(data, np.flatnonzero(tokens >= config['vocab_size']))}; the rollouts are another model's"
        )


def check_critic(policy: Checkpoint, critic: Checkpoint) -> None:
    """A critic is for the one policy that it was trained or updated with, and reads text alike.

    Raises:
        UserError: it belongs to another policy, or their tokenizers or vocabularies differ.
    """
    check_same_tokenizer(policy, critic)
    sizes = [_config(source.folder)["vocab_size"] for source in (policy, critic)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"the policy has a vocabulary of {sizes[0]}, the critic of {sizes[1]}: pretrain the critic from this policy"
        )
    belongs = critic.manifest.facts.get("policy")
    if belongs != policy.manifest.digest:
        raise UserError(
            f"the critic was trained for policy {str(belongs)[:12]}, this policy is {policy.manifest.digest[:12]}: "
            "pretrain a critic for it, or take both from the same iteration"
        )


@contextmanager
def memory_advice(name: str, section: recipe.TrainingSection) -> Iterator[None]:
    """Say which settings to change when the block runs out of memory; `name` is the section's in the recipe.

    Raises:
        UserError: the block ran out of memory.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not any(words in str(error) for words in NO_MEMORY):
            raise
        train, budget = section.train, getattr(section, "token_budget", None)
        cures = [f"lower {name}.token_budget (now {budget})"]
        if not train.activation_checkpointing:
            cures.append("set train.activation_checkpointing to true")
        if train.engine == "torch":
            cures.append("set train.engine to 'deepspeed' with train.zero_stage 3")
        elif train.zero_stage < 3:
            cures.append(f"raise train.zero_stage (now {train.zero_stage})")
        if train.engine == "deepspeed" and train.offload == "none":
            cures.append("set train.offload to 'cpu'")
        where = "GPU" if torch.cuda.is_available() else "machine"
        raise UserError(f"{name}: the {where} is out of memory: {', or '.join(cures)}") from error


def _config(folder: Path) -> dict[str, float]:
    config: dict[str, float] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config
