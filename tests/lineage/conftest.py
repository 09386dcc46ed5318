"""A small lineage with real records: problems, a checkpoint made from them, an update of it, and a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from vapo.lineage.graph import Node, node_at
from vapo.lineage.record import write_record
from vapo.store import save_checkpoint, sha256_of


@dataclass
class Made:
    """Tasks of a run by name, in RUN/TASK folders below `root`."""

    root: Path
    store: Path

    def task(self, name: str, inputs: Mapping[str, str], *, started: float, **parameters: int | str) -> Node:
        """A task whose outputs are in its folder already; inputs are "TASK/OUTPUT", by their name here."""
        folder = self.root / "run" / name
        written = {p.name: p for p in folder.iterdir()}
        write_record(
            folder,
            stage=name.split("--")[-1].rstrip("-0123456789").replace("-", "_"),
            parameters=parameters,
            section={"key": name},
            inputs={n: self._source(place) for n, place in inputs.items()},
            outputs={
                n: {"path": str(p), "uri": p.as_uri(), "sha256": sha256_of(p), "bytes": p.stat().st_size}
                for n, p in written.items()
            },
            metrics={"count": 1.0},
            image="image@sha256:01",
            started=started,
            ended=started + 1,
            seconds=0.5,
        )
        return node_at(folder)

    def _source(self, place: str) -> dict[str, str]:
        path = self.root / "run" / place
        maker = path.parent / "record.json"
        record = sha256_of(maker) if maker.is_file() else ""
        return {"path": str(path), "uri": path.as_uri(), "sha256": sha256_of(path), "record": record}

    def write(self, place: str, text: str) -> Path:
        path = self.root / "run" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def checkpoint(self, place: str, weights: str) -> None:
        folder = self.root.parent / "weights" / place
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(weights)
        (folder / "tokenizer.json").write_text("same in all")
        manifest = self.root / "run" / place
        manifest.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(folder, manifest, store=str(self.store), kind="policy", facts={})


@pytest.fixture
def made(tmp_path: Path) -> Made:
    found = Made(tmp_path / "artifacts", tmp_path / "store")
    found.write("problems/prompts", "1 + 1")
    found.task("problems", {}, started=1.0, seed=3)
    found.checkpoint("base-model/policy", "first")
    found.task("base-model", {"examples": "problems/prompts"}, started=2.0, seed=3)
    found.write("iteration--rollout/rollouts", "2 3 2")
    sampled = {"prompts": "problems/prompts", "policy": "base-model/policy"}
    found.task("iteration--rollout", sampled, started=3.0, seed=3, iteration=1, purpose="training")
    found.checkpoint("iteration--ppo-update/new_policy", "second")
    update = {"rollouts": "iteration--rollout/rollouts", "policy": "base-model/policy"}
    found.task("iteration--ppo-update", update, started=4.0, seed=3, iteration=1)
    found.write("report/page", "<html>")
    found.task("report", {"policy": "iteration--ppo-update/new_policy"}, started=5.0)
    found.write("other/prompts", "not of this lineage")
    found.task("other", {}, started=6.0)
    return found
