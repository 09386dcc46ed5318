"""A plan as tables for a terminal, and as JSON."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from vapo.plan.cache import Prediction, Task
from vapo.plan.fit import Choice, Fit, advice, choices, fits, on_gpus
from vapo.plan.hardware import Hardware
from vapo.plan.models import Shape, shape_of
from vapo.plan.store import Iteration, iteration
from vapo.plan.throughput import lengths_of
from vapo.plan.time import Stage, Times, times
from vapo.recipe import Recipe

GB = 1e9
WIDTH = 100


@dataclass(frozen=True)
class Plan:
    """All that is known of a run before it starts."""

    recipe: Recipe
    shape: Shape
    machine: Hardware
    tasks: Sequence[Task]
    pods: int
    predictions: Sequence[Prediction]
    fits: list[Fit]
    store: Iteration
    times: Times | None  # of a recipe for GPUs
    choices: list[Choice]
    advice: list[str]


def plan(recipe: Recipe, machine: Hardware, tasks: Sequence[Task], pods: int, predicted: Sequence[Prediction]) -> Plan:
    """Everything together."""
    shape, gpu = shape_of(recipe), on_gpus(recipe)
    return Plan(
        recipe,
        shape,
        machine,
        tasks,
        pods,
        predicted,
        fits(recipe, shape, machine),
        iteration(recipe, shape, lengths_of(recipe.rollout, machine), machine.lengths.text),
        times(recipe, shape, machine) if gpu else None,
        list(choices(recipe, shape, machine)) if gpu else [],
        advice(recipe, shape, machine) if gpu else [],
    )


def as_json(found: Plan) -> dict[str, Any]:
    """The plan in bytes, seconds and counts."""
    return {
        "recipe": found.recipe.name,
        "model": {**asdict(found.shape), "parameters": found.shape.parameters()},
        "tasks": dict(Counter(task.stage for task in found.tasks)),
        "pods": found.pods,
        "memory": [
            {
                "stage": fit.stage,
                "ranks": fit.ranks,
                **asdict(fit.memory),
                "peak": fit.memory.peak,
                "device": fit.device,
                "fits": fit.fits,
            }
            for fit in found.fits
        ],
        "store": {"per_iteration": found.store.total, "models_and_tables": found.store.models},
        "stages": [
            {**asdict(stage), "orchestration": stage.orchestration, "gpu_hours": stage.gpu_hours}
            for stage in (found.times.all if found.times else [])
        ],
        "seconds_per_iteration": found.times.seconds_per_iteration if found.times else None,
        "seconds": found.times.seconds if found.times else None,
        "orchestration": found.times.orchestration if found.times else None,
        "choices": [asdict(choice) for choice in found.choices],
        "advice": found.advice,
        "cache": [
            {"task": p.task.shown, "stage": p.task.stage, "served": p.served is not None, "why": p.why}
            for p in found.predictions
        ],
    }


def show(found: Plan, console: Console, *, every_task: bool = False) -> None:
    """Print the plan; no line is wider than 100 characters."""
    for part in _parts(found, every_task=every_task):
        console.print(part, highlight=False, soft_wrap=isinstance(part, str))


def terminal() -> Console:
    """The terminal, or lines of 100 columns without colours."""
    found = Console()
    return found if found.is_terminal else Console(width=WIDTH)


def _parts(found: Plan, *, every_task: bool) -> Iterator[Table | str]:
    recipe, shape, counts = found.recipe, found.shape, Counter(task.stage for task in found.tasks)
    yield f"{recipe.name}: {shape.name}, {_count(shape.parameters())} parameters; {recipe.iterations} iterations"
    yield f"{len(found.tasks)} tasks, {found.pods} pods:"
    yield from textwrap.wrap(", ".join(f"{n} {stage}" for stage, n in counts.items()), WIDTH)
    yield ""
    yield _memory(found.fits)
    yield from found.advice
    if found.times:
        yield _host(found)
    yield ""
    if found.times:
        yield _stages(found.times.all)
        steps = _steps(recipe)
        yield (
            f"{found.times.seconds_per_iteration / 3600:.2f} h per iteration of {steps} optimiser steps; "
            f"{found.times.seconds / 86400:.1f} days for {recipe.iterations * steps:,} steps; "
            f"orchestration {found.times.orchestration:.1%}"
        )
        hours = sum(stage.gpu_hours for stage in found.times.all)
        yield f"{hours:,.0f} hours of {found.machine.gpu.name}, by stages from start to end"
        yield ""
        yield _choices(found.choices)
        yield ""
    store = found.store
    yield f"store: {_bytes(store.total)} more with every iteration, {_bytes(store.models)} of it models and tables;"
    yield f"{_bytes(recipe.iterations * store.total)} in all if nothing is taken away (vapo gc)"
    if found.predictions:
        served = sum(p.served is not None for p in found.predictions)
        yield f"cache: {served} of {len(found.predictions)} tasks will be served"
        yield from _cache(found.predictions, every_task=every_task)


def _steps(recipe: Recipe) -> int:
    """Optimiser steps of an iteration."""
    rows = (recipe.advantages.keep_groups or recipe.rollout.prompts) * recipe.rollout.samples
    return recipe.ppo_update.epochs * -(-rows // recipe.ppo_update.mini_batch)


def _memory(found: list[Fit]) -> Table:
    # All in one unit, of the largest.
    unit, scale = ("GB", GB) if max(fit.memory.peak for fit in found) > GB else ("MB", 1e6)
    heads = ("weights", "gradients", "optimiser", "buffers", "gathered", "activ.", "temp.", "KV")
    table = _table(f"{unit} of each rank", "ranks", *heads, "peak", "of")
    for fit in found:
        m = fit.memory
        parts = (m.weights, m.gradients, m.optimizer, m.buffers, m.gathered, m.activations, m.temporary, m.kv_cache)
        against = f"{fit.device / scale:.1f}{'' if fit.fits else ' NO'}" if fit.device else ""
        table.add_row(
            fit.stage,
            str(fit.ranks),
            *(f"{p / scale:.1f}" if p else "" for p in parts),
            f"{m.peak / scale:.1f}",
            against,
        )
    return table


def _host(found: Plan) -> str:
    """Memory of a node beside its GPUs': every rank reads the whole model in float32 before it is shared out."""
    ranks, held = found.recipe.train.ranks, max(fit.memory.host for fit in found.fits)
    loading = ranks * 4 * found.shape.parameters()
    most = (loading + ranks * held) / GB
    has = found.machine.node.memory / GB
    return (
        f"a node's own memory: {most:,.0f} of {has:,.0f} GB while its {ranks} ranks load{'' if most <= has else ' NO'}"
    )


def _stages(stages: Sequence[Stage]) -> Table:
    table = _table("seconds of a task", "times", "GPUs", "work", "start", "load", "transfer", "GPU hours", "")
    for stage in stages:
        seconds = (stage.work, stage.start, stage.load, stage.transfer)
        hours = f"{stage.gpu_hours:,.0f}" if stage.gpus else ""
        table.add_row(
            stage.name, str(stage.times), str(stage.gpus or ""), *(f"{s:,.0f}" for s in seconds), hours, _fact(stage)
        )
    return table


def _fact(stage: Stage) -> str:
    if "tokens/s" in stage.facts:
        return f"{stage.facts['tokens/s']:,.0f} tokens/s"
    if "model FLOP utilisation" in stage.facts:
        return f"MFU {stage.facts['model FLOP utilisation']:.0%}"
    return ""


def _choices(found: Sequence[Choice]) -> Table:
    table = _table("nodes", "smallest ZeRO stage", "rollout engines", "h / iteration", "days", "orchestration")
    for choice in found:
        if choice.zero_stage is None:
            table.add_row(str(choice.nodes), "does not fit")
            continue
        table.add_row(
            str(choice.nodes),
            str(choice.zero_stage),
            str(choice.engines),
            f"{choice.hours_per_iteration:.2f}",
            f"{choice.days:.1f}",
            f"{choice.orchestration:.1%}",
        )
    return table


def _cache(predictions: Sequence[Prediction], *, every_task: bool) -> Iterator[Table | str]:
    """Tasks that miss by their own cause; those that only follow from others are counted."""
    missed = [p for p in predictions if p.served is None]
    follow = [p for p in missed if p.why.startswith("input ") and not every_task]
    table = _table("made anew", "why", right=False)
    by_cause: dict[str, list[Prediction]] = {}
    for p in missed:
        if p not in follow:
            by_cause.setdefault(p.why, []).append(p)
    for why, those in by_cause.items():
        shown = [p.task.shown for p in those] if every_task else [_several(those)]
        for name in shown:
            table.add_row(name, why)
    if table.row_count:
        yield table
    if follow:
        yield f"and {len(follow)} tasks that read what these make (--json tells each)"


def _several(those: Sequence[Prediction]) -> str:
    name = those[0].task.shown
    return name if len(those) == 1 else f"{name} and {len(those) - 1} more"


def _count(number: float) -> str:
    scale, unit = (1e9, "billion") if number >= 1e9 else (1e6, "million")
    return f"{number / scale:.3g} {unit}"


def _bytes(size: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"


def _table(first: str, *others: str, right: bool = True) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=right, overflow="fold")
    for heading in others:
        table.add_column(heading, justify="right" if right else "left", no_wrap=right, overflow="fold")
    return table
