"""The rollout stage: K responses for each prompt of this iteration, sampled from the policy."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from vapo import recipe
from vapo.errors import UserError
from vapo.progress import Progress
from vapo.rollout.decoder import Decoder
from vapo.rollout.engine import generate
from vapo.rollout.sampling import mix
from vapo.schemas import PROMPTS, ROLLOUTS
from vapo.seeds import derive
from vapo.store import model_only, open_checkpoint, read_manifest
from vapo.tables import offsets_of, read_table, write_table


def rollout(
    section: recipe.Rollout, *, prompts: Path, policy: Path, rollouts: Path, iteration: int, purpose: str, seed: int
) -> dict[str, float]:
    """Write ROLLOUTS for the iteration's slice of PROMPTS; returns counts, lengths and the sampled entropy."""
    table = read_table(prompts, PROMPTS)
    count = min(section.prompts, len(table))
    slice_ = (np.arange(count) + max(iteration - 1, 0) * count) % len(table)
    with tempfile.TemporaryDirectory() as scratch:
        folder = open_checkpoint(read_manifest(policy, "policy"), Path(scratch), model_only)
        decoder = Decoder(folder)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        stop_token = stop_token_of(folder)
    texts = table["prompt"].take(slice_).to_pylist()
    prompt_ids = table["prompt_id"].take(slice_).to_pylist()
    encoded = [e.ids for e in tokenizer.encode_batch(texts)]
    _check_lengths(encoded, prompt_ids, section.max_new_tokens, decoder.max_positions)
    samples, rows = section.samples, count * section.samples
    base = np.uint64(derive(seed, "rollout", purpose, iteration))
    seeds = mix(base + np.arange(rows, dtype=np.uint64))
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
    lengths = np.array([len(r.tokens) for r in responses])
    logprobs = np.array([x for r in responses for x in r.logprobs], np.float32)
    prompt_lengths = np.repeat([len(e) for e in encoded], samples)
    finish = [r.finish_reason for r in responses]
    written = write_table(
        rollouts,
        ROLLOUTS,
        {
            "rollout_id": [f"{iteration}/{p}/{k}" for p in prompt_ids for k in range(samples)],
            "prompt_id": [p for p in prompt_ids for _ in range(samples)],
            "sample_index": np.tile(np.arange(samples, dtype=np.int32), count),
            "seed": seeds,
            "prompt_tokens": (
                np.array([t for e in encoded for _ in range(samples) for t in e], np.int32),
                offsets_of(prompt_lengths),
            ),
            "response_tokens": (
                np.array([t for r in responses for t in r.tokens], np.int32),
                offsets_of(lengths),
            ),
            "rollout_logprobs": (logprobs, offsets_of(lengths)),
            "response": tokenizer.decode_batch([r.tokens for r in responses], skip_special_tokens=True),
            "finish_reason": finish,
        },
    )
    return {
        "responses": len(written),
        "tokens": int(lengths.sum()),
        "length_mean": float(lengths.mean()),
        "length_max": int(lengths.max()),
        "truncated_share": finish.count("length") / len(finish),
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
