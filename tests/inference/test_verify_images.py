"""The laws of models of images: sound models pass, and each kind of fault is found by its law."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import statewise
from statewise.inference import stir, verify_images

SIZES: dict[str, Any] = {"image_size": 16, "patch_size": 4, "width": 16, "num_layers": 2, "num_classes": 3}


def model(name: str = "vrwkv", dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    made: Any = statewise.create(name, **SIZES).to(dtype)
    stir(made)
    return made


def failing(subject: Any) -> list[str]:
    return [result.law for result in verify_images(subject) if not result.ok]


@pytest.mark.parametrize("name", ["vrwkv", "vim"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sound_models_pass_and_are_left_as_they_are(name: str, dtype: torch.dtype) -> None:
    subject = model(name, dtype).train()
    before = {key: value.clone() for key, value in subject.state_dict().items()}
    assert failing(subject) == []
    assert subject.training
    assert all(torch.equal(value, before[key]) for key, value in subject.state_dict().items())
    assert all(parameter.grad is None for parameter in subject.parameters())


def test_rows_that_see_each_other_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = model()
    sound = type(subject).forward_features
    monkeypatch.setattr(type(subject), "forward_features", lambda self, x: sound(self, x) + x.mean())
    assert "rows of a batch = alone" in failing(subject)


def test_a_kernel_that_is_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = importlib.import_module("statewise.ops.bi_wkv.reference")
    sound = reference.bi_wkv

    def off(k: Tensor, v: Tensor, log_w: Tensor, u: Tensor) -> Tensor:
        return sound(k, v, log_w + 1e-6, u)

    subject = model()
    monkeypatch.setattr(reference, "bi_wkv", off)
    found = failing(subject)
    assert "fast kernels = reference" in found
    assert "gradients by fast kernels = reference" in found


def test_a_model_that_writes_into_images_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = model()
    sound = type(subject).forward_features

    def careless(self: Any, images: Tensor) -> Tensor:
        if not images.requires_grad:
            images.mul_(1.001)
        return sound(self, images)

    monkeypatch.setattr(type(subject), "forward_features", careless)
    assert "images and weights untouched" in failing(subject)


def test_what_cannot_be_verified_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        verify_images(model(), batch_size=1)
    with pytest.raises(ValueError, match="dtype"):
        verify_images(model().to(torch.float8_e4m3fn))
