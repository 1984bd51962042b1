"""flash-linear-attention's RWKV-7 directories: the same tensors under other names, low-rank pairs as linear layers.

Pure functions on names and tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from statewise.weights import rwkv

__all__ = ["detect", "from_ours", "to_ours"]

_OUTER = {
    "emb.": "model.embeddings.",
    "ln_out.": "model.norm.",
    "head.": "lm_head.",
}
_PARTS = {"att": "attn", "ffn": "ffn", "ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm"}
_PROJECTIONS = {
    "receptance": "r_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
    "ln_x": "g_norm",
}
#: Ours → the place in fla's pair of linear layers; only the last has a bias.
_PAIR = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}
_LOW_RANK = re.compile(r"([wavg])([012])$")
_THEIR_PAIR = re.compile(r"([wavg])_lora\.lora\.(2\.bias|0\.weight|2\.weight)$")
_THEIR_LAYER = re.compile(r"model\.layers\.(\d+)\.(\w+)\.(.+)$")
#: One number a channel, (1, 1, C) with us; theirs have axes of their own.
_VECTOR = re.compile(r"\.(x_[rwkvag]|[wav]0|k_k|k_a)$")

_NORM_EPS = 1e-5


def detect(names: set[str]) -> bool:
    """Whether these are names of fla's RWKV-7."""
    return "model.layers.0.attn.r_k" in names and "model.layers.0.attn.w_lora.lora.0.weight" in names


def to_ours(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields of our configuration and tensors by our names; unknown names pass through, for the reader to refuse.

    Raises:
        ValueError: the configuration asks for what our RWKV-7 is not, or sizes cannot be read.
    """
    if config.get("attn") is not None:
        raise ValueError("config.json mixes attention layers into the RWKV-7: only pure ones are supported")
    if config.get("norm_eps", _NORM_EPS) != _NORM_EPS:
        raise ValueError(f"config.json has norm_eps {config['norm_eps']!r}; RWKV-7 has {_NORM_EPS}")
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours = _our_name(name)
        if _LOW_RANK.search(ours) and ours[-1] in "12" and tensor.dim() == 2:
            tensor = tensor.t().contiguous()
        if _VECTOR.search(ours):
            tensor = tensor.reshape(1, 1, -1)
        renamed[ours] = tensor
    if "head.weight" not in renamed and config.get("tie_word_embeddings") and "emb.weight" in renamed:
        renamed["head.weight"] = renamed["emb.weight"].clone()
    fields, kept = rwkv.to_ours("rwkv7", renamed)
    fields["group_norm_eps"] = fields["head_size"] * _NORM_EPS  # theirs follows the head size
    return fields, kept


def from_ours(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A configuration and tensors as fla has them.

    Raises:
        ValueError: a head size that goes with another epsilon there, or a model with what fla's has no place for.
    """
    for field, what in (("deep_embed", "DeepEmbed (RWKV-7a)"), ("learned_state", "a learnt initial state")):
        if fields.get(field):
            raise ValueError(f"format 'fla' has no place for {what}")
    head_size = fields["head_size"]
    if abs(fields["group_norm_eps"] - head_size * _NORM_EPS) > 1e-12:
        raise ValueError(
            f"format 'fla' ties the epsilon of the heads' norm to their size, {head_size * _NORM_EPS:g} for heads of "
            f"{head_size}; this model has {fields['group_norm_eps']:g}"
        )
    renamed = {}
    for name, tensor in tensors.items():
        if name in rwkv.UNUSED:  # it has no place for them
            continue
        if _LOW_RANK.search(name) and name[-1] in "12":
            tensor = tensor.t().contiguous()
        if _VECTOR.search(name) and ".att.x_" not in name:
            tensor = tensor.reshape(-1)
        renamed[_their_name(name)] = tensor
    width, layers = fields["width"], fields["num_layers"]
    ffn_width = tensors["blocks.0.ffn.key.weight"].shape[0]
    ranks = {
        f"{theirs}_low_rank_dim": tensors[f"blocks.{min(block, layers - 1)}.att.{name}"].shape[1]
        for theirs, name, block in (("decay", "w1", 0), ("gate", "g1", 0), ("a", "a1", 0), ("v", "v1", 1))
        if f"blocks.{min(block, layers - 1)}.att.{name}" in tensors
    }
    config = {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "vocab_size": fields["vocab_size"],
        "hidden_size": width,
        "hidden_ratio": ffn_width / width,
        "intermediate_size": ffn_width,
        "num_hidden_layers": layers,
        "head_dim": head_size,
        "num_heads": width // head_size,
        "value_dim": [width] * layers,
        "norm_eps": _NORM_EPS,
        "norm_bias": True,
        "norm_first": True,
        "hidden_act": "sqrelu",
        "attn": None,
        "tie_word_embeddings": False,
        **ranks,
    }
    return config, renamed


def _our_name(name: str) -> str:
    for ours, theirs in _OUTER.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    match = _THEIR_LAYER.match(name)
    parts = {theirs: ours for ours, theirs in _PARTS.items()}
    if match is None or match[2] not in parts:
        return name
    layer, part, rest = match[1], parts[match[2]], match[3]
    if pair := _THEIR_PAIR.match(rest):
        rest = pair[1] + {theirs: ours for ours, theirs in _PAIR.items()}[pair[2]]
    elif part == "att":
        head, _, tail = rest.partition(".")
        rest = {theirs: ours for ours, theirs in _PROJECTIONS.items()}.get(head, head) + (f".{tail}" if tail else "")
    return f"blocks.{layer}.{part}.{rest}"


def _their_name(name: str) -> str:
    for ours, theirs in _OUTER.items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    _, layer, part, rest = name.split(".", 3)
    if part == "att":
        if pair := _LOW_RANK.match(rest):
            rest = f"{pair[1]}_lora.lora.{_PAIR[pair[2]]}"
        else:
            head, _, tail = rest.partition(".")
            rest = _PROJECTIONS.get(head, head) + (f".{tail}" if tail else "")
    return f"model.layers.{layer}.{_PARTS[part]}.{rest}"
