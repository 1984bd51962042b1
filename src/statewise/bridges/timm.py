"""Our models of images in timm's registry: ``timm.create_model("vrwkv_tiny", ...)`` and what is built on it.

What comes back is the model that :func:`statewise.create` makes, with timm's description of its data beside it. timm's
``in_chans`` and ``img_size`` are ``in_channels`` and ``image_size`` here; every other field of a configuration is given
by its own name.

Legend: B images, C channels, N tokens.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from statewise.models import create, list_models
from statewise.models.vision import PRESETS
from statewise.models.vision.backbone import pair, take_indices
from statewise.weights import vision, vision_mamba

__all__ = ["register"]

#: Name → timm's description of its data. timm looks for it by this name when a model is registered.
default_cfgs: dict[str, dict[str, Any]] = {}

_OUR_NAMES = {"in_chans": "in_channels", "img_size": "image_size"}
_IMAGE_SIZE = 224  # where a released size says nothing else
_CROP = 0.875  # 224 of 256 pixels, as all of them were evaluated
_CONTAINERS = ("state_dict", "model", "model_ema")


def register() -> list[str]:
    """Enter every model of ``statewise.list_models("vision")`` in timm's registry, if it is not there.

    From then on ``timm.create_model(name, ...)`` makes them, with

    * ``num_classes``, ``in_chans``, ``img_size``, ``drop_rate``, ``drop_path_rate``, ``global_pool``, and any other
      field of the configuration by our name;
    * ``features_only=True, out_indices=...``: maps ``(B, C, rows, columns)`` after chosen blocks, by default the last
      three. Blocks behind them, the head and the last norm are left out of the model; ``norm=True``, with which every
      map passes the last norm, keeps that;
    * ``pretrained=True, pretrained_cfg_overlay={"file": path}``: an official file. Its positions are resized to
      ``img_size``; first convolution and head are adapted to ``in_chans`` and ``num_classes`` as timm does. No file is
      known by name, so without a path timm refuses.

    Returns:
        the names, sorted.

    Raises:
        ImportError: timm is not installed, or the installed torchvision, which it needs, does not fit torch.
    """
    timm = _timm()
    names = list_models("vision")
    known = set(timm.list_models())
    for name in names:
        if name not in known:
            default_cfgs[name] = _description(name)
            timm.register_model(_entry(name))
    __all__[:] = ["register"]  # timm adds what it registers, and here is nothing of that name
    return names


def _timm() -> Any:
    """``timm.models``."""
    try:
        return importlib.import_module("timm.models")
    except ImportError as error:
        raise ImportError(f"needs the optional package timm ({error}): `pip install 'statewise[timm]'`") from error
    except RuntimeError as error:  # torchvision's, when its operators were compiled for another torch
        raise ImportError(f"timm needs a torchvision that was built for this torch: {error}") from error


def _description(name: str) -> dict[str, Any]:
    """What timm wants to know of a model's data, and where two layers are that it adapts."""
    architecture, sizes = PRESETS[name]
    height, width = pair("image_size", sizes.get("image_size", _IMAGE_SIZE))
    rwkv = architecture != "vim"
    return {
        "input_size": (3, height, width),
        "interpolation": "bicubic",
        "crop_pct": _CROP,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "num_classes": 1000,
        "first_conv": "backbone.patch_embed.projection" if rwkv else "patch_embed.proj",
        "classifier": ("head.2" if "head_width" in sizes else "head.fc") if rwkv else "head",
    }


def _entry(name: str) -> Callable[..., nn.Module]:
    """What timm calls for ``name``."""

    def make(**arguments: Any) -> Any:
        return create(name, **{_OUR_NAMES.get(key, key): value for key, value in arguments.items()})

    def entry(pretrained: bool = False, **arguments: Any) -> nn.Module:
        built: nn.Module = _timm().build_model_with_cfg(
            make,
            name,
            pretrained,
            pretrained_filter_fn=_published,
            feature_cfg={"out_indices": 3, "feature_cls": _features},
            **arguments,
        )
        return built

    entry.__name__ = entry.__qualname__ = name
    return entry


def _features(model: Any, out_indices: int | Sequence[int], norm: bool = False, **options: Any) -> nn.Module:
    """timm's extractor of maps around what of ``model`` they need."""
    chosen = take_indices("out_indices", out_indices, model.config.num_layers)
    model.reset_classifier(0)
    home, last = (model, "norm_f") if hasattr(model, "norm_f") else (model.backbone, "ln1")
    home.layers = home.layers[: chosen[-1] + 1]
    if not norm:
        setattr(home, last, nn.Identity())
    getter = importlib.import_module("timm.models._features").FeatureGetterNet
    found: nn.Module = getter(model, out_indices=chosen, norm=norm, **options)
    return found


@torch.no_grad()
def _published(found: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
    """The tensors of an official file by our names, its positions as many as the model has."""
    for container in _CONTAINERS:
        inner = found.get(container)
        found = inner if isinstance(inner, Mapping) else found
    config = model.config
    given = dataclasses.asdict(config)
    if (family := vision.detect(set(found))) is not None:
        fields, tensors = vision.to_ours(family, None, found, given)
        places = "backbone.pos_embed"
    else:
        fields, tensors = vision_mamba.to_ours(found, given | {"stride": config.strides})
        places = "pos_embed"
    if fields["image_size"] != config.image_size:
        model.set_input_size(fields["image_size"])
        model.get_parameter(places).copy_(tensors[places])
        model.set_input_size(config.image_size)
        tensors[places] = model.get_parameter(places).clone()
    return tensors
