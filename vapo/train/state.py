"""Training state as files: fragments of every parameter's moments, one safetensors file for each rank that holds some.

A fragment says whose flat tensor it is a part of and where it begins, so any number of ranks reads what any other
number wrote. Keys: "exp_avg" and "exp_avg_sq" (AdamW's moments), and "weight" where the model's own files do not hold
the float32 weight (adapters, bfloat16 models).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vapo.errors import UserError

FACTS = "state.json"


@dataclass(frozen=True)
class Fragment:
    """A rank's part of one parameter's state, say ("lm_head.weight", 320, {"exp_avg": [320], "exp_avg_sq": [320]})."""

    name: str
    start: int  # of the flat parameter
    tensors: dict[str, Tensor]  # key -> [n]


def write_fragments(folder: Path, fragments: Iterable[Fragment], rank: int, ranks: int) -> None:
    """Write this rank's fragments into `folder`; nothing if it holds none."""
    tensors, starts = {}, {}
    for fragment in fragments:
        starts[fragment.name] = fragment.start
        for key, tensor in fragment.tensors.items():
            tensors[f"{fragment.name}/{key}"] = tensor.detach().cpu().contiguous()
    if tensors:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{rank:05d}-of-{ranks:05d}.safetensors"
        save_file(tensors, path, metadata={"starts": json.dumps(starts, sort_keys=True)})


def write_facts(folder: Path, **facts: Any) -> None:
    """Write what is the same for all ranks: steps, where the prompts stand (seed, iteration), what was trained."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FACTS).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")


class State:
    """The training state in a folder, whoever wrote it."""

    def __init__(self, folder: Path) -> None:
        self.facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        self._parts: dict[str, list[tuple[int, Any]]] = {}  # name/key -> where a part begins, and its open file
        for path in sorted(folder.glob("rank-*.safetensors")):
            file = safe_open(path, framework="pt")
            starts = json.loads(file.metadata()["starts"])
            for entry in file.keys():  # noqa: SIM118 - not a dictionary
                start = starts[entry.rpartition("/")[0]]
                self._parts.setdefault(entry, []).append((start, file))

    @property
    def names(self) -> set[str]:
        """The parameters that it is the state of."""
        return {entry.rpartition("/")[0] for entry in self._parts}

    def __contains__(self, entry: str) -> bool:
        return entry in self._parts

    def read(self, name: str, key: str, start: int, count: int) -> Tensor:
        """Elements start to start + count of a parameter's flat state: [count] float32.

        Raises:
            UserError: some of them are in no file.
        """
        entry, found, have = f"{name}/{key}", torch.empty(count), 0
        for begin, file in self._parts.get(entry, []):
            part = file.get_slice(entry)
            low, high = max(start, begin), min(start + count, begin + part.get_shape()[0])
            if low < high:
                found[low - start : high - start] = part[low - begin : high - begin]
                have += high - low
        if have != count:
            raise UserError(
                f"the training state is incomplete: {entry} has {have} of {count} elements from {start} on: go on from "
                "an earlier checkpoint"
            )
        return found


def state_in(folder: Path) -> State | None:
    """The training state in a folder, or None where there is none: a fresh start."""
    return State(folder) if (folder / FACTS).is_file() else None
