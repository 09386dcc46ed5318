"""The answer in a response: the last box, the last <answer> tag or the last "Answer:" line, never the last number."""

from __future__ import annotations

import re
from collections.abc import Sequence

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is a set's, and closes nothing
BARE = re.compile(r"\s*([^\s${}]+)")
# Each run of spaces is bounded: two unbounded ones side by side would take quadratic time.
LINE = re.compile(r"(?<![A-Za-z])answer[ \t*_]{0,8}[:：]", re.IGNORECASE)
OPENED, CLOSED = "<answer>", "</answer>"


def extract(response: str, places: Sequence[str]) -> str | None:
    """What the response gives as its answer, or None.

    The first of `places` that occurs at all decides. There the last occurrence counts, and if that one is empty or
    unterminated there is no answer: an earlier one would be a second try. Time is linear in the response's length.

    Args:
        response: the response alone, without its prompt.
        places: of "boxed", "tag" and "line", in order of precedence; none: the whole response is the answer.
    """
    if not places:
        return response.strip() or None
    for place in places:
        occurs, answer = _FINDERS[place](response)
        if occurs:
            return answer.strip() or None
    return None


def _boxed(response: str) -> tuple[bool, str]:
    r"""(whether there is a box, what the last one holds): \boxed{7}, \fbox{7} or \boxed 7."""
    end = _last_end(BOX, response)
    if end < 0:
        return False, ""
    start = end + len(response[end:]) - len(response[end:].lstrip())
    if response[start : start + 1] != "{":
        bare = BARE.match(response, end)
        return True, bare.group(1).rstrip(".,;:") if bare else ""
    depth = 0
    for brace in BRACE.finditer(response, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return True, response[start + 1 : brace.start()]
    return True, ""


def _tag(response: str) -> tuple[bool, str]:
    start = response.rfind(OPENED)
    if start < 0:
        return False, ""
    end = response.find(CLOSED, start)
    return True, response[start + len(OPENED) : end] if end >= 0 else ""


def _line(response: str) -> tuple[bool, str]:
    end = _last_end(LINE, response)
    return end >= 0, response[end:].partition("\n")[0].strip(" \t*_") if end >= 0 else ""


def _last_end(pattern: re.Pattern[str], response: str) -> int:
    """Where the last match ends; -1: there is none."""
    end = -1
    for found in pattern.finditer(response):
        end = found.end()
    return end


_FINDERS = {"boxed": _boxed, "tag": _tag, "line": _line}
