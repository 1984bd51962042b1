"""Mamba-2's published layouts as name maps: state-spaces and transformers.

Our names are state-spaces' own. Sizes are read from tensors; a configuration that says otherwise is a contradiction and
a ``ValueError``. Tensors tell the product of groups G and state size N but neither, nor whether the norm comes before
the gate, nor the limits of dt: these are the configuration's. Bare tensors get our defaults; where their G·N is another
the model does not fit, until the caller gives ``groups`` and ``state_size``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from statewise.weights.contents import count_layers, look_up, same_values, size_of

__all__ = ["LAYOUTS", "detect", "from_ours", "to_ours"]

LAYOUTS = ("state-spaces", "transformers")

_EMBEDDING = {"state-spaces": "backbone.embedding.weight", "transformers": "backbone.embeddings.weight"}
_HEAD = "lm_head.weight"
_MIXER = "backbone.layers.0.mixer."
_VOCABULARY_MULTIPLE = {"state-spaces": 8, "transformers": 16}  # state-spaces' own default, and ours
_MLP_MULTIPLE = 128

# Our field → where each configuration keeps it. "ssm_cfg." is an object inside state-spaces' one.
_KEYS: dict[str, dict[str, str]] = {
    "state-spaces": {
        "num_layers": "n_layer",
        "width": "d_model",
        "state_size": "ssm_cfg.d_state",
        "head_size": "ssm_cfg.headdim",
        "groups": "ssm_cfg.ngroups",
        "conv_width": "ssm_cfg.d_conv",
        "expand": "ssm_cfg.expand",
        "ssm_width": "ssm_cfg.d_ssm",
        "D_per_channel": "ssm_cfg.D_has_hdim",
        "mlp_width": "d_intermediate",
        "bias": "ssm_cfg.bias",
        "conv_bias": "ssm_cfg.conv_bias",
        "dt_limit": "ssm_cfg.dt_limit",
        "dt_min": "ssm_cfg.dt_min",
        "dt_max": "ssm_cfg.dt_max",
        "dt_floor": "ssm_cfg.dt_init_floor",
        "rms_norm": "rms_norm",
        "residual_in_fp32": "residual_in_fp32",
        "tie_embeddings": "tie_embeddings",
    },
    "transformers": {
        "num_layers": "num_hidden_layers",
        "width": "hidden_size",
        "state_size": "state_size",
        "head_size": "head_dim",
        "groups": "n_groups",
        "conv_width": "conv_kernel",
        "expand": "expand",
        "bias": "use_bias",
        "conv_bias": "use_conv_bias",
        "dt_limit": "time_step_limit",
        "dt_min": "time_step_min",
        "dt_max": "time_step_max",
        "dt_floor": "time_step_floor",
        "norm_eps": "layer_norm_epsilon",
        "residual_in_fp32": "residual_in_fp32",
        "tie_embeddings": "tie_word_embeddings",
    },
}
_A_RANGE = {"state-spaces": "ssm_cfg.A_init_range", "transformers": "A_init_range"}  # of the latter, ours alone
#: What a configuration means that does not say.
_UNSAID = {"state-spaces": {"groups": 1, "state_size": 128}, "transformers": {"groups": 8, "state_size": 128}}
# Decided by tensors; the configuration may only agree.
_FROM_TENSORS = (
    "num_layers",
    "width",
    "head_size",
    "conv_width",
    "expand",
    "ssm_width",
    "D_per_channel",
    "mlp_width",
    "bias",
    "conv_bias",
    "rms_norm",
)


def detect(config: Mapping[str, Any] | None, names: set[str]) -> str | None:
    """Whose layout these names are, or ``None``: not a Mamba-2 language model."""
    here = {name.removeprefix(_MIXER) for name in names if name.startswith(_MIXER)}
    if not {"A_log", "dt_bias", "in_proj.weight", "conv1d.weight"} <= here or "x_proj.weight" in here:
        return None
    return next((layout for layout in LAYOUTS if _EMBEDDING[layout] in names), None)


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
            tensors, or it asks for what Mamba-2 is not.
    """
    own = _EMBEDDING["state-spaces"]
    renamed = {own if name == _EMBEDDING[layout] else name: tensor for name, tensor in tensors.items()}
    _refuse_other_models(layout, config)
    fields, matrix = _sizes(renamed)
    for field, key in _KEYS[layout].items():
        stated = look_up(config, key)
        if stated is None:
            continue
        if field == "dt_limit":
            fields[field] = _limits(key, stated)
        elif field not in _FROM_TENSORS or (field == "D_per_channel" and fields["head_size"] == 1):
            fields[field] = stated  # in heads of one channel D is both
        elif fields[field] != (_hidden(stated) if field == "mlp_width" else stated):
            raise ValueError(f"the configuration's {key} is {stated}, but the tensors have {fields[field]}")
    if fields["ssm_width"] == fields["expand"] * fields["width"]:
        fields["ssm_width"] = None
    if config:
        _read_matrices(layout, matrix, fields)
    heads = renamed[_MIXER + "A_log"].shape[0]
    if config.get("num_heads", heads) != heads:
        raise ValueError(f"the configuration's num_heads is {config['num_heads']}, but the tensors have {heads}")
    _read_gated_norm(config, renamed, fields)
    if (span := look_up(config, _A_RANGE[layout])) is not None:
        if not isinstance(span, (list, tuple)) or len(span) != 2:
            raise ValueError(f"the configuration's {_A_RANGE[layout]} is {span!r}; expected two numbers")
        fields["A_min"], fields["A_max"] = span
    _read_vocabulary(layout, config, renamed, fields)
    _read_head(layout, config, renamed, fields)
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
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; accepted are {', '.join(map(repr, LAYOUTS))}")
    _refuse_without_place(layout, fields)
    config: dict[str, Any] = {}

    def put(key: str, value: Any) -> None:
        outer, _, inner = key.rpartition(".")
        (config.setdefault(outer, {}) if outer else config)[inner] = value

    for field, key in _KEYS[layout].items():
        put(key, fields[field])
    # Infinity stays a number: json writes it bare, which every release of transformers reads.
    put(_KEYS[layout]["dt_limit"], [float(end) for end in fields["dt_limit"]])
    put(_A_RANGE[layout], [fields["A_min"], fields["A_max"]])
    embedding = tensors["backbone.embedding.weight"]
    config |= {"vocab_size": embedding.shape[0], "pad_vocab_size_multiple": fields["pad_vocab_multiple"]}
    if layout == "state-spaces":
        config |= {"fused_add_norm": True, "attn_layer_idx": [], "attn_cfg": {}}
        config["d_intermediate"] = fields["mlp_width"] or 0
        config["ssm_cfg"] |= {
            "layer": "Mamba2",
            "rmsnorm": fields["gated_norm"] is not None,
            "norm_before_gate": fields["gated_norm"] == "before",
        }
        if tuple(fields["dt_limit"]) == (0.0, math.inf):
            del config["ssm_cfg"]["dt_limit"]  # its own default, and no strict JSON
        if fields["ssm_width"] is None:
            del config["ssm_cfg"]["d_ssm"]
    else:
        config |= {
            "architectures": ["Mamba2ForCausalLM"],
            "model_type": "mamba2",
            "hidden_act": "silu",
            "num_heads": fields["expand"] * fields["width"] // fields["head_size"],
            "time_step_rank": -(-fields["width"] // 16),  # asked for by transformers, read by nothing
            "dtype": str(embedding.dtype).removeprefix("torch."),
        }
    renamed = {
        _EMBEDDING[layout] if name == "backbone.embedding.weight" else name: tensor for name, tensor in tensors.items()
    }
    if fields["tie_embeddings"] and layout == "transformers":
        renamed.pop(_HEAD, None)  # stored once there; state-spaces stores it although tied
    return config, renamed


def _hidden(stated: Any) -> Any:
    """The width of the MLP's tensors; state-spaces rounds what is said up, and none is 0."""
    return (-(-stated // _MLP_MULTIPLE) * _MLP_MULTIPLE or None) if isinstance(stated, int) else stated


def _limits(key: str, stated: Any) -> tuple[float, float]:
    """Both ends of dt's range, however infinity is spelt: ``Infinity``, ``{"__float__": "Infinity"}``, ``"inf"``."""

    def number(end: Any) -> float:
        if isinstance(end, Mapping) and set(end) == {"__float__"}:
            end = end["__float__"]
        if isinstance(end, str) and re.fullmatch(r"[+-]?inf(inity)?", end, re.IGNORECASE):
            return float(end)
        if not isinstance(end, (int, float)) or isinstance(end, bool) or math.isnan(end):
            raise ValueError(f"the configuration's {key} is {stated!r}; expected two numbers")
        return float(end)

    if not isinstance(stated, (list, tuple)) or len(stated) != 2:
        raise ValueError(f"the configuration's {key} is {stated!r}; expected two numbers")
    low, high = map(number, stated)
    return max(low, 0.0), high  # softplus is never negative: a limit below zero, or none, is zero


def _refuse_other_models(layout: str, config: Mapping[str, Any]) -> None:
    kind = look_up(config, "ssm_cfg.layer")
    if kind not in (None, "Mamba2"):
        raise ValueError(f"the configuration's ssm_cfg.layer is {kind!r}; this is a Mamba2")
    if config.get("attn_layer_idx"):
        raise ValueError(
            f"the configuration's attn_layer_idx is {config['attn_layer_idx']!r}: blocks of attention are not read"
        )
    if layout == "transformers" and config.get("model_type", "mamba2") != "mamba2":
        raise ValueError(f"the configuration's model_type is {config['model_type']!r}; this is a 'mamba2'")
    for key in ("hidden_act", "ssm_cfg.activation"):
        if look_up(config, key) not in (None, "silu", "swish"):
            raise ValueError(f"the configuration's {key} is {look_up(config, key)!r}; Mamba-2 is read with 'silu'")


def _sizes(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], int]:
    """What shapes and names decide, by our names, and G·N."""

    shape = partial(size_of, tensors)
    _, width = shape("backbone.embedding.weight", 2)
    (heads,) = shape(_MIXER + "A_log", 1)
    inner = shape(_MIXER + "out_proj.weight", 2)[1]
    if inner % width:
        raise ValueError(f"tensor {_MIXER}out_proj.weight reads {inner}, which is no multiple of the width {width}")
    # in_proj: gates and inputs (2 inner), B and C (2 G·N), dt (heads); the convolution sees x, B and C
    rows = shape(_MIXER + "in_proj.weight", 2)[0]
    matrix, odd = divmod(rows - 2 * inner - heads, 2)
    seen, _, conv_width = shape(_MIXER + "conv1d.weight", 3)
    channels = seen - 2 * matrix
    if matrix < 1 or odd or not 0 < channels <= inner or channels % heads:
        raise ValueError(
            f"tensors {_MIXER}in_proj.weight ({rows} rows), conv1d.weight ({seen}), out_proj.weight ({inner} columns) "
            f"and A_log ({heads}) fit no Mamba-2"
        )
    (skips,) = shape(_MIXER + "D", 1)
    if skips not in (heads, channels):
        raise ValueError(f"tensor {_MIXER}D has {skips} values; expected {heads}, one a head, or {channels}")
    num_layers = count_layers(tensors, "backbone.layers.")
    mlp = "backbone.layers.0.mlp.fc2.weight"
    return {
        "num_layers": num_layers,
        "width": width,
        "head_size": channels // heads,
        "conv_width": conv_width,
        "expand": inner // width,
        "ssm_width": channels,
        "D_per_channel": skips != heads,
        "mlp_width": shape(mlp, 2)[1] if mlp in tensors else None,
        "bias": _MIXER + "in_proj.bias" in tensors,
        "conv_bias": _MIXER + "conv1d.bias" in tensors,
        "rms_norm": "backbone.norm_f.bias" not in tensors,
    }, matrix


def _read_matrices(layout: str, matrix: int, fields: dict[str, Any]) -> None:
    """G and N: what is said, or the layout's defaults; tensors hold their product."""
    groups, size = (fields.setdefault(field, _UNSAID[layout][field]) for field in ("groups", "state_size"))
    if not isinstance(groups, int) or not isinstance(size, int) or groups * size != matrix:
        keys = _KEYS[layout]
        raise ValueError(
            f"the configuration's {keys['groups']} is {groups} and {keys['state_size']} is {size}, "
            f"but the tensors have {matrix} rows for each of B and C"
        )


def _read_gated_norm(config: Mapping[str, Any], tensors: Mapping[str, Tensor], fields: dict[str, Any]) -> None:
    normed = _MIXER + "norm.weight" in tensors
    stated = look_up(config, "ssm_cfg.rmsnorm")
    if stated not in (None, normed):
        raise ValueError(
            f"the configuration's ssm_cfg.rmsnorm is {stated}, but the tensors have "
            f"{'' if normed else 'no '}{_MIXER}norm.weight"
        )
    before = look_up(config, "ssm_cfg.norm_before_gate")
    if before not in (None, True, False):
        raise ValueError(f"the configuration's ssm_cfg.norm_before_gate is {before!r}; expected true or false")
    fields["gated_norm"] = ("before" if before else "after") if normed else None


def _read_vocabulary(
    layout: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], fields: dict[str, Any]
) -> None:
    rows = tensors["backbone.embedding.weight"].shape[0]
    multiple = config.get("pad_vocab_size_multiple", _VOCABULARY_MULTIPLE[layout])
    if not isinstance(multiple, int) or multiple < 1:
        raise ValueError(f"the configuration's pad_vocab_size_multiple is {multiple!r}; expected an integer from 1")
    stated = config.get("vocab_size", rows)
    if not isinstance(stated, int) or rows not in (stated, -(-stated // multiple) * multiple):
        raise ValueError(
            f"the configuration's vocab_size is {stated!r} (padded to a multiple of {multiple}), "
            f"but the embedding has {rows} rows"
        )
    fields |= {"vocab_size": rows, "pad_vocab_multiple": multiple if rows % multiple == 0 else 1}


def _read_head(layout: str, config: Mapping[str, Any], tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
    embedding, head = tensors["backbone.embedding.weight"], tensors.get(_HEAD)
    same = head is None or same_values(head, embedding)
    # Unless told otherwise state-spaces ties; transformers' Mamba-2 does not, but then stores a head.
    usual = True if config and layout == "state-spaces" else head is None if config else same
    tied = fields.setdefault("tie_embeddings", usual)
    if tied and not same:
        raise ValueError(f"the embeddings are tied, but {_HEAD} differs from {_EMBEDDING[layout]}")
    if tied:
        tensors[_HEAD] = embedding


def _refuse_without_place(layout: str, fields: Mapping[str, Any]) -> None:
    only: dict[str, Any] = {"norm_groups": None}
    if layout == "state-spaces":
        only["norm_eps"] = 1e-5
    else:
        only |= {
            "ssm_width": None,
            "gated_norm": "after",
            "D_per_channel": False,
            "mlp_width": None,
            "rms_norm": True,
        }
    for field, held in only.items():
        if fields[field] != held:
            raise ValueError(f"layout {layout!r} has no place for {field}={fields[field]!r}; it holds {held!r}")
