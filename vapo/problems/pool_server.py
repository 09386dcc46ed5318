"""The process that owns the grading workers: it forks them, feeds them, kills what exceeds its limits, replaces it.

It has one thread and looks at no answer: lines of JSON come in on standard input and go out on standard output, the
libraries are imported once and every fork has them. It ends, and its workers with it, when its input closes.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import selectors
import signal
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from vapo.errors import UserError
from vapo.problems import limits

CHUNK = 16  # jobs per round trip at most ...
CHUNK_BYTES = 1 << 16  # ... and about so many bytes
AHEAD = 4  # chunks per worker that are read ahead of the work
STARTING = 60.0  # seconds for what a worker does before its first job
SPENT = 0.5  # of its memory: a worker that holds more than this after a job makes room for a fresh one
READY = -1


@dataclass
class Worker:
    """One forked worker, and the jobs it was sent that it has not answered."""

    pid: int
    to: int
    back: int
    deadline: float
    jobs: deque[list[Any]] = field(default_factory=deque)
    buffer: bytes = b""
    ready: bool = False
    leaving: bool = False


@dataclass
class Server:
    """The workers, the jobs that wait, and what all of them are limited to."""

    setup: list[list[Any]]
    cpu: float
    wall: float
    memory: int
    selector: selectors.DefaultSelector = field(default_factory=selectors.DefaultSelector)
    waiting: deque[list[Any]] = field(default_factory=deque)
    workers: list[Worker] = field(default_factory=list)

    def start(self) -> None:
        """Fork a worker."""
        job_reader, job_writer = os.pipe()
        answer_reader, answer_writer = os.pipe()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            for other in self.workers:
                os.close(other.to)
                os.close(other.back)
            os.close(job_writer)
            os.close(answer_reader)
            _work(job_reader, answer_writer, parent, self.setup, self.cpu, self.memory)
        os.close(job_reader)
        os.close(answer_writer)
        worker = Worker(pid, job_writer, answer_reader, time.monotonic() + STARTING)
        self.workers.append(worker)
        self.selector.register(answer_reader, selectors.EVENT_READ, worker)

    def feed(self) -> None:
        """A chunk of jobs to every worker that has none. It is waiting to read, so that a pipe never stays full."""
        for worker in self.workers:
            if not worker.ready or worker.jobs or worker.leaving or not self.waiting:
                continue
            size = 0
            # A fair share, so that the last jobs are not all one worker's.
            share = max(1, min(CHUNK, len(self.waiting) // (2 * len(self.workers))))
            while self.waiting and len(worker.jobs) < share and size < CHUNK_BYTES:
                worker.jobs.append(self.waiting.popleft())
                size += sum(len(a) for a in worker.jobs[-1][2] if isinstance(a, str))
            worker.deadline = time.monotonic() + self.wall
            with suppress(BrokenPipeError):  # it died: its end of the other pipe says so
                _write(worker.to, worker.jobs)

    def read(self, worker: Worker) -> None:
        """Pass a worker's answers on; at the end of its output, replace it."""
        data = os.read(worker.back, 1 << 16)
        if not data:
            self.replace(worker)
            return
        worker.buffer += data
        *lines, worker.buffer = worker.buffer.split(b"\n")
        for line in lines:
            answer = json.loads(line)
            if answer["id"] == READY:
                if answer.get("refused"):
                    _out({"refused": answer["refused"]})
                    sys.exit(1)
                worker.ready = True
            else:
                worker.jobs.popleft()
                worker.leaving = answer.pop("leaving", False)
                _out(answer)
            worker.deadline = time.monotonic() + self.wall

    def replace(self, worker: Worker, late: bool = False) -> None:
        """Bury a worker and fork another; the job it died of is answered, the ones behind it wait again."""
        with suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)
        _, status = os.waitpid(worker.pid, 0)
        self.selector.unregister(worker.back)
        os.close(worker.back)
        os.close(worker.to)
        self.workers.remove(worker)
        ended = os.waitstatus_to_exitcode(status)
        if not worker.ready:
            _out({"refused": f"a grading worker ended before its first answer (status {ended}, late: {late})"})
            sys.exit(1)
        if worker.jobs and not worker.leaving:
            job = worker.jobs.popleft()
            if late or ended in (-signal.SIGPROF, -signal.SIGXCPU):
                _out({"id": job[0], "failure": "time_out", "detail": "the clock" if late else "CPU time"})
            else:
                _out({"id": job[0], "failure": "error", "detail": f"the worker died, status {ended}"})
        self.waiting.extendleft(reversed(worker.jobs))
        self.start()

    def run(self, count: int) -> None:
        """Until standard input closes."""
        os.set_blocking(0, False)
        self.selector.register(0, selectors.EVENT_READ, None)
        hungry, rest = True, b""
        for _ in range(count):
            self.start()
        while True:
            if hungry != (len(self.waiting) < AHEAD * CHUNK * count):
                hungry = not hungry
                self.selector.register(0, selectors.EVENT_READ) if hungry else self.selector.unregister(0)
            self.feed()
            busy = [w for w in self.workers if w.jobs or not w.ready]
            patience = min((w.deadline for w in busy), default=None)
            for key, _ in self.selector.select(patience and max(0.0, patience - time.monotonic())):
                if key.data is not None:
                    self.read(key.data)
                    continue
                data = os.read(0, 1 << 20)
                if not data:
                    return
                *lines, rest = (rest + data).split(b"\n") if b"\n" in data else (rest + data,)
                self.waiting.extend(json.loads(line) for line in lines)
            now = time.monotonic()
            for worker in [w for w in self.workers if (w.jobs or not w.ready) and w.deadline <= now]:
                self.replace(worker, late=True)


def main() -> None:
    """Read what to prepare and how to limit from the first line, then serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches who started us, whose end closes our input
    first = b""
    while not first.endswith(b"\n"):  # not a byte more: what follows is read without a buffer
        byte = os.read(0, 1)
        if not byte:
            return
        first += byte
    spec = json.loads(first)
    for task, arguments in spec["prepare"]:
        _function(task)(*arguments)
    gc.freeze()  # what is shared with the forks stays shared
    server = Server(spec["setup"], spec["cpu"], spec["wall"], spec["memory"])
    try:
        server.run(spec["workers"])
    except BrokenPipeError:  # who started us reads no more: it is closing us, or gone
        return
    finally:
        for worker in server.workers:
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
            os.waitpid(worker.pid, 0)


def _work(jobs: int, answers: int, parent: int, setup: list[list[Any]], cpu: float, memory: int) -> None:
    """A worker's life; never returns."""
    try:
        limits.die_with(parent)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        refused = ""
        try:
            for task, arguments in setup:
                _function(task)(*arguments)
        except UserError as error:
            refused = str(error)
        limits.restrict(memory)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        _write(answers, {"id": READY, "refused": refused})
        start = limits.resident()
        with os.fdopen(jobs, "rb") as lines:
            for line in lines:
                for number, task, arguments in json.loads(line):
                    answer = _do(number, task, arguments, cpu)
                    leaving = answer.get("detail") == "MemoryError" or limits.resident() - start > SPENT * memory
                    _write(answers, {**answer, **({"leaving": True} if leaving else {})})
                    if leaving:
                        os._exit(0)
    finally:
        os._exit(1)


def _do(number: int, task: str, arguments: list[Any], cpu: float) -> dict[str, Any]:
    """One job within its CPU time: the kernel kills this process beyond it, also inside a C function."""
    random.seed(0)  # what a job finds must not depend on the jobs before it
    signal.setitimer(signal.ITIMER_PROF, cpu)
    try:
        return {"id": number, "value": _function(task)(*arguments)}
    except MemoryError:
        return {"id": number, "failure": "error", "detail": "MemoryError"}
    except BaseException as error:  # noqa: BLE001 - SystemExit and math-verify's TimeoutException are among them
        return {"id": number, "failure": "error", "detail": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _function(task: str) -> Any:
    module, name = task.split(":")
    if not module.startswith("vapo.problems."):
        raise ValueError(f"task {task!r}: only functions of vapo.problems run in a worker")
    return getattr(importlib.import_module(module), name)


def _write(descriptor: int, message: Any) -> None:
    data = json.dumps(list(message) if isinstance(message, deque) else message).encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]


def _out(message: dict[str, Any]) -> None:
    _write(1, message)


if __name__ == "__main__":
    main()
