"""Whether every stage fits into its devices, and the smallest settings that do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vapo.plan.hardware import Hardware
from vapo.plan.memory import Memory, kv_bytes, learner, reader, sampler
from vapo.plan.models import Shape
from vapo.plan.time import times
from vapo.recipe import Recipe, Train

NODES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Fit:
    """A stage's memory on each of its ranks against what a device has."""

    stage: str
    ranks: int
    memory: Memory
    device: float  # bytes that can be used; 0: no GPU is asked for

    @property
    def fits(self) -> bool:
        """Whether the peak is below what the device has."""
        return not self.device or (self.memory.peak <= self.device and (self.stage != "rollout" or self.roomy))

    @property
    def roomy(self) -> bool:
        """A rollout engine's: whether there is a KV cache."""
        return self.memory.kv_cache > 0


def on_gpus(recipe: Recipe) -> bool:
    """Whether a recipe is one for GPUs; others are timed by running them."""
    return recipe.rollout.engine == "vllm" and (recipe.train.engine == "deepspeed" or recipe.train.dtype == "bf16")


def usable(machine: Hardware) -> float:
    """Bytes of a GPU that a stage can have."""
    return float(machine.gpu.memory - machine.gpu.reserved)


def positions_of(recipe: Recipe, budget: int, rows: int, machine: Hardware) -> int:
    """Of the largest micro-batch: the budget, a single text that is longer, or all `rows` of them if that is less."""
    longest = recipe.rollout.max_new_tokens + machine.lengths.prompt
    return int(max(longest, min(budget, rows * longest)))


def fits(recipe: Recipe, shape: Shape, machine: Hardware) -> list[Fit]:
    """One line for each stage that holds a model."""
    train, gpu = recipe.train, on_gpus(recipe)
    ranks, device = train.ranks * train.nodes, usable(machine) if gpu else 0.0
    update = positions_of(recipe, recipe.ppo_update.token_budget, recipe.ppo_update.mini_batch, machine)
    found = [Fit("policy update", ranks, learner(shape, "policy", train, ranks, update), device)]
    if recipe.has_critic:
        rows = recipe.rollout.prompts * recipe.rollout.samples * recipe.rollout.draws
        first = positions_of(
            recipe, recipe.value_pretraining.token_budget, recipe.value_pretraining.mini_batch, machine
        )
        read = positions_of(recipe, recipe.advantages.token_budget, rows, machine)
        found += [
            Fit("critic update", ranks, learner(shape, "critic", train, ranks, update), device),
            Fit("value-pretraining", ranks, learner(shape, "critic", train, ranks, first), device),
            Fit("advantages", train.ranks, reader(shape, "critic", train, train.ranks, read), device),
        ]
    if recipe.rollout.engine == "vllm" and gpu:
        parallel = recipe.rollout.tensor_parallel or 1
        found.append(Fit("rollout", parallel, _engine(recipe, shape, machine, parallel), machine.gpu.memory))
    return found


def _engine(recipe: Recipe, shape: Shape, machine: Hardware, parallel: int) -> Memory:
    section = recipe.rollout
    size = 4 if section.dtype == "float32" else 2
    share = section.gpu_memory or machine.use.engine_share
    return sampler(shape, parallel, size, machine.gpu.memory, share, machine.use.engine_reserve)


def smallest_parallel(recipe: Recipe, shape: Shape, machine: Hardware) -> int | None:
    """The fewest GPUs of an engine whose KV cache holds the longest text once: vLLM refuses to start below that."""
    size = 4 if recipe.rollout.dtype == "float32" else 2
    longest = (recipe.rollout.max_new_tokens + machine.lengths.prompt) * kv_bytes(shape, size)
    for parallel in (1, 2, 4, 8):
        if shape.kv_heads % parallel == 0 and parallel <= machine.node.gpus:
            memory = _engine(recipe, shape, machine, parallel)
            if memory.kv_cache * parallel >= longest:
                return parallel
    return None


def trains(recipe: Recipe, shape: Shape, machine: Hardware) -> bool:
    """Whether every training stage fits."""
    return all(fit.fits for fit in fits(recipe, shape, machine) if fit.stage != "rollout")


def changed(recipe: Recipe, **keys: int | str | bool) -> Recipe:
    """A recipe with other keys of [train]."""
    return recipe.model_copy(update={"train": Train.model_validate({**recipe.train.model_dump(), **keys})})


def smallest_stage(recipe: Recipe, shape: Shape, machine: Hardware) -> int | None:
    """The smallest ZeRO stage that fits on the recipe's nodes; None: none does."""
    first = 1 if recipe.train.dtype == "bf16" else 0
    stages = range(first, 4) if recipe.train.engine == "deepspeed" else range(0)
    return next((s for s in stages if trains(changed(recipe, zero_stage=s), shape, machine)), None)


@dataclass(frozen=True)
class Choice:
    """A number of nodes, with what comes of it."""

    nodes: int
    zero_stage: int | None  # the smallest that fits; None: none does
    engines: int
    hours_per_iteration: float
    days: float
    orchestration: float


def choices(recipe: Recipe, shape: Shape, machine: Hardware) -> Iterator[Choice]:
    """For several numbers of nodes: the smallest ZeRO stage, and the time if rollouts take all their GPUs, too."""
    parallel = recipe.rollout.tensor_parallel or 1
    for nodes in NODES:
        other = changed(recipe, nodes=nodes, ranks=machine.node.gpus)
        stage = smallest_stage(other, shape, machine)
        engines = max(1, nodes * machine.node.gpus // parallel)
        found = times(changed(other, zero_stage=stage) if stage is not None else other, shape, machine, engines)
        yield Choice(
            nodes,
            stage,
            engines,
            found.seconds_per_iteration / 3600,
            found.seconds / 86400,
            found.orchestration,
        )


def advice(recipe: Recipe, shape: Shape, machine: Hardware) -> list[str]:
    """What to change where something does not fit, and what is the least that does."""
    said = []
    stage, now = smallest_stage(recipe, shape, machine), recipe.train
    where = f"{now.nodes} x {now.ranks} GPUs"
    if not trains(recipe, shape, machine):
        fewer = next(
            (
                (nodes, keys)
                for nodes in NODES
                if nodes >= now.nodes
                for keys in _tries(recipe)
                if trains(changed(recipe, nodes=nodes, **keys), shape, machine)
            ),
            None,
        )
        if fewer is None:
            said.append(f"training fits on none of {NODES} nodes: lower rollout.max_new_tokens or set train.lora_rank")
        else:
            nodes, keys = fewer
            settings = " ".join(f"--set train.{key}={value}" for key, value in {"nodes": nodes, **keys}.items())
            said.append(f"training does not fit on {where}; it fits with {settings}")
    elif stage is not None and stage != now.zero_stage:
        said.append(f"training fits on {where} with train.zero_stage {stage}, too, which gathers less")
    elif stage is not None:
        said.append(f"train.zero_stage {stage} is the smallest that fits on {where}")
    parallel = smallest_parallel(recipe, shape, machine)
    asked = recipe.rollout.tensor_parallel or 1
    if parallel is None:
        said.append("the model does not fit on the GPUs of one node for rollouts: lower rollout.max_new_tokens")
    elif parallel > asked:
        said.append(f"rollouts do not fit on {asked} GPUs; they fit with --set rollout.tensor_parallel={parallel}")
    else:
        said.append(f"rollout.tensor_parallel {parallel} is the smallest whose KV cache holds the longest text once")
    return said


def _tries(recipe: Recipe) -> list[dict[str, int | str | bool]]:
    """Other settings of [train] for the same result, what costs least time first."""
    base: dict[str, int | str | bool] = {"engine": "deepspeed", "ranks": max(recipe.train.ranks, 8)}
    stages = range(1 if recipe.train.dtype == "bf16" else 0, 4)
    found: list[dict[str, int | str | bool]] = [{**base, "zero_stage": stage} for stage in stages]
    found += [{**keys, "activation_checkpointing": True} for keys in found]
    return [*found, {**base, "zero_stage": 3, "activation_checkpointing": True, "offload": "cpu"}]
