"""What `vapo compare` is asked for: from the names of runs to what differs between them."""

from collections.abc import Sequence

from pipelines.choosing import iterations_of, listed
from pipelines.ledger import tasks_of
from pipelines.workdir import Workdir
from vapo.compare.runs import Comparison, Run, compare, keyed
from vapo.errors import UserError
from vapo.lineage.graph import read_nodes
from vapo.recipe import read_resolved


def comparison(names: Sequence[str], workdir: Workdir, iteration: int | None = None) -> Comparison:
    """Compare runs, reruns too, with the first of them.

    Raises:
        UserError: fewer than two runs, one that is not there, or an iteration that none of them has; lists those there
            are.
    """
    if len(set(names)) < 2:
        raise UserError(
            f"compare {' '.join(names)}: give two runs or more: there are {[f.name for f in workdir.runs()]}"
        )
    folders = [workdir.find(name) for name in names]
    nodes = read_nodes(workdir.artifacts)
    iterations = iterations_of(nodes)
    runs = [
        Run(folder.name, read_resolved(folder / "recipe.json"), keyed(tasks_of(workdir, folder, nodes), iterations))
        for folder in folders
    ]
    there = {key[0] for run in runs for key in run.tasks}
    if iteration is not None and iteration not in there:
        raise UserError(f"--iteration {iteration}: the runs have {listed(there) if there else 'none yet'}")
    return compare(runs, iteration)
