"""Micro-batches: every row once, within the budget, and positions that point at the right tokens."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vapo.train.batches import OVERHEAD, MicroBatch, gather, micro_batches, partition, scatter

Ragged = tuple[list[np.ndarray], list[np.ndarray], np.ndarray]


@st.composite
def ragged(draw: st.DrawFn) -> Ragged:
    """Prompts, responses (some empty), and the rows to take, in any order."""
    lengths = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 30)), min_size=1, max_size=12))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    prompts = [generator.integers(1, 99, p).astype(np.int32) for p, _ in lengths]
    responses = [generator.integers(1, 99, r).astype(np.int32) for _, r in lengths]
    rows = generator.permutation(len(lengths))[: draw(st.integers(1, len(lengths)))]
    return prompts, responses, rows


def batches(data: Ragged, budget: int) -> list[MicroBatch]:
    return list(micro_batches(*data, budget))


@given(ragged(), st.integers(1, 300))
def test_every_row_once_within_the_budget(data: Ragged, budget: int) -> None:
    found = batches(data, budget)
    assert sorted(np.concatenate([b.rows for b in found])) == sorted(data[2])
    for batch in found:
        assert batch.tokens.numel() <= budget or len(batch.rows) == 1
        assert batch.tokens.shape[1] == max(len(data[0][r]) + len(data[1][r]) for r in batch.rows)


def test_a_budget_is_used() -> None:
    """Eight rows of ten positions: as many batches as the budget makes necessary, no more."""
    data = [np.ones(4, np.int32)] * 8, [np.ones(6, np.int32)] * 8, np.arange(8)
    assert [[len(b.rows) for b in batches(data, budget)] for budget in (10, 29, 30, 79, 80)] == [
        [1] * 8,
        [2] * 4,
        [2, 3, 3],
        [1, 7],
        [8],
    ]


@given(ragged(), st.integers(1, 300))
def test_positions_point_at_the_response_tokens(data: Ragged, budget: int) -> None:
    """The predicting position is the one before; nothing else of a row is counted."""
    prompts, responses, _ = data
    for batch in batches(data, budget):
        expected = np.concatenate([responses[r] for r in batch.rows])
        assert batch.targets.tolist() == expected.tolist()
        assert len(batch) == len(expected)
        assert batch.tokens[batch.row_index, batch.column_index + 1].tolist() == expected.tolist()
        for i, row in enumerate(batch.rows):
            whole = np.concatenate([prompts[row], responses[row]])
            assert batch.tokens[i, : len(whole)].tolist() == whole.tolist()
            columns = batch.column_index[batch.row_index == i]
            assert columns.tolist() == list(range(len(prompts[row]) - 1, len(whole) - 1))


@given(ragged(), st.integers(1, 300))
def test_scatter_reverses_gather(data: Ragged, budget: int) -> None:
    _, responses, rows = data
    values = [np.random.default_rng(i).normal(size=len(r)).astype(np.float32) for i, r in enumerate(responses)]
    out = [np.full(1, np.nan, np.float32)] * len(responses)
    for batch in batches(data, budget):
        scatter(gather(values, batch), batch, np.array([len(r) for r in responses]), out)
    for i, found in enumerate(out):
        np.testing.assert_array_equal(found, values[i] if i in rows else [np.nan])


def cost(cuts: list[int], lengths: np.ndarray, budget: int) -> float:
    """Padded positions and OVERHEAD of a budget per part; infinite where a part of several rows is too large."""
    total = 0.0
    for a, b in pairwise(cuts):
        positions = (b - a) * int(lengths[b - 1])
        total += float("inf") if positions > budget and b - a > 1 else positions + OVERHEAD * budget
    return total


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(1, 300))
def test_no_other_cut_is_cheaper(lengths: list[int], budget: int) -> None:
    """Against every way to cut."""
    ascending = np.sort(lengths)
    inner = range(1, len(lengths))
    every = [[0, *c, len(lengths)] for n in range(len(lengths)) for c in combinations(inner, n)]
    best = min(cost(cuts, ascending, budget) for cuts in every)
    assert cost(partition(ascending, budget), ascending, budget) == pytest.approx(best)


@pytest.mark.parametrize("budget", [16384, 32768])
def test_at_most_5_percent_padding_on_heavy_tailed_lengths(budget: int) -> None:
    """A mini-batch of 512 responses, mean length 2,000, the longest 16,384, with prompts of 50 to 400 tokens."""
    generator = np.random.default_rng(0)
    drawn = generator.lognormal(0, 1, 512)
    lengths = np.clip(drawn * 2000 / drawn.mean(), 1, 16384).astype(int)
    lengths[lengths.argmax()] = 16384
    prompts = [np.ones(n, np.int32) for n in generator.integers(50, 400, 512)]
    found = list(micro_batches(prompts, [np.ones(n, np.int32) for n in lengths], np.arange(512), budget))
    real = sum(b.real_positions for b in found)
    assert real == sum(map(len, prompts)) + lengths.sum()
    assert 0 < 1 - real / sum(b.tokens.numel() for b in found) <= 0.05


def test_gather_keeps_the_dtype() -> None:
    data = [np.ones(1, np.int32)] * 2, [np.ones(3, np.int32)] * 2, np.arange(2)
    (batch,) = batches(data, 100)
    assert gather([np.zeros(3, np.float32)] * 2, batch).dtype == torch.float32
