"""Seeds: stable for ever, and another stream for every seed and name."""

from __future__ import annotations

from itertools import product

import pytest

from vapo.seeds import derive


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0,), 4246866556266386882),
        ((0, "problems", "prompts"), 3491202583172548859),
        ((7, "rollout", "train", 3), 3589615675414743943),
    ],
)
def test_known_seeds(arguments: tuple[int, object], expected: int) -> None:
    """Changing these changes every run's bytes: published results would no longer come out."""
    assert derive(*arguments) == expected


def test_streams_differ_and_fit_63_bits() -> None:
    names = list(product(range(20), ("rollout", "ppo_update"), ("train", "evaluation"), range(20)))
    found = [derive(*name) for name in names]
    assert len(set(found)) == len(names)
    assert all(0 <= seed < 2**63 for seed in found)
    assert any(seed >= 2**62 for seed in found)


def test_a_number_and_its_text_name_the_same_stream() -> None:
    """Parameters pass through JSON and the command line."""
    assert derive(1, "rollout", 3) == derive(1, "rollout", "3")
    assert derive(1, 23) != derive(12, 3)
