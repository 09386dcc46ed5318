"""Problems from a JSONL file with `prompt` and `ground_truth`, split by a hash that ignores the order of lines."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from vapo.errors import UserError


@dataclass(frozen=True)
class Problem:
    """One row of a PROMPTS table."""

    prompt_id: str
    prompt: str
    ground_truth: str
    family: str
    difficulty: int


def identity(prompt: str) -> str:
    """A prompt's ID: 16 hex digits of its text's hash."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def read_problems(path: Path, key: str = "problems.path") -> list[Problem]:
    """All distinct problems of a JSONL file, in order; `key` is the setting that names the file.

    Raises:
        UserError: no such file, or a line without the two texts; names file, line and key.
    """
    if not path.is_file():
        raise UserError(f"{key} {str(path)!r}: no such file: give a JSONL file with prompt and ground_truth")
    found: dict[str, Problem] = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{key} {str(path)!r}: not UTF-8 ({error}): save it as UTF-8") from None
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also cut at U+2028 inside a text
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON ({error}): write one object per line") from None
        for name in ("prompt", "ground_truth"):
            if not isinstance(row, dict) or not isinstance(row.get(name), str) or not row[name].strip():
                raise UserError(f"{path}:{number}: key {name!r}: expected a text, found {_found(row, name)}")
        prompt_id = identity(row["prompt"])
        known = found.setdefault(
            prompt_id,
            Problem(prompt_id, row["prompt"], row["ground_truth"], str(row.get("family", "file")), 0),
        )
        if known.ground_truth != row["ground_truth"]:
            raise UserError(
                f"{path}:{number}: the same prompt has ground_truth {row['ground_truth']!r} here and "
                f"{known.ground_truth!r} above: keep one"
            )
    if not found:
        raise UserError(f"{key} {str(path)!r} holds no problem")
    return list(found.values())


def split(problems: list[Problem], heldout_share: float) -> tuple[list[Problem], list[Problem]]:
    """(training, held-out) by each prompt's hash: the same however the file is ordered."""
    limit = int(heldout_share * 2**32)
    heldout = [p for p in problems if int(p.prompt_id[:8], 16) < limit]
    train = [p for p in problems if int(p.prompt_id[:8], 16) >= limit]
    return train, heldout


def _found(row: object, key: str) -> str:
    if not isinstance(row, dict):
        return type(row).__name__
    return repr(row[key]) if key in row else f"none (keys {sorted(row)})"
