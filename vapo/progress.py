"""The JSON lines that a stage prints: what it does, how far it is, what it measured, why it stopped.

One mechanism for a laptop and a cluster: `vapo run` reads them from the stage's standard output, a pod's log keeps
them. A line is {"vapo": EVENT, ...}; everything else on standard output is log.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from typing import Any

KEY = "vapo"
ATTENDED = "VAPO_ATTENDED"  # environment variable: a run on this machine reads what the stages print
PATIENCE = 30.0


def emit(event: str, **fields: Any) -> None:
    """Print one event and flush it."""
    sys.stdout.write(json.dumps({KEY: event, **fields}) + "\n")
    sys.stdout.flush()


def leave_with_reader() -> None:
    """From now on end this process when nobody reads its standard output any more: the run that started it is gone.

    It ends as by SIGTERM: a stage that has something elsewhere, such as a job on a cluster, takes that with it.
    """

    def watch() -> None:
        pipe = select.poll()
        pipe.register(1, 0)  # nothing but its breaking
        pipe.poll()
        end_this_process()

    threading.Thread(target=watch, daemon=True).start()


def end_this_process() -> None:
    """SIGTERM to itself; should something keep it from ending, it ends for all that after PATIENCE seconds."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os._exit(1)


def parse(line: str) -> dict[str, Any] | None:
    """The event that a line holds, or None."""
    line = line.strip()
    if not line.startswith('{"vapo"'):
        return None
    try:
        event = json.loads(line)
    except json.JSONDecodeError:
        return None
    return event if isinstance(event, dict) else None


class Progress:
    """Reports `done` of `total` at most five times a second, with the rate since the start."""

    def __init__(self, unit: str, total: int) -> None:
        self.unit, self.total = unit, total
        self.started = self.last = time.monotonic()
        self.work = 0

    def __call__(self, done: int, work: int = 0, work_unit: str = "tokens", **metrics: float | None) -> None:
        """Report `done` of the total, and that `work` more of `work_unit` (say tokens) were done."""
        self.work += work
        now = time.monotonic()
        if now - self.last < 0.2 and done < self.total:
            return
        self.last = now
        rate = self.work / max(now - self.started, 1e-9)
        emit(
            "progress",
            done=done,
            total=self.total,
            unit=self.unit,
            rate=round(rate, 1),
            rate_unit=f"{work_unit}/s",
            metrics={name: round(value, 5) for name, value in metrics.items() if value is not None},
        )
