"""The rollout stage: K responses for each prompt of this iteration, sampled from the policy."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from vapo import recipe
from vapo.errors import UserError
from vapo.progress import Progress
from vapo.rl.groups import informative_groups
from vapo.rollout.decoder import Decoder
from vapo.rollout.engine import generate
from vapo.rollout.sampling import mix
from vapo.schemas import PROMPTS, REWARDS, ROLLOUTS
from vapo.seeds import derive
from vapo.store import model_only, open_checkpoint, read_manifest
from vapo.tables import check_joined, flat, offsets_of, ragged, read_table, write_table


def rollout(
    section: recipe.Rollout,
    *,
    prompts: Path,
    policy: Path,
    rollouts: Path,
    previous_rollouts: Path | None = None,
    previous_rewards: Path | None = None,
    iteration: int,
    draw: int,
    wanted_groups: int,
    purpose: str,
    seed: int,
) -> dict[str, float]:
    """Write ROLLOUTS for the iteration's slice of PROMPTS; returns counts, lengths and the sampled entropy.

    Args:
        draw: which draw of the iteration this is, from 1 (dynamic sampling, DAPO section 3.2).
        previous_rollouts: those of the draws before: they are kept in front of the new ones.
        previous_rewards: if they hold `wanted_groups` prompts with both correct and wrong responses, nothing new is
            sampled.
    """
    if previous_rollouts is None or previous_rewards is None:
        return _facts(
            write_table(rollouts, ROLLOUTS, _sample(section, prompts, policy, iteration, draw, purpose, seed))
        )
    before = read_table(previous_rollouts, ROLLOUTS)
    found = _informative(before, previous_rewards)
    parts = [before]
    if found < wanted_groups:
        more = _sample(section, prompts, policy, iteration, draw, purpose, seed)
        parts.append(write_table(rollouts, ROLLOUTS, more))
    joined = pa.concat_tables(parts)
    return _facts(write_table(rollouts, ROLLOUTS, {name: joined[name] for name in ROLLOUTS.names}))


def _informative(sampled: pa.Table, rewards: Path) -> int:
    """How many prompts have both correct and wrong responses."""
    graded = read_table(rewards, REWARDS)
    check_joined(rewards, graded, sampled)
    _, groups = np.unique(sampled["prompt_id"].to_pylist(), return_inverse=True)
    return int(informative_groups(flat(graded, "correct"), groups).sum())


def _sample(
    section: recipe.Rollout, prompts: Path, policy: Path, iteration: int, draw: int, purpose: str, seed: int
) -> dict[str, Any]:
    """The columns of ROLLOUTS for one draw's slice of PROMPTS; no prompt comes twice in an iteration."""
    table = read_table(prompts, PROMPTS)
    per_draw = min(section.prompts, max(1, len(table) // section.draws))
    first = (max(iteration - 1, 0) * section.draws + draw - 1) * per_draw
    slice_ = (np.arange(per_draw) + first) % len(table)
    with tempfile.TemporaryDirectory() as scratch:
        folder = open_checkpoint(read_manifest(policy, "policy"), Path(scratch), model_only)
        decoder = Decoder(folder)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        stop_token = stop_token_of(folder)
    texts = table["prompt"].take(slice_).to_pylist()
    prompt_ids = table["prompt_id"].take(slice_).to_pylist()
    encoded = [e.ids for e in tokenizer.encode_batch(texts)]
    _check_lengths(encoded, prompt_ids, section.max_new_tokens, decoder.max_positions)
    samples, rows = section.samples, per_draw * section.samples
    stream = ("rollout", purpose, iteration) if draw == 1 else ("rollout", purpose, iteration, draw)
    seeds = mix(np.uint64(derive(seed, *stream)) + np.arange(rows, dtype=np.uint64))
    progress, done = Progress("responses", rows), 0

    def on_tokens(ended: int, sampled: int) -> None:
        nonlocal done
        done += ended
        progress(done, sampled)

    responses = generate(
        decoder,
        encoded,
        seeds,
        samples=samples,
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        top_p=section.top_p,
        stop_token=stop_token,
        batch_size=section.batch_size,
        on_tokens=on_tokens,
    )
    offsets = offsets_of([len(r.tokens) for r in responses])
    return {
        "rollout_id": [f"{iteration}/{p}/{k}" for p in prompt_ids for k in range(samples)],
        "prompt_id": [p for p in prompt_ids for _ in range(samples)],
        "sample_index": np.tile(np.arange(samples, dtype=np.int32), per_draw),
        "seed": seeds,
        "prompt_tokens": (
            np.array([t for e in encoded for _ in range(samples) for t in e], np.int32),
            offsets_of(np.repeat([len(e) for e in encoded], samples)),
        ),
        "response_tokens": (np.array([t for r in responses for t in r.tokens], np.int32), offsets),
        "rollout_logprobs": (np.array([x for r in responses for x in r.logprobs], np.float32), offsets),
        "response": tokenizer.decode_batch([r.tokens for r in responses], skip_special_tokens=True),
        "finish_reason": [r.finish_reason for r in responses],
    }


def _facts(written: pa.Table) -> dict[str, float]:
    """Counts, lengths and entropy of all responses that were written."""
    logprobs, offsets = ragged(written, "rollout_logprobs")
    lengths = np.diff(offsets)
    return {
        "prompts": len(set(written["prompt_id"].to_pylist())),
        "responses": len(written),
        "tokens": int(lengths.sum()),
        "length_mean": float(lengths.mean()),
        "length_max": int(lengths.max()),
        "truncated_share": written["finish_reason"].to_pylist().count("length") / len(written),
        "sampled_entropy": float(-logprobs.mean()),
    }


def stop_token_of(folder: Path) -> int:
    """The token that ends a response: `eos_token_id` of the checkpoint's config (the first, if there are several)."""
    eos = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
    if isinstance(eos, list):
        eos = eos[0] if eos else None
    if eos is None:
        raise UserError("the policy's config.json has no eos_token_id: set it to the token that ends a response")
    return int(eos)


def _check_lengths(encoded: list[list[int]], prompt_ids: list[str], max_new_tokens: int, max_positions: int) -> None:
    for prompt_id, tokens in zip(prompt_ids, encoded, strict=True):
        if not tokens:
            raise UserError(f"prompt {prompt_id} has no token: the policy's tokenizer knows nothing of its text")
        if len(tokens) + max_new_tokens > max_positions:
            raise UserError(
                f"prompt {prompt_id} has {len(tokens)} tokens; with rollout.max_new_tokens {max_new_tokens} it passes "
                f"the policy's {max_positions} positions: lower rollout.max_new_tokens or shorten the prompt"
            )
