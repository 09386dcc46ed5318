"""What training reads: ragged rows joined with their rewards, or refused."""

from __future__ import annotations

import numpy as np
import pytest

from vapo.errors import UserError
from vapo.train.experience import read_rollouts

from .conftest import LENGTHS, PROMPT_LENGTHS, World


def test_rows_are_the_tables(world: World) -> None:
    data = world.data
    assert len(data) == 12
    assert data.lengths.tolist() == LENGTHS
    assert [len(p) for p in data.prompts] == [n for n in PROMPT_LENGTHS for _ in range(3)]
    assert [len(p) for p in data.logprobs] == LENGTHS
    assert data.prompt_ids == [f"p{i // 3}" for i in range(12)]
    assert data.rewards.tolist() == [1, -1, -1] * 4
    assert data.correct.tolist() == [True, False, False] * 4
    assert data.rewards.dtype == np.float32


def test_rewards_of_other_rollouts_are_refused(world: World) -> None:
    before = world.rewards.read_bytes()
    world.write_rollouts(LENGTHS[:9])
    world.rewards.write_bytes(before)
    with pytest.raises(UserError, match="rewards: column rollout_id: expected 9 rows as in ROLLOUTS, found 12"):
        read_rollouts(world.rollouts, world.rewards)
