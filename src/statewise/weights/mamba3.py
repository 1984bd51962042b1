"""Mamba-3's published layout as a name map: state-spaces.

Our names are state-spaces' own. Sizes are read from tensors, the number of groups and how much of B and C is turned
included; a configuration that says otherwise is a contradiction and a ``ValueError``. What makes A of its projection no
tensor and no published configuration tells: it is ``ssm_cfg.a_activation`` where we wrote the file (state-spaces'
mixer takes and ignores it), else the caller's to give, else our default.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from statewise.weights.contents import count_layers, look_up, same_values, size_of

__all__ = ["LAYOUTS", "detect", "from_ours", "to_ours"]

LAYOUTS = ("state-spaces",)

_EMBEDDING, _HEAD = "backbone.embedding.weight", "lm_head.weight"
_MIXER = "backbone.layers.0.mixer."
_VOCABULARY_MULTIPLE = 8  # state-spaces' own default
_MLP_MULTIPLE = 128

# Our field → where the configuration keeps it. "ssm_cfg." is an object inside it.
_KEYS = {
    "num_layers": "n_layer",
    "width": "d_model",
    "state_size": "ssm_cfg.d_state",
    "head_size": "ssm_cfg.headdim",
    "groups": "ssm_cfg.ngroups",
    "expand": "ssm_cfg.expand",
    "rope_fraction": "ssm_cfg.rope_fraction",
    "a_activation": "ssm_cfg.a_activation",
    "a_floor": "ssm_cfg.A_floor",
    "is_outproj_norm": "ssm_cfg.is_outproj_norm",
    "mlp_width": "d_intermediate",
    "dt_min": "ssm_cfg.dt_min",
    "dt_max": "ssm_cfg.dt_max",
    "dt_floor": "ssm_cfg.dt_init_floor",
    "rms_norm": "rms_norm",
    "residual_in_fp32": "residual_in_fp32",
    "tie_embeddings": "tie_embeddings",
}
# Decided by tensors; the configuration may only agree.
_FROM_TENSORS = (
    "num_layers",
    "width",
    "state_size",
    "head_size",
    "groups",
    "expand",
    "rope_fraction",
    "is_outproj_norm",
    "mlp_width",
    "rms_norm",
)


def detect(config: Mapping[str, Any] | None, names: set[str]) -> str | None:
    """Whose layout these names are, or ``None``: not a Mamba-3 language model."""
    here = {_EMBEDDING, *(_MIXER + name for name in ("dt_bias", "B_bias", "C_bias", "in_proj.weight"))}
    return "state-spaces" if here <= names else None


def to_ours(
    layout: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields of our configuration and tensors by our names.

    Args:
        layout: what :func:`detect` said.
        config: the parsed ``config.json``; empty if there is none.
        tensors: by the layout's names. Unknown names pass through, for the reader to refuse by name.

    Raises:
        ValueError: a tensor the sizes are read from is missing or mis-shaped, the configuration contradicts the
            tensors, or it asks for what Mamba-3 is not.
    """
    _refuse_other_layouts(layout)
    _refuse_other_models(config)
    renamed = dict(tensors)
    fields = _sizes(renamed)
    for field, key in _KEYS.items():
        stated = look_up(config, key)
        if stated is None:
            continue
        if field == "mlp_width" and isinstance(stated, int):
            stated = -(-stated // _MLP_MULTIPLE) * _MLP_MULTIPLE or None
        if field not in _FROM_TENSORS:
            fields[field] = stated
        elif fields[field] != stated:
            raise ValueError(f"the configuration's {key} is {stated}, but the tensors have {fields[field]}")
    _check_ranks(config, fields)
    _read_vocabulary(config, renamed, fields)
    _read_head(renamed, fields)
    return fields, renamed


def from_ours(
    layout: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The layout's configuration and tensors by its names.

    Args:
        layout: one of :data:`LAYOUTS`.
        fields: every field of our configuration.
        tensors: by our names.

    Raises:
        ValueError: the layout has no place for one of the fields.
    """
    _refuse_other_layouts(layout)
    if fields["norm_eps"] != 1e-5:
        raise ValueError(f"layout {layout!r} has no place for norm_eps={fields['norm_eps']}; it always uses 1e-05")
    config: dict[str, Any] = {}
    for field, key in _KEYS.items():
        outer, _, inner = key.rpartition(".")
        (config.setdefault(outer, {}) if outer else config)[inner] = fields[field]
    config["d_intermediate"] = fields["mlp_width"] or 0
    config["ssm_cfg"] |= {"layer": "Mamba3", "is_mimo": fields["mimo_rank"] is not None}
    if fields["mimo_rank"] is not None:
        # Their kernels' advice: they hold a chunk of all ranks at once.
        config["ssm_cfg"] |= {"mimo_rank": fields["mimo_rank"], "chunk_size": max(1, 64 // fields["mimo_rank"])}
    config |= {"fused_add_norm": True, "attn_layer_idx": [], "attn_cfg": {}}
    config |= {"vocab_size": tensors[_EMBEDDING].shape[0], "pad_vocab_size_multiple": fields["pad_vocab_multiple"]}
    return config, dict(tensors)


def _refuse_other_layouts(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; accepted for a Mamba-3 is 'state-spaces'")


def _refuse_other_models(config: Mapping[str, Any]) -> None:
    kind = look_up(config, "ssm_cfg.layer")
    if kind not in (None, "Mamba3"):
        raise ValueError(f"the configuration's ssm_cfg.layer is {kind!r}; this is a Mamba3")
    if config.get("attn_layer_idx"):
        raise ValueError(
            f"the configuration's attn_layer_idx is {config['attn_layer_idx']!r}: blocks of attention are not read"
        )


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What shapes and names decide, by our names."""

    shape = partial(size_of, tensors)
    _, width = shape(_EMBEDDING, 2)
    heads, ranks, state_size = shape(_MIXER + "B_bias", 3)
    inner = shape(_MIXER + "out_proj.weight", 2)[1]
    if inner % width or inner % heads:
        raise ValueError(
            f"tensor {_MIXER}out_proj.weight reads {inner}; expected a multiple of the width {width} "
            f"and of {heads} heads"
        )
    # in_proj: z and x (2 inner), B and C (2 N·G·R), dt, A and trap (3 heads), angles (at most N/2: what is left over)
    rows = shape(_MIXER + "in_proj.weight", 2)[0]
    groups, angles = divmod(rows - 2 * inner - 3 * heads, 2 * state_size * ranks)
    fraction = next((part for part in (0.5, 1.0) if angles == int(state_size * part) // 2), None)
    if groups < 1 or fraction is None or not angles:
        raise ValueError(
            f"tensors {_MIXER}in_proj.weight ({rows} rows), out_proj.weight ({inner} columns) and B_bias ({heads} "
            f"heads, {ranks} ranks, {state_size} states) fit no Mamba-3"
        )
    num_layers = count_layers(tensors, "backbone.layers.")
    mlp = "backbone.layers.0.mlp.fc2.weight"
    return {
        "num_layers": num_layers,
        "width": width,
        "state_size": state_size,
        "head_size": inner // heads,
        "groups": groups,
        "expand": inner // width,
        "mimo_rank": ranks if _MIXER + "mimo_x" in tensors else None,
        "rope_fraction": fraction,
        "is_outproj_norm": _MIXER + "norm.weight" in tensors,
        "mlp_width": shape(mlp, 2)[1] if mlp in tensors else None,
        "rms_norm": "backbone.norm_f.bias" not in tensors,
    }


def _check_ranks(config: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    mimo, rank = (look_up(config, f"ssm_cfg.{key}") for key in ("is_mimo", "mimo_rank"))
    found = fields["mimo_rank"]
    if mimo not in (None, found is not None):
        raise ValueError(
            f"the configuration's ssm_cfg.is_mimo is {mimo}, "
            f"but the tensors have {'no' if found is None else 'a'} mimo_x"
        )
    if found is not None and rank not in (None, found):  # without MIMO nothing reads it
        raise ValueError(f"the configuration's ssm_cfg.mimo_rank is {rank}, but the tensors have {found}")


def _read_vocabulary(config: Mapping[str, Any], tensors: Mapping[str, Tensor], fields: dict[str, Any]) -> None:
    rows = tensors[_EMBEDDING].shape[0]
    multiple = config.get("pad_vocab_size_multiple", _VOCABULARY_MULTIPLE)
    if not isinstance(multiple, int) or multiple < 1:
        raise ValueError(f"the configuration's pad_vocab_size_multiple is {multiple!r}; expected an integer from 1")
    stated = config.get("vocab_size", rows)
    if not isinstance(stated, int) or rows not in (stated, -(-stated // multiple) * multiple):
        raise ValueError(
            f"the configuration's vocab_size is {stated!r} (padded to a multiple of {multiple}), "
            f"but the embedding has {rows} rows"
        )
    fields |= {"vocab_size": rows, "pad_vocab_multiple": multiple if rows % multiple == 0 else 1}


def _read_head(tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
    embedding, head = tensors[_EMBEDDING], tensors.get(_HEAD)
    same = head is None or same_values(head, embedding)
    tied = fields.setdefault("tie_embeddings", same)
    if tied and not same:
        raise ValueError(f"the embeddings are tied, but {_HEAD} differs from {_EMBEDDING}")
    if tied:
        tensors[_HEAD] = embedding
