"""Policies with a tokenizer of words, prompts for them, and rollout jobs in processes of their own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from tests.running import ROOT, environment, kill, marked
from vapo.partial import PLACE
from vapo.recipe import Rollout
from vapo.schemas import PROMPTS
from vapo.stage import Job
from vapo.store import save_checkpoint, sha256_of
from vapo.tables import write_table

from .conftest import EOS, VOCABULARY

WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, VOCABULARY))]
KINDS = {"llama": (LlamaConfig, 2, False), "qwen2": (Qwen2Config, 1, True)}  # config, key heads, tied embeddings


def make_policy(kind: str, folder: Path) -> Any:
    """Write a small random checkpoint that vLLM decodes on a CPU (its heads are 32 wide); returns the model."""
    config, key_heads, tied = KINDS[kind]
    settings = config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=key_heads,
        intermediate_size=96,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    model.save_pretrained(folder)
    add_words(folder)
    return model


def add_words(folder: Path) -> Path:
    """Give a checkpoint a tokenizer of words."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_prompts(path: Path, texts: list[str]) -> None:
    """PROMPTS with these texts."""
    count = len(texts)
    columns = {
        "prompt_id": [f"p{i}" for i in range(count)],
        "prompt": texts,
        "ground_truth": ["7"] * count,
        "family": ["f"] * count,
        "difficulty": [0] * count,
    }
    write_table(path, PROMPTS, columns)


def ragged_texts(count: int) -> list[str]:
    """Prompts of 1 to 12 words."""
    return [" ".join(WORDS[2 + (i * k) % 20] for k in range(1, 2 + (7 * i) % 12)) for i in range(count)]


def make_place(folder: Path, place: Path, texts: list[str]) -> Path:
    """A folder with a policy's manifest and PROMPTS."""
    place.mkdir(exist_ok=True)
    save_checkpoint(folder, place / "policy.json", store=str(place / "store"), kind="policy", facts={})
    write_prompts(place / "prompts", texts)
    return place


def rollout_job(place: Path, name: str, section: Rollout, **changed: Any) -> dict[str, Any]:
    """A job of the rollout stage, as a component hands it on."""
    parameters = {"iteration": 1, "draw": 1, "wanted_groups": 0, "purpose": "training", "seed": 0, **changed}
    inputs = {
        key: {"path": str(path), "sha256": sha256_of(path)}
        for key, path in {"prompts": place / "prompts", "policy": place / "policy.json"}.items()
    }
    outputs = {key: str(place / name / key) for key in ("rollouts", "metrics")}
    return asdict(Job("rollout", section.model_dump_json(), parameters, inputs, outputs, time.time()))


EXECUTE = "import json, sys; from vapo.stage import execute; execute(json.load(open(sys.argv[1])))"


@contextmanager
def executing(job: dict[str, Any], partial: Path) -> Iterator[subprocess.Popen[str]]:
    """A job in a process of its own; no process that it started outlives the block. `.mark` finds them."""
    folder = Path(job["outputs"]["rollouts"]).parent
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps(job))
    mark = uuid.uuid4().hex
    environ = {**environment(mark), PLACE: str(partial), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", EXECUTE, str(folder / "job.json")]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environ, cwd=ROOT)
    process.mark = mark  # type: ignore[attr-defined]
    try:
        yield process
    finally:
        for pid in marked(mark):
            kill(pid)
        process.wait()


def execute_to_end(job: dict[str, Any], partial: Path) -> str:
    """Do a job in a process of its own; returns what it printed."""
    with executing(job, partial) as process:
        process.wait(timeout=300)
    log = (Path(job["outputs"]["rollouts"]).parent / "log.txt").read_text()
    assert process.returncode == 0, log[-4000:]
    return log


def parts_in(partial: Path) -> list[Path]:
    """Finished parts of all stages."""
    return sorted(partial.glob("*/*.arrow"))
