"""What compiling takes and gives: KB of YAML and median seconds, merged for a cluster and unmerged for kfp.local."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import sys, time
from pipelines.compiling import compile_pipeline
from vapo.recipe import load_recipe
recipe = load_recipe(sys.argv[1], [f"iterations={sys.argv[2]}"])
begun = time.monotonic()
ir = compile_pipeline(recipe, share=sys.argv[3] == "merged")
print(len(ir.encode()), time.monotonic() - begun)
"""


def main(recipe: str = "vapo", repeats: int = 5) -> None:
    """Print a table; every compilation is in a process of its own, since sub-pipelines are remembered."""
    table = Table("iterations", "form", "KB", "compiling, median", "with start and imports", box=None)
    for iterations in (1, 20, 100):
        for form in ("unmerged", "merged"):
            found = [_once(recipe, iterations, form) for _ in range(repeats)]
            sizes, inside, whole = zip(*found, strict=True)
            assert len(set(sizes)) == 1, sizes
            medians = (f"{statistics.median(seconds):.2f} s" for seconds in (inside, whole))
            table.add_row(str(iterations), form, f"{sizes[0] / 1000:.0f}", *medians)
    Console(width=100).print(table)


def _once(recipe: str, iterations: int, form: str) -> tuple[int, float, float]:
    """Bytes, seconds of compiling, seconds of the process."""
    begun = time.monotonic()
    command = [sys.executable, "-c", PROGRAM, recipe, str(iterations), form]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    size, seconds = done.stdout.split()
    return int(size), float(seconds), time.monotonic() - begun


if __name__ == "__main__":
    main(*sys.argv[1:2])
