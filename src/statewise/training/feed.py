"""Batches on the device they are trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from statewise.training.data import Batch, Batches

__all__ = ["Feed", "send"]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; on a GPU it arrives while the host goes on."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # not pinned, the copy would be waited for


class Feed:
    """Reads the next batch and sends it off while the device still works on this one.

    Args:
        batches: the order; what a batch holds follows from its number alone, so reading ahead changes nothing.
        device: where batches are wanted.
    """

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._ahead: dict[int, Batch] = {}

    def take(self, index: int) -> Batch:
        """Batch ``index``: the one that was prepared, or read now."""
        batch = self._ahead.pop(index, None)
        return self._read(index) if batch is None else batch

    def prepare(self, index: int) -> None:
        """Batch ``index`` will be wanted next."""
        self._ahead = {index: self._read(index)}

    def _read(self, index: int) -> Batch:
        inputs, targets, fresh = self._batches.read(index)
        return Batch(send(inputs, self._device), send(targets, self._device), fresh)
