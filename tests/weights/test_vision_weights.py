"""Files of Vision-RWKV as its authors' trainers write them: containers, configurations, other sizes and classes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import statewise
from statewise import WeightsError
from statewise.models.vision.backbone import resize_positions
from statewise.weights import read, vision

CONFIG = """
_base_ = ['../datasets.py']
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VRWKV',
        img_size=16,
        patch_size=4,
        embed_dims=8,
        depth=2,
        shift_pixel=2,
        channel_gamma=0.2,
        post_norm=True,
        init_values=0.5,
        norm=make_norm(),
        drop_path_rate=0.1),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=3))
data = dict(samples_per_gpu=128)
"""
SIZES = {
    "width": 8,
    "num_layers": 2,
    "image_size": 16,
    "patch_size": 4,
    "num_classes": 3,
    "post_norm": True,
    "layer_scale": 0.5,
    "shift_pixel": 2,
    "channel_gamma": 0.2,
}
TOLD = {name: SIZES[name] for name in ("post_norm", "shift_pixel", "channel_gamma")}


def make(family: str = "vrwkv", **fields: Any) -> Any:
    """A model with its weights moved off their start."""
    sizes = SIZES | fields
    if family == "vrwkv6":
        sizes = {name: value for name, value in sizes.items() if name != "channel_gamma"} | {"head_size": 4}
    model = statewise.create(family, **sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def image(*size: int) -> Tensor:
    return torch.randn(2, 3, *(size or (16, 16)))


def same(one: Any, other: Any, *size: int) -> None:
    pixels = image(*size)
    with torch.no_grad():
        assert torch.equal(one(pixels), other(pixels))


CONTAINERS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda state: state,
    "mmcls": lambda state: {"meta": {"epoch": 300, "config": CONFIG, "CLASSES": ["a", "b"]}, "state_dict": state},
    "internimage": lambda state: {"model": state, "epoch": 3, "max_accuracy": 75.1},
    "averaged": lambda state: {"model_ema": state, "epoch": 3},
    "in training": lambda state: {"model": state, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "lr": [0.1]}},
}


@pytest.mark.parametrize("container", sorted(CONTAINERS))
def test_official_containers(tmp_path: Path, container: str) -> None:
    model = make()
    torch.save(CONTAINERS[container](model.state_dict()), tmp_path / "model.pth")
    same(statewise.load(tmp_path / "model.pth", **TOLD).eval(), model)


def test_the_configuration_within_a_file_tells_what_tensors_do_not(tmp_path: Path) -> None:
    model = make(drop_path_rate=0.1)
    torch.save(CONTAINERS["mmcls"](model.state_dict()), tmp_path / "model.pth")
    found = statewise.load(tmp_path / "model.pth")
    assert found.config == model.config
    same(found.eval(), model)
    assert statewise.load(tmp_path / "model.pth", drop_path_rate=0.0).config.drop_path_rate == 0
    torch.save(CONTAINERS["mmcls"](make(width=12).state_dict()), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="embed_dims is 8, but the tensors have 12"):
        statewise.load(tmp_path / "other.pth")


def test_a_trainers_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, optimiser and yacs' dictionary, as the large model's trainer saves them; nothing of yacs is needed."""

    class CfgNode(dict[str, Any]):
        """As pickle sees the original: a dictionary with attributes."""

        def __init__(self, *entries: Any) -> None:
            super().__init__(*entries)
            self.__dict__["__immutable__"] = True

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module = ModuleType("yacs.config")
    module.CfgNode = CfgNode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    model = make(key_norm=True, head_width=6)
    options = {"IMG_SIZE": 16, "POST_NORM": True, "K_NORM": True, "SHIFT_PIXEL": 2, "CHANNEL_GAMMA": 0.2, "DEPTH": 2}
    whole = {
        "state_dict": {f"module.{name}": tensor for name, tensor in model.state_dict().items()},
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "max_accuracy": 1.5,
        "config": CfgNode({"MODEL": CfgNode({"TYPE": "vrwkv", "VRWKV": CfgNode(options)}), "SEED": 0}),
    }
    torch.save(whole, tmp_path / "model.pth")
    monkeypatch.undo()
    same(statewise.load(tmp_path / "model.pth").eval(), model)


def test_a_directorys_configuration_is_read(tmp_path: Path) -> None:
    model = make()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        '{"type": "VRWKV", "img_size": 16, "post_norm": true, "shift_pixel": 2, "channel_gamma": 0.2}'
    )
    same(statewise.load(tmp_path).eval(), model)
    (tmp_path / "config.json").write_text('{"model": {"backbone": {"type": "VRWKV6", "img_size": 16}}}')
    with pytest.raises(WeightsError, match="'VRWKV6', but the tensors are of a VRWKV"):
        statewise.load(tmp_path)


def test_what_nobody_tells_is_refused(tmp_path: Path) -> None:
    torch.save(make().state_dict(), tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=r"post_norm, shift_pixel and channel_gamma, .* give post_norm"):
        statewise.load(tmp_path / "model.pth")


@pytest.mark.parametrize(
    "text",
    [
        "model = dict(backbone=dict(post_norm=__import__('os').system('touch ran')))",
        "model = dict(backbone=print('ran'))",
        "other = 1",
        "model = [1]",
        "model = {**{}, 'backbone': {'post_norm': open('ran', 'w')}}",
    ],
)
def test_a_configuration_is_never_run(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert vision.parse_options(text) == {}
    assert not (tmp_path / "ran").exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", ["model = (", "x" * 200_000, "(" * 5000, "\0"])
def test_a_configuration_that_is_none(text: str, tmp_path: Path) -> None:
    torch.save({"meta": {"config": text}, "state_dict": make().state_dict()}, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=r"model\.pth: the configuration"):
        statewise.load(tmp_path / "model.pth")


@pytest.mark.parametrize("family", ["vrwkv", "vrwkv6"])
@pytest.mark.parametrize("how", ["backbone", "bare"])
def test_a_backbone_without_head(tmp_path: Path, family: str, how: str) -> None:
    model = make(family, num_classes=0)
    state = model.state_dict()
    if how == "bare":
        state = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    torch.save({"state_dict": state}, tmp_path / "model.pth")
    found = statewise.load(tmp_path / "model.pth", post_norm=True, shift_pixel=2, **_gamma(family))
    assert found.config.num_classes == 0
    same(found.eval(), model)


def _gamma(family: str) -> dict[str, float]:
    return {"channel_gamma": 0.2} if family == "vrwkv" else {}


@pytest.mark.parametrize("head_width", [None, 6])
def test_the_head_is_kept_or_dropped_or_another(tmp_path: Path, head_width: int | None) -> None:
    model = make(head_width=head_width)
    path = tmp_path / "model.pth"
    torch.save({"model": model.state_dict()}, path)
    same(statewise.load(path, num_classes=3, **TOLD).eval(), model)
    dropped = statewise.load(path, num_classes=0, **TOLD).eval()
    assert not [name for name in dropped.state_dict() if name.startswith("head")]
    pixels = image()
    with torch.no_grad():
        assert torch.equal(dropped(pixels), model.forward_features(pixels).mean(1))
    other = statewise.load(path, num_classes=7, dtype=torch.float64, **TOLD).eval()
    assert other(pixels.double()).shape == (2, 7)
    assert torch.equal(other.backbone.pos_embed, model.backbone.pos_embed.double())


def test_internimages_plain_head_is_ours(tmp_path: Path) -> None:
    model = make()
    state = {name.replace("head.fc.", "head."): tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "model.pth")
    same(statewise.load(tmp_path / "model.pth", **TOLD).eval(), model)


@pytest.mark.parametrize("size", [24, (8, 20), (13, 9)])
def test_positions_are_resized_when_asked(tmp_path: Path, size: Any) -> None:
    model = make()
    torch.save(model.state_dict(), tmp_path / "model.pth")
    found = statewise.load(tmp_path / "model.pth", image_size=size, **TOLD).eval()
    assert found.config.image_size == size
    grid = found.config.grid
    assert torch.equal(found.backbone.pos_embed, resize_positions(model.backbone.pos_embed, (4, 4), grid))
    assert found.backbone.pos_embed.shape[1] == grid[0] * grid[1]
    same(found, model, *(size if isinstance(size, tuple) else (size, size)))  # as resized at run time


def test_places_that_form_no_square_need_their_size(tmp_path: Path) -> None:
    model = make(image_size=(8, 24))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    with pytest.raises(WeightsError, match="12 places, which are no square: give the image_size"):
        statewise.load(tmp_path / "model.pth", **TOLD)
    same(statewise.load(tmp_path / "model.pth", image_size=(8, 24), **TOLD).eval(), model, 8, 24)


@pytest.mark.parametrize("family", ["vrwkv", "vrwkv6"])
@pytest.mark.parametrize("fields", [{}, {"shift_pixel": 0, "key_norm": True, "final_norm": False, "layer_scale": None}])
def test_our_own_directory_keeps_everything(tmp_path: Path, family: str, fields: dict[str, Any]) -> None:
    model = (
        make(family, image_size=(16, 24), official_kernel=16, **fields) if family == "vrwkv" else make(family, **fields)
    )
    statewise.save(model, tmp_path / "kept")
    found = statewise.load(tmp_path / "kept")
    assert found.config == model.config
    same(found.eval(), model)
    assert read(tmp_path / "kept").architecture == family
    resized = statewise.load(tmp_path / "kept", image_size=32, num_classes=4)
    assert (resized.config.image_size, resized.config.num_classes) == (32, 4)


def test_sizes_come_from_tensors(tmp_path: Path) -> None:
    for family in ("vrwkv", "vrwkv6"):
        model = make(family, key_norm=True, final_norm=False, hidden_rate=2, in_channels=1, head_width=5)
        torch.save(model.state_dict(), tmp_path / "model.pth")
        found = read(tmp_path / "model.pth", **(TOLD if family == "vrwkv" else {"post_norm": True, "shift_pixel": 2}))
        for name, value in found.fields.items():
            assert getattr(model.config, name) == value or name == "layer_scale", name


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state.pop("backbone.layers.1.ln2.weight"), r"layers\.1\.ln2\.weight is missing"),
        (lambda state: state.update(extra=torch.ones(2)), "unknown tensor extra"),
        (lambda state: state.pop("backbone.pos_embed"), r"backbone\.pos_embed is missing"),
        (lambda state: state.update({"backbone.pos_embed": torch.ones(16, 8)}), "has no three dimensions"),
        (lambda state: state.update({"head.fc.weight": torch.ones(3, 9)}), r"head\.fc\.weight has shape \(3, 9\)"),
        (lambda state: state.update({"backbone.layers.5.ln2.weight": torch.ones(8)}), "without gaps"),
        (lambda state: state.update({"backbone.layers.0.ffn.key.weight": torch.ones(9, 8)}), "no multiple"),
        (lambda state: state.pop("backbone.layers.0.ffn.key.weight"), r"ffn\.key\.weight is missing"),
    ],
)
def test_damage_is_named(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], complaint: str) -> None:
    state = make().state_dict()
    change(state)
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=complaint) as told:
        statewise.load(tmp_path / "model.pth", **TOLD)
    assert "model.pth" in str(told.value)


def test_a_directory_of_images_models_is_refused_by_commands_of_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from statewise.cli import main

    statewise.save(make(), tmp_path / "kept")
    assert main(["generate", str(tmp_path / "kept"), "--prompt", "a"]) == 2
    assert "a model of images" in capsys.readouterr().err
