"""The decoder computes what transformers computes, with a cache, in batches, with padding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vapo.errors import UserError
from vapo.rollout.decoder import Decoder

from .conftest import VARIANTS, VOCABULARY

Make = Callable[[str], tuple[Path, Any]]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(tokens [B, T], padding [B]); padded positions hold a token that is not padding's usual 0."""
    width = max(len(r) for r in rows)
    padding = torch.tensor([width - len(r) for r in rows])
    return torch.stack([torch.cat([torch.full((width - len(r),), 7), r]) for r in rows]), padding


@torch.no_grad()
def reference(model: Any, row: Tensor) -> Tensor:
    """Logits [T, V] of transformers for one row."""
    return model(row[None]).logits[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(checkpoint: Make, variant: str) -> None:
    """At every position of an incremental pass: a prompt at once, then token by token."""
    folder, model = checkpoint(variant)
    decoder, batch = Decoder(folder), tokens(3, 12)
    expected = torch.stack([reference(model, row) for row in batch])
    cache = decoder.new_cache(torch.zeros(3, dtype=torch.long), 12)
    torch.testing.assert_close(decoder.forward(batch[:, :5], cache), expected[:, 4], rtol=0, atol=2e-5)
    for t in range(5, 12):
        torch.testing.assert_close(decoder.forward(batch[:, t : t + 1], cache), expected[:, t], rtol=0, atol=2e-5)
    assert expected.std() > 0.1  # logits that are all alike would prove nothing


@pytest.mark.parametrize("variant", VARIANTS)
def test_left_padding_does_not_matter(checkpoint: Make, variant: str) -> None:
    folder, model = checkpoint(variant)
    decoder, rows = Decoder(folder), [tokens(n, seed=n) for n in (1, 9, 4)]
    more = tokens(3, 5, seed=99)
    batch, padding = left_padded(rows)
    cache = decoder.new_cache(padding, 14)
    found = [decoder.forward(batch, cache), *(decoder.forward(more[:, t : t + 1], cache) for t in range(5))]
    for i, row in enumerate(rows):
        expected = reference(model, torch.cat([row, more[i]]))[len(row) - 1 :]
        torch.testing.assert_close(torch.stack([step[i] for step in found]), expected, rtol=0, atol=2e-5)


def test_a_prompt_may_come_in_pieces(checkpoint: Make) -> None:
    decoder, batch = Decoder(checkpoint("llama-grouped")[0]), tokens(2, 10)
    padding = torch.tensor([0, 3])
    whole, pieces = decoder.new_cache(padding, 10), decoder.new_cache(padding, 10)
    expected = decoder.forward(batch, whole)
    for start, end in ((0, 4), (4, 5), (5, 10)):
        found = decoder.forward(batch[:, start:end], pieces)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert pieces.length == whole.length == 10


def test_growing_and_selecting_rows_keep_what_was_read(checkpoint: Make) -> None:
    """A cache grown from nothing to spare, repeated and cut, continues as the rows it came from."""
    folder, model = checkpoint("qwen2-grouped-tied")
    decoder, rows, more = Decoder(folder), [tokens(n, seed=n) for n in (3, 6)], tokens(3, 1, seed=5)
    batch, padding = left_padded(rows)
    cache = decoder.new_cache(padding, 6)
    decoder.forward(batch, cache)
    owners = [1, 0, 1]
    cache.keep(torch.tensor(owners), 8)
    found = decoder.forward(more, cache)
    for i, owner in enumerate(owners):
        expected = reference(model, torch.cat([rows[owner], more[i]]))[-1]
        torch.testing.assert_close(found[i], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"model_type": None}, "None"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"hidden_act": "gelu"}, "'gelu'"),
    ],
)
def test_what_it_cannot_decode_is_refused(checkpoint: Make, tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    """By name, rather than decoded wrongly."""
    folder = shutil.copytree(checkpoint("qwen2")[0], tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(UserError, match=r"rollout\.engine 'cpu'") as error:
        Decoder(folder)
    assert said in str(error.value)
