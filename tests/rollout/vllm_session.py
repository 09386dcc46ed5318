"""One vLLM engine, a list of calls, in a process of its own: `python -m tests.rollout.vllm_session ASKED ANSWERS`.

ASKED: {"folder", "section", "max_length", "stop_token", "calls": [{"prompts", "seeds", "temperature", "top_p"}, ...]}.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from vapo.recipe import Rollout
from vapo.rollout.engines import open_engine
from vapo.rollout.vllm_engine import VllmEngine


def main(asked: Path, answers: Path) -> None:
    what = json.loads(asked.read_text())
    section = Rollout.model_validate(what["section"])
    found = []
    with open_engine(section, Path(what["folder"]), what["stop_token"], what["max_length"]) as engine:
        assert isinstance(engine, VllmEngine)
        for call in what["calls"]:
            engine.section = section.model_copy(update={key: call[key] for key in ("temperature", "top_p")})
            counted = np.zeros(2, int)

            def on_tokens(ended: int, sampled: int, counted: np.ndarray = counted) -> None:
                counted += (ended, sampled)

            responses = engine.sample(call["prompts"], np.array(call["seeds"], np.uint64), on_tokens)
            assert counted.tolist() == [len(responses), sum(len(r.tokens) for r in responses)]
            found.append([asdict(response) for response in responses])
    answers.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
