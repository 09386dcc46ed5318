"""Tokens sampled per second: our CPU engine against transformers.generate, same models and prompts, in one run.

Both sample at temperature 1 from the whole vocabulary in float32, 256 rows at once, prompts sorted by length; tokens
count up to each response's stop. A folder given as an argument (say of SmolLM2, made by tests/smollm2.py) is measured
as well, without a limit.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from vapo.rollout.decoder import Decoder
from vapo.rollout.engine import generate
from vapo.rollout.sampling import mix

ROWS, SAMPLES, REPEATS, LIMIT = 256, 8, 3, 3.0
STOP, PAD = 1, 0
CACHES = ("dynamic", "static")  # transformers' key-value caches: its faster one is what we are compared with
SIZES: dict[str, dict[str, Any]] = {  # the first is the demo's model
    "demo": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96},
    "middle": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 4096},
}
RESPONSES = {"demo": 512, "middle": 256}
MAX_NEW = {"demo": 248, "middle": 96}


def main() -> int:
    """Print the table; 1 if a model made here is sampled less than LIMIT times as fast."""
    torch.set_grad_enabled(False)
    console = Console(width=120)
    table = Table(f"model, {ROWS} rows at once", box=None)
    for name in ("parameters", "tokens", "mean length", "transformers", "ours", "ratio", "ratio, CPU time", "limit"):
        table.add_column(name, justify="right")
    missed = False
    with tempfile.TemporaryDirectory() as scratch:
        for name, size in SIZES.items():
            folder = Path(scratch) / name
            make(folder, size, mean_length=MAX_NEW[name] * 0.4)
            ratio = measure(table, name, folder, RESPONSES[name], MAX_NEW[name], LIMIT)
            missed |= ratio < LIMIT
    for path in sys.argv[1:]:
        measure(table, Path(path).name, Path(path), 64, 64, None)
    console.print(
        f"{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads; tokens per second, medians of "
        f"{REPEATS} runs in turn. transformers: the faster of its caches, {' and '.join(CACHES)}."
    )
    console.print(table)
    return int(missed)


def make(folder: Path, size: dict[str, Any], mean_length: float) -> None:
    """A random Llama whose responses end after `mean_length` tokens on average, at every step with the same chance.

    Channel 0 is the same for every token and no layer writes to it: in the head it is the stop token's bias.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        **size,
        num_key_value_heads=size["num_attention_heads"],
        intermediate_size=4 * size["hidden_size"],
        max_position_embeddings=512,
        initializer_range=0.8 / size["hidden_size"] ** 0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=STOP,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config).eval()
    model.model.embed_tokens.weight[:, 0] = 3.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    model.lm_head.weight[:, 0] = 0
    model.lm_head.weight[STOP] = 0
    hidden = model.model(torch.randint(2, size["vocab_size"], (64, 50))).last_hidden_state
    rest = model.lm_head(hidden).logsumexp(-1)
    model.lm_head.weight[STOP, 0] = ((rest - np.log(mean_length)) / hidden[..., 0]).mean()
    model.save_pretrained(folder)


def measure(table: Table, name: str, folder: Path, responses: int, max_new: int, limit: float | None) -> float:
    """Add the model's row; returns how many times as fast as transformers we are."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    decoder, stop, vocabulary = Decoder(folder), model.config.eos_token_id, model.config.vocab_size
    generator = np.random.default_rng(0)
    lengths = sorted(generator.integers(10, 81, responses // SAMPLES))
    prompts = [generator.integers(2, vocabulary, n).tolist() for n in lengths]

    def ours(prompts: list[list[int]], seed: int) -> list[int]:
        seeds = mix(np.arange(len(prompts) * SAMPLES, dtype=np.uint64) + np.uint64(seed << 32))
        settings = {"samples": SAMPLES, "max_new_tokens": max_new, "temperature": 1.0, "top_p": 1.0}
        found = generate(decoder, prompts, seeds, **settings, stop_token=stop, batch_size=ROWS)
        return [len(response.tokens) for response in found]

    def theirs(cache: str) -> Callable[[list[list[int]], int], list[int]]:
        def sample(prompts: list[list[int]], seed: int) -> list[int]:
            torch.manual_seed(seed)
            found: list[int] = []
            for first in range(0, len(prompts), ROWS // SAMPLES):
                found += with_transformers(model, prompts[first : first + ROWS // SAMPLES], max_new, stop, cache)
            return found

        return sample

    ways = {"ours": ours, **{cache: theirs(cache) for cache in CACHES}}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    per_cpu: dict[str, list[float]] = {way: [] for way in ways}
    counts: dict[str, list[int]] = {way: [] for way in ways}
    for sample in ways.values():
        sample(prompts[:2], 0)  # what is done once, outside of the clock
    for repeat in range(REPEATS):
        for way, sample in ways.items():
            start, spent = time.perf_counter(), time.process_time()
            found = sample(prompts, repeat + 1)
            rates[way].append(sum(found) / (time.perf_counter() - start))
            per_cpu[way].append(sum(found) / (time.process_time() - spent))
            counts[way] += found
    rate = {way: statistics.median(values) for way, values in rates.items()}
    cpu = {way: statistics.median(values) for way, values in per_cpu.items()}
    best = max(CACHES, key=rate.__getitem__)
    ratio = rate["ours"] / rate[best]
    table.add_row(
        name,
        f"{sum(p.numel() for p in model.parameters()):,}",
        f"{sum(counts['ours']) // REPEATS:,} / {sum(counts[best]) // REPEATS:,}",
        f"{np.mean(counts['ours']):.0f} / {np.mean(counts[best]):.0f}",
        f"{rate[best]:,.0f} {best}",
        f"{rate['ours']:,.0f}",
        f"{ratio:.1f}",
        f"{cpu['ours'] / max(cpu[cache] for cache in CACHES):.1f}",
        "" if limit is None else f">= {limit:.0f}",
    )
    return ratio


def with_transformers(model: Any, prompts: list[list[int]], max_new: int, stop: int, cache: str) -> list[int]:
    """Lengths of SAMPLES responses to each of these prompts, up to their stop."""
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    # top_k is 50 unless it is switched off; a static cache would compile the model, for longer than all of this takes.
    found = model.generate(
        tokens,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=SAMPLES,
        max_new_tokens=max_new,
        eos_token_id=stop,
        pad_token_id=PAD,
        cache_implementation=cache,
        disable_compile=True,
    )[:, width:]
    return [row.index(stop) + 1 if stop in row else len(row) for row in found.tolist()]


if __name__ == "__main__":
    sys.exit(main())
