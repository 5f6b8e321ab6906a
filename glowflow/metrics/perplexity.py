"""From sums of negative log-likelihoods to the numbers people compare: loss, perplexity, bits per byte."""

from __future__ import annotations

import math

__all__ = ["bits_per_byte", "mean_nll", "perplexity"]


def mean_nll(nll_sum: float, tokens: int) -> float:
    """Loss in nats per token.

    Args:
        nll_sum: negative log-likelihoods of all targets, summed, in nats.
        tokens: number of targets.

    Raises:
        ValueError: there is no target.
    """
    if tokens <= 0:
        raise ValueError(f"a mean needs at least one target token, there are {tokens}")
    return nll_sum / tokens


def perplexity(nll_sum: float, tokens: int) -> float:
    """exp of the mean loss: how many equally likely tokens the model hesitates between; inf beyond a float."""
    loss = mean_nll(nll_sum, tokens)
    return math.exp(loss) if loss < 709.0 else loss if math.isnan(loss) else math.inf


def bits_per_byte(nll_sum: float, text_bytes: int) -> float:
    """Bits per UTF-8 byte of the text: comparable across tokenizers (arXiv:2101.00027, section 3.1).

    Args:
        nll_sum: negative log-likelihoods of all targets of the text, summed, in nats.
        text_bytes: UTF-8 bytes of that text.

    Raises:
        ValueError: the text is empty.
    """
    if text_bytes <= 0:
        raise ValueError(f"bits per byte need a text, it has {text_bytes} bytes")
    return nll_sum / math.log(2) / text_bytes
