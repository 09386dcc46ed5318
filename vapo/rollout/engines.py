"""The two rollout engines behind one method: prompts and seeds in, responses out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from vapo import recipe
from vapo.errors import UserError
from vapo.rollout.decoder import Decoder
from vapo.rollout.engine import Response, generate
from vapo.rollout.installed import check_installed

OnTokens = Callable[[int, int], None]


class Engine(Protocol):
    """Something that samples `section.samples` responses for each of P prompts."""

    def sample(self, prompts: Sequence[Sequence[int]], seeds: np.ndarray, on_tokens: OnTokens) -> list[Response]:
        """Responses in the order prompt-major, P * samples of them.

        They end with the stop token or at max_new_tokens; their logprobs are those at temperature 1, before top_p.

        Args:
            prompts: tokens of each prompt.
            seeds: [P * samples] uint64, one per response.
            on_tokens: called now and then with how many responses have ended and how many tokens were sampled since.
        """
        ...


@contextmanager
def open_engine(section: recipe.Rollout, folder: Path, stop_token: int, max_length: int) -> Iterator[Engine]:
    """The engine that the recipe names, with the model in `folder`; its processes end with the block.

    Args:
        max_length: tokens of prompt and response together, at most.

    Raises:
        UserError: the engine is not installed, does not know the model, or there is not enough memory for it.
    """
    check_installed(section)
    if section.engine == "cpu":
        yield CpuEngine(section, Decoder(folder), stop_token)
        return
    from vapo.rollout.vllm_engine import VllmEngine

    engine = VllmEngine(section, folder, stop_token, max_length)
    try:
        yield engine
    finally:
        engine.close()


@dataclass(frozen=True)
class CpuEngine:
    """Our own decoder: float32, in this process."""

    section: recipe.Rollout
    decoder: Decoder
    stop_token: int

    def sample(self, prompts: Sequence[Sequence[int]], seeds: np.ndarray, on_tokens: OnTokens) -> list[Response]:
        """See Engine.sample. The same prompts, seeds and batch_size give the same responses, bit for bit."""
        s = self.section
        try:
            return generate(
                self.decoder,
                prompts,
                seeds,
                samples=s.samples,
                max_new_tokens=s.max_new_tokens,
                temperature=s.temperature,
                top_p=s.top_p,
                stop_token=self.stop_token,
                batch_size=s.batch_size,
                on_tokens=on_tokens,
            )
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
                raise UserError(
                    f"not enough memory to decode {s.batch_size} responses together: lower rollout.batch_size"
                ) from error
            raise
