"""The memory model against what torch and DeepSpeed really allocate, and by what must hold whatever they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.running import ROOT
from vapo.plan.memory import learner
from vapo.plan.models import shape_from
from vapo.recipe import Train

WIDE = {
    "model_type": "qwen2",
    "hidden_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "intermediate_size": 1536,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
}
DEEP = {
    "model_type": "llama",
    "hidden_size": 240,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "intermediate_size": 640,
    "vocab_size": 2048,
    "tie_word_embeddings": False,
}
WORDY = {
    "model_type": "qwen2",
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 768,
    "vocab_size": 12000,
    "tie_word_embeddings": False,
}
MODELS = {"wide qwen2": WIDE, "deep llama": DEEP, "wordy qwen2": WORDY}
PLAIN, CHECKPOINTED = {"engine": "torch"}, {"engine": "torch", "activation_checkpointing": True}
ZERO1 = {"engine": "deepspeed", "zero_stage": 1}
ZERO2 = {"engine": "deepspeed", "zero_stage": 2, "dtype": "bf16"}
ZERO3 = {"engine": "deepspeed", "zero_stage": 3}
AS_IN_THE_PAPERS_RUN = {**ZERO3, "dtype": "bf16", "activation_checkpointing": True}
CASES = [
    *(("wide qwen2", "policy", train) for train in (PLAIN, ZERO1, ZERO2, ZERO3, AS_IN_THE_PAPERS_RUN)),
    *(
        ("deep llama", "policy", train)
        for train in (CHECKPOINTED, {**ZERO1, "dtype": "bf16"}, {**ZERO3, "dtype": "bf16"})
    ),
    *(("wordy qwen2", "policy", train) for train in (PLAIN, ZERO2, AS_IN_THE_PAPERS_RUN)),
    ("deep llama", "critic", AS_IN_THE_PAPERS_RUN),
]
LENGTH, ROWS, BUDGET = 128, 8, 256  # two micro-batches for each of two ranks
TOLERANCE = 0.10


def cases() -> list[dict[str, Any]]:
    sizes = {"length": LENGTH, "rows": ROWS, "budget": BUDGET}
    return [
        {"model": model, "kind": kind, "config": MODELS[model], "train": train, **sizes} for model, kind, train in CASES
    ]


def named(case: dict[str, Any]) -> str:
    return f"{case['model']} {case['kind']} " + " ".join(str(value) for value in case["train"].values())


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """What rank 0 of two has allocated, by case."""
    folder = tmp_path_factory.mktemp("memory")
    (folder / "JOB.json").write_text(json.dumps(cases()))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [*torchrun, "--nproc-per-node", "2", "-m", "tests.plan.on_ranks", str(folder / "JOB.json")]
    # Every large block is a mapping of its own then, and goes back at once.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    environment = {**os.environ, **allocator, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**environment, "GLOO_SOCKET_IFNAME": "lo"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(map(named, cases()), json.loads((folder / "FOUND.json").read_text()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(), ids=named)
def test_what_is_predicted_is_allocated(measured: dict[str, dict[str, float]], case: dict[str, Any]) -> None:
    found, train = measured[named(case)], Train.model_validate(case["train"])
    shape = shape_from(case["config"], case["model"])
    assert found["parameters"] == shape.parameters(case["kind"])
    predicted = learner(shape, case["kind"], train, 2, BUDGET)
    shown = str({name: round(value / 1e6, 1) for name, value in {**found, **vars(predicted)}.items()})
    assert found["before"] == pytest.approx(predicted.states + predicted.buffers, rel=TOLERANCE), ("states", shown)
    in_forward = predicted.activations + predicted.gathered
    assert found["forward"] - found["before"] == pytest.approx(in_forward, rel=TOLERANCE), ("activations", shown)
    assert found["peak"] == pytest.approx(predicted.peak, rel=TOLERANCE), ("peak", shown)
    # The critic is loaded when the actor has gone: nothing of it may be left.
    assert found["left"] < 0.2 * found["before"], ("left", shown)
