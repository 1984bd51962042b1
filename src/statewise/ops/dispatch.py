"""Which backend serves which operator here. It can be asked (:func:`backends`) and it can be forced (``backend=``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from statewise.ops import gpu
from statewise.ops.kernels import library

__all__ = ["BACKENDS", "BackendStatus", "backends", "choose", "prefer"]

#: Fastest last: `None` takes the last one that serves.
BACKENDS = ("reference", "torch", "native", "triton")

_PLANNED = {
    "native": "this release has no compiled kernel for it",
    "triton": "this release has no Triton kernel for it",
}

# An operator whose parallel form is its reference (a shift, a convolution window) lists both names all the same:
# `backend="torch"` must work everywhere.
_SERVED: dict[str, tuple[str, ...]] = {
    "bi_wkv": ("reference", "torch", "native", "triton"),
    "causal_conv1d": ("reference", "torch", "native", "triton"),
    "mamba3": ("reference", "torch"),
    "selective_scan": ("reference", "torch", "native", "triton"),
    "ssd": ("reference", "torch", "native", "triton"),
    "token_mix": ("reference", "torch", "native", "triton"),
    "token_shift": ("reference", "torch"),
    "wkv4": ("reference", "torch", "native", "triton"),
    "wkv6": ("reference", "torch", "native", "triton"),
    "wkv7": ("reference", "torch", "native", "triton"),
}


# Asked once, here, and not where an operator is called: torch.compile could not trace that.
_NO_LIBRARY = library().reason

_CPU = torch.device("cpu")


class BackendStatus(NamedTuple):
    """Whether a backend serves an operator on this machine; if not, why."""

    serves: bool
    reason: str


def _status(op: str, name: str, device: torch.device) -> BackendStatus:
    if name not in _SERVED[op]:
        return BackendStatus(False, _PLANNED[name])
    if name == "native" and device.type != "cpu":
        return BackendStatus(False, f"compiled kernels serve the CPU, not {device.type}")
    if name == "native" and _NO_LIBRARY:
        return BackendStatus(False, _NO_LIBRARY)
    if name == "triton" and (reason := gpu.serves(device)):
        return BackendStatus(False, reason)
    return BackendStatus(True, "")


def _fastest(op: str, device: torch.device) -> str:
    """Never the interpreter: that is for who asks for it by name."""
    served = [name for name in _SERVED[op] if name != "triton" or device.type == "cuda"]
    return next(name for name in reversed(served) if _status(op, name, device).serves)


_preferred: str | None = None


@contextmanager
def prefer(backend: str) -> Iterator[None]:
    """Operators called inside that name no backend take ``backend`` wherever it serves, instead of the fastest.

    For whole models, which name none. A backward pass runs with the backend of its forward.

    Raises:
        ValueError: no such backend.
    """
    global _preferred
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; accepted are {', '.join(map(repr, BACKENDS))}")
    before, _preferred = _preferred, backend
    try:
        yield
    finally:
        _preferred = before


def choose(op: str, requested: str | None, device: torch.device) -> str:
    """The backend that runs ``op`` on ``device``: the fastest that serves, or the one asked for.

    Raises:
        ValueError: ``requested`` is unknown or cannot serve. Never falls back.
    """
    if requested is None:
        if _preferred is not None and _status(op, _preferred, device).serves:
            return _preferred
        return _fastest(op, device)
    if requested not in BACKENDS:
        raise ValueError(f"{op}: backend is {requested!r}; accepted are None, {', '.join(map(repr, BACKENDS))}")
    status = _status(op, requested, device)
    if not status.serves:
        raise ValueError(f"{op}: backend {requested!r} cannot serve: {status.reason}")
    return requested


def backends() -> dict[str, dict[str, BackendStatus]]:
    """Operator → backend → whether it serves on this machine and why not."""
    here = {"triton": torch.device("cuda") if torch.cuda.is_available() else _CPU}
    return {op: {name: _status(op, name, here.get(name, _CPU)) for name in BACKENDS} for op in sorted(_SERVED)}
