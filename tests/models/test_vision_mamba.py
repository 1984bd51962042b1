"""Vision Mamba: the published numbers, images of every size, what timm's users ask, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import statewise
from statewise.models.mamba import MambaMixer
from statewise.models.vision.vision_mamba import VisionMamba, VisionMambaConfig

SMALL: dict[str, Any] = {
    "num_classes": 5,
    "image_size": (12, 20),
    "patch_size": 4,
    "width": 16,
    "num_layers": 3,
    "state_size": 3,
}


def small(**fields: Any) -> VisionMamba:
    return VisionMamba(VisionMambaConfig(**{**SMALL, **fields})).double().eval()


def relative(x: Tensor, y: Tensor) -> float:
    x, y = x.detach().double(), y.detach().double()
    assert torch.isfinite(x).all()
    return float((x - y).norm() / y.norm().clamp(min=1e-300))


def furthest(x: Tensor, y: Tensor) -> float:
    assert x.shape == y.shape
    return float((x.detach().double() - y.double()).abs().max())


@pytest.fixture(scope="module")
def golden(shared: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = shared / "golden/vision/vim_small"
    return json.loads(path.with_suffix(".json").read_text()), load_file(path.with_suffix(".safetensors"))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_published_numbers(
    golden: tuple[dict[str, Any], dict[str, Tensor]], dtype: torch.dtype, bound: float, checkpointing: bool
) -> None:
    told, file = golden
    model = VisionMamba(
        VisionMambaConfig(
            num_classes=told["num_classes"], image_size=(32, 40), patch_size=8, width=48, num_layers=2, state_size=8
        )
    )
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == told["shapes"]
    model.load_state_dict({name[2:]: tensor for name, tensor in file.items() if name.startswith("w/")})
    model.to(dtype).set_grad_checkpointing(checkpointing)
    added: list[Tensor] = []
    streams: list[Tensor] = []
    for layer in model.layers:
        layer.mixer.register_forward_hook(lambda module, given, got: added.append(got[0]))
        layer.norm.register_forward_pre_hook(lambda module, given: streams.append(given[0]))
    images = file["image"].to(dtype).requires_grad_()
    features = model.forward_features(images)
    for layer in range(2):
        assert furthest(added[layer], file[f"layer{layer}/hidden"]) <= 1e-5
        assert furthest(streams[layer], file[f"layer{layer}/residual"]) <= 1e-5
    logits = model.forward_head(features)
    assert furthest(model.forward_head(features, pre_logits=True), file["features"]) <= bound
    assert furthest(logits, file["logits"]) <= bound
    names = ["image", *dict(model.named_parameters())]
    loss = (logits * file["loss_weight"]).sum()
    found = torch.autograd.grad(loss, [images, *model.parameters()])
    for name, gradient in zip(names, found, strict=True):
        assert relative(gradient, file[f"grad/{name}"]) <= (1e-6 if dtype is torch.float64 else 1e-4), name


@pytest.mark.parametrize(
    ("name", "count"), [("vim_tiny", 7_148_008), ("vim_small", 25_796_584), ("vim_base", 97_598_440)]
)
def test_published_sizes(
    golden: tuple[dict[str, Any], dict[str, Tensor]], name: Literal["vim_tiny", "vim_small", "vim_base"], count: int
) -> None:
    with torch.device("meta"):
        model = statewise.create(name)
    assert isinstance(model, VisionMamba)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    layers = {re.sub(r"^layers\.\d+\.", "layers.0.", name) for name in golden[0]["shapes"]}
    assert {re.sub(r"^layers\.\d+\.", "layers.0.", name) for name in model.state_dict()} == layers


def test_long_sequences_have_overlapping_patches() -> None:
    with torch.device("meta"):
        model = VisionMamba(VisionMambaConfig(width=192, num_layers=24, stride=8))
    assert model.config.grid == (27, 27)
    assert model.pos_embed.shape == (1, 730, 192)
    assert model.feature_info[3] == {"module": "layers.3", "num_chs": 192, "reduction": 8}


@torch.no_grad()
def test_the_model_is_the_algorithm_written_out() -> None:
    """Class token after patch N//2, position by position, block by block; nothing of the model's own forward."""
    model = small(stride=(2, 4), layer_scale=0.3, divide_out=False)
    images = torch.randn(2, 3, 12, 20).double()
    patches = F.conv2d(images, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=(2, 4))
    assert patches.shape[2:] == model.config.grid == (5, 5)
    tokens = [patches[:, :, row, column] for row in range(5) for column in range(5)]
    tokens.insert(12, model.cls_token[0].expand(2, -1))
    x = torch.stack(tokens, 1) + model.pos_embed
    for layer in model.layers:
        x = x + _two_scans(layer.mixer, F.rms_norm(x, (16,), layer.norm.weight, 1e-5))
    token = F.rms_norm(x[:, 12], (16,), model.norm_f.weight, 1e-5)
    assert relative(model(images), token @ model.head.weight.T + model.head.bias) <= 1e-12


def _two_scans(mixer: MambaMixer, x: Tensor) -> Tensor:
    """A bidirectional mixer as two that look one way, each with a half of its parameters."""
    total = torch.zeros_like(x)
    for tag in ("", "_b"):
        one = MambaMixer(mixer.config).double()
        own = {"A_log": f"A{tag}_log", "D": f"D{tag}"}
        weights = mixer.state_dict()
        names = {}
        for name in one.state_dict():
            head, dot, rest = name.partition(".")
            shared = head in ("in_proj", "out_proj")
            names[name] = own.get(head, name if shared else f"{head}{tag}{dot}{rest}")
        one.load_state_dict({name: weights[theirs] for name, theirs in names.items()})
        total = total + (one(x)[0] if not tag else one(x.flip(1))[0].flip(1))
    total = total / 2 if mixer.divide_out else total
    return total if mixer.layer_scale is None else total * mixer.gamma


def test_whole_gradient() -> None:
    """Of the image and every parameter, at a size that pads the image and resizes positions, by finite differences."""
    model = small(num_layers=1, width=4, state_size=2, num_classes=2, in_channels=1)
    images = torch.randn(1, 1, 5, 9).double().requires_grad_()
    names = list(dict(model.named_parameters()))

    def call(images: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (images,))

    assert torch.autograd.gradcheck(call, (images, *model.parameters()), fast_mode=True)


@torch.no_grad()
@pytest.mark.parametrize("size", [(12, 20), (20, 12), (24, 40), (13, 21), (3, 50), (1, 1), (4, 4), (100, 1)])
def test_any_size(size: tuple[int, int]) -> None:
    model = small()
    images = torch.randn(2, 3, *size).double()
    grid = (-(-size[0] // 4), -(-size[1] // 4))
    features, maps = model.forward_intermediates(images)
    assert features.shape == (2, grid[0] * grid[1] + 1, 16)
    assert [tuple(each.shape) for each in maps] == [(2, 16, *grid)] * 3
    logits = model(images)
    # What is not there reads as zeros at the bottom and on the right.
    padded = F.pad(images, (0, grid[1] * 4 - size[1], 0, grid[0] * 4 - size[0]))
    assert torch.equal(logits, model(padded))
    assert relative(logits[1:], model(images[1:])) <= 1e-12


def test_padding_reads_every_pixel_of_overlapping_patches() -> None:
    model = small(image_size=32, patch_size=8, stride=4)
    images = torch.randn(1, 3, 33, 30).double().requires_grad_()
    (gradient,) = torch.autograd.grad(model(images).sum(), images)
    assert model.forward_intermediates(images, intermediates_only=True)[0].shape[2:] == (8, 7)
    assert (gradient != 0).all()


@torch.no_grad()
def test_positions_move_with_the_middle() -> None:
    model = small()
    patches = torch.arange(15.0).double()
    model.pos_embed.copy_(
        torch.cat([patches[:7], torch.tensor([1000.0]), patches[7:]])[None, :, None].expand(1, 16, 16)
    )
    wide = model._positions((6, 10))[0, :, 0]
    assert wide[30] == 1000
    plane = torch.cat([wide[:30], wide[31:]]).view(6, 10)
    want = F.interpolate(patches.view(1, 1, 3, 5), size=(6, 10), mode="bicubic", align_corners=False)[0, 0]
    assert relative(plane, want) <= 1e-12
    images = torch.randn(1, 3, 24, 40).double()
    before = model(images)
    model.set_input_size((24, 40))
    assert model.config.grid == (6, 10)
    assert model.pos_embed.requires_grad
    assert relative(model(images), before) <= 1e-12
    model.set_input_size(patch_size=4)
    assert model.config.image_size == (24, 40)
    with pytest.raises(ValueError, match="patches are not resized"):
        model.set_input_size(32, 8)


@torch.no_grad()
def test_maps_leave_the_class_token_out() -> None:
    model = small()
    images = torch.randn(2, 3, 12, 20).double()
    features, maps = model.forward_intermediates(images, norm=True)
    assert torch.equal(features, model.forward_features(images))
    tokens = torch.cat([features[:, :7], features[:, 8:]], 1)
    assert torch.equal(maps[-1].flatten(2).transpose(1, 2), tokens)
    flat = model.forward_intermediates(images, indices=[-1, 0], norm=True, output_fmt="NLC", intermediates_only=True)
    assert torch.equal(flat[1], tokens)
    assert torch.equal(flat[0].transpose(1, 2).reshape(2, 16, 3, 5), maps[0])
    calls: list[int] = []
    model.layers[2].register_forward_hook(lambda *_: calls.append(1))
    (raw,) = model.forward_intermediates(images, indices=[1], intermediates_only=True)
    stopped, _ = model.forward_intermediates(images, indices=[1], stop_early=True)
    assert not calls
    assert relative(stopped, model.norm_f(_stream(model, images, 2))) <= 1e-12
    assert relative(model.norm_f(raw.flatten(2).transpose(1, 2)), maps[1].flatten(2).transpose(1, 2)) <= 1e-12


def _stream(model: VisionMamba, images: Tensor, count: int) -> Tensor:
    """After ``count`` blocks, class token and all."""
    x, _ = model._embed(images)
    for layer in model.layers[:count]:
        x = layer(x)
    return x


def test_head_comes_and_goes() -> None:
    model = small(num_classes=0)
    images = torch.randn(2, 3, 12, 20).double()
    assert isinstance(model.get_classifier(), nn.Identity)
    assert torch.equal(model(images), model.forward_head(model.forward_features(images), pre_logits=True))
    model.reset_classifier(7)
    assert model.num_classes == model.config.num_classes == 7
    assert model(images).shape == (2, 7)
    assert abs(float(model.get_classifier().weight.detach().std()) - 0.02) < 5e-3
    model.reset_classifier(0, "token")
    assert model(images).shape == (2, model.num_features)
    with pytest.raises(ValueError, match="global_pool is 'max'"):
        model.reset_classifier(3, "max")
    tokens = model.forward_features(images)
    model.reset_classifier(4, "avg")
    patches = torch.cat([tokens[:, :7], tokens[:, 8:]], 1)
    assert relative(model.forward_head(tokens, pre_logits=True), patches.mean(1)) <= 1e-12
    model.reset_classifier(4, "")
    assert model(images).shape == (2, 16, 4)


def test_groups() -> None:
    model = small()
    spared = model.no_weight_decay()
    assert {"pos_embed", "cls_token", "layers.2.mixer.A_b_log", "layers.0.mixer.D"} <= spared
    assert spared <= set(model.state_dict())
    groups = model.parameter_groups(0.05)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(dict(model.named_parameters()))
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    kinds = {re.sub(r"layers\.\d", "layers.N", name) for name in decayed}
    mixers = (
        "in_proj",
        "out_proj",
        *(f"{part}{tag}" for part in ("conv1d", "x_proj", "dt_proj") for tag in ("", "_b")),
    )
    assert kinds == {"patch_embed.proj.weight", "head.weight", *(f"layers.N.mixer.{part}.weight" for part in mixers)}
    matcher = model.group_matcher()
    for name, _ in model.named_parameters():
        stages = [re.match(matcher["stem"], name), *(re.match(pattern, name) for pattern, _ in matcher["blocks"])]
        assert sum(stage is not None for stage in stages) == (0 if name.startswith("head") else 1), name


def test_drop_path_drops_whole_images() -> None:
    model = small(drop_path_rate=0.6, num_layers=2).train()
    assert [layer.drop_path_rate for layer in model.layers] == [0, 0.6]
    images = torch.randn(1, 3, 12, 20).double().expand(64, -1, -1, -1)
    outputs = model(images).detach()
    skipped = small(num_layers=1)
    skipped.load_state_dict(model.state_dict(), strict=False)
    alone = skipped(images[:1])[0]
    same = (outputs - alone).abs().amax(1) < 1e-12
    assert 0.35 < same.double().mean() < 0.85
    model.eval()
    assert not (model(images[:1])[0] - alone).abs().max() < 1e-6


@torch.no_grad()
def test_dropout_is_of_training_alone() -> None:
    model = small(drop_rate=0.5)
    images = torch.randn(1, 3, 12, 20).double()
    streams: list[Tensor] = []
    model.layers[0].register_forward_pre_hook(lambda module, given: streams.append(given[0]))
    model(images)
    model.train()(images)
    plain, dropped = streams
    assert torch.equal(dropped[dropped != 0], 2 * plain[dropped != 0])
    assert 0.3 < float((dropped == 0).double().mean()) < 0.7


@torch.no_grad()
@pytest.mark.parametrize("wide", [True, False])
def test_half_precision_keeps_the_stream(wide: bool) -> None:
    model = small(residual_in_fp32=wide)
    images = torch.randn(2, 3, 12, 20)
    want = model(images.double())
    half = model.bfloat16()
    streams: list[torch.dtype] = []
    half.norm_f.register_forward_pre_hook(lambda module, given: streams.append(given[0].dtype))
    logits = half(images.bfloat16())
    assert streams == [torch.float32 if wide else torch.bfloat16]
    assert logits.dtype == torch.bfloat16
    assert relative(logits, want) < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(model.float()(images), want) < 0.05


def test_a_compiler_sees_one_graph() -> None:
    model = small(num_layers=1)
    images = torch.randn(1, 3, 8, 24).double()
    exported = torch.export.export(model, (images,))
    assert relative(exported.module()(images), model(images)) <= 1e-12


@torch.no_grad()
def test_official_initialisation() -> None:
    model = VisionMamba(VisionMambaConfig(width=64, num_layers=4, image_size=64))
    for tensor in (model.pos_embed, model.cls_token, model.head.weight):
        assert 0.014 < float(tensor.std()) < 0.026
    kernel = model.patch_embed.proj.weight
    assert abs(float(kernel.std()) * 768**0.5 - 1) < 0.02
    assert float(kernel.abs().max()) <= 2 * 768**-0.5 / 0.8796
    assert not model.patch_embed.proj.bias.any()
    assert not model.head.bias.any()
    mixer = model.layers[1].mixer
    assert not mixer.dt_proj_b.bias.any()
    assert float(F.softplus(mixer.dt_proj.bias).max()) < 0.11
    kaiming = 128**-0.5  # of out_proj, before it is divided by √4
    assert 0.45 * kaiming < float(mixer.out_proj.weight.abs().max()) <= 0.5 * kaiming


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 12, 20), "1 channels; this model reads 3"),
        ((3, 12, 20), r"images\[None\]"),
        ((2, 3, 0, 20), "at least one is needed"),
        ((2, 3, 12), "accepted is"),
    ],
)
def test_refused_images(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small()(torch.zeros(shape).double())


def test_no_images_are_no_logits() -> None:
    assert small()(torch.zeros(0, 3, 12, 20).double()).shape == (0, 5)


def test_there_is_no_state() -> None:
    model = small()
    images = torch.zeros(1, 3, 12, 20).double()
    with pytest.raises(ValueError, match="not causal"):
        model(images, state=model)
    with pytest.raises(ValueError, match="no single step"):
        model.step(images, None)
    with pytest.raises(ValueError, match="no state to carry"):
        model.init_state(1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes": -1}, "num_classes is -1"),
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": (4, 4, 4)}, "image_size"),
        ({"patch_size": 2.0}, "patch_size is 2.0"),
        ({"stride": 8}, "larger than patch_size 4"),
        ({"in_channels": True}, "in_channels is True"),
        ({"width": 0}, "width is 0"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"drop_path_rate": 1}, "drop_path_rate is 1"),
        ({"drop_rate": -0.1}, "drop_rate is -0.1"),
        ({"global_pool": "max"}, "global_pool is 'max'"),
        ({"layer_scale": "1"}, "layer_scale is '1'"),
        ({"layer_scale": float("nan")}, "layer_scale is nan"),
        ({"divide_out": 1}, "divide_out is 1"),
    ],
)
def test_refused_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        VisionMambaConfig(**{**SMALL, **fields})


def test_configuration_survives_json() -> None:
    config = VisionMambaConfig(**SMALL, stride=(2, 4))
    assert VisionMambaConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
