"""The base model: trained reproducibly from examples, or taken over byte for byte from a folder that is complete."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from vapo.errors import UserError
from vapo.recipe import BaseModelSection
from vapo.schemas import EXAMPLES
from vapo.store import open_checkpoint, read_manifest
from vapo.tables import write_table
from vapo.train.base_model import EOS, PAD, UNKNOWN, base_model, word_tokenizer, write_tokenizer

from .conftest import World

SETTINGS: dict[str, Any] = {
    "hidden_size": 16,
    "feed_forward": 32,
    "layers": 1,
    "max_positions": 64,
    "steps": 12,
    "batch_tokens": 300,
    "curriculum_loss": 100.0,
}


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """Repeat the word of the prompt, one to six times."""
    generator = random.Random(0)
    rows = [(f"say {word}", " ".join([word] * n), n) for n in range(1, 7) for word in "abcd"]
    generator.shuffle(rows)
    columns = dict(zip(EXAMPLES.names, map(list, zip(*rows, strict=True)), strict=True))
    write_table(tmp_path / "examples", EXAMPLES, columns)
    return tmp_path / "examples"


def make(examples: Path, policy: Path, seed: int = 0, **changed: Any) -> dict[str, float]:
    section = BaseModelSection(**{**SETTINGS, **changed})
    return base_model(section, examples=examples, policy=policy, seed=seed, store=str(policy.parent / "store"))


def opened(policy: Path) -> Path:
    return open_checkpoint(read_manifest(policy, "policy"), policy.parent / f"{policy.name}-opened")


def test_training_learns_and_leaves_a_whole_checkpoint(examples: Path) -> None:
    policy = examples.parent / "policy"
    metrics = make(examples, policy, steps=60, lr=2e-2)
    folder = opened(policy)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert metrics["train_loss"] < 0.5 * math.log(tokenizer.get_vocab_size())
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.eos_token_id == tokenizer.token_to_id(EOS)
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        prompt = torch.tensor([tokenizer.encode("say c c").ids])
        after = tokenizer.decode(model(prompt).logits[:, -1].argmax(-1).tolist(), skip_special_tokens=False)
    assert after in {"c", EOS}


def test_transformers_reads_text_as_we_do(examples: Path) -> None:
    """Whoever loads the folder gets our token IDs: transformers, and vLLM through it."""
    policy = examples.parent / "policy"
    make(examples, policy)
    folder = opened(policy)
    ours, theirs = Tokenizer.from_file(str(folder / "tokenizer.json")), AutoTokenizer.from_pretrained(folder)
    for text in ("say c c", "say a b c d", "say nobody"):
        assert theirs(text)["input_ids"] == ours.encode(text).ids
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.token_to_id(EOS), ours.token_to_id(PAD))


def test_the_same_seed_gives_the_same_bytes(examples: Path) -> None:
    found = []
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        make(examples, examples.parent / name, seed)
        found.append(read_manifest(examples.parent / name, "policy"))
    assert found[0] == found[1]
    assert found[0].digest != found[2].digest


def test_a_curriculum_that_does_not_end_is_told(examples: Path) -> None:
    with pytest.raises(UserError, match=r"curriculum ended at difficulty 4 of 6 .* raise base_model\.steps"):
        make(examples, examples.parent / "policy", curriculum_loss=1e-9)
    assert not (examples.parent / "policy").exists()


def test_the_curriculum_reaches_the_longest_examples(examples: Path) -> None:
    """From difficulty 4 it grows by one every fourth step: 5 at step 1, 6 at step 5."""
    assert make(examples, examples.parent / "policy")["full_length_at_step"] == 5


def test_no_examples(tmp_path: Path) -> None:
    write_table(tmp_path / "examples", EXAMPLES, {name: [] for name in EXAMPLES.names})
    with pytest.raises(UserError, match=r"no worked example to learn from: set problems\.examples"):
        make(tmp_path / "examples", tmp_path / "policy")


def test_the_tokenizer_knows_every_word_whatever_their_order(tmp_path: Path) -> None:
    texts = ["start 7 #1 x3 ?", "#1 x3 = 1 answer 1"]
    tokenizer = word_tokenizer(texts)
    assert [tokenizer.decode(tokenizer.encode(text).ids) for text in texts] == texts
    assert [tokenizer.token_to_id(t) for t in (PAD, EOS, UNKNOWN)] == [0, 1, 2]
    assert word_tokenizer(texts[::-1]).to_str() == tokenizer.to_str()
    assert tokenizer.encode("nobody said").ids == [2, 2]
    assert tokenizer.decode([1, tokenizer.token_to_id("7"), 0], skip_special_tokens=True) == "7"
    write_tokenizer(tokenizer, tmp_path)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).to_str() == tokenizer.to_str()
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == EOS


@pytest.fixture
def folder(world: World) -> Path:
    """A Hugging Face folder."""
    source = open_checkpoint(world.manifest("policy"), world.root / "links")
    return Path(shutil.copytree(source, world.root / "model"))


def test_a_folder_is_taken_over_byte_for_byte(world: World, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("not part of the model")
    make(tmp_path / "none", tmp_path / "taken", path=str(folder))
    taken = opened(tmp_path / "taken")
    kept = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "README.md"}
    assert {p.name: p.read_bytes() for p in taken.iterdir()} == kept


def test_the_same_folder_is_the_same_policy(world: World, folder: Path, tmp_path: Path) -> None:
    make(tmp_path / "none", tmp_path / "taken", path=str(folder))
    assert world.manifest("taken").digest == world.manifest("policy").digest


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config.json", "config.json is missing"),
        ("tokenizer.json", "tokenizer.json is missing: save the tokenizer into it"),
        ("model.safetensors", "no *.safetensors: save the model with save_pretrained"),
    ],
)
def test_an_incomplete_folder_is_refused(folder: Path, tmp_path: Path, name: str, said: str) -> None:
    (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickled weights don't count")
    with pytest.raises(UserError) as error:
        make(tmp_path / "none", tmp_path / "policy2", path=str(folder))
    assert f"base_model.path {str(folder)!r}" in str(error.value)
    assert said in str(error.value)
    assert not (tmp_path / "policy2").exists()


def test_no_folder_and_another_architecture(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        make(tmp_path / "none", tmp_path / "policy2", path=str(tmp_path / "nowhere"))
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="model_type 'gpt2': give a checkpoint of qwen2 or llama"):
        make(tmp_path / "none", tmp_path / "policy2", path=str(folder))
