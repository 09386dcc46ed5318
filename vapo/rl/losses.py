"""The loss terms of VAPO as sums of weighted tokens, so that any split of a mini-batch has the same gradient.

Axes: N response tokens of a micro-batch. `weights` [N] say what each token counts for in the WHOLE mini-batch (they
sum to 1 over it), so a micro-batch's loss is its share and the shares add up.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_weights(lengths: Tensor, aggregation: str) -> Tensor:
    """What one token of each response counts for in its mini-batch: [B] float32, from lengths [B].

    "token": 1 / (all tokens), VAPO section 4.2.2 and DAPO section 3.3; "sample": 1 / (B * length), the mean per
    response and then over responses.
    """
    lengths = lengths.to(torch.float32)
    if aggregation == "token":
        return (1.0 / lengths.sum().clamp_min(1.0)).expand(len(lengths))
    if aggregation == "sample":
        return 1.0 / (len(lengths) * lengths.clamp_min(1.0))
    raise ValueError(f"aggregation {aggregation!r}: 'token' or 'sample'")


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """-sum w * min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = exp(logprobs - old_logprobs): scalar.

    PPO (arXiv 1707.06347) equation 7 with clip-higher, VAPO section 4.2.3. All arguments [N].
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -(weights * torch.minimum(ratio * advantages, clipped * advantages)).sum()


def positive_lm_loss(logprobs: Tensor, positive: Tensor, positive_tokens: int) -> Tensor:
    """-(1 / positive_tokens) * sum of logprobs over tokens of correct responses: scalar; 0 when there are none.

    VAPO section 4.2.3, L_NLL. `positive` [N] bool; `positive_tokens` counts them over the whole mini-batch.
    """
    if positive_tokens == 0:
        return logprobs.new_zeros(())
    return -torch.where(positive, logprobs, 0.0).sum() / positive_tokens


def value_loss(
    values: Tensor, targets: Tensor, weights: Tensor, old_values: Tensor | None = None, clip: float | None = None
) -> Tensor:
    """sum w * 0.5 * (V - target)^2: scalar; with `clip`, the larger of that and the loss of V kept near old_values.

    All arguments [N]. Papers are silent on the form; this is verl's and NeMo-RL's: our choice.
    """
    error = (values - targets).square()
    if clip is not None:
        assert old_values is not None
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - targets).square())
    return (weights * 0.5 * error).sum()
