"""One node of a TrainJob, `python -m vapo.train.node STORE JOB RANKS`: fetches the job, runs its ranks, leaves word.

The node's place among the others comes from the variables that the Trainer sets (PET_NNODES, PET_NODE_RANK, ...),
which torchrun reads for itself. Its last word is a parcel in the store, and whoever could leave one exits with 0:
only what could not be told is left to Kubernetes to try again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from vapo import recipe
from vapo.errors import UserError, as_user_error
from vapo.stage import STAGES
from vapo.store.cache import FOLDER as CACHE
from vapo.store.cache import LIMIT
from vapo.train import launch
from vapo.train.mailbox import Mailbox
from vapo.train.trainjob import SECRETS

JOB = "job"  # the parcel that the launcher leaves: the job, with its inputs
WORD = "node-{number}"  # the parcel that a node leaves: what became of its ranks; node 0's has the outputs
LEASE = "VAPO_NODE_LEASE"  # environment variable: a file; a node of this machine lives while another process locks it
PATIENCE = 1800  # seconds that nodes wait for one another: images are pulled, machines are started


def main(store: str, job: str, ranks: int) -> int:
    """Do this node's part; returns the process's exit code."""
    number = int(os.environ.get("PET_NODE_RANK", "0"))
    read_secrets(Path(SECRETS))
    if os.environ.get(LEASE):
        threading.Thread(target=_leave_with_lease, args=(Path(os.environ[LEASE]),), daemon=True).start()
    signal.signal(signal.SIGTERM, _leave)
    with tempfile.TemporaryDirectory(prefix="vapo-node-") as scratch:
        if CACHE not in os.environ:  # a checkpoint is fetched once, not by every rank, however large it is
            os.environ[CACHE] = str(Path(scratch) / "cache")
            os.environ.setdefault(LIMIT, str(shutil.disk_usage(scratch).free))
        mailbox = Mailbox(store, job)
        try:
            metrics, files = _work(mailbox, Path(scratch), ranks)
        except Exception as error:  # noqa: BLE001 - it is told in the store, and in the log
            traceback.print_exc()
            mailbox.put(WORD.format(number=number), _told(error, Path(scratch)))
        else:
            word = {"ended": "well", "metrics": metrics if number == 0 else {}}
            mailbox.put(WORD.format(number=number), word, files if number == 0 else {})
    return 0


def _work(mailbox: Mailbox, folder: Path, ranks: int) -> tuple[dict[str, float | None], dict[str, Path]]:
    """Fetch the job and run this node's ranks; returns metrics and outputs, both empty except where rank 0 is."""
    job = mailbox.get(JOB)
    if job is None:
        raise UserError(
            f"TrainJob {mailbox.job}: its job is not in store {mailbox.store}: is that the launcher's store?"
        )
    inputs = {label: folder / "inputs" / label for label in job["inputs"]}
    outputs = {label: folder / "outputs" / label for label in job["outputs"]}
    mailbox.take(JOB, inputs)
    (folder / "outputs").mkdir()
    section = getattr(recipe, STAGES[job["stage"]].section).model_validate(job["section"])
    path = launch.write_job(folder, job["stage"], section, {**inputs, **outputs}, job["parameters"])
    launch.run_ranks(command(ranks, path), folder)
    written = {label: path for label, path in outputs.items() if path.is_file()}
    return (launch.read_result(folder) if (folder / launch.RESULT).is_file() else {}), written


def _told(error: Exception, folder: Path) -> dict[str, Any]:
    """An error in a form that travels, with the traceback of the rank that was the first to fail, or else its own."""
    cure = as_user_error(error)
    last = "".join(traceback.format_exception_only(error)).strip()
    ranks = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(launch.ERROR.format(rank="*"))]
    first = min(
        ranks, key=lambda rank: rank["time"], default={"traceback": traceback.format_exc(), "time": time.time()}
    )
    told = {"time": first["time"], "user": cure is not None, "message": str(cure or last)}
    return {"ended": "badly", **told, "traceback": first["traceback"]}


def command(ranks: int, job: Path) -> list[str]:
    """torchrun for the ranks of this node; it finds the other nodes by the PET_ variables."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [*torchrun, "--rdzv-conf", f"timeout={PATIENCE}", "-m", "vapo.train.rank", str(job)]


def read_secrets(folder: Path) -> None:
    """Set a variable for every file of a mounted Secret, named like it, unless it is set already."""
    for path in sorted(folder.glob("[A-Za-z]*")) if folder.is_dir() else ():
        os.environ.setdefault(path.name, path.read_text(encoding="utf-8").strip())


def _leave(number: int, frame: object) -> None:
    """SIGTERM: an exception, so that the ranks are ended; no word is left, for nothing has come to its end."""
    raise SystemExit(128 + number)


def _leave_with_lease(path: Path) -> None:
    """End this node when nobody locks the file any more, or it is gone."""
    while _locked(path):
        time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)


def _locked(path: Path) -> bool:
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
