"""Rows of a data set on the Hugging Face hub, streamed by the package `datasets`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from vapo import recipe
from vapo.errors import UserError
from vapo.problems.optional import need
from vapo.problems.rows import Row

Load = Callable[..., Iterable[Mapping[str, Any]]]  # datasets.load_dataset


def read_hub(section: recipe.Problems, name: str, split: str, key: str, load: Load | None = None) -> Iterator[Row]:
    """All rows of a split of the data set `name`, say "BytedTsinghua-SIA/DAPO-Math-17k", "@commit" behind it or not.

    Raises:
        UserError: the package is missing, or there is no such data set, subset, split or connection.
    """
    path, _, revision = name.partition("@")
    where = f"{key} {name!r}, split {split!r}"
    load = load or need("datasets", "problems.source 'hub'").load_dataset
    try:
        found = load(path, section.hub_subset or None, split=split, revision=revision or None, streaming=True)
        for number, values in enumerate(found, start=1):
            yield Row(f"{name} {split}: row {number}", values.keys(), values)
    except (OSError, ValueError) as error:  # ConnectionError, and FileNotFoundError for a data set that is not there
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{where}: cannot be read from the hub ({reason}): check name, subset, split and connection"
        ) from None
