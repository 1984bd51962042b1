"""VRWKV6: the published kernel's two loops and its shift, written out; its names, counts and initialisation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import statewise
from statewise.models.vision.vision_rwkv6 import MultiheadShift, SpatialMix6, VisionRWKV6, VisionRWKV6Config


def small(**fields: Any) -> VisionRWKV6:
    """A float64 model none of whose branches is switched off."""
    sizes = {"image_size": 12, "patch_size": 4, "width": 16, "num_layers": 2, "num_classes": 5, "head_size": 8}
    model = VisionRWKV6(VisionRWKV6Config(**(sizes | fields))).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def shifted(x: Tensor, grid: tuple[int, int], heads: int, pixels: int) -> Tensor:
    """Token by token: a quarter of each head's channels from the left, right, above and below."""
    plane = x.reshape(x.shape[0], *grid, heads, -1)
    quarter = plane.shape[-1] // 4
    moved = torch.zeros_like(plane)
    sides = [(0, -pixels), (0, pixels), (-pixels, 0), (pixels, 0)]
    for row in range(grid[0]):
        for column in range(grid[1]):
            for group, (down, right) in enumerate(sides):
                i, j = row + down, column + right
                if 0 <= i < grid[0] and 0 <= j < grid[1]:
                    here = slice(group * quarter, (group + 1) * quarter)
                    moved[:, row, column, :, here] = plane[:, i, j, :, here]
    return moved.reshape(x.shape)


@pytest.mark.parametrize("pixels", [0, 1, 2, 5])
def test_the_shift_token_by_token(pixels: int) -> None:
    config = VisionRWKV6Config(width=16, num_layers=1, head_size=8, shift_pixel=pixels)
    x = torch.randn(2, 12, 16)
    assert torch.equal(MultiheadShift(config)(x, (3, 4)), shifted(x, (3, 4), 2, pixels))


@pytest.mark.parametrize("fields", [{}, {"key_norm": True, "shift_pixel": 2}])
def test_spatial_mixing_token_by_token(fields: dict[str, Any]) -> None:
    """Back over the sequence without a bonus, then forth with it: both read before they write."""
    att = small(**fields).backbone.layers[1].att
    assert isinstance(att, SpatialMix6)
    x, grid = torch.randn(2, 6, 16, dtype=torch.float64), (2, 3)
    change = shifted(x, grid, 2, att.shift.pixels) - x
    hidden = torch.tanh((x + change * att.time_maa_x) @ att.time_maa_w1).reshape(2, 6, 5, -1)
    mixture = {
        name: x + change * (getattr(att, f"time_maa_{name}") + hidden[:, :, number] @ att.time_maa_w2[number])
        for number, name in enumerate("wkvrg")
    }
    r, k, v = att.receptance(mixture["r"]), att.key(mixture["k"]), att.value(mixture["v"])
    decay = att.time_decay + torch.tanh(mixture["w"] @ att.time_decay_w1) @ att.time_decay_w2
    r, k, v, decay = (z.reshape(2, 6, 2, 8) for z in (r, k, v, torch.exp(-torch.exp(decay))))
    y = torch.zeros_like(v)
    for order, bonus in ((range(5, -1, -1), torch.zeros(2, 8)), (range(6), att.time_faaaa)):
        state = torch.zeros(2, 2, 8, 8, dtype=torch.float64)
        for t in order:
            pair = k[:, t, :, :, None] * v[:, t, :, None, :]
            y[:, t] = y[:, t] + ((state + bonus[..., None] * pair) * r[:, t, :, :, None]).sum(2)
            state = state * decay[:, t, :, :, None] + pair
    y = y.reshape(2, 6, 16)
    if att.key_norm is not None:
        y = att.key_norm(y)
    y = F.group_norm(y.reshape(12, 16), 2, att.ln_x.weight, att.ln_x.bias, 1e-5).reshape(2, 6, 16)
    want = att.output(y * F.silu(att.gate(mixture["g"])))
    torch.testing.assert_close(att(x, grid), want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("variant", ["VRWKV6-T", "VRWKV6-S", "VRWKV6-B"])
def test_names_and_counts_are_the_official_ones(shared: Path, variant: str) -> None:
    told = json.loads((shared / "golden" / "vision" / "zoo_shapes.json").read_text())[variant]
    name = {"T": "tiny", "S": "small", "B": "base"}[variant[-1]]
    with torch.device("meta"):
        model = statewise.create(f"vrwkv6_{name}")
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == told["shapes"]
    assert sum(parameter.numel() for parameter in model.parameters()) == told["n_params"]
    config: Any = model.config
    assert (config.post_norm, config.layer_scale, config.drop_path_rate) == (
        told["config"].get("post_norm", False),
        told["config"].get("init_values"),
        told["config"].get("drop_path_rate", 0.0),
    )


def test_initialisation() -> None:
    model = VisionRWKV6(VisionRWKV6Config(width=64, num_layers=3, head_size=16, image_size=32))
    att: Any = model.backbone.layers[2].att
    channel = torch.arange(64) / 64
    even = channel ** (1 / 3)
    assert torch.allclose(att.time_maa_k.flatten(), 1 - even)
    assert torch.allclose(att.time_maa_v.flatten(), 1 - even - 0.3, atol=1e-6)
    assert torch.allclose(att.time_maa_g.flatten(), 1 - channel ** (1 / 6))
    along = torch.arange(64) / 63
    assert torch.allclose(att.time_decay.flatten(), -6 + 5 * along**2, atol=1e-5)
    zigzag = 0.1 * ((torch.arange(64) + 1) % 3 - 1)
    assert torch.allclose(att.time_faaaa.flatten(), 1 - along + zigzag, atol=1e-6)
    assert 0 < float(att.time_maa_w1.detach().abs().max()) <= 1e-4
    ffn: Any = model.backbone.layers[2].ffn
    assert torch.allclose(ffn.spatial_mix_r.flatten(), even)
    only = VisionRWKV6(VisionRWKV6Config(width=8, num_layers=1, head_size=8, image_size=32))
    assert all(bool(parameter.isfinite().all()) for parameter in only.parameters())


def test_gradients_are_those_of_differences() -> None:
    model = small(width=8, head_size=4, num_layers=1, mix_rank=2, decay_rank=2, patch_size=2, in_channels=1)
    image = torch.randn(1, 1, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, image)
    names = ["time_decay", "time_faaaa", "time_maa_w2", "time_maa_x"]
    parameters = [model.get_parameter(f"backbone.layers.0.att.{name}") for name in names]

    def of_parameters(*given: Tensor) -> Tensor:
        swapped = {f"backbone.layers.0.att.{name}": value for name, value in zip(names, given, strict=True)}
        found: Tensor = torch.func.functional_call(model, swapped, (image.detach(),))
        return found

    inputs = tuple(parameter.detach().clone().requires_grad_() for parameter in parameters)
    assert torch.autograd.gradcheck(of_parameters, inputs)


def test_it_answers_as_its_elder() -> None:
    model = small()
    images = torch.randn(2, 3, 9, 14, dtype=torch.float64)
    tokens, maps = model.forward_intermediates(images, 1, norm=True)
    assert maps[0].shape == (2, 16, 3, 4)
    assert torch.equal(maps[0].flatten(2).transpose(1, 2), tokens)
    assert torch.equal(model(images), model.forward_head(tokens))
    with pytest.raises(ValueError, match="VisionRWKV6: not causal"):
        model(images, object())
    with pytest.raises(ValueError, match="head_size is 6"):
        small(head_size=6)
    assert model(images[:0]).shape == (0, 5)
    assert bool(model(images[..., :1, :1]).isfinite().all())  # one token
    half = small().bfloat16()
    assert half(images.bfloat16()).dtype == torch.bfloat16
