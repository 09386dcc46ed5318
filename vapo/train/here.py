"""A TrainJob as processes of this machine, through the kubeflow SDK's local-process backend: several nodes on a laptop.

The backend starts one process whatever the number of nodes, in a virtual environment without packages. What it starts
here is this module, with this process's own Python: it starts the nodes, each as a pod would be, with the variables
that the Trainer sets.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vapo.errors import UserError
from vapo.train import launch
from vapo.train.node import LEASE
from vapo.train.trainjob import COMPLETE, FAILED, GONE, Wanted, missing_sdk

STARTED = "VAPO_TRAINJOB"  # environment variable: what the backend's process turns into, as JSON
NOISE = ("Operating inside", "Looking in links:", "Processing ", "Installing collected", "Successfully installed", "[")


class Here:
    """TrainJobs of this process; they end with it, however it ends."""

    pause = 0.2

    def __init__(self, runtime: str) -> None:
        """Look the runtime up.

        Raises:
            UserError: no SDK, or a runtime that the backend has not.
        """
        try:
            from kubeflow.trainer import LocalProcessBackendConfig, TrainerClient
        except ModuleNotFoundError:
            raise missing_sdk() from None
        self.client = TrainerClient(LocalProcessBackendConfig())
        try:
            self.runtime = self.client.get_runtime(runtime)
        except ValueError:
            known = sorted(found.name for found in self.client.list_runtimes())
            raise UserError(
                f"train.runtime {runtime!r}: the backend 'process' has only {known}: use that, or backend 'kubernetes'"
            ) from None
        self.runtime.trainer.framework = "python"  # for torch it calls a torchrun that its environment does not have
        self.leases: dict[str, IO[str]] = {}

    def named(self, name: str) -> str:
        """With this process's number: such a job is nobody else's."""
        return f"{name}-{os.getpid()}"

    def start(self, wanted: Wanted) -> None:
        """Start the backend's process; the lease is locked before, and for as long as the job may live."""
        from kubeflow.trainer import CustomTrainer
        from kubeflow.trainer.options import Name

        lease = tempfile.NamedTemporaryFile("w", prefix=f"{wanted.name}-", suffix=".lease")  # noqa: SIM115
        fcntl.flock(lease, fcntl.LOCK_EX)
        self.leases[wanted.name] = lease
        command = [sys.executable, "-m", "vapo.train.here", str(wanted.nodes), *wanted.command]
        started = json.dumps({"command": command, "folder": str(Path.cwd())})
        environment = launch.environment({STARTED: started, LEASE: lease.name, "PYTHONUNBUFFERED": "1"})
        trainer = CustomTrainer(func=become, num_nodes=wanted.nodes, env=environment)
        self.client.train(runtime=self.runtime, trainer=trainer, options=[Name(wanted.name)])

    def found(self, name: str) -> bool:
        """Never: such jobs do not outlive the process that made them."""
        return False

    def state(self, name: str) -> str:
        """As the SDK says it, and GONE."""
        try:
            return str(self.client.get_job(name).status)
        except ValueError:
            return GONE

    def lines(self, name: str, ended: threading.Event) -> Iterator[str]:
        """What the nodes print, without the backend's own words about its virtual environment."""
        shown = 0
        while True:
            last = ended.is_set() or self.state(name) in (COMPLETE, FAILED)  # asked before the last look
            lines = list(self.client.get_job_logs(name))
            yield from (line for line in lines[shown:] if line and not line.startswith(NOISE))
            shown = len(lines)
            if last:
                return
            time.sleep(self.pause)

    def waits_for(self, name: str) -> str:
        """Nothing: processes start at once."""
        return ""

    def why_failed(self, name: str) -> str:
        """The last words of the job."""
        return " | ".join(list(self.client.get_job_logs(name))[-5:])

    def delete(self, name: str) -> None:
        """Unlock the lease, so that the nodes leave, and wait for that; then have the backend forget the job.

        The backend itself would end only the shell around them.
        """
        lease = self.leases.pop(name, None)
        if lease is None:
            return
        fcntl.flock(lease, fcntl.LOCK_UN)
        deadline = time.monotonic() + 20
        while self.state(name) not in (COMPLETE, FAILED, GONE) and time.monotonic() < deadline:
            time.sleep(0.05)
        if self.state(name) != GONE:
            self.client.delete_job(name)
        lease.close()
        for left in Path(tempfile.gettempdir()).glob(f"{name}*"):  # the virtual environment of a job that failed
            shutil.rmtree(left, ignore_errors=True)


def become() -> None:
    """Turn into the job. The SDK copies this function's source into a file of its own, so it stands alone."""
    import json
    import os

    started = json.loads(os.environ["VAPO_TRAINJOB"])
    os.chdir(started["folder"])
    os.execv(started["command"][0], started["command"])


def main(nodes: int, command: list[str]) -> int:
    """Run `command` once for each node and wait for all; returns the first exit code that is not 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"PET_NNODES": nodes, "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen(command, env=_environment({**common, "PET_NODE_RANK": number})) for number in range(nodes)
    ]
    return next((status for status in [process.wait() for process in running] if status), 0)


def _environment(more: dict[str, Any]) -> dict[str, str]:
    return {**os.environ, **{name: str(value) for name, value in more.items()}}


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
