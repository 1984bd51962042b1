"""RWKV-4 as transformers holds it: the published tensors under other names.

Pure functions on names and tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from statewise.weights import rwkv

__all__ = ["detect", "from_ours", "to_ours"]

_OUTER = {"emb.": "rwkv.embeddings.", "ln_out.": "rwkv.ln_out.", "head.": "head."}
_PARTS = {"ln0": "pre_ln", "ln1": "ln1", "ln2": "ln2", "att": "attention", "ffn": "feed_forward"}
_MIXES = {"time_mix_k": "time_mix_key", "time_mix_v": "time_mix_value", "time_mix_r": "time_mix_receptance"}
_OURS = re.compile(r"blocks\.(\d+)\.(\w+)\.(.+)$")
_THEIRS = re.compile(r"rwkv\.blocks\.(\d+)\.(\w+)\.(.+)$")
_NORM_EPS = 1e-5


def detect(names: set[str]) -> bool:
    """Whether these are names of transformers' RWKV-4."""
    return "rwkv.blocks.0.attention.time_decay" in names


def to_ours(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields of our configuration and tensors by our names; unknown names pass through, for the reader to refuse.

    Raises:
        ValueError: the configuration asks for what our RWKV-4 is not, or sizes cannot be read.
    """
    if config.get("layer_norm_epsilon", _NORM_EPS) != _NORM_EPS:
        raise ValueError(f"config.json has layer_norm_epsilon {config['layer_norm_epsilon']!r}; RWKV-4 has {_NORM_EPS}")
    renamed = {_our_name(name): tensor for name, tensor in tensors.items()}
    if "head.weight" not in renamed and config.get("tie_word_embeddings") and "emb.weight" in renamed:
        renamed["head.weight"] = renamed["emb.weight"].clone()
    return rwkv.to_ours("rwkv4", renamed)


def from_ours(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A configuration and tensors as transformers has them."""
    width = fields["width"]
    config = {
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        "vocab_size": fields["vocab_size"],
        "hidden_size": width,
        "attention_hidden_size": width,
        "intermediate_size": tensors["blocks.0.ffn.key.weight"].shape[0],
        "num_hidden_layers": fields["num_layers"],
        "layer_norm_epsilon": _NORM_EPS,
        "tie_word_embeddings": False,
    }
    return config, {_their_name(name): tensor for name, tensor in tensors.items()}


def _our_name(name: str) -> str:
    for ours, theirs in _OUTER.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    parts = {theirs: ours for ours, theirs in _PARTS.items()}
    match = _THEIRS.match(name)
    if match is None or match[2] not in parts:
        return name
    rest = {theirs: ours for ours, theirs in _MIXES.items()}.get(match[3], match[3])
    return f"blocks.{match[1]}.{parts[match[2]]}.{rest}"


def _their_name(name: str) -> str:
    for ours, theirs in _OUTER.items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    match = _OURS.match(name)
    assert match is not None, f"{name} is no name of ours"
    return f"rwkv.blocks.{match[1]}.{_PARTS[match[2]]}.{_MIXES.get(match[3], match[3])}"
