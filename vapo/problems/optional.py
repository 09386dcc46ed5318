"""Packages that only some problem sets need: imported when used, and missed with a cure."""

from __future__ import annotations

import importlib
from typing import Any

from vapo.errors import UserError


def need(package: str, setting: str) -> Any:
    """Import `package`, or a module of it, which `setting` of the recipe asks for.

    Raises:
        UserError: it is not installed.
    """
    name = package.partition(".")[0]
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UserError(f"{setting} needs the package {name!r}: pip install {name}") from None
