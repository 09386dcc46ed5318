"""What k graded samples say of each prompt: avg@k, pass@k by the unbiased estimator, cons@k by majority vote."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from math import comb
from statistics import fmean

import numpy as np

INTEGER = re.compile(r"[+-]?\d{1,4000}")  # Python converts at most 4300 digits


def avg_at_k(samples: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Share of correct samples of each prompt; all [P]. With another k its expected value is the same."""
    shares: np.ndarray = correct / samples
    return shares


def pass_at_k(samples: np.ndarray, correct: np.ndarray, k: int) -> np.ndarray:
    """Unbiased probability that one of k samples is correct, 1 - C(n - c, k) / C(n, k); all [P].

    Chen et al., arXiv 2107.03374, equation 1.
    """
    return np.array([1.0 - comb(int(n - c), k) / comb(int(n), k) for n, c in zip(samples, correct, strict=True)])


def cons_at_k(answers: Sequence[str], correct: Sequence[bool], k: int) -> float:
    """How often the majority of k samples of one prompt is correct, by its n >= k samples.

    The samples are cut into consecutive blocks of k, a shorter rest is left out, and the blocks' verdicts averaged:
    an unbiased estimate, since samples are exchangeable. cons@1 is avg@k, cons@n the one vote of all samples. It is
    our choice; the first k alone would waste the others, and all choices of k are too many to count.

    Args:
        answers: the answer of each sample [n] in `normal` form, "" where it has none.
        correct: its verdict [n].
    """
    starts = range(0, len(answers) - k + 1, k)
    return fmean(_credit(answers[a : a + k], correct[a : a + k]) for a in starts)


def leaders(answers: Sequence[str]) -> list[str]:
    """The answers that most samples have: several in a tie, none without an answer; "" has no vote."""
    votes = Counter(answer for answer in answers if answer)
    most = max(votes.values(), default=0)
    return [answer for answer, count in votes.items() if count == most]


def normal(answer: str) -> str:
    """The form in which equal answers are one text: single spaces, an integer without sign + and leading zeros.

    Answers that are equal by algebra only (1/2 and 0.5) vote apart: merging those that the grader calls correct would
    favour the truth, since wrong ones that are equal stay apart.
    """
    text = " ".join(answer.split())
    return str(int(text)) if INTEGER.fullmatch(text) else text


def _credit(answers: Sequence[str], correct: Sequence[bool]) -> float:
    """The share of leading answers that a sample graded correct has: a tie is broken by lot, no answer is wrong."""
    found = leaders(answers)
    right = {answer for answer, verdict in zip(answers, correct, strict=True) if verdict}
    return sum(answer in right for answer in found) / max(len(found), 1)
