"""What all models of images share: sizes, padding, positions, stochastic depth, which blocks' features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from statewise.models.vision import backbone


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_padding_reaches_whole_patches_and_no_further(height: int, width: int, tall: int, wide: int) -> None:
    images = torch.rand(1, 2, height, width) + 1
    padded = backbone.pad_to_patches(images, (tall, wide))
    rows, columns = backbone.grid_of((height, width), (tall, wide))
    assert padded.shape == (1, 2, rows * tall, columns * wide)
    assert 0 <= padded.shape[2] - height < tall
    assert 0 <= padded.shape[3] - width < wide
    assert torch.equal(padded[..., :height, :width], images)
    assert float(padded.sum()) == pytest.approx(float(images.sum()), rel=1e-5)


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75, which torch and OpenCV take."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


@pytest.mark.parametrize(("grid", "to"), [((3, 4), (7, 5)), ((8, 8), (3, 2)), ((1, 1), (4, 4)), ((5, 2), (5, 4))])
def test_positions_are_resized_by_keys_kernel_without_smoothing(grid: tuple[int, int], to: tuple[int, int]) -> None:
    positions = torch.randn(1, grid[0] * grid[1], 3, dtype=torch.float64)
    plane = positions.reshape(*grid, 3)
    want = torch.zeros(*to, 3, dtype=torch.float64)
    for row in range(to[0]):
        for column in range(to[1]):
            y, x = (row + 0.5) * grid[0] / to[0] - 0.5, (column + 0.5) * grid[1] / to[1] - 0.5
            for i in range(int(y // 1) - 1, int(y // 1) + 3):
                for j in range(int(x // 1) - 1, int(x // 1) + 3):
                    at = plane[min(max(i, 0), grid[0] - 1), min(max(j, 0), grid[1] - 1)]
                    want[row, column] += cubic(y - i) * cubic(x - j) * at
    found = backbone.resize_positions(positions, grid, to)
    assert torch.allclose(found, want.reshape(1, -1, 3), atol=1e-12)


def test_positions_of_the_same_grid_are_the_same_and_half_ones_stay_half() -> None:
    positions = torch.randn(1, 6, 4)
    assert backbone.resize_positions(positions, (2, 3), (2, 3)) is positions
    half = positions.bfloat16()
    found = backbone.resize_positions(half, (2, 3), (4, 4))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, backbone.resize_positions(half.float(), (2, 3), (4, 4)).bfloat16())
    with pytest.raises(ValueError, match="grid of 2×2"):
        backbone.resize_positions(positions, (2, 2), (3, 3))


def test_stochastic_depth() -> None:
    x = torch.ones(4000, 2, 3)
    assert backbone.drop_path(x, 0.3, False) is x
    assert backbone.drop_path(x, 0.0, True) is x
    dropped = backbone.drop_path(x, 0.25, True)
    kept = dropped[:, 0, 0] > 0
    assert torch.equal(dropped[kept], torch.full_like(dropped[kept], 1 / 0.75))  # whole items
    assert not dropped[~kept].any()
    assert abs(float(kept.float().mean()) - 0.75) < 0.03
    assert backbone.drop_path_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert backbone.drop_path_rates(0.3, 1) == [0.0]


class Add(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor, more: int) -> Tensor:
        return x * 10 + self.number + more


class Square(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.square()


def test_blocks_in_order_and_what_is_kept() -> None:
    blocks = [Add(number) for number in (1, 2, 3)]
    x, kept = backbone.run_blocks(blocks, torch.zeros(1), 0, keep=[0, 2])
    assert x.item() == 123
    assert [y.item() for y in kept] == [1, 123]


def test_checkpointing_recomputes() -> None:
    block = Square()
    start = torch.full((1,), 3.0, requires_grad=True)
    x, _ = backbone.run_blocks([block, block], start, checkpointing=True)
    x.backward()
    assert start.grad is not None
    assert start.grad.item() == 4 * 3**3
    assert block.calls == 4
    with torch.no_grad():
        backbone.run_blocks([block], start, checkpointing=True)
    assert block.calls == 5


@pytest.mark.parametrize(
    ("indices", "want"), [(None, [0, 1, 2, 3]), (2, [2, 3]), ([0, -1], [0, 3]), ((3, 1, 1), [1, 3])]
)
def test_indices(indices: Any, want: list[int]) -> None:
    assert backbone.take_indices("Model", indices, 4) == want


@pytest.mark.parametrize("indices", [0, 5, [4], [-5], [], [1.0]])
def test_indices_that_are_none(indices: Any) -> None:
    with pytest.raises(ValueError, match="Model: indices"):
        backbone.take_indices("Model", indices, 4)


def test_maps() -> None:
    tokens = torch.randn(2, 6, 3)
    plane = backbone.as_features(tokens, (2, 3), "NCHW")
    assert plane.shape == (2, 3, 2, 3)
    assert torch.equal(plane[1, :, 1, 2], tokens[1, 5])
    assert backbone.as_features(tokens, (2, 3), "NLC") is tokens
    with pytest.raises(ValueError, match="'NCHW' and 'NLC'"):
        backbone.as_features(tokens, (2, 3), "NHWC")


@pytest.mark.parametrize("value", [0, -1, 1.0, "4", (1,), (1, 2, 3), (0, 2), None, True])
def test_sizes_that_are_none(value: Any) -> None:
    with pytest.raises(ValueError, match="image_size is"):
        backbone.pair("image_size", value)


def test_sizes() -> None:
    assert backbone.pair("image_size", 3) == (3, 3)
    assert backbone.pair("image_size", [2, 5]) == (2, 5)
