"""A small world for the training stages: a random policy, some prompts, random responses with verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vapo.recipe import BaseModelSection, Train
from vapo.schemas import REWARDS, ROLLOUTS
from vapo.store import Manifest, read_manifest
from vapo.tables import offsets_of, write_table
from vapo.train.base_model import _build, word_tokenizer, write_tokenizer
from vapo.train.engine import Engine, Reader, engine_of, reader_of
from vapo.train.experience import Rollouts, read_rollouts
from vapo.train.models import Checkpoint, Forward, critic_from_policy, load_critic, load_policy, save_model

WORDS = [f"w{i}" for i in range(17)]  # with three special tokens a vocabulary of 20
PROMPT_LENGTHS = [2, 5, 3, 4]
LENGTHS = [7, 1, 12, 3, 5, 5, 9, 2, 20, 4, 6, 8]  # three responses to each prompt
SECTION = BaseModelSection(hidden_size=16, feed_forward=24, heads=2, layers=2, max_positions=64)


@dataclass
class World:
    """A folder with manifests `policy` and `critic` and tables `rollouts` and `rewards`."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        return self.root / name

    @property
    def objects(self) -> str:
        return str(self.root / "objects-store")

    @property
    def data(self) -> Rollouts:
        return read_rollouts(self.rollouts, self.rewards)

    def reader(self, name: str) -> Reader:
        """A model that is only read."""
        return reader_of(Forward(self.model(name), "critic" if "critic" in name else "policy"), Train())

    def engine(self, name: str, **settings: Any) -> Engine:
        """A model that is trained, in plain torch."""
        settings = {"lr": 1e-2, "weight_decay": 0.1, "warmup_steps": 0, "max_grad_norm": 1.0, **settings}
        return engine_of(Forward(self.model(name), "critic" if "critic" in name else "policy"), Train(), **settings)

    def manifest(self, name: str) -> Manifest:
        return read_manifest(self.root / name, "critic" if "critic" in name else "policy")

    def model(self, name: str) -> Any:
        kind = "critic" if "critic" in name else "policy"
        with Checkpoint(self.root / name, kind) as source:
            return (load_critic if kind == "critic" else load_policy)(source.folder)

    def stored(self) -> dict[str, bytes]:
        """Every object's content in the store that holds the policy."""
        return {p.name: p.read_bytes() for p in Path(self.manifest("policy").store).rglob("*") if p.is_file()}

    def new_policy(self, name: str, seed: int, words: list[str] = WORDS) -> Manifest:
        torch.manual_seed(seed)
        tokenizer = word_tokenizer(words)
        model = _build(SECTION, tokenizer.get_vocab_size(), 1, 0)
        folder = self.root / f"{name}-tokenizer"
        folder.mkdir()
        write_tokenizer(tokenizer, folder)
        return save_model(
            model, self.root / name, kind="policy", store=self.objects, tokenizer=folder, facts={"steps": 0}
        )

    def new_critic(self, name: str, policy: str, seed: int = 0, *, zero: bool = False) -> Manifest:
        """A critic of `policy` with a random head."""
        with Checkpoint(self.root / policy, "policy") as source:
            model: Any = critic_from_policy(source.folder)
            if not zero:
                with torch.no_grad():
                    model.score.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
            return save_model(
                model,
                self.root / name,
                kind="critic",
                store=self.objects,
                tokenizer=source.folder,
                facts={"policy": source.manifest.digest, "steps": 0},
            )

    def write_rollouts(
        self,
        lengths: list[int] = LENGTHS,
        correct: list[bool] | None = None,
        rewards: list[float] | None = None,
        logprobs: list[np.ndarray] | None = None,
        by_prompt: bool = False,
        seed: int = 0,
    ) -> None:
        """Random responses, three to a prompt; `by_prompt`: a prompt's first token decides what is correct."""
        generator = np.random.default_rng(seed)
        prompts = [
            generator.integers(3, 20, PROMPT_LENGTHS[i % len(PROMPT_LENGTHS)]).astype(np.int32)
            for i in range(-(-len(lengths) // 3))
        ]
        of = [i // 3 for i in range(len(lengths))]
        if correct is None:
            correct = [bool(prompts[p][0] % 2) if by_prompt else i % 3 == 0 for i, p in enumerate(of)]
        total, offsets = sum(lengths), offsets_of(lengths)
        ids = [f"1/p{p}/{i % 3}" for i, p in enumerate(of)]
        write_table(
            self.rollouts,
            ROLLOUTS,
            {
                "rollout_id": ids,
                "prompt_id": [f"p{p}" for p in of],
                "sample_index": [i % 3 for i in range(len(of))],
                "seed": list(range(len(of))),
                "prompt_tokens": [prompts[p] for p in of],
                "response_tokens": (generator.integers(1, 20, total).astype(np.int32), offsets),
                "rollout_logprobs": (
                    np.full(total, -3.0, np.float32) if logprobs is None else np.concatenate(logprobs),
                    offsets,
                ),
                "response": [""] * len(of),
                "finish_reason": ["stop"] * len(of),
            },
        )
        write_table(
            self.rewards,
            REWARDS,
            {
                "rollout_id": ids,
                "correct": correct,
                "reward": [1.0 if c else -1.0 for c in correct] if rewards is None else rewards,
                "extracted": [""] * len(of),
                "verdict": [""] * len(of),
            },
        )


@pytest.fixture(scope="package")
def _template(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Made once; the models in it are never changed."""
    world = World(tmp_path_factory.mktemp("world"))
    world.new_policy("policy", 0)
    world.new_critic("critic", "policy")
    world.new_critic("zero_critic", "policy", zero=True)
    world.write_rollouts()
    return world


@pytest.fixture
def world(_template: World, tmp_path: Path) -> World:
    """A world of one's own: manifests and tables are copied, what is saved goes to a store of its own."""
    for name in ("policy", "critic", "zero_critic", "rollouts", "rewards"):
        (tmp_path / name).write_bytes((_template.root / name).read_bytes())
    return World(tmp_path)
