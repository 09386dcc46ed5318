"""Whether ground truths are what the recipe says: known when the data is read, not after the first rollouts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vapo import recipe
from vapo.problems.graders import check_ground_truth, plain_truth
from vapo.problems.numbers import number
from vapo.problems.optional import need
from vapo.problems.pool import Job, Pool

INTEGER = re.compile(r"\s*[+-]?[0-9]+\s*")


def complaints(kind: str, truths: Sequence[str]) -> list[str]:
    """What is wrong with each ground truth as problems.ground_truths `kind`; "" where nothing is.

    Raises:
        UserError: kind is "math", one is no number, and math-verify is not installed.
    """
    if kind == "integer":
        return ["" if INTEGER.fullmatch(truth) else "is no integer" for truth in truths]
    return _unreadable(truths) if kind == "math" else [""] * len(truths)


def _unreadable(truths: Sequence[str]) -> list[str]:
    """What the grader `math` cannot read; whatever is no number is tried in a worker, for it is foreign text."""
    found = {truth: check_ground_truth("math", truth) or "" for truth in truths}
    texts = {truth: plain_truth(truth) for truth, complaint in found.items() if not complaint}
    doubtful = [truth for truth, text in texts.items() if number(text) is None]
    if doubtful:
        need("math_verify", "problems.ground_truths 'math'")
        limits = recipe.Verification()
        with Pool(
            workers=limits.workers,
            cpu=limits.time_limit,
            memory=limits.memory_limit << 20,
            prepare=[Job("vapo.problems.symbolic:prepare")],
        ) as pool:
            jobs = [Job("vapo.problems.symbolic:check", (texts[truth],)) for truth in doubtful]
            for truth, outcome in zip(doubtful, pool.map(jobs), strict=True):
                found[truth] = outcome.value or (outcome.failure and f"ends in {outcome.failure}")
    return [found[truth] for truth in truths]
