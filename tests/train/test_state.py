"""Training state as fragments: any cut is read by any other, and what is missing is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vapo.errors import UserError
from vapo.train.state import Fragment, State, state_in, write_facts, write_fragments

SIZES = {"a": 10, "b": 1, "layer.c": 23}


def whole(name: str, key: str) -> torch.Tensor:
    """The state of a parameter, different everywhere."""
    seed = sum(map(ord, name + key))
    return torch.randn(SIZES[name], generator=torch.Generator().manual_seed(seed))


def write(folder: Path, ranks: int, cut: int, *, without: int | None = None) -> None:
    """Every parameter in pieces of `cut` elements, dealt out to the ranks; one rank's file may be missing."""
    for rank in range(ranks):
        fragments = []
        for name, size in SIZES.items():
            starts = range(0, size, cut)
            for start in list(starts)[rank::ranks]:
                part = slice(start, start + cut)
                fragments.append(Fragment(name, start, {key: whole(name, key)[part] for key in ("exp_avg", "weight")}))
        if rank != without:
            write_fragments(folder, fragments, rank, ranks)
    write_facts(folder, steps=7, ranks=ranks)


@pytest.mark.parametrize(("ranks", "cut"), [(1, 100), (2, 12), (3, 8)])
@pytest.mark.parametrize("seed", range(5))
def test_any_part_is_read_from_any_cut(tmp_path: Path, ranks: int, cut: int, seed: int) -> None:
    write(tmp_path, ranks, cut)
    state, generator = State(tmp_path), np.random.default_rng(seed)
    assert state.names == set(SIZES)
    assert state.facts == {"steps": 7, "ranks": ranks}
    for name, size in SIZES.items():
        start = int(generator.integers(0, size))
        count = int(generator.integers(0, size - start)) + 1
        for key in ("exp_avg", "weight"):
            assert torch.equal(state.read(name, key, start, count), whole(name, key)[start : start + count])
    assert "a/weight" in state
    assert "a/exp_avg_sq" not in state


def test_a_rank_that_is_missing_is_said(tmp_path: Path) -> None:
    write(tmp_path, 3, 8, without=1)
    with pytest.raises(UserError, match=r"incomplete: layer.c/exp_avg has 15 of 23 elements from 0 on: go on from an"):
        State(tmp_path).read("layer.c", "exp_avg", 0, 23)


def test_nothing_saved_is_a_fresh_start(tmp_path: Path) -> None:
    assert state_in(tmp_path) is None
    write_fragments(tmp_path / "none", [], 1, 2)
    assert not (tmp_path / "none").exists()


def test_facts_are_what_was_told(tmp_path: Path) -> None:
    write_facts(tmp_path / "new", steps=3, seed=1, iteration=2)
    assert json.loads((tmp_path / "new" / "state.json").read_text()) == {"steps": 3, "seed": 1, "iteration": 2}
