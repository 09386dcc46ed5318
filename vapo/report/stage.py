"""The report stage: opens what the page shows and writes it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from vapo import recipe as recipes
from vapo.report.page import report as write_page
from vapo.store import open_checkpoint, read_manifest


def report(section: recipes.Report, *, policy: Path, page: Path, recipe: str, **tables: Path) -> dict[str, float]:
    """Write the HTML page; `policy` lends its tokenizer."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = open_checkpoint(read_manifest(policy, "policy"), Path(scratch), lambda path: path == "tokenizer.json")
        return write_page(section, tokenizer=folder / "tokenizer.json", page=page, recipe=recipe, **tables)
