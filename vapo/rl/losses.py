"""The terms of the loss as sums of weighted tokens, so that any split of a mini-batch has the same gradient.

Axes: n response tokens of a micro-batch. `weights` [n] say what each token counts for in the WHOLE mini-batch (they
sum to 1 over it), so a micro-batch's loss is its share and the shares add up, over micro-batches and over ranks. A
token of weight 0 is not there: whatever its other values, NaN included, it adds nothing and gets no gradient.
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
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    importance: Tensor | None = None,
) -> Tensor:
    """-sum w * c * min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = exp(logprobs - old_logprobs): scalar.

    PPO (arXiv 1707.06347) equation 7 with clip-higher, VAPO section 4.2.3, DAPO section 3.1. All tensors [n].

    Args:
        dual_clip: where A < 0 the minimum is held at dual_clip * A (> 1), so that a token which became much likelier
            is not punished without bound (arXiv 1912.09729, section 4.3); None: off.
        importance: c, what a token counts for because another engine sampled it; None: 1.
    """
    logprobs, old_logprobs, advantages = _present(weights, logprobs, old_logprobs, advantages)
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    if importance is not None:
        objective = _present(weights, importance)[0].detach() * objective
    return -(weights * objective).sum()


def truncated_importance_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> Tensor:
    """min(exp(old_logprobs - rollout_logprobs), cap): [n], without a gradient.

    How much likelier the trainer finds a token than the engine that sampled it; truncated so that one token cannot
    rule the batch (truncated importance sampling, Ionides 2008). The papers are silent: an option, off by default.
    """
    return (old_logprobs - rollout_logprobs).detach().exp().clamp_max(cap)


def positive_lm_loss(logprobs: Tensor, positive: Tensor, positive_tokens: int) -> Tensor:
    """-(1 / positive_tokens) * sum of logprobs over tokens of correct responses: scalar; 0 when there are none.

    VAPO section 4.2.3, L_NLL. `positive` [n] bool; `positive_tokens` counts them over the whole mini-batch.
    """
    if positive_tokens == 0:
        return logprobs.new_zeros(())
    return -torch.where(positive, logprobs, 0.0).sum() / positive_tokens


def value_loss(
    values: Tensor, targets: Tensor, weights: Tensor, old_values: Tensor | None = None, clip: float | None = None
) -> Tensor:
    """sum w * 0.5 * (V - target)^2: scalar; with `clip`, the larger of that and the loss of V kept near old_values.

    All tensors [n]. Papers are silent on the form; this is verl's and NeMo-RL's: our choice.
    """
    values, targets = _present(weights, values, targets)
    error = (values - targets).square()
    if clip is not None:
        assert old_values is not None
        (old_values,) = _present(weights, old_values)
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - targets).square())
    return (weights * 0.5 * error).sum()


def kl_loss(logprobs: Tensor, reference_logprobs: Tensor, weights: Tensor, estimator: str) -> Tensor:
    """sum w * k, k estimating KL(policy || reference) at each token from the sampled token alone: scalar.

    With d = logprobs - reference_logprobs (both [n]): "k1" is d, "k2" is d^2 / 2, "k3" is exp(-d) - 1 + d (Schulman,
    Approximating KL Divergence, 2020; GRPO section 4.1.1 uses k3). k1 and k3 are unbiased as values. As a loss whose
    gradient is taken k2 is the one that pulls along the KL's own gradient; k1's is zero on average.
    """
    logprobs, reference_logprobs = _present(weights, logprobs, reference_logprobs)
    d = logprobs - reference_logprobs
    if estimator == "k1":
        terms = d
    elif estimator == "k2":
        terms = 0.5 * d.square()
    elif estimator == "k3":
        terms = torch.expm1(-d) + d
    else:
        raise ValueError(f"KL estimator {estimator!r}: 'k1', 'k2' or 'k3'")
    return (weights * terms).sum()


def entropy_bonus(entropies: Tensor, weights: Tensor) -> Tensor:
    """sum w * entropy of each token's distribution, [n], in nats: scalar, to be subtracted from the loss."""
    (entropies,) = _present(weights, entropies)
    return (weights * entropies).sum()


def _present(weights: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with 0 where the weight is 0: selected, since a NaN times 0 is a NaN, in gradients, too."""
    return tuple(torch.where(weights != 0, tensor, 0.0) for tensor in tensors)
