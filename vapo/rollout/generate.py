"""The rollout stage: K responses for each prompt of this iteration, sampled from the policy."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from vapo import recipe
from vapo.errors import UserError
from vapo.progress import Progress
from vapo.rl.groups import informative_groups
from vapo.rollout.engines import Engine, OnTokens, open_engine
from vapo.rollout.sampling import mix
from vapo.rollout.streaming import Parts, write_groups
from vapo.schemas import PROMPTS, REWARDS, ROLLOUTS
from vapo.seeds import derive
from vapo.store import model_only, open_checkpoint, read_manifest
from vapo.tables import check_joined, flat, offsets_of, read_table

TOGETHER = 1024  # prompts that are encoded together to see their lengths


def rollout(
    section: recipe.Rollout,
    *,
    prompts: Path,
    policy: Path,
    rollouts: Path,
    partial: Path | None = None,
    previous_rollouts: Path | None = None,
    previous_rewards: Path | None = None,
    iteration: int,
    draw: int,
    wanted_groups: int,
    purpose: str,
    seed: int,
    shard: int = 0,
    shards: int = 1,
) -> dict[str, float]:
    """Write ROLLOUTS for the iteration's slice of PROMPTS; returns counts, lengths and the sampled entropy.

    Args:
        partial: a folder for what is finished before all is, and where that may be already; without one it is a
            temporary folder.
        draw: which draw of the iteration this is, from 1 (dynamic sampling, DAPO section 3.2).
        previous_rollouts: those of the draws before: they are kept in front of the new ones.
        previous_rewards: if they hold `wanted_groups` prompts with both correct and wrong responses, nothing new is
            sampled.
        shard: which of the `shards` tasks this is, from 0, that share the draw's prompts. One of several writes its
            new rows alone.
    """
    groups: Iterable[pa.Table] = ()
    wanted = True
    if previous_rollouts is not None and previous_rewards is not None:
        before = read_table(previous_rollouts, ROLLOUTS)
        if shards == 1:
            groups = (before.slice(first, section.samples) for first in range(0, len(before), section.samples))
        wanted = _informative(before, previous_rewards) < wanted_groups
    with ExitStack() as stack:
        if wanted:
            folder = partial or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            drawn = Draw(section, prompts, iteration, draw, purpose, seed)
            mine = np.array_split(np.arange(drawn.prompts), shards)[shard]
            if mine.size:
                groups = itertools.chain(groups, _sample(drawn, mine, policy, folder))
        return write_groups(rollouts, groups)


def _informative(sampled: pa.Table, rewards: Path) -> int:
    """How many prompts have both correct and wrong responses."""
    graded = read_table(rewards, REWARDS)
    check_joined(rewards, graded, sampled)
    _, groups = np.unique(sampled["prompt_id"].to_pylist(), return_inverse=True)
    return int(informative_groups(flat(graded, "correct"), groups).sum())


class Draw:
    """One draw's slice of PROMPTS, and the seeds of its responses; no prompt comes twice in an iteration."""

    def __init__(
        self, section: recipe.Rollout, prompts: Path, iteration: int, draw: int, purpose: str, seed: int
    ) -> None:
        self.section, self.iteration = section, iteration
        self.table = read_table(prompts, PROMPTS)
        self.prompts = min(section.prompts, max(1, len(self.table) // section.draws))
        self.first = (max(iteration - 1, 0) * section.draws + draw - 1) * self.prompts
        stream = ("rollout", purpose, iteration) if draw == 1 else ("rollout", purpose, iteration, draw)
        self.stream = np.uint64(derive(seed, *stream))

    def column(self, name: str, chosen: np.ndarray) -> list[str]:
        """A column of PROMPTS for prompts of the draw, by their numbers in it."""
        return self.table[name].take((chosen + self.first) % len(self.table)).to_pylist()

    def seeds(self, chosen: np.ndarray) -> np.ndarray:
        """Seeds of all responses to these prompts: uint64, prompt-major."""
        samples = self.section.samples
        return mix(self.stream + (chosen[:, None] * samples + np.arange(samples)).ravel().astype(np.uint64))


def _sample(draw: Draw, mine: np.ndarray, policy: Path, partial: Path) -> Iterator[pa.Table]:
    """The rows of each prompt of a draw whose number is among `mine`, in order.

    Prompts are sampled from short to long, a chunk of them at a time, and each chunk goes to disk before the next
    begins. Chunks that are there already are not sampled again; without one to sample no engine is started.
    """
    section = draw.section
    with tempfile.TemporaryDirectory() as scratch:
        folder = open_checkpoint(read_manifest(policy, "policy"), Path(scratch), model_only)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        stop_token = stop_token_of(folder)
        lengths = _lengths(draw, mine, tokenizer, folder)
        order = np.argsort(lengths, kind="stable")
        ordered = mine[order]
        chunks = [ordered[i : i + section.prompts_together] for i in range(0, len(ordered), section.prompts_together)]
        parts = Parts(partial, ROLLOUTS)
        missing = [number for number in range(len(chunks)) if number not in parts]
        if missing:
            progress = Progress("responses", len(mine) * section.samples)
            done = sum(len(chunk) for n, chunk in enumerate(chunks) if n not in missing) * section.samples

            def on_tokens(ended: int, sampled: int) -> None:
                nonlocal done
                done += ended
                progress(done, sampled)

            max_length = section.max_model_length or int(lengths.max()) + section.max_new_tokens
            with open_engine(section, folder, stop_token, max_length) as engine:
                for number in missing:
                    parts.add(number, _rows(draw, chunks[number], tokenizer, engine, on_tokens))
    for place in np.argsort(order):  # of each prompt among the sorted ones
        number, row = divmod(int(place), section.prompts_together)
        yield parts.rows(number, row * section.samples, section.samples)


def _lengths(draw: Draw, mine: np.ndarray, tokenizer: Tokenizer, folder: Path) -> np.ndarray:
    """Tokens of each of these prompts [P]; each leaves room for a response."""
    found = np.zeros(len(mine), np.int32)
    for first in range(0, len(mine), TOGETHER):
        encoded = tokenizer.encode_batch(draw.column("prompt", mine[first : first + TOGETHER]))
        found[first : first + TOGETHER] = [len(e.ids) for e in encoded]
    positions = json.loads((folder / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    _check_lengths(draw, mine, found, int(positions))
    return found


def _rows(draw: Draw, chosen: np.ndarray, tokenizer: Tokenizer, engine: Engine, on_tokens: OnTokens) -> dict[str, Any]:
    """The columns of ROLLOUTS for these prompts of a draw."""
    samples, prompt_ids, seeds = draw.section.samples, draw.column("prompt_id", chosen), draw.seeds(chosen)
    encoded = [e.ids for e in tokenizer.encode_batch(draw.column("prompt", chosen))]
    responses = engine.sample(encoded, seeds, on_tokens)
    offsets = offsets_of([len(r.tokens) for r in responses])
    return {
        "rollout_id": [f"{draw.iteration}/{p}/{k}" for p in prompt_ids for k in range(samples)],
        "prompt_id": [p for p in prompt_ids for _ in range(samples)],
        "sample_index": np.tile(np.arange(samples, dtype=np.int32), len(chosen)),
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


def stop_token_of(folder: Path) -> int:
    """The token that ends a response: `eos_token_id` of the checkpoint's config (the first, if there are several)."""
    eos = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
    if isinstance(eos, list):
        eos = eos[0] if eos else None
    if eos is None:
        raise UserError("the policy's config.json has no eos_token_id: set it to the token that ends a response")
    return int(eos)


def _check_lengths(draw: Draw, mine: np.ndarray, lengths: np.ndarray, positions: int) -> None:
    """Each of these prompts [P] must have tokens, and leave room for a response of max_new_tokens."""
    section = draw.section
    if not lengths.all():
        (prompt_id,) = draw.column("prompt_id", mine[lengths == 0][:1])
        raise UserError(f"prompt {prompt_id} has no token: the policy's tokenizer knows nothing of its text")
    if section.max_model_length > positions:
        raise UserError(
            f"rollout.max_model_length {section.max_model_length} is above the policy's {positions} positions: lower "
            "it, or leave it out"
        )
    limit = section.max_model_length or positions
    if (too_long := np.flatnonzero(lengths + section.max_new_tokens > limit)).size:
        (prompt_id,) = draw.column("prompt_id", mine[too_long[:1]])
        what = f"rollout.max_model_length {limit}" if section.max_model_length else f"the policy's {limit} positions"
        raise UserError(
            f"prompt {prompt_id} has {lengths[too_long[0]]} tokens; with rollout.max_new_tokens "
            f"{section.max_new_tokens} it passes {what}: lower rollout.max_new_tokens or shorten the prompt"
        )
