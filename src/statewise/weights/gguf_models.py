"""Models as GGUF files describe them: llama.cpp's metadata for RWKV-6, RWKV-7, Mamba and Mamba-2, and the way back.

Pure functions on metadata and tensors. Facts are those of ``convert_hf_to_gguf.py`` (what is written) and
``src/models`` (what is computed from it) of ggml-org/llama.cpp:

- RWKV-6 halves the stream every ``rescale_every_n_layers`` blocks; what blocks add to it is divided ahead of time.
- RWKV-7's first block carries v0, v1 and v2, which nothing reads: copies of its a0, a1 and a2.
- Of Mamba a tied head is left out, and ``ssm.dt_b_c_rms`` means FalconMamba's norms.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from statewise.weights import mamba, mamba2, rwkv
from statewise.weights.gguf import Value
from statewise.weights.gguf_names import names_of, read_tensors, write_tensors

__all__ = ["ARCHITECTURES", "from_ours", "to_ours"]

#: Ours and llama.cpp's names for them are the same.
ARCHITECTURES = ("rwkv6", "rwkv7", "mamba", "mamba2")

_HEAD = "lm_head.weight"
_RESCALED = re.compile(r"blocks\.(\d+)\.(?:att\.output|ffn\.value)\.weight$")
#: What conversions of the published RWKV-6 have: `rescale_every` of their configurations.
_RESCALE = 6
_NORM_EPS = 1e-5
_GROUP_NORM_EPS = 64e-5  # fixed in llama.cpp, whatever the head size
#: Fields that neither tensors nor llama.cpp's keys tell. They are kept as JSON, under a key of our own.
_OWN = "statewise.config"
_OWN_FIELDS: dict[str, tuple[str, ...]] = {
    "rwkv6": (),
    "rwkv7": (),
    "mamba": ("inner_norm_eps", "residual_in_fp32", "pad_vocab_multiple", "dt_min", "dt_max", "dt_floor"),
    "mamba2": ("residual_in_fp32", "pad_vocab_multiple", "dt_min", "dt_max", "dt_floor", "A_min", "A_max"),
}
#: What llama.cpp can compute; a model with another value is refused.
_ONLY: dict[str, dict[str, Any]] = {
    "rwkv6": {},
    "rwkv7": {"group_norm_eps": _GROUP_NORM_EPS},
    "mamba": {"expand": 2, "bias": False, "conv_bias": True, "rms_norm": True},
    "mamba2": {
        "expand": 2,
        "bias": False,
        "conv_bias": True,
        "rms_norm": True,
        "gated_norm": "after",
        "ssm_width": None,
        "D_per_channel": False,
        "mlp_width": None,
        "dt_limit": (0.0, math.inf),
    },
}


def to_ours(metadata: Mapping[str, Value], tensors: dict[str, Tensor]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Architecture, fields of our configuration and tensors by our names.

    Args:
        metadata: the file's; of keys outside the architecture's own only ``statewise.config`` is looked at.
        tensors: by the file's names; emptied, so that nothing is held twice.

    Raises:
        ValueError: an architecture that is not one of :data:`ARCHITECTURES`, an unknown, missing or mis-shaped tensor,
            or metadata that contradicts the tensors or asks for what our models are not.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ValueError(f"general.architecture is {architecture!r:.80}; accepted are {', '.join(ARCHITECTURES)}")
    look = _Look(architecture, metadata)
    head_size = look.count("wkv.head_size") if architecture == "rwkv7" else 0
    renamed = read_tensors(names_of(architecture, head_size=head_size, groups=0), tensors)
    if architecture.startswith("rwkv"):
        return architecture, *_rwkv_to_ours(look, renamed)
    return architecture, *_mamba_to_ours(look, renamed)


class _Look:
    """The metadata of one architecture, by keys without its name."""

    def __init__(self, architecture: str, metadata: Mapping[str, Value]) -> None:
        self.architecture, self.metadata = architecture, metadata

    def get(self, key: str, unsaid: Value = None) -> Value:
        return self.metadata.get(f"{self.architecture}.{key}", unsaid)

    def error(self, key: str, expected: str) -> ValueError:
        return ValueError(f"metadata {self.architecture}.{key} is {self.get(key)!r}; expected {expected}")

    def count(self, key: str, least: int = 1, unsaid: Value = None) -> int:
        found = self.get(key, unsaid)
        if not isinstance(found, int) or isinstance(found, bool) or found < least:
            raise self.error(key, f"an integer from {least}")
        return found

    def agree(self, stated: Mapping[str, Any]) -> None:
        """The tensors decide; what the metadata says of them may only agree."""
        for key, value in stated.items():
            found = self.get(key, value)
            if found != value:
                raise ValueError(f"metadata {self.architecture}.{key} is {found!r}, but the tensors have {value}")

    def epsilon(self, key: str) -> float:
        """A float32 as the shortest decimal that is the same float32: 1e-05, not 9.99999974737875e-06."""
        found = self.get(key, _NORM_EPS)
        if not isinstance(found, float) or not 0 < found < 1:
            raise self.error(key, "a number between 0 and 1")
        decimals = (float(f"{found:.{digits}g}") for digits in range(1, 9))
        return next((short for short in decimals if struct.pack("<f", short) == struct.pack("<f", found)), found)

    def own(self) -> dict[str, Any]:
        """The fields under our own key."""
        text = self.metadata.get(_OWN)
        if text is None:
            return {}
        try:
            fields = json.loads(text) if isinstance(text, str) else None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"metadata {_OWN} is not JSON: {error}") from error
        if not isinstance(fields, dict) or not set(fields) <= set(_OWN_FIELDS[self.architecture]):
            accepted = ", ".join(_OWN_FIELDS[self.architecture]) or "none"
            raise ValueError(f"metadata {_OWN} is {text!r:.80}; accepted fields: {accepted}")
        for field, value in fields.items():
            if not isinstance(value, (bool, int, float)) or not 0 <= value < 1 << 31:
                raise ValueError(f"metadata {_OWN} has {field}={value!r:.40}; accepted are truth values and numbers")
            if field == "pad_vocab_multiple" and not (isinstance(value, int) and value > 0):
                raise ValueError(f"metadata {_OWN} has {field}={value!r}; accepted are integers from 1")
        return fields


_RANKS = {
    "decay_rank": "attention.decay_lora_rank",
    "iclr_rank": "attention.iclr_lora_rank",
    "value_rank": "attention.value_residual_mix_lora_rank",
    "gate_rank": "attention.gate_lora_rank",
}


def _stated_of_rwkv(architecture: str, fields: Mapping[str, Any]) -> dict[str, int]:
    """The metadata that follows from sizes."""
    keys = {
        "block_count": "num_layers",
        "embedding_length": "width",
        "feed_forward_length": "ffn_width",
        "wkv.head_size": "head_size",
        "vocab_size": "vocab_size",
    }
    if architecture == "rwkv6":
        keys |= {"time_mix_extra_dim": "mix_rank", "time_decay_extra_dim": "decay_rank"}
    else:
        keys |= {key: field for field, key in _RANKS.items() if field in fields}
    return {key: fields[field] for key, field in keys.items()}


def _rwkv_to_ours(look: _Look, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in rwkv.UNUSED:
        tensors.pop(name, None)
    if look.epsilon("attention.layer_norm_epsilon") != _NORM_EPS:
        raise look.error("attention.layer_norm_epsilon", str(_NORM_EPS))
    if look.get("token_shift_count", 2) != 2:
        raise look.error("token_shift_count", "2")
    if look.architecture == "rwkv6" and (every := look.count("rescale_every_n_layers", 0, 0)):
        for name, halvings in _rescaled(tensors, every).items():
            tensors[name] = tensors[name] * 2.0 ** min(halvings, 128)
            if not bool(torch.isfinite(tensors[name]).all()):
                raise ValueError(f"{name} is not finite once it is multiplied by 2^{halvings} (rescale_every_n_layers)")
    fields, kept = rwkv.to_ours(look.architecture, tensors)
    look.agree(_stated_of_rwkv(look.architecture, fields))
    return fields | look.own(), kept


def _rescaled(tensors: Mapping[str, Tensor], every: int) -> dict[str, int]:
    """The tensors (by our names) that the file holds divided by a power of two, and that power."""
    matches = {name: match for name in tensors if (match := _RESCALED.match(name))}
    return {name: int(match[1]) // every for name, match in matches.items() if int(match[1]) >= every}


def _mamba_to_ours(look: _Look, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    head = tensors.pop(_HEAD, None)
    family = mamba if look.architecture == "mamba" else mamba2
    fields, kept = family.to_ours("state-spaces", {}, tensors)
    fields["tie_embeddings"] = head is None
    if head is not None:
        kept[_HEAD] = head
    fields["norm_eps"] = look.epsilon("attention.layer_norm_rms_epsilon")
    if look.architecture == "mamba2":
        fields |= {"groups": look.count("ssm.group_count"), "state_size": look.count("ssm.state_size")}
        matrices = kept["backbone.layers.0.mixer.conv1d.weight"].shape[0] - fields["expand"] * fields["width"]
        if 2 * fields["groups"] * fields["state_size"] != matrices:
            raise look.error("ssm.group_count", f"with ssm.state_size {matrices} rows for B and C, as the tensors have")
    elif (normed := look.get("ssm.dt_b_c_rms", False)) is not False:
        if normed is not True:
            raise look.error("ssm.dt_b_c_rms", "a truth value")
        # llama.cpp takes the blocks' epsilon here, too; FalconMamba has 1e-6, our default.
        fields["inner_norm"] = "weightless"
    look.agree(_stated_of_mamba(look.architecture, fields, kept))
    own = look.own()
    if fields["vocab_size"] % (multiple := own.get("pad_vocab_multiple", 1)):
        raise ValueError(f"metadata {_OWN} pads {fields['vocab_size']} rows to a multiple of {multiple}")
    return fields | own, kept


def _stated_of_mamba(architecture: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The metadata that follows from sizes."""
    layer = "backbone.layers.0.mixer."
    inner = fields["expand"] * fields["width"]
    ranks = (
        tensors[layer + "A_log"].shape[0] if architecture == "mamba2" else tensors[layer + "dt_proj.weight"].shape[1]
    )
    return {
        "block_count": fields["num_layers"],
        "embedding_length": fields["width"],
        "vocab_size": tensors["backbone.embedding.weight"].shape[0],
        "ssm.conv_kernel": fields["conv_width"],
        "ssm.inner_size": inner,
        "ssm.state_size": fields["state_size"],
        "ssm.time_step_rank": ranks,
        **({"ssm.group_count": fields["groups"]} if architecture == "mamba2" else {}),
    }


def from_ours(
    architecture: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, str | bool | int | float], dict[str, Tensor]]:
    """Metadata and tensors as llama.cpp has them, without a tokenizer (its model is ``"none"``).

    Args:
        architecture: one of :data:`ARCHITECTURES`.
        fields: every field of our configuration.
        tensors: by our names; float32, float16 or bfloat16. RWKV-7's unused ``v0``, ``v1``, ``v2`` have no place.

    Raises:
        ValueError: a field or a tensor that llama.cpp has no place for.
    """
    for field, only in _ONLY[architecture].items():
        value = fields[field]
        if (tuple(value) if isinstance(value, list) else value) != only:
            raise ValueError(f"format 'gguf' has no place for {field}={value!r}; it holds {only!r}")
    kept = {name: tensor for name, tensor in tensors.items() if name not in rwkv.UNUSED}
    for name, tensor in kept.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"format 'gguf' holds float32, float16 and bfloat16; tensor {name} is {tensor.dtype}")
    metadata: dict[str, str | bool | int | float] = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.file_type": {torch.float32: 0, torch.float16: 1}.get(next(iter(kept.values())).dtype, 32),
        "tokenizer.ggml.model": "none",
    }
    stated = _rwkv_from_ours if architecture.startswith("rwkv") else _mamba_from_ours
    # Nothing here has a context or attention heads; llama.cpp will not load a model without these two.
    keys = {"context_length": 1 << 20, "attention.head_count": 0} | stated(architecture, fields, kept)
    metadata |= {f"{architecture}.{key}": value for key, value in keys.items()}
    if own := {field: fields[field] for field in _OWN_FIELDS[architecture]}:
        metadata[_OWN] = json.dumps(own)
    return metadata, write_tensors(names_of(architecture, head_size=0, groups=fields.get("groups", 1)), kept)


def _rwkv_from_ours(architecture: str, fields: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Metadata without the architecture's name; ``tensors`` become those the file holds."""
    sizes, _ = rwkv.to_ours(architecture, tensors)
    keys: dict[str, Any] = {"attention.layer_norm_epsilon": _NORM_EPS}
    if architecture == "rwkv7":
        sizes.setdefault("value_rank", sizes["iclr_rank"])  # one block: nothing to read it from, but it has to be there
        tensors |= {f"blocks.0.att.v{n}": tensors[f"blocks.0.att.a{n}"] for n in range(3)}
    else:
        powers = _rescaled(tensors, _RESCALE)
        divided = {name: tensors[name] * 2.0**-power for name, power in powers.items()}
        # Nothing is lost, or nothing is divided: small float16 numbers have no bits to spare.
        whole = all(torch.equal(divided[name] * 2.0**power, tensors[name]) for name, power in powers.items())
        keys["rescale_every_n_layers"] = _RESCALE if whole else 0
        tensors |= divided if whole else {}
    return keys | _stated_of_rwkv(architecture, sizes)


def _mamba_from_ours(architecture: str, fields: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Metadata without the architecture's name; ``tensors`` become those the file holds."""
    keys = {
        "attention.layer_norm_rms_epsilon": float(fields["norm_eps"]),
        "feed_forward_length": 0,
        **_stated_of_mamba(architecture, fields, tensors),
    }
    if fields["tie_embeddings"]:
        tensors.pop(_HEAD, None)
    if architecture == "mamba":
        inner = fields["inner_norm"]
        if inner not in (None, "weightless"):
            raise ValueError(f"format 'gguf' has no place for inner_norm={inner!r}; it holds None and 'weightless'")
        keys["ssm.dt_b_c_rms"] = inner is not None
    elif fields["norm_groups"] not in (None, fields["groups"]):
        raise ValueError(
            f"format 'gguf' has no place for norm_groups={fields['norm_groups']}; it holds as many as groups"
        )
    return keys
