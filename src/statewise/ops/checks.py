"""What every public operator asks of its arguments, said in one line when it is not met."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = [
    "accumulation_dtype",
    "activation_dtype",
    "check_shapes",
    "check_state",
    "start_state",
    "trusting_values",
    "values_are_read",
]

_trusting = ContextVar("trusting", default=False)


@contextmanager
def trusting_values() -> Iterator[None]:
    """Tokens and targets are taken as they are: for a caller who knows that they are in range.

    To read a value is to wait for the device it lies on, and while a CUDA graph is captured it cannot be done.
    """
    token = _trusting.set(True)
    try:
        yield
    finally:
        _trusting.reset(token)


def values_are_read() -> bool:
    """Whether checks may look at the values of tensors: not while tracing, and not where they are trusted."""
    return not torch.compiler.is_compiling() and not _trusting.get()


def check_shapes(op: str, **arguments: tuple[Tensor, str]) -> dict[str, int]:
    """Bind one size to every letter.

    Args:
        op: the public name, for messages.
        **arguments: name = (tensor, letters), e.g. ``k=(k, "B T C")``; equal letters mean equal sizes.

    Returns:
        letter → size.

    Raises:
        ValueError: an argument that is no floating-point tensor, has another shape, or lies on another device.
    """
    sizes: dict[str, int] = {}
    first = next(iter(arguments))
    device = arguments[first][0].device if isinstance(arguments[first][0], Tensor) else None
    for name, (tensor, spec) in arguments.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{op}: {name} has dtype {tensor.dtype}; accepted are floating-point dtypes")
        if tensor.device != device:
            raise ValueError(f"{op}: {name} lies on {tensor.device}, {first} on {device}")
        letters = spec.split()
        if tensor.dim() != len(letters) or any(
            sizes.get(x, n) != n for x, n in zip(letters, tensor.shape, strict=True)
        ):
            known = ", ".join(f"{x}={sizes[x]}" for x in letters if x in sizes)
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}; accepted is ({', '.join(letters)})"
                + (f" with {known}" if known else "")
            )
        for letter, size in zip(letters, tensor.shape, strict=True):
            sizes.setdefault(letter, size)
    return sizes


def check_state(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise ``ValueError`` unless ``tensor`` can be the state called ``name``."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; accepted is {shape}")
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}; accepted are floating-point dtypes")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} lies on {tensor.device}, the inputs on {device}")


def start_state(op: str, state: Tensor | None, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """The state to begin with, of ``dtype`` and on the device of ``like``: zeros, or ``state`` checked."""
    if state is None:
        return torch.zeros(shape, dtype=dtype, device=like.device)
    check_state(op, "state", state, shape, like.device)
    return state.to(dtype)


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any input is float64, float32 otherwise: the dtype of sums and states."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def activation_dtype(sums: torch.dtype, *tensors: Tensor | None) -> torch.dtype:
    """What a compiled kernel reads and writes: bfloat16 when all ``tensors`` are and sums are float32, the dtype of
    sums otherwise."""
    half = sums == torch.float32 and all(t is None or t.dtype == torch.bfloat16 for t in tensors)
    return torch.bfloat16 if half else sums
