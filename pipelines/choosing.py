"""Which tasks of a run are meant: those of a stage in an iteration, and what followed from them."""

from collections.abc import Iterable, Mapping, Sequence

from vapo.errors import UserError
from vapo.lineage.graph import Node

TRAINING = "training"


def chosen(tasks: Sequence[Node], stage: str, iteration: int | None, purpose: str = "") -> list[Node]:
    """The executions of a stage, say of iteration 3: several where prompts were drawn more than once, or in shards.

    A concatenation takes its shards along: what it reads is a list, which only a loop makes.

    Args:
        tasks: of a run.
        iteration: None: the stage ran in one only.
        purpose: empty: training, where the stage ran for that, else the only one there is.

    Raises:
        UserError: there is no such stage, purpose or iteration, or several are meant; lists those there are.
    """
    of_stage = [node for node in tasks if node.record.stage == stage]
    if not of_stage:
        there = ", ".join(dict.fromkeys(node.record.stage for node in tasks))
        raise UserError(f"--stage {stage}: no such task in the run: there are {there or 'none yet'}")
    when = iterations_of(tasks)
    found = [node for node in of_stage if iteration in (None, when[node.digest])]
    if not found:
        raise UserError(f"--iteration {iteration}: {stage} ran in {listed(when[node.digest] for node in of_stage)}")
    purposes = list(dict.fromkeys(purpose_of(node) for node in found))
    wanted = purpose or (TRAINING if TRAINING in purposes else purposes[0])
    if wanted not in purposes:
        raise UserError(f"--purpose {wanted}: {stage} ran for {', '.join(purposes)}")
    if not purpose and wanted != TRAINING and len(purposes) > 1:
        raise UserError(f"--stage {stage}: it ran for {', '.join(purposes)}: say which with --purpose")
    found = [node for node in found if purpose_of(node) == wanted]
    iterations = {when[node.digest] for node in found}
    if len(iterations) > 1:
        raise UserError(f"--stage {stage}: it ran in {listed(iterations)}: say which with --iteration")
    wanted_digests = {digest for node in found for digest in (*shards_of(node), node.digest)}
    return [node for node in tasks if node.digest in wanted_digests]


def shards_of(node: Node) -> list[str]:
    """The records of the rollouts that a concatenation put together, in order; of another stage none."""
    inputs = node.record.inputs
    return [inputs[f"parts_{number}"].record for number in range(sum(name.startswith("parts_") for name in inputs))]


def following(tasks: Sequence[Node], first: Iterable[Node]) -> list[Node]:
    """These tasks and all that used what they made, or what was made from that, in the order of `tasks`."""
    reached = {node.digest for node in first}
    for node in tasks:  # what was made first comes first
        if any(source.record in reached for source in node.record.inputs.values()):
            reached.add(node.digest)
    return [node for node in tasks if node.digest in reached]


def iterations_of(tasks: Iterable[Node]) -> dict[str, int]:
    """A record's digest -> the iteration that a person means.

    Rollouts for an evaluation are recorded without one, so that equal policies are sampled once: theirs is that of the
    update that made their policy.
    """
    by_digest: Mapping[str, Node] = {node.digest: node for node in tasks}

    def iteration_of(node: Node) -> int:
        makers = (by_digest.get(source.record) for source in node.record.inputs.values())
        own = node.record.iteration
        if node.record.purpose != "evaluation":
            return own
        return max([own, *(iteration_of(maker) for maker in makers if maker)])  # a concatenation's are its shards

    return {digest: iteration_of(node) for digest, node in by_digest.items()}


def purpose_of(node: Node) -> str:
    """What a stage ran for; those that run for one purpose only say none."""
    return node.record.purpose or TRAINING


def listed(iterations: Iterable[int]) -> str:
    """Say "iterations 0, 2 to 16"."""
    found = sorted(set(iterations))
    parts: list[str] = []
    start = found[0]
    for value, after in zip(found, [*found[1:], None], strict=True):
        if after != value + 1:
            parts.append(str(value) if value == start else f"{start} to {value}")
            start = after if after is not None else value
    return f"iteration{'s' if len(found) > 1 else ''} {', '.join(parts)}"
