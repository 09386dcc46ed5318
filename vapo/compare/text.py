"""A comparison as tables for the terminal, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from vapo.compare.artifacts import SAME
from vapo.compare.runs import Artifact, Comparison, Key
from vapo.report.results import number

Shown = tuple[str, str, str, str]  # heading, stage as in HISTORY, metric, format


def dump(found: Comparison) -> str:
    """As JSON text."""
    document = {
        "runs": found.runs,
        "settings": found.settings,
        "artifacts": [
            {
                **_place(artifact.key),
                "output": artifact.output,
                "results": artifact.results,
                "differences": [asdict(each) if each else None for each in artifact.differences],
            }
            for artifact in found.artifacts
        ],
        "metrics": [
            {"iteration": iteration, "stage": stage, "name": name, "values": values, "differences": _less(values)}
            for (iteration, stage, name), values in found.metrics.items()
        ],
    }
    return json.dumps(document, indent=1) + "\n"


def tables(found: Comparison, shown: Iterable[Shown]) -> Iterator[Table | str]:
    """What a person reads: settings, artifacts, what differs in tables, metrics per iteration, held-out accuracy.

    Args:
        shown: the metrics that stand in the table of iterations.
    """
    if found.settings:
        yield _grid(["setting", *found.runs], ([key, *map(_value, values)] for key, values in found.settings.items()))
    else:
        yield "no setting differs"
    others = found.runs[1:]
    differing = [artifact for artifact in found.artifacts if any(result != SAME for result in artifact.results)]
    same = len(found.artifacts) - len(differing)
    yield f"{len(found.artifacts)} artifacts in common, {same} the same bytes" + (", not these:" if differing else "")
    if differing:
        yield _grid(["task", "output", *others], ([_name(a.key), a.output, *a.results] for a in differing))
    for run_index, run in enumerate(others):
        for artifact in differing:
            yield from _in_table(artifact, run_index, run if len(others) > 1 else "")
    yield from _iterations(found, list(shown))
    yield from _accuracy(found)


def _in_table(artifact: Artifact, index: int, run: str) -> Iterator[Table | str]:
    difference = artifact.differences[index]
    if difference is None:
        return
    old, new = difference.rows
    head = f"{artifact.output} of {_name(artifact.key)}{f' in {run}' if run else ''}: "
    if old != new:
        yield f"{head}{old} rows and {new}"
        return
    equal = [column.name for column in difference.columns if column.equal]
    yield f"{head}{old} rows; equal: {', '.join(equal) or 'no column'}"
    lines = [
        [
            column.name,
            f"{column.rows:,}",
            "" if column.values is None else f"{column.differing:,} of {column.values:,}",
            *("" if value is None else f"{value:.4g}" for value in (column.mean, column.std, column.largest)),
        ]
        for column in difference.columns
        if not column.equal
    ]
    heads = ["column", "rows that differ", "values that differ", "mean |difference|", "std", "largest"]
    yield _grid(heads, lines)


def _iterations(found: Comparison, shown: list[Shown]) -> Iterator[Table | str]:
    lines = []
    for iteration in sorted({iteration for iteration, *_ in found.metrics}):
        cells = []
        for _, stage, metric, shape in shown:
            values = found.metrics.get((iteration, stage, metric), ())
            texts = [ABSENT_VALUE if value is None else shape.format(value) for value in values]
            cells.append(texts[0] if len(set(texts)) == 1 else " / ".join(texts))
        if any(cells):
            lines.append([str(iteration), *cells])
    if lines:
        yield f"metrics, {' / '.join(found.runs)}; one value where they are equal:"
        yield _grid(["iteration", *(heading for heading, *_ in shown)], lines)


ABSENT_VALUE = "-"


def _accuracy(found: Comparison) -> Iterator[str]:
    """The last evaluation of each run, with its interval."""
    first = None
    for index, run in enumerate(found.runs):
        evaluations = [
            iteration
            for (iteration, stage, name), values in found.metrics.items()
            if (stage, name) == ("evaluation", "accuracy") and values[index] is not None
        ]
        if not evaluations:
            continue
        last = max(evaluations)
        metrics = {
            name: value
            for (iteration, stage, name), values in found.metrics.items()
            if (iteration, stage) == (last, "evaluation") and (value := values[index]) is not None
        }
        accuracy = metrics["accuracy"]
        less = "" if first is None else f", {100 * (accuracy - first):+.1f} points"
        first = accuracy if first is None else first
        yield f"held-out accuracy of {run} after iteration {last}: {number(metrics, 'accuracy')}{less}"


def _place(key: Key) -> dict[str, Any]:
    iteration, stage, purpose, count = key
    return {"iteration": iteration, "stage": stage, "purpose": purpose, "number": count}


def _name(key: Key) -> str:
    iteration, stage, purpose, count = key
    why = f" ({purpose})" if purpose not in ("", "training") else ""
    return f"{stage}{why} of iteration {iteration}{f', number {count}' if count > 1 else ''}"


def _less(values: tuple[float | None, ...]) -> list[float | None]:
    """Differences from the first run's."""
    first, *others = values
    return [None if first is None or value is None else value - first for value in others]


def _value(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _grid(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> Table:
    table = Table(box=None, header_style="bold")
    for head in heads:
        table.add_column(escape(head), no_wrap=True)
    for line in lines:
        table.add_row(*map(escape, line))
    return table
