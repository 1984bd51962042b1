"""What a model of images looks at: its effective receptive field, and what each direction brings.

Legend: B images, C channels, N tokens in the order of reading, ``grid`` their rows and columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from statewise.models.vision.vision_rwkv import SpatialMix

__all__ = ["direction_shares", "effective_receptive_field"]


def effective_receptive_field(model: Any, images: Tensor, place: tuple[int, int] | None = None) -> Tensor:
    """How far each pixel moves what the model knows of one place (Luo et al. 2016).

    ``|∂ Σ_c f_c(place) / ∂ pixel|``, f being the last block's map, summed over the image's channels, then averaged over
    images and scaled to a largest value of 1. The model is run in ``eval`` mode and left in the mode it was in; its
    parameters get no gradient.

    Args:
        model: of ``statewise.list_models("vision")``.
        images: ``(B, C, height, width)``, normalised as the model reads them.
        place: row and column of a token; ``None`` means the middle of the grid.

    Returns:
        ``(height, width)`` float32 on the CPU; zeros where nothing reaches the place.

    Raises:
        ValueError: images that the model does not read, or a place that is not in the grid.
    """
    pixels = images.detach().clone().requires_grad_()
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            (features,) = model.forward_intermediates(pixels, 1, intermediates_only=True)
            rows, columns = features.shape[2:]
            row, column = (rows // 2, columns // 2) if place is None else place
            if not (0 <= row < rows and 0 <= column < columns):
                raise ValueError(f"place is {place!r}; the grid has {rows} rows and {columns} columns")
            (slope,) = torch.autograd.grad(features[:, :, row, column].sum(), pixels)
    finally:
        model.train(was_training)
    field = slope.abs().sum(1).mean(0).float().cpu()
    return field / field.max().clamp_min(torch.finfo(torch.float32).tiny)


@torch.no_grad()
def direction_shares(model: Any, images: Tensor) -> list[Tensor]:
    """How much of every token's average in :func:`statewise.ops.bi_wkv` comes from before it, from itself, from behind.

    The operator's weights are ``e^{(|t-i|-1)·log_w + k_i}`` of another token and ``e^{u+k_t}`` of the token itself; the
    three sums over i < t, i = t and i > t are divided by their total, and averaged over channels.

    Args:
        model: a Vision-RWKV that averages by ``bi_wkv``.
        images: ``(B, C, height, width)``, normalised as the model reads them.

    Returns:
        one ``(B, 3, N)`` float32 tensor a block, on the CPU; the three (before, itself, behind) add up to 1.

    Raises:
        ValueError: a model without such blocks, or images that it does not read.
    """
    mixers = [module for module in model.modules() if isinstance(module, SpatialMix)]
    if not mixers:
        raise ValueError(f"{type(model).__name__} has no blocks that average by bi_wkv; a Vision-RWKV has")
    keys: dict[nn.Module, Tensor] = {}
    handles = [
        mixer.key.register_forward_hook(lambda key, inputs, output: keys.__setitem__(key, output)) for mixer in mixers
    ]
    was_training = model.training
    model.eval()
    try:
        model.forward_features(images)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return [_shares(keys[mixer.key], mixer) for mixer in mixers]


def _shares(k: Tensor, mixer: SpatialMix) -> Tensor:
    """In float64 and logarithms, where nothing over- or underflows."""
    k = k.double()
    N = k.shape[1]
    log_w, u = -mixer.spatial_decay.double() / N, mixer.spatial_first.double() / N
    sums = torch.stack([_before(k, log_w), u + k, _before(k.flip(1), log_w).flip(1)], 1)
    return sums.softmax(1).mean(-1).float().cpu()


def _before(k: Tensor, log_w: Tensor) -> Tensor:
    """``log Σ_{i<t} e^{(t-i-1)·log_w + k_i}`` for every t, ``(B, N, C)``; -inf at the first token."""
    places = torch.arange(k.shape[1], dtype=k.dtype, device=k.device)[:, None]
    sums = torch.logcumsumexp(k - places * log_w, 1) + places * log_w  # up to and with t
    return torch.cat([torch.full_like(k[:, :1], -torch.inf), sums[:, :-1]], 1)
