"""Which backend serves which operator here. It can be asked (:func:`backends`) and it can be forced (``backend=``)."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BACKENDS", "BackendStatus", "backends", "choose"]

#: Fastest last: `None` takes the last one that serves.
BACKENDS = ("reference", "torch", "native", "triton")

_PLANNED = {
    "native": "this release has no compiled CPU kernels",
    "triton": "this release has no Triton kernels",
}

# An operator whose parallel form is its reference (a shift, a convolution window) lists both names all the same:
# `backend="torch"` must work everywhere.
_SERVED: dict[str, tuple[str, ...]] = {
    "bi_wkv": ("reference", "torch"),
    "causal_conv1d": ("reference", "torch"),
    "selective_scan": ("reference", "torch"),
    "token_shift": ("reference", "torch"),
    "wkv4": ("reference", "torch"),
    "wkv6": ("reference", "torch"),
    "wkv7": ("reference", "torch"),
}


class BackendStatus(NamedTuple):
    """Whether a backend serves an operator on this machine; if not, why."""

    serves: bool
    reason: str


def choose(op: str, requested: str | None) -> str:
    """The backend that runs ``op``: the fastest that serves, or the one asked for.

    Raises:
        ValueError: ``requested`` is unknown or cannot serve. Never falls back.
    """
    if requested is None:
        return _SERVED[op][-1]
    if requested not in BACKENDS:
        raise ValueError(f"{op}: backend is {requested!r}; accepted are None, {', '.join(map(repr, BACKENDS))}")
    if requested not in _SERVED[op]:
        raise ValueError(f"{op}: backend {requested!r} cannot serve: {_PLANNED[requested]}")
    return requested


def backends() -> dict[str, dict[str, BackendStatus]]:
    """Operator → backend → whether it serves on this machine and why not."""
    return {
        op: {
            name: BackendStatus(True, "") if name in served else BackendStatus(False, _PLANNED[name])
            for name in BACKENDS
        }
        for op, served in sorted(_SERVED.items())
    }
