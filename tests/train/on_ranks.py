"""Run by torchrun in tests: many updates, one after the other, in the same processes, since starting them is slow.

`python -m torch.distributed.run ... tests/train/on_ranks.py JOB.json`: a list of calls of stage functions, each with
its section, paths and parameters. Rank 0 leaves each call's metrics in `<name>.json` beside the job.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from vapo import recipe
from vapo.stage import STAGES
from vapo.train import ranks


def main(job: Path) -> None:
    import importlib

    calls: list[dict[str, Any]] = json.loads(job.read_text())
    with ranks.joined():
        for call in calls:
            stage = STAGES[call["stage"]]
            function = getattr(importlib.import_module(stage.module), stage.function)
            section = getattr(recipe, stage.section).model_validate(call["section"])
            paths = {name: Path(path) for name, path in call["paths"].items()}
            begun = time.monotonic()
            found = function(section, **paths, **call["parameters"])
            if ranks.rank() == 0:
                (job.parent / f"{call['name']}.json").write_text(json.dumps(found))
                print(f"{call['name']}: {time.monotonic() - begun:.2f} s", flush=True)


if __name__ == "__main__":
    if int(os.environ["RANK"]):
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    main(Path(sys.argv[1]))
