"""Records where everybody finds them: in a store, by their digest, and by the run that left them.

On a cluster a task's folder vanishes with its pod, and only output artifacts are kept; so every stage writes its record
to VAPO_RECORDS too: STORE/records/DIGEST.json, and for each run STORE/records/runs/RUN/DIGEST.json, which names it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from vapo.errors import UserError
from vapo.lineage.record import Record, as_text, digest_of, parse_record
from vapo.recipe import Recipe
from vapo.store.connection import NAMES
from vapo.store.notes import notes_at

STORE = "VAPO_RECORDS"  # environment variable: a store's URI, as runtime.store; without it records are not kept
AT_ONCE = 16  # requests to a bucket


class Records:
    """The records in one store."""

    def __init__(self, store: str) -> None:
        """`store` as runtime.store: a folder, or s3://bucket/prefix."""
        self.store = store.rstrip("/")
        self.notes = notes_at(f"{self.store}/records")

    def add(self, record: Record) -> None:
        """Keep a record.

        Raises:
            UserError: the store does not take it, tried again and again: without it nobody could say where what the
                stage made comes from.
        """
        text = as_text(record)
        digest = digest_of(text)
        try:
            self.notes.write(digest, text)
            if record.run:
                mark = {"stage": record.stage, "iteration": record.iteration, "purpose": record.purpose}
                notes_at(f"{self.store}/records/runs/{record.run}").write(digest, json.dumps(mark) + "\n")
        except OSError as error:
            raise UserError(f"{STORE}={self.store}: cannot keep the stage's record there ({error})") from None

    def get(self, digests: Iterable[str]) -> dict[str, Record]:
        """Those records that are here and are what their names say, by digest."""
        wanted = list(digests)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            texts = pool.map(self.notes.read, wanted)
            return {
                digest: parse_record(text, f"{self.store}/records/{digest}.json")
                for digest, text in zip(wanted, texts, strict=True)
                if text is not None and digest_of(text) == digest
            }

    def runs(self) -> set[str]:
        """The runs that left records."""
        return notes_at(f"{self.store}/records/runs").folders()

    def of_run(self, run: str) -> dict[str, Record]:
        """The records that a run left: not those of tasks that the cache served.

        Raises:
            UserError: it left none; says which runs did.
        """
        digests = notes_at(f"{self.store}/records/runs/{run}").names()
        if not digests:
            known = sorted(self.runs())
            raise UserError(
                f"no record of run {run!r} in {self.store}: there are {known}; a run that the cache served whole left "
                "none: name the run that did the work, or the sha256 of an artifact"
            )
        return self.get(digests)

    def all(self) -> dict[str, Record]:
        """Every record."""
        return self.get(self.notes.names())

    def led_to(self, found: Mapping[str, Record]) -> dict[str, Record]:
        """These records and all that led to them, whichever runs left them."""
        known = dict(found)
        wanted = _parents(found)
        while wanted := wanted - known.keys():
            more = self.get(wanted)
            known |= more
            wanted = _parents(more)
        return known


def records_env(recipe: Recipe) -> dict[str, str]:
    """What a stage's environment must hold on a cluster: records go where the checkpoints go, if that is a bucket."""
    store = recipe.runtime.store
    return {STORE: store} if urlsplit(store).scheme in NAMES else {}


def kept() -> Records | None:
    """The store that the environment names."""
    store = os.environ.get(STORE)
    return Records(store) if store else None


def _parents(records: Mapping[str, Record]) -> set[str]:
    def each() -> Iterator[str]:
        for record in records.values():
            yield from (source.record for source in record.inputs.values() if source.record)

    return set(each())
