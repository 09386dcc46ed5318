"""The PPO-update stage: several optimiser steps of policy and critic on one iteration's experience."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from vapo import recipe
from vapo.progress import Progress
from vapo.schemas import EXPERIENCE, ROLLOUTS
from vapo.seeds import derive
from vapo.tables import check_joined, flat, read_table, rows
from vapo.train.batches import scatter
from vapo.train.checkpoints import Learner, link_base, save
from vapo.train.checks import check_critic, check_fits, memory_advice
from vapo.train.engine import Reader, reader_of
from vapo.train.experience import Rollouts, named, read_rollouts
from vapo.train.mini_batch import SUMS, Experience, accumulate_policy, accumulate_value, mini_batches
from vapo.train.models import Checkpoint, Forward, load_policy
from vapo.train.parts import Part, Parts
from vapo.train.ranks import add_up, rank, together

LOGPROBS = "logprobs"  # tensors of a part: the old ones, and the reference's


def ppo_update(
    section: recipe.PpoUpdate,
    *,
    rollouts: Path,
    rewards: Path,
    experience: Path,
    policy: Path,
    reference: Path,
    new_policy: Path,
    critic: Path | None = None,
    new_critic: Path | None = None,
    partial: Path | None = None,
    iteration: int,
    seed: int,
    store: str,
) -> dict[str, float | None]:
    """Write the next policy and critic with their training states; returns the losses and diagnostics.

    The actor takes all its steps before the critic is loaded: neither reads the other, so the result is that of
    taking turns, and only one of them is in memory. Nothing is stored before both are done.

    Args:
        reference: the policy that the KL term keeps near; read only if kl_coef > 0.
        critic: None where advantages need none (then there is no `new_critic`).
        partial: a folder for parts of the work, and where some may be already: then it goes on from the last one.

    Raises:
        UserError: the critic belongs to another policy or tokenizer, a text is too long for the models, a loss or
            gradient is not finite, or memory is out.
    """
    data = read_rollouts(rollouts, rewards)
    table = read_table(experience, EXPERIENCE)
    check_joined(experience, table, read_table(rollouts, ROLLOUTS))
    trained = flat(table, "trained")
    generator = np.random.default_rng(derive(seed, "ppo_update", iteration))
    orders = [np.flatnonzero(trained)[generator.permutation(int(trained.sum()))] for _ in range(section.epochs)]
    epochs = [mini_batches(order, section.mini_batch) for order in orders]
    parts = Parts(partial, section.train.part_seconds)
    steps = _Steps(section, data, trained, table, epochs, parts, {"seed": seed, "iteration": iteration})
    with ExitStack() as stack:
        stack.enter_context(memory_advice("ppo_update", section))
        actor_source, critic_source = stack.enter_context(Checkpoint(policy, "policy")), None
        if critic is not None:
            critic_source = stack.enter_context(Checkpoint(critic, "critic"))
            check_critic(actor_source, critic_source)
            check_fits(data, critic_source)
        check_fits(data, actor_source)
        actor = parts.kept("policy") or _actor(steps, actor_source, reference)
        known = _unpacked(actor.tensors(LOGPROBS))
        value_model = None
        if critic_source is not None:
            value_model = parts.kept("critic") or _critic(steps, critic_source, known)
        facts: dict[str, Any] = {"steps": actor.facts["steps"], "parent": actor_source.manifest.digest}
        link_base(actor_source, section.train, _own(actor.folder))
        saved = save(_own(actor.folder), new_policy, kind="policy", store=store, facts=facts)
        if critic_source is not None and value_model is not None:
            assert new_critic is not None
            facts = {"steps": value_model.facts["steps"], "policy": saved.digest}
            link_base(critic_source, section.train, _own(value_model.folder))
            save(_own(value_model.folder), new_critic, kind="critic", store=store, facts=facts)
    total, count = actor.facts["sums"], sum(map(len, epochs))
    if value_model is not None:
        total["value_loss"] = value_model.facts["sums"]["value_loss"]
    metrics = {
        **_means(section, total, count, has_critic=critic is not None),
        "actor_grad_norm": actor.facts["norms"] / count,
        "critic_grad_norm": value_model.facts["norms"] / count if value_model is not None else None,
        "padding_share": 1.0 - total["real_positions"] / total["positions"],
        "steps": actor.facts["steps"],
    }
    gap = np.abs(np.concatenate([known["old"][r] - data.logprobs[r] for r in np.flatnonzero(trained)]))
    return {**metrics, "logprob_gap_mean": float(gap.mean()), "logprob_gap_max": float(gap.max())}


@dataclass(frozen=True)
class _Steps:
    """What both models' steps are made of."""

    section: recipe.PpoUpdate
    data: Rollouts
    trained: np.ndarray
    table: pa.Table
    epochs: Sequence[Sequence[np.ndarray]]
    parts: Parts
    cursor: dict[str, int]  # where the prompts stand: seed, iteration

    def learner(self, kind: str, source: Checkpoint, lr: float) -> tuple[Learner, Part | None]:
        """A model as it came in, or as the last part has it, and that part."""
        found = self.parts.found
        part = found if found is not None and found.facts["kind"] == kind else None
        folder = part.folder if part is not None else None
        settings = {name: getattr(self.section, name) for name in ("weight_decay", "warmup_steps", "max_grad_norm")}
        train, seed = self.section.train, self.cursor["seed"]
        return Learner(kind, source, train, seed=seed, part=folder, lr=lr, **settings), part

    def take(
        self,
        accumulate: Callable[..., None],
        learner: Learner,
        part: Part | None,
        logprobs: dict[str, list[np.ndarray]],
    ) -> Part:
        """Take all steps, or those after a part; then the model and its training state are kept, and it is closed.

        Args:
            logprobs: "old", and "reference" where there is one.

        Returns:
            What was kept, with sums over all steps and ranks, and of the gradients' norms, among its facts.
        """
        advantages, targets, values = (rows(self.table, name) for name in ("advantages", "value_targets", "values"))
        old, at_reference = logprobs["old"], logprobs.get("reference")
        batch = Experience(self.data, self.trained, advantages, targets, values, old, at_reference)
        total, norms, begin = dict.fromkeys(SUMS, 0.0), 0.0, 0
        if part is not None:
            total, norms, begin = part.facts["sums"], part.facts["norms"], part.facts["step"]
        tensors = {LOGPROBS: _packed(logprobs) if learner.kind == "policy" else {}}
        chosen_rows = [chosen for epoch in self.epochs for chosen in epoch]
        progress = Progress("optimiser steps", len(chosen_rows))
        for step, chosen in enumerate(chosen_rows[begin:], start=begin + 1):
            accumulate(self.section, learner.engine, batch, chosen, step, total)
            norms += learner.engine.step(batch=named(self.data, chosen))
            entropy = total["entropy"] / total["tokens"] if total["tokens"] else None
            progress(step, int(self.data.lengths[chosen].sum()), entropy=entropy)
            facts = {"kind": learner.kind, "step": step, "sums": total, "norms": norms}
            self.parts.add(learner.write_part, facts, tensors)

        def write(folder: Path) -> None:
            learner.write(_own(folder))
            learner.write_state(_own(folder), **self.cursor)

        facts = {"sums": add_up(total), "norms": norms, "steps": learner.engine.steps}
        kept = self.parts.keep(learner.kind, write, facts, tensors)
        learner.close()
        return kept


def _actor(steps: _Steps, source: Checkpoint, reference: Path) -> Part:
    """The policy after its steps; the reference has left memory before it comes."""
    section, first = steps.section, steps.epochs[0]
    known = {}
    if steps.parts.found is not None:
        known = _unpacked(steps.parts.found.tensors(LOGPROBS))
    elif section.kl_coef > 0:
        known = {"reference": _reference_logprobs(section, reference, steps.data, first)}
    learner, part = steps.learner("policy", source, section.actor_lr)
    if part is None:
        known["old"] = logprobs_of(learner.engine, steps.data, first, section.token_budget)
    return steps.take(accumulate_policy, learner, part, known)


def _critic(steps: _Steps, source: Checkpoint, logprobs: dict[str, list[np.ndarray]]) -> Part:
    """The critic after its steps."""
    learner, part = steps.learner("critic", source, steps.section.critic_lr)
    return steps.take(accumulate_value, learner, part, logprobs)


def _own(folder: Path) -> Path:
    """This rank's checkpoint among those that the ranks keep: each stores its own files."""
    own = folder / f"rank-{rank():05d}"
    own.mkdir(exist_ok=True)
    return own


def _packed(logprobs: dict[str, list[np.ndarray]]) -> dict[str, Tensor]:
    """Ragged lists as tensors: by name the values, one row after the other, and how many each has."""
    flat_ = {name: torch.from_numpy(np.concatenate(of_rows)) for name, of_rows in logprobs.items()}
    lengths = {f"{name}/lengths": torch.tensor([len(row) for row in of_rows]) for name, of_rows in logprobs.items()}
    return flat_ | lengths


def _unpacked(tensors: dict[str, Tensor]) -> dict[str, list[np.ndarray]]:
    """What `_packed` packed."""
    return {
        name: np.split(tensor.numpy(), np.cumsum(tensors[f"{name}/lengths"].numpy())[:-1])
        for name, tensor in tensors.items()
        if not name.endswith("/lengths")
    }


@torch.no_grad()
def logprobs_of(policy: Reader, data: Rollouts, parts: Sequence[np.ndarray], token_budget: int) -> list[np.ndarray]:
    """A model's logprobs of the responses: B x [T_i], empty for rows that are in none of the `parts`.

    Given the mini-batches of the first epoch, each is cut as the update cuts it, and each rank takes what it takes in
    the update: then the forward passes are the same, and the first step's ratio is 1 to the last bit.
    """
    out = [np.empty(0, np.float32)] * len(data)
    for part in parts:
        for turn in policy.turns(data.prompts, data.responses, part, token_budget):
            logprobs = policy(turn)[0]
            if turn.counts:
                scatter(logprobs, turn.batch, data.lengths, out)
    return together(out, data.lengths)


def _reference_logprobs(
    section: recipe.PpoUpdate, reference: Path, data: Rollouts, parts: Sequence[np.ndarray]
) -> list[np.ndarray]:
    with Checkpoint(reference, "policy", state=False) as source:
        model = reader_of(Forward(load_policy(source.folder), "policy"), section.train)
        found = logprobs_of(model, data, parts, section.token_budget)
        model.close()
        return found


def _means(section: recipe.PpoUpdate, total: dict[str, float], steps: int, *, has_critic: bool) -> dict[str, float]:
    """Means over steps or tokens."""
    wanted = {
        "value_loss": has_critic,
        "kl_loss": section.kl_coef > 0,
        "dual_clip_fraction": section.dual_clip > 0,
        "importance_weight": section.importance_cap > 0,
        "importance_truncated": section.importance_cap > 0,
    }
    per_step = ("policy_loss", "positive_lm_loss", "value_loss", "kl_loss")
    per_token = (
        *("entropy", "approx_kl", "clip_fraction_low", "clip_fraction_high", "dual_clip_fraction"),
        *("importance_weight", "importance_truncated"),
    )
    return {
        **{name: total[name] / steps for name in per_step if wanted.get(name, True)},
        **{name: total[name] / total["tokens"] for name in per_token if wanted.get(name, True)},
    }
