"""One token for many sequences whose states lie in a pool: a server's decoding, in place.

Legend: B tokens, one a sequence; slots rows of the pool; C channels, M mixtures, H heads, K key rows, V value columns,
N SSM state size, P SSM head width, G groups, W window.

    y = NAME_step_(..., state, index)      as      y, state[index] = NAME_step(..., state[index])

This is the one place where what is passed in is changed, and the underscore, torch's sign for it, says so: the rows
``index`` of ``state`` are advanced, all others stay as they are, bit for bit. Nothing can be differentiated.

``state`` is a pool: the states of a layer as elsewhere, but with ``slots`` rows instead of B. Rows may lie apart (a
layer of one tensor for all layers); the elements of a row may not. It may be kept in float32, bfloat16 or float16
(or float64): sums are float32 all the same (float64 if any other input is float64), and what is written is rounded. A
float16 state overflows past 65,504. The ``max`` of WKV-4 must be float32, since a rounded exponent would weigh all that
went before wrongly.

``index`` ``(B,)`` int64 names distinct rows, 0 to slots - 1, in any order. That is checked, which on a GPU waits for
the device; inside :func:`statewise.ops.checks.trusting_values`, while a CUDA graph is captured and in
``torch.compile`` it is trusted instead. A repeated or foreign row then has no defined result, and may write where it
should not.

On CUDA a step is one kernel, which reads the rows once and writes them once, allocates y and nothing else (inputs whose
rows are not contiguous are copied) and asks nothing of the host: it can be captured in a CUDA graph, whose replays
follow what is written into ``index``. Elsewhere it is the step in plain torch on a copy of the rows. ``backend`` is
``None``, ``"torch"`` or ``"triton"``; one that cannot serve raises.

Bytes a sequence, layer and step (S the bytes of a number of the state, A of an activation; parameters, read once
for all tokens, are not counted):

| step | state, read and written | besides | at a usual size, S = 4, A = 2 |
|---|---|---|---|
| token_shift | 2 C S | 2 C A | C 2048: 25 KB |
| token_mix | 2 C S | (M + 1) C A | C 2048, M 6: 45 KB |
| causal_conv1d | 2 (W-1) C S | 2 C A | W 4, C 4096: 115 KB |
| wkv4 | 6 C S | 3 C A | C 768: 23 KB |
| wkv6 | 2 H K V S | (3 K + 2 V) H A | H 32, K = V = 64: 1.07 MB |
| wkv7 | 2 H K V S | (5 K + 2 V) H A | H 32, K = V = 64: 1.08 MB |
| selective_scan | 2 C N S | (4 C + 2 N) A | C 4096, N 16: 557 KB |
| ssd | 2 H P N S | (3 H P + H + 2 G N) A | H 64, P 64, N 128: 4.22 MB |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from statewise.ops import gpu
from statewise.ops.causal_conv1d import causal_conv1d_step
from statewise.ops.causal_conv1d import check_arguments as check_convolution
from statewise.ops.checks import check_shapes, check_state, values_are_read
from statewise.ops.selective_scan import check_arguments as check_scan
from statewise.ops.selective_scan import selective_scan_step
from statewise.ops.ssd import check_arguments as check_ssd
from statewise.ops.ssd import ssd_step
from statewise.ops.steps import STEPS, asks_gradient, contiguous_rows
from statewise.ops.token_mix import token_mix_step
from statewise.ops.token_shift import token_shift_step
from statewise.ops.wkv4 import wkv4_step
from statewise.ops.wkv6 import letters, wkv6_step
from statewise.ops.wkv7 import wkv7_step
from statewise.state import WKV4State

__all__ = [
    "causal_conv1d_step_",
    "selective_scan_step_",
    "ssd_step_",
    "token_mix_step_",
    "token_shift_step_",
    "wkv4_step_",
    "wkv6_step_",
    "wkv7_step_",
]

Output = TypeVar("Output", Tensor, tuple[Tensor, ...])


def token_shift_step_(x: Tensor, state: Tensor, index: Tensor, *, backend: str | None = None) -> Tensor:
    """:func:`~statewise.ops.token_shift_step` on rows of a pool.

    Args:
        x: ``(B, C)``.
        state: ``(slots, C)``, changed in place.
        index: ``(B,)`` int64, distinct rows of ``state``.
        backend: ``None`` (fastest), ``"torch"`` or ``"triton"``.

    Returns:
        y ``(B, C)`` of x's dtype: what was in the pool.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value, a gradient asked for, or a backend that
            cannot serve.
    """
    op = "token_shift_step_"
    C = check_shapes(op, x=(x, "B C"))["C"]
    _check_pool(op, {"state": (state, (C,))}, index, [x])
    if _form(op, backend, x) == "triton":
        return STEPS["token_shift"].in_place(x, state, index)
    return _in_torch(lambda rows: token_shift_step(x, rows, backend="torch"), state, index)


def token_mix_step_(
    x: Tensor, mix: Tensor, state: Tensor, index: Tensor, *, backend: str | None = None
) -> tuple[Tensor, ...]:
    """:func:`~statewise.ops.token_mix_step` on rows of a pool ``(slots, C)``. x and every y ``(B, C)``; otherwise as
    there, and as :func:`token_shift_step_`."""
    op = "token_mix_step_"
    C = check_shapes(op, x=(x, "B C"), mix=(mix, "M C"))["C"]
    _check_pool(op, {"state": (state, (C,))}, index, [x, mix])
    if _form(op, backend, x) == "triton":
        return STEPS["token_mix"].in_place(x, mix, state, index).unbind(0)
    return _in_torch(lambda rows: token_mix_step(x, mix, rows, backend="torch"), state, index)


def causal_conv1d_step_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor,
    index: Tensor,
    backend: str | None = None,
) -> Tensor:
    """:func:`~statewise.ops.causal_conv1d_step` on rows of a pool ``(slots, W-1, C)``. x, y ``(B, C)``; otherwise as
    there, and as :func:`token_shift_step_`."""
    op = "causal_conv1d_step_"
    W = check_convolution(op, x, "B C", weight, bias, activation)[2]
    _check_pool(op, {"state": (state, (W - 1, x.shape[-1]))}, index, [x, weight, bias])
    if _form(op, backend, x) == "triton":
        return STEPS["causal_conv1d"].in_place(x, weight, bias, state, index, activation)

    def step(rows: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv1d_step(x, weight, bias, activation=activation, state=rows, backend="torch")

    return _in_torch(step, state, index)


def wkv4_step_(
    k: Tensor,
    v: Tensor,
    log_w: Tensor,
    u: Tensor,
    state: WKV4State,
    index: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """:func:`~statewise.ops.wkv4_step` on rows of three pools, each ``(slots, C)``; ``state.max`` float32 (or float64).
    k, v, y ``(B, C)``; otherwise as there, and as :func:`token_shift_step_`."""
    op = "wkv4_step_"
    C = check_shapes(op, k=(k, "B C"), v=(v, "B C"), log_w=(log_w, "C"), u=(u, "C"))["C"]
    if not isinstance(state, tuple) or len(state) != 3:
        raise ValueError(f"{op}: state must be a WKV4State(num, den, max), got {type(state).__name__}")
    leaves = {f"state.{name}": (leaf, (C,)) for name, leaf in zip(WKV4State._fields, state, strict=True)}
    _check_pool(op, leaves, index, [k, v, log_w, u])
    if state[2].dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: state.max has dtype {state[2].dtype}; accepted are float32 and float64")
    if _form(op, backend, k) == "triton":
        return STEPS["wkv4"].in_place(k, v, log_w, u, *state, index)
    y, after = wkv4_step(k, v, log_w, u, WKV4State(*[leaf.index_select(0, index) for leaf in state]), backend="torch")
    for leaf, new in zip(state, after, strict=True):
        leaf.index_copy_(0, index, new.to(leaf.dtype))
    return y


def wkv6_step_(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    index: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """:func:`~statewise.ops.wkv6_step` on rows of a pool ``(slots, H, K, V)``. r, k ``(B, H, K)``, v, y ``(B, H, V)``,
    log_w ``(B, H, K)`` or constant; otherwise as there, and as :func:`token_shift_step_`."""
    op = "wkv6_step_"
    decay, bonus = (log_w, letters(log_w, "B H K")), (u, letters(u, "H K"))
    sizes = check_shapes(op, r=(r, "B H K"), k=(k, "B H K"), v=(v, "B H V"), log_w=decay, u=bonus)
    _check_pool(op, {"state": (state, (sizes["H"], sizes["K"], sizes["V"]))}, index, [r, log_w, k, v, u])
    if _form(op, backend, r) == "triton":
        return STEPS["wkv6"].in_place(r, log_w, k, v, u, state, index)
    return _in_torch(lambda rows: wkv6_step(r, log_w, k, v, u, rows, backend="torch"), state, index)


def wkv7_step_(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    index: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """:func:`~statewise.ops.wkv7_step` on rows of a pool ``(slots, H, K, V)``. v, y ``(B, H, V)``, the others
    ``(B, H, K)``; otherwise as there, and as :func:`token_shift_step_`."""
    op = "wkv7_step_"
    keys = {name: (x, "B H K") for name, x in (("r", r), ("log_w", log_w), ("k", k), ("a", a), ("b", b))}
    sizes = check_shapes(op, **keys, v=(v, "B H V"))
    _check_pool(op, {"state": (state, (sizes["H"], sizes["K"], sizes["V"]))}, index, [r, log_w, k, v, a, b])
    if _form(op, backend, r) == "triton":
        return STEPS["wkv7"].in_place(r, log_w, k, v, a, b, state, index)
    return _in_torch(lambda rows: wkv7_step(r, log_w, k, v, a, b, rows, backend="torch"), state, index)


def selective_scan_step_(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state: Tensor,
    index: Tensor,
    backend: str | None = None,
) -> Tensor:
    """:func:`~statewise.ops.selective_scan_step` on rows of a pool ``(slots, channels, N)``. Otherwise as there, and as
    :func:`token_shift_step_`."""
    op = "selective_scan_step_"
    _, _, channels, N = check_scan(op, "batch", x, dt, A, B, C, D, z, dt_bias)
    given = (x, dt, A, B, C, D, z, dt_bias)
    _check_pool(op, {"state": (state, (channels, N))}, index, given)
    if _form(op, backend, x) == "triton":
        return STEPS["selective_scan"].in_place(*given, state, index, dt_softplus)

    def step(rows: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan_step(
            x, dt, A, B, C, D, z, dt_bias=dt_bias, dt_softplus=dt_softplus, state=rows, backend="torch"
        )

    return _in_torch(step, state, index)


def ssd_step_(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    state: Tensor,
    index: Tensor,
    backend: str | None = None,
) -> Tensor:
    """:func:`~statewise.ops.ssd_step` on rows of a pool ``(slots, H, P, N)``. Otherwise as there, and as
    :func:`token_shift_step_`."""
    op = "ssd_step_"
    sizes = check_ssd(op, "batch", x, dt, A, B, C, D, z, dt_bias, dt_limit)
    given = (x, dt, A, B, C, D, z, dt_bias)
    _check_pool(op, {"state": (state, (sizes["H"], sizes["P"], sizes["N"]))}, index, given)
    if _form(op, backend, x) == "triton":
        return STEPS["ssd"].in_place(*given, state, index, dt_softplus, list(dt_limit))

    def step(rows: Tensor) -> tuple[Tensor, Tensor]:
        return ssd_step(
            x,
            dt,
            A,
            B,
            C,
            D,
            z,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            state=rows,
            backend="torch",
        )

    return _in_torch(step, state, index)


def _form(op: str, backend: str | None, x: Tensor) -> str:
    """``"triton"`` or ``"torch"``: the one asked for, or the fastest that serves."""
    why_not = gpu.serves(x.device)
    if backend is None:
        return "triton" if x.device.type == "cuda" and not why_not else "torch"
    if backend not in ("torch", "triton"):
        raise ValueError(f"{op}: backend is {backend!r}; accepted are None, 'torch', 'triton'")
    if backend == "triton" and why_not:
        raise ValueError(f"{op}: backend 'triton' cannot serve: {why_not}")
    return backend


def _in_torch(step: Callable[[Tensor], tuple[Output, Tensor]], state: Tensor, index: Tensor) -> Output:
    y, after = step(state.index_select(0, index))
    state.index_copy_(0, index, after.to(state.dtype))
    return y


def _check_pool(
    op: str,
    leaves: Mapping[str, tuple[Tensor, tuple[int, ...]]],
    index: Tensor,
    given: Sequence[Tensor | None],
) -> None:
    """Raise ``ValueError`` unless rows ``index`` of all ``leaves`` (name → pool, shape of a row) can be advanced."""
    first = given[0]
    assert first is not None
    slots = -1
    for name, (pool, row) in leaves.items():
        if slots < 0 and isinstance(pool, Tensor) and pool.dim() > 0:
            slots = pool.shape[0]
        check_state(op, name, pool, (max(slots, 0), *row), first.device)
        if not contiguous_rows(pool) or (slots > 1 and pool.stride(0) < pool[0].numel()):
            found = f"shape {tuple(pool.shape)} and strides {pool.stride()}"
            raise ValueError(f"{op}: {name} has {found}; accepted are separate rows, contiguous each")
    if asks_gradient(*given, *[pool for pool, _ in leaves.values()]):
        raise ValueError(f"{op}: works in place and has no gradient; call it under torch.no_grad(), or {op[:-1]}")
    if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype != torch.int64:
        came = f"{index.dtype} of shape {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
        raise ValueError(f"{op}: index must be a 1-D int64 tensor, got {came}")
    if index.shape[0] != first.shape[0]:
        raise ValueError(f"{op}: index has {index.shape[0]} entries for a batch of {first.shape[0]}")
    if index.device != first.device:
        raise ValueError(f"{op}: index lies on {index.device}, the inputs on {first.device}")
    if not values_are_read() or not index.shape[0]:
        return
    if first.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    rows = index.tolist()
    if min(rows) < 0 or max(rows) >= slots:
        raise ValueError(f"{op}: index {rows} must lie in 0..{slots - 1}")
    if len(set(rows)) < len(rows):
        raise ValueError(f"{op}: index {rows} names a row more than once")
