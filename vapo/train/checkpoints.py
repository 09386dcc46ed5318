"""A model under training, from its checkpoint to the next: weights, adapters, and the training state of every rank.

Each rank stores its own files, and rank 0 writes the manifest when all have: a reader sees a whole step or none.
"""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vapo import recipe
from vapo.errors import UserError
from vapo.seeds import derive
from vapo.store import OPTIMIZER, Manifest, StoredFile, save_checkpoint, store_files, write_manifest
from vapo.train.engine import Engine, engine_of
from vapo.train.lora import add_adapters, merged
from vapo.train.models import Checkpoint, Forward, critic_from_policy, load_critic, load_policy, write_model
from vapo.train.ranks import count, rank, told
from vapo.train.state import FACTS, State, state_in, write_facts, write_fragments

WEIGHTS = "weights.safetensors"  # of a part
BASE = f"{OPTIMIZER}base"  # beside an adapter's state: the model that it is added to


class Learner:
    """A policy or critic, its engine, and what of it goes into a checkpoint."""

    def __init__(
        self,
        kind: str,
        source: Checkpoint,
        train: recipe.Train,
        *,
        seed: int,
        new: bool = False,
        part: Path | None = None,
        **settings: Any,
    ) -> None:
        """Load a model, with the training state that lies beside it.

        Args:
            kind: "policy" or "critic".
            seed: of the adapters' first weights, the same on every rank.
            new: a critic is made of the policy in `source`.
            part: what `write_part` left of this model in the middle of this stage: it goes on from there.
            settings: of the optimiser, see `engine_of`.

        Raises:
            UserError: the training state was left with other adapters than [train] asks for.
        """
        state = None if new else state_in(source.folder / OPTIMIZER)
        self.kind, self.source, self.train = kind, source, train
        self.base = base_of(source, train)
        if state is not None and state.facts["lora_rank"] != train.lora_rank:
            raise UserError(
                f"the {kind} was trained with train.lora_rank {state.facts['lora_rank']}, this run sets "
                f"{train.lora_rank}: set it back, or begin anew with the {kind} as base_model.path"
            )
        load = critic_from_policy if new else {"policy": load_policy, "critic": load_critic}[kind]
        self.model: Any = load(self.base)
        if part is not None:
            state = State(part / OPTIMIZER)
            _read_weights(self.model, part / WEIGHTS)
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

    def write_part(self, folder: Path) -> None:
        """Write this rank's files of all that training goes on from; what is not trained lies where it came from."""
        if not self.train.lora_rank:
            weights = self.engine.weights()
            if rank() == 0:
                save_file(
                    {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / WEIGHTS
                )
        self.write_state(folder)

    def write_state(self, folder: Path, **cursor: int) -> None:
        """Write this rank's part of the training state; `cursor` says where the prompts stand (seed, iteration).

        Adapters also want `link_base` before the folder is saved.
        """
        state = folder / OPTIMIZER
        write_fragments(state, self.engine.fragments(weights=self.train.lora_rank > 0), rank(), count())
        if rank() == 0:
            facts = {"steps": self.engine.steps, "ranks": count(), "lora_rank": self.train.lora_rank}
            write_facts(state, **facts, **cursor)

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


def _read_weights(model: nn.Module, path: Path) -> None:
    """Copy weights into a model, if there are any: with adapters their state holds them.

    Into the memory that the model has, not as the model's memory: transformers maps files, where a tensor begins there
    depends on the names before it, and on that, by an ulp, what the CPU makes of it.
    """
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            for name, parameter in model.named_parameters():
                parameter.data.copy_(file.get_tensor(name))


def base_of(source: Checkpoint, train: recipe.Train) -> Path:
    """The folder of the model that is trained, or that the adapters are added to."""
    adapted = train.lora_rank and (source.folder / OPTIMIZER / FACTS).is_file()
    return source.folder / BASE if adapted else source.folder


def link_base(source: Checkpoint, train: recipe.Train, folder: Path) -> None:
    """Put the model that adapters are added to beside their state in rank 0's `folder`; nothing without adapters.

    The files of the model alone; unchanged ones are the objects that the store has.
    """
    if rank() or not train.lora_rank:
        return
    base, target = base_of(source, train), folder / BASE
    shutil.rmtree(target, ignore_errors=True)  # of an execution that was killed since
    target.mkdir(parents=True)
    for path in sorted([base / "config.json", *base.glob("*.safetensors"), *base.glob("*.safetensors.index.json")]):
        (target / path.name).symlink_to(path.resolve())
