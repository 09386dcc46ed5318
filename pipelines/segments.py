"""A training of many iterations as a chain of runs: each starts from what the one before has handed over."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfp import dsl

from components.take_over.component import take_over
from components.take_over.without_critic import take_over as take_over_without_critic
from vapo.recipe import Recipe

HANDED = {  # what a segment needs of the one before; the last four are for the report
    "policy": dsl.Model,
    "critic": dsl.Model,
    "reference": dsl.Model,
    "prompts": dsl.Dataset,
    "heldout_prompts": dsl.Dataset,
    "history": dsl.Dataset,
    "first_rollouts": dsl.Dataset,
    "first_rewards": dsl.Dataset,
    "first_experience": dsl.Dataset,
    "pretraining": dsl.Dataset,
}
OF_A_CRITIC = ("critic", "pretraining")


@dataclass(frozen=True)
class Segment:
    """One run of the chain: which, its first iteration, how many iterations, and how many runs there are."""

    number: int
    first: int
    iterations: int
    of: int

    @property
    def last(self) -> int:
        """Its last iteration."""
        return self.first + self.iterations - 1

    @property
    def ends(self) -> bool:
        """Whether no other follows."""
        return self.number == self.of


def segments(recipe: Recipe) -> tuple[Segment, ...]:
    """The runs that a recipe's iterations take on a cluster, iterations_per_run in each."""
    starts = range(1, recipe.iterations + 1, recipe.iterations_per_run)
    return tuple(
        Segment(number, first, min(recipe.iterations_per_run, recipe.iterations + 1 - first), len(starts))
        for number, first in enumerate(starts, start=1)
    )


def file_of(path: Path, segment: Segment) -> Path:
    """The file of a segment's pipeline where `path` is the first one's."""
    return path if segment.number == 1 else path.with_stem(f"{path.stem}-segment-{segment.number}")


def handed(has_critic: bool) -> dict[str, Any]:
    """What is handed over: name -> kind of artifact."""
    return {name: kind for name, kind in HANDED.items() if has_critic or name not in OF_A_CRITIC}


def parameters_from(handed_over: Mapping[str, Any]) -> dict[str, str]:
    """The parameters of the next segment's pipeline, but for those that every segment has (store, seed, sections).

    Args:
        handed_over: what the task hand-off wrote (`vapo.segments.hand_off`), read as JSON.
    """
    artifacts: Mapping[str, Mapping[str, str]] = handed_over["artifacts"]
    known = {name: {key: found[key] for key in ("sha256", "record")} for name, found in artifacts.items()}
    return {
        "chain": handed_over["chain"],
        "handed_over": json.dumps(known, sort_keys=True),
        **{f"{name}_uri": found["uri"] for name, found in artifacts.items()},
    }


def taken_over(given: Mapping[str, Any], has_critic: bool) -> dict[str, Any]:
    """Tasks that import what was handed over and check it: name -> artifact.

    The backend does not resolve parameters in an importer's metadata, as kfp.local does: there an imported artifact
    knows only where it lies. So one task gets the digests as its parameter, checks every artifact and hands on copies
    that carry them; lineage leads through it.
    """
    imported = {}
    for name, kind in handed(has_critic).items():
        task = dsl.importer(artifact_uri=given[f"{name}_uri"], artifact_class=kind)
        imported[name] = task.set_display_name(f"import-{name.replace('_', '-')}").output
    taken = (take_over if has_critic else take_over_without_critic)(handed_over=given["handed_over"], **imported)
    return {name: taken.outputs[f"new_{name}"] for name in imported}
