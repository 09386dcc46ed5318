"""A model under training, from its checkpoint to the next: weights, adapters, and the training state of every rank.

Each rank stores its own files, and rank 0 writes the manifest when all have: a reader sees a whole step or none.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from torch import Tensor

from vapo import recipe
from vapo.errors import UserError
from vapo.seeds import derive
from vapo.store import OPTIMIZER, Manifest, StoredFile, save_checkpoint, store_files, write_manifest
from vapo.train.engine import Engine, engine_of
from vapo.train.lora import add_adapters, merged
from vapo.train.models import Checkpoint, Forward, critic_from_policy, load_critic, load_policy, write_model
from vapo.train.ranks import count, rank, told
from vapo.train.state import state_in, write_facts, write_fragments

BASE = f"{OPTIMIZER}base"  # beside an adapter's state: the model that it is added to


class Learner:
    """A policy or critic, its engine, and what of it goes into a checkpoint."""

    def __init__(
        self, kind: str, source: Checkpoint, train: recipe.Train, *, seed: int, new: bool = False, **settings: Any
    ) -> None:
        """Load a model, with the training state that lies beside it.

        Args:
            kind: "policy" or "critic".
            seed: of the adapters' first weights, the same on every rank.
            new: a critic is made of the policy in `source`.
            settings: of the optimiser, see `engine_of`.

        Raises:
            UserError: the training state was left with other adapters than [train] asks for.
        """
        state = None if new else state_in(source.folder / OPTIMIZER)
        self.kind, self.source, self.train = kind, source, train
        self.base = source.folder
        if train.lora_rank and state is not None:
            self.base = source.folder / BASE
        if state is not None and state.facts["lora_rank"] != train.lora_rank:
            raise UserError(
                f"the {kind} was trained with train.lora_rank {state.facts['lora_rank']}, this run sets "
                f"{train.lora_rank}: set it back, or begin anew with the {kind} as base_model.path"
            )
        load = critic_from_policy if new else {"policy": load_policy, "critic": load_critic}[kind]
        self.model: Any = load(self.base)
        if train.lora_rank:
            add_adapters(self.model, train, derive(seed, "lora", kind))
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad and state is not None:
                    whole = state.read(name, "weight", 0, parameter.numel())
                    parameter.data.copy_(whole.view_as(parameter))
        self.engine: Engine = engine_of(Forward(self.model, kind), train, **settings)
        if state is not None:
            self.engine.restore(state)

    def weights(self) -> dict[str, Tensor]:
        """The plain model's weights, adapters merged, on rank 0; nothing on the others."""
        weights = self.engine.weights()
        return merged(weights, self.train) if self.train.lora_rank else weights

    def write(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write the model in Hugging Face layout into rank 0's `folder`; `weights`: instead of the present ones."""
        weights = self.weights() if weights is None else weights
        if rank() == 0:
            write_model(self.model, folder, weights=weights, tokenizer=self.source.folder)

    def write_state(self, folder: Path, **cursor: int) -> None:
        """Write this rank's part of the training state; `cursor` says where the prompts stand (seed, iteration)."""
        state = folder / OPTIMIZER
        write_fragments(state, self.engine.fragments(weights=self.train.lora_rank > 0), rank(), count())
        if rank() == 0:
            facts = {"steps": self.engine.steps, "ranks": count(), "lora_rank": self.train.lora_rank}
            write_facts(state, **facts, **cursor)
            if self.train.lora_rank:
                _link(self.base, folder / BASE)

    def close(self) -> None:
        """Give the memory back."""
        self.engine.close()
        del self.model, self.engine
        gc.collect()


def save(folder: Path, manifest: Path, *, kind: str, store: str, facts: dict[str, Any]) -> Manifest:
    """Put every rank's `folder` into the store; then rank 0 writes the manifest. Returns it on every rank."""
    if count() == 1:
        return save_checkpoint(folder, manifest, store=store, kind=kind, facts=facts)
    own = [vars(file) for file in store_files(folder, store)]
    files = tuple(StoredFile(**file) for files in told(own) for file in files)
    if rank() == 0:
        write_manifest(manifest, kind, store, files, facts)
    told("written")  # nobody goes on before it is there
    return Manifest(kind, store, files, facts)


def _link(base: Path, target: Path) -> None:
    """The files of a model alone; unchanged ones are the objects that the store has."""
    target.mkdir(parents=True)
    for path in sorted([base / "config.json", *base.glob("*.safetensors"), *base.glob("*.safetensors.index.json")]):
        (target / path.name).symlink_to(path.resolve())
