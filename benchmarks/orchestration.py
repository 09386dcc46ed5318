"""What a task costs besides its own work: the tiny recipe through `vapo run`, with the warm worker and without."""

import io
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipelines.local import run
from pipelines.workdir import Workdir
from vapo.recipe import load_recipe
from vapo.stage import STAGES


def main() -> None:
    """Print the median and worst orchestration of tasks with and without torch, in seconds per task."""
    table = Table("stages", "worker", "tasks", "median", "worst", "limit", box=None)
    for warm in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            tasks = run(load_recipe("tiny"), Workdir(Path(folder)), Console(file=io.StringIO()), warm=warm).tasks
        for torch, limit in ((True, 4.0), (False, 0.5)):
            found = [t.overhead for t in tasks if STAGES[t.stage].torch == torch]
            table.add_row(
                "with torch" if torch else "without torch",
                "warm" if warm else "cold",
                str(len(found)),
                f"{statistics.median(found):.2f} s",
                f"{max(found):.2f} s",
                f"{limit:.1f} s",
            )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
