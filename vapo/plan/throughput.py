"""How fast a model samples and learns: floating-point operations of tokens, and the bytes that decoding reads.

N parameters in matrices; a forward pass costs 2N operations for a token, a backward pass twice that (Kaplan et al.,
arXiv 2001.08361, section 2.1), and attention 4 x layers x width x context (appendix B of PaLM, arXiv 2204.02311).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vapo.plan.hardware import Hardware
from vapo.plan.memory import kv_bytes, sampler
from vapo.plan.models import Shape
from vapo.recipe import Rollout, Train


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and responses, as assumed."""

    prompt: float
    mean: float  # response
    longest: float  # response

    @property
    def text(self) -> float:
        """Prompt and response, on the average."""
        return self.prompt + self.mean

    @property
    def context(self) -> float:
        """Tokens before the average token."""
        return self.text / 2


def lengths_of(section: Rollout, machine: Hardware) -> Lengths:
    """Those of a stage's responses."""
    return Lengths(
        machine.lengths.prompt, machine.lengths.response_share * section.max_new_tokens, section.max_new_tokens
    )


def forward_flops(shape: Shape, kind: str, context: float) -> float:
    """Of one token."""
    matrices = shape.layers * shape.layer_parameters + (shape.embedding if kind == "policy" else 0)
    return 2.0 * matrices + 4.0 * shape.layers * shape.queries * context


def training_flops(shape: Shape, kind: str, context: float, train: Train) -> float:
    """Of one token, forward and backward, with what is computed twice."""
    passes = 4 if train.activation_checkpointing else 3
    head = 2.0 * shape.embedding if kind == "policy" and not train.activation_checkpointing else 0.0
    return passes * forward_flops(shape, kind, context) + head


@dataclass(frozen=True)
class Passes:
    """A training stage's way through the tokens."""

    seconds: float
    flops: float  # on all GPUs
    model_flops: float  # without what is computed twice
    communication: float  # seconds, overlapped with the computing


def through(
    shape: Shape,
    kind: str,
    train: Train,
    machine: Hardware,
    *,
    gpus: int,
    rows: int,
    mini_batch: int,
    lengths: Lengths,
    budget: int,
    reads: int = 0,
    learns: int = 0,
) -> Passes:
    """So many forward passes and training passes over `rows` texts, `mini_batch` of them at a time.

    Ranks take micro-batches in turns, so a mini-batch takes as long as its number of turns, the last perhaps not full;
    with ZeRO-3 every turn gathers the weights, twice when it learns, and spreads gradients once.
    """
    positions = lengths.text / (1 - machine.lengths.padding)
    micro = max(budget, lengths.text)
    batches = rows / mini_batch
    turns = math.ceil(mini_batch * positions / micro / gpus)
    ahead = forward_flops(shape, kind, lengths.context)
    learned = training_flops(shape, kind, lengths.context, train)
    peak = machine.gpu.bf16_flops if train.dtype == "bf16" else machine.gpu.fp32_flops
    compute = {
        "reads": reads * ahead * micro / (peak * machine.use.reading),
        "learns": learns * learned * micro / (peak * machine.use.training),
    }
    gathers = (reads + 3 * learns) if train.zero_stage == 3 else learns / max(turns, 1)
    size = shape.parameters(kind) * (2 if train.dtype == "bf16" else 4)
    speed = machine.gpu.link if gpus <= machine.node.gpus else min(machine.gpu.link, machine.node.network)
    moved = gathers * size / (speed * machine.use.network) if gpus > 1 else 0.0
    if train.offload == "cpu":
        moved += learns * 16 * shape.parameters(kind) / gpus / machine.gpu.to_host / max(turns, 1)
    each = max(sum(compute.values()), moved)
    tokens = rows * positions
    return Passes(
        batches * turns * each,
        tokens * (reads * ahead + learns * learned),
        rows * lengths.text * (reads + 3 * learns) * ahead,
        batches * turns * moved,
    )


@dataclass(frozen=True)
class Sampling:
    """A rollout on one vLLM engine."""

    seconds: float
    together: float  # texts decoded at a time
    rate: float  # tokens/s while all places are taken
    tail: float  # seconds of `seconds` that wait for the longest responses
    bound: str  # by what: "memory bandwidth" or "compute"


def sampling(
    shape: Shape, section: Rollout, machine: Hardware, *, rows: int, lengths: Lengths, tensor_parallel: int
) -> Sampling:
    """The time of `rows` responses.

    A step reads the weights once and the keys and values of every text that is decoded; as many are decoded together
    as have room, `rollout.batch_size` at most. Parts that go to disk together end with the longest response: there
    the engine is nearly empty.
    """
    size = 4 if section.dtype == "float32" else 2
    weights, each = shape.parameters() * size, kv_bytes(shape, size)
    share = section.gpu_memory or machine.use.engine_share
    memory = sampler(shape, tensor_parallel, size, machine.gpu.memory, share, machine.use.engine_reserve)
    room = memory.kv_cache * tensor_parallel / (each * (lengths.prompt + lengths.mean / 2))
    together = max(1.0, min(section.batch_size, rows, room))
    speed = tensor_parallel * machine.gpu.bandwidth * machine.use.decoding
    reading = (weights + together * each * (lengths.prompt + lengths.mean / 2)) / speed
    flops = tensor_parallel * machine.gpu.bf16_flops * machine.use.reading
    computing = together * forward_flops(shape, "policy", lengths.context) / flops
    step = max(reading, computing) + machine.use.step
    steady = rows * lengths.mean / (together / step)
    prefill = rows / section.samples * lengths.prompt * forward_flops(shape, "policy", lengths.prompt / 2) / flops
    parts = math.ceil(rows / (section.prompts_together * section.samples))
    tail = parts * max(0.0, lengths.longest - lengths.mean) * (weights / speed + machine.use.step)
    bound = "memory bandwidth" if reading >= computing else "compute"
    return Sampling(steady + prefill + tail, together, together / step, tail, bound)
