"""Bytes on each rank's device: what torch and DeepSpeed allocate for a model that is trained, read, or sampled from.

Every term is one that was seen: tests/plan/test_memory.py measures them on a CPU. N parameters (n of them trained), R
ranks, P padded positions of a micro-batch, H hidden size, V vocabulary; docs/scale.md has the formulas in one table.
"""

from __future__ import annotations

from dataclasses import dataclass

from vapo.plan.models import Shape
from vapo.recipe import Train

LOGITS_AT_ONCE = 2**25  # elements: vapo/train/models.py
BUCKET, PERSISTENT = 2**28, 100_000  # elements: vapo/train/zero.py
LIVE = 10**9  # elements that ZeRO-3 leaves gathered: DeepSpeed's stage3_max_live_parameters
PREFETCH = 5 * 10**7  # elements that it gathers ahead: stage3_prefetch_bucket_size
SUB_GROUP = 10**9  # elements whose gradients it casts at once: sub_group_size


@dataclass(frozen=True)
class Memory:
    """Bytes on a device, or in the host's memory, by what they are for."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0  # moments, and float32 master weights
    buffers: float = 0.0  # what DeepSpeed exchanges gradients through
    gathered: float = 0.0  # copies of weights during a forward and backward pass: ZeRO-3's, and autocast's
    activations: float = 0.0
    temporary: float = 0.0  # at the moment when most is allocated
    kv_cache: float = 0.0  # of a rollout engine
    host: float = 0.0  # in the CPU's memory, for each rank

    @property
    def states(self) -> float:
        """What stays between micro-batches of a step."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> float:
        """On the device."""
        return self.states + self.buffers + self.gathered + self.activations + self.temporary + self.kv_cache


def learner(shape: Shape, kind: str, train: Train, ranks: int, positions: int) -> Memory:
    """A policy or critic under training.

    Args:
        kind: "policy" or "critic": one is trained after the other, and memory is freed between (vapo/train/zero.py).
        ranks: of all nodes together.
        positions: padded positions of the largest micro-batch: the token budget, or the longest text if that is more.
    """
    total = shape.parameters(kind)
    trained = shape.adapter_parameters(train.lora_rank, train.lora_targets) if train.lora_rank else total
    if train.lora_rank:
        total += trained
    pure = train.engine == "deepspeed" and train.dtype == "bf16"  # weights are bfloat16 themselves
    size, stage = 2 if pure else 4, train.zero_stage
    shard = 1 / ranks
    on_host = train.offload == "cpu"
    weights = total * size * (shard if stage == 3 else 1)
    whole = shape.small(min(PERSISTENT, total // 100)) if stage == 3 else 0  # small ones stay on every rank
    weights += whole * size
    moments = 8 * trained * (shard if stage else 1)
    # Stage 1 and 2 cut masters out of the weights; stage 3 too, unless they are float32 on the same GPU already.
    masters = 4 * trained * shard if stage else 0
    kept_gradients = _gradients(trained, size, stage, shard, pure=pure)
    bucket = float(min(BUCKET, total) * size)
    buffers = gathered = gathering = 0.0
    if stage == 3:
        buffers, gathered = bucket, min(total - whole, LIVE) * size
        gathering = min(total - whole, PREFETCH) * size
    elif stage == 1 and not pure:
        buffers = bucket  # it stays until the last micro-batch of a step
    kept, logits = activations(shape, kind, train, positions)
    again = _layer(shape, train, positions) if train.activation_checkpointing else 0.0
    backward = _temporary(shape, kind, train, positions, size, again)
    if stage == 2:
        backward = max(backward, bucket)  # freed after each backward pass
    temporary = max(backward, gathering + again - logits)
    if train.engine == "torch" and train.dtype == "bf16":
        gathered = 2 * (total - shape.embedding)  # autocast's copies of the weights of linear layers
    # A step casts the gradients of its shard once more, when activations are gone.
    in_step = 4 * min(trained * shard, SUB_GROUP) if stage else 0
    temporary = max(temporary, in_step - kept - gathered)
    host = 0.0
    if on_host:
        host = moments + masters + 4 * trained * shard
        moments = masters = 0.0
        if stage == 3:
            host, weights = host + weights, 0.0
        kept_gradients = 0.0 if stage > 1 else kept_gradients
    return Memory(weights, kept_gradients, moments + masters, buffers, gathered, kept, temporary, host=host)


def _gradients(trained: int, size: int, stage: int, shard: float, *, pure: bool) -> float:
    """What is kept of gradients between two micro-batches of a step."""
    if stage >= 2:
        return 4 * trained * shard
    if stage == 1 and pure:  # DeepSpeed's BF16_Optimizer: the micro-batch's, and float32 sums
        return (size + 4) * trained
    return size * trained


def reader(shape: Shape, kind: str, train: Train, ranks: int, positions: int) -> Memory:
    """A model whose forward pass is all that is wanted: the critic of the advantages stage, the reference."""
    total = shape.parameters(kind)
    pure = train.engine == "deepspeed" and train.dtype == "bf16"
    size = 2 if pure else 4
    if train.zero_stage == 3:
        weights, gathered = total * size / ranks, (min(total, LIVE) + min(total, PREFETCH)) * size
    else:
        weights, gathered = total * size, 0
    return Memory(weights, gathered=gathered, temporary=_layer(shape, train, positions) / 2)


def sampler(shape: Shape, tensor_parallel: int, bytes_each: int, device: float, share: float, reserve: float) -> Memory:
    """A vLLM engine on each of its GPUs: weights and, in what is left of its share of the device, the KV cache.

    Args:
        bytes_each: of a number: 2, or 4 for float32.
        device: bytes of a GPU.
        share: of it that vLLM takes (rollout.gpu_memory).
        reserve: bytes that it keeps for activations and CUDA graphs.
    """
    weights = shape.parameters() * bytes_each / tensor_parallel
    return Memory(weights, activations=reserve, kv_cache=max(0.0, device * share - weights - reserve))


def kv_bytes(shape: Shape, bytes_each: int = 2) -> int:
    """Of one token: keys and values of every layer, over all GPUs of an engine."""
    return 2 * shape.layers * shape.keys * bytes_each


def activations(shape: Shape, kind: str, train: Train, positions: int) -> tuple[float, float]:
    """(bytes kept for the backward pass, of them the log-probabilities over the vocabulary)."""
    layer, size = _layer(shape, train, positions), 2 if train.dtype == "bf16" else 4
    logits = 0.0
    if kind == "policy":
        tokens = min(positions, max(1, LOGITS_AT_ONCE // shape.vocabulary))
        logits = 4.0 * tokens * shape.vocabulary if positions <= tokens else 0.0  # in several chunks none is kept
    head = _norm(shape, train, positions) + positions * shape.hidden * (size if kind == "policy" else 4)
    if train.activation_checkpointing:
        stream = 4 if train.engine == "torch" else size
        return shape.layers * positions * shape.hidden * stream + head + logits, logits
    return shape.layers * layer + head + logits, logits


def _norm(shape: Shape, train: Train, positions: int) -> float:
    """What an RMSNorm keeps: its input in float32, what it normalised, its output."""
    numbers = 12 if train.dtype == "fp32" or train.engine == "torch" else 8
    return float(numbers * positions * shape.hidden)


def _layer(shape: Shape, train: Train, positions: int) -> float:
    """What one layer keeps for the backward pass: norms, queries, keys, values, attention's output, feed-forward."""
    attention, gated = 2 * shape.queries + 2 * shape.keys, 4 * shape.intermediate
    if train.dtype == "fp32":
        inner = 4 * (attention + gated)
    elif train.engine == "deepspeed":
        inner = 2 * (attention + gated)
    else:  # autocast: the stream is float32, and every linear layer keeps its own bfloat16 copy of its input
        inner = 2 * (attention + gated) + 2 * 5 * shape.hidden
    return 2 * _norm(shape, train, positions) + float(positions * inner)


def _temporary(shape: Shape, kind: str, train: Train, positions: int, size: int, again: float) -> float:
    """The most that a backward pass has beside what was kept: at the vocabulary, or in a layer, which with activation
    checkpointing is there `again`.
    """
    numbers = 4 if train.dtype == "fp32" else 2
    feed_forward = again + 3.0 * numbers * positions * shape.intermediate
    largest = again + size * shape.hidden * shape.intermediate
    chunk = float(size * shape.embedding)
    if kind == "policy":
        tokens = min(positions, max(1, LOGITS_AT_ONCE // shape.vocabulary))
        copies = 2 if positions <= tokens else 4  # in chunks the logits are computed once more
        chunk = max(chunk, 4.0 * copies * tokens * shape.vocabulary)
    return max(chunk, feed_forward, largest)
