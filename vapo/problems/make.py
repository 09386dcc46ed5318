"""The problems stage: training prompts, held-out prompts that share none with them, and worked examples."""

from __future__ import annotations

import random
from pathlib import Path

from vapo import recipe
from vapo.errors import UserError
from vapo.problems import chain, task_families
from vapo.problems.collection import Collection, collect, read_problems
from vapo.problems.hub import read_hub
from vapo.problems.problem import Problem, choose, identity, split
from vapo.problems.templates import Render, renderer
from vapo.progress import Progress
from vapo.schemas import EXAMPLES, PROMPTS
from vapo.seeds import derive
from vapo.tables import write_table

SHORT_SHARE = 0.25  # of the worked examples are short ones, which the curriculum begins with
SHORT_STEPS = (3, 8)


def problems(
    section: recipe.Problems, *, train_prompts: Path, heldout_prompts: Path, examples: Path, seed: int
) -> dict[str, float]:
    """Write the PROMPTS tables and EXAMPLES; returns how many rows each has, and how many were read for them.

    Raises:
        UserError: a problem set that is not there, cannot be read, or leaves nothing to train on or to hold out.
    """
    facts: dict[str, float] = {}
    if section.source == "chain":
        train, heldout = _chains(section, seed)
    elif section.source == "reasoning_gym":
        drawn = task_families.draw(section, renderer(section), seed, section.heldout + section.train)
        train, heldout = drawn[section.heldout :], drawn[: section.heldout]  # as with chains
    else:
        train, heldout, facts = _read(section)
        train, heldout = choose(train, section.train), choose(heldout, section.heldout)
        if not heldout or (not train and section.heldout_share < 1):
            raise UserError(
                f"problems.path {section.path!r}: {len(train)} training and {len(heldout)} held-out prompts: "
                "the file needs more problems, or change problems.heldout_share"
            )
    _write_prompts(train_prompts, train)
    _write_prompts(heldout_prompts, heldout)
    worked = _worked_examples(section, seed)
    write_table(
        examples,
        EXAMPLES,
        {
            "prompt": [c.prompt for c, _ in worked],
            "response": [text for _, text in worked],
            "difficulty": [len(c.operations) for c, _ in worked],
        },
    )
    return {"train_prompts": len(train), "heldout_prompts": len(heldout), "examples": len(worked), **facts}


def _read(section: recipe.Problems) -> tuple[list[Problem], list[Problem], dict[str, float]]:
    """(training, held-out, counts); what is held out is never trained on, whichever file it stands in."""
    render = renderer(section)
    read = _collect(section, render, "path", section.hub_split)
    facts = _facts(read)
    if not section.heldout_path:
        return *split(read.problems, section.heldout_share), facts
    kept = _collect(section, render, "heldout_path", section.hub_heldout_split)
    known = {problem.prompt_id for problem in kept.problems}
    train = [p for p in read.problems if p.prompt_id not in known]
    if not train:
        raise UserError(
            f"problems.path {section.path!r}: all its problems are held out by problems.heldout_path "
            f"{section.heldout_path!r}: give others to train on"
        )
    return train, kept.problems, facts | {f"heldout_{name}": value for name, value in _facts(kept).items()}


def _collect(section: recipe.Problems, render: Render, setting: str, hub_split: str) -> Collection:
    """The problems of the files, or of the data set on the hub, that `setting` names."""
    name, key = getattr(section, setting), f"problems.{setting}"
    if section.source == "hub":
        return collect(read_hub(section, name, hub_split, key), 0, section, render, f"{key} {name!r}")
    return read_problems(section, name, key, render)


def _facts(read: Collection) -> dict[str, float]:
    return {"rows": read.rows, "distinct_prompts": len(read.problems), "bad_rows": read.bad_rows}


def _chains(section: recipe.Problems, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Distinct chains; the held-out ones are drawn first, so they don't depend on how many train."""
    generator = random.Random(derive(seed, "problems", "prompts"))
    drawn: dict[str, Problem] = {}
    while len(drawn) < section.heldout + section.train:
        c = chain.draw(generator, section.min_steps, section.max_steps)
        prompt_id = identity(c.prompt)
        drawn.setdefault(prompt_id, Problem(prompt_id, c.prompt, str(c.answer), "chain", len(c.operations)))
        if len(drawn) % 1024 == 0 and len(drawn) > _distinct(section) // 2:
            raise UserError(
                f"problems.train {section.train} and heldout {section.heldout} are too many for chains of "
                f"{section.min_steps} to {section.max_steps} steps: allow longer ones"
            )
    found = list(drawn.values())
    return found[section.heldout :], found[: section.heldout]


def _distinct(section: recipe.Problems) -> int:
    """How many chains of the longest kind there are."""
    return 10 * len(chain.OPERATIONS) ** section.max_steps


def _worked_examples(section: recipe.Problems, seed: int) -> list[tuple[chain.Chain, str]]:
    generator = random.Random(derive(seed, "problems", "examples"))
    progress = Progress("worked examples", section.examples)
    worked = []
    for i in range(section.examples):
        short = generator.random() < SHORT_SHARE
        fewest, most = SHORT_STEPS if short else (section.min_steps, section.max_steps)
        c = chain.draw(generator, min(fewest, section.max_steps), min(most, section.max_steps))
        worked.append((c, chain.worked_example(generator, c)))
        if i % 1000 == 999:
            progress(i + 1, 1000, "examples")
    return worked


def _write_prompts(path: Path, found: list[Problem]) -> None:
    write_table(
        path,
        PROMPTS,
        {name: [getattr(p, name) for p in found] for name in PROMPTS.names},
    )
