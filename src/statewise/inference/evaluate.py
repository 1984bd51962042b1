"""How many bits a model needs per byte of a text it reads from end to end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from statewise.inference.generate import LanguageModel
from statewise.state import ModelState

__all__ = ["Evaluation", "evaluate_bits_per_byte"]


class Evaluation(TypedDict):
    """What :func:`evaluate_bits_per_byte` measured."""

    bits_per_byte: float
    perplexity: float  # per token: exp of the mean negative log likelihood
    tokens: int
    bytes: int
    seconds: float


def evaluate_bits_per_byte(
    model: LanguageModel,
    data: np.ndarray[Any, Any] | Sequence[int] | Tensor,
    *,
    window: int = 1024,
    num_bytes: int | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Evaluation:
    """Score every token of ``data``, in one pass from the first to the last.

    ``bits_per_byte = -sum_t log2 p(x_t | 0, x_0, ..., x_{t-1}) / num_bytes``. The 0 is the id RWKV reads before a
    document; with it the first token is scored like every other. The state is carried from window to window, so the
    window's size costs memory and changes nothing (but for rounding).

    Args:
        model: any causal model of this package; its mode is left as it is, and no graph is built.
        data: ``(n,)`` token ids, at least one. A numpy array may be memory-mapped: a window at a time is read.
        window: tokens per forward call.
        num_bytes: bytes of the text that ``data`` encodes; ``None`` means one byte a token.
        progress: called after each window with the tokens scored so far and the bits per byte of those.

    Raises:
        ValueError: no data, data that is no row of ids of the model's vocabulary, a window or ``num_bytes`` below 1,
            or a likelihood that is not finite.
    """
    for name, value in (("window", window), ("num_bytes", num_bytes)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is {value!r}; an integer of 1 or more is accepted")
    ids = data.cpu().numpy() if isinstance(data, Tensor) else np.asarray(data)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"data has shape {ids.shape} and dtype {ids.dtype}; one row of integers is accepted")
    if ids.size == 0:
        raise ValueError("data is empty; at least one token is needed")
    count, vocab_size = int(ids.size), model.config.vocab_size
    bytes_a_token = 1.0 if num_bytes is None else num_bytes / count
    device = next(model.parameters()).device
    state: ModelState | None = None
    previous, nats, started = 0, 0.0, time.perf_counter()
    with torch.no_grad():
        for start in range(0, count, window):
            piece = ids[start : start + window].astype(np.int64)
            if piece.min() < 0 or piece.max() >= vocab_size:
                outside = int(piece.min()) if piece.min() < 0 else int(piece.max())
                raise ValueError(f"data holds the id {outside}; this model's ids are 0 to {vocab_size - 1}")
            targets = torch.from_numpy(piece).to(device)
            inputs = torch.cat([targets.new_tensor([previous]), targets[:-1]])
            logits, state = model(inputs[None], state)
            scores = logits[0] if logits.dtype == torch.float64 else logits[0].float()
            losses = F.cross_entropy(scores, targets, reduction="none")
            nats += float(losses.double().sum())
            previous = int(piece[-1])
            if progress is not None:
                done = start + len(piece)
                progress(done, nats / math.log(2) / (done * bytes_a_token))
    if not math.isfinite(nats):
        raise ValueError(f"the negative log likelihood is {nats}: the model's logits are not finite")
    size = count if num_bytes is None else num_bytes
    mean = nats / count
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "tokens": count,
        "bytes": size,
        "seconds": time.perf_counter() - started,
    }
