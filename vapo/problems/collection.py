"""Distinct problems out of any number of rows, and what is wrong with the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vapo import recipe
from vapo.errors import UserError
from vapo.problems.files import count_rows, find_files, read_rows
from vapo.problems.ground_truths import complaints
from vapo.problems.problem import Problem, identity
from vapo.problems.rows import BadRow, Row, columns_of, shown, text_at, top, value_at
from vapo.problems.templates import Message, Render, messages_of, plain
from vapo.progress import Progress, emit

LISTED = 20  # bad rows that the log names; all are counted
EVERY = 10_000  # rows between reports of progress


@dataclass
class Candidate:
    """A problem, the place of its first row, how many rows have it, and what is wrong with it: nothing if ""."""

    problem: Problem
    place: str
    rows: int = 0
    fault: str = ""


class Collection:
    """Problems by their prompt's plain text; only they are kept, so memory does not grow with repeated rows."""

    def __init__(self, section: recipe.Problems, render: Render) -> None:
        self.section, self.render = section, render
        self.found: dict[str, Candidate] = {}
        self.rows = 0
        self.listed: list[str] = []
        self.bad_rows = 0

    @property
    def problems(self) -> list[Problem]:
        """In the order of their first rows."""
        return [candidate.problem for candidate in self.found.values()]

    def add(self, row: Row) -> None:
        """Take a row in.

        Raises:
            UserError: it is bad, and problems.skip_bad_rows is off; names place, column and value.
        """
        self.rows += 1
        try:
            if row.fault:
                raise BadRow(row.fault)
            self._add(row)
        except BadRow as fault:
            self._refuse(row.place, str(fault), 1)

    def check(self) -> None:
        """Leave out problems whose ground truth is none, or other in other rows: then neither is known to be right.

        Raises:
            UserError: there is one, and problems.skip_bad_rows is off.
        """
        truths = [candidate.problem.ground_truth for candidate in self.found.values()]
        said = complaints(self.section.ground_truths, truths)
        for (text, candidate), complaint in zip(list(self.found.items()), said, strict=True):
            if candidate.fault or complaint:
                truth = shown(candidate.problem.ground_truth)
                fault = f"ground truth {truth} {complaint} (problems.ground_truths {self.section.ground_truths!r})"
                self._refuse(candidate.place, candidate.fault or fault, candidate.rows)
                del self.found[text]

    def _refuse(self, place: str, fault: str, rows: int) -> None:
        if not self.section.skip_bad_rows:
            raise UserError(f"{place}: {fault}; cure it, or leave such rows out with --skip-bad-rows")
        self.bad_rows += rows
        if len(self.listed) < LISTED:
            self.listed.append(f"{place}: {fault}")

    def _add(self, row: Row) -> None:
        columns = columns_of(self.section, row.names)
        messages = messages_of(value_at(row, columns.prompt), columns.prompt)
        ground_truth = text_at(row, columns.ground_truth)
        text = plain(messages)
        candidate = self.found.get(text)
        if candidate is None:
            candidate = self.found[text] = Candidate(self._problem(row, text, messages, ground_truth), row.place)
        candidate.rows += 1
        if candidate.problem.ground_truth != ground_truth:
            other = shown(candidate.problem.ground_truth)
            fault = f"column {columns.ground_truth!r}: the same prompt has {shown(ground_truth)} here and {other} above"
            if not self.section.skip_bad_rows:
                raise BadRow(fault)
            candidate.place, candidate.fault = row.place, fault

    def _problem(self, row: Row, text: str, messages: Sequence[Message], ground_truth: str) -> Problem:
        columns = columns_of(self.section, row.names)
        family = "file"
        if self.section.family_column or row.values.get(columns.family) not in (None, ""):
            family = text_at(row, columns.family)
        for column, value in zip(columns, (text, ground_truth, family), strict=True):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise BadRow(
                    f"column {column!r}: holds half of a surrogate pair, which is no text: {shown(value)}"
                ) from None
        return Problem(identity(text), self.render(messages), ground_truth, family, 0)


def collect(rows: Iterable[Row], total: int, section: recipe.Problems, render: Render, name: str) -> Collection:
    """All rows' problems; `name` says in messages what was read, `total` how many rows there are, about.

    Raises:
        UserError: a bad row, or none that is good.
    """
    collection = Collection(section, render)
    progress = Progress("rows", total)
    for row in rows:
        collection.add(row)
        if collection.rows % EVERY == 0:
            progress(collection.rows, EVERY, "rows")
    collection.check()
    for fault in collection.listed:
        emit("bad_row", row=fault)
    if not collection.found:
        why = f": all {collection.rows} rows are bad, say {collection.listed[0]}" if collection.listed else ""
        raise UserError(f"{name} holds no problem{why}")
    return collection


def read_problems(section: recipe.Problems, pattern: str, key: str, render: Render) -> Collection:
    """The problems of the files that `pattern` names; `key` is the setting that does so.

    Raises:
        UserError: no such file, or one that cannot be read; a bad row; no problem.
    """
    paths = find_files(pattern, key)

    def wanted(names: Sequence[str]) -> set[str]:
        return {top(path, names) for path in columns_of(section, names)}

    rows = (row for path in paths for row in read_rows(path, wanted))
    return collect(rows, sum(count_rows(path) for path in paths), section, render, f"{key} {pattern!r}")
