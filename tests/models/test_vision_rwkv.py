"""Vision-RWKV: the published models' numbers, names, shifts and initialisation; and what anyone can ask of it."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from statewise.models.vision.official_kernel import official_kernel
from statewise.models.vision.vision_rwkv import VisionRWKV, VisionRWKVConfig

GOLDEN = ("prenorm", "postnorm_ls", "keynorm", "oddch", "pad")
#: Official option → ours.
FIELDS = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "embed_dims": "width",
    "depth": "num_layers",
    "post_norm": "post_norm",
    "key_norm": "key_norm",
    "k_norm": "key_norm",
    "init_values": "layer_scale",
    "channel_gamma": "channel_gamma",
    "shift_pixel": "shift_pixel",
    "hidden_rate": "hidden_rate",
    "init_mode": "init",
    "final_norm": "final_norm",
    "drop_path_rate": "drop_path_rate",
    "hidden_dims": "head_width",
}


def relative(x: Tensor, y: Tensor) -> float:
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).norm() / y.norm().clamp(min=1e-300))


def largest(x: Tensor, y: Tensor) -> float:
    return float((x.detach().double() - y.double()).abs().max())


def translated(told: dict[str, Any]) -> dict[str, Any]:
    return {FIELDS[name]: value for name, value in told.items() if name in FIELDS}


def published(shared: Path, name: str, dtype: torch.dtype, **fields: Any) -> tuple[VisionRWKV, dict[str, Tensor]]:
    home = shared / "golden" / "vision"
    told = json.loads((home / f"vrwkv_small_{name}.json").read_text())
    golden = load_file(home / f"vrwkv_small_{name}.safetensors")
    sizes = translated(told["config"]) | {"num_classes": told["num_classes"]} | fields
    model = VisionRWKV(VisionRWKVConfig(**sizes)).to(dtype)
    weights = {key[2:]: value.to(dtype) for key, value in golden.items() if key.startswith("w/")}
    model.load_state_dict(weights, strict=True)
    return model, golden


def small(**fields: Any) -> VisionRWKV:
    """A model none of whose branches is switched off."""
    sizes = {"image_size": 16, "patch_size": 4, "width": 16, "num_layers": 2, "num_classes": 5} | fields
    model = VisionRWKV(VisionRWKVConfig(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize(
    ("dtype", "limit", "gradient_limit"), [(torch.float32, 1e-5, 1e-4), (torch.float64, 2e-7, 2e-7)]
)
def test_the_published_models(shared: Path, name: str, dtype: torch.dtype, limit: float, gradient_limit: float) -> None:
    """Features and gradients are stored in float32, which is what the limits for float64 allow."""
    model, golden = published(shared, name, dtype)
    told = json.loads((shared / "golden" / "vision" / f"vrwkv_small_{name}.json").read_text())
    outputs = told["config"].get("out_indices", [-1])
    image = golden["image"].to(dtype).requires_grad_()
    features, streams = model.forward_intermediates(image, output_fmt="NLC")
    for index, stream in enumerate(streams):
        assert relative(stream, golden[f"block{index}"]) <= limit, index
    tokens = model.forward_features(image)
    assert torch.equal(tokens, features)
    assert largest(model.forward_head(tokens, pre_logits=True), golden["pooled"]) <= (1e-5 if limit > 1e-6 else 1e-10)
    logits = model.forward_head(tokens)
    assert largest(logits, golden["logits"]) <= (1e-5 if limit > 1e-6 else 1e-10)
    last = model.config.num_layers - 1
    for number, index in enumerate(outputs):
        # published detectors norm the last map alone
        (found,) = model.forward_intermediates(image, [index], norm=index % (last + 1) == last, intermediates_only=True)
        assert found.shape == golden[f"out{number}"].shape
        assert relative(found, golden[f"out{number}"]) <= limit
    logits.backward(golden["loss_weight"].to(dtype))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()} | {"image": image.grad}
    wanted = {key[5:]: value for key, value in golden.items() if key.startswith("grad/")}
    assert {key.split("[")[0] for key in wanted} <= set(gradients)
    for key, want in wanted.items():
        got = gradients[key.split("[")[0]]
        assert got is not None
        assert relative(got[tuple(slice(0, size) for size in want.shape)], want) <= gradient_limit, key


@pytest.mark.parametrize("name", GOLDEN)
def test_the_official_kernels_logits(shared: Path, name: str) -> None:
    model, golden = published(shared, name, torch.float32, official_kernel=32)
    image = golden["image"]
    assert largest(model(image), golden["kernel_cls/logits"]) <= 1e-6
    assert largest(model(image), golden["logits"]) > 1e-4


@pytest.mark.parametrize(("kernel", "chunks"), [("cls", 32), ("seg", 16)])
def test_the_official_kernels_numbers(shared: Path, kernel: str, chunks: int) -> None:
    golden = load_file(shared / "golden" / "vision" / "biwkv_op.safetensors")
    cases = [key.split("/")[0] for key in golden if key.endswith(f"kernel_{kernel}_y")]
    assert len(cases) >= 11
    for name in cases:
        k, v, w, u = (golden[f"{name}/{key}"] for key in ("k", "v", "w", "u"))
        want = golden[f"{name}/kernel_{kernel}_y"].double()
        found = official_kernel(k, v.double(), -w, u, chunks)
        assert float((found - want).abs().max()) <= 1e-6 * max(1.0, float(want.abs().max())), name


def test_the_official_kernels_sum_as_it_is_documented() -> None:
    """Term by term, at a length whose last chunk is not full; and its gradient is its own."""
    rows, time, channels, chunks = 1, 37, 2, 16
    k, v = torch.randn(2, rows, time, channels, dtype=torch.float64)
    w, u = 0.1 * torch.rand(channels, dtype=torch.float64), torch.randn(channels, dtype=torch.float64)
    length = math.ceil(time / chunks)
    want = torch.empty_like(v)
    for t in range(time):
        start, weights = t // length * length, []
        for i in range(time):
            far = abs(t - i) - (1 if start <= i < t else 0)
            weight = torch.exp(u + k[:, i]) if i == t else torch.exp(k[:, i] - w * far)
            if start < i <= t:
                weight = weight + (1 - torch.exp(w)) * torch.exp(k[:, i] + w * (t - i))
            weights.append(weight)
        want[:, t] = sum(weight * v[:, i] for i, weight in enumerate(weights)) / sum(weights)
    assert torch.allclose(official_kernel(k, v, -w, u, chunks), want, rtol=1e-11, atol=1e-13)
    inputs = tuple(x.requires_grad_() for x in (k, v, -w.detach(), u))
    assert torch.autograd.gradcheck(lambda *given: official_kernel(*given, chunks), inputs)


def test_tiny_at_its_real_size(shared: Path) -> None:
    home = shared / "golden" / "vision"
    told = json.loads((home / "vrwkv_tiny_224.json").read_text())
    golden = load_file(home / "vrwkv_tiny_224.safetensors")
    spec = importlib.util.spec_from_file_location("portable_fill", home / "portable_fill.py")
    assert spec is not None
    assert spec.loader is not None
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    model = VisionRWKV(VisionRWKVConfig(width=192, num_layers=12))
    weights = fill.fill_state_dict(told["shapes"], told["seed"])
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()}, strict=True)
    pixels = next(value for value in golden.values() if value.dtype == torch.uint8)
    mean, deviation = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    pixels = pixels if pixels.shape[-1] == 3 else pixels.movedim(-3, -1)
    image = ((pixels.float() - mean) / deviation).movedim(-1, -3).reshape(1, 3, 224, 224)
    tokens, streams = model.forward_intermediates(image, [0, 5, 11], output_fmt="NLC")
    for index, stream in zip((0, 5, 11), streams, strict=True):
        assert relative(stream, golden[f"block{index}"]) <= 1e-5, index
    logits = model.forward_head(tokens)
    assert largest(logits, golden["logits"]) <= 1e-5
    logits.backward(golden["loss_weight"].float())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        norm = told["grad_norms"][f"grad/{name}"]
        assert abs(float(parameter.grad.norm()) - norm) <= 1e-4 * norm, name


@pytest.mark.parametrize("variant", ["VRWKV-T", "VRWKV-S", "VRWKV-B", "VRWKV-L"])
def test_names_and_counts_are_the_official_ones(shared: Path, variant: str) -> None:
    told = json.loads((shared / "golden" / "vision" / "zoo_shapes.json").read_text())[variant]
    sizes = {"num_layers": 12} | translated(told["config"])
    with torch.device("meta"):
        model = VisionRWKV(VisionRWKVConfig(**sizes))
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == told["shapes"]
    assert sum(parameter.numel() for parameter in model.parameters()) == told["n_params"]
