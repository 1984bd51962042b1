"""The Triton kernels' ground: where they run, how they are launched, where sequences lie, and which shape they take.

Legend: B rows, T time, L tokens of a chunk, n sequences. Nothing here imports triton before a kernel is launched.

Kernels run on CUDA devices. On a CPU they run in Triton's interpreter, where the environment asks for it
(``TRITON_INTERPRET=1``) before the first launch: slow, and right, so that every law is checked without a GPU.

A *slot* is a chunk of some sequence. Sequence i of a padded batch owns slots i·⌈T/L⌉ onwards; sequence i of a packed
row owns slots ⌊start_i/L⌋ + i onwards, which never overlap, so that nothing about lengths has to be known on the host.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from statewise.files import atomic_write

__all__ = [
    "WHERE",
    "WHOLE",
    "Launch",
    "Where",
    "asked_precise",
    "capture",
    "dot_precision",
    "interpreting",
    "launch",
    "new",
    "place",
    "precise",
    "segment",
    "serves",
    "slot_count",
    "tune",
]

#: How an operator says where sequences lie: declarations for register_pair.
WHERE = ("Tensor? lengths", "Tensor? cu_seqlens")

# Asked once, here, and not where an operator is called: torch.compile could not trace that.
_FOUND = importlib.util.find_spec("triton") is not None


class Launch(NamedTuple):
    """One launch of a kernel that was noted and not run: see :func:`capture`."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


_noted: list[Launch] | None = None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def serves(device: torch.device) -> str:
    """Why Triton kernels do not run on ``device``; empty if they do."""
    if not _FOUND:
        return "triton is not installed; it comes with torch's CUDA builds (or: pip install triton)"
    if device.type == "cuda" or _noted is not None or (device.type == "cpu" and interpreting()):
        return ""
    return f"Triton kernels serve CUDA devices, not {device.type} (but in Triton's interpreter, TRITON_INTERPRET=1)"


@contextmanager
def capture() -> Iterator[list[Launch]]:
    """Note what would be launched instead of launching it, on any device, ``meta`` included.

    This is how kernels are compiled ahead of time for a GPU that is not there, and how the bytes they move are counted.
    What operators return inside is unset memory. Not for use from several threads at once.
    """
    global _noted
    before, _noted = _noted, []
    try:
        yield _noted
    finally:
        _noted = before


def launch(
    kernel: Any, grid: Sequence[int], *arguments: Any, warps: int = 4, stages: int = 2, **constants: Any
) -> None:
    """Run ``kernel[grid](*arguments, **constants)`` on the device of its first tensor; nothing for an empty grid.

    Args:
        kernel: decorated with ``triton.jit``.
        grid: programs along up to three axes. Only the first may grow with T: the others end at 65,535.
        arguments: tensors, ``None`` and numbers, in the kernel's order.
        warps, stages: of 32 threads a program; buffers of pipelined loops.
        constants: its compile-time arguments.
    """
    if _noted is not None:
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        _noted.append(Launch(kernel, tuple(grid), given, {"num_warps": warps, "num_stages": stages}))
        return
    if 0 in grid:
        return
    # Fused multiply-adds, whatever release of triton this is: the default changes.
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[tuple(grid)](*arguments, **constants, **options)
    else:
        _mend_interpreter()
        kernel[tuple(grid)](*arguments, **constants)


@functools.cache
def _mend_interpreter() -> None:
    """Make Triton's interpreter round float32 to the nearest bfloat16, as GPUs do: it cuts bits off."""
    from triton.runtime import interpreter

    theirs = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source.name == "fp32" and target.name == "bf16":
            return torch.tensor(data.view("float32")).bfloat16().view(torch.uint16).numpy()
        return theirs(data, source, target, mode)

    interpreter._convert_float = convert


class Where(NamedTuple):
    """Where sequences lie among the tokens of ``(B, T, ...)`` tensors, for the device functions that look it up.

    Attributes:
        rows: n.
        slots: chunks there are room for; some may be empty in a ragged batch.
        time: T.
        lengths: ``(B,)`` or ``None``.
        cu_seqlens: ``(n + 1,)`` or ``None``.
        row_of: ``(slots,)`` int32, whose chunk a slot is, in a packed row; otherwise ``None``.
        ragged: 0 dense, 1 padded, 2 packed. A compile-time argument of every kernel.
    """

    rows: int
    slots: int
    time: int
    lengths: Tensor | None
    cu_seqlens: Tensor | None
    row_of: Tensor | None
    ragged: int

    @property
    def arguments(self) -> tuple[int, Tensor | None, Tensor | None, Tensor | None]:
        """What ``locate_slot`` of :mod:`statewise.ops.triton_parts` wants to know, in its order."""
        return self.time, self.lengths, self.cu_seqlens, self.row_of


def slot_count(batch: int, time: int, cu_seqlens: Tensor | None, chunk: int) -> int:
    """Chunks there must be room for."""
    return batch * -(-time // chunk) if cu_seqlens is None else time // chunk + cu_seqlens.shape[0] - 1


def place(model: Tensor, where: Sequence[Tensor | None], chunk: int) -> Where:
    """Where the sequences of ``model`` ``(B, T, ...)`` lie, in chunks of ``chunk`` tokens; ``where`` is lengths and
    cu_seqlens. Reads nothing back from the device."""
    lengths, cu_seqlens = where
    batch, time = model.shape[:2]
    slots = slot_count(batch, time, cu_seqlens, chunk)
    if cu_seqlens is None:
        return Where(batch, slots, time, lengths, None, None, 0 if lengths is None else 1)
    rows = cu_seqlens.shape[0] - 1
    first = cu_seqlens[:-1] // chunk + torch.arange(rows, device=model.device)
    every = torch.arange(slots, device=model.device)
    row_of = (torch.searchsorted(first, every.to(first.dtype), right=True) - 1).to(torch.int32)
    return Where(rows, slots, time, None, cu_seqlens, row_of, 2)


#: Longer than any sequence that is not cut into segments, and than any segment of one that is.
WHOLE = 1 << 20


def segment(time: int, wanted: int, least: int, step: int) -> int:
    """Tokens of a sequence of up to ``time`` that a program walks one after another: :data:`WHOLE`, or about
    ``wanted``, a multiple of ``step`` and at least ``least``."""
    if max(wanted, least) >= time and time < WHOLE:
        return WHOLE
    return max(least, min(wanted, WHOLE // 2) // step * step)


def new(like: Tensor, where: Sequence[Tensor | None], shape: Sequence[int] | None = None) -> Tensor:
    """Room for a tensor with a time axis that kernels write wherever there is a token: zeros if there is padding."""
    shape = like.shape if shape is None else shape
    make = torch.empty if where[0] is None else torch.zeros
    return make(shape, dtype=like.dtype, device=like.device)


_precise = False


@contextmanager
def precise(wanted: bool = True) -> Iterator[None]:
    """Matrix products of bfloat16 and float16 inputs in TF32 instead: slower, and a few times closer to float64.

    Counts for operators called inside, their backward included.
    """
    global _precise
    before, _precise = _precise, wanted
    try:
        yield
    finally:
        _precise = before


def asked_precise() -> bool:
    """Whether :func:`precise` holds. Asked where an operator is called, so that its backward, later, does the same."""
    return _precise


def dot_precision(dtype: torch.dtype, wants_precise: bool = False) -> str:
    """How the device function ``dot`` multiplies matrices for activations of ``dtype``: a compile-time argument.

    ``"ieee"`` in the operands' own dtype (float64 for float64 inputs), ``"tf32x3"`` (three TF32 products: as good as
    float32), ``"tf32"``, ``"bf16"``. Half activations are multiplied as bfloat16: float16 has too small a range for
    what decays. The interpreter multiplies in float32, operands rounded as the real thing would.
    """
    if dtype == torch.float64:
        return "ieee"
    if dtype == torch.float32:
        return "ieee" if interpreting() else "tf32x3"
    name = "tf32" if wants_precise else "bf16"
    return f"{name}-emulated" if interpreting() else name


_chosen: dict[str, int] = {}


def _cache_file(device: torch.device) -> Path:
    import triton

    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "statewise"
    name = "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name(device))
    return base / f"triton-{triton.__version__}-{name}.json"


def tune(key: str, device: torch.device, choices: Sequence[Any], run: Callable[[Any], None]) -> Any:
    """The fastest of a few configurations for a class of shapes, found once and remembered on disk.

    Choices must give the same bits (warps, stages, tiles over independent axes): nothing that changes the order of a
    sum is chosen by the clock. Off a GPU, and while a CUDA graph is captured, it is the first one.

    Args:
        key: operator, dtype and sizes, but never T or B.
        device: where ``run`` launches.
        choices: short and fixed, the best guess first.
        run: launch with a choice; called several times with each.
    """
    if device.type != "cuda" or _noted is not None or len(choices) == 1:
        return choices[0]
    index = _chosen.get(f"{device} {key}")
    if index is not None and index < len(choices):
        return choices[index]
    if torch.cuda.is_current_stream_capturing():
        return choices[0]
    path = _cache_file(device)
    known = _read(path)
    index = known.get(key, -1)
    if not 0 <= index < len(choices):
        import triton

        times = [triton.testing.do_bench(lambda c=c: run(c), warmup=5, rep=20, return_mode="median") for c in choices]
        index = times.index(min(times))
        _write(path, _read(path) | {key: index})
    _chosen[f"{device} {key}"] = index
    return choices[index]


def _read(path: Path) -> dict[str, int]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in content.items() if isinstance(v, int)} if isinstance(content, dict) else {}


def _write(path: Path, content: dict[str, int]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(content, indent=1, sort_keys=True) + "\n")
    except OSError:
        return  # a cache that cannot be written is only slower
