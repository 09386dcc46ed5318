"""A rerun for a cluster: a pipeline of the run's own name, which imports what the run recorded and does a part again.

A cluster's cache is per pipeline name. There an importer whose URI and metadata an artifact of that pipeline has keeps
the artifact's identity (backend/src/v2/metadata, FindMatchedArtifact), so that what was done from it is found again.
"""

import json
from collections.abc import Sequence

from pipelines.choosing import chosen, following
from pipelines.compiling import compile_pipeline
from pipelines.redoing import Again, Given, redoing
from pipelines.settings import changed, check_settings
from vapo.errors import UserError
from vapo.lineage.graph import Node, nodes_of
from vapo.lineage.records import Records
from vapo.recipe import Recipe, parse_recipe

BUCKETS = ("s3://", "minio://", "gs://")


def tasks_in(store: str, run: str) -> tuple[list[Node], Recipe]:
    """The tasks that led to what a run on a cluster has made, what ended first first, and its recipe.

    Raises:
        UserError: the run left no records in the store, or none that tells its recipe; says which runs there are.
    """
    records = Records(store)
    nodes = nodes_of(records.led_to(records.of_run(run)))
    tasks = sorted(nodes, key=lambda node: (node.record.ended, node.digest))
    told = [node.record.parameters["recipe"] for node in tasks if node.record.stage == "report"]
    if not told:
        raise UserError(f"run {run}: no report, which tells its recipe: let it end first, say with 'vapo retry'")
    return tasks, parse_recipe(json.loads(str(told[-1])), f"the recipe of run {run}")


def recompiled(
    tasks: Sequence[Node],
    before: Recipe,
    stage: str,
    iteration: int | None = None,
    purpose: str = "",
    downstream: bool = False,
    settings: Sequence[str] = (),
) -> tuple[Recipe, str]:
    """The recipe with the settings, and the IR that does a stage of these tasks again, and all that follows if asked.

    Raises:
        UserError: nothing or several things are meant, a setting is for none of them, or an artifact is in no bucket.
    """
    targets = chosen(tasks, stage, iteration, purpose)
    wanted = following(tasks, targets) if downstream else targets
    after = check_settings(settings, wanted, before)
    again = [Again(node, *changed(node, before, after)) for node in wanted]
    anew = {node.digest for node in targets}
    built = redoing(f"vapo-{after.name}", again, tasks, _address, linked=downstream, anew=anew)
    return after, compile_pipeline(after, pipeline_of=lambda _: built.pipeline, share=True)


def _address(given: Given) -> str:
    if not given.uri.startswith(BUCKETS):
        raise UserError(f"{given}: it lies at {given.uri}, which no pod can read: rerun it where it was made")
    return given.uri
