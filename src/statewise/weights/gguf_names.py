"""Tensors under llama.cpp's names, in its shapes, and the way back: RWKV-6, RWKV-7, Mamba and Mamba-2.

Pure functions on names and tensors. Facts are those of ``convert_hf_to_gguf.py`` in ggml-org/llama.cpp:

- Low-rank matrices are stored turned around, vectors without axes of one. The shares of the time mixture stand in one
  tensor, in the order w, k, v, r, g for RWKV-6 (early files have a tensor each) and r, w, k, v, a, g for RWKV-7.
- Mamba's ``ssm_a`` is A = -exp(A_log). Mamba-2's and its ``ssm_d`` are columns, its norm a row for each group.
- Vectors, norms, what has no suffix and a few small matrices are float32 in every file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Names", "names_of", "read_tensors", "write_tensors"]

_BLOCK = re.compile(r"blk\.(\d{1,6})\.(.+)$")
_LAYER = re.compile(r"(?:blocks|backbone\.layers)\.(\d+)\.(.+)$")
_FUSED = "time_mix_lerp_fused.weight"
#: What a block of a model of ours may lack; whether it does is for the model to say.
_OPTIONAL = ("att.v0", "att.v1", "att.v2", "mixer.conv1d.bias", "mixer.norm.weight")
#: Matrices that every file holds in float32.
_FLOAT32 = re.compile(r"_norm\.weight$|\.(ssm_conv1d|time_mix_(first|w1|w2|decay_w1|decay_w2|lerp_fused))\.weight$")


class _Form(NamedTuple):
    """How a tensor's shape or values differ there: ``axes`` it must have (``None``: any), and both directions."""

    axes: int | None
    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor], Tensor]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _turn(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2).contiguous()


def _log_of(A: Tensor) -> Tensor:
    """``A_log`` in float32 with -exp(A_log) = A to the bit where there is one, else next to it.

    From A = e² on, float32 has fewer logarithms than numbers: an A that did not come from -exp of a float32 may have
    none. For small logarithms there are many, and the nearest is taken.
    """
    A = A.float()
    if bool((A > 0).any()):
        raise ValueError("values above zero; A is -exp(A_log)")
    first = (-A.double()).log().float()
    found = first
    for towards in (math.inf, -math.inf):
        near = first
        for _ in range(2):
            near = torch.nextafter(near, torch.tensor(towards))
            found = torch.where((_exp_of(near) == A) & (_exp_of(found) != A), near, found)
    return found


def _exp_of(A_log: Tensor) -> Tensor:
    return -torch.exp(A_log.float())


_PLAIN = _Form(None, _same, _same)
_TURNED = _Form(2, _turn, _turn)
_TURNED_EACH = _Form(3, _turn, _turn)
_VECTOR = _Form(None, lambda t: t.reshape(1, 1, -1), lambda t: t.reshape(-1))
_FILTER = _Form(2, lambda t: t.unsqueeze(1), lambda t: t.squeeze(1))
_DECAY = _Form(2, _log_of, _exp_of)
_COLUMN = _Form(None, lambda t: t.reshape(-1), lambda t: t.reshape(-1, 1))
_DECAY_COLUMN = _Form(None, lambda t: _log_of(t.reshape(-1)), lambda t: _exp_of(t).reshape(-1, 1))


class Names(NamedTuple):
    """An architecture's names, theirs → ours: ``outer``, and after ``blk.N.`` → ``prefix`` N (``fused``: the shares of
    the time mixture that stand in one tensor there)."""

    prefix: str
    outer: dict[str, str]
    inner: dict[str, tuple[str, _Form]]
    fused: tuple[str, ...] = ()


_RWKV_OUTER = {
    "token_embd.weight": "emb.weight",
    "token_embd_norm.weight": "blocks.0.ln0.weight",
    "token_embd_norm.bias": "blocks.0.ln0.bias",
    "output_norm.weight": "ln_out.weight",
    "output_norm.bias": "ln_out.bias",
    "output.weight": "head.weight",
}
_RWKV_INNER = {
    f"{theirs}.{part}": (f"{ours}.{part}", _PLAIN)
    for theirs, ours in (("attn_norm", "ln1"), ("attn_norm_2", "ln2"), ("time_mix_ln", "att.ln_x"))
    for part in ("weight", "bias")
} | {
    f"{theirs}_{name}.weight": (f"{ours}.{name}.weight", _PLAIN)
    for theirs, ours, names in (
        ("time_mix", "att", ("receptance", "key", "value", "output")),
        ("channel_mix", "ffn", ("key", "value")),
    )
    for name in names
}
_MAMBA_OUTER = {
    "token_embd.weight": "backbone.embedding.weight",
    "output_norm.weight": "backbone.norm_f.weight",
    "output.weight": "lm_head.weight",
}
_MAMBA_INNER = {
    "attn_norm.weight": ("norm.weight", _PLAIN),
    "ssm_in.weight": ("mixer.in_proj.weight", _PLAIN),
    "ssm_conv1d.weight": ("mixer.conv1d.weight", _FILTER),
    "ssm_conv1d.bias": ("mixer.conv1d.bias", _PLAIN),
    "ssm_out.weight": ("mixer.out_proj.weight", _PLAIN),
}


def names_of(architecture: str, *, head_size: int, groups: int) -> Names:
    """The names of ``"rwkv6"``, ``"rwkv7"``, ``"mamba"`` or ``"mamba2"``.

    Args:
        architecture: which.
        head_size: what one tensor of RWKV-7 is cut by when it is read.
        groups: what one tensor of Mamba-2 is cut by when it is written.
    """
    if architecture == "rwkv6":
        return Names(
            "blocks.",
            _RWKV_OUTER,
            {
                **_RWKV_INNER,
                "time_mix_gate.weight": ("att.gate.weight", _PLAIN),
                "time_mix_w1.weight": ("att.time_maa_w1", _TURNED),
                "time_mix_w2.weight": ("att.time_maa_w2", _TURNED_EACH),
                "time_mix_decay.weight": ("att.time_decay", _VECTOR),
                "time_mix_decay_w1.weight": ("att.time_decay_w1", _TURNED),
                "time_mix_decay_w2.weight": ("att.time_decay_w2", _TURNED),
                "time_mix_first.weight": ("att.time_faaaa", _PLAIN),
                **{f"time_mix_lerp_{x}.weight": (f"att.time_maa_{x}", _VECTOR) for x in "xwkvrg"},
                **{f"channel_mix_lerp_{x}.weight": (f"ffn.time_maa_{x}", _VECTOR) for x in "kr"},
                "channel_mix_receptance.weight": ("ffn.receptance.weight", _PLAIN),
            },
            tuple(f"att.time_maa_{x}" for x in "wkvrg"),
        )
    if architecture == "rwkv7":
        heads = _Form(None, lambda t: t.reshape(-1, head_size), lambda t: t.reshape(-1))
        return Names(
            "blocks.",
            _RWKV_OUTER,
            {
                **_RWKV_INNER,
                **{f"time_mix_{x}0.weight": (f"att.{x}0", _VECTOR) for x in "wav"},
                **{f"time_mix_{x}{n}.weight": (f"att.{x}{n}", _TURNED) for x in "wavg" for n in "12"},
                **{f"time_mix_{x}.weight": (f"att.{x}", _VECTOR) for x in ("k_k", "k_a")},
                "time_mix_r_k.weight": ("att.r_k", heads),
                "channel_mix_lerp_k.weight": ("ffn.x_k", _VECTOR),
            },
            tuple(f"att.x_{x}" for x in "rwkvag"),
        )
    if architecture == "mamba":
        return Names(
            "backbone.layers.",
            _MAMBA_OUTER,
            {
                **_MAMBA_INNER,
                "ssm_x.weight": ("mixer.x_proj.weight", _PLAIN),
                "ssm_dt.weight": ("mixer.dt_proj.weight", _PLAIN),
                "ssm_dt.bias": ("mixer.dt_proj.bias", _PLAIN),
                "ssm_a": ("mixer.A_log", _DECAY),
                "ssm_d": ("mixer.D", _PLAIN),
            },
        )
    return Names(
        "backbone.layers.",
        _MAMBA_OUTER,
        {
            **_MAMBA_INNER,
            "ssm_dt.bias": ("mixer.dt_bias", _PLAIN),
            "ssm_a": ("mixer.A_log", _DECAY_COLUMN),
            "ssm_d": ("mixer.D", _COLUMN),
            "ssm_norm.weight": ("mixer.norm.weight", _Form(None, _COLUMN.read, lambda t: t.reshape(groups, -1))),
        },
    )


def read_tensors(names: Names, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names; the given dictionary is emptied on the way, so that nothing is held twice.

    Raises:
        ValueError: an unknown name, a block that lacks a tensor, or a shape that cannot be brought into ours.
    """
    renamed: dict[str, Tensor] = {}
    for name in list(tensors):
        for ours, tensor in _read(names, name, tensors.pop(name)):
            if ours in renamed:
                raise ValueError(f"tensor {name} says again what our {ours} is")
            renamed[ours] = tensor
    # Before a model is built to find that out: a block takes milliseconds, and its name a few bytes.
    needed = {*names.fused, *(ours for ours, _ in names.inner.values())} - {*_OPTIONAL}
    for block in {match[1] for name in renamed if (match := _LAYER.match(name))}:
        for ours in sorted(needed):
            if f"{names.prefix}{block}.{ours}" not in renamed:
                raise ValueError(f"tensor {names.prefix}{block}.{ours} is missing")
    return renamed


def _read(names: Names, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    if name in names.outer:
        return [(names.outer[name], tensor)]
    match = _BLOCK.match(name)
    if match is not None and match[2] == _FUSED and names.fused:
        if tensor.shape[0] != len(names.fused):
            raise ValueError(f"tensor {name} has shape {tuple(tensor.shape)}; expected {len(names.fused)} mixtures")
        # Each its own memory: parameters are trained apart.
        rows = (row.reshape(1, 1, -1).clone() for row in tensor)
        return [(f"{names.prefix}{match[1]}.{ours}", row) for ours, row in zip(names.fused, rows, strict=True)]
    if match is None or match[2] not in names.inner:
        raise ValueError(f"unknown tensor {name}")
    ours, form = names.inner[match[2]]
    if form.axes is not None and tensor.dim() != form.axes:
        raise ValueError(f"tensor {name} has shape {tuple(tensor.shape)}; expected {form.axes} axes")
    try:
        return [(f"{names.prefix}{match[1]}.{ours}", form.read(tensor))]
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"tensor {name} of shape {tuple(tensor.shape)} cannot be read: {error}") from error


def write_tensors(names: Names, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names.

    Raises:
        ValueError: a name that has no place there.
    """
    outer = {ours: theirs for theirs, ours in names.outer.items()}
    inner = {ours: (theirs, form) for theirs, (ours, form) in names.inner.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _LAYER.match(name)
        if name in outer:
            renamed[outer[name]] = tensor
        elif match is not None and match[2] in names.fused:
            if match[2] == names.fused[0]:
                shares = [tensors[name.replace(names.fused[0], share)].reshape(1, 1, -1) for share in names.fused]
                renamed[f"blk.{match[1]}.{_FUSED}"] = torch.stack(shares)
        elif match is not None and match[2] in inner:
            theirs, form = inner[match[2]]
            renamed[f"blk.{match[1]}.{theirs}"] = form.write(tensor)
        else:
            raise ValueError(f"format 'gguf' has no place for tensor {name}")
    return {name: tensor if _stays(name, tensor) else tensor.float() for name, tensor in renamed.items()}


def _stays(name: str, tensor: Tensor) -> bool:
    """Whether a tensor keeps its dtype in the file."""
    return tensor.dim() > 1 and name.endswith(".weight") and not _FLOAT32.search(name)
