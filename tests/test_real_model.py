"""A real language model through the whole pipeline: SmolLM2-135M-Instruct, one iteration on reasoning-gym problems."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from vapo.schemas import REWARDS, ROLLOUTS
from vapo.store import open_checkpoint, read_manifest
from vapo.tables import read_table, rows

from .running import environment, records
from .smollm2 import INSTALL, convert, gguf_file

SOURCE = gguf_file()
pytestmark = [
    pytest.mark.realmodel,
    pytest.mark.skipif(
        SOURCE is None or not all(map(importlib.util.find_spec, ("gguf", "accelerate", "reasoning_gym"))),
        reason=f"needs a real model: {INSTALL}",
    ),
]
STOP = 2  # <|im_end|>
RECIPE = """
iterations = 1
[problems]
source = "reasoning_gym"
families = {{ chain_sum = {{ min_terms = 2, max_terms = 2, min_digits = 1, max_digits = 1 }} }}
chat_template_from = "{folder}"
train = 16
heldout = 2
[base_model]
path = "{folder}"
[rollout]
prompts = 4
samples = 4
max_new_tokens = 40
[verification]
grader = "reasoning_gym"
answer_in = []           # it speaks in sentences:
min_score = 0.01         # chain_sum gives a text that holds the answer the answer's share of its length
[value_pretraining]
prompts = 4
samples = 2
reward_model_steps = 1
min_steps = 1
max_steps = 2
must_beat_mean = false   # two steps teach it nothing
mini_batch = 8
measure_every = 1
lr = 1e-5
token_budget = 1024
[advantages]
token_budget = 1024
[ppo_update]
mini_batch = 16          # one step
actor_lr = 1e-5
critic_lr = 1e-5
warmup_steps = 0
token_budget = 1024
[evaluation]
samples = 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a Hugging Face folder."""
    assert SOURCE is not None
    made = tmp_path_factory.mktemp("smollm2")
    convert(SOURCE, made)
    return made


def test_the_converted_model_speaks_english(folder: Path) -> None:
    """Wrongly permuted query and key weights still load, but know nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    question = tokenizer("The capital of France is", return_tensors="pt").input_ids
    said = tokenizer.decode(model.generate(question, do_sample=False, max_new_tokens=3)[0])
    assert "Paris" in said
    text = "The weather was cold and wet, so we stayed at home and read books by the fire until it was time for dinner."
    with torch.no_grad():
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert model(ids, labels=ids).loss.exp() < 40
    assert tokenizer.convert_ids_to_tokens(tokenizer("1\n  23").input_ids) == ["1", "\u010a\u0120\u0120", "2", "3"]
    assert tokenizer.eos_token_id == model.config.eos_token_id == STOP


@pytest.mark.slow
def test_one_iteration(folder: Path, tmp_path: Path) -> None:
    """What a user would do: a recipe and `vapo run`."""
    import subprocess
    import sys

    from transformers import AutoModelForCausalLM

    (tmp_path / "smollm2.toml").write_text(RECIPE.format(folder=folder))
    command = [sys.executable, "-m", "vapo", "run", "smollm2.toml", "--workdir", "runs"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1800, cwd=tmp_path, env=environment() | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    made: dict[str, tuple[Path, dict[str, Any]]] = {}
    for place, record in records(tmp_path / "runs").items():
        made["/".join(filter(None, (record["stage"], record["parameters"].get("purpose", ""))))] = place, record
    sampled = read_table(made["rollout/training"][0] / "rollouts", ROLLOUTS)
    responses = [list(tokens) for tokens in rows(sampled, "response_tokens")]
    assert len(responses) == 16
    assert all(responses)
    stopped = [tokens[-1] == STOP for tokens in responses]
    assert stopped == [reason == "stop" for reason in sampled["finish_reason"].to_pylist()]
    assert any(stopped)
    assert not any("<|im_" in text for text in sampled["response"].to_pylist())
    verdicts = read_table(made["verification/training"][0] / "rewards", REWARDS)["verdict"].to_pylist()
    assert sum(verdict in ("matched", "different") for verdict in verdicts) >= 6, verdicts
    assert not {"error", "time_out"} & set(verdicts)
    for stage in ("value_pretraining", "advantages", "ppo_update"):
        metrics = json.loads((made[stage][0] / "metrics").read_text())
        assert all(math.isfinite(value) for value in metrics.values()), metrics
    # The ratio is exactly 1 in the first epoch's one step, and the engine's logprobs are the trainer's to float32.
    assert (metrics["steps"], metrics["approx_kl"]) == (1, 0)
    assert metrics["clip_fraction_low"] == metrics["clip_fraction_high"] == 0
    assert 0 < metrics["logprob_gap_max"] < 1e-3
    assert metrics["actor_grad_norm"] > 0
    new = tmp_path / "policy"
    open_checkpoint(read_manifest(made["ppo_update"][0] / "new_policy", "policy"), new)
    before, after = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32, local_files_only=True).state_dict()
        for f in (folder, new)
    )
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert before.keys() == after.keys()
    assert len(moved) > len(after) / 2
