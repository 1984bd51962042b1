"""From one position's logits to one token: the rules of choice, as a checked value and a pure function."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SamplingRule", "choose_token"]


@dataclass(frozen=True)
class SamplingRule:
    """How the next token is chosen. Applied in the order of the fields, penalties first.

    Attributes:
        presence_penalty: subtracted once from the logit of every token counted at least once.
        frequency_penalty: subtracted from a token's logit once for each time it was counted.
        temperature: logits are divided by it; 0 takes the largest logit (the first of equals) and draws nothing.
        top_k: keep the k largest logits (ties beyond the k-th are dropped, later ids first); 0 keeps all.
        top_p: keep the fewest most likely tokens whose probabilities, after temperature and ``top_k``, reach this
            sum; the likeliest is always kept; 1 keeps all.

    Raises:
        ValueError: temperature negative or not finite, ``top_p`` outside (0, 1], ``top_k`` negative or no integer,
            a penalty that is not finite.
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("presence_penalty", "frequency_penalty", "temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name} is {value!r}; a finite number is accepted")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature!r}; 0 (greedy) or more is accepted")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p!r}; more than 0 and at most 1 is accepted")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k!r}; an integer of 0 (all tokens) or more is accepted")

    @property
    def counts_tokens(self) -> bool:
        """Whether a penalty is set, so that ``counts`` matter."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0


def choose_token(
    logits: Tensor,
    rule: SamplingRule,
    *,
    counts: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """Draw one token id.

    Args:
        logits: ``(vocab,)`` of any floating-point dtype; ``-inf`` marks a token that may not be chosen. Untouched.
        rule: how to choose.
        counts: ``(vocab,)`` how often each token was sampled so far, for the penalties; ``None`` means never.
        generator: a CPU generator; ``None`` draws from torch's global one. The draw is made on the CPU in float64,
            so one seed gives one sequence on every device that computes the same logits.

    Raises:
        ValueError: ``logits`` of another shape, or holding NaN, ``+inf`` or nothing but ``-inf``.
    """
    if logits.dim() != 1 or logits.numel() == 0 or not logits.dtype.is_floating_point:
        raise ValueError(f"logits have shape {tuple(logits.shape)} and dtype {logits.dtype}; (vocab,) floats accepted")
    scores = logits.detach().to(device="cpu", dtype=torch.float64)
    largest = scores.max()  # NaN, when there is one
    if not torch.isfinite(largest):
        found = {True: "NaN"}.get(bool(largest.isnan()), "+inf" if largest > 0 else "nothing but -inf")
        raise ValueError(f"logits hold {found}: no token can be chosen")
    if counts is not None and rule.counts_tokens:
        seen = counts.to(device="cpu", dtype=torch.float64)
        scores = scores - rule.presence_penalty * (seen > 0) - rule.frequency_penalty * seen
        largest = scores.max()
    if rule.temperature == 0:
        return int(scores.argmax())
    order: Tensor | None = None
    if rule.top_k or rule.top_p < 1:
        # Ranked as they came: what follows may round two logits that differ to one value.
        scores, order = scores.sort(descending=True, stable=True)
        if rule.top_k:
            scores, order = scores[: rule.top_k], order[: rule.top_k]
    # The largest becomes 0 before the division: a tiny temperature then sends the others to -inf, never all to +inf.
    probabilities = ((scores - largest) / rule.temperature).softmax(0)
    if rule.top_p < 1:
        before = probabilities.cumsum(0) - probabilities  # the mass ahead of each token
        keep = before < rule.top_p
        keep[0] = True
        probabilities = torch.where(keep, probabilities, 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return int(drawn if order is None else order[drawn])
