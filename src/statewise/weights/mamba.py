"""Mamba's published layouts as name maps: state-spaces, transformers (Mamba and FalconMamba) and mamba.py.

Our names are state-spaces' own, with Jamba's spelling for the norms inside a mixer. Sizes are read from tensors; a
configuration that says otherwise is a contradiction and a ``ValueError``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from statewise.weights.contents import count_layers, look_up, same_values, size_of

__all__ = ["LAYOUTS", "detect", "from_ours", "to_ours"]

LAYOUTS = ("state-spaces", "transformers", "mamba.py")

_PREFIX = {"state-spaces": "backbone.", "transformers": "backbone.", "mamba.py": "mamba."}
_EMBEDDING = {
    "state-spaces": "backbone.embedding.weight",
    "transformers": "backbone.embeddings.weight",
    "mamba.py": "embedding.weight",
}
_HEAD = "lm_head.weight"
_VOCABULARY_MULTIPLE = 8  # state-spaces' own, and our default

# Our field → where each configuration keeps it. "ssm_cfg." is an object inside state-spaces' one.
_KEYS: dict[str, dict[str, str]] = {
    "state-spaces": {
        "num_layers": "n_layer",
        "width": "d_model",
        "state_size": "ssm_cfg.d_state",
        "conv_width": "ssm_cfg.d_conv",
        "expand": "ssm_cfg.expand",
        "dt_rank": "ssm_cfg.dt_rank",
        "bias": "ssm_cfg.bias",
        "conv_bias": "ssm_cfg.conv_bias",
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
        "conv_width": "conv_kernel",
        "expand": "expand",
        "dt_rank": "time_step_rank",
        "bias": "use_bias",
        "conv_bias": "use_conv_bias",
        "dt_min": "time_step_min",
        "dt_max": "time_step_max",
        "dt_floor": "time_step_floor",
        "norm_eps": "layer_norm_epsilon",
        "residual_in_fp32": "residual_in_fp32",
        "tie_embeddings": "tie_word_embeddings",
    },
    "mamba.py": {
        "num_layers": "n_layers",
        "width": "d_model",
        "state_size": "d_state",
        "conv_width": "d_conv",
        "expand": "expand_factor",
        "dt_rank": "dt_rank",
        "bias": "bias",
        "conv_bias": "conv_bias",
        "dt_min": "dt_min",
        "dt_max": "dt_max",
        "dt_floor": "dt_init_floor",
        "norm_eps": "rms_norm_eps",
        # mamba.py's files are bare tensors; these two are ours, so that nothing is lost on the way back
        "residual_in_fp32": "residual_in_fp32",
        "tie_embeddings": "tie_embeddings",
    },
}
# Decided by tensors; the configuration may only agree.
_FROM_TENSORS = (
    "num_layers",
    "width",
    "state_size",
    "conv_width",
    "expand",
    "dt_rank",
    "bias",
    "conv_bias",
    "rms_norm",
)


def detect(config: Mapping[str, Any] | None, names: set[str]) -> str | None:
    """Whose layout these names are, or ``None``: not a Mamba-1 language model."""
    for layout in LAYOUTS:
        if _EMBEDDING[layout] in names and f"{_PREFIX[layout]}layers.0.mixer.x_proj.weight" in names:
            return layout
    return None


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
            tensors, or it asks for what Mamba-1 is not.
    """
    renamed = {_our_name(layout, name): tensor for name, tensor in tensors.items()}
    _refuse_other_models(config)
    fields = _sizes(renamed)
    for field, key in _KEYS[layout].items():
        stated = look_up(config, key)
        if field == "expand" and layout == "transformers" and "intermediate_size" in config:
            # It wins there: FalconMamba's published configurations have an expand that nothing reads.
            key, stated = "intermediate_size", config["intermediate_size"]
            if stated == fields["expand"] * fields["width"]:
                continue
        if stated is None or (field == "dt_rank" and stated == "auto"):
            continue
        if field not in _FROM_TENSORS:
            fields[field] = stated
        elif fields[field] != stated:
            raise ValueError(f"the configuration's {key} is {stated}, but the tensors have {fields[field]}")
    if fields["dt_rank"] == -(-fields["width"] // 16):
        fields["dt_rank"] = None  # the rule
    _read_vocabulary(config, renamed, fields)
    _read_inner_norm(layout, config, renamed, fields)
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
    for field, key in _KEYS[layout].items():
        outer, _, inner = key.rpartition(".")
        value = fields[field]
        if field == "dt_rank" and value is None:
            value = -(-fields["width"] // 16)
        (config.setdefault(outer, {}) if outer else config)[inner] = value
    rows = tensors["backbone.embedding.weight"].shape[0]
    config["vocab_size"] = rows
    if layout == "state-spaces":
        config |= {"fused_add_norm": True, "pad_vocab_size_multiple": fields["pad_vocab_multiple"]}
    elif layout == "mamba.py":
        config |= {"pad_vocab_size_multiple": fields["pad_vocab_multiple"]}
        config["inner_layernorms"] = fields["inner_norm"] is not None
    else:
        falcon = fields["inner_norm"] is not None
        config |= {
            "architectures": ["FalconMambaForCausalLM" if falcon else "MambaForCausalLM"],
            "model_type": "falcon_mamba" if falcon else "mamba",
            "hidden_act": "silu",
            "intermediate_size": fields["expand"] * fields["width"],
            "dtype": str(tensors["backbone.embedding.weight"].dtype).removeprefix("torch."),
        }
        if falcon:
            config["mixer_rms_eps"] = fields["inner_norm_eps"]
    renamed = {_their_name(layout, name): tensor for name, tensor in tensors.items()}
    if fields["tie_embeddings"] and layout == "transformers":
        renamed.pop(_HEAD, None)  # stored once there; the others store it although tied
    return config, renamed


def _our_name(layout: str, name: str) -> str:
    if name == _EMBEDDING[layout]:
        return "backbone.embedding.weight"
    if layout == "mamba.py":
        name = re.sub(r"^mamba\.(?=layers\.)|^(?=norm_f\.)", "backbone.", name)
        name = name.replace(".B_layernorm.", ".b_layernorm.").replace(".C_layernorm.", ".c_layernorm.")
    return name


def _their_name(layout: str, name: str) -> str:
    if name == "backbone.embedding.weight":
        return _EMBEDDING[layout]
    if layout == "mamba.py":
        name = re.sub(r"^backbone\.(?=layers\.)", "mamba.", name).removeprefix("backbone.")
        name = name.replace(".b_layernorm.", ".B_layernorm.").replace(".c_layernorm.", ".C_layernorm.")
    return name


def _refuse_other_models(config: Mapping[str, Any]) -> None:
    kind = look_up(config, "ssm_cfg.layer")
    if kind not in (None, "Mamba1"):
        raise ValueError(f"the configuration's ssm_cfg.layer is {kind!r}; this is a Mamba1")
    for key in ("attn_layer_idx", "d_intermediate"):
        if config.get(key):
            raise ValueError(f"the configuration's {key} is {config[key]!r}: blocks other than Mamba-1's are not read")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"the configuration's hidden_act is {config['hidden_act']!r}; Mamba-1 is read with 'silu'")


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What shapes and names decide, by our names."""

    shape = partial(size_of, tensors)
    mixer = "backbone.layers.0.mixer."
    _, width = shape("backbone.embedding.weight", 2)
    channels, state_size = shape(mixer + "A_log", 2)
    if channels % width:
        raise ValueError(f"tensor {mixer}A_log has {channels} channels, which is no multiple of the width {width}")
    num_layers = count_layers(tensors, "backbone.layers.")
    return {
        "num_layers": num_layers,
        "width": width,
        "state_size": state_size,
        "conv_width": shape(mixer + "conv1d.weight", 3)[2],
        "expand": channels // width,
        "dt_rank": shape(mixer + "dt_proj.weight", 2)[1],
        "bias": mixer + "in_proj.bias" in tensors,
        "conv_bias": mixer + "conv1d.bias" in tensors,
        "rms_norm": "backbone.norm_f.bias" not in tensors,
    }


def _read_vocabulary(config: Mapping[str, Any], tensors: Mapping[str, Tensor], fields: dict[str, Any]) -> None:
    rows = tensors["backbone.embedding.weight"].shape[0]
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


def _read_inner_norm(
    layout: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], fields: dict[str, Any]
) -> None:
    weighted = "backbone.layers.0.mixer.dt_layernorm.weight" in tensors
    falcon = config.get("model_type") == "falcon_mamba"
    stated = config.get("inner_layernorms", weighted)
    if stated != weighted or (weighted and falcon):
        raise ValueError(
            f"the tensors have {'' if weighted else 'no '}weights for norms inside the mixer, "
            "but the configuration says otherwise"
        )
    if weighted:
        fields["inner_norm"] = "weighted"
        if layout == "mamba.py":  # one epsilon for all norms
            fields["inner_norm_eps"] = config.get("rms_norm_eps", 1e-5)
    elif falcon:
        fields |= {"inner_norm": "weightless", "inner_norm_eps": config.get("mixer_rms_eps", 1e-6)}


def _read_head(layout: str, config: Mapping[str, Any], tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
    embedding, head = tensors["backbone.embedding.weight"], tensors.get(_HEAD)
    same = head is None or same_values(head, embedding)
    # transformers and state-spaces tie unless told otherwise, mamba.py never does
    usual = same if not config else layout != "mamba.py"
    tied = fields.setdefault("tie_embeddings", usual)
    if tied and not same:
        raise ValueError(f"the embeddings are tied, but {_HEAD} differs from {_EMBEDDING[layout]}")
    if tied:
        tensors[_HEAD] = embedding


def _refuse_without_place(layout: str, fields: Mapping[str, Any]) -> None:
    inner = {"state-spaces": (None,), "transformers": (None, "weightless"), "mamba.py": (None, "weighted")}[layout]
    if fields["inner_norm"] not in inner:
        raise ValueError(
            f"layout {layout!r} has no place for inner_norm={fields['inner_norm']!r}; "
            f"it holds {', '.join(map(repr, inner))}"
        )
    if layout != "state-spaces" and not fields["rms_norm"]:
        raise ValueError(f"layout {layout!r} has no place for LayerNorm (rms_norm=False)")
    if layout == "state-spaces" and fields["norm_eps"] != 1e-5:
        raise ValueError(f"layout {layout!r} has no place for norm_eps={fields['norm_eps']}; it always uses 1e-05")
    if layout == "mamba.py" and fields["inner_norm"] and fields["inner_norm_eps"] != fields["norm_eps"]:
        raise ValueError(
            f"layout {layout!r} has one epsilon for all norms, but norm_eps is {fields['norm_eps']} "
            f"and inner_norm_eps {fields['inner_norm_eps']}"
        )
