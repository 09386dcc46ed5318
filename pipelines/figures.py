"""The metrics of a run on a cluster, as its stages leave them: from the records in its store, if that is in reach."""

from collections.abc import Callable
from typing import Any

from rich.console import Console

from pipelines.watching import Watch, iterations_table
from vapo.errors import UserError
from vapo.lineage.records import Records
from vapo.store.connection import connect
from vapo.store.notes import notes_at

QUICK = 1  # how often a request is tried again until we say that the store is not in reach


class Figures:
    """Says every metric once, in the words of a run on this machine; without the store it says that, and no more.

    What the cache served left its record with the run that did the work, and is not shown.
    """

    def __init__(self, store: str, run_id: str, console: Console) -> None:
        self.store, self.run_id, self.console = store, run_id, console
        self.rows: list[dict[str, Any]] = []  # as in HISTORY
        self.seen: set[str] = set()
        self.watch = Watch(console, {"ppo_update": 1}, run_id, live=False, on_metric=self.rows.append)
        self.reachable = self._told(lambda: connect(store, retries=QUICK).require()) is not None

    def look(self) -> None:
        """Say what is new."""
        if not self.reachable:
            return
        found = self._told(self._new)
        if found is None:
            self.reachable = False
            return
        for record in sorted(found.values(), key=lambda record: record.ended):
            self.watch.on_event(
                {
                    "vapo": "end",
                    "stage": record.stage,
                    "purpose": record.purpose,
                    "iteration": record.iteration,
                    "metrics": record.metrics,
                    "seconds": record.seconds,
                    "shards": record.parameters.get("shards", 1) != 1,
                }
            )
        self.seen |= found.keys()

    def table(self) -> None:
        """One line per iteration, at the end."""
        if self.rows:
            self.console.print(iterations_table(self.rows))

    def _new(self) -> dict[str, Any]:
        names = notes_at(f"{self.store.rstrip('/')}/records/runs/{self.run_id}").names()
        return Records(self.store).get(names - self.seen)

    def _told(self, look: Callable[[], Any]) -> Any:
        """What `look` returns, True instead of None; None if the store is not in reach, which is said."""
        try:
            found = look()
        except UserError as error:
            self.console.print(f"metrics are not shown: {error}", highlight=False, markup=False, soft_wrap=True)
            return None
        return True if found is None else found
