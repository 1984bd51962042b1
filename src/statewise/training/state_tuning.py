"""State tuning: only what an RWKV-5, 6 or 7 remembers before its first token is learnt, its weights stay as they are.

A learnt beginning acts like a prompt that is never read: it costs no token and is one matrix (H, N, N) a block. A run:

    model = learn_initial_state(statewise.load("model.pth"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1.0, weight_decay=0.0)
    for tokens, targets in batches:
        logits, _ = model(tokens)
        language_model_loss(logits, targets).backward()
        optimizer.step(), optimizer.zero_grad()
    save_initial_state(model, "tuned.pth")

    model = load_initial_state(statewise.load("model.pth"), "tuned.pth")

Entries start at zero and have to grow to the size of a state that has read something: learning rates are large, 1 and
falling, as with RWKV-PEFT, whose files are read and written: nothing but `blocks.N.att.time_state` (H, V, K), one a
block. :func:`statewise.save` writes weights and beginning into one file.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from statewise.errors import WeightsError
from statewise.files import atomic_write
from statewise.weights.files import read_tensors, write_safetensors

if TYPE_CHECKING:
    from statewise.models.rwkv5 import RWKV5
    from statewise.models.rwkv6 import RWKV6
    from statewise.models.rwkv7 import RWKV7

    Model = TypeVar("Model", RWKV5, RWKV6, RWKV7)

__all__ = ["learn_initial_state", "load_initial_state", "save_initial_state"]

_SUFFIXES = (".pth", ".safetensors")


def learn_initial_state(model: Model) -> Model:
    """A model like ``model`` of which only the initial state will be learnt.

    Args:
        model: an RWKV-5, 6 or 7. It stays as it is: learnt beginning (if it has one), what requires a gradient, all.

    Returns:
        a model with ``config.learned_state`` whose `att.time_state` are zeros, or copies of ``model``'s, and alone
        require a gradient. All other tensors share memory with ``model``'s. It is in training mode if ``model`` is.

    Raises:
        ValueError: a model that has no such state.
    """
    tuned = _with_learned_state(model)
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_(name.endswith(".att.time_state"))
    return tuned


def save_initial_state(model: RWKV5 | RWKV6 | RWKV7, path: str | os.PathLike[str]) -> None:
    """Write what was learnt and nothing else, in one atomic step: `blocks.N.att.time_state` ``(H, V, K)``, dtype kept.

    Args:
        model: one with ``config.learned_state``.
        path: a ``.pth``, as RWKV-PEFT writes and reads it, or a ``.safetensors``.

    Raises:
        ValueError: a model that has learnt no state, or a path that ends otherwise.
    """
    target = Path(path)
    if target.suffix not in _SUFFIXES:
        raise ValueError(f"path is {target}; accepted endings are {' and '.join(_SUFFIXES)}")
    learnt = {name: tensor.detach().cpu().contiguous() for name, tensor in _learnt(model).items()}
    if not learnt:
        raise ValueError(f"this {type(model).__name__} has no learnt state; learn_initial_state gives it one")
    if target.suffix == ".safetensors":
        write_safetensors(target, learnt)
    else:
        atomic_write(target, lambda temporary: torch.save(learnt, temporary))


def load_initial_state(model: Model, path: str | os.PathLike[str]) -> Model:
    """A model like ``model`` that begins from the state in a file.

    Args:
        model: an RWKV-5, 6 or 7. It stays as it is.
        path: a file of :func:`save_initial_state` or of RWKV-PEFT's state tuning.

    Returns:
        a model with ``config.learned_state`` that holds the file's tensors in ``model``'s dtype and on its device. All
        other tensors share memory with ``model``'s.

    Raises:
        WeightsError: unreadable, or a tensor that is missing, unknown, mis-shaped or no floating-point one.
        ValueError: a model that has no such state.
        FileNotFoundError: nothing is there.
    """
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"no initial state at {source}")
    begun = _with_learned_state(model)
    wanted = _learnt(begun)
    found = read_tensors(source)
    if missing := [name for name in wanted if name not in found]:
        raise WeightsError(f"{source}: tensor {missing[0]} is missing ({len(missing)} in all)")
    if extra := [name for name in found if name not in wanted]:
        raise WeightsError(f"{source}: unknown tensor {extra[0]} ({len(extra)} in all) in what is an initial state")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise WeightsError(
                f"{source}: tensor {name} has shape {tuple(tensor.shape)}, this {type(model).__name__} expects "
                f"{tuple(wanted[name].shape)}"
            )
        if not tensor.dtype.is_floating_point:
            raise WeightsError(f"{source}: tensor {name} has dtype {tensor.dtype}; states are floating point")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])
    return begun


def _learnt(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.named_parameters() if name.endswith(".att.time_state")}


def _with_learned_state(model: Model) -> Model:
    """A model over the memory of ``model``'s tensors, but with a `time_state` of its own: zeros, or a copy."""
    if not hasattr(model.config, "learned_state"):
        raise ValueError(f"{type(model).__name__} has no initial state to learn; accepted are RWKV-5, 6 and 7")
    tensors = dict(model.state_dict())
    with torch.device("meta"):
        begun = type(model)(dataclasses.replace(model.config, learned_state=True))
    like = model.emb.weight
    for name, parameter in _learnt(begun).items():
        own = tensors.get(name)
        tensors[name] = like.new_zeros(parameter.shape) if own is None else own.clone()
    begun.load_state_dict(tensors, strict=True, assign=True)
    asked = dict(model.named_parameters())
    for name, parameter in begun.named_parameters():
        parameter.requires_grad_(name not in asked or asked[name].requires_grad)
    begun.set_grad_checkpointing(model.grad_checkpointing)
    return begun.train(model.training)
