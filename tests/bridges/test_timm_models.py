"""What timm's own tests of models ask, asked of ours as they are registered there; and what timm's tools need of them.

Three of timm's tests are not here. Its scripting (TorchScript) and symbolic tracing (torch.fx) tests cannot pass: both
compile Python as it is written, and these models check their arguments' shapes and accept a `state` to refuse it.
Its tests with pretrained weights need a network.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import statewise
from statewise.bridges.timm import register
from tests.bridges.torchvision_on_cpu import need

timm = need("timm")
register()

NAMES = statewise.list_models("vision")
# One of each architecture: what the sizes differ in is asked of all.
TINY = ["vrwkv_tiny", "vrwkv6_tiny", "vim_tiny"]
SIDE = 64


def images(batch: int = 2, channels: int = 3, side: int = SIDE) -> Tensor:
    return torch.randn(batch, channels, side, side)


def small(name: str, **arguments: Any) -> Any:
    return timm.create_model(name, **{"num_layers": 4, "img_size": SIDE, **arguments}).eval()


def test_registry_lists_all_models_once() -> None:
    assert set(NAMES) <= set(timm.list_models())
    assert register() == NAMES
    assert not set(NAMES) & set(timm.list_models(pretrained=True))


@pytest.mark.parametrize("name", NAMES)
def test_every_size_is_what_statewise_creates(name: str) -> None:
    with torch.device("meta"):
        model, own = timm.create_model(name), statewise.create(name)
    assert model.config == own.config
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in own.state_dict().items()
    }
    description = model.default_cfg
    names = set(model.state_dict())
    assert {description["classifier"] + ".weight", description["first_conv"] + ".weight"} <= names
    assert model.get_parameter(description["first_conv"] + ".weight").shape[1] == description["input_size"][0]
    assert len(model.get_parameter(description["classifier"] + ".weight")) == description["num_classes"]
    assert model.num_classes == 1000
    assert model.num_features == model.embed_dim == own.config.width
    size = own.config.image_size
    assert description["input_size"] == (3, size, size)


@pytest.mark.parametrize("name", TINY)
def test_released_size_reads_its_images_with_and_without_checkpointing(name: str) -> None:
    model = timm.create_model(name).eval()
    given = images(1, side=model.default_cfg["input_size"][1])
    found = model(given)
    assert found.shape == (1, 1000)
    assert torch.isfinite(found).all()
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(given), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_backward_reaches_every_parameter(name: str, checkpointing: bool) -> None:
    model = small(name, num_classes=42).train()
    model.set_grad_checkpointing(checkpointing)
    found = model(images())
    assert found.shape == (2, 42)
    found.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize("name", NAMES)
def test_heads_and_pooling(name: str) -> None:
    model = small(name, num_layers=1)
    given = images(1)
    features = model.forward_features(given)
    assert features.shape[0::2] == (1, model.num_features)
    before = model.forward_head(features, pre_logits=True)
    assert before.shape == (1, model.head_hidden_size)
    torch.testing.assert_close(model.get_classifier()(before), model(given))
    model.reset_classifier(7)
    assert model(given).shape == (1, model.num_classes) == (1, 7)
    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(given), model.forward_head(features, pre_logits=True))
    assert model(given).shape == (1, model.head_hidden_size) == (1, model.num_features)
    assert small(name, num_layers=1, num_classes=0)(given).shape == (1, model.num_features)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(given), features)
    assert small(name, num_layers=1, num_classes=0, global_pool="")(given).shape == features.shape


@pytest.mark.parametrize("name", TINY)
def test_features_only_gives_the_maps_after_chosen_blocks(name: str) -> None:
    torch.manual_seed(0)
    whole = small(name)
    torch.manual_seed(0)
    model = small(name, features_only=True, out_indices=(0, 2))
    given = torch.randn(2, 3, 64, 96)
    expected = whole.forward_intermediates(given, [0, 2], intermediates_only=True)
    found = model(given)
    assert [y.shape for y in found] == [(2, channels, 4, 6) for channels in model.feature_info.channels()]
    assert model.feature_info.reduction() == [16, 16]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    # nothing is left in it that no map needs, or training on several machines would wait for its gradients
    sum(y.square().mean() for y in found).backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", TINY)
def test_features_only_defaults_negative_indices_and_norm(name: str) -> None:
    given = images(1)
    assert len(small(name, features_only=True)(given)) == 3
    torch.manual_seed(0)
    whole = small(name)
    torch.manual_seed(0)
    model = small(name, features_only=True, out_indices=(-3, -1), feature_cls="getter")
    torch.testing.assert_close(model(given), whole.forward_intermediates(given, [1, 3], intermediates_only=True))
    from statewise.bridges.timm import _features

    normed = _features(whole, [1, 3], norm=True)
    assert whole.config.num_layers == 4
    torch.testing.assert_close(normed(given)[1], whole.forward_intermediates(given, norm=True)[1][3])


@pytest.mark.parametrize("name", TINY)
def test_intermediates(name: str) -> None:
    model = small(name)
    given = images(1)
    info = timm.models.FeatureInfo(model.feature_info, len(model.feature_info))
    out, maps = model.forward_intermediates(given, output_fmt="NCHW")
    assert len(maps) == len(info.channels()) == 4
    for y, channels, reduction in zip(maps, info.channels(), info.reduction(), strict=True):
        assert y.shape == (1, channels, SIDE // reduction, SIDE // reduction)
    torch.testing.assert_close(out, model.forward_features(given), rtol=0, atol=0)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.forward_intermediates(given)[0], out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_other_channels_sizes_and_patches(name: str) -> None:
    model = small(name, in_chans=5, img_size=(48, 32), patch_size=8, num_classes=3, drop_path_rate=0.2)
    assert model(torch.randn(2, 5, 48, 32)).shape == (2, 3)
    model.set_input_size(img_size=(40, 56))
    assert model(torch.randn(2, 5, 40, 56)).shape == (2, 3)
    assert model.config.image_size == (40, 56)
    with pytest.raises(ValueError, match="has no field 'num_heads'"):
        small(name, num_heads=3)


@pytest.mark.parametrize("name", TINY)
def test_rates_of_learning_fall_layer_by_layer(name: str) -> None:
    model = small(name, num_classes=3)
    from timm.optim import create_optimizer_v2, param_groups_layer_decay

    groups = param_groups_layer_decay(
        model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5
    )
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    found = {key: scale[id(parameter)] for key, parameter in model.named_parameters()}
    # stem, four blocks, head: each half of the next; the last norm is the head's
    layers = sorted({value for key, value in found.items() if ".layers." in f".{key}"})
    assert layers == [0.5**n for n in (4, 3, 2, 1)]
    assert {value for key, value in found.items() if "patch_embed" in key or "pos_embed" in key} == {0.5**5}
    assert {value for key, value in found.items() if key.startswith("head")} == {1.0}
    for key in model.no_weight_decay():
        assert decay[id(model.get_parameter(key))] == 0
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    model.train()(images()).square().mean().backward()
    before = model.get_classifier().weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.get_classifier().weight)


@pytest.mark.parametrize("name", [*TINY, "vrwkv_large"])
def test_official_file_is_read_by_path(name: str, tmp_path: Path) -> None:
    sizes = {"num_layers": 2}
    source = timm.create_model(name, img_size=64, **sizes).eval()
    torch.save({"state_dict": source.state_dict(), "epoch": 3}, tmp_path / "a.pth")
    overlay = {"file": str(tmp_path / "a.pth")}

    def read(**arguments: Any) -> Any:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **sizes, **arguments).eval()

    given = images(1)
    expected = source(given)
    torch.testing.assert_close(read(img_size=64)(given), expected, rtol=0, atol=0)
    # positions are resized as images of another size have them resized
    wide = torch.randn(1, 3, 96, 64)
    torch.testing.assert_close(read(img_size=(96, 64))(wide), source(wide), rtol=0, atol=1e-5)
    fresh = read(img_size=64, num_classes=3)
    assert fresh(given).shape == (1, 3)
    torch.testing.assert_close(fresh.forward_features(given), source.forward_features(given), rtol=0, atol=0)
    # three equal channels are worth one of their sum, which is timm's rule
    one = images(1, 1)
    torch.testing.assert_close(
        read(img_size=64, in_chans=1)(one), source(one.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4
    )
    maps = read(img_size=64, features_only=True, out_indices=(1,))(given)
    torch.testing.assert_close(maps, source.forward_intermediates(given, [1], intermediates_only=True))


def test_pretrained_without_a_file_is_refused() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("vrwkv_tiny", pretrained=True)


@pytest.mark.parametrize("name", TINY)
def test_checkpoint_and_configuration_saved_by_timm_come_back(name: str, tmp_path: Path) -> None:
    model = small(name, num_classes=5)
    given = images(1)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    again = small(name, num_classes=5, checkpoint_path=str(tmp_path / "model.pth"))
    torch.testing.assert_close(again(given), model(given), rtol=0, atol=0)
    timm.models.save_for_hf(model, tmp_path / "saved", model_args={"num_layers": 4, "img_size": SIDE})
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    torch.testing.assert_close(again(given), model(given), rtol=0, atol=0)


@pytest.mark.parametrize("name", TINY)
def test_models_are_copied_pickled_and_averaged(name: str) -> None:
    model = small(name, num_layers=2, num_classes=3)
    given = images(1)
    expected = model(given)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), timm.utils.ModelEmaV3(model).module):
        torch.testing.assert_close(again(given), expected, rtol=0, atol=0)


def test_data_configuration_and_transform() -> None:
    import numpy as np
    from PIL import Image

    model = small("vrwkv_tiny", num_layers=1, img_size=224)
    config = timm.data.resolve_data_config(model=model)
    assert config["input_size"] == (3, 224, 224)
    assert config["interpolation"] == "bicubic"
    pixels = timm.data.create_transform(**config)(Image.fromarray(np.full((300, 400, 3), 255, np.uint8)))
    assert pixels.shape == (3, 224, 224)
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor([2.2489, 2.4286, 2.6400]), rtol=0, atol=1e-3)
    assert model(pixels[None]).shape == (1, 1000)


@pytest.mark.parametrize("name", TINY)
def test_transformers_backbone(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: `statewise[hf]`")
    torch.manual_seed(0)
    whole = timm.create_model(name)
    torch.manual_seed(0)
    config = transformers.TimmBackboneConfig(backbone=name, num_channels=3, out_indices=[2, 5])
    model = transformers.TimmBackbone(config).eval()
    given = images(1)
    found = model(given).feature_maps
    assert model.channels == [192, 192]
    torch.testing.assert_close(
        list(found), whole.eval().forward_intermediates(given, [2, 5], intermediates_only=True), rtol=0, atol=0
    )
