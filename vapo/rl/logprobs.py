"""Log-probabilities and entropies of tokens in chunks, so that the logits of all tokens never exist at once.

Axes: n tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]  # hidden [n, H] -> logits [n, V]


def token_logprobs(
    head: Head, hidden: Tensor, targets: Tensor, chunk: int, *, entropy_gradient: bool = False, calls: int = 1
) -> tuple[Tensor, Tensor]:
    """(logprob[i] = log softmax(head(hidden[i]))[targets[i]], entropy[i] = -sum_v p log p), in nats: [n], [n].

    `chunk` tokens meet the vocabulary at a time, in float32. For a gradient their logits are computed once more on the
    way back instead of being kept: the largest tensor is [chunk, V] in either direction. The result is that of one
    chunk of all n tokens.

    Args:
        hidden: [n, H].
        targets: [n], token IDs.
        entropy_gradient: whether gradients pass through the entropy, too.
        calls: how often the head is called at least, without tokens once they are used up: several processes that
            shard it must call it together.
    """
    if len(hidden) <= chunk and calls <= 1:
        return _token_logprobs(head, hidden, targets, entropy_gradient)
    chunks = list(zip(hidden.split(chunk), targets.split(chunk), strict=True))
    chunks += [(hidden[:0], targets[:0])] * (calls - len(chunks))
    kept = [
        checkpoint(_token_logprobs, head, *part, entropy_gradient, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else _token_logprobs(head, *part, entropy_gradient)
        for part in chunks
    ]
    logprobs, entropies = zip(*kept, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def entropy(log_probabilities: Tensor) -> Tensor:
    """-sum_v p log p in nats: [...] from [..., V]."""
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def _token_logprobs(head: Head, hidden: Tensor, targets: Tensor, entropy_gradient: bool) -> tuple[Tensor, Tensor]:
    log_probabilities = head(hidden).float().log_softmax(-1)
    logprobs = log_probabilities.gather(-1, targets[:, None])[:, 0]
    return logprobs, entropy(log_probabilities if entropy_gradient else log_probabilities.detach())
