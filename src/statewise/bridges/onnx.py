"""Our models of images as ONNX files, and as programs of torch's own operators alone.

A model exported by ``torch.export`` holds nodes of this package's operators, which nothing but this package can run.
Here they are written out: every recurrence S_t = decay_t · S_{t-1} + added_t becomes log2 N steps, each of which
doubles how many tokens a place has seen,

    added_t ← added_t + decay_t · added_{t-n}      decay_t ← decay_t · decay_{t-n}      n = 1, 2, 4, ...

That is N log N work in a graph of a hundred or two nodes a layer, and the memory of all N states at once. Within this
package its own operators are the better way.

Legend: B images, N tokens of one, C channels, H heads, K key rows, V value columns, S state size, W conv width.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from statewise.files import atomic_write
from statewise.ops.bi_wkv.parallel import nothing

if TYPE_CHECKING:
    from statewise.models import VisionModel

__all__ = ["export", "plain_program"]


def plain_program(model: VisionModel, images: Tensor, *, any_batch: bool = False) -> torch.export.ExportedProgram:
    """The model as a program of torch's own operators, which runs without this package.

    Args:
        model: one of ``statewise.list_models("vision")``; what it computes in ``eval`` mode is exported. Its own mode
            stays what it is.
        images: an example ``(B, C, height, width)``; the program is for images of its size and dtype.
        any_batch: whether the program takes any number of images from 1 on, or B only. To export takes a few times
            longer then.

    Raises:
        ValueError: images that the model does not read, or any_batch with fewer than two of them.
    """
    if any_batch and images.shape[0] < 2:
        raise ValueError(f"images: the example has {images.shape[0]}; any_batch needs two or more, to tell B from 1")
    batch = {0: torch.export.Dim("batch", min=1)} if any_batch else None
    training = model.training
    try:
        with torch.no_grad():
            program = torch.export.export(model.eval(), (images,), dynamic_shapes=(batch,))
            plain: torch.export.ExportedProgram = program.run_decompositions(dict(_written_out()))
    finally:
        model.train(training)
    return plain


def export(model: VisionModel, images: Tensor, path: str | os.PathLike[str], *, any_batch: bool = False) -> None:
    """Write the model as an ONNX file: input ``images`` ``(batch, C, height, width)``, output ``output``.

    Args:
        model, images, any_batch: as :func:`plain_program` takes them.
        path: a file, which appears whole or not at all. Weights are inside it.

    Raises:
        ValueError: see :func:`plain_program`.
        ImportError: onnx or onnxscript is not installed.
    """
    try:
        importlib.import_module("onnxscript")
        importlib.import_module("onnx")
    except ImportError as error:
        raise ImportError(f"needs the packages onnx and onnxscript ({error}): pip install 'statewise[onnx]'") from error
    program = plain_program(model, images, any_batch=any_batch)
    # Runtimes simplify what they load; the exporter's own pass takes minutes at real sizes and gains nothing on top.
    written = torch.onnx.export(
        program, (), input_names=["images"], output_names=["output"], verbose=False, optimize=False
    )
    assert written is not None
    atomic_write(path, written.model_proto.SerializeToString())


def _written_out() -> Iterator[tuple[Any, Callable[..., Any]]]:
    """Operators that models of images call, by either of their fast forms → the same of torch's own."""
    ours = torch.ops.statewise
    yield ours.bi_wkv_native.default, _bi_wkv_rows
    yield ours.bi_wkv.default, _bi_wkv
    yield ours.wkv6_native.default, _wkv6_rows
    yield ours.wkv6.default, _wkv6
    yield ours.selective_scan_native.default, _scan_rows
    yield ours.selective_scan_softplus_native.default, _softplus_scan_rows
    yield ours.selective_scan.default, _scan
    yield ours.causal_conv1d_native.default, _conv_rows
    yield ours.causal_conv1d_silu_native.default, _silu_conv_rows


def _later(x: Tensor, steps: int, fill: float = 0.0) -> Tensor:
    """``(B, N, ...)`` moved to later tokens; ``fill`` comes in."""
    return F.pad(x[:, :-steps], (0, 0) * (x.dim() - 2) + (steps, 0), value=fill)


def _doublings(tokens: int) -> Iterator[int]:
    steps = 1
    while steps < tokens:
        yield steps
        steps *= 2


def _states(decay: Tensor, added: Tensor, begin: Tensor) -> Tensor:
    """S_t = decay_t · S_{t-1} + added_t for all t: ``(B, N, ...)``, decay broadcasts; begin ``(B, ...)``."""
    for steps in _doublings(added.shape[1]):
        added = added + decay * _later(added, steps)
        decay = decay * _later(decay, steps, 1.0)
    return added + decay * begin[:, None]


def _rows(x: Tensor, spans: Tensor) -> Tensor:
    """``(B·N, ...)`` → ``(B, N, ...)``: models of images have neither padding nor packing."""
    batch = spans.shape[0]
    return x.reshape(batch, x.shape[0] // batch, *x.shape[1:])


def _before(k: Tensor, v: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the tokens before each, as (num, den, top), meaning num·e^top and den·e^top."""
    low = nothing(k.dtype)
    num, den, top = v, torch.ones_like(k), k
    for steps in _doublings(k.shape[1]):
        faded = _later(top, steps, low) + steps * log_w
        most = torch.maximum(top, faded)
        now, old = torch.exp(top - most), torch.exp(faded - most)
        num, den, top = now * num + old * _later(num, steps), now * den + old * _later(den, steps), most
    return _later(num, 1), _later(den, 1), _later(top, 1, low)


def _bi_wkv(k: Tensor, v: Tensor, log_w: Tensor, u: Tensor) -> Tensor:
    """:func:`statewise.ops.bi_wkv` of ``(B, N, C)``, every sum with its largest exponent taken out."""
    dtype = log_w.dtype
    k, v_ = k.to(dtype), v.to(dtype)
    left = _before(k, v_, log_w)
    right = tuple(x.flip(1) for x in _before(k.flip(1), v_.flip(1), log_w))
    bonus = k + u
    top = torch.maximum(torch.maximum(left[2], right[2]), bonus)
    before, after, own = torch.exp(left[2] - top), torch.exp(right[2] - top), torch.exp(bonus - top)
    num = before * left[0] + after * right[0] + own * v_
    return (num / (before * left[1] + after * right[1] + own)).to(v.dtype)


def _bi_wkv_rows(
    k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, spans: Tensor, time: int, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    y = _bi_wkv(_rows(k, spans), _rows(v, spans), log_w, u)
    return y.flatten(0, 1), _unused(log_w), _unused(log_w).to(torch.int16)


def _wkv6(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`statewise.ops.wkv6`: r, log_w, k ``(B, N, H, K)``, v ``(B, N, H, V)``, state ``(B, H, K, V)``."""
    dtype = state.dtype
    added = k.to(dtype)[..., None] * v.to(dtype)[..., None, :]
    states = _states(torch.exp(log_w.to(dtype))[..., None], added, state)
    # a token reads the state before it, and itself by the bonus
    read = torch.cat([state[:, None], states[:, :-1]], 1) + u[..., None] * added
    y = (r.to(dtype)[..., None] * read).sum(-2)
    return y.to(v.dtype), states[:, -1], _unused(state)


def _wkv6_rows(
    r: Tensor,
    log_w: Tensor | None,
    k: Tensor,
    v: Tensor,
    constant: Tensor | None,
    u: Tensor,
    state: Tensor,
    spans: Tensor,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor]:
    assert log_w is not None, "models of images decide about their decays token by token"
    r, log_w, k, v = (_rows(x, spans) for x in (r, log_w, k, v))
    y, end, kept = _wkv6(r, log_w, k, v, u, state)
    return y.flatten(0, 1), end, kept


def _scan(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`statewise.ops.selective_scan` as its parallel form has it, G groups of E channels: x, dt ``(B, N, G, E)``,
    B and C ``(B, N, G, S)``, A ``(G, S, E)``, state ``(B, G, S, E)``."""
    dtype = state.dtype
    step, x_ = dt.to(dtype)[..., None, :], x.to(dtype)[..., None, :]
    states = _states(torch.exp(step * A), step * x_ * B.to(dtype)[..., None], state)
    y = (states * C.to(dtype)[..., None]).sum(-2)
    return y, states[:, -1], _unused(state)


def _scan_rows(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    spans: Tensor,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, dt, z ``(B·N, G·E)``, A ``(G·E, S)``, state ``(B, G·E, S)``."""
    groups = B.shape[1]
    step = dt.to(state.dtype) if dt_bias is None else dt.to(state.dtype) + dt_bias
    x_, step = (_rows(value.reshape(len(x), groups, -1), spans) for value in (x, step))
    A_, begin = (
        value.reshape(*value.shape[:-2], groups, -1, value.shape[-1]).transpose(-1, -2) for value in (A, state)
    )
    y, end, kept = _scan(x_, step, _rows(B, spans), _rows(C, spans), A_, begin)
    y, end = y.flatten(2).flatten(0, 1), end.transpose(-1, -2).flatten(1, 2)
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype), end, kept


def _softplus_scan_rows(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    spans: Tensor,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor]:
    step = dt.to(state.dtype) if dt_bias is None else dt.to(state.dtype) + dt_bias
    return _scan_rows(x, F.softplus(step), B, C, z, A, D, None, state, spans, keep)


def _conv_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, spans: Tensor, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`statewise.ops.causal_conv1d`: x ``(B·N, C)``, weight ``(C, W)``, window ``(B, W - 1, C)``."""
    whole = torch.cat([window, _rows(x, spans).to(window.dtype)], 1)
    y = F.conv1d(whole.transpose(1, 2), weight[:, None], bias, groups=weight.shape[0]).transpose(1, 2)
    end = whole[:, whole.shape[1] - window.shape[1] :]
    return y.flatten(0, 1).to(x.dtype), end, _unused(window)


def _silu_conv_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, spans: Tensor, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    y, end, kept = _conv_rows(x.to(window.dtype), weight, bias, window, spans, keep)
    return F.silu(y).to(x.dtype), end, kept


def _unused(like: Tensor) -> Tensor:
    """In the place of what an operator keeps for backward: there is none."""
    return like.new_empty(0)
