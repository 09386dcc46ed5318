"""One rank of a training stage: `python -m torch.distributed.run ... -m vapo.train.rank JOB.json`, on one node or many.

Every rank runs the stage's function with torch.distributed initialised; only rank 0 is heard and leaves RESULT.json.
Any rank that fails leaves ERROR-<rank>.json beside the job.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
import time
import traceback
from pathlib import Path

from vapo.train.launch import ERROR, KEEPER, RESULT


def main(job: Path) -> int:
    """Do this rank's part of the job; returns the process's exit code."""
    rank, agent = int(os.environ["RANK"]), os.getppid()
    os.dup2(1, 2)  # torchrun's own words go elsewhere
    if os.environ.get(KEEPER):
        threading.Thread(target=_leave_with_keeper, args=(agent,), daemon=True).start()
    if rank:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for as long as this process lives
    try:
        _run(job, rank)
    except BaseException as error:  # noqa: BLE001 - it is told in a file; this process is about to end
        from vapo.errors import as_user_error

        cure = as_user_error(error)
        last = traceback.format_exception_only(error)[-1].strip()
        told = {"rank": rank, "time": time.time(), "user": cure is not None, "message": str(cure or last)}
        path = job.parent / ERROR.format(rank=rank)
        path.write_text(json.dumps({**told, "traceback": traceback.format_exc()}) + "\n", encoding="utf-8")
        sys.stdout.flush()
        os._exit(1)  # not a word to the other ranks: they may wait in a collective, and torchrun ends them
    return 0


def _run(job: Path, rank: int) -> None:
    import importlib

    from vapo import recipe
    from vapo.stage import STAGES
    from vapo.train import ranks

    data = json.loads(job.read_text(encoding="utf-8"))
    stage = STAGES[data["stage"]]
    function = getattr(importlib.import_module(stage.module), stage.function)
    section = getattr(recipe, stage.section).model_validate(data["section"])
    paths = {name: Path(path) for name, path in data["paths"].items()}
    with ranks.joined():
        metrics = function(section, **paths, **data["parameters"])
    if rank == 0:
        (job.parent / RESULT).write_text(json.dumps(metrics) + "\n", encoding="utf-8")


def _leave_with_keeper(agent: int) -> None:
    """End this rank when whoever started it is gone: standard input breaks, or torchrun is no more its parent."""
    pipe = select.poll()
    pipe.register(0, 0)  # nothing but its breaking
    while not pipe.poll(500):
        if os.getppid() != agent:
            break
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
