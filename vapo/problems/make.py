"""The problems stage: training prompts, held-out prompts that share none with them, and worked examples."""

from __future__ import annotations

import random
from pathlib import Path

from vapo import recipe
from vapo.errors import UserError
from vapo.problems import chain
from vapo.problems.files import Problem, identity, read_problems, split
from vapo.progress import Progress
from vapo.schemas import EXAMPLES, PROMPTS
from vapo.seeds import derive
from vapo.tables import write_table

SHORT_SHARE = 0.25  # of the worked examples are short ones, which the curriculum begins with
SHORT_STEPS = (3, 8)


def problems(
    section: recipe.Problems, *, train_prompts: Path, heldout_prompts: Path, examples: Path, seed: int
) -> dict[str, float]:
    """Write the PROMPTS tables and EXAMPLES; returns how many rows each has."""
    if section.source == "file":
        train, heldout = _from_files(section)
        train, heldout = train[: section.train], heldout[: section.heldout]
        if not train or not heldout:
            raise UserError(
                f"problems.path {section.path!r}: {len(train)} training and {len(heldout)} held-out prompts: "
                "the file needs more problems, or change problems.heldout_share"
            )
    else:
        train, heldout = _chains(section, seed)
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
    return {"train_prompts": len(train), "heldout_prompts": len(heldout), "examples": len(worked)}


def _from_files(section: recipe.Problems) -> tuple[list[Problem], list[Problem]]:
    """(training, held-out); what is held out is never trained on, whichever file it stands in."""
    if not section.heldout_path:
        return split(read_problems(Path(section.path)), section.heldout_share)
    heldout = read_problems(Path(section.heldout_path), "problems.heldout_path")
    known = {problem.prompt_id for problem in heldout}
    train = [p for p in read_problems(Path(section.path)) if p.prompt_id not in known]
    if not train:
        raise UserError(
            f"problems.path {section.path!r}: all its problems are held out by problems.heldout_path "
            f"{section.heldout_path!r}: give others to train on"
        )
    return train, heldout


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
