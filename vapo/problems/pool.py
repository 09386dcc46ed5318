"""Grading workers from the stage's side: jobs go in, outcomes come back in the same order, whatever the jobs do.

The workers are another process's children (vapo.problems.pool_server), so that nothing is forked from a stage that
has threads. What is guaranteed: a job ends within its limits, an answer that ends its worker is never tried again, no
process outlives this one, and outcomes do not depend on how many workers there are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

CLOCK = 4.0  # the clock may run so many times the CPU time: other processes want the cores too
QUIET = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # no thread before a fork


class Job(NamedTuple):
    """A function of vapo.problems, "package.module:function", and its JSON arguments."""

    task: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a job returned, or how it failed: "time_out" or "error", and in words."""

    value: Any = None
    failure: str = ""
    detail: str = ""


class PoolRefused(RuntimeError):
    """The workers could not start; the message says why."""


class Pool:
    """Killable workers; use it in a `with` block.

    Args:
        workers: how many; 0: one per core.
        cpu: CPU seconds per job.
        memory: bytes per worker beyond what it starts with.
        prepare: jobs done once, before workers are forked: imports and tables. They are trusted.
        setup: jobs that every worker does first, without limits: loading a user's function.
    """

    def __init__(
        self, *, workers: int, cpu: float, memory: int, prepare: Sequence[Job] = (), setup: Sequence[Job] = ()
    ) -> None:
        self.count = workers or cores()
        path = os.pathsep.join(place or str(Path.cwd()) for place in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vapo.problems.pool_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # The order of sets must not differ from run to run: sympy's results can depend on it.
            env={**os.environ, **QUIET, "PYTHONPATH": path, "PYTHONHASHSEED": "0"},
        )
        spec = {
            "workers": self.count,
            "cpu": cpu,
            "wall": CLOCK * cpu,
            "memory": memory,
            "prepare": list(prepare),
            "setup": list(setup),
        }
        self._send(json.dumps(spec).encode() + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def map(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """The outcome of every job, in order, as they come.

        Raises:
            PoolRefused: the workers could not start.
        """
        threading.Thread(target=self._feed, args=(jobs,), daemon=True).start()
        early: dict[int, Outcome] = {}
        assert self.process.stdout is not None
        for wanted in range(len(jobs)):
            while wanted not in early:
                line = self.process.stdout.readline()
                if not line:
                    raise PoolRefused(f"the grading workers' process ended (status {self.process.wait()})")
                answer = json.loads(line)
                if "refused" in answer:
                    raise PoolRefused(answer["refused"])
                number = answer.pop("id")
                early[number] = Outcome(**answer)
            yield early.pop(wanted)

    def close(self) -> None:
        """End the workers; closing their input is enough, a kill is for one that does not notice."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdout.close()
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _feed(self, jobs: Sequence[Job]) -> None:
        lines: list[bytes] = []
        for number, job in enumerate(jobs):
            lines.append(json.dumps([number, *job]).encode())
            if len(lines) == 256 or number + 1 == len(jobs):
                self._send(b"\n".join(lines) + b"\n")
                lines = []

    def _send(self, data: bytes) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(data)
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):  # it ended, or was closed: reading from it says so
            return


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
