"""A warm worker: one process that has imported torch and transformers, and forks a child for every stage.

On a laptop each stage is a process of its own, and importing torch and transformers costs it about four seconds.
`vapo run` starts this worker once; a stage sends its job here and gets a child that starts with everything imported.
The child inherits nothing else: it seeds itself, and it dies with the process that asked. No thread runs and no
parallel region was entered in the parent, so forking is safe.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from vapo.progress import end_this_process

ADDRESS = "VAPO_WORKER"  # environment variable with the path of the worker's socket


def ready(address: str, patience: float = 60.0) -> bool:
    """Whether the worker takes jobs; waits up to `patience` seconds while it starts. False: do the job without it."""
    deadline = time.monotonic() + patience
    while not Path(address).exists() and starting(address).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return Path(address).exists()


def starting(address: str) -> Path:
    """The file that stands while a worker imports what it needs."""
    return Path(f"{address}.starting")


def submit(address: str, job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Have the worker do a job; its output goes to this process's standard output and error.

    Raises:
        RuntimeError: the stage failed; its traceback is on standard error.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(address)
        message = json.dumps(job).encode() + b"\n"
        socket.send_fds(connection, [message], [1, 2])
        answer = _read_line(connection)
    if not answer:
        raise RuntimeError(f"stage {job['stage']} failed; its traceback stands above")
    result: dict[str, dict[str, Any]] = json.loads(answer)
    return result


def main(address: str, parent: int) -> None:
    """Serve, and take the starting mark away however it ends."""
    try:
        serve(address, parent)
    finally:
        starting(address).unlink(missing_ok=True)


def preload() -> None:
    """Import all that stages need."""
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401
    from transformers.models.qwen2 import modeling_qwen2  # noqa: F401

    from vapo.stage import STAGES

    for stage in STAGES.values():
        if stage.module.startswith("vapo."):  # a run of this machine submits nothing
            importlib.import_module(stage.module)


def serve(address: str, parent: int) -> None:
    """Accept jobs on a Unix socket until the parent process is gone: it may be so before the imports are done."""
    preload()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the system
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        beside = f"{address}.new"
        server.bind(beside)
        server.listen()
        Path(beside).rename(address)  # appears only when it accepts
        starting(address).unlink(missing_ok=True)
        server.settimeout(1.0)
        while os.getppid() == parent:
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            if os.fork() == 0:
                server.close()
                _child(connection)
            connection.close()


def _child(connection: socket.socket) -> None:
    """Do one job with the asking process's standard output and error, answer, and leave."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        connection.setblocking(True)
        message, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 2)
        for source, target in zip(descriptors, (1, 2), strict=True):
            os.dup2(source, target)
        while not message.endswith(b"\n"):
            part = connection.recv(1 << 16)
            if not part:  # who asked is gone before the job was all here
                os._exit(1)
            message += part
        threading.Thread(target=_leave_with, args=(connection,), daemon=True).start()
        from vapo.stage import execute

        answer = json.dumps(execute(json.loads(message)))
        connection.sendall(answer.encode() + b"\n")
        status = 0
    except BaseException:  # noqa: BLE001 - the traceback is the answer; this process is about to end
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _leave_with(connection: socket.socket) -> None:
    """End this child, as by SIGTERM, when the process that asked is gone: its end of the socket closes."""
    if not connection.recv(1):
        end_this_process()


def _read_line(connection: socket.socket) -> bytes:
    """A whole line, or nothing if the other side went away before its end."""
    answer = b""
    while not answer.endswith(b"\n"):
        try:
            part = connection.recv(1 << 16)
        except ConnectionResetError:  # gone with our message unread
            part = b""
        if not part:
            return b""
        answer += part
    return answer


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
