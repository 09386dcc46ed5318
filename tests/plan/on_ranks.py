"""Run by torchrun in tests: what two optimiser steps of a small model allocate on this rank, through vapo's engines.

`python -m torch.distributed.run ... tests/plan/on_ranks.py JOB.json`: a list of cases; rank 0 leaves FOUND.json beside
it. Bytes are what glibc has handed out (mallinfo2): tensors from Python, from C++ and from other threads alike, while
the interpreter's own small objects come from arenas that it does not count. Looked at after every operator that torch
dispatches, so of an operator's inner temporaries only those are missed that it frees itself.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vapo import recipe
from vapo.train import ranks
from vapo.train.engine import engine_of
from vapo.train.models import Forward, _critic


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


LIBC = ctypes.CDLL(None)
LIBC.mallinfo2.restype = _Mallinfo


def in_use() -> int:
    found = LIBC.mallinfo2()
    return int(found.uordblks + found.hblkhd)


class Gauge(TorchDispatchMode):
    """The most that was in use after an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.most = max(self.most, in_use())
        return found


def model_of(config: dict[str, Any], kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

    shape = AutoConfig.for_model(**config)
    if kind == "policy":
        return AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval()
    shape.num_labels, shape.classifier_dropout = 1, 0.0
    return _critic(AutoModelForTokenClassification.from_config(shape, dtype=torch.float32))


def measure(case: dict[str, Any]) -> dict[str, float]:
    """Bytes before the second micro-batch of the second step, after its forward pass, and the step's peak."""
    train = recipe.Train.model_validate(case["train"])
    generator = np.random.default_rng(0)
    texts = [
        [generator.integers(0, case["config"]["vocab_size"], n).astype(np.int32) for _ in range(case["rows"])]
        for n in (1, case["length"] - 1)
    ]
    gc.collect()
    begin = in_use()
    model = model_of(case["config"], case["kind"])
    found: dict[str, float] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    settings = {"lr": 1e-4, "weight_decay": 0.1, "warmup_steps": 0, "max_grad_norm": 1.0}
    engine = engine_of(Forward(model, case["kind"]), train, **settings)
    gauge = Gauge()
    for step in range(2):
        with gauge if step else nullcontext():
            for number, turn in enumerate(engine.turns(*texts, np.arange(case["rows"]), case["budget"])):
                if number:
                    gc.collect()
                    found["before"] = in_use()
                out = engine(turn)
                out = out[0] if isinstance(out, tuple) else out
                if number:
                    found["forward"] = in_use()
                engine.backward(out.sum() * 1e-3, turn)
                del out, turn
            engine.step(batch="a test")
    found["peak"] = gauge.most
    engine.close()
    del engine, model
    gc.collect()
    # What is left are caches of libraries, for every new kind of engine and model.
    left = in_use()
    used = {name: found[name] - left for name in ("before", "forward", "peak")}
    return {**found, **used, "left": left - begin}


def main(job: Path) -> None:
    cases = json.loads(job.read_text())
    with ranks.joined():
        for kind in ("torch", "deepspeed"):  # the first time, libraries take memory that they keep
            measure({**cases[0], "train": {"engine": kind, "zero_stage": 3 * (kind == "deepspeed")}})
        gc.freeze()  # a collection looks at what is new
        found = []
        for case in cases:
            begun = time.monotonic()
            found.append({**measure(case), "seconds": time.monotonic() - begun})
        first = ranks.rank() == 0
    if first:
        (job.parent / "FOUND.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
