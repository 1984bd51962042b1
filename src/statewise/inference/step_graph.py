"""Single steps as one launch: a CUDA graph of ``model.step`` that is captured once and replayed for every token.

A step of a small batch is hundreds of short kernels, and telling the device about each takes longer than running it. A
graph is told once. It reads and writes the same memory every time, so what a model remembers lies in a buffer of the
graph's own while it runs, and is copied into it at the start and out of it when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from statewise.ops.checks import trusting_values
from statewise.state import ModelState

__all__ = ["Capture", "StepGraph", "capture_on_device"]

Replay: TypeAlias = Callable[[], object]
_WARM_UP = 3


class Capture(Protocol):
    """Records work once. :func:`capture_on_device` is the real one."""

    def __call__(self, work: Callable[[], Sequence[Tensor]], carried: Sequence[Tensor]) -> tuple[Tensor, Replay]:
        """Record one run of ``work`` and, after it, the copies of all it returns but the first into ``carried``.

        Nothing that ``carried`` holds may have changed when this returns.

        Returns:
            what ``work`` returned first, in memory that every replay fills anew, and the replay.
        """
        ...


class _Stepping(Protocol):
    @property
    def config(self) -> Any: ...
    def step(self, token: Tensor, state: ModelState) -> tuple[Tensor, ModelState]: ...


def capture_on_device(work: Callable[[], Sequence[Tensor]], carried: Sequence[Tensor]) -> tuple[Tensor, Replay]:
    """A CUDA graph on the device of ``carried``.

    Raises:
        RuntimeError: ``work`` does what cannot be captured, such as reading a value back.
    """
    device = carried[0].device
    with torch.cuda.device(device):
        # Off the stream of everybody else, and more than once: kernels are compiled and tuned, libraries allocate.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: only what this one does is held to the rules of capturing.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            first, *rest = work()
            for old, new in zip(carried, rest, strict=True):
                old.copy_(new)

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return first, replay


class StepGraph:
    """``model.step`` for one batch size, with the state inside.

    It computes what ``model.step`` computes, with the same kernels, as long as weights stay where they are in memory;
    values written into them in place are seen. A model that is moved, cast or wrapped needs a new one.

    Args:
        model: a causal language model of ours whose ``step`` reads no value back.
        state: of as many rows as will be stepped, on the model's device. Copied.
        capture: how to record.

    Raises:
        RuntimeError: the step cannot be captured.
    """

    def __init__(self, model: _Stepping, state: ModelState, *, capture: Capture = capture_on_device) -> None:
        with torch.no_grad():
            self._state = state.detach().map(lambda leaf: leaf.contiguous().clone())
        leaves = pytree.tree_leaves(self._state)
        self._vocab_size: int = model.config.vocab_size
        self._token = torch.zeros(state.batch_size, dtype=torch.int64, device=leaves[0].device)

        def work() -> list[Tensor]:
            logits, after = model.step(self._token, self._state)
            return [logits, *pytree.tree_leaves(after)]

        with torch.no_grad(), trusting_values():
            self._logits, self._replay = capture(work, leaves)

    @property
    def state(self) -> ModelState:
        """A copy of what has been read so far."""
        with torch.no_grad():
            return self._state.clone()

    def load(self, state: ModelState) -> None:
        """Continue from ``state``, of the batch size this was made for; copied.

        Raises:
            ValueError: a state of another family or other sizes.
        """
        given, spec = pytree.tree_flatten(state)
        own, own_spec = pytree.tree_flatten(self._state)
        if spec != own_spec or any(a.shape != b.shape for a, b in zip(given, own, strict=True)):
            raise ValueError("state: a StepGraph continues from states of the family and sizes it was made for")
        with torch.no_grad():
            for mine, other in zip(own, given, strict=True):
                mine.copy_(other)

    def step(self, token: Tensor) -> Tensor:
        """Read one token a row.

        Args:
            token: ids ``(B,)``. Those on the CPU are held against the vocabulary; on a device they are not looked at.

        Returns:
            logits ``(B, vocab)``, which hold until the next step.

        Raises:
            ValueError: another number of rows, or an id outside the vocabulary.
        """
        if token.shape != self._token.shape or token.dtype.is_floating_point:
            raise ValueError(
                f"token has shape {tuple(token.shape)} and dtype {token.dtype}; integers of shape "
                f"{tuple(self._token.shape)} are accepted"
            )
        if token.device.type == "cpu" and token.numel():
            low, high = int(token.min()), int(token.max())
            if low < 0 or high >= self._vocab_size:
                raise ValueError(f"token {low if low < 0 else high} is outside the vocabulary of {self._vocab_size}")
        with torch.no_grad():
            self._token.copy_(token)
            self._replay()
        return self._logits
