"""Training over several processes: each rank takes its share of the micro-batches, and gradients and sums add up.

Every rank reads the whole tables, so the counts that a loss divides by are global without being exchanged. Alone,
without torch.distributed, a process is the one rank there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's items: every world-size-th, so that ascending ones come out even."""
    return items[dist.get_rank() :: dist.get_world_size()] if _several() else items


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
    together = torch.tensor([sums[name] for name in sorted(sums)], dtype=torch.float64)
    dist.all_reduce(together)
    return dict(zip(sorted(sums), together.tolist(), strict=True))


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
