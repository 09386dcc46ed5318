"""From one run of a chain to the next: who starts it, whoever is watching."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipelines.cluster import Cluster
from pipelines.submitting import Order, named, submit
from vapo.errors import UserError
from vapo.recipe import Recipe, parse_recipe
from vapo.segments import read_handed_over

DESCRIBED = re.compile(r"segment (?P<number>\d+) of (?P<of>\d+) of (?P<chain>\S+)")  # as `submit` describes a run


@dataclass(frozen=True)
class Link:
    """A run's place in its chain, and how it was asked for."""

    chain: str
    number: int
    of: int
    recipe: Recipe
    order: Order

    @property
    def by_itself(self) -> bool:
        """Whether a task of the run submits the next one."""
        return bool(self.recipe.chain.secret)


def link_of(run: Any, spec: dict[str, Any]) -> Link | None:
    """A run's place in its chain; None: it is in none, or the last.

    Args:
        spec: the IR that the run was made of: its recipe stands there.
    """
    found = DESCRIBED.fullmatch(run.description or "")
    if not found or found["number"] == found["of"]:
        return None
    written = spec["root"]["inputDefinitions"]["parameters"]["recipe_json"]["defaultValue"]
    given = run.runtime_config.parameters
    recipe = parse_recipe(json.loads(written), f"the recipe of run {run.display_name}")
    return Link(
        found["chain"], int(found["number"]), int(found["of"]), recipe, Order(**json.loads(given["submission"]))
    )


def next_run(cluster: Cluster, run: Any, link: Link, say: Callable[[str], None]) -> Any:
    """The run after one that has succeeded, created if nobody else does it; None: the target ended the chain.

    Raises:
        UserError: it cannot be created from here; says why, and how to go on.
    """
    number = link.number + 1
    if link.by_itself:
        found = named(cluster, run.experiment_id, f"{link.chain}-{number}")
        if not found:
            say(f"no segment {number} of {link.of} follows: the target accuracy was reached")
        return found[0] if found else None
    try:
        said = read_handed_over(link.recipe.runtime.store, link.chain, link.number)
    except UserError as error:
        raise UserError(
            f"{error}; the next segment starts from what lies there: then 'vapo watch {run.run_id} "
            f"{cluster.options()}' goes on"
        ) from None
    if said is None:
        raise UserError(
            f"store {link.recipe.runtime.store}: segment {link.number} of {link.chain} has handed nothing over there: "
            "was it emptied, or is it another server's?"
        )
    if said["stopped"]:
        say(f"no segment {number} of {link.of} follows: the target accuracy was reached")
        return None
    made = submit(link.recipe, cluster, link.order, handed_over=said).run
    say(f"segment {number} of {link.of}: run {made.display_name} {made.run_id}")
    return made
