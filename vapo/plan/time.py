"""How long an iteration and a run take on GPUs, and how much of it is orchestration rather than work.

Orchestration is all that a single long-lived process would not do at every step: pods and their programs start, models
are loaded, artifacts go to the store and come back, digests are computed. Stages of an iteration follow one another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from vapo.plan.hardware import Hardware
from vapo.plan.models import Shape
from vapo.plan.store import checkpoint, tables
from vapo.plan.throughput import Lengths, Passes, Sampling, lengths_of, sampling, through
from vapo.recipe import Recipe, Rollout

FILES_AT_ONCE = 3  # vapo/store/checkpoints.py


@dataclass(frozen=True)
class Stage:
    """One execution of a stage, in seconds."""

    name: str
    times: int  # in the whole run
    gpus: int
    work: float
    start: float = 0.0  # pods and programs
    load: float = 0.0  # models from the disk into memory, engines
    transfer: float = 0.0  # to and from the store, with digests
    facts: dict[str, float | str] = field(default_factory=dict)

    @property
    def orchestration(self) -> float:
        """All but the work."""
        return self.start + self.load + self.transfer

    @property
    def seconds(self) -> float:
        """From its turn to its end."""
        return self.work + self.orchestration

    @property
    def gpu_hours(self) -> float:
        """Of the whole run: its GPUs are held from start to end."""
        return self.times * self.gpus * self.seconds / 3600


@dataclass(frozen=True)
class Times:
    """Every stage of a run by what it belongs to."""

    iteration: list[Stage]
    evaluation: list[Stage]
    pretraining: list[Stage]
    once: list[Stage]

    @property
    def all(self) -> list[Stage]:
        """Every stage."""
        return [*self.once, *self.pretraining, *self.iteration, *self.evaluation]

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(stage.times * stage.seconds for stage in self.all)

    @property
    def seconds_per_iteration(self) -> float:
        """Without evaluations."""
        return sum(stage.seconds for stage in self.iteration)

    @property
    def orchestration(self) -> float:
        """Its share of the whole run's time."""
        return sum(stage.times * stage.orchestration for stage in self.all) / self.seconds


def times(recipe: Recipe, shape: Shape, machine: Hardware, engines: int = 0) -> Times:
    """The estimate for a recipe whose rollouts and training run on GPUs.

    Args:
        engines: that sample at the same time; 0: rollout.shards.
    """
    found = _Estimate(recipe, shape, machine, engines)
    n, rollout = recipe.iterations, recipe.rollout
    rows = rollout.prompts * rollout.samples * rollout.draws
    lengths = lengths_of(rollout, machine)
    updates = [
        *found.sampled("rollout", rollout, rows, n),
        *found.critic_values(rows, n, lengths),
        found.update(rows, n, lengths),
        found.light("history", n),
    ]
    evaluations = len(range(0, n, recipe.evaluation.every)) + 1
    measured = recipe.rollout_for_evaluation()
    evaluation = [
        *found.sampled("evaluation rollout", measured, measured.prompts * measured.samples, evaluations),
        found.light("evaluation", evaluations),
        found.light("evaluation history", evaluations),
    ]
    pretraining = []
    if recipe.has_critic:
        first = recipe.rollout_for_value_pretraining()
        pretraining = [
            *found.sampled("pretraining rollout", first, first.prompts * first.samples, 1),
            found.value_pretraining(lengths),
        ]
    once = [found.light(name, 1) for name in ("problems", "report")] + [found.base_model()]
    return Times(updates, evaluation, pretraining, once)


class _Estimate:
    """What the stages share: recipe, shape, machine."""

    def __init__(self, recipe: Recipe, shape: Shape, machine: Hardware, engines: int) -> None:
        self.engines = engines or recipe.rollout.shards
        self.recipe, self.shape, self.machine, self.train = recipe, shape, machine, recipe.train
        self.gpus = recipe.train.ranks * recipe.train.nodes
        self.per_node = min(recipe.train.ranks, machine.node.gpus)

    def sampled(self, name: str, section: Rollout, rows: int, count: int) -> list[Stage]:
        """A rollout, its shards at the same time, and its verification."""
        m, size = self.machine, 4 if section.dtype == "float32" else 2
        parallel, shards = section.tensor_parallel or 1, self.engines
        lengths = lengths_of(section, m)
        share = math.ceil(rows / shards)
        work: Sampling = sampling(self.shape, section, m, rows=share, lengths=lengths, tensor_parallel=parallel)
        model = self.shape.parameters() * size
        neighbours = min(shards, max(1, m.node.gpus // parallel))  # engines that share a node's adapter and disk
        table = tables(rows, lengths, m.lengths.text)
        facts: dict[str, float | str] = {
            "tokens/s": rows * lengths.mean / work.seconds,
            "together": work.together,
            "bound": work.bound,
            "waiting for the longest": work.tail / work.seconds,
        }
        rollout = Stage(
            name,
            count,
            parallel * shards,
            work.seconds,
            m.cluster.task + m.cluster.program,
            neighbours * model / m.node.disk + m.cluster.engine,
            neighbours * model / m.node.store
            + model / (FILES_AT_ONCE * m.core.hash)
            + table.rollouts / shards * (1 / m.node.store + 1 / m.core.hash),
            facts,
        )
        graded = Stage(
            "verification" if name == "rollout" else name.replace("rollout", "verification"),
            count,
            0,
            rows / m.core.rows,
            m.cluster.task,
            transfer=table.rollouts * (1 / m.node.store + 1 / m.core.hash),
        )
        return [rollout, graded]

    def critic_values(self, rows: int, count: int, lengths: Lengths) -> list[Stage]:
        """The advantages stage: the critic's forward pass on the ranks of one node."""
        if not self.recipe.has_critic:
            return [self.light("advantages", count)]
        budget = self.recipe.advantages.token_budget
        work = self._through("critic", rows, rows, lengths, budget, gpus=self.train.ranks, reads=1)
        saved, table = checkpoint(self.shape, "critic", self.train), tables(rows, lengths, self.machine.lengths.text)
        m = self.machine
        transfer = self._read(saved.model, saved.model) + table.total * (1 / m.node.store + 1 / m.core.hash)
        start = m.cluster.task + m.cluster.program
        return [
            Stage(
                "advantages",
                count,
                self.train.ranks,
                work.seconds,
                start,
                saved.model / m.core.load,
                transfer,
                self._facts(work, self.train.ranks),
            )
        ]

    def update(self, rows: int, count: int, lengths: Lengths) -> Stage:
        """The PPO update: old logprobs and the policy's steps, then the critic's; checkpoints in and out."""
        section = self.recipe.ppo_update
        rows = self.recipe.advantages.keep_groups * self.recipe.rollout.samples or rows
        kinds = {"policy": (1, section.epochs)} | ({"critic": (0, section.epochs)} if self.recipe.has_critic else {})
        parts = {
            kind: self._through(
                kind,
                rows,
                section.mini_batch,
                lengths,
                section.token_budget,
                gpus=self.gpus,
                reads=reads,
                learns=learns,
            )
            for kind, (reads, learns) in kinds.items()
        }
        if section.kl_coef:
            parts["reference"] = self._through(
                "policy", rows, section.mini_batch, lengths, section.token_budget, gpus=self.gpus, reads=1
            )
        load, transfer = self._tables_in(rows, lengths)
        for kind in kinds:
            a, b = self._in(kind)
            load, transfer = load + a, transfer + b + self._out(kind)
        work = sum(part.seconds for part in parts.values())
        together = Passes(
            work,
            sum(part.flops for part in parts.values()),
            sum(part.model_flops for part in parts.values()),
            sum(part.communication for part in parts.values()),
        )
        return Stage(
            "ppo_update", count, self.gpus, work, self._job(), load, transfer, self._facts(together, self.gpus)
        )

    def value_pretraining(self, lengths: Lengths) -> Stage:
        """Reward-model steps, pretraining steps, and a forward pass over the held-out rows at each measurement."""
        s = self.recipe.value_pretraining
        rows = s.prompts * s.samples
        steps = (s.reward_model_steps if s.init == "reward_model" else 0) + s.max_steps
        mini_batch = min(s.mini_batch, rows)
        learned = self._through(
            "critic", steps * mini_batch, mini_batch, lengths, s.token_budget, gpus=self.gpus, learns=1
        )
        heldout = max(1, round(s.heldout_share * rows))
        measured = s.max_steps // s.measure_every + 1
        read = self._through("critic", measured * heldout, heldout, lengths, s.token_budget, gpus=self.gpus, reads=1)
        load, transfer = self._tables_in(rows, lengths)
        model = checkpoint(self.shape, "policy", self.train).model
        return Stage(
            "value_pretraining",
            1,
            self.gpus,
            learned.seconds + read.seconds,
            self._job(),
            load + model / self.machine.core.load,
            transfer + self._read(model, model) + self._written(model),
            self._facts(learned, self.gpus),
        )

    def base_model(self) -> Stage:
        """A checkpoint goes from a folder into the store."""
        m, model = self.machine, self.shape.parameters() * 2
        work = model / m.node.disk
        return Stage("base_model", 1, 0, work, m.cluster.task, transfer=model / m.node.store + model / m.core.hash / 3)

    def light(self, name: str, count: int) -> Stage:
        """A stage that does next to nothing."""
        return Stage(name, count, 0, 1.0, self.machine.cluster.task)

    def _through(
        self,
        kind: str,
        rows: int,
        mini_batch: int,
        lengths: Lengths,
        budget: int,
        *,
        gpus: int,
        reads: int = 0,
        learns: int = 0,
    ) -> Passes:
        return through(
            self.shape,
            kind,
            self.train,
            self.machine,
            gpus=gpus,
            rows=rows,
            mini_batch=mini_batch,
            lengths=lengths,
            budget=budget,
            reads=reads,
            learns=learns,
        )

    def _facts(self, work: Passes, gpus: int) -> dict[str, float | str]:
        peak = gpus * work.seconds * self.machine.gpu.bf16_flops
        return {
            "model FLOP utilisation": work.model_flops / peak,
            "communication": work.communication / work.seconds,
            "bound": "network" if work.communication >= work.seconds * 0.999 else "compute",
        }

    def _job(self) -> float:
        c = self.machine.cluster
        return float(c.task + c.program + (c.train_job if self.train.nodes > 1 else 0))

    def _tables_in(self, rows: int, lengths: Lengths) -> tuple[float, float]:
        m = self.machine
        found = tables(rows, lengths, m.lengths.text).total
        return 0.0, found * (1 / m.node.store + 1 / m.core.hash)

    def _in(self, kind: str) -> tuple[float, float]:
        """(load, transfer) of a model with its training state; every node fetches what its ranks open."""
        saved = checkpoint(self.shape, kind, self.train)
        node, rank = state_read(saved.state, self.train.ranks, self.train.nodes)
        return saved.model / self.machine.core.load, self._read(saved.model + node, saved.model + rank)

    def _out(self, kind: str) -> float:
        saved = checkpoint(self.shape, kind, self.train)
        of_node = saved.state / self.train.nodes
        return self._written(saved.model) + self._written(of_node, hashed=of_node / self.per_node)

    def _read(self, node: float, rank: float) -> float:
        """Seconds until a node has its bytes and every rank has computed the digests of those that it opens."""
        m = self.machine
        return node / m.node.store + rank / (FILES_AT_ONCE * m.core.hash)

    def _written(self, size: float, hashed: float = 0.0) -> float:
        """Seconds from memory to disk, through sha256, into the store."""
        m = self.machine
        return size / m.node.disk + (hashed or size / FILES_AT_ONCE) / m.core.hash + size / m.node.store


def state_read(state: float, ranks: int, nodes: int) -> tuple[float, float]:
    """Bytes of training state that (a node fetches, a rank opens): all of it, whichever rank wrote it."""
    del ranks, nodes
    return state, state
