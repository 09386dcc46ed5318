"""From ragged rows to padded micro-batches: rows of like lengths, cut where padding costs least, within a budget.

Axes: B rows of a micro-batch, T its longest row, n all its response tokens in row order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

OVERHEAD = 1 / 32  # what one more micro-batch costs, as a share of the budget: then about 3 % of positions are padding


@dataclass(frozen=True)
class MicroBatch:
    """Prompts and responses of some rows, padded on the right, and where their response tokens are."""

    rows: np.ndarray  # [B], indices into the table
    tokens: Tensor  # [B, T]
    row_index: Tensor  # [n], row of the position that predicts each response token
    column_index: Tensor  # [n], its column: one before the token itself
    targets: Tensor  # [n], the response tokens
    real_positions: int  # positions that are not padding

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device."""
        tensors = {name: getattr(self, name).to(device) for name in ("tokens", "row_index", "column_index", "targets")}
        return replace(self, **tensors)


def micro_batches(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], rows: np.ndarray, budget: int
) -> Iterator[MicroBatch]:
    """The micro-batches of `plan`, padded one at a time."""
    for part in plan(prompts, responses, rows, budget):
        yield pad(prompts, responses, part)


def plan(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], rows: np.ndarray, budget: int
) -> list[np.ndarray]:
    """The rows of micro-batches of at most `budget` padded positions that together hold each of `rows` once.

    Rows of like lengths share one. A single row longer than the budget makes a micro-batch of its own.
    """
    lengths = np.array([len(prompts[r]) + len(responses[r]) for r in rows])
    order = np.argsort(lengths, kind="stable")
    return [rows[order[a:b]] for a, b in pairwise(partition(lengths[order], budget))]


def partition(lengths: np.ndarray, budget: int) -> list[int]:
    """Where to cut ascending lengths [B] into micro-batches: positions from 0 to B.

    The cheapest cut into parts of (rows x longest row) <= budget, where a part costs its padded positions and
    OVERHEAD of a budget besides: exact, by dynamic programming over the last part's first row.
    """
    widths, overhead = lengths.tolist(), OVERHEAD * budget
    cost, begins = [0.0], [0]  # of the first `end` rows: the least cost, and where its last part begins
    for end in range(1, len(widths) + 1):
        width = widths[end - 1]
        first = max(0, end - max(1, budget // max(width, 1)))
        cost_of = [cost[begin] + (end - begin) * width for begin in range(first, end)]
        best = min(range(len(cost_of)), key=cost_of.__getitem__)
        cost.append(cost_of[best] + overhead)
        begins.append(first + best)
    cuts = [len(widths)]
    while cuts[-1] > 0:
        cuts.append(begins[cuts[-1]])
    return cuts[::-1]


def gather(values: Sequence[np.ndarray], batch: MicroBatch) -> Tensor:
    """Per-token values of a batch's rows, one after the other: [n]."""
    return torch.from_numpy(np.concatenate([values[r] for r in batch.rows]))


def scatter(flat: Tensor, batch: MicroBatch, lengths: np.ndarray, out: list[np.ndarray]) -> None:
    """The reverse of `gather`: put [n] values into out[row] for every row of the batch."""
    parts = np.split(flat.numpy(), np.cumsum(lengths[batch.rows])[:-1])
    for row, part in zip(batch.rows, parts, strict=True):
        out[row] = part


def pad(prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], rows: np.ndarray) -> MicroBatch:
    """Some rows as one micro-batch, padded on the right to the longest."""
    lengths = [len(prompts[r]) + len(responses[r]) for r in rows]
    width = max(lengths)
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
    return MicroBatch(rows, found, at_row, at_column, found[at_row, at_column + 1], sum(lengths))
