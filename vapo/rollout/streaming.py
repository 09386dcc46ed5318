"""Responses on their way to disk: numbered parts that are there or not, and the table that is made from them.

Nothing here holds more than one batch of rows in memory: parts are memory-mapped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vapo.errors import UserError
from vapo.schemas import ROLLOUTS
from vapo.tables import ragged, read_table, table_writer, write_table

BATCH_TOKENS = 1 << 22  # tokens of prompts and responses in one record batch of a table
MAX_OPEN = 256  # parts that are mapped at a time: each costs a file descriptor
MAX_TOKENS = np.iinfo(np.int32).max  # readers join the record batches of a ragged column: its offsets are int32


class Parts:
    """The tables of one schema in a folder, by number: each is written beside and renamed, so it is whole if there."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.folder, self.schema = folder, schema
        self._open = lru_cache(maxsize=MAX_OPEN)(self._read)

    def __contains__(self, number: int) -> bool:
        """Whether the part is there; one that a broken disk spoilt is as good as not there."""
        try:
            self._read(number)
        except UserError:
            return False
        return True

    def add(self, number: int, columns: Mapping[str, Any]) -> None:
        """Write a part; columns as write_table takes them."""
        write_table(self._path(number), self.schema, columns)

    def rows(self, number: int, first: int, count: int) -> pa.Table:
        """A copy of some rows of a part: it keeps no file open."""
        return self._open(number).take(np.arange(first, first + count))

    def _read(self, number: int) -> pa.Table:
        return read_table(self._path(number), self.schema)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.arrow"


def write_groups(path: Path, groups: Iterable[pa.Table]) -> dict[str, float]:
    """Write ROLLOUTS from the rows of one prompt after the other; returns counts, lengths and the sampled entropy.

    Where a record batch ends depends on the rows alone, so the same rows give the same bytes.

    Raises:
        UserError: more tokens than a table's readers can take.
    """
    facts = Facts()
    with table_writer(path, ROLLOUTS) as write:
        batch: list[pa.Table] = []
        tokens = 0
        for group in groups:
            size = _tokens(group, "prompt_tokens") + _tokens(group, "response_tokens")
            if batch and tokens + size > BATCH_TOKENS:
                write(facts.seen(pa.concat_tables(batch).combine_chunks()))
                batch, tokens = [], 0
            batch.append(group)
            tokens += size
            facts.prompts += 1
        if batch:
            write(facts.seen(pa.concat_tables(batch).combine_chunks()))
    return facts.summary()


class Facts:
    """Counts, lengths and entropy of responses, batch after batch."""

    def __init__(self) -> None:
        self.prompts = self.responses = self.tokens = self.prompt_tokens = self.longest = self.truncated = 0
        self.entropy = 0.0  # summed over tokens

    def seen(self, batch: pa.Table) -> pa.Table:
        """Count a batch in; returns it."""
        logprobs, offsets = ragged(batch, "rollout_logprobs")
        lengths = np.diff(offsets)
        self.responses += len(batch)
        self.tokens += int(lengths.sum())
        self.prompt_tokens += _tokens(batch, "prompt_tokens")
        self.longest = max(self.longest, int(lengths.max()))
        self.truncated += pc.sum(pc.equal(batch["finish_reason"], "length")).as_py()
        self.entropy += float(-logprobs.mean()) * len(logprobs)
        if max(self.tokens, self.prompt_tokens) > MAX_TOKENS:
            raise UserError(f"more than {MAX_TOKENS} tokens in one table of rollouts: lower rollout.prompts or samples")
        return batch

    def summary(self) -> dict[str, float]:
        """The stage's metrics; of no responses there are only counts."""
        counts: dict[str, float] = {"prompts": self.prompts, "responses": self.responses, "tokens": self.tokens}
        if not self.responses:
            return counts
        return {
            **counts,
            "length_mean": self.tokens / self.responses,
            "length_max": self.longest,
            "truncated_share": self.truncated / self.responses,
            "sampled_entropy": self.entropy / self.tokens,
        }


def _tokens(table: pa.Table, column: str) -> int:
    return int(pc.sum(pc.list_value_length(table[column])).as_py())
