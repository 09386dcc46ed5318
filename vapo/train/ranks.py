"""Training over several processes: each rank takes its share of the micro-batches, and gradients and sums add up.

Every rank reads the whole tables, so the counts that a loss divides by are global without being exchanged. Alone,
without torch.distributed, a process is the one rank there is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")


@contextmanager
def joined() -> Iterator[None]:
    """This process as one of torchrun's ranks: nccl where there is a GPU for it, otherwise gloo."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def rank() -> int:
    """This process's number; 0 alone."""
    return dist.get_rank() if _several() else 0


def count() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if _several() else 1


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's items: every world-size-th, so that ascending ones come out even."""
    return items[rank() :: count()]


def in_step(items: Sequence[T]) -> Iterator[tuple[T | None, Sequence[T]]]:
    """This rank's items as `share`, each with those that the ranks have at the same time, None where it has none.

    Every rank takes equally many turns: sharded weights are gathered by all ranks together or not at all.
    """
    for start in range(0, len(items), count()):
        together = items[start : start + count()]
        yield (together[rank()] if rank() < len(together) else None), together


def add_up_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its sum over the ranks; a rank that had no work adds nothing."""
    if not _several():
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def add_up(sums: dict[str, float]) -> dict[str, float]:
    """Sums over all ranks; every rank has the same names."""
    if not _several():
        return sums
    together = torch.tensor([sums[name] for name in sorted(sums)], dtype=torch.float64, device=device())
    dist.all_reduce(together)
    return dict(zip(sorted(sums), together.tolist(), strict=True))


def together(parts: list[np.ndarray], lengths: np.ndarray) -> list[np.ndarray]:
    """Rows that any rank has, on every rank: B x [T_i] float32, where each rank left those empty that it has not."""
    if not _several():
        return parts
    lengths = np.where(np.array([len(part) for part in parts]) > 0, lengths, 0)
    have = torch.from_numpy(lengths).to(device())
    dist.all_reduce(have)  # a row is on one rank
    ends = np.cumsum(have.cpu().numpy())
    flat = np.zeros(int(ends[-1]) if len(ends) else 0, np.float32)
    for part, end in zip(parts, ends, strict=True):
        if len(part):
            flat[end - len(part) : end] = part
    of_all = torch.from_numpy(flat).to(device())
    dist.all_reduce(of_all)  # x + 0 is x
    return np.split(of_all.cpu().numpy(), ends[:-1])


def told(fact: Any) -> list[Any]:
    """What every rank tells, in the order of ranks: anything that JSON holds."""
    if not _several():
        return [fact]
    text = torch.frombuffer(bytearray(json.dumps(fact).encode()), dtype=torch.uint8).to(device())
    sizes = [torch.zeros(1, dtype=torch.int64, device=device()) for _ in range(count())]
    dist.all_gather(sizes, torch.tensor([len(text)], device=device()))
    most = int(max(sizes))
    padded = torch.zeros(most, dtype=torch.uint8, device=device())
    padded[: len(text)] = text
    texts = [torch.zeros(most, dtype=torch.uint8, device=device()) for _ in range(count())]
    dist.all_gather(texts, padded)
    return [json.loads(bytes(t[: int(n)].cpu().tolist())) for t, n in zip(texts, sizes, strict=True)]


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
