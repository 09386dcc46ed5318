"""The stated throughputs and overheads of hardware.toml, with what a file of the user's states instead."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vapo.errors import UserError

FILE = Path(__file__).with_name("hardware.toml")


class Hardware(SimpleNamespace):
    """Sections of values, say `hardware.gpu.bandwidth`."""


def hardware(instead: Path | None = None) -> Hardware:
    """The assumptions.

    Args:
        instead: a TOML file of the same sections; a value may stand alone or as {value = ..., source = ...}.

    Raises:
        UserError: it cannot be read, or states what is not known.
    """
    stated = _values(tomllib.loads(FILE.read_text(encoding="utf-8")))
    if instead is not None:
        try:
            own = _values(tomllib.loads(instead.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(f"--hardware {instead}: cannot be read ({error}): give a TOML file") from None
        for section, values in own.items():
            for key, value in values.items():
                known = stated.get(section, {})
                if key not in known or not isinstance(value, type(known[key]) if key == "name" else int | float):
                    raise UserError(
                        f"--hardware {instead}: {section}.{key} = {value!r}: expected a number for one of "
                        f"{sorted(known) or sorted(stated)}"
                    )
                stated[section][key] = value
    return Hardware(**{section: SimpleNamespace(**values) for section, values in stated.items()})


def sources() -> dict[str, str]:
    """Where each value comes from, by its name, say {"gpu.bandwidth": "bytes/s of memory: ..."}."""
    document = tomllib.loads(FILE.read_text(encoding="utf-8"))
    return {f"{section}.{key}": entry["source"] for section, found in document.items() for key, entry in found.items()}


def _values(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if wrong := [section for section, found in document.items() if not isinstance(found, dict)]:
        raise ValueError(f"{wrong[0]} is no section")
    return {
        section: {key: entry["value"] if isinstance(entry, dict) else entry for key, entry in found.items()}
        for section, found in document.items()
    }
