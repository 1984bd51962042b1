"""Vision Mamba's published files: sizes found from tensors, places that tensors do not tell, and what is refused."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import statewise
from statewise import WeightsError
from statewise.models.vision.vision_mamba import VisionMamba, VisionMambaConfig
from statewise.weights import vision_mamba

SMALL: dict[str, Any] = {
    "num_classes": 5,
    "image_size": (12, 20),
    "patch_size": 4,
    "width": 16,
    "num_layers": 2,
    "state_size": 3,
}


def stored(**fields: Any) -> dict[str, Tensor]:
    with torch.device("meta"):
        return VisionMamba(VisionMambaConfig(**{**SMALL, **fields})).state_dict()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_classes": 0, "in_channels": 1},
        {"patch_size": (4, 2), "stride": (2, 1)},
        {"stride": 2},
        {"layer_scale": 1.0, "rms_norm": False, "bias": True, "conv_bias": False},
        {"conv_width": 3, "expand": 1, "dt_rank": 2, "state_size": 5, "num_layers": 1},
    ],
)
def test_sizes_come_from_tensors(fields: dict[str, Any]) -> None:
    tensors = stored(**fields)
    assert vision_mamba.detect(set(tensors))
    found, renamed = vision_mamba.to_ours(tensors, {"image_size": (12, 20)})
    assert VisionMambaConfig(**found) == VisionMambaConfig(**{**SMALL, **fields})
    assert renamed == tensors


@pytest.mark.parametrize(
    ("fields", "given"),
    [
        ({"image_size": 224, "patch_size": 16}, {}),
        ({"image_size": 224, "patch_size": 16, "stride": 8}, {}),
        # The size that is asked for is not the one that the embedding is made for.
        ({"image_size": 224, "patch_size": 16}, {"image_size": 384}),
        ({"image_size": 224, "patch_size": 16, "stride": 8}, {"image_size": 432}),
        ({"image_size": 432, "patch_size": 16}, {"image_size": 432, "stride": 16}),
        ({"image_size": 32, "patch_size": 4}, {"stride": 4}),
        ({"image_size": 32, "patch_size": 4, "stride": 2}, {"stride": 2, "image_size": 64}),
        ({"image_size": 32, "patch_size": 4, "stride": 3}, {"stride": 3, "image_size": [31, 31]}),
    ],
)
def test_places(fields: dict[str, Any], given: dict[str, Any]) -> None:
    found, _ = vision_mamba.to_ours(stored(**fields), given)
    config, want = VisionMambaConfig(**found), VisionMambaConfig(**{**SMALL, **fields})
    assert (config.grid, config.strides) == (want.grid, want.strides)
    assert dataclasses.replace(config, image_size=want.image_size, stride=want.stride) == want


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "module.backbone."])
def test_prefixes(prefix: str) -> None:
    tensors = stored()
    worn = {prefix + name: tensor for name, tensor in tensors.items()}
    assert vision_mamba.detect(set(worn))
    _, renamed = vision_mamba.to_ours(worn, {"image_size": (12, 20)})
    assert renamed == tensors


def test_a_name_twice_is_refused() -> None:
    tensors = stored()
    tensors["module.cls_token"] = tensors["cls_token"]
    with pytest.raises(ValueError, match="same name behind their prefixes"):
        vision_mamba.to_ours(tensors, {})


@pytest.mark.parametrize(
    ("given", "change", "message"),
    [
        ({}, {}, "places for 15 patches of 4×4: their stride cannot be told"),
        ({"image_size": 99}, {}, "their stride cannot be told"),
        ({"stride": 4}, {}, "their stride cannot be told"),
        ({"image_size": "big"}, {}, "a size in pixels is 'big'"),
        ({}, {"cls_token": None}, "tensor cls_token is missing: a Vision Mamba is read with one class token"),
        ({}, {"layers.0.mixer.conv1d_b.weight": None}, "bimamba_type v2"),
        ({}, {"layers.0.mixer.dt_proj.weight": None}, "tensor layers.0.mixer.dt_proj.weight is missing"),
        ({}, {"pos_embed": torch.zeros(16, 16)}, "tensor pos_embed has shape (16, 16)"),
        ({}, {"pos_embed": torch.zeros(1, 1, 16)}, "expected the class token's and at least one patch's"),
        ({}, {"patch_embed.proj.weight": torch.zeros(0, 3, 4, 4)}, "expected 4 dimensions, none empty"),
        ({}, {"layers.0.mixer.A_log": torch.zeros(33, 3)}, "33 channels, which is no multiple of the width 16"),
        ({}, {"layers.3.norm.weight": torch.zeros(16)}, "layers are numbered [0, 1, 3]"),
    ],
)
def test_refused(given: dict[str, Any], change: dict[str, Tensor | None], message: str) -> None:
    tensors = {name: tensor for name, tensor in (stored() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        vision_mamba.to_ours(tensors, given)


def test_other_models_are_not_taken_for_one() -> None:
    for name in ("backbone.embedding.weight", "backbone.patch_embed.projection.weight", "blocks.0.att.key.weight"):
        assert not vision_mamba.detect({name, "backbone.layers.0.mixer.x_proj.weight"})


def made(**fields: Any) -> Any:
    """A model with its weights moved off their start."""
    model = statewise.create("vim", **{**SMALL, **fields}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def training_state(model: Any) -> dict[str, Any]:
    """What the official trainer saves."""
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 12, 20)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"base_values": [1e-3], "t_in_epochs": True},
        "epoch": 299,
        "model_ema": {name: tensor * 0 for name, tensor in model.state_dict().items()},
        "scaler": {"scale": 65536.0, "_growth_tracker": 5},
        "args": argparse.Namespace(model="vim_tiny_patch16_224", lr=1e-3, output_dir="", distributed=False, gpu=None),
    }


@torch.no_grad()
def test_a_trainers_file_loads(tmp_path: Path) -> None:
    model = made()
    with torch.enable_grad():
        torch.save(training_state(model), tmp_path / "checkpoint.pth")
    found: Any = statewise.load(tmp_path / "checkpoint.pth", image_size=(12, 20))
    assert isinstance(found, VisionMamba)
    assert found.config == model.config
    images = torch.randn(2, 3, 12, 20)
    assert torch.equal(found(images), model(images))


@torch.no_grad()
def test_published_files_need_no_telling(tmp_path: Path) -> None:
    model = made(image_size=224, patch_size=16, stride=8, num_layers=1)
    torch.save({"model": model.state_dict()}, tmp_path / "vim.pth")
    found: Any = statewise.load(tmp_path / "vim.pth")
    assert found.config == model.config
    larger: Any = statewise.load(tmp_path / "vim.pth", image_size=(64, 96), num_classes=0)
    assert larger.config.grid == (7, 11)
    assert larger.config.strides == (8, 8)
    images = torch.randn(1, 3, 64, 96)
    want = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.allclose(larger(images), want, atol=1e-5)
    other: Any = statewise.load(tmp_path / "vim.pth", num_classes=2)
    assert other(images).shape == (1, 2)


@torch.no_grad()
def test_there_and_back(tmp_path: Path) -> None:
    model = made(stride=(2, 4), global_pool="avg", divide_out=False, layer_scale=0.1)
    statewise.save(model, tmp_path / "ours")
    found: Any = statewise.load(tmp_path / "ours")
    assert found.config == model.config
    images = torch.randn(2, 3, 12, 20)
    assert torch.equal(found(images), model(images))
    assert statewise.load(tmp_path / "ours", dtype=torch.bfloat16)(images.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="cannot hold a vim model"):
        statewise.save(model, tmp_path / "other", format="mamba-ssm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.1.norm.weight": None}, "tensor layers.1.norm.weight is missing"),
        ({"rope.freqs_cos": torch.zeros(3)}, "unknown tensor rope.freqs_cos"),
        ({"layers.1.mixer.D_b": torch.zeros(7)}, r"layers.1.mixer.D_b has shape \(7,\)"),
        ({"cls_token": None}, "cls_token is missing"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
    tensors = {name: tensor for name, tensor in (made().state_dict() | change).items() if tensor is not None}
    torch.save({"model": tensors}, tmp_path / "vim.pth")
    with pytest.raises(WeightsError, match=message):
        statewise.load(tmp_path / "vim.pth", image_size=(12, 20))
