"""The compiled kernels as a whole: every build of them, any number of threads, odd memory, no library at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from statewise import ops
from statewise.ops import dispatch, kernels
from statewise.testing import laws
from statewise.testing.cases import CASES, OpCase
from tests import fuzz_kernels

ROOT = Path(__file__).parents[2]
COMPILED = [case for case in CASES if ops.backends()[case.op]["native"].serves]
every_compiled_case = pytest.mark.parametrize("case", COMPILED, ids=lambda case: case.id)


def test_a_machine_with_a_compiler_has_kernels() -> None:
    """Otherwise everything in this file would pass by testing nothing."""
    sys.path.insert(0, str(ROOT / "csrc"))
    try:
        import build
    finally:
        sys.path.pop(0)
    if build.compiler() is None:
        pytest.skip("no C++ compiler here, so the package was installed without kernels")
    assert kernels.library().functions is not None, kernels.library().reason
    assert COMPILED


def test_random_small_cases() -> None:
    assert fuzz_kernels.fuzz(400, seed=77_000) == []


def test_a_wrong_kernel_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    run = fuzz_kernels.Case.run

    def off(self: fuzz_kernels.Case, backend: str, *rest: object) -> list[torch.Tensor]:
        found = run(self, backend, *rest)  # type: ignore[arg-type]
        return [x * (1 + 1e-8) for x in found] if backend == "native" and self.dtype == torch.float64 else found

    monkeypatch.setattr(fuzz_kernels.Case, "run", off)
    assert fuzz_kernels.fuzz(20, seed=77_000)


@every_compiled_case
def test_threads_do_not_change_a_bit(case: OpCase) -> None:
    inputs, state = case.inputs(3, 70, torch.float32), case.begin(3, torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(laws.run(case, inputs, state, backend="native"))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(found[0].y, other.y)
        assert all(torch.equal(a, b) for a, b in zip(found[0].state, other.state, strict=True))
        assert all(torch.equal(gradient, other.gradients[name]) for name, gradient in found[0].gradients.items())


@every_compiled_case
def test_autocast_leaves_a_kernel_alone(case: OpCase) -> None:
    inputs, state = case.inputs(2, 40, torch.float32), case.begin(2, torch.float32)
    want = laws.run(case, inputs, state, backend="native")
    with torch.autocast("cpu", torch.bfloat16):
        got = laws.run(case, inputs, state, backend="native")
    assert torch.equal(got.y, want.y)
    assert all(torch.equal(gradient, got.gradients[name]) for name, gradient in want.gradients.items())


@every_compiled_case
def test_activation_checkpointing_changes_nothing(case: OpCase) -> None:
    inputs = {name: x.requires_grad_() for name, x in case.inputs(2, 40, torch.float32).items()}
    state = case.begin(2, torch.float32)
    names = list(inputs)

    def whole(*tensors: torch.Tensor) -> torch.Tensor:
        return case.call(dict(zip(names, tensors, strict=True)), state, backend="native")[0]

    plain = torch.autograd.grad(whole(*inputs.values()).square().sum(), list(inputs.values()))
    again = torch.utils.checkpoint.checkpoint(whole, *inputs.values(), use_reentrant=False)
    for one, other in zip(torch.autograd.grad(again.square().sum(), list(inputs.values())), plain, strict=True):
        assert torch.equal(one, other)


@pytest.mark.long
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_lesser_processors_are_served(capability: str) -> None:
    """torch's own switch makes it, and so the choice of library, believe in a lesser processor."""
    if not kernels.library().level or kernels.library().level == "portable":
        pytest.skip("this processor has no lesser build")
    program = (
        "from statewise.ops import kernels; from tests.fuzz_kernels import fuzz;"
        "print(kernels.library().level); print(fuzz(200, 500))"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["portable" if capability == "default" else "avx2", "[]"]


def test_without_a_library_torch_serves_and_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = kernels.load(tmp_path)
    assert missing.functions is None
    assert "no C++17 compiler" in missing.reason
    monkeypatch.setattr(dispatch, "_NO_LIBRARY", missing.reason)
    for case in COMPILED:
        assert ops.backends()[case.op]["native"] == (False, missing.reason)
        y, _ = case.call(case.inputs(2, 20))
        want, _ = case.call(case.inputs(2, 20), backend="torch")
        assert torch.equal(y, want)
        with pytest.raises(ValueError, match="no C\\+\\+17 compiler"):
            case.call(case.inputs(2, 20), backend="native")


def test_a_broken_library_is_told(tmp_path: Path) -> None:
    for level in ("avx512", "avx2", "portable"):
        (tmp_path / f"_kernels_{level}.so").write_bytes(b"not a library")
    broken = kernels.load(tmp_path)
    assert broken.functions is None
    assert "cannot be loaded" in broken.reason


@every_compiled_case
def test_float64_parameters_beside_bfloat16_activations(case: OpCase) -> None:
    inputs = case.inputs(2, 20)
    mixed = {name: x.bfloat16() if name in case.time else x for name, x in inputs.items()}
    if len(mixed) == len(case.time):
        pytest.skip("no parameters")
    got, _ = case.call(mixed, case.begin(2), backend="native")
    want, _ = case.call({name: x.double() for name, x in mixed.items()}, case.begin(2), backend="reference")
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want.bfloat16())


def test_a_wide_step_size_beside_bfloat16_activations() -> None:
    """Mamba's dt keeps float32 under autocast; nothing else has to be widened for it."""
    case = next(case for case in CASES if case.id == "scan-full")
    drawn = case.inputs(2, 40, torch.float32)
    low = {name: x.bfloat16() if name in case.time and name != "dt" else x for name, x in drawn.items()}
    state = case.begin(2, torch.float32)
    got = laws.run(case, low, state, backend="native")
    wide = laws.run(case, {name: x.float() for name, x in low.items()}, state, backend="native")
    assert got.gradients["dt"].dtype == torch.float32
    assert torch.equal(got.y, wide.y.bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(got.state, wide.state, strict=True))


@every_compiled_case
def test_a_graph_says_what_was_kept(case: OpCase) -> None:
    """What torch.compile wrote to disk with a release that kept something else must not be taken for this one's, so the
    revision of what is kept is a constant of the graph, and another one is refused."""
    called: list[tuple[Any, tuple[Any, ...]]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "statewise" and func._schema.arguments[-1].name == "keep":
                called.append((func, args))
            return func(*args, **(kwargs or {}))

    leaves = {name: x.requires_grad_() for name, x in case.inputs(2, 20).items()}
    with Watch():
        case.call(leaves, backend="native")
    with torch.no_grad():
        for operator, (*given, keep) in called:
            assert type(keep) is int
            assert keep > 0
            operator(*given, keep)
            with pytest.raises(RuntimeError, match="another release of statewise"):
                operator(*given, keep + 1)
    assert called or case.op == "token_mix"  # which keeps nothing


def test_the_meta_device_is_not_served() -> None:
    """Kernels read addresses: only tensors that have one may reach them."""
    x = torch.empty(2, 3, 4, device="meta")
    with pytest.raises(ValueError, match="compiled kernels serve the CPU, not meta"):
        ops.token_mix(x, torch.empty(2, 4, device="meta"), backend="native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("width", [1024, 1000])
def test_large_mixtures_are_those_of_their_pieces(dtype: torch.dtype, width: int) -> None:
    """What is too much for the caches is written past them: the same bits as in pieces that are not. Rows of 1,000 do
    not start where lines of memory do."""
    mix, state = torch.rand(2, width, dtype=torch.float64), torch.randn(2, width, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(2, (48 << 20) // (4 * width * dtype.itemsize), width).to(dtype)
    lengths = torch.tensor([x.shape[1], x.shape[1] - 7])
    ys, end = ops.token_mix(x, mix.to(wide), state=state.to(wide), lengths=lengths, backend="native")
    assert sum(y.nbytes for y in ys) > 40 << 20
    carried = state.to(wide)
    for start in range(0, x.shape[1], 512):
        piece = x[:, start : start + 512]
        left = (lengths - start).clamp(0, piece.shape[1])
        parts, carried = ops.token_mix(piece, mix.to(wide), state=carried, lengths=left, backend="native")
        for y, part in zip(ys, parts, strict=True):
            for row, count in enumerate(left.tolist()):
                assert torch.equal(y[row, start : start + count], part[row, :count])
    assert torch.equal(end, carried)
