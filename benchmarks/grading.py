"""Answers graded per second: ours on integers and on expressions, against calling math-verify in a loop, in one run.

Rates per core are per CPU second of all processes that work, so that what else runs on the machine does not count.
"""

import logging
import os
import random
import resource
import sys
import time
from collections.abc import Callable

from math_verify import parse, verify
from rich.console import Console
from rich.table import Table

from vapo.problems.graders import Row, grade
from vapo.recipe import Verification

SAMPLES = 16  # responses to a prompt, as in training
INTEGERS, EXPRESSIONS, IN_A_LOOP = 80_000, 4_000, 600
INTEGER_LIMIT, SYMBOLIC_LIMIT = 20_000, 300  # answers per second; the second per core
THINKING = "First we note that 12 + 30 = 42, and so on. " * 40  # about 1,800 characters before the answer


def main() -> int:
    """Print the table; 1 if a limit is missed or verdicts differ from math-verify's."""
    logging.disable(logging.ERROR)  # math-verify warns about time-outs that it was told to leave off
    cores = len(os.sched_getaffinity(0))
    console = Console(width=120)
    table = Table("answers", box=None)
    for name in ("per second", "per second and core", "limit", "math-verify", "ratio", "other verdicts"):
        table.add_column(name, justify="right")
    missed = False
    for name, rows, limit in (
        ("integers", make(INTEGERS, integer, wrong_in=3), INTEGER_LIMIT),
        (f"expressions, {SAMPLES} per prompt", make(EXPRESSIONS, expression, wrong_in=3), SYMBOLIC_LIMIT),
        ("expressions, more of them wrong", make(EXPRESSIONS, expression, wrong_in=1), SYMBOLIC_LIMIT),
    ):
        start, spent = time.perf_counter(), cpu()
        verdicts = grade(Verification(grader="math"), rows, {r.truth: r.truth for r in rows}, lambda done: None)[0]
        ours, per_core = (len(rows) / t for t in (time.perf_counter() - start, cpu() - spent))
        some = random.Random(1).sample(range(len(rows)), IN_A_LOOP)
        spent = cpu()
        theirs = [loop(rows[i]) for i in some]
        rate = len(some) / (cpu() - spent)
        differing = sum(verdicts[i].correct != found for i, found in zip(some, theirs, strict=True))
        missed |= per_core < limit or differing > 0
        table.add_row(
            name,
            f"{ours:,.0f}",
            f"{per_core:,.0f}",
            f"{limit:,}",
            f"{rate:,.0f}",
            f"{per_core / rate:,.1f}",
            f"{differing} of {len(some)}",
        )
    console.print(
        f"{cores} cores; starting the workers is counted. math-verify: in a loop, the same responses and truths."
    )
    console.print(table)
    return int(missed)


def cpu() -> float:
    """CPU seconds of this process and of those that it started and that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def make(count: int, draw: Callable[[random.Random], tuple[str, str, str]], wrong_in: int) -> list[Row]:
    """Responses of `SAMPLES` to a prompt; of the wrong ones every `wrong_in`-th is another answer."""
    generator = random.Random(0)
    rows = []
    for _ in range(count // SAMPLES):
        truth, right, _ = draw(generator)
        for sample in range(SAMPLES):
            wrong = draw(generator)[2] if sample % wrong_in == 0 else right
            rows.append(Row(f"{THINKING}\\boxed{{{right if sample % 2 else wrong}}}", truth, "stop"))
    return rows


def integer(generator: random.Random) -> tuple[str, str, str]:
    """(truth, the same written otherwise, another)."""
    n = generator.randrange(10_000)
    return str(n), generator.choice([f"{n}", f"0{n}", f"{n:,}", f"{n}.0", f"${n}$", f"{n}^\\circ"]), str(n + 1)


def expression(generator: random.Random) -> tuple[str, str, str]:
    """(truth, the same written otherwise, another)."""
    a, b, c = (generator.randrange(2, 1000) for _ in range(3))
    return generator.choice(
        [
            (f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{b}}}\\cdot {a}", f"{a}\\sqrt{{{b + c}}}"),
            (f"\\frac{{{a}\\pi}}{{{b}}}", f"\\frac{{{a}}}{{{b}}}\\pi", f"\\frac{{{c}\\pi}}{{{a + b}}}"),
            (f"{a}x+{b}", f"{b}+{a}x", f"{c}x-{b}"),
            (f"({a},{a + b})", f"\\left({a}, {a + b}\\right)", f"({a},{a + b + c})"),
            (f"\\{{{a},{a + b}\\}}", f"\\{{{a + b},{a}\\}}", f"\\{{{a},{a + b + c}\\}}"),
        ]
    )


def loop(row: Row) -> bool:
    """What one calls without us: extraction, both parses and the comparison, in this process, without time-outs."""
    truth = parse(f"${row.truth}$", parsing_timeout=None)
    return verify(truth, parse(row.response, parsing_timeout=None), timeout_seconds=None)


if __name__ == "__main__":
    sys.exit(main())
