"""One token a row by one GPU kernel: launches step_kernels.py, for the ``NAME_step`` functions and for the pools of
:mod:`statewise.ops.pool`.

Legend: B rows, C channels, M mixtures, H heads, K key rows, V value columns, N SSM state size, P SSM head width, W
window.

Two operators are made of each kernel. ``statewise::NAME_step`` returns a new state; its gradient is that of the
equation in plain torch, computed anew. ``statewise::NAME_step_in_place`` writes rows of a pool, and has none.

Nothing is copied on the way: rows may lie apart (a projection's slices), and every dtype is read as it is.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from statewise.ops import gpu
from statewise.ops.checks import accumulation_dtype
from statewise.state import WKV4State

__all__ = ["STEPS", "Step", "asks_gradient", "by_kernel", "contiguous_rows"]

# Elements of a float32 state that a warp holds: few enough for its registers, enough loads in flight for the memory.
_TILE = 2048


class Moved(NamedTuple):
    """The state a step reads and writes, leaf by leaf: the same tensors if it is a pool, of which ``rows`` are
    the token's."""

    before: Sequence[Tensor]
    after: Sequence[Tensor]
    rows: Tensor | None

    @property
    def arguments(self) -> list[Any]:
        """As kernels of one leaf take them."""
        return [*_rows(self.before[0]), *_rows(self.after[0]), self.rows]


#: (tensors by name, options by name, state, y, triton's dtype of sums) → launched.
Launch = Callable[[Mapping[str, Any], Mapping[str, Any], Moved, Tensor, Any], None]


class Step(NamedTuple):
    """The two operators of a step.

    Attributes:
        pure: (tensors, state leaves, options) → y, new leaves.
        in_place: (tensors, state leaves, index, options) → y; rows ``index`` of the leaves are written.
    """

    pure: Callable[..., tuple[Tensor, ...]]
    in_place: Callable[..., Tensor]


def asks_gradient(*tensors: Tensor | None) -> bool:
    """Whether what is computed of ``tensors`` now could be differentiated."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def by_kernel(form: str, backend: str | None, *tensors: Tensor | None) -> bool:
    """Whether a step runs as one kernel: where Triton serves, asked for by name or nothing is to be differentiated."""
    return form == "triton" and (backend is not None or not asks_gradient(*tensors))


def contiguous_rows(x: Tensor) -> bool:
    """Whether the elements of every row of ``x`` are beside each other."""
    step = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _rows(x: Tensor | None) -> tuple[Tensor | None, int]:
    """A tensor of rows, and how far apart they are."""
    if x is None:
        return None, 0
    x = x if contiguous_rows(x) else x.contiguous()
    return x, x.stride(0)


def _power(size: int) -> int:
    """The least power of two that is not less, and at least 1."""
    return 1 << max(size - 1, 0).bit_length()


def _tile(inner: int, outer: int, sums: Any) -> tuple[int, int, int]:
    """For parts of a state whose ``inner`` elements are summed: both sizes of a program's tile, and its warps."""
    held = _TILE * 32 // sums.primitive_bitwidth
    whole = _power(inner)
    part = min(_power(outer), max(held // whole, 4))
    return whole, part, min(max(whole * part // held, 1), 16)


def _register(
    op: str,
    launch: Launch,
    *,
    tensors: Sequence[str],
    output: str,
    state: Sequence[str] = ("state",),
    optional: Sequence[str] = (),
    options: Sequence[tuple[str, str]] = (),
    times: str = "",
) -> Step:
    """Register both operators of a step. Names are those of the public function's arguments.

    Args:
        op: public name of the operator.
        launch: launches its kernel.
        tensors: names of what is no state.
        output: which of them y is like.
        state: names of the leaves of the state.
        optional: which of ``tensors`` may be ``None``.
        options: type and name of what else it takes.
        times: a tensor, each of whose rows gives a y: y has another axis, the first, for those.
    """
    count, leaves = len(tensors), len(state)
    model = list(tensors).index(output)
    given = ", ".join(f"Tensor{'?' if name in optional else ''} {name}" for name in tensors)
    said = "".join(f", {kind} {name}" for kind, name in options)
    names = [name for _, name in options]
    read = ", ".join(f"Tensor {name}" for name in state)
    written = ", ".join(f"Tensor(a{i}!) {name}" for i, name in enumerate(state))

    def run(arguments: Sequence[Any], moved: Moved, chosen: Sequence[Any]) -> Tensor:
        import triton.language as tl

        y = like(arguments)
        sums = tl.float64 if accumulation_dtype(*arguments) == torch.float64 else tl.float32
        named = dict(zip(tensors, arguments, strict=True))
        launch(named, dict(zip(names, chosen, strict=True)), moved, y, sums)
        return y

    def like(arguments: Sequence[Any]) -> Tensor:
        one: Tensor = arguments[model]
        more = arguments[list(tensors).index(times)].shape[:1] if times else ()
        return one.new_empty((*more, *one.shape))

    def room(arguments: Sequence[Any], before: Sequence[Tensor]) -> list[Tensor]:
        dtype = accumulation_dtype(*arguments)
        return [torch.empty(leaf.shape, dtype=dtype, device=leaf.device) for leaf in before]

    @torch.library.custom_op(
        f"statewise::{op}_step",
        mutates_args=(),
        device_types=("cuda", "cpu"),  # the CPU in Triton's interpreter
        schema=f"({given}, {read}{said}) -> ({', '.join(['Tensor'] * (1 + leaves))})",
    )
    def pure(*arguments: Any) -> tuple[Tensor, ...]:
        inputs, before = arguments[:count], arguments[count : count + leaves]
        after = room(inputs, before)
        return (run(inputs, Moved(before, after, None), arguments[count + leaves :]), *after)

    @pure.register_fake
    def _(*arguments: Any) -> tuple[Tensor, ...]:
        inputs = arguments[:count]
        return (like(inputs), *room(inputs, arguments[count : count + leaves]))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[: count + leaves])
        ctx.options = inputs[count + leaves :]

    def differentiate(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        asked = ctx.needs_input_grad[: count + leaves]
        again = torch.is_grad_enabled()  # the gradient itself is to be differentiated
        with torch.enable_grad():
            # Views of what was given: the gradient ends there, and does not go on through the steps before.
            given = [x.view_as(x) if need else x for x, need in zip(ctx.saved_tensors, asked, strict=True)]
            outputs = equation(given, ctx.options)
        live = [(y, grad) for y, grad in zip(outputs, grads, strict=True) if y.requires_grad]
        found = torch.autograd.grad(
            [y for y, _ in live],
            [x for x, need in zip(given, asked, strict=True) if need],
            [grad for _, grad in live],
            create_graph=again,
            allow_unused=True,
        )
        each = iter(found)
        return (*[next(each) if need else None for need in asked], *[None] * len(names))

    def equation(arguments: Sequence[Any], chosen: Sequence[Any]) -> list[Tensor]:
        named = dict(zip([*tensors, *names], [*arguments[:count], *chosen], strict=True))
        begin = arguments[count] if leaves == 1 else WKV4State(*arguments[count:])
        function = getattr(importlib.import_module("statewise.ops"), f"{op}_step")
        y, end = function(**named, state=begin, backend="reference")
        y = torch.stack(y) if times else y
        return [y, end] if leaves == 1 else [y, *end]

    pure.register_autograd(differentiate, setup_context=setup_context)

    @torch.library.custom_op(
        f"statewise::{op}_step_in_place",
        mutates_args=state,
        device_types=("cuda", "cpu"),
        schema=f"({given}, {written}, Tensor index{said}) -> Tensor",
    )
    def in_place(*arguments: Any) -> Tensor:
        pool = arguments[count : count + leaves]
        return run(arguments[:count], Moved(pool, pool, arguments[count + leaves]), arguments[count + leaves + 1 :])

    @in_place.register_fake
    def _(*arguments: Any) -> Tensor:
        return like(arguments[:count])

    return Step(pure, in_place)


def _kernels() -> Any:
    from statewise.ops import step_kernels

    return step_kernels


_CHANNELS = 128  # of a program that works channel by channel, one warp


def _token_shift(t: Mapping[str, Any], options: Mapping[str, Any], state: Moved, y: Tensor, sums: Any) -> None:
    C = y.shape[-1]
    grid = (y.shape[0], -(-C // _CHANNELS))
    gpu.launch(_kernels().token_shift, grid, *_rows(t["x"]), *state.arguments, y, C, warps=1, CB=_CHANNELS)


def _token_mix(t: Mapping[str, Any], options: Mapping[str, Any], state: Moved, y: Tensor, sums: Any) -> None:
    M, batch, C = y.shape
    given = (*_rows(t["x"]), t["mix"].contiguous(), *state.arguments, y, batch, C)
    grid = (batch, -(-C // _CHANNELS))
    gpu.launch(_kernels().token_mix, grid, *given, warps=1, M=M, ACC=sums, CB=_CHANNELS)


def _causal_conv1d(t: Mapping[str, Any], options: Mapping[str, Any], state: Moved, y: Tensor, sums: Any) -> None:
    C, W = t["weight"].shape
    bias = None if t["bias"] is None else t["bias"].contiguous()
    given = (*_rows(t["x"]), t["weight"].contiguous(), bias, *state.arguments, y, C)
    constants = {"W": W, "SILU": options["activation"] is not None, "ACC": sums, "WB": _power(W), "CB": _CHANNELS}
    gpu.launch(_kernels().causal_conv1d, (y.shape[0], -(-C // _CHANNELS)), *given, warps=1, **constants)


def _wkv4(t: Mapping[str, Any], options: Mapping[str, Any], state: Moved, y: Tensor, sums: Any) -> None:
    C = y.shape[-1]
    leaves = [part for leaf in (*state.before, *state.after) for part in _rows(leaf)]
    given = (*_rows(t["k"]), *_rows(t["v"]), t["log_w"].contiguous(), t["u"].contiguous(), *leaves, state.rows, y, C)
    gpu.launch(_kernels().wkv4, (y.shape[0], -(-C // _CHANNELS)), *given, warps=1, ACC=sums, CB=_CHANNELS)


def _heads(kernel: Any, given: Sequence[Any], state: Moved, y: Tensor, K: int, sums: Any) -> None:
    """For every head a matrix (K, V), whose columns are parted among programs."""
    batch, H, V = y.shape
    keys, columns, warps = _tile(K, V, sums)
    constants = {"K": K, "V": V, "ACC": sums, "KB": keys, "VB": columns}
    gpu.launch(kernel, (batch, H, -(-V // columns)), *given, *state.arguments, y, H, warps=warps, **constants)


def _wkv6(t: Mapping[str, Any], options: Mapping[str, Any], state: Moved, y: Tensor, sums: Any) -> None:
    log_w, u, K = t["log_w"], t["u"], t["r"].shape[-1]
    strides = {1: (0, *log_w.stride(), 0), 2: (0, *log_w.stride())}.get(log_w.dim(), log_w.stride())
    bonus = (*u.stride(), 0) if u.dim() == 1 else u.stride()
    given = (*_rows(t["r"]), log_w, *strides, *_rows(t["k"]), *_rows(t["v"]), u, *bonus)
    _heads(_kernels().wkv6, given, state, y, K, sums)


def _wkv7(t: Mapping[str, Any], options: Mapping[str, Any], state: Moved, y: Tensor, sums: Any) -> None:
    given = [part for name in ("r", "log_w", "k", "v", "a", "b") for part in _rows(t[name])]
    _heads(_kernels().wkv7, given, state, y, t["r"].shape[-1], sums)


def _selective_scan(t: Mapping[str, Any], options: Mapping[str, Any], state: Moved, y: Tensor, sums: Any) -> None:
    channels, N = t["A"].shape
    groups = t["B"].shape[1] if t["B"].dim() == 3 else 1
    rates, D, dt_bias = (None if t[name] is None else t[name].contiguous() for name in ("A", "D", "dt_bias"))
    given = (*_rows(t["x"]), *_rows(t["dt"]), rates, *_rows(t["B"]), *_rows(t["C"]), D, *_rows(t["z"]), dt_bias)
    _, part, warps = _tile(2 * N, channels, sums)  # A is held beside the state
    constants = {"N": N, "SOFTPLUS": options["dt_softplus"], "ACC": sums, "CB": part, "NB": _power(N)}
    sizes = (channels, None if groups == 1 else channels // groups)
    grid = (y.shape[0], -(-channels // part))
    gpu.launch(_kernels().selective_scan, grid, *given, *state.arguments, y, *sizes, warps=warps, **constants)


def _ssd(t: Mapping[str, Any], options: Mapping[str, Any], state: Moved, y: Tensor, sums: Any) -> None:
    batch, H, P = y.shape
    groups, N = t["B"].shape[1:]
    D = t["D"]
    skip = (None, 0, 0) if D is None else (D, *D.stride()) if D.dim() == 2 else (D, *D.stride(), 0)
    dt_bias = None if t["dt_bias"] is None else t["dt_bias"].contiguous()
    given = (*_rows(t["x"]), *_rows(t["dt"]), t["A"].contiguous(), *_rows(t["B"]), *_rows(t["C"]))
    whole, part, warps = _tile(N, P, sums)
    least, most = options["dt_limit"]
    constants = {"P": P, "N": N, "SOFTPLUS": options["dt_softplus"], "LEAST": least, "MOST": most}
    gpu.launch(
        _kernels().ssd, (batch, H, -(-P // part)), *given, *skip, *_rows(t["z"]), dt_bias, *state.arguments, y,
        H, H // groups, warps=warps, **constants, ACC=sums, PB=part, NB=whole,
    )  # fmt: skip


#: By public name of the operator.
STEPS: dict[str, Step] = {
    "token_shift": _register("token_shift", _token_shift, tensors=("x",), output="x"),
    "token_mix": _register("token_mix", _token_mix, tensors=("x", "mix"), output="x", times="mix"),
    "causal_conv1d": _register(
        "causal_conv1d",
        _causal_conv1d,
        tensors=("x", "weight", "bias"),
        output="x",
        optional=("bias",),
        options=(("str?", "activation"),),
    ),
    "wkv4": _register("wkv4", _wkv4, tensors=("k", "v", "log_w", "u"), output="v", state=("num", "den", "max")),
    "wkv6": _register("wkv6", _wkv6, tensors=("r", "log_w", "k", "v", "u"), output="v"),
    "wkv7": _register("wkv7", _wkv7, tensors=("r", "log_w", "k", "v", "a", "b"), output="v"),
    "selective_scan": _register(
        "selective_scan",
        _selective_scan,
        tensors=("x", "dt", "A", "B", "C", "D", "z", "dt_bias"),
        output="x",
        optional=("D", "z", "dt_bias"),
        options=(("bool", "dt_softplus"),),
    ),
    "ssd": _register(
        "ssd",
        _ssd,
        tensors=("x", "dt", "A", "B", "C", "D", "z", "dt_bias"),
        output="x",
        optional=("D", "z", "dt_bias"),
        options=(("bool", "dt_softplus"), ("float[]", "dt_limit")),
    ),
}
