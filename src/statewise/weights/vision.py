"""Official files of Vision-RWKV and VRWKV6, as a name map.

Our names are the official classifier's: ``backbone.`` before all but the head, which is ``head.fc``, or ``head.0`` and
``head.2``. Detectors publish a bare backbone. Sizes are read from tensors. They do not tell whether norms come before
or after, nor how far and of how many channels neighbours are mixed: official files hold the text of their
configuration, which is parsed, never run; without it the caller says.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from statewise.weights.contents import count_layers, size_of

__all__ = ["FAMILIES", "detect", "options_of", "parse_options", "to_ours"]

#: Architectures read here: name of their official class.
FAMILIES = {"vrwkv": "VRWKV", "vrwkv6": "VRWKV6"}

_MARKS = {"vrwkv": "layers.0.att.spatial_decay", "vrwkv6": "layers.0.att.time_faaaa"}
_POSITIONS = "backbone.pos_embed"
_LARGEST_TEXT = 1 << 17  # characters of a configuration that are parsed
# Official option → our field: what tensors cannot tell, and what they do.
_UNTOLD = {"post_norm": "post_norm", "shift_pixel": "shift_pixel", "channel_gamma": "channel_gamma"}
_RATES = {"drop_path_rate": "drop_path_rate", "drop_rate": "drop_rate"}
_TOLD = {
    "embed_dims": "width",
    "depth": "num_layers",
    "patch_size": "patch_size",
    "in_channels": "in_channels",
    "hidden_rate": "hidden_rate",
    "key_norm": "key_norm",
    "k_norm": "key_norm",
    "final_norm": "final_norm",
}


def detect(names: set[str]) -> str | None:
    """Whose names these are, or ``None``."""
    bare = {name.removeprefix("module.").removeprefix("backbone.") for name in names}
    if "patch_embed.projection.weight" not in bare:
        return None
    return next((family for family, mark in _MARKS.items() if mark in bare), None)


def options_of(beside: Mapping[str, Any] | None, within: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The backbone's options by official names, or ``None``.

    Args:
        beside: a parsed ``config.json``, whose options may be within ``model`` and ``backbone``.
        within: what the file itself holds: a text for :func:`parse_options`, or a dictionary with ``MODEL.VRWKV``.

    Raises:
        ValueError: a text that :func:`parse_options` refuses.
    """
    if isinstance(within, str):
        return parse_options(within) or None
    found: Any = within if beside is None else beside
    for key in ("model", "MODEL", "backbone", "VRWKV"):
        inner = found.get(key) if isinstance(found, Mapping) else None
        found = inner if isinstance(inner, Mapping) else found
    options = {str(name).lower(): value for name, value in (found or {}).items()}
    return options if {*_UNTOLD, *_TOLD, "img_size"} & set(options) else None


def parse_options(text: str) -> dict[str, Any]:
    """Options of the backbone in an official configuration, Python text with ``model = dict(backbone=dict(...))``.

    Nothing is run: calls of ``dict`` with literals in them are taken apart, and everything else is passed over.

    Raises:
        ValueError: the text is longer than 131072 characters, or no Python.
    """
    if len(text) > _LARGEST_TEXT:
        raise ValueError(f"the configuration has {len(text)} characters; at most {_LARGEST_TEXT} are read")
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the configuration is no Python text: {error}") from error
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="model")], value=value):
                backbone = _entries(value).get("backbone")
                found = {} if backbone is None else _entries(backbone)
                return {name: _literal(node) for name, node in found.items() if _literal(node) is not ...}
    return {}


def _entries(node: ast.expr) -> dict[str, ast.expr]:
    """The entries of ``dict(a=...)`` or ``{"a": ...}``."""
    match node:
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
            return {keyword.arg: keyword.value for keyword in keywords if keyword.arg is not None}
        case ast.Dict(keys=keys, values=values):
            both = zip(keys, values, strict=True)
            return {key.value: value for key, value in both if isinstance(key, ast.Constant) and type(key.value) is str}
    return {}


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, RecursionError, MemoryError):
        return ...


def to_ours(
    family: str, options: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields of our configuration and tensors by our names.

    Args:
        family: what :func:`detect` said.
        options: the official configuration's, where one was found: an option that is not in it has its official
            default. ``None`` means there is no configuration.
        tensors: by official names. Unknown names pass through, for the reader to refuse by name.
        given: fields the caller gives. Given ``post_norm`` stands in for a missing configuration; ``image_size`` tells
            the grid of positions where it fits their number.

    Returns:
        fields that tensors and configuration decide, ``image_size`` of the positions among them, and tensors: nothing
        is resized or left out.

    Raises:
        ValueError: a tensor the sizes are read from is missing or mis-shaped, the configuration contradicts the
            tensors, or nothing says what tensors cannot.
    """
    renamed = {_our_name(name, tensors): tensor for name, tensor in tensors.items()}
    if len(renamed) != len(tensors):
        raise ValueError("two tensors have the same name behind their prefixes")
    fields = _sizes(family, renamed)
    if options is None and "post_norm" not in given:
        asked = "post_norm, shift_pixel and channel_gamma" if family == "vrwkv" else "post_norm and shift_pixel"
        raise ValueError(
            f"tensors do not tell {asked}, and there is no configuration beside them: give post_norm as a field "
            "(the others then have their published values unless given)"
        )
    options = options or {}
    kind = options.get("type")
    if isinstance(kind, str) and kind.removesuffix("_Adapter") != FAMILIES[family]:
        raise ValueError(f"the configuration's type is {kind!r}, but the tensors are of a {FAMILIES[family]}")
    for option, field in _TOLD.items():
        if option in options and options[option] != fields[field]:
            raise ValueError(
                f"the configuration's {option} is {options[option]!r}, but the tensors have {fields[field]}"
            )
    for option, field in (_UNTOLD | _RATES).items():
        if option in options:
            fields.setdefault(field, options[option])
    if "layer_scale" in fields and isinstance(options.get("init_values"), int | float):
        fields["layer_scale"] = options["init_values"]
    if family == "vrwkv6":
        fields.pop("channel_gamma", None)
    fields["image_size"] = _image_size(options.get("img_size", given.get("image_size")), fields, renamed)
    return fields, renamed


def _our_name(name: str, tensors: Mapping[str, Tensor]) -> str:
    name = name.removeprefix("module.")
    if name in ("head.weight", "head.bias"):
        return f"head.fc.{name.removeprefix('head.')}"
    bare = "pos_embed" in tensors or "module.pos_embed" in tensors  # a detector's backbone by itself
    return f"backbone.{name}" if bare and not name.startswith("head.") else name


def _sizes(family: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What shapes and names decide."""

    shape = partial(size_of, tensors)
    width, channels, *patch = shape("backbone.patch_embed.projection.weight", 4)
    first = "backbone.layers.0."
    hidden = shape(first + "ffn.key.weight", 2)[0]
    if hidden % width:
        raise ValueError(f"tensor {first}ffn.key.weight has {hidden} rows, which is no multiple of the width {width}")
    num_layers = count_layers(tensors, "backbone.layers.")
    fields: dict[str, Any] = {
        "width": width,
        "num_layers": num_layers,
        "patch_size": patch[0] if patch[0] == patch[1] else tuple(patch),
        "in_channels": channels,
        "hidden_rate": hidden // width,
        "key_norm": first + "att.key_norm.weight" in tensors,
        "final_norm": "backbone.ln1.weight" in tensors,
        "num_classes": 0,
    }
    if first + "gamma1" in tensors:
        fields["layer_scale"] = 1.0  # where it started does not matter any more
    if family == "vrwkv" and first + "att.spatial_mix_k" not in tensors:
        fields["shift_pixel"] = 0
    if family == "vrwkv6":
        fields["head_size"] = shape(first + "att.time_faaaa", 2)[1]
        fields["mix_rank"] = shape(first + "att.time_maa_w2", 3)[1]
        fields["decay_rank"] = shape(first + "att.time_decay_w2", 2)[0]
    if "head.fc.weight" in tensors:
        fields["num_classes"] = shape("head.fc.weight", 2)[0]
    elif "head.2.weight" in tensors:
        fields["num_classes"], fields["head_width"] = shape("head.2.weight", 2)
    return fields


def _grid(image_size: Any, patch_size: Any) -> tuple[int, int]:
    """Rows and columns of patches, the last ones padded.

    Raises:
        ValueError: not one or two integers from 1.
    """
    sides, patch = (
        [side] * 2 if isinstance(side, int) else list(side) if isinstance(side, (list, tuple)) else []
        for side in (image_size, patch_size)
    )
    if len(sides) != 2 or len(patch) != 2 or not all(type(n) is int and n >= 1 for n in (*sides, *patch)):
        raise ValueError(f"image_size is {image_size!r}; accepted are an integer from 1 or two, (height, width)")
    return -(-sides[0] // patch[0]), -(-sides[1] // patch[1])


def _image_size(told: Any, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """What the positions were made for: as ``told`` if that fits their number, or a square."""
    positions = tensors.get(_POSITIONS)
    if positions is None or positions.dim() != 3:
        raise ValueError(f"tensor {_POSITIONS} is missing or has no three dimensions")
    count = positions.shape[1]
    if told is not None and math.prod(_grid(told, fields["patch_size"])) == count:
        return told
    side, patch = math.isqrt(count), fields["patch_size"]
    if side * side != count:
        raise ValueError(
            f"tensor {_POSITIONS} has {count} places, which are no square: give the image_size they are of"
        )
    return side * patch if isinstance(patch, int) else (side * patch[0], side * patch[1])
