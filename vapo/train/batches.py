"""From ragged rows to padded micro-batches: sorted by length, bounded by a budget of padded positions.

Axes: B rows of a micro-batch, T its longest row, n all its response tokens in row order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Prompts and responses of some rows, padded on the right, and where their response tokens are."""

    rows: np.ndarray  # [B], indices into the table
    tokens: Tensor  # [B, T]
    row_index: Tensor  # [n], row of the position that predicts each response token
    column_index: Tensor  # [n], its column: one before the token itself
    targets: Tensor  # [n], the response tokens

    def __len__(self) -> int:
        return len(self.targets)


def micro_batches(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], rows: np.ndarray, budget: int
) -> Iterator[MicroBatch]:
    """Micro-batches of at most `budget` padded positions that together hold each of `rows` once.

    A single row longer than the budget makes a micro-batch of its own.
    """
    lengths = np.array([len(prompts[r]) + len(responses[r]) for r in rows])
    order = rows[np.argsort(lengths, kind="stable")]
    current: list[int] = []
    for row in order:
        width = len(prompts[row]) + len(responses[row])
        if current and (len(current) + 1) * width > budget:
            yield _pad(prompts, responses, current)
            current = []
        current.append(int(row))
    if current:
        yield _pad(prompts, responses, current)


def gather(values: Sequence[np.ndarray], batch: MicroBatch) -> Tensor:
    """Per-token values of a batch's rows, one after the other: [n]."""
    return torch.from_numpy(np.concatenate([values[r] for r in batch.rows]))


def scatter(flat: Tensor, batch: MicroBatch, lengths: np.ndarray, out: list[np.ndarray]) -> None:
    """The reverse of `gather`: put [n] values into out[row] for every row of the batch."""
    parts = np.split(flat.numpy(), np.cumsum(lengths[batch.rows])[:-1])
    for row, part in zip(batch.rows, parts, strict=True):
        out[row] = part


def _pad(prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], rows: list[int]) -> MicroBatch:
    width = max(len(prompts[r]) + len(responses[r]) for r in rows)
    tokens = np.zeros((len(rows), width), np.int64)
    row_index, column_index = [], []
    for i, r in enumerate(rows):
        start, end = len(prompts[r]), len(prompts[r]) + len(responses[r])
        tokens[i, :start], tokens[i, start:end] = prompts[r], responses[r]
        row_index.append(np.full(end - start, i))
        column_index.append(np.arange(start - 1, end - 1))
    found = torch.from_numpy(tokens)
    at_row = torch.from_numpy(np.concatenate(row_index))
    at_column = torch.from_numpy(np.concatenate(column_index))
    return MicroBatch(np.array(rows), found, at_row, at_column, found[at_row, at_column + 1])
