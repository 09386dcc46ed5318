"""How a chain goes on by itself: what the last task of a segment's run does."""

import json
from pathlib import Path

from pipelines.cluster import connect
from pipelines.submitting import Order, submit
from vapo.recipe import Chain, parse_recipe
from vapo.tables import write_text


def next_segment(
    section: Chain, *, recipe: str, submission: str, handed_over: Path, submitted: Path
) -> dict[str, float]:
    """Submit the segment after the one that wrote `handed_over`; if somebody has done so already, nothing is done.

    Raises:
        UserError: the API does not let us, or what `submit` says.
    """
    said = json.loads(handed_over.read_text(encoding="utf-8"))
    order = Order(**json.loads(submission))
    made = submit(
        parse_recipe(json.loads(recipe), "the run's recipe"),
        connect(section.api, order.namespace),
        order,
        handed_over=said,
    )
    found = {"run": made.run.run_id, "name": made.run.display_name, "segment": said["segment"] + 1}
    write_text(submitted, json.dumps(found, indent=1) + "\n")
    return {}
