"""What the name maps of every architecture ask of a checkpoint's tensors and configuration alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["count_layers", "look_up", "same_values", "size_of"]


def size_of(tensors: Mapping[str, Tensor], name: str, dimensions: int) -> torch.Size:
    """The shape of a tensor that must be there, with so many dimensions, none of them empty.

    Raises:
        ValueError: it is not; names the tensor.
    """
    if name not in tensors:
        raise ValueError(f"tensor {name} is missing")
    size = tensors[name].shape
    if len(size) != dimensions or 0 in size:
        raise ValueError(f"tensor {name} has shape {tuple(size)}; expected {dimensions} dimensions, none empty")
    return size


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, told twice: as a tied head is; NaN counts as equal to itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def count_layers(names: Iterable[str], prefix: str) -> int:
    """How many layers there are, by the numbers behind ``prefix`` in tensors' names.

    Raises:
        ValueError: the numbers have gaps.
    """
    pattern = re.compile(re.escape(prefix) + r"(\d{1,6})\.")
    numbers = {int(found[1]) for name in names if (found := pattern.match(name))}
    if len(numbers) != max(numbers) + 1:
        raise ValueError(f"layers are numbered {sorted(numbers)[:8]}; expected 0, 1, 2, ... without gaps")
    return len(numbers)


def look_up(config: Mapping[str, Any], key: str) -> Any:
    """The configuration's value under ``key``, which may be ``"outer.inner"``; ``None`` where there is none.

    Raises:
        ValueError: what is under ``outer`` is no object.
    """
    outer, _, inner = key.rpartition(".")
    if outer:
        config = config.get(outer) or {}
        if not isinstance(config, Mapping):
            raise ValueError(f"the configuration's {outer} is {config!r}; expected an object")
    return config.get(inner)
