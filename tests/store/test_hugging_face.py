"""What comes out of the store is a folder that transformers opens, its weights in one file or in many."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.store.conftest import Place
from vapo.store import model_only, open_checkpoint, save_checkpoint


@pytest.mark.parametrize(("largest", "sharded"), [("1GB", False), ("20KB", True)])
def test_a_checkpoint_opens_with_from_pretrained(place: Place, largest: str, sharded: bool) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).eval()
    folder = place.root / "model"
    model.save_pretrained(folder, max_shard_size=largest)
    (folder / "optimizer").mkdir()
    (folder / "optimizer" / "state").write_bytes(b"moments")
    saved = save_checkpoint(folder, place.root / "m.json", store=place.uri, kind="policy", facts={})
    opened = open_checkpoint(saved, place.root / "opened", model_only)
    assert (len(list(opened.glob("*.safetensors"))) > 1) is sharded
    assert not (opened / "optimizer").exists()
    if sharded:
        named = json.loads((opened / "model.safetensors.index.json").read_text())["weight_map"].values()
        assert set(named) == {path.name for path in opened.glob("*.safetensors")}
    found = AutoModelForCausalLM.from_pretrained(opened, local_files_only=True, dtype=torch.float32).eval()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, model(tokens).logits)
