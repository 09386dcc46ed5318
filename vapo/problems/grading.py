"""Graders: from a response's text and the ground truth to a verdict. They see the response alone, never the prompt."""

from __future__ import annotations

import re
from dataclasses import dataclass

# The answer must be what the response ends with: the last number anywhere would be easy to hit by chance.
# One way to match each space: with two adjacent runs of spaces, a long run would take quadratic time.
ANSWER = re.compile(r"(?:^|\s)answer(?:\s*:)?\s+(\S+)\s*$", re.IGNORECASE)
INTEGER = re.compile(r"[+-]?\d{1,4000}")
# unparseable: there is an answer and it cannot be read; time_out and error: grading it failed, which is counted.
WHYS = ("matched", "different", "no_answer", "truncated", "unparseable", "time_out", "error")


@dataclass(frozen=True)
class Verdict:
    """A graded response, say Verdict(True, "7", "matched")."""

    correct: bool
    extracted: str
    why: str  # one of WHYS; correct is the same as "matched"
    partial: float = 0.0  # what a wrong answer is worth, from 0 (reward_wrong) to 1 (reward_correct)


def answer_line(response: str, ground_truth: str, finish_reason: str) -> Verdict:
    """The response must end in "answer X"; X is compared as an integer when both are, as text otherwise.

    A response cut off at the token limit has no answer, whatever it ends in (terminal, no bootstrap).
    """
    if finish_reason == "length":
        return Verdict(False, "", "truncated")
    found = ANSWER.search(response)
    if not found:
        return Verdict(False, "", "no_answer")
    extracted = found.group(1)
    correct = _normal(extracted) == _normal(ground_truth)
    return Verdict(correct, extracted, "matched" if correct else "different")


def _normal(text: str) -> str | int:
    text = text.strip()
    return int(text) if INTEGER.fullmatch(text) else text
