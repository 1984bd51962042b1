from __future__ import annotations

from typing import Any

import pytest
import torch

import statewise
from statewise.inference.receptive_field import direction_shares, effective_receptive_field


def model_of(name: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "width": 16, "image_size": 12, "patch_size": 4, "num_classes": 3, "in_channels": 1}
    return statewise.create(name, **{**sizes, **fields})


@pytest.mark.parametrize("name", ["vrwkv", "vim"])
def test_the_field_is_the_slope_of_the_place(name: str) -> None:
    model = model_of(name).double()
    images = torch.randn(2, 1, 12, 12, dtype=torch.float64)
    field = effective_receptive_field(model, images, (0, 2))
    assert field.shape == (12, 12)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())

    model.eval()

    def known(pixels: torch.Tensor) -> torch.Tensor:
        (features,) = model.forward_intermediates(pixels, 1, intermediates_only=True)
        return features[:, :, 0, 2].sum(1)

    slopes = {}
    for row, column in ((0, 0), (1, 10), (11, 11)):
        step = torch.zeros_like(images)
        step[:, :, row, column] = 1e-5
        slopes[row, column] = ((known(images + step) - known(images - step)) / 2e-5).abs().mean().item()
    scale = field[1, 10].item() / slopes[1, 10]
    assert min(slopes.values()) > 0
    for (row, column), slope in slopes.items():
        assert field[row, column].item() == pytest.approx(slope * scale, rel=1e-4)
    assert field.max() == 1


def test_shares_are_those_of_the_operators_weights() -> None:
    model = model_of("vrwkv", num_layers=1)
    torch.nn.init.normal_(model.backbone.layers[0].att.spatial_decay, std=5.0)
    images = torch.randn(2, 1, 12, 8)
    found = direction_shares(model, images)
    assert len(found) == 1
    assert found[0].shape == (2, 3, 6)
    assert model.training
    att = model.backbone.layers[0].att
    keys = []
    handle = att.key.register_forward_hook(lambda module, inputs, output: keys.append(output.detach().double()))
    model.eval()(images)
    handle.remove()
    k, N = keys[0], 6
    log_w, u = -att.spatial_decay.detach().double() / N, att.spatial_first.detach().double() / N
    expected = torch.zeros(2, 3, N, dtype=torch.float64)
    for t in range(N):
        weights = torch.stack(
            [(u + k[:, i]).exp() if i == t else ((abs(t - i) - 1) * log_w + k[:, i]).exp() for i in range(N)], 1
        )
        weights = weights / weights.sum(1, keepdim=True)
        parts = (weights[:, :t].sum(1), weights[:, t], weights[:, t + 1 :].sum(1))
        expected[:, :, t] = torch.stack([part.mean(1) for part in parts], 1)
    assert torch.allclose(found[0].double(), expected, atol=1e-6)
    assert (found[0][:, 0, 0] == 0).all()
    assert (found[0][:, 2, -1] == 0).all()


def test_what_is_refused() -> None:
    images = torch.randn(1, 1, 12, 12)
    with pytest.raises(ValueError, match=r"place is \(3, 0\); the grid has 3 rows"):
        effective_receptive_field(model_of("vrwkv"), images, (3, 0))
    with pytest.raises(ValueError, match="has no blocks that average by bi_wkv"):
        direction_shares(model_of("vim"), images)
    with pytest.raises(ValueError, match="2 channels; this model reads 1"):
        direction_shares(model_of("vrwkv"), torch.randn(1, 2, 12, 12))
