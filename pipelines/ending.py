"""What follows the last iteration of a run: the report, or what the next segment starts from, or both."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.hand_off.component import hand_off
from components.report.component import report
from pipelines.block import MEASURED, TABLES
from pipelines.segments import Segment, handed
from pipelines.signature import pipeline_of
from pipelines.stopping import ENDING, FOR_A_CONDITION

SHOWN = (*(f"last_{table}" for table in TABLES), *MEASURED)  # by the report, of the run's last block


def finish(given: Mapping[str, Any], *, shows: bool, segment: Segment | None, stopped: bool = False) -> dict[str, Any]:
    """The tasks that end a run, and what they make.

    Args:
        given: artifacts by the names of `handed` and `SHOWN`, and the parameters.
        shows: whether there is a report.
        segment: that hands its artifacts over; None: nothing follows.
        stopped: it hands over that the target is reached.
    """
    made: dict[str, Any] = {}
    if shows:
        tables = {name: given[name] for name in (*handed(True), *SHOWN) if name in given}
        written = report(
            section=given["report_section"],
            recipe=given["recipe_json"],
            evaluation_prompts=tables.pop("heldout_prompts"),
            **{name: table for name, table in tables.items() if name not in ("critic", "reference")},
        )
        made["page"] = written.outputs["page"]
    if segment:
        task = hand_off(
            **{name: given[name] for name in handed(True) if name in given},
            store=given["store"],
            chain=given["chain"],
            segment=segment.number,
            segments=segment.of,
            stopped=stopped,
        )
        made["handed_over"] = task.outputs["handed_over"]
    return made


@cache
def ending_pipeline(shows: bool, segment: Segment | None, stopped: bool, has_critic: bool) -> BaseComponent:
    """`finish` as a sub-pipeline, for a run that has several endings, of which one is reached."""
    artifacts = {**handed(has_critic), **(dict.fromkeys(SHOWN, dsl.Dataset) if shows else {})}
    takes: dict[str, Any] = {name: dsl.Input[kind] for name, kind in artifacts.items()}
    if shows:
        takes |= {"report_section": str, "recipe_json": str}
    if segment:
        takes |= {"store": str, "chain": str}
    gives = {**({"page": dsl.HTML} if shows else {}), **({"handed_over": dsl.Artifact} if segment else {})}

    def end(**given: Any) -> dict[str, Any]:
        return finish(given, shows=shows, segment=segment, stopped=stopped)

    return pipeline_of(end, ENDING, "The report, and what a next segment needs", takes | FOR_A_CONDITION, gives)
