"""The base-model stage: the first policy, trained on worked examples or taken from a local Hugging Face folder."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers

from vapo import recipe
from vapo.errors import UserError
from vapo.progress import Progress
from vapo.schemas import EXAMPLES
from vapo.seeds import derive
from vapo.store import save_checkpoint
from vapo.tables import read_table
from vapo.train.batches import micro_batches
from vapo.train.models import response_hidden, save_model
from vapo.train.optimizer import Optimizer
from vapo.train.parts import Parts, set_state, state_of
from vapo.train.state import State, write_facts, write_fragments

VOCABULARY_START = PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
MICRO_BATCH = 4096  # padded positions
DECAY_FROM = 0.6  # share of the steps after which the learning rate falls linearly ...
DECAY_TO = 0.03  # ... to this share of it
CURRICULUM_PATIENCE = 4  # optimiser steps between two lengthenings


def base_model(
    section: recipe.BaseModelSection,
    *,
    examples: Path,
    policy: Path,
    partial: Path | None = None,
    seed: int,
    store: str,
) -> dict[str, float]:
    """Write the first policy checkpoint; returns its size and, when it was trained here, the loss.

    Args:
        partial: a folder for parts of the work, and where some may be already: then it goes on from the last one.
    """
    if section.path:
        return _from_folder(Path(section.path), policy, store)
    torch.manual_seed(derive(seed, "base_model", "weights"))
    table = read_table(examples, EXAMPLES)
    prompts, responses = table["prompt"].to_pylist(), table["response"].to_pylist()
    if not prompts:
        raise UserError("the base model has no worked example to learn from: set problems.examples")
    tokenizer = word_tokenizer(prompts + responses)
    pad, eos = (VOCABULARY_START.index(token) for token in (PAD, EOS))
    model = _build(section, tokenizer.get_vocab_size(), eos, pad)
    loss, steps_per_length = _train(
        section,
        model,
        [np.array(e.ids, np.int32) for e in tokenizer.encode_batch(prompts)],
        [np.array([*e.ids, eos], np.int32) for e in tokenizer.encode_batch(responses)],
        np.array(table["difficulty"].to_pylist()),
        np.random.default_rng(derive(seed, "base_model", "batches")),
        Parts(partial, section.part_seconds),
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tokenizer(tokenizer, folder)
        saved = save_model(model, policy, kind="policy", store=store, tokenizer=folder, facts={"steps": 0})
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(f.bytes for f in saved.files),
        "train_loss": loss,
        "full_length_at_step": steps_per_length,
    }


def word_tokenizer(texts: list[str]) -> Tokenizer:
    """A tokenizer whose tokens are the words of `texts`, in sorted order."""
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: i for i, word in enumerate([*VOCABULARY_START, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([*VOCABULARY_START])
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that transformers and vLLM read."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _build(section: recipe.BaseModelSection, vocabulary: int, eos: int, pad: int) -> Any:
    """A random Llama. Not a Qwen2: transformers gives every Qwen2 its own tokenizer class, whatever the folder says."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=section.hidden_size,
        num_hidden_layers=section.layers,
        num_attention_heads=section.heads,
        num_key_value_heads=section.heads,
        intermediate_size=section.feed_forward,
        max_position_embeddings=section.max_positions,
        initializer_range=section.init_std,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    return LlamaForCausalLM(config).float().eval()


def _train(
    section: recipe.BaseModelSection,
    model: Any,
    prompts: list[np.ndarray],
    responses: list[np.ndarray],
    difficulty: np.ndarray,
    generator: np.random.Generator,
    parts: Parts,
) -> tuple[float, int]:
    """Maximum likelihood of the responses with a curriculum in difficulty: (last smoothed loss, step at full length).

    Examples up to `limit` steps are drawn; it grows while the loss per response token is below curriculum_loss.
    Without it a model of this size stays at the loss of digits drawn at random (docs/log.md).
    """
    optimizer = Optimizer(model, lr=section.lr, weight_decay=section.weight_decay, warmup_steps=30, max_grad_norm=1.0)
    order = np.argsort(difficulty, kind="stable")
    ranked = difficulty[order]
    limit, hardest, loss, full_at, begin = int(ranked[0]) + 3, int(ranked[-1]), float("inf"), 0, 0
    if parts.found:
        optimizer.restore(State(parts.found.folder))
        set_state(generator, parts.found.facts["generator"])
        limit, loss, full_at, begin = (parts.found.facts[name] for name in ("limit", "loss", "full_at", "step"))

    def write(folder: Path) -> None:
        write_fragments(folder, optimizer.fragments(weights=True), rank=0, ranks=1)
        write_facts(folder, steps=optimizer.steps)

    progress = Progress("optimiser steps", section.steps)
    for step in range(begin, section.steps):
        known = order[: np.searchsorted(ranked, limit, side="right")]
        budget = section.batch_tokens if limit >= hardest else section.batch_tokens // 2
        batch = _draw(generator, known, prompts, responses, budget)
        total = sum(len(responses[r]) for r in batch)
        step_loss = 0.0
        for micro in micro_batches(prompts, responses, batch, MICRO_BATCH):
            logits = model.lm_head(response_hidden(model, micro))
            part = F.cross_entropy(logits, micro.targets, reduction="sum") / total
            part.backward()
            step_loss += part.item()
        remaining = (section.steps - step) / (section.steps * (1 - DECAY_FROM))
        optimizer.step(max(DECAY_TO, min(1.0, remaining)))
        loss = step_loss if step == 0 else 0.9 * loss + 0.1 * step_loss
        if limit < hardest and loss < section.curriculum_loss and step % CURRICULUM_PATIENCE == 0:
            limit = min(hardest, limit + max(1, limit // 5))
            full_at = step + 1
        progress(step + 1, total, loss=loss, steps_of_chain=limit)
        facts = {"limit": limit, "loss": loss, "full_at": full_at, "generator": state_of(generator)}
        parts.add(write, {"step": step + 1, **facts})
    if limit < hardest:
        raise UserError(
            f"the base model's curriculum ended at difficulty {limit} of {hardest} (loss {loss:.3f} per token, "
            f"base_model.curriculum_loss {section.curriculum_loss}): raise base_model.steps or curriculum_loss"
        )
    return loss, full_at


def _draw(
    generator: np.random.Generator,
    known: np.ndarray,
    prompts: list[np.ndarray],
    responses: list[np.ndarray],
    budget: int,
) -> np.ndarray:
    """Random examples of about `budget` tokens in all."""
    batch: list[int] = []
    tokens = 0
    while tokens < budget:
        row = int(known[generator.integers(len(known))])
        batch.append(row)
        tokens += len(prompts[row]) + len(responses[row])
    return np.array(batch)


def _from_folder(folder: Path, policy: Path, store: str) -> dict[str, float]:
    """Take a local Hugging Face checkpoint as it is."""
    where = f"base_model.path {str(folder)!r}"
    if not folder.is_dir():
        raise UserError(f"{where}: no such folder: give a local Hugging Face checkpoint")
    for name, cure in (
        ("config.json", "give a Hugging Face checkpoint"),
        ("tokenizer.json", "save the tokenizer into it with tokenizer.save_pretrained"),
    ):
        if not (folder / name).is_file():
            raise UserError(f"{where}: {name} is missing: {cure}")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{where}: no *.safetensors: save the model with save_pretrained (no pickled weights)")
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{where}: config.json is not a JSON object ({error}): save the model again") from None
    if kind not in recipe.ARCHITECTURES:
        raise UserError(f"{where}: model_type {kind!r}: give a checkpoint of {' or '.join(recipe.ARCHITECTURES)}")
    with tempfile.TemporaryDirectory() as scratch:
        for path in [*folder.glob("*.json"), *folder.glob("*.jinja"), *weights]:
            (Path(scratch) / path.name).symlink_to(path.resolve())  # the weights may be many gigabytes
        saved = save_checkpoint(Path(scratch), policy, store=store, kind="policy", facts={"steps": 0})
    return {"bytes": sum(f.bytes for f in saved.files)}
