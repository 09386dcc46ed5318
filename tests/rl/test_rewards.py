"""Soft overlong: golden numbers of reference/algorithm.md section 6, and the three pieces of DAPO's equation 13."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapo.rl.rewards import soft_overlong


@pytest.mark.parametrize(
    ("length", "expected"), [(16384, 0.0), (16385, -0.000244140625), (18432, -0.5), (20480, -1.0), (20481, -1.0)]
)
def test_golden(length: int, expected: float) -> None:
    assert soft_overlong(np.array([length]), 20480, 4096).tolist() == [expected]


@given(st.lists(st.integers(0, 300), min_size=1), st.integers(1, 200), st.data())
def test_is_the_published_formula(lengths: list[int], longest: int, data: st.DataObject) -> None:
    cache = data.draw(st.integers(1, longest))
    found = soft_overlong(np.array(lengths), longest, cache)
    assert found.dtype == np.float64
    for length, one in zip(lengths, found, strict=True):
        if length <= longest - cache:
            assert one == 0.0
        elif length <= longest:
            assert one == pytest.approx(((longest - cache) - length) / cache, abs=1e-12)
        else:
            assert one == -1.0
