"""What a person sees of a run, from the events that its stages print."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipelines.watching import Watch


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


def watch(screen: io.StringIO) -> Watch:
    console = Console(file=screen, width=160)
    return Watch(console, {"problems": 1}, "run", live=False, on_metric=lambda row: None)


def test_rows_left_out_are_listed(screen: io.StringIO) -> None:
    """As they are, though a row may look like rich's own markup."""
    row = "p.jsonl:2: column 'ground_truth': expected a text, found [red]"
    watch(screen).on_event({"vapo": "bad_row", "row": row})
    assert screen.getvalue() == f"left out: {row}\n"


def test_counts_are_shown_whole(screen: io.StringIO) -> None:
    """1,791,700 rows of 17,917 prompts, not 1.792e+06; a share keeps four digits."""
    metrics = {"rows": 1791700.0, "distinct_prompts": 17917.0, "share": 0.123456}
    event = {"vapo": "end", "stage": "problems", "purpose": "", "iteration": 0, "seconds": 2.0, "metrics": metrics}
    watch(screen).on_event(event)
    assert screen.getvalue() == "problems: rows 1,791,700 distinct_prompts 17,917 share 0.1235 (2 s)\n"
