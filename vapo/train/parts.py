"""A training stage on its way: parts of its state, of which the last whole one is where a killed stage goes on.

A part is a folder that is written beside and renamed when every rank's files are in it and on disk: it is whole or not
there, and the one before it is removed afterwards. It holds the model with its training state, as a checkpoint does,
and for each rank what its loop knows, as JSON. All ranks see the same folder, so they are on one node.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from vapo.progress import emit
from vapo.train.ranks import rank, told

FACTS = "facts-{rank:05d}.json"
TENSORS = "tensors-{name}.safetensors"
NONE: Mapping[str, dict[str, Tensor]] = {}


@dataclass(frozen=True)
class Part:
    """What a part holds for this rank."""

    folder: Path
    facts: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors that rank 0 left under this name; none if it left none."""
        path = self.folder / TENSORS.format(name=name)
        return load_file(path) if path.is_file() else {}


class Parts:
    """The parts of one execution of a stage, and what is left of those of a killed one before it."""

    def __init__(self, folder: Path | None, seconds: float) -> None:
        """Find what is there.

        Args:
            folder: outlives executions and belongs to this work alone, see vapo.partial; None: nothing outlives.
            seconds: of work between two parts; 0: none are made, and none are found.
        """
        self._scratch = None
        self.lasting = folder is not None and seconds > 0
        if folder is None or not self.lasting:
            self._scratch = tempfile.TemporaryDirectory()  # of this rank alone
            folder = Path(self._scratch.name)
        self.folder, self.seconds = folder, seconds
        numbers = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if self.lasting else []
        self.number = max(numbers, default=0)
        self.found = self._part(_named(self.number)) if numbers else None  # the last whole part
        if self.found is not None:
            emit("resumed", part=self.number, step=self.found.facts["step"])
        self._begun = time.monotonic()

    def kept(self, name: str) -> Part | None:
        """What `keep` left under this name."""
        return self._part(name) if (self.folder / name).is_dir() else None

    def add(
        self, fill: Callable[[Path], None], facts: dict[str, Any], tensors: Mapping[str, dict[str, Tensor]] = NONE
    ) -> None:
        """Leave a part if it is time; every rank calls this at the same point, and rank 0 says whether it is.

        Args:
            fill: writes this rank's files of the model and its training state into a folder.
            facts: what the loop knows, as JSON takes it, the steps done as "step" among it.
            tensors: what else there is to keep, by name; rank 0's.
        """
        if not self.lasting or not told(time.monotonic() - self._begun >= self.seconds)[0]:
            return
        name = _named(self.number + 1)
        self._put(name, fill, facts, tensors)
        self.number += 1
        self._forget_all_but(name)
        emit("part", number=self.number, seconds=round(time.monotonic() - self._begun, 3))
        self._begun = time.monotonic()

    def keep(
        self, name: str, fill: Callable[[Path], None], facts: dict[str, Any], tensors: Mapping[str, dict[str, Tensor]]
    ) -> Part:
        """Leave what is done for good under a name of its own, and remove the parts that led to it. See `add`."""
        self._put(name, fill, facts, tensors)
        self._forget_all_but("")
        return self._part(name)

    def _put(
        self, name: str, fill: Callable[[Path], None], facts: dict[str, Any], tensors: Mapping[str, dict[str, Tensor]]
    ) -> None:
        beside, leads = self.folder / f"{name}.new", rank() == 0 or not self.lasting
        if leads:
            shutil.rmtree(beside, ignore_errors=True)  # of an execution that was killed in the middle
            beside.mkdir()
        self._all("begin")
        fill(beside)
        for label, group in tensors.items() if leads else ():
            save_file({key: tensor.contiguous() for key, tensor in group.items()}, beside / TENSORS.format(name=label))
        (beside / FACTS.format(rank=rank())).write_text(json.dumps(facts) + "\n", encoding="utf-8")
        self._all("written")
        if leads:
            if self.lasting:
                _flush(beside, *beside.rglob("*"))
            beside.rename(self.folder / name)
            if self.lasting:
                _flush(self.folder)
        self._all("there")

    def _all(self, word: str) -> None:
        """Wait for the other ranks, where they share the folder."""
        if self.lasting:
            told(word)

    def _part(self, name: str) -> Part:
        folder = self.folder / name
        return Part(folder, json.loads((folder / FACTS.format(rank=rank())).read_text(encoding="utf-8")))

    def _forget_all_but(self, name: str) -> None:
        if rank() == 0 and self.lasting:
            for path in self.folder.iterdir():
                if path.name.removesuffix(".new").isdecimal() and path.name != name:
                    shutil.rmtree(path)


def state_of(generator: np.random.Generator) -> dict[str, Any]:
    """Where a generator stands, as JSON takes it."""
    return dict(generator.bit_generator.state)


def set_state(generator: np.random.Generator, state: dict[str, Any]) -> None:
    """Take a generator to where another one stood."""
    generator.bit_generator.state = state


def _named(number: int) -> str:
    return f"{number:06d}"


def _flush(*paths: Path) -> None:
    """Wait until files and folders are on disk: a part that is there is whole even after the machine went down."""
    for path in paths:
        if not path.is_symlink():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
