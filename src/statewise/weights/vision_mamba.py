"""Vision Mamba's published layout: our names are its own, so what is left is to find the sizes.

Tensors do not tell how far apart patches are. The published models read images of 224 pixels in patches that touch or
half overlap; their number tells which, and nothing else is guessed: other files need ``image_size`` or ``stride``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from statewise.weights.contents import count_layers, size_of

__all__ = ["detect", "to_ours"]

_PREFIX = re.compile(r"^(?:module\.)?(?:backbone\.)?(?=(?:cls_token|pos_embed|patch_embed|layers|norm_f|head)\b)")
_TRAINED_AT = 224
_MIXER = "layers.0.mixer."


def detect(names: set[str]) -> bool:
    """Whether these are the names of a Vision Mamba, with a prefix or without."""
    ours = {_PREFIX.sub("", name) for name in names}
    return "patch_embed.proj.weight" in ours and _MIXER + "x_proj.weight" in ours


def to_ours(tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields of our configuration and tensors by our names, as the file has them: nothing is resized or left out.

    Args:
        tensors: by the layout's names, with the prefixes ``module.`` and ``backbone.`` or without. Unknown names pass
            through, for the reader to refuse by name.
        given: fields that the caller knows. ``stride``, or an ``image_size`` that fits the position embedding, decide
            what tensors do not.

    Returns:
        fields that the tensors decide, ``image_size`` and ``stride`` of the position embedding among them, and tensors.

    Raises:
        ValueError: a tensor the sizes are read from is missing or mis-shaped, a model without the class token or with
            two, or one whose ``stride`` cannot be told.
    """
    renamed = {_PREFIX.sub("", name): tensor for name, tensor in tensors.items()}
    if len(renamed) != len(tensors):
        raise ValueError("two tensors have the same name behind their prefixes")
    fields = _sizes(renamed)
    return fields | _places(given, fields["patch_size"], renamed["pos_embed"].shape[1] - 1), renamed


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What shapes and names decide."""

    shape = partial(size_of, tensors)
    if "cls_token" not in tensors:
        raise ValueError("tensor cls_token is missing: a Vision Mamba is read with one class token, in the middle")
    if _MIXER + "A_b_log" not in tensors or _MIXER + "conv1d_b.weight" not in tensors:
        raise ValueError(f"tensors {_MIXER}A_b_log and conv1d_b are missing: mixers of bimamba_type v2 are read")
    width, in_channels, *patch = shape("patch_embed.proj.weight", 4)
    if shape("pos_embed", 3)[1] < 2:
        raise ValueError("tensor pos_embed has one place; expected the class token's and at least one patch's")
    channels, state_size = shape(_MIXER + "A_log", 2)
    if channels % width:
        raise ValueError(f"tensor {_MIXER}A_log has {channels} channels, which is no multiple of the width {width}")
    rank = shape(_MIXER + "dt_proj.weight", 2)[1]
    num_layers = count_layers(tensors, "layers.")
    return {
        "num_classes": shape("head.weight", 2)[0] if "head.weight" in tensors else 0,
        "patch_size": patch[0] if patch[0] == patch[1] else tuple(patch),
        "in_channels": in_channels,
        "width": width,
        "num_layers": num_layers,
        "state_size": state_size,
        "conv_width": shape(_MIXER + "conv1d.weight", 3)[2],
        "expand": channels // width,
        "dt_rank": None if rank == -(-width // 16) else rank,
        "bias": _MIXER + "in_proj.bias" in tensors,
        "conv_bias": _MIXER + "conv1d.bias" in tensors,
        "rms_norm": "norm_f.bias" not in tensors,
        # Where gamma started is over by now: any number says that it is there.
        "layer_scale": 1.0 if _MIXER + "gamma" in tensors else None,
    }


def _places(given: Mapping[str, Any], patch_size: int | tuple[int, int], count: int) -> dict[str, Any]:
    """Stride and image size of a position embedding for ``count`` patches."""
    patch = _pair(patch_size)
    touching, half = patch, (max(patch[0] // 2, 1), max(patch[1] // 2, 1))
    strides = [_pair(given["stride"])] if given.get("stride") is not None else [touching, half]
    sizes = [(_TRAINED_AT, _TRAINED_AT)]
    if given.get("image_size") is not None:
        sizes.append(_pair(given["image_size"]))
    for size in sizes:
        for stride in strides:
            if math.prod(_grid(size, patch, stride)) == count:
                return {"image_size": _single(size), "stride": None if stride == patch else _single(stride)}
    side = math.isqrt(count)
    if side * side == count and given.get("stride") is not None:
        height, width = ((side - 1) * step + reach for step, reach in zip(strides[0], patch, strict=True))
        return {"image_size": _single((height, width)), "stride": _single(strides[0])}
    raise ValueError(
        f"tensor pos_embed has places for {count} patches of {patch[0]}×{patch[1]}: their stride cannot be told; give "
        "stride= (for square images), or the image_size= that the embedding is made for"
    )


def _grid(size: tuple[int, int], patch: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    rows, columns = (
        max(-(-(whole - reach) // step), 0) + 1 for whole, reach, step in zip(size, patch, stride, strict=True)
    )
    return rows, columns


def _pair(value: Any) -> tuple[int, int]:
    both = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (list, tuple)) else ()
    if len(both) != 2 or not all(isinstance(side, int) and side >= 1 for side in both):
        raise ValueError(f"a size in pixels is {value!r}; accepted are an integer from 1 or two, (height, width)")
    return both[0], both[1]


def _single(both: tuple[int, int]) -> int | tuple[int, int]:
    return both[0] if both[0] == both[1] else both
