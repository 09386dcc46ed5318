"""The vLLM rollout engine: a request with a seed of its own for every response, in this process.

vLLM runs without a process of its own (only tensor parallelism starts workers): then scheduling is the same every
time, the same requests with the same seeds give the same responses bit for bit, and nothing outlives the stage.
A response depends on its own seed; which other requests share its batches changes its logits only by rounding.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vapo import recipe
from vapo.errors import UserError
from vapo.rollout.engine import Response

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine is this process
    "VLLM_NO_USAGE_STATS": "1",  # it would call home
    "VLLM_HOST_IP": "127.0.0.1",  # one node: workers meet on loopback
}
CPU_MEMORY = 0.25  # share of the machine's memory; vLLM's own, nine tenths, is meant for a device that is empty
MAX_SEED = np.uint64(2**63 - 1)  # what fits into the signed seed of a request

# What vLLM and torch say when they cannot go on, or start -> what to do about it.
GO_ON = {
    r"less than desired .*utilization": "lower rollout.gpu_memory, or end what else is on the device",
    r"KV cache is needed|No available memory|requested memory for kv|larger than the maximum number of tokens": (
        "not enough memory for keys and values: raise rollout.gpu_memory, lower rollout.max_new_tokens, or raise "
        "rollout.tensor_parallel"
    ),
    r"out of memory|MemoryError|can't allocate memory": (
        "out of memory: lower rollout.batch_size or gpu_memory, or raise rollout.tensor_parallel"
    ),
    r"head_dim=": (
        "vLLM has no attention on a CPU for heads of this size (it has 32, 64, 80, 96, 112, 128 ...): choose another "
        "base_model.hidden_size or heads, or set rollout.engine to 'cpu'"
    ),
}
START = {
    **GO_ON,
    r"tensor.parallel|World size|available GPUs": (
        "lower rollout.tensor_parallel: it must divide the model's attention heads and not pass the devices there are"
    ),
    r"max_model_len|max_position_embeddings|max model len": "lower rollout.max_model_length or max_new_tokens",
    r"architectures? .* not supported|Cannot find model module": (
        "this vLLM does not know the model: install a newer one, or set rollout.engine to 'cpu'"
    ),
    r"bfloat16|float16|dtype": "set rollout.dtype to one that the device computes in, say 'float16' or 'float32'",
    r"WorkerProc initialization failed": (
        "its workers' own words stand above in the log; if it is memory, lower rollout.gpu_memory or batch_size"
    ),
}


class VllmEngine:
    """A vLLM engine with the model of one folder."""

    def __init__(self, section: recipe.Rollout, folder: Path, stop_token: int, max_length: int) -> None:
        os.environ.update(ENVIRONMENT)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        on_cpu = _without_compiling()
        from vllm import EngineArgs, LLMEngine

        self.section, self.stop_token = section, stop_token
        settings: dict[str, Any] = {
            "model": str(folder),
            "skip_tokenizer_init": True,  # tokens in, tokens out
            "generation_config": "vllm",  # the recipe says how to sample, not the checkpoint
            "dtype": section.dtype or _dtype_of(folder),
            "tensor_parallel_size": section.tensor_parallel or 1,
            "max_model_len": max_length,
            "max_num_seqs": section.batch_size,
            "enable_prefix_caching": True,  # the samples of a prompt read it once
            "logprobs_mode": "raw_logprobs",  # of the model's own distribution: before temperature and top_p
            "disable_log_stats": True,
        }
        if section.gpu_memory or on_cpu:
            settings["gpu_memory_utilization"] = section.gpu_memory or CPU_MEMORY
        if on_cpu:
            # A prompt that is read in pieces would rewind the request's generator, which CPU generators cannot do:
            # whole prompts only, so there must be room for the longest.
            whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(max_length, 2048)}
            settings |= {"enforce_eager": True, **whole}
        with _cured("start", START):
            self.engine = LLMEngine.from_engine_args(EngineArgs(**settings))

    def sample(self, prompts: Sequence[Sequence[int]], seeds: np.ndarray, on_tokens: Any) -> list[Response]:
        """See Engine.sample. A call does not depend on the calls before it."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        s = self.section
        # What is cached decides how a prompt is cut, and so the last bits of its logits.
        self.engine.reset_prefix_cache()
        with _cured("go on", GO_ON):
            for row, seed in enumerate(seeds):
                wanted = SamplingParams(
                    seed=int(seed & MAX_SEED),
                    temperature=s.temperature,
                    top_p=s.top_p,
                    max_tokens=s.max_new_tokens,
                    stop_token_ids=[self.stop_token],
                    ignore_eos=True,  # that one token ends a response, as with the other engine
                    logprobs=0,  # of the sampled token
                    flat_logprobs=True,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                prompt = list(prompts[row // s.samples])
                self.engine.add_request(str(row), tokens_input(prompt_token_ids=prompt), wanted)
            responses: dict[int, Response] = {}
            while self.engine.has_unfinished_requests():
                for done in self.engine.step():
                    response = _response(done.outputs[0])
                    responses[int(done.request_id)] = response
                    on_tokens(1, len(response.tokens))
        return [responses[row] for row in range(len(seeds))]

    def close(self) -> None:
        """End the workers of tensor parallelism."""
        self.engine.engine_core.shutdown()


def _response(output: Any) -> Response:
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a request with {output.finish_reason!r}")
    tokens, logprobs = list(output.token_ids), list(output.logprobs.logprobs)
    assert len(tokens) == len(logprobs)
    return Response(tokens, logprobs, output.finish_reason)


def _without_compiling() -> bool:
    """Whether vLLM computes on the CPU; there nothing is compiled, since that takes longer than it saves.

    It must be said before the rest of vLLM is imported, to this process and to its workers.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    import torch._dynamo.config

    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # its own choice is one memory node per worker
    torch._dynamo.config.disable = True
    return True


def _dtype_of(folder: Path) -> str:
    """What the checkpoint's numbers are."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "auto")


@contextmanager
def _cured(what: str, cures: Mapping[str, str]) -> Iterator[None]:
    """Turn what vLLM raises into one line with the cure, where there is one that we know."""
    try:
        yield
    except (ValueError, RuntimeError, MemoryError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        for pattern, cure in cures.items():
            if re.search(pattern, said, re.IGNORECASE):
                raise UserError(f"vLLM cannot {what} ({said[:300]}): {cure}") from error
        raise
