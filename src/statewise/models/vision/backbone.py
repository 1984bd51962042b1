"""What all models of images here ask and do alike, around the architecture that is each one's own.

Legend: B images, C channels, H and W height and width, N tokens, one a patch, in the order of reading; ``grid`` is
(rows, columns) of patches.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = [
    "MapFormat",
    "as_features",
    "check_count",
    "check_images",
    "check_rate",
    "drop_path",
    "drop_path_rates",
    "feature_info",
    "grid_of",
    "pad_to_patches",
    "pair",
    "refuse_state",
    "resize_positions",
    "run_blocks",
    "take_indices",
]

MapFormat = Literal["NCHW", "NLC"]


def pair(name: str, value: Any) -> tuple[int, int]:
    """Height and width, from one number for both or from two.

    Raises:
        ValueError: anything else than one or two integers from 1; ``name`` says which argument it was.
    """
    both = (value, value) if isinstance(value, int) else value
    if (
        not isinstance(both, Sequence)
        or len(both) != 2
        or not all(isinstance(side, int) and not isinstance(side, bool) and side >= 1 for side in both)
    ):
        raise ValueError(f"{name} is {value!r}; accepted are an integer from 1 or two, (height, width)")
    return both[0], both[1]


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Whether ``value`` is an integer from ``least`` on; ``name`` says what it is.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; accepted are integers from {least}")


def check_rate(name: str, value: Any) -> None:
    """Whether ``value`` is a share of what is dropped, from 0 to below 1.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise ValueError(f"{name} is {value!r}; accepted are numbers from 0 to below 1")


def check_images(name: str, images: Tensor, channels: int) -> None:
    """Whether a model can read ``images``: ``(B, channels, H, W)`` of floating point, with at least one pixel each.

    Args:
        name: of the model, for messages.

    Raises:
        ValueError: it cannot.
    """
    if images.dim() != 4:
        raise ValueError(
            f"{name}: images have shape {tuple(images.shape)}; accepted is (B, {channels}, H, W)"
            + (" (one image: images[None])" if images.dim() == 3 else "")
        )
    if images.shape[1] != channels:
        raise ValueError(f"{name}: images have {images.shape[1]} channels; this model reads {channels}")
    if images.shape[2] < 1 or images.shape[3] < 1:
        raise ValueError(f"{name}: images are {images.shape[2]}×{images.shape[3]} pixels; at least one is needed")
    if not images.dtype.is_floating_point:
        raise ValueError(f"{name}: images have dtype {images.dtype}; accepted is floating point, normalised")


def refuse_state(name: str) -> NoReturn:
    """A model that looks both ways is asked for a state or a step.

    Raises:
        ValueError: always, with the reason.
    """
    raise ValueError(
        f"{name}: not causal: every output needs the whole image, so there is no state to carry and no single step; "
        "run forward on whole images"
    )


def grid_of(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches of an image padded by :func:`pad_to_patches`."""
    return -(-image_size[0] // patch_size[0]), -(-image_size[1] // patch_size[1])


def pad_to_patches(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """``(B, C, H, W)`` with zeros at the bottom and on the right, up to whole patches."""
    rows, columns = grid_of((images.shape[2], images.shape[3]), patch_size)
    bottom, right = rows * patch_size[0] - images.shape[2], columns * patch_size[1] - images.shape[3]
    return F.pad(images, (0, right, 0, bottom)) if bottom or right else images


def resize_positions(positions: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Embeddings of positions ``(1, rows·columns, C)`` of one grid for another: bicubic, corners not aligned.

    No antialiasing when the grid shrinks, as the published models were trained (timm smooths here). Computed in float32
    at least; the dtype is kept. The same grid gives the same tensor.

    Raises:
        ValueError: positions of another grid.
    """
    if positions.dim() != 3 or positions.shape[0] != 1 or positions.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"positions have shape {tuple(positions.shape)}; accepted is (1, {grid[0] * grid[1]}, C) for a grid of "
            f"{grid[0]}×{grid[1]}"
        )
    if grid == to:
        return positions
    wide = positions if positions.dtype == torch.float64 else positions.float()
    plane = wide.reshape(1, *grid, -1).permute(0, 3, 1, 2)
    plane = F.interpolate(plane, size=to, mode="bicubic", align_corners=False)
    return plane.flatten(2).transpose(1, 2).to(positions.dtype)


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth (Huang et al. 2016): each of the B items whole or zero, the whole ones scaled by 1/(1-rate).

    Args:
        x: ``(B, ...)``, what a branch adds to the stream.
        rate: share of items that are zeroed, from 0 to below 1.
        training: outside of training nothing is dropped.
    """
    if rate == 0 or not training:
        return x
    kept = torch.empty(x.shape[0], *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device).bernoulli_(1 - rate)
    return x * (kept / (1 - rate))


def drop_path_rates(rate: float, num_layers: int) -> list[float]:
    """Rates of the layers, rising evenly from 0 to ``rate``; a single layer drops nothing."""
    return [rate * layer / max(num_layers - 1, 1) for layer in range(num_layers)]


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    *arguments: Any,
    checkpointing: bool = False,
    keep: Collection[int] = (),
) -> tuple[Tensor, list[Tensor]]:
    """Pass the stream through ``blocks``, each called as ``block(x, *arguments)``.

    Args:
        blocks: in order; give fewer to stop early.
        checkpointing: recompute each block in backward instead of keeping its activations (where gradients are asked
            for).
        keep: numbers of blocks after which the stream is wanted.

    Returns:
        the stream after the last block, and after each of ``keep``, in the order of blocks.
    """
    kept = []
    for number, block in enumerate(blocks):
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, *arguments, use_reentrant=False)
        else:
            x = block(x, *arguments)
        if number in keep:
            kept.append(x)
    return x, kept


def take_indices(name: str, indices: int | Sequence[int] | None, num_layers: int) -> list[int]:
    """Numbers of blocks, rising: ``None`` is all of them, n the last n, a list these, negative ones from the end.

    Raises:
        ValueError: a number that is no block of the model, or none at all.
    """
    if indices is None:
        return list(range(num_layers))
    if isinstance(indices, int):
        if not 1 <= indices <= num_layers:
            raise ValueError(f"{name}: indices is {indices}; accepted are 1..{num_layers} last blocks, or a list")
        return list(range(num_layers - indices, num_layers))
    wrong = [index for index in indices if not isinstance(index, int) or not -num_layers <= index < num_layers]
    if wrong or not len(indices):
        raise ValueError(
            f"{name}: indices are {list(indices)!r}; accepted are block numbers -{num_layers}..{num_layers - 1}"
        )
    return sorted({index % num_layers for index in indices})


def as_features(tokens: Tensor, grid: tuple[int, int], output_fmt: str) -> Tensor:
    """Patch tokens ``(B, N, C)`` as a map ``(B, C, rows, columns)`` ("NCHW"), or as they are ("NLC").

    Raises:
        ValueError: another format.
    """
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt is {output_fmt!r}; accepted are 'NCHW' and 'NLC'")
    if output_fmt == "NLC":
        return tokens
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid).contiguous()


def feature_info(prefix: str, num_layers: int, width: int, patch_size: tuple[int, int]) -> list[dict[str, Any]]:
    """timm's description of the maps after each block: ``module``, ``num_chs`` and ``reduction`` (pixels a token)."""
    return [
        {"module": f"{prefix}.{layer}", "num_chs": width, "reduction": math.gcd(*patch_size)}
        for layer in range(num_layers)
    ]
