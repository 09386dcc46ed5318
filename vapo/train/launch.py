"""Start a training stage as several processes under torchrun, and bring its result or its one error back.

The stage's own process writes JOB.json, starts `torch.distributed.run` with one `vapo.train.rank` for each rank, and
waits. The ranks live as long as this process does: their standard input is a pipe that only this process holds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import vapo
from vapo.errors import UserError
from vapo.recipe import TrainingSection

JOB = "JOB.json"  # what every rank reads: the stage, its section, paths, parameters
RESULT = "RESULT.json"  # what rank 0 leaves beside it: the stage's metrics
ERROR = "ERROR-{rank}.json"  # what a rank that failed leaves there
KEEPER = "VAPO_RANKS_KEPT"  # environment variable: standard input breaks when whoever started the ranks is gone


def launch(
    stage: str,
    section: TrainingSection,
    inputs: Mapping[str, Path],
    outputs: Mapping[str, Path],
    parameters: Mapping[str, Any],
) -> dict[str, float | None]:
    """Run a training stage over `section.train.ranks` processes, on so many nodes; returns its metrics.

    A stage without a store, which writes no checkpoint, stays on one node: what it does is small. On several nodes no
    parts are kept: a stage whose nodes were lost begins anew.

    Raises:
        UserError: a rank met something the user can cure, in its words.
        RuntimeError: a rank failed otherwise, or was killed; its traceback is on standard error.
    """
    if section.train.nodes > 1 and "store" in parameters:
        from vapo.train import nodes

        alone = {name: path for name, path in inputs.items() if name != "partial"}  # a folder that no node sees
        return nodes.launch(stage, section, alone, outputs, parameters)
    with tempfile.TemporaryDirectory(prefix="vapo-ranks-") as scratch:
        job = write_job(Path(scratch), stage, section, {**inputs, **outputs}, parameters)
        run_ranks(command(section.train.ranks, job), job.parent, GLOO_SOCKET_IFNAME="lo")
        return read_result(job.parent)


def write_job(
    folder: Path,
    stage: str,
    section: TrainingSection,
    paths: Mapping[str, Path],
    parameters: Mapping[str, Any],
) -> Path:
    """Write JOB.json into `folder`; returns its path."""
    job = {
        "stage": stage,
        "section": section.model_dump(mode="json"),
        "paths": {name: str(Path(path).absolute()) for name, path in paths.items()},
        "parameters": dict(parameters),
    }
    path = folder / JOB
    path.write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")
    return path


def command(ranks: int, job: Path) -> list[str]:
    """torchrun for so many ranks on this machine; it speaks over loopback only."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    return [*torchrun, "--nproc-per-node", str(ranks), "-m", "vapo.train.rank", str(job)]


def read_result(folder: Path) -> dict[str, float | None]:
    """The metrics that rank 0 left."""
    result: dict[str, float | None] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return result


def raise_first_error(folder: Path, torchrun: str) -> NoReturn:
    """Raise what went wrong in a rank: what the user can cure before anything else, otherwise what came first.

    Args:
        torchrun: its own account, which alone knows of a rank that was killed.
    """
    errors = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(ERROR.format(rank="*")))]
    first = min(errors, key=lambda error: (not error["user"], error["time"]), default=None)
    if first and first["user"]:
        raise UserError(first["message"])
    if "SIGKILL" in torchrun:  # the other ranks' complaints come of it
        raise RuntimeError(
            "a rank was killed, perhaps for want of memory: lower the stage's token_budget, set train.offload to "
            "'cpu', or raise train.zero_stage or train.ranks"
        )
    sys.stderr.write(first["traceback"] if first else torchrun)
    raise RuntimeError(f"rank {first['rank']} failed: {first['message']}" if first else "a rank ended without a word")


def run_ranks(command: list[str], folder: Path, **variables: str) -> None:
    """Run the ranks to their end. What they print goes where this process prints; torchrun's own words are kept back.

    Args:
        variables: environment variables of the ranks beside this process's.

    Raises:
        UserError, RuntimeError: see `launch`.
    """
    with (folder / "torchrun.txt").open("w+", encoding="utf-8") as words:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=words, env=environment(variables))
        try:
            status = process.wait()
        finally:
            _end(process)
        if status:
            words.seek(0)
            raise_first_error(folder, words.read())


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Of the ranks: this source tree, and one thread for each unless threads are set."""
    root = str(Path(vapo.__file__).parent.parent)
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return {**os.environ, **own, **variables, KEEPER: "1"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Whatever happened here, nothing stays behind: the ranks see their standard input break."""
    assert process.stdin is not None
    process.stdin.close()
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
