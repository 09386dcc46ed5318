"""Plain torch alone: activation checkpointing changes no bit, bf16 keeps float32 weights, and turns cover the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vapo.recipe import Train
from vapo.train import ranks
from vapo.train.engine import Reader, engine_of
from vapo.train.experience import values_of
from vapo.train.models import Forward, response_logprobs
from vapo.train.ppo_update import logprobs_of

from .conftest import World

ALL = np.arange(12)
SETTINGS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "warmup_steps": 0, "max_grad_norm": 1.0}


def gradient(world: World, train: Train, budget: int = 10**6) -> tuple[torch.Tensor, int]:
    """Of the mean logprob of all tokens; and how often a layer was computed."""
    model: Any = world.model("policy")
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    engine = engine_of(Forward(model, "policy"), train, **SETTINGS)
    model.model.layers[0].self_attn.register_forward_hook(count)
    data = world.data
    for turn in engine.turns(data.prompts, data.responses, ALL, budget):
        engine.backward(engine(turn)[0].sum() / data.lengths.sum(), turn)
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), calls


def test_activation_checkpointing_computes_twice_and_changes_no_bit(world: World) -> None:
    plain, once = gradient(world, Train())
    found, twice = gradient(world, Train(activation_checkpointing=True))
    assert (once, twice) == (1, 2)
    assert torch.equal(found, plain)
    assert plain.abs().max() > 1e-3


def test_bf16_is_near_and_weights_gradients_and_results_stay_float32(world: World) -> None:
    plain, found = gradient(world, Train())[0], gradient(world, Train(dtype="bf16"))[0]
    assert found.dtype == torch.float32
    assert not torch.equal(found, plain)
    assert torch.corrcoef(torch.stack([found, plain]))[0, 1] > 0.99
    for kind, of in (("policy", logprobs_of), ("critic", values_of)):
        readers = [Reader(Forward(world.model(kind), kind), Train(dtype=dtype)) for dtype in ("fp32", "bf16")]
        rows: Any = ALL if kind == "critic" else [ALL]
        exact, rounded = (np.concatenate(of(reader, world.data, rows, 10**6)) for reader in readers)  # type: ignore[operator]
        assert rounded.dtype == np.float32
        np.testing.assert_allclose(rounded, exact, atol=0.05)
        assert not np.array_equal(rounded, exact)
        # More than bfloat16's 8 bits: softmax and head are float32.
        assert not np.array_equal(rounded, torch.from_numpy(rounded).bfloat16().float().numpy())


@pytest.mark.parametrize("count", [2, 3, 5])
def test_turns_of_all_ranks_cover_every_row_once_in_step(
    world: World, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Who must keep step has a turn whenever anybody has; who need not has only its own."""
    data = world.data
    monkeypatch.setattr(ranks, "count", lambda: count)
    for in_step in (False, True):
        found, numbers = [], []
        for rank in range(count):
            monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
            reader = Reader(Forward(nn.Module(), "policy"), Train(), in_step=in_step)
            turns = list(reader.turns(data.prompts, data.responses, ALL, 40))
            found += [row for turn in turns if turn.counts for row in turn.batch.rows]
            numbers.append([(turn.most_tokens, turn.last) for turn in turns])
            assert all(len(turn.batch) <= turn.most_tokens for turn in turns)
        assert sorted(found) == ALL.tolist()
        if in_step:
            assert numbers == [numbers[0]] * count
            assert [last for _, last in numbers[0]] == [False] * (len(numbers[0]) - 1) + [True]


@pytest.mark.parametrize("most_tokens", [0, 5, 200, 1000])
def test_ranks_call_the_head_equally_often(world: World, monkeypatch: pytest.MonkeyPatch, most_tokens: int) -> None:
    """Chunks without tokens change neither values nor gradients, and each calls the head: forwards and back."""
    monkeypatch.setattr("vapo.train.models.LOGITS_AT_ONCE", 20 * 20)  # 20 tokens of this vocabulary
    results = []
    for most in (0, most_tokens):
        model: Any = world.model("policy")
        sizes: list[int] = []
        head: Callable[..., Any] = lambda _, inputs, __, sizes=sizes: sizes.append(len(inputs[0]))  # noqa: E731
        model.lm_head.register_forward_hook(head)
        (turn,) = Reader(Forward(model, "policy"), Train()).turns(world.data.prompts, world.data.responses, ALL, 10**6)
        logprobs, _ = response_logprobs(model, turn.batch, most_tokens=most)
        logprobs.sum().backward()
        assert len(sizes) == 2 * max(-(-len(turn.batch) // 20), -(-most // 20))
        results.append((logprobs.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
