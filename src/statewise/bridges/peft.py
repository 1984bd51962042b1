"""LoRA on any projection of any model here, with the package ``peft``.

``y = W x + (alpha / rank) · B A x`` in place of ``y = W x``: W ``(out, in)`` is frozen, A ``(rank, in)`` and
B ``(out, rank)`` learn (Hu et al. 2021, arXiv 2106.09685); B starts at zero, so the model starts as it was.

Models here call their projections as modules, so ``peft`` finds all of them; the model itself stays what it was,
``forward``, ``step`` and its state included. Adapters are kept as ``peft`` keeps them (``adapter_config.json`` and
``adapter_model.safetensors``): what is written here loads there and the other way round.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from statewise.errors import WeightsError
from statewise.files import atomic_write
from statewise.weights.files import read_tensors

__all__ = ["add_lora", "load_adapter", "merge", "projections", "save_adapter"]

Model = TypeVar("Model", bound=nn.Module)

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_LARGEST_CONFIG = 1 << 22
_PREFIX = "base_model.model."  # peft's models hold the adapted one there
_DIGEST = "config_sha256"
_NAME = "default"  # an adapter's, where nobody gives it another
# What of an adapter's configuration is used, and what says nothing about the numbers; the rest must be the default.
_USED = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")
_IDLE = (
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "init_lora_weights", "megatron_core"),
)


def projections(model: nn.Module) -> list[str]:
    """The names of all modules that LoRA can adapt, in the model's order; the same with adapters as without.

    These are the ``nn.Linear`` modules, ``in_proj``, ``x_proj``, ``dt_proj`` and ``out_proj`` of a Mamba and the head
    among them. Not listed: a head tied to the embedding (merging would change both), and what is a bare parameter in
    the published files and so here, such as RWKV-6's and 7's own low-rank pairs.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found: list[str] = []
    adapted: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(adapted):
            continue
        if hasattr(module, "base_layer"):
            adapted += (f"{name}.",)
            found.append(name)
        elif isinstance(module, nn.Linear) and id(module.weight) not in embeddings:
            found.append(name)
    return found


def add_lora(
    model: Model, rank: int, alpha: float, targets: Sequence[str] | None = None, *, dropout: float = 0.0
) -> Model:
    """Give ``model`` trainable adapters and freeze everything else.

    Args:
        model: any model of this package; changed in place. Adapters of a half-precision model are float32.
        rank: of A and B.
        alpha: the adapters' output is scaled by alpha / rank.
        targets: names as :func:`projections` gives them, or their ends at a dot (``"att.key"``, ``"in_proj"``);
            ``None`` means every projection.
        dropout: probability for the adapters' inputs, in training mode.

    Returns:
        ``model`` itself; it still has ``step``, ``init_state`` and ``config``.

    Raises:
        ValueError: a target that names no projection, a value out of range, or a model that has adapters.
        ImportError: ``peft`` is not installed.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank is {rank!r}; an integer of 1 or more is accepted")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}; 0 or more and less than 1 is accepted")
    _refuse_adapters(model)
    chosen = _resolve(model, targets)
    config = _peft().LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=chosen)
    return _inject(model, config)


def merge(model: Model) -> Model:
    """Add the adapters to the weights they adapt, W + (alpha / rank) · B A, and remove them, in place.

    The model is then as :func:`statewise.load` gives one: every parameter trains, and it can be saved in any format.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: it has no adapters, or what one adds is not finite (nothing is changed then).
    """
    layers = _adapted(model)
    for name, layer in layers.items():
        if not all(bool(torch.isfinite(layer.get_delta_weight(adapter)).all()) for adapter in layer.active_adapters):
            raise ValueError(f"the adapter of {name} holds values that are not finite")
    for name, layer in layers.items():
        layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.get_base_layer())
    del model.peft_config
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapters alone, as ``peft`` does: ``adapter_model.safetensors`` and ``adapter_config.json``.

    Each file appears whole or not at all, the configuration last; the tensors carry its digest, so that one left from
    an earlier save is not taken for theirs.

    Args:
        path: a directory, made if missing.

    Raises:
        ValueError: the model has no adapters, or several.
    """
    from safetensors.torch import save

    _adapted(model)
    configs: Any = model.peft_config
    if list(configs) != [_NAME]:
        raise ValueError(f"the adapters are named {', '.join(configs)}; one alone, {_NAME!r}, can be saved")
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    fields = configs[_NAME].to_dict()
    fields["target_modules"] = sorted(fields["target_modules"])
    text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    tensors = {_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(model).items()}
    atomic_write(directory / _TENSORS, save(tensors, {"format": "pt", _DIGEST: digest}))
    atomic_write(directory / _CONFIG, text)


def load_adapter(model: Model, path: str | os.PathLike[str]) -> Model:
    """Give ``model`` the adapters of a directory that :func:`save_adapter` or ``peft`` wrote, ready to use or train.

    Args:
        model: without adapters; changed in place.
        path: the directory.

    Returns:
        ``model`` itself.

    Raises:
        WeightsError: a file is damaged, asks for what LoRA here is not (DoRA, ranks of their own, ...), or holds
            tensors that do not fit this model; the model is then as it was.
        FileNotFoundError: nothing is there.
        ValueError: the model has adapters.
        ImportError: ``peft`` is not installed.
    """
    from safetensors import safe_open

    _refuse_adapters(model)
    place = Path(path) / _CONFIG
    config, digest = _read_config(place)
    given = read_tensors(Path(path) / _TENSORS)
    with safe_open(Path(path) / _TENSORS, "pt") as handle:
        written_with = (handle.metadata() or {}).get(_DIGEST, digest)
    if written_with != digest:
        raise WeightsError(f"{place}: is not the configuration that {_TENSORS} was written with")
    try:
        config.target_modules = _resolve(model, sorted(config.target_modules))
    except ValueError as error:
        raise WeightsError(f"{place}: {error}") from error
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    _inject(model, config)
    try:
        _fill(model, given, Path(path) / _TENSORS)
    except WeightsError:
        _strip(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
        raise
    return model


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ImportError("LoRA needs the optional package peft: `pip install 'statewise[peft]'`") from error


def _layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}


def _adapted(model: nn.Module) -> dict[str, Any]:
    if not (layers := _layers(model)):
        raise ValueError(f"this {type(model).__name__} has no adapters; add_lora or load_adapter give it some")
    return layers


def _refuse_adapters(model: nn.Module) -> None:
    if _layers(model):
        raise ValueError(f"this {type(model).__name__} has adapters already; merge them first")


def _resolve(model: nn.Module, targets: Sequence[str] | None) -> list[str]:
    """Full names of the projections that ``targets`` name."""
    known = projections(model)
    if targets is None:
        return known
    if isinstance(targets, str) or not targets:
        raise ValueError(f"targets is {targets!r}; None or a list of at least one name is accepted")
    chosen: set[str] = set()
    for target in targets:
        named = [name for name in known if name == target or name.endswith(f".{target}")]
        if not named:
            ends = sorted({name.rpartition(".")[2] for name in known})
            raise ValueError(
                f"targets: {target!r} names no projection of this model; its names end in {', '.join(ends)}"
            )
        chosen.update(named)
    return [name for name in known if name in chosen]


def _inject(model: Model, config: Any) -> Model:
    _peft().inject_adapter_in_model(config, model)
    for layer in _layers(model).values():
        for part in (layer.lora_A[_NAME], layer.lora_B[_NAME]):
            if part.weight.dtype in (torch.float16, torch.bfloat16):  # too coarse for an optimiser's small steps
                part.float()
    return model


def _strip(model: nn.Module) -> None:
    """Remove the adapters, unused."""
    for name, layer in _layers(model).items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.get_base_layer())
    del model.peft_config


def _tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters by the names files give them, which leave out the adapter's own."""
    return {
        name.replace(f".{_NAME}.", "."): parameter for name, parameter in model.named_parameters() if ".lora_" in name
    }


def _read_config(place: Path) -> tuple[Any, str]:
    """The adapter's configuration, and the digest of its text."""
    if place.stat().st_size > _LARGEST_CONFIG:
        raise WeightsError(f"{place}: larger than {_LARGEST_CONFIG} bytes")
    content = place.read_bytes()
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{place}: not JSON: {error}") from error
    if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
        raise WeightsError(f"{place}: is no configuration of a LoRA adapter (peft_type LORA)")
    defaults = _peft().LoraConfig().to_dict()
    for key, value in fields.items():
        if key not in _USED and key not in _IDLE and (key not in defaults or value != defaults[key]):
            raise WeightsError(f"{place}: {key} is {value!r:.80}, which is not read here")
    rank, alpha, dropout = (fields.get(key, defaults[key]) for key in ("r", "lora_alpha", "lora_dropout"))
    targets, scaled = fields.get("target_modules"), fields.get("use_rslora", False)
    for key, good in (
        ("r", type(rank) is int and 1 <= rank <= 1 << 16),
        ("lora_alpha", type(alpha) in (int, float) and abs(alpha) < float("inf")),
        ("lora_dropout", type(dropout) in (int, float) and 0 <= dropout < 1),
        ("use_rslora", type(scaled) is bool),
        ("target_modules", isinstance(targets, list) and bool(targets) and all(type(name) is str for name in targets)),
    ):
        if not good:
            raise WeightsError(f"{place}: {key} is {fields.get(key)!r:.80}")
    config = _peft().LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, use_rslora=scaled
    )
    return config, hashlib.sha256(content).hexdigest()


@torch.no_grad()
def _fill(model: nn.Module, given: dict[str, Tensor], place: Path) -> None:
    """Copy the file's tensors into the adapters, strictly."""
    own = _tensors(model)
    if missing := [name for name in own if _PREFIX + name not in given]:
        raise WeightsError(f"{place}: tensor {_PREFIX}{missing[0]} is missing ({len(missing)} in all)")
    if extra := [name for name in given if name.removeprefix(_PREFIX) not in own]:
        raise WeightsError(f"{place}: unknown tensor {extra[0]} ({len(extra)} in all)")
    for name, parameter in own.items():
        tensor = given[_PREFIX + name]
        if tensor.shape != parameter.shape or not tensor.dtype.is_floating_point:
            raise WeightsError(
                f"{place}: tensor {_PREFIX}{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, "
                f"expected floating point of {tuple(parameter.shape)}"
            )
    for name, parameter in own.items():
        parameter.copy_(given[_PREFIX + name])
