"""Bits per byte of the validation split while training goes on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from statewise.training.loss import language_model_loss

__all__ = ["validation_bits"]


def validation_bits(model: nn.Module, tokens: npt.NDArray[Any], *, rows: int, context: int, limit: int) -> float:
    """Mean bits a token of the first ``limit`` tokens, read as ``rows`` equal streams side by side.

    Every stream starts from the model's fresh state and carries it through, a window of ``context`` tokens at a time,
    so the window changes nothing; only a stream's first token is not scored. ``evaluate`` reads a whole split as one
    stream; this reads a part of it as several, which is as steady a yardstick and many times faster.

    Args:
        tokens: at least 2.
    """
    count = min(limit, len(tokens))
    rows = max(1, min(rows, count // 2))
    length = count // rows
    streams = tokens[: rows * length].reshape(rows, length)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    state, nats = None, 0.0
    with torch.no_grad():
        for start in range(0, length - 1, context):
            piece = torch.from_numpy(streams[:, start : start + context + 1].astype(np.int64)).to(device)
            logits, state = model(piece[:, :-1], state)
            targets = piece[:, 1:]
            nats += float(language_model_loss(logits, targets).double()) * targets.numel()
    model.train(training)
    return nats / math.log(2) / (rows * (length - 1))
