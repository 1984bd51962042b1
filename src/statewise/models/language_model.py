"""What all language models here ask and do alike, around the architecture that is each one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from statewise.ops.checks import values_are_read
from statewise.state import ModelState
from statewise.weights.contents import same_values

__all__ = ["check_call", "group_parameters", "tie_head"]


def check_call(model: nn.Module, tokens: Tensor, state: ModelState | None, kind: type[Any]) -> None:
    """Whether ``model``, whose ``config`` has ``vocab_size`` and ``num_layers``, can read ``tokens`` from ``state``.

    Args:
        model: its class names it in messages.
        tokens: ids of any shape.
        state: as :meth:`init_state` gives, with layers of type ``kind``; ``None`` means the beginning.

    Raises:
        ValueError: tokens that are no integers or outside the vocabulary, or a state of another model.
    """
    name, config = type(model).__name__, model.config
    assert not isinstance(config, Tensor | nn.Module)
    if tokens.dtype.is_floating_point or tokens.dtype.is_complex or tokens.dtype == torch.bool:
        raise ValueError(f"{name}: tokens have dtype {tokens.dtype}; accepted are integers")
    if values_are_read() and tokens.numel():
        low, high = torch.stack(torch.aminmax(tokens)).tolist()  # one wait for the device, not two
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"{name}: token {low if low < 0 else high} is outside the vocabulary; "
                f"accepted are 0..{config.vocab_size - 1}"
            )
    if state is not None and (
        not isinstance(state, ModelState)
        or len(state.layers) != config.num_layers
        or not all(isinstance(layer, kind) for layer in state.layers)
    ):
        raise ValueError(
            f"{name}: state must be a ModelState of {config.num_layers} {kind.__name__}, as init_state gives"
        )


def group_parameters(model: nn.Module, rule: Callable[[str, Tensor], tuple[float, float]]) -> list[dict[str, Any]]:
    """Optimiser groups by ``rule``: name and parameter → scale of the learning rate, and weight decay.

    Returns:
        dicts with ``params``, ``names``, ``lr_scale`` and ``weight_decay``; every parameter in exactly one.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        scale, decay = key = rule(name, parameter)
        group = groups.setdefault(key, {"params": [], "names": [], "lr_scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


_EMBEDDING, _HEAD = "backbone.embedding.weight", "lm_head.weight"


def tie_head(model: nn.Module) -> None:
    """Make ``lm_head`` read with the weight of ``backbone.embedding``, and stay so through ``load_state_dict``."""
    _tie(model)
    model.register_load_state_dict_pre_hook(_refuse_two_heads)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_post_hook(_tie)  # type: ignore[no-untyped-call]


def _tie(model: nn.Module, incompatible: Any = None) -> None:
    """One parameter in both places; ``load_state_dict(assign=True)`` has put two where there was one."""
    model.get_submodule("lm_head").weight = model.get_parameter(_EMBEDDING)


def _refuse_two_heads(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, metadata: Any, strict: bool, *errors: list[str]
) -> None:
    """Tied tensors that differ would silently overwrite each other."""
    embedding, head = state_dict.get(prefix + _EMBEDDING), state_dict.get(prefix + _HEAD)
    if embedding is not None and head is not None and not same_values(embedding, head):
        errors[-1].append(f"{prefix}{_HEAD} differs from {prefix}{_EMBEDDING}, but tie_embeddings is set")
