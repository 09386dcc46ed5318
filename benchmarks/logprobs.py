"""Log-probabilities and entropies over a large vocabulary: memory and time in chunks against all logits at once."""

import multiprocessing
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from vapo.rl.logprobs import entropy, token_logprobs
from vapo.train.models import LOGITS_AT_ONCE

TOKENS, HIDDEN, VOCABULARY = 2048, 256, 151_936  # Qwen2.5's vocabulary
CHUNK = max(1, LOGITS_AT_ONCE // VOCABULARY)  # tokens, as the training stages choose it
WAYS = ("all at once", "in chunks")


def main() -> int:
    """Print the table; 1 if chunks need a fifth of the memory or more, or give another result."""
    with tempfile.TemporaryDirectory() as folder:
        # Each in a process of its own, and both before this one grows: a child's peak starts at its parent's size.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
            measured = {way: pool.submit(measure, way, Path(folder) / way).result() for way in WAYS}
        (plain, plain_time), (chunked, chunked_time) = (measured[way] for way in WAYS)
        difference = largest_difference(*(torch.load(Path(folder) / way) for way in WAYS))

    console = Console(width=120)
    console.print(
        f"{TOKENS:,} tokens, vocabulary {VOCABULARY:,}, hidden size {HIDDEN}, float32: all logits are "
        f"{TOKENS * VOCABULARY * 4 / 2**30:.2f} GiB; chunks of {CHUNK} tokens. {len(os.sched_getaffinity(0))} cores."
    )
    table = Table("forward and backward", box=None)
    for name in ("peak memory", "seconds", "largest difference"):
        table.add_column(name, justify="right")
    table.add_row(WAYS[0], f"{plain / 2**30:.2f} GiB", f"{plain_time:.1f}", "")
    table.add_row(WAYS[1], f"{chunked / 2**30:.2f} GiB", f"{chunked_time:.1f}", f"{difference:.0e}")
    table.add_row("ratio", f"{chunked / plain:.3f}", f"{chunked_time / plain_time:.2f}", "")
    table.add_row("limit", "< 0.2", "", "<= 1e-05")
    console.print(table)
    return int(chunked >= plain / 5 or difference > 1e-5)


def measure(way: str, path: Path) -> tuple[int, float]:
    """(bytes at the peak beyond what was there before the forward, seconds); results and gradients go to `path`."""
    head, hidden, targets = make_inputs()
    # Loads what torch loads at first use. The gradients go again: both ways make them, and both are charged for them.
    run(way, head, hidden[:2], targets[:2])
    head.zero_grad(set_to_none=True)
    hidden.grad = None
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    start = time.perf_counter()
    logprobs, entropies = run(way, head, hidden, targets)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.save([logprobs.detach(), entropies, hidden.grad, head.weight.grad], path)
    return peak - before, seconds


def make_inputs() -> tuple[nn.Linear, Tensor, Tensor]:
    """A head without bias, hidden states [n, H] and the tokens [n] that were sampled."""
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    return head, torch.randn(TOKENS, HIDDEN).requires_grad_(), torch.randint(VOCABULARY, (TOKENS,))


def run(way: str, head: nn.Linear, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Forward with entropies, and the backward of -logprobs.mean()."""
    if way == "in chunks":
        logprobs, entropies = token_logprobs(head, hidden, targets, CHUNK)
    else:
        logprobs, entropies = all_at_once(head, hidden, targets)
    (-logprobs.mean()).backward()
    return logprobs, entropies


def all_at_once(head: nn.Linear, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The plain way: the logits [n, V] of all tokens."""
    log_probabilities = head(hidden).log_softmax(-1)
    logprobs = log_probabilities.gather(-1, targets[:, None])[:, 0]
    return logprobs, entropy(log_probabilities.detach())


def largest_difference(plain: list[Tensor], chunked: list[Tensor]) -> float:
    """Over logprobs, entropies and both gradients: the largest difference, as a share of the largest value."""
    return max(float((p - c).abs().max() / p.abs().max()) for p, c in zip(plain, chunked, strict=True))


if __name__ == "__main__":
    sys.exit(main())
