"""Whether a response has the format that a regular expression describes; in a worker: some patterns take for ever."""

from __future__ import annotations

import re
from functools import lru_cache


def matches(pattern: str, response: str) -> bool:
    """Whether the pattern is found anywhere in the response; flags stand in the pattern, say (?s)."""
    return _compiled(pattern).search(response) is not None


@lru_cache(maxsize=8)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
