"""Shards of a draw and the task that puts them together make what one task would have made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from vapo.errors import UserError
from vapo.recipe import Rollout
from vapo.rollout import streaming
from vapo.rollout.concatenation import concatenation
from vapo.rollout.generate import rollout
from vapo.schemas import REWARDS, ROLLOUTS
from vapo.store import save_checkpoint
from vapo.tables import offsets_of, ragged, read_table, write_table

from .conftest import VOCABULARY
from .policies import write_prompts

Make = Callable[[str], tuple[Path, Any]]
WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, VOCABULARY))]
TEXTS = [" ".join(WORDS[2 + (i * k) % 20] for k in range(1, 3 + i % 4)) for i in range(12)]
ALONE = Rollout(prompts=5, samples=4, max_new_tokens=20, batch_size=4)  # a prompt's responses are a batch
TOGETHER = ALONE.model_copy(update={"batch_size": 12})


@pytest.fixture(scope="module")
def place(checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a policy's manifest and PROMPTS."""
    root = tmp_path_factory.mktemp("shards")
    folder = shutil.copytree(checkpoint("qwen2")[0], root / "files")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    save_checkpoint(folder, root / "policy.json", store=str(root / "store"), kind="policy", facts={})
    write_prompts(root / "prompts", TEXTS)
    return root


def draw(place: Path, to: Path, section: Rollout, number: int = 1, **changed: Any) -> dict[str, float]:
    """One draw as one task."""
    given: dict[str, Any] = {"iteration": 1, "draw": number, "wanted_groups": 0, "purpose": "training", "seed": 0}
    inputs = {"prompts": place / "prompts", "policy": place / "policy.json"}
    return rollout(section, **inputs, rollouts=to, **{**given, **changed})


def sharded(place: Path, to: Path, section: Rollout, shards: int, number: int = 1, **changed: Any) -> dict[str, float]:
    """One draw as so many tasks and their concatenation; a shard's work takes as many seconds as its number."""
    parts: dict[str, Path] = {}
    for shard in range(shards):
        parts[f"parts_{shard}"] = part = to.with_name(f"{to.name}-{shard}")
        found = draw(place, part, section, number, shard=shard, shards=shards, **changed)
        parts[f"metrics_of_parts_{shard}"] = told = part.with_suffix(".json")
        told.write_text(json.dumps({**found, "seconds": float(shard)}))
    before = {"previous_rollouts": changed["previous_rollouts"]} if "previous_rollouts" in changed else {}
    return concatenation(section, rollouts=to, iteration=1, purpose="training", **parts, **before)


def rewards(rollouts: Path, to: Path, correct: Callable[[int], bool]) -> Path:
    """REWARDS of rollouts: which rows are correct."""
    ids = read_table(rollouts, ROLLOUTS)["rollout_id"].to_pylist()
    right = [correct(row) for row in range(len(ids))]
    columns = {"correct": right, "reward": [float(r) for r in right], "extracted": [""] * len(ids)}
    write_table(to, REWARDS, {"rollout_id": ids, "verdict": ["correct" if r else "wrong" for r in right], **columns})
    return to


@pytest.mark.parametrize("shards", [2, 3, 5, 7])
def test_as_many_tasks_as_you_like_make_the_same_table(place: Path, tmp_path: Path, shards: int) -> None:
    one = draw(place, tmp_path / "one", ALONE)
    several = sharded(place, tmp_path / "several", ALONE, shards)
    assert (tmp_path / "several").read_bytes() == (tmp_path / "one").read_bytes()
    spent = {"seconds": float(sum(range(shards))), "slowest_shard_seconds": float(shards - 1), "shards": float(shards)}
    assert several == one | spent
    sizes = [len(read_table(tmp_path / f"several-{n}", ROLLOUTS)) for n in range(shards)]
    assert max(sizes) - min(sizes) <= ALONE.samples  # the work is even
    if shards > ALONE.prompts:
        assert min(sizes) == 0


def test_batches_of_several_prompts_change_the_last_bits_of_logprobs_alone(place: Path, tmp_path: Path) -> None:
    draw(place, tmp_path / "one", TOGETHER)
    sharded(place, tmp_path / "several", TOGETHER, 2)
    one, several = (read_table(tmp_path / name, ROLLOUTS) for name in ("one", "several"))
    for name in set(ROLLOUTS.names) - {"rollout_logprobs"}:
        assert one[name].combine_chunks() == several[name].combine_chunks(), name
    logprobs = [ragged(table, "rollout_logprobs")[0] for table in (one, several)]
    np.testing.assert_allclose(*logprobs, rtol=0, atol=5e-6)


def test_a_later_draw_samples_as_long_as_groups_are_wanting(place: Path, tmp_path: Path) -> None:
    section = ALONE.model_copy(update={"draws": 2, "prompts": 4})
    first = tmp_path / "first"
    draw(place, first, section)
    graded = rewards(first, tmp_path / "graded", lambda row: row % 4 == 0 and row < 8)  # two prompts are informative
    before = {"previous_rollouts": first, "previous_rewards": graded}
    for wanted, groups in ((3, 8), (2, 4)):
        one = draw(place, tmp_path / f"one-{wanted}", section, 2, wanted_groups=wanted, **before)
        several = sharded(place, tmp_path / f"several-{wanted}", section, 3, 2, wanted_groups=wanted, **before)
        assert (tmp_path / f"several-{wanted}").read_bytes() == (tmp_path / f"one-{wanted}").read_bytes()
        assert several["prompts"] == one["prompts"] == groups
        assert {k: several[k] for k in one} == one


def test_a_table_of_other_samples_is_refused(place: Path, tmp_path: Path) -> None:
    draw(place, tmp_path / "part", ALONE)
    (tmp_path / "told").write_text('{"seconds": 1.0}')
    parts = {"parts_0": tmp_path / "part", "metrics_of_parts_0": tmp_path / "told"}
    with pytest.raises(UserError, match=r"part: 20 rows are no whole groups of rollout\.samples 3: sample it again"):
        concatenation(
            ALONE.model_copy(update={"samples": 3}), rollouts=tmp_path / "whole", iteration=1, purpose="", **parts
        )
    assert not (tmp_path / "whole").exists()


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BATCH_TOKENS", 1 << 13)
    (tmp_path / "told").write_text('{"seconds": 1.0}')
    length, samples = 64, 4

    def peak(prompts: int) -> int:
        rows = prompts * samples
        offsets = offsets_of([length] * rows)
        columns = {
            "rollout_id": [f"1/p{r // samples}/{r % samples}" for r in range(rows)],
            "prompt_id": [f"p{r // samples}" for r in range(rows)],
            "sample_index": np.tile(np.arange(samples, dtype=np.int32), prompts),
            "seed": np.arange(rows, dtype=np.uint64),
            "prompt_tokens": (np.zeros(rows * length, np.int32), offsets),
            "response_tokens": (np.zeros(rows * length, np.int32), offsets),
            "rollout_logprobs": (np.full(rows * length, -1.0, np.float32), offsets),
            "response": ["x" * length] * rows,
            "finish_reason": ["stop"] * rows,
        }
        write_table(tmp_path / "part", ROLLOUTS, columns)
        del columns
        section = Rollout(prompts=prompts, samples=samples, batch_size=4)
        parts = {f"parts_{n}": tmp_path / "part" for n in range(2)}
        told = {f"metrics_of_parts_{n}": tmp_path / "told" for n in range(2)}
        pool, before = pa.proxy_memory_pool(pa.system_memory_pool()), pa.default_memory_pool()
        pa.set_memory_pool(pool)
        try:
            found = concatenation(section, rollouts=tmp_path / "whole", iteration=1, purpose="", **parts, **told)
        finally:
            pa.set_memory_pool(before)
        assert found["tokens"] == 2 * rows * length
        most: int = pool.max_memory()
        return most

    assert 0 < peak(2000) < 1.25 * peak(500)
