"""A problem, its identity, and which problems are held out: all by the prompt's own hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One row of a PROMPTS table."""

    prompt_id: str
    prompt: str
    ground_truth: str
    family: str
    difficulty: int


def identity(prompt: str) -> str:
    """A prompt's ID: 16 hex digits of its text's hash, before any template."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def split(problems: Sequence[Problem], heldout_share: float) -> tuple[list[Problem], list[Problem]]:
    """(training, held-out) by each prompt's hash: the same however files are ordered, split or merged."""
    limit = int(heldout_share * 2**32)
    heldout = [p for p in problems if int(p.prompt_id[:8], 16) < limit]
    train = [p for p in problems if int(p.prompt_id[:8], 16) >= limit]
    return train, heldout


def choose(problems: Sequence[Problem], count: int) -> list[Problem]:
    """At most `count` of them, by hash, in the order given: the same ones however files are ordered."""
    if len(problems) <= count:
        return list(problems)
    chosen = set(sorted(p.prompt_id for p in problems)[:count])
    return [p for p in problems if p.prompt_id in chosen]
