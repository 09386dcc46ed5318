"""Run a training stage on several nodes: its inputs go into the store, a TrainJob runs it, its outputs come back.

The nodes share no disk with this process. What travels is the job (section, parameters) with its input files, and the
metrics with the output files; checkpoints go from the ranks straight into the store. The name of a TrainJob is made
from all that it depends on, so that a task which is tried again finds the job of its first attempt.
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vapo import __version__
from vapo.errors import UserError
from vapo.recipe import Train, TrainingSection
from vapo.store import sha256_of
from vapo.train.mailbox import BUCKETS, Mailbox
from vapo.train.node import JOB, WORD
from vapo.train.trainjob import COMPLETE, CREATED, FAILED, GONE, Cluster, TrainJobs, Wanted

UNANSWERED = 300.0  # seconds without an answer from the cluster after which a stage gives up
AFTERTHOUGHT = 3.0  # seconds after the first bad word in which other nodes may say a better one
LAST_LINES = 10.0  # seconds for the log to come to its end after the job did


def launch(
    stage: str,
    section: TrainingSection,
    inputs: Mapping[str, Path],
    outputs: Mapping[str, Path],
    parameters: Mapping[str, Any],
) -> dict[str, float | None]:
    """Run a training stage on `section.train.nodes` nodes and write its outputs; returns its metrics.

    Args:
        parameters: of the stage's function; `store` is the store that nodes and launcher meet in.

    Whatever ends it, the TrainJob is deleted, except where this process is killed outright: then the cluster deletes it
    with this process's pod, or the next attempt finds it.

    Raises:
        UserError: what a rank, or the cluster, says that the user can cure.
        RuntimeError: a rank, or the job, failed otherwise.
    """
    train = section.train
    store = parameters["store"]
    jobs = check(train, store)
    targets = {label: path.absolute() for label, path in outputs.items()}  # backend "process" changes the folder
    store = store if urlsplit(store).scheme else str(Path(store).absolute())
    document = {
        "stage": stage,
        "section": section.model_dump(mode="json"),
        "parameters": {**parameters, "store": store},
        "inputs": {label: sha256_of(path) for label, path in sorted(inputs.items())},
        "outputs": sorted(outputs),
        "vapo": __version__,
    }
    name = jobs.named(f"vapo-{stage.replace('_', '-')}-{_digest(document)[:12]}")
    mailbox = Mailbox(store, name)
    with _signals_as_exceptions():
        try:
            found = jobs.found(name)
            word = mailbox.get(WORD.format(number=0))
            if not found and (word is None or word["ended"] != "well"):
                _clear(mailbox)  # what an attempt left that ended badly
                mailbox.put(JOB, document, inputs)
                command = (_python(train), "-m", "vapo.train.node", store, name, str(train.ranks))
                jobs.start(_wanted(name, stage, train, command))
            elif found:
                _say(f"TrainJob {name} is under way: an attempt before this one made it")
            word = _follow(jobs, name, mailbox, train)
            mailbox.take(WORD.format(number=0), targets)
        finally:
            jobs.delete(name)
            _clear(mailbox)
    metrics: dict[str, float | None] = word["metrics"]
    return metrics


def check(train: Train, store: str) -> TrainJobs:
    """Where the recipe wants TrainJobs to run.

    Raises:
        UserError: it cannot be reached, or lacks what the recipe names, or cannot see the store.
    """
    if train.backend == "process":
        from vapo.train.here import Here

        return Here(train.runtime)
    if urlsplit(store).scheme not in BUCKETS:
        raise UserError(
            f"train.nodes {train.nodes}: the store {store!r} is a folder, and other nodes cannot see it: set "
            "runtime.store to s3://bucket/prefix or minio://bucket/prefix, or train.nodes to 1"
        )
    return Cluster(train.runtime, train.namespace)


def _python(train: Train) -> str:
    return sys.executable if train.backend == "process" else "python"


def _wanted(name: str, stage: str, train: Train, command: tuple[str, ...]) -> Wanted:
    return Wanted(
        name=name,
        stage=stage,
        nodes=train.nodes,
        command=command,
        image=train.image,
        resources=train.resources,
        secret=train.secret,
        queue=train.queue,
        time_limit=train.time_limit,
    )


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _follow(jobs: TrainJobs, name: str, mailbox: Mailbox, train: Train) -> dict[str, Any]:
    """Print node 0's log until the nodes left their words; returns node 0's.

    Raises:
        UserError, RuntimeError: see `launch`.
    """
    over = threading.Event()
    log = threading.Thread(target=_print_log, args=(jobs, name, over), daemon=True)
    log.start()
    begun = answered = read = time.monotonic()
    waited_for = ""
    while True:
        state = waits_for = ""
        try:
            state = jobs.state(name)
            waits_for = jobs.waits_for(name) if state == CREATED else ""
            answered = time.monotonic()
        except (RuntimeError, TimeoutError):
            if time.monotonic() - answered > UNANSWERED:
                raise
        try:
            words = _words(mailbox)
            read = time.monotonic()
        except UserError:
            if time.monotonic() - read > UNANSWERED:
                raise
            words = {}
        if _bad(words):
            time.sleep(AFTERTHOUGHT)
            raise _failure(_bad(_words(mailbox)))
        if 0 in words:
            over.set()
            log.join(LAST_LINES)
            return words[0]
        if state in (COMPLETE, FAILED, GONE):
            over.set()
            log.join(LAST_LINES)
            raise RuntimeError(_without_a_word(jobs, name, state))
        if waits_for and waits_for != waited_for:
            _say(f"TrainJob {name} waits: {waits_for}")
        waited_for = waits_for
        if waits_for and train.start_limit and time.monotonic() - begun > train.start_limit:
            raise UserError(
                f"TrainJob {name} did not start within train.start_limit {train.start_limit} s: {waits_for}: "
                "make room, ask for less in train.resources and train.nodes, or raise the limit"
            )
        time.sleep(jobs.pause)


def _words(mailbox: Mailbox) -> dict[int, dict[str, Any]]:
    """The last words of nodes that have come to an end, by the nodes' numbers."""
    found = {name: mailbox.get(name) for name in mailbox.names() if name != JOB}
    return {int(name.removeprefix(WORD.format(number=""))): word for name, word in found.items() if word is not None}


def _bad(words: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"node": number, **word} for number, word in words.items() if word["ended"] != "well"]


def _failure(words: list[dict[str, Any]]) -> Exception:
    """What the user can cure before anything else, otherwise what came first, its traceback on standard error.

    The other nodes only lost a peer.
    """
    first = min(words, key=lambda word: (not word["user"], word["time"]))
    if first["user"]:
        return UserError(first["message"])
    sys.stderr.write(first["traceback"])
    return RuntimeError(f"node {first['node']} failed: {first['message']}")


def _clear(mailbox: Mailbox) -> None:
    """Take the job's things out of the store; that they stay there is no reason to lose its result."""
    try:
        mailbox.clear()
    except UserError as error:
        _say(f"TrainJob {mailbox.job}: its inputs stay in the store: {error}")


def _without_a_word(jobs: TrainJobs, name: str, state: str) -> str:
    if state == GONE:
        return f"TrainJob {name} was deleted while it ran, not by this stage: run the stage again"
    return (
        f"TrainJob {name} ended ({state}) without a word of its nodes: {jobs.why_failed(name)}: if they were killed "
        "for want of memory, lower the stage's token_budget or raise train.resources, train.zero_stage or train.nodes"
    )


def _print_log(jobs: TrainJobs, name: str, over: threading.Event) -> None:
    for line in jobs.lines(name, over):
        _say(line)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """SIGTERM and SIGINT leave the block as an exception does, once; a second one cannot disturb the leaving."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        for other in watched:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    watched = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, leave) for number in watched}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
