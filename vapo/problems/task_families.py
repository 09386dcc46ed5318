"""Problems of reasoning-gym's task families, drawn in a process of their own: some families follow Python's hash seed.

The ground truth of such a problem is JSON for vapo.problems.gym: {"dataset": family, "config": its parameters, "entry":
{"question", "answer", "metadata"}}.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any, TextIO

import numpy as np

from vapo import recipe
from vapo.errors import UserError
from vapo.problems.optional import need
from vapo.problems.problem import Problem, identity
from vapo.problems.rows import BadRow
from vapo.problems.templates import Render, messages_of
from vapo.progress import Progress
from vapo.seeds import derive

CHUNK = 500  # entries per seed; fixed, because what some families draw depends on how many they are asked for
MIXTURE = "composite"  # of several families: here problems.families holds them
SOURCE = "problems.source 'reasoning_gym'"

Parameters = Mapping[str, Any]


def draw(section: recipe.Problems, render: Render, seed: int, count: int) -> list[Problem]:
    """`count` distinct problems, of every family in turn; the first ones do not depend on how many there are.

    Raises:
        UserError: a family or a parameter that reasoning-gym does not know or refuses, or too few problems.
    """
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "vapo.problems.task_families"]
    progress = Progress("problems", count)
    problems: list[Problem] = []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):  # if it has ended, its code says so below
            process.stdin.write(json.dumps({"families": section.families, "seed": seed, "count": count}))
            process.stdin.close()
        for line in process.stdout:
            found = json.loads(line)
            if "fault" in found:
                raise UserError(found["fault"])
            problems.append(_problem(found, line.rstrip("\n"), render))
            progress(len(problems), 1, "problems")
    if process.returncode:
        raise RuntimeError(f"drawing problems of reasoning-gym ended with code {process.returncode}: see the log")
    return problems


def _problem(found: Mapping[str, Any], ground_truth: str, render: Render) -> Problem:
    question = found["entry"]["question"]
    try:
        prompt = render(messages_of(question, "question"))
    except BadRow as fault:
        raise UserError(f"problems.families {found['dataset']!r}: {fault}") from None
    return Problem(identity(question), prompt, ground_truth, found["dataset"], 0)


def serve(asked: Mapping[str, Any], answers: TextIO) -> None:
    """What the process does: a line per problem, or one that says what is wrong with the recipe."""
    families = asked["families"]
    try:
        seen: set[str] = set()
        streams = {name: distinct(name, parameters, asked["seed"], seen) for name, parameters in families.items()}
        for name, entry in islice(_in_turn(streams), asked["count"]):
            found = {"dataset": name, "config": families[name], "entry": entry}
            answers.write(json.dumps(found, allow_nan=False) + "\n")
    except UserError as error:
        answers.write(json.dumps({"fault": str(error)}) + "\n")


def _in_turn(streams: Mapping[str, Iterator[Any]]) -> Iterator[tuple[str, Any]]:
    while True:
        for name, stream in streams.items():
            yield name, next(stream)


def distinct(family: str, parameters: Parameters, seed: int, seen: set[str]) -> Iterator[dict[str, Any]]:
    """A family's entries without end, but none whose question is among `seen`, to which it adds."""
    total, chunk = 0, 0
    while True:
        before = total
        for entry in _entries(family, parameters, derive(seed, "problems", "reasoning_gym", family, chunk) % 2**32):
            prompt_id = identity(entry["question"])
            if prompt_id not in seen:
                seen.add(prompt_id)
                total += 1
                yield entry
        if total == before:
            raise UserError(
                f"problems.families {family!r} with parameters {dict(parameters)}: {CHUNK} draws brought none beyond "
                f"{total} distinct problems: lower problems.train and problems.heldout, or allow harder ones"
            )
        chunk += 1


def _entries(family: str, parameters: Parameters, seed: int) -> Iterator[dict[str, Any]]:
    """The CHUNK entries of one seed."""
    factory = need("reasoning_gym.factory", SOURCE)
    families = {name: kinds for name, kinds in factory.DATASETS.items() if name != MIXTURE}
    key = f"problems.families {family!r}"
    if family not in families:
        near = difflib.get_close_matches(family, families, n=3) or sorted(families)
        raise UserError(f"{key}: reasoning-gym has no such family: take one of {near}")
    known = sorted({field.name for field in dataclasses.fields(families[family][1])} - {"seed", "size"})
    if unknown := sorted(set(parameters) - set(known)):
        raise UserError(f"{key}: it has no parameters {unknown} (seed and size are ours): it has {known}")
    try:
        dataset = factory.create_dataset(family, **parameters, seed=seed, size=CHUNK)
    except (AssertionError, ValueError, TypeError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{key}: it refuses the parameters {dict(parameters)}: {reason}") from None
    for i in range(CHUNK):
        random.seed(seed + i)  # codeio runs programs that draw from the global generators
        np.random.seed((seed + i) % 2**32)  # noqa: NPY002
        yield dataset[i]


if __name__ == "__main__":
    own_output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # some families print while they draw
    with own_output:
        serve(json.load(sys.stdin), own_output)
