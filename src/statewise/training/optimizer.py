"""AdamW over the authors' parameter groups, and how the learning rate moves."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = [
    "OptimizerConfig",
    "build_optimizer",
    "learning_rate_at",
    "optimizer_tensors",
    "restore_optimizer",
    "set_learning_rate",
]


class OptimizerConfig(Protocol):
    """What is read here of a run's configuration."""

    @property
    def steps(self) -> int: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def learning_rate(self) -> float | None: ...
    @property
    def final_learning_rate(self) -> float | None: ...
    @property
    def schedule(self) -> str | None: ...
    @property
    def weight_decay(self) -> float | None: ...
    @property
    def betas(self) -> tuple[float, float] | None: ...
    @property
    def eps(self) -> float | None: ...


class _HasGroups(Protocol):
    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]: ...


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over ``model.parameter_groups``, each with the ``weight_decay`` and ``lr_scale`` its authors give it.

    The fused implementation works one element at a time, so its result does not depend on how threads split the work.

    Args:
        model: parameters already on their device.
        config: a resolved one.

    Raises:
        ValueError: a parameter in no group or in two, or a configuration with ``None`` left in it.
    """
    if config.betas is None or config.eps is None or config.weight_decay is None or config.learning_rate is None:
        raise ValueError("the configuration has values left open; pass config.resolved()")
    owner: _HasGroups = model  # type: ignore[assignment]  # the interface of a model of ours
    groups = owner.parameter_groups(config.weight_decay)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen: set[int] = set()
    for group in groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ValueError(f"a group holds a tensor of shape {tuple(parameter.shape)} that is no parameter")
            if id(parameter) in seen:
                raise ValueError(f"parameter {names[id(parameter)]} is in two groups")
            seen.add(id(parameter))
    if absent := [name for key, name in names.items() if key not in seen]:
        raise ValueError(f"parameter {absent[0]} is in no group ({len(absent)} in all)")
    own = [
        {
            "params": list(group["params"]),
            "weight_decay": float(group["weight_decay"]),
            "lr_scale": float(group["lr_scale"]),
        }
        for group in groups
        if group["params"]
    ]
    return torch.optim.AdamW(own, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def learning_rate_at(step: int, config: OptimizerConfig) -> float:
    """The learning rate of optimiser step ``step`` (the first is 0), before any group's own factor.

    Warm-up of w steps: ``peak · (0.01 + 0.99 · step/w)``. After it, with p from 0 to 1 at the last step:
    cosine ``final + (peak - final) · (1 + cos πp)/2``, exponential ``peak · (final/peak)^p``, or constant ``peak``.
    """
    peak, final, warmup = config.learning_rate, config.final_learning_rate, config.warmup_steps
    if peak is None or final is None or config.schedule is None:
        raise ValueError("the configuration has values left open; pass config.resolved()")
    if step < warmup:
        return peak * (0.01 + 0.99 * step / warmup)
    progress = min(1.0, (step - warmup) / max(1, config.steps - 1 - warmup))
    if config.schedule == "constant":
        return peak
    if config.schedule == "exponential":
        return peak * float((final / peak) ** progress)
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group ``rate`` times its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """What the optimiser remembers, as ``slot/parameter name`` → tensor; :func:`restore_optimizer` is the way back."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{slot}/{names[id(parameter)]}": tensor.detach()
        for parameter, slots in optimizer.state.items()
        for slot, tensor in slots.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what :func:`optimizer_tensors` gave.

    Raises:
        ValueError: a tensor for no parameter of this model, or of the wrong shape; names it.
    """
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        slot, _, name = key.partition("/")
        if name not in parameters or slot not in ("step", "exp_avg", "exp_avg_sq"):
            raise ValueError(f"tensor {key} belongs to no parameter of this model")
        parameter = parameters[name]
        expected = torch.Size() if slot == "step" else parameter.shape
        if tensor.shape != expected:
            raise ValueError(f"tensor {key} has shape {tuple(tensor.shape)}, expected {tuple(expected)}")
        optimizer.state[parameter][slot] = tensor.to(parameter.device, copy=True)
    for name, own in parameters.items():
        slots = optimizer.state.get(own, {})
        if len(slots) not in (0, 3):
            raise ValueError(f"parameter {name} has {sorted(slots)} only")
