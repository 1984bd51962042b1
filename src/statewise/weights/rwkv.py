"""RWKV's published ``.pth`` files: a flat dictionary whose names are our modules' names, and whose sizes tell the rest.

Pure functions on names and tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["UNUSED", "detect", "from_ours", "to_ours"]

_BLOCK = re.compile(r"blocks\.(\d+)\.")
#: In training checkpoints of RWKV-7; block 0 makes the values that later blocks mix in, and never reads these. They are
#: kept, so that a file comes back whole.
UNUSED = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
_RANKS = {"decay_rank": "w1", "iclr_rank": "a1", "value_rank": "v1", "gate_rank": "g1"}


def detect(names: set[str], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """``"rwkv4"``, ``"rwkv5"``, ``"rwkv6"``, ``"rwkv7"``, or ``None`` for what is no RWKV."""
    if "blocks.0.att.r_k" in names:
        return "rwkv7"
    if "blocks.0.att.time_maa_x" in names or "blocks.0.att.time_maa_w1" in names:
        return "rwkv6"
    if "blocks.0.att.ln_x.weight" in names:
        return "rwkv5"
    if {"blocks.0.att.time_decay", "blocks.0.att.time_first"} <= names:
        return "rwkv4"
    return None


def to_ours(architecture: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields of our configuration, read from sizes, and the tensors under our names (which are the official ones).

    Raises:
        ValueError: a tensor that sizes are read from is missing or has the wrong number of axes.
    """
    kept = dict(tensors)

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in kept:
            raise ValueError(f"tensor {name} is missing")
        if kept[name].dim() != axes:
            raise ValueError(f"tensor {name} has shape {tuple(kept[name].shape)}, expected {axes} axes")
        return tuple(kept[name].shape)

    vocab_size, width = shape("emb.weight", 2)
    layers = {int(match[1]) for name in kept if (match := _BLOCK.match(name))}
    if not layers or len(layers) != max(layers) + 1:
        raise ValueError(f"blocks are numbered {sorted(layers)[:8]}; expected 0, 1, 2, ... without gaps")
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "num_layers": len(layers),
        "width": width,
        "ffn_width": shape("blocks.0.ffn.key.weight", 2)[0],
    }
    if architecture == "rwkv5":
        version, heads = _generation_of_5(kept)
        if heads < 1 or width % heads:
            raise ValueError(f"blocks.0.att.time_decay has {heads} heads, which do not divide the width {width}")
        fields |= {"version": version, "head_size": width // heads}
    if architecture == "rwkv6":
        fields["head_size"] = shape("blocks.0.att.time_faaaa", 2)[1]
        # For wide models released files have twice the rank of others; the tensors alone are right.
        fields["mix_rank"] = shape("blocks.0.att.time_maa_w2", 3)[1]
        fields["decay_rank"] = shape("blocks.0.att.time_decay_w1", 2)[1]
    if architecture == "rwkv7":
        fields["head_size"] = shape("blocks.0.att.r_k", 2)[1]
        # Ranks follow several published formulas; the tensors alone are right.
        for field, name in _RANKS.items():
            block = 1 if name == "v1" and len(layers) > 1 else 0
            if f"blocks.{block}.att.{name}" in kept or name != "v1":
                fields[field] = shape(f"blocks.{block}.att.{name}", 2)[1]
        if set(UNUSED) <= set(kept):
            fields["keeps_unused"] = True
        if attention := sorted(name for name in kept if ".qkv." in name):
            raise ValueError(f"tensor {attention[0]} belongs to RWKV-7b's token attention, which is not supported")
        if "blocks.0.ffn.s_emb.weight" in kept:  # RWKV-7a
            rank = fields["deep_embed"] = shape("blocks.0.ffn.s1", 2)[1]
            # Checked before modules are made: the rank is squared, and an empty tensor may claim any.
            for name, want in (("s1", (width, rank)), ("s_emb.weight", (vocab_size, rank**2))):
                if (found := shape(f"blocks.0.ffn.{name}", 2)) != want or not rank:
                    raise ValueError(f"tensor blocks.0.ffn.{name} has shape {found}, expected {want} for rank {rank}")
    if architecture != "rwkv4" and any(name.endswith(".att.time_state") for name in kept):
        fields["learned_state"] = True
    return fields, kept


def _generation_of_5(tensors: Mapping[str, Tensor]) -> tuple[str, int]:
    """``"5.0"``, ``"5.1"`` or ``"5.2"``, and the heads: 5.1 brought the gate, 5.2 a decay for each key row."""
    name = "blocks.0.att.time_decay"
    if name not in tensors:
        raise ValueError(f"tensor {name} is missing")
    decay = tensors[name]
    if decay.dim() not in (1, 2):
        raise ValueError(f"tensor {name} has shape {tuple(decay.shape)}, expected 1 or 2 axes")
    per_row = decay.dim() == 2
    gated = "blocks.0.att.gate.weight" in tensors
    return ("5.2" if per_row else "5.1" if gated else "5.0"), decay.shape[0]


def from_ours(architecture: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The flat dictionary of a ``.pth``. The names are the same; ``fields`` follow from the shapes and are not kept."""
    return dict(tensors)
