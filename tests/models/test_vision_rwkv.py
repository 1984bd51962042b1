"""Vision-RWKV: the published models' numbers, names, shifts and initialisation; and what anyone can ask of it."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import statewise
from statewise.models.vision.official_kernel import official_kernel
from statewise.models.vision.vision_rwkv import Shift, VisionRWKV, VisionRWKVConfig
from statewise.ops import bi_wkv

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
    assert torch.autograd.gradcheck(lambda *live: official_kernel(*live, chunks), inputs)


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


@pytest.mark.parametrize("name", ["vrwkv_tiny", "vrwkv_small", "vrwkv_base", "vrwkv_large"])
def test_released_sizes_by_name(shared: Path, name: str) -> None:
    told = json.loads((shared / "golden" / "vision" / "zoo_shapes.json").read_text())[f"VRWKV-{name[6].upper()}"]
    assert name in statewise.list_models()
    with torch.device("meta"):
        model = statewise.create(name)
        other = statewise.create(name, num_classes=10, image_size=32, patch_size=4, in_channels=1)
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == told["shapes"]
    want = translated(told["config"])
    assert {field: getattr(model.config, field) for field in want} == want
    assert other.backbone.pos_embed.shape[1] == 64
    assert other.get_classifier().out_features == 10
    assert other.backbone.patch_embed.projection.weight.shape[1:] == (1, 4, 4)


def shifted(x: Tensor, grid: tuple[int, int], gamma: float, pixels: int) -> Tensor:
    """Token by token: a share of the channels from the left, right, above and below."""
    plane = x.reshape(x.shape[0], *grid, -1)
    channels = plane.shape[-1]
    moved = plane.clone()
    ends = [int(channels * gamma * count) for count in range(5)]
    sides = [(0, -pixels), (0, pixels), (-pixels, 0), (pixels, 0)]
    for row in range(grid[0]):
        for column in range(grid[1]):
            for group, (down, right) in enumerate(sides):
                i, j = row + down, column + right
                inside = 0 <= i < grid[0] and 0 <= j < grid[1]
                here = slice(ends[group], ends[group + 1])
                moved[:, row, column, here] = plane[:, i, j, here] if inside else 0
    return moved.reshape(x.shape)


@given(
    st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(1, 90), st.sampled_from([0, 0.1, 0.15, 0.25])
)
def test_the_shift_token_by_token(rows: int, columns: int, pixels: int, width: int, gamma: float) -> None:
    """Ends of groups are truncated one by one; a shift past the border leaves zeros."""
    config = VisionRWKVConfig(width=width, num_layers=1, shift_pixel=pixels, channel_gamma=gamma)
    x = torch.randn(2, rows * columns, width)
    assert torch.equal(Shift(config)(x, (rows, columns)), shifted(x, (rows, columns), gamma, pixels))


def test_groups_end_where_the_official_ones_do() -> None:
    assert Shift(VisionRWKVConfig(width=80, num_layers=1, channel_gamma=0.15)).ends == [12, 24, 36, 48]


def test_spatial_mixing_is_the_papers() -> None:
    att: Any = small(key_norm=True).double().backbone.layers[1].att
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    near = shifted(x, (3, 4), 0.25, 1)
    k, v, r = (
        getattr(att, module)(x * getattr(att, f"spatial_mix_{name}") + near * (1 - getattr(att, f"spatial_mix_{name}")))
        for module, name in (("key", "k"), ("value", "v"), ("receptance", "r"))
    )
    y = bi_wkv(k, v, -att.spatial_decay / 12, att.spatial_first / 12, backend="reference")
    want = att.output(torch.sigmoid(r) * att.key_norm(y))
    torch.testing.assert_close(att(x, (3, 4)), want, rtol=1e-10, atol=1e-12)


def test_without_a_shift_nothing_is_mixed() -> None:
    model = small(shift_pixel=0)
    assert not [name for name in model.state_dict() if "spatial_mix" in name]
    # neighbours are then told apart by distance alone: turning the grid over turns the tokens over
    with torch.no_grad():
        model.backbone.pos_embed.zero_()
    images = torch.randn(1, 3, 16, 16)
    patches = images.unflatten(3, (4, 4)).unflatten(2, (4, 4))  # rows, tall, columns, wide
    turned = patches.flip(2, 4).reshape(images.shape)
    torch.testing.assert_close(model.forward_features(turned), model.forward_features(images).flip(1))


def test_fancy_initialisation() -> None:
    model = VisionRWKV(VisionRWKVConfig(width=64, num_layers=3, image_size=32, layer_scale=0.1))
    block: Any = model.backbone.layers[1]
    channel = torch.arange(64)
    even = (channel / 64) ** (2 / 3)
    assert torch.allclose(block.att.spatial_decay, -5 + 8 * (channel / 63) ** (0.7 + 1.3 / 2), atol=1e-5)
    assert torch.allclose(block.att.spatial_first, math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
    assert torch.allclose(block.att.spatial_mix_k.flatten(), even)
    assert torch.allclose(block.att.spatial_mix_v.flatten(), even + 0.15)
    assert torch.allclose(block.att.spatial_mix_r.flatten(), (channel / 64) ** (1 / 3))
    assert torch.allclose(block.ffn.spatial_mix_r.flatten(), even)
    assert torch.equal(block.gamma2, torch.full((64,), 0.1))
    assert not model.backbone.pos_embed.any()
    assert abs(float(model.head.fc.weight.detach().std()) - 0.02) < 1e-3
    assert not model.head.fc.bias.any()


@pytest.mark.parametrize(("init", "first", "share"), [("local", 1.0, 1.0), ("global", 0.0, 0.5)])
def test_other_initialisations(init: str, first: float, share: float) -> None:
    att: Any = VisionRWKV(VisionRWKVConfig(width=8, num_layers=1, image_size=32, init=init)).backbone.layers[0].att
    for name, want in (("spatial_decay", first), ("spatial_first", first), ("spatial_mix_v", share)):
        assert torch.equal(getattr(att, name), torch.full_like(getattr(att, name), want))


def test_one_layer_of_one_channel_starts_finite() -> None:
    model = VisionRWKV(VisionRWKVConfig(width=1, num_layers=1, image_size=32, drop_path_rate=0.5))
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert bool(model(torch.randn(1, 3, 32, 32)).isfinite().all())


@pytest.mark.parametrize("fields", [{}, {"post_norm": True, "key_norm": True, "layer_scale": 0.5, "head_width": 3}])
def test_gradients_are_those_of_differences(fields: dict[str, Any]) -> None:
    model = small(width=6, patch_size=2, in_channels=1, num_classes=2, image_size=4, num_layers=1, **fields).double()
    image = torch.randn(1, 1, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, image)
    names = [name for name, _ in model.named_parameters() if "att.spatial" in name or "pos_embed" in name]

    def of_parameters(*swapped: Tensor) -> Tensor:
        values = dict(zip(names, swapped, strict=True))
        found: Tensor = torch.func.functional_call(model, values, (image.detach(),))
        return found

    inputs = tuple(model.get_parameter(name).detach().clone().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(of_parameters, inputs)


@pytest.mark.parametrize("size", [(16, 16), (32, 12), (1, 1), (3, 50), (17, 15)])
@pytest.mark.parametrize("chunks", [None, 32])
def test_any_size_of_image(size: tuple[int, int], chunks: int | None) -> None:
    """Padded by hand to whole patches it is the same image; one patch (T = 1) is read, too."""
    model = small(official_kernel=chunks).eval()
    images = torch.randn(2, 3, *size)
    whole = torch.zeros(2, 3, *(math.ceil(side / 4) * 4 for side in size))
    whole[..., : size[0], : size[1]] = images
    logits = model(images)
    assert logits.shape == (2, 5)
    assert bool(logits.isfinite().all())
    assert torch.equal(logits, model(whole))
    _, maps = model.forward_intermediates(images)
    assert maps[0].shape == (2, 16, whole.shape[2] // 4, whole.shape[3] // 4)
    assert torch.allclose(model(images[:1]), logits[:1], atol=1e-5)  # images do not see each other


def test_no_images_are_no_logits() -> None:
    tokens, (last,) = small().forward_intermediates(torch.randn(0, 3, 16, 16), 1)
    assert (tokens.shape, last.shape) == ((0, 16, 16), (0, 16, 4, 4))
    assert small()(torch.randn(0, 3, 16, 16)).shape == (0, 5)


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        (torch.ones(1, 4, 16, 16), "4 channels; this model reads 3"),
        (torch.ones(3, 16, 16), r"one image: images\[None\]"),
        (torch.ones(1, 3, 0, 16), "0×16 pixels"),
        (torch.ones(1, 3, 16, 16, dtype=torch.uint8), "dtype torch.uint8"),
    ],
)
def test_images_it_cannot_read(images: Tensor, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        small()(images)


def test_there_is_no_state() -> None:
    model = small()
    for asked in (
        lambda: model(torch.ones(1, 3, 4, 4), state=object()),
        lambda: model.step(torch.ones(1, 3, 4, 4), None),
        lambda: model.init_state(1),
    ):
        with pytest.raises(ValueError, match="not causal: every output needs the whole image"):
            asked()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 0),
        ("num_layers", 1.5),
        ("image_size", (4,)),
        ("patch_size", 0),
        ("num_classes", -1),
        ("channel_gamma", 0.3),
        ("shift_pixel", -1),
        ("init", "good"),
        ("official_kernel", 8),
        ("drop_path_rate", 1.0),
        ("global_pool", "max"),
        ("head_width", 0),
        ("post_norm", 1),
        ("layer_scale", "1"),
    ],
)
def test_fields_out_of_range_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"VisionRWKVConfig: {field} is"):
        small(**{field: value})


def test_timms_questions() -> None:
    model = small(head_width=7)
    assert (model.num_classes, model.num_features, model.embed_dim, model.head_hidden_size) == (5, 16, 16, 7)
    assert [info["num_chs"] for info in model.feature_info] == [16, 16]
    modules = dict(model.named_modules())
    for info in model.feature_info:
        assert info["module"] in modules
        assert info["reduction"] == 4
    images = torch.randn(2, 3, 16, 16)
    tokens = model.forward_features(images)
    hidden = model.forward_head(tokens, pre_logits=True)
    assert hidden.shape == (2, 7)
    assert torch.equal(model.get_classifier()(hidden), model(images))
    parameters = dict(model.named_parameters())
    assert model.no_weight_decay() <= set(parameters)
    matcher = model.group_matcher()
    layered = [name for name in parameters if re.match(matcher["stem"], name)]
    layered += [name for name in parameters for pattern, _ in matcher["blocks"] if re.match(pattern, name)]
    assert sorted([*layered, *(name for name in parameters if name.startswith("head."))]) == sorted(parameters)
    model.reset_classifier(3)
    assert (model.config.num_classes, model(images).shape) == (3, (2, 3))
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model.head_hidden_size == 16
    assert torch.equal(model(images), model.forward_features(images).mean(1))
    model.reset_classifier(0, global_pool="")
    assert torch.equal(model(images), model.forward_features(images))
    model.double().reset_classifier(4, global_pool="avg")
    assert model(images.double()).shape == (2, 4)


def test_intermediates() -> None:
    model = small()
    images = torch.randn(2, 3, 16, 24)
    tokens, maps = model.forward_intermediates(images)
    assert [plane.shape for plane in maps] == [(2, 16, 4, 6)] * 2
    assert torch.equal(tokens, model.forward_features(images))
    normed = model.forward_intermediates(images, 1, norm=True, output_fmt="NLC", intermediates_only=True)
    assert torch.equal(normed[0], tokens)
    early, first = model.forward_intermediates(images, [0], stop_early=True)
    assert torch.equal(first[0], maps[0])
    assert torch.equal(early, model.backbone.ln1(maps[0].flatten(2).transpose(1, 2)))
    with pytest.raises(ValueError, match="VisionRWKV: indices"):
        model.forward_intermediates(images, [2])


def test_another_size_for_good() -> None:
    model = small().eval()
    images = torch.randn(1, 3, 24, 20)
    logits = model(images)
    model.set_input_size((24, 20))
    assert model.config.image_size == (24, 20)
    assert model.backbone.pos_embed.shape == (1, 30, 16)
    assert torch.equal(model(images), logits)
    model.set_input_size(patch_size=4)
    with pytest.raises(ValueError, match="patch_size is 8"):
        model.set_input_size(32, patch_size=8)


def test_checkpointing_changes_nothing() -> None:
    model = small(drop_path_rate=0.5, drop_rate=0.1).train()
    images = torch.randn(4, 3, 16, 16)

    def gradients() -> list[Tensor]:
        torch.manual_seed(5)
        return list(torch.autograd.grad(model(images).square().sum(), list(model.parameters())))

    plain = gradients()
    model.set_grad_checkpointing()
    for one, other in zip(plain, gradients(), strict=True):
        assert torch.equal(one, other)


def test_branches_are_dropped_in_training_alone() -> None:
    model = small(drop_path_rate=0.9, num_layers=2)
    images = torch.randn(1, 3, 16, 16)
    assert len({float(model.train()(images).detach().sum()) for _ in range(20)}) > 1
    assert torch.equal(model.eval()(images), model(images))


def test_optimiser_groups() -> None:
    model = small(key_norm=True, layer_scale=1.0)
    groups = model.parameter_groups(weight_decay=0.05)
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert sorted(decay) == sorted(name for name, _ in model.named_parameters())
    for name, value in decay.items():
        plain = name.endswith(".bias") or ".ln" in name or "key_norm" in name
        assert value == (0.0 if plain else 0.05), name


@pytest.mark.parametrize("post_norm", [False, True])
def test_half_precision(post_norm: bool) -> None:
    model = small(post_norm=post_norm, width=32)
    images = torch.randn(2, 3, 32, 32)
    want = model(images)
    assert relative(copy.deepcopy(model).bfloat16()(images.bfloat16()), want) <= 0.03
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert relative(logits, want) <= 0.03
    logits.float().sum().backward()


def test_what_is_kept_for_backward_grows_with_the_number_of_pixels() -> None:
    model = small(image_size=64)

    def kept(side: int) -> int:
        sizes: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            model(torch.randn(1, 3, side, side))
        return sum(sizes.values())

    few, many = kept(128), kept(256)
    assert 3.5 * few <= many <= 4.2 * few


def test_export_and_compilation() -> None:
    model = small().eval()
    images = torch.randn(2, 3, 18, 16)
    want = model(images)
    program = torch.export.export(model, (images,))
    torch.testing.assert_close(program.module()(images), want)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), want)


def test_projections_are_called_as_modules() -> None:
    """So that what wraps them sees every call."""
    model, calls = small(head_width=3), []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(torch.randn(1, 3, 16, 16))
    modules = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert sorted(calls) == sorted(modules)
