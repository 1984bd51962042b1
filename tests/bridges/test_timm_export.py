"""Models of images as programs of torch's own operators, and as ONNX files: the same outputs without this package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import statewise
from statewise.bridges.onnx import _written_out, export, plain_program
from statewise.ops import bi_wkv, selective_scan, wkv6

SIZES = {"num_layers": 1, "image_size": 24, "patch_size": 8, "num_classes": 5}
TINY = ["vrwkv_tiny", "vrwkv6_tiny", "vim_tiny"]
# Sums of a few hundred float32 numbers in another order, on outputs of deviation 1.
LIMIT = 1e-5


def model_of(name: str, **fields: Any) -> Any:
    model = statewise.create(name, **{**SIZES, **fields})
    with torch.no_grad():
        for parameter in model.parameters():  # away from initial values, many of which are zero
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def targets(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target).partition(".")[0] for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("name", TINY)
def test_plain_program_is_the_model(name: str) -> None:
    model = model_of(name, num_layers=2, drop_path_rate=0.3).train()
    images = torch.randn(2, 3, 40, 24)  # positions resized within the program
    program = plain_program(model, images)
    assert targets(program) <= {"aten", "<built-in function getitem>"}
    assert model.training
    images = torch.randn(2, 3, 40, 24)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), model(images), rtol=0, atol=LIMIT)


def test_any_batch() -> None:
    model = model_of("vrwkv_tiny").eval()
    program = plain_program(model, torch.randn(2, 3, 24, 24), any_batch=True)
    for batch in (1, 3):
        images = torch.randn(batch, 3, 24, 24)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(images), model(images), rtol=0, atol=LIMIT)
    with pytest.raises(ValueError, match="any_batch needs two or more"):
        plain_program(model, torch.randn(1, 3, 24, 24), any_batch=True)


class _Call(nn.Module):
    def __init__(self, function: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.options = function, options

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors, **self.options)


def _decay(*shape: int) -> Tensor:
    return -torch.rand(*shape, dtype=torch.float64).exp().square()


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("tokens", [1, 2, 7, 37])
@pytest.mark.parametrize("op", ["bi_wkv", "wkv6", "selective_scan"])
def test_operators_written_out_in_float64(op: str, tokens: int, backend: str) -> None:
    if not statewise.backends()[op][backend].serves:
        pytest.skip(statewise.backends()[op][backend].reason)
    B, N = 2, tokens
    given: tuple[Tensor, ...]
    if op == "bi_wkv":
        function: Any = bi_wkv
        # keys far apart and weights that grow with distance: nothing but differences may be exponentiated
        given = (200 * _normal(B, N, 6), _normal(B, N, 6), 30 * _normal(6), _normal(6))
    elif op == "wkv6":
        function = lambda *x, **options: wkv6(*x[:5], state=x[5], **options)  # noqa: E731
        log_w = torch.where(_normal(B, N, 2, 4) > 1, -1e4, _decay(B, N, 2, 4))
        given = (_normal(B, N, 2, 4), log_w, _normal(B, N, 2, 4), _normal(B, N, 2, 3), _normal(2, 4))
        given = (*given, _normal(B, 2, 4, 3))
    else:
        function = lambda *x, **options: selective_scan(*x[:7], state=x[7], **options, dt_softplus=True)  # noqa: E731
        given = (_normal(B, N, 6), 3 * _normal(B, N, 6), _decay(6, 4), _normal(B, N, 3, 4), _normal(B, N, 3, 4))
        given = (*given, _normal(6), _normal(B, N, 6), _normal(B, 6, 4))
    expected = function(*given, backend="reference")
    call = _Call(function, {"backend": backend})
    with torch.no_grad():
        program = torch.export.export(call, given)
        assert "statewise" in targets(program)
        plain = program.run_decompositions(dict(_written_out()))
        assert "statewise" not in targets(plain)
        torch.testing.assert_close(plain.module()(*given), expected, rtol=1e-10, atol=1e-12)


def _run(path: Path, images: Tensor) -> Tensor:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = runtime.InferenceSession(str(path))
    return torch.from_numpy(session.run(["output"], {"images": images.numpy()})[0])


@pytest.mark.parametrize("name", TINY)
def test_onnx_file_gives_the_same_outputs(name: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    model = model_of(name).eval()
    export(model, torch.randn(1, 3, 24, 24), tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    import onnx

    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"))
    images = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(_run(tmp_path / "model.onnx", images), model(images), rtol=0, atol=LIMIT)


def test_onnx_file_for_any_batch(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    model = model_of("vrwkv_tiny", image_size=8, patch_size=4).eval()
    export(model, torch.randn(2, 3, 8, 8), tmp_path / "model.onnx", any_batch=True)
    for batch in (1, 5):
        images = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(_run(tmp_path / "model.onnx", images), model(images), rtol=0, atol=LIMIT)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'statewise\[onnx\]'"):
        export(model_of("vim_tiny"), torch.randn(1, 3, 24, 24), tmp_path / "model.onnx")


def test_registry_without_timm_or_with_another_torchs_torchvision_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import statewise.bridges.timm as bridge

    def stop(name: str) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist")

    with monkeypatch.context() as without:
        without.setitem(sys.modules, "timm", None)
        without.setitem(sys.modules, "timm.models", None)
        with pytest.raises(ImportError, match=r"pip install 'statewise\[timm\]'"):
            bridge.register()
    monkeypatch.setattr(bridge.importlib, "import_module", stop)
    with pytest.raises(ImportError, match="built for this torch: operator torchvision::nms"):
        bridge.register()
