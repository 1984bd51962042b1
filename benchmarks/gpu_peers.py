"""Published GPU kernels behind our operators' own arguments.

Legend: B batch, T time, C channels, H heads, N state or head size, G groups.

Packages are imported when asked for; kernels that no package holds are built from a checkout that is named. A peer that
cannot be had is told with its reason. What a peer wants laid out otherwise is laid out before the clock starts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.forms import FORMS
from benchmarks.gpu_cases import GpuCase
from statewise.testing.peers import join

__all__ = ["GpuPeer", "attention", "find_gpu_peers", "join"]

Inputs = Mapping[str, Tensor]

#: Decays of RWKV-7 lie above exp of this.
_BOUND = -0.6065306597


class GpuPeer(NamedTuple):
    """A runnable peer.

    Attributes:
        name, version: for the table.
        prepare: our arguments → its own, differentiably. Not timed.
        run: its arguments → its output, or several. Timed.
        finish: its output → y in our layout, differentiably. Not timed.
    """

    name: str
    version: str
    prepare: Callable[[Inputs], dict[str, Tensor]]
    run: Callable[[Inputs], Any]
    finish: Callable[[Any], Tensor] = lambda y: y


class _Adapter(NamedTuple):
    prepare: Callable[[Inputs], dict[str, Tensor]]
    run: Callable[[Inputs], Any]
    finish: Callable[[Any], Tensor] = lambda y: y


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _time_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous()


def _fla_wkv7(**how: Any) -> Callable[[GpuCase], _Adapter]:
    def find(case: GpuCase) -> _Adapter:
        from fla.ops.rwkv7 import chunk_rwkv7

        def prepare(x: Inputs) -> dict[str, Tensor]:
            return {"w" if name == "log_w" else name: value for name, value in x.items()}

        return _Adapter(prepare, lambda x: _first(chunk_rwkv7(**x, scale=1.0, output_final_state=False, **how)))

    return find


def _fla_wkv6(name: str) -> Callable[[GpuCase], _Adapter]:
    def find(case: GpuCase) -> _Adapter:
        from fla.ops import rwkv6

        function = getattr(rwkv6, name)

        def prepare(x: Inputs) -> dict[str, Tensor]:
            w = x["log_w"]  # theirs has no constant decay
            w = w[:, None] if w.dim() == 1 else w
            return {"r": x["r"], "k": x["k"], "v": x["v"], "w": w.expand_as(x["k"]).contiguous(), "u": x["u"]}

        return _Adapter(prepare, lambda x: _first(function(**x, scale=1.0)))

    return find


def _fla_wkv4(case: GpuCase) -> _Adapter:
    from fla.ops.rwkv4 import fused_recurrent_rwkv4

    def prepare(x: Inputs) -> dict[str, Tensor]:
        return {**x, "log_w": torch.log(-x["log_w"])}  # theirs is the stored decay

    def run(x: Inputs) -> Tensor:
        state = x["k"].new_zeros(x["k"].shape[0], 3, 1, x["k"].shape[2], dtype=torch.float32)
        state[:, 2] = -1e38
        return _first(fused_recurrent_rwkv4(x["log_w"], x["u"], x["k"], x["v"], state))

    return _Adapter(prepare, run)


def _mamba_scan(case: GpuCase) -> _Adapter:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    softplus = bool((case.options or {}).get("dt_softplus"))

    def prepare(x: Inputs) -> dict[str, Tensor]:
        timed = ("x", "dt", "B", "C", "z")
        return {name: _time_last(value) if name in timed else value for name, value in x.items()}

    def run(x: Inputs) -> Tensor:
        given = (x["x"], x["dt"], x["A"], x["B"], x["C"], x.get("D"), x.get("z"), x.get("dt_bias"))
        return _first(selective_scan_fn(*given, delta_softplus=softplus))

    return _Adapter(prepare, run, lambda y: y.transpose(1, 2))


def _mamba_ssd(chunk: int) -> Callable[[GpuCase], _Adapter]:
    def find(case: GpuCase) -> _Adapter:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        options = dict(case.options or {})

        def run(x: Inputs) -> Tensor:
            rest = {name: x.get(name) for name in ("D", "z", "dt_bias")}
            return _first(
                mamba_chunk_scan_combined(x["x"], x["dt"], x["A"], x["B"], x["C"], chunk_size=chunk, **rest, **options)
            )

        return _Adapter(dict, run)

    return find


def _mamba3_siso(case: GpuCase) -> _Adapter:
    if "mimo_x" in case.shapes:
        raise NotImplementedError("its MIMO form is in TileLang, which is not adapted here")
    from mamba_ssm.ops.triton.mamba3.mamba3_siso_combined import (
        mamba3_siso_combined,
    )

    names = {"C": "Q", "B": "K", "x": "V", "log_decay": "ADT", "dt": "DT", "trap": "Trap", "z": "Z", "D": "D"}
    names |= {"C_bias": "Q_bias", "B_bias": "K_bias", "angles": "Angles"}

    def prepare(x: Inputs) -> dict[str, Tensor]:
        return {
            names[name]: _time_last(value) if name in ("log_decay", "dt", "trap") else value
            for name, value in x.items()
        }

    return _Adapter(prepare, lambda x: _first(mamba3_siso_combined(**x)))


def _causal_conv1d(channels_last: bool) -> Callable[[GpuCase], _Adapter]:
    def find(case: GpuCase) -> _Adapter:
        from causal_conv1d import causal_conv1d_fn

        activation = (case.options or {}).get("activation")

        def prepare(x: Inputs) -> dict[str, Tensor]:
            return dict(x) if channels_last else {**x, "x": _time_last(x["x"])}

        def run(x: Inputs) -> Tensor:
            samples = x["x"].transpose(1, 2) if channels_last else x["x"]
            return _first(causal_conv1d_fn(samples, x["weight"], x.get("bias"), activation=activation))

        return _Adapter(prepare, run, lambda y: y.transpose(1, 2))

    return find


def _token_mix(case: GpuCase) -> _Adapter:
    def run(x: Inputs) -> list[Tensor]:
        change = F.pad(x["x"], (0, 0, 1, -1)) - x["x"]
        return [x["x"] + change * mix for mix in x["mix"].to(x["x"].dtype).unbind(0)]

    return _Adapter(dict, run, join)


#: Operator → peer's name → (package, how to find it).
PEERS: dict[str, dict[str, tuple[str, Callable[[GpuCase], _Adapter]]]] = {
    "token_mix": {"torch": ("torch", _token_mix)},
    "wkv4": {"fla fused_recurrent": ("fla-core", _fla_wkv4)},
    "wkv6": {
        "fla chunk": ("fla-core", _fla_wkv6("chunk_rwkv6")),
        "fla fused_recurrent": ("fla-core", _fla_wkv6("fused_recurrent_rwkv6")),
    },
    "wkv7": {
        "fla chunk": ("fla-core", _fla_wkv7()),
        "fla chunk, bounded": ("fla-core", _fla_wkv7(lower_bound=_BOUND)),
    },
    "selective_scan": {"mamba_ssm": ("mamba-ssm", _mamba_scan)},
    "ssd": {"mamba_ssm": ("mamba-ssm", _mamba_ssd(256))},
    "mamba3": {"mamba_ssm SISO": ("mamba-ssm", _mamba3_siso)},
    "causal_conv1d": {
        "causal-conv1d (B,C,T)": ("causal-conv1d", _causal_conv1d(False)),
        "causal-conv1d (B,T,C)": ("causal-conv1d", _causal_conv1d(True)),
    },
}


def _build(
    folder: Path, name: str, sources: tuple[str, ...], flags: tuple[str, ...], module: bool, rename: str = ""
) -> tuple[Any, str]:
    """Compile sources of a checkout; the extension (or ``torch.ops.NAME``), and a version told by their contents.

    ``rename``: what they register themselves as, where several of them go by one name.
    """
    files = [folder / source for source in sources]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"no {missing[0]}")
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    from torch.utils.cpp_extension import load

    built = load(
        name=name,
        sources=[str(file) for file in files],
        extra_cflags=[f"-D{rename}={name}"] if rename else [],
        extra_cuda_cflags=["--use_fast_math", "-O3", *flags],
        is_python_module=module,
        verbose=False,
    )
    return (built if module else getattr(torch.ops, name)), f"sha256 {digest}"


_CHUNK = 16  # of RWKV-LM's kernels: they keep a state so often


class _RwkvLm7(torch.autograd.Function):
    """RWKV-LM's own call of its kernel: the raw decay goes in, its gradient comes out."""

    @staticmethod
    def forward(ctx: Any, kernel: Any, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        B, T, H, N = r.shape
        if T % _CHUNK:
            raise ValueError(f"T is a multiple of {_CHUNK}")
        y = torch.empty_like(v)
        s = torch.empty(B, H, T // _CHUNK, N, N, dtype=torch.float32, device=r.device)
        sa = torch.empty(B, T, H, N, dtype=torch.float32, device=r.device)
        kernel.forward(r, w, k, v, a, b, y, s, sa)
        ctx.kernel = kernel
        ctx.save_for_backward(r, w, k, v, a, b, s, sa)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inputs = ctx.saved_tensors
        found = [torch.empty_like(x) for x in inputs[:6]]
        ctx.kernel.backward(*inputs[:6], grads[0].contiguous(), *inputs[6:], *found)
        return (None, *found)


def _rwkv_lm_wkv7(sources: tuple[str, str], name: str) -> Callable[[Path, GpuCase], tuple[_Adapter, str]]:
    def find(checkout: Path, case: GpuCase) -> tuple[_Adapter, str]:
        N = case.sizes["K"]
        flags = (f"-D_N_={N}", f"-D_CHUNK_LEN_={_CHUNK}", "--extra-device-vectorization")
        kernel, version = _build(checkout / "RWKV-v7" / "train_temp" / "cuda", name, sources, flags, False)

        def prepare(x: Inputs) -> dict[str, Tensor]:
            half = {name: value.to(torch.bfloat16).contiguous() for name, value in x.items()}
            ratio = (x["log_w"].float() / _BOUND).clamp(1e-6, 1 - 1e-6)
            return {**half, "log_w": torch.logit(ratio).to(torch.bfloat16)}

        order = ("r", "log_w", "k", "v", "a", "b")
        return _Adapter(prepare, lambda x: _RwkvLm7.apply(kernel, *(x[key] for key in order))), version

    return find


_MOST = 4096  # tokens that kernels with arrays of a fixed length are built for


def _no_longer_than(most: int, time: int) -> None:
    if time > most:
        raise ValueError(f"built for up to {most} tokens")


class _RwkvLm6(torch.autograd.Function):
    """As RWKV-LM calls it: all in bfloat16, channels of all heads side by side, and the raw decay."""

    @staticmethod
    def forward(ctx: Any, kernel: Any, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
        B, T, H, N = r.shape
        _no_longer_than(_MOST, T)
        y = torch.empty_like(v)
        kernel.forward(B, T, H * N, H, r, k, v, w, u, y)
        ctx.kernel = kernel
        ctx.save_for_backward(r, k, v, w, u)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        r, k, v, w, u = ctx.saved_tensors
        B, T, H, N = r.shape
        gr, gk, gv, gw = (torch.empty_like(r) for _ in range(4))
        gu = r.new_empty(B, H * N)
        ctx.kernel.backward(B, T, H * N, H, r, k, v, w, u, grads[0].contiguous(), gr, gk, gv, gw, gu)
        return None, gr, gk, gv, gw, gu.sum(0).view(H, N)


def _rwkv_lm_wkv6(checkout: Path, case: GpuCase) -> tuple[_Adapter, str]:
    flags = (f"-D_N_={case.sizes['K']}", f"-D_T_={_MOST}", "--extra-device-vectorization")
    kernel, version = _build(checkout / "RWKV-v5" / "cuda", "wkv6", ("wkv6_op.cpp", "wkv6_cuda.cu"), flags, False)

    def prepare(x: Inputs) -> dict[str, Tensor]:
        w = x["log_w"]
        w = torch.log(-(w[:, None] if w.dim() == 1 else w)).expand_as(x["k"])
        return {name: y.to(torch.bfloat16).contiguous() for name, y in {**x, "log_w": w}.items()}

    order = ("r", "k", "v", "log_w", "u")
    return _Adapter(prepare, lambda x: _RwkvLm6.apply(kernel, *(x[key] for key in order))), version


class _RwkvLm4(torch.autograd.Function):
    """As RWKV-LM calls it: the raw decay goes in, keys and values in bfloat16."""

    @staticmethod
    def forward(ctx: Any, kernel: Any, w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _no_longer_than(_MOST, k.shape[1])
        decay = -torch.exp(w.float())
        y = torch.empty_like(v)
        kernel.forward(*k.shape, decay, u, k, v, y)
        ctx.kernel = kernel
        ctx.save_for_backward(decay, u, k, v, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        w, u, k, v, y = ctx.saved_tensors
        gw, gu = (k.new_empty(k.shape[0], k.shape[2]) for _ in range(2))
        gk, gv = torch.empty_like(k), torch.empty_like(v)
        ctx.kernel.backward(*k.shape, w, u, k, v, y, grads[0].contiguous(), gw, gu, gk, gv)
        return None, gw.sum(0), gu.sum(0), gk, gv


def _rwkv_lm_wkv4(checkout: Path, case: GpuCase) -> tuple[_Adapter, str]:
    flags = ("--maxrregcount", "60", f"-DTmax={_MOST}", "--extra-device-vectorization")
    sources = ("wkv_op_bf16.cpp", "wkv_cuda_bf16.cu")
    kernel, version = _build(checkout / "RWKV-v4neo" / "cuda", "wkv4_bf16", sources, flags, True, "wkv")

    def prepare(x: Inputs) -> dict[str, Tensor]:
        given = {**x, "log_w": torch.log(-x["log_w"])}
        return {name: y if name == "log_w" else y.to(torch.bfloat16).contiguous() for name, y in given.items()}

    order = ("log_w", "u", "k", "v")
    return _Adapter(prepare, lambda x: _RwkvLm4.apply(kernel, *(x[key] for key in order))), version


class _VisionRwkv(torch.autograd.Function):
    """Vision-RWKV's own call: everything in float32, and its w is minus ours."""

    @staticmethod
    def forward(ctx: Any, kernel: Any, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
        wide = [x.float().contiguous() for x in (w, u, k, v)]
        ctx.kernel, ctx.dtype = kernel, v.dtype
        ctx.save_for_backward(*wide)
        if hasattr(kernel, "bi_wkv_forward"):
            y: Tensor = kernel.bi_wkv_forward(*wide)
        else:
            y = torch.empty_like(wide[2])
            kernel.forward(*k.shape, *wide, y)
        return y.to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        w, u, k, v = ctx.saved_tensors
        grad = grads[0].float().contiguous()
        if hasattr(ctx.kernel, "bi_wkv_backward"):
            gw, gu, gk, gv = ctx.kernel.bi_wkv_backward(w, u, k, v, grad)
        else:
            gw, gu = k.new_zeros(k.shape[0], k.shape[2]), k.new_zeros(k.shape[0], k.shape[2])
            gk, gv = torch.zeros_like(k), torch.zeros_like(v)
            ctx.kernel.backward(*k.shape, w, u, k, v, grad, gw, gu, gk, gv)
            gw, gu = gw.sum(0), gu.sum(0)
        return None, gk.to(ctx.dtype), gv.to(ctx.dtype), gw, gu


def _vision_rwkv(folder: str, sources: tuple[str, str], name: str) -> Callable[[Path, GpuCase], tuple[_Adapter, str]]:
    def find(checkout: Path, case: GpuCase) -> tuple[_Adapter, str]:
        place = checkout / "classification" / "mmcls_custom" / "models" / "backbones" / folder
        flags = ("--maxrregcount", "60", f"-DTmax={_MOST}")
        kernel, version = _build(place, name, sources, flags, True, "wkv" if folder == "cuda" else "")

        def run(x: Inputs) -> Tensor:
            if folder == "cuda":
                _no_longer_than(_MOST, x["k"].shape[1])
            return _VisionRwkv.apply(kernel, x["k"], x["v"], x["w"], x["u"])

        def prepare(x: Inputs) -> dict[str, Tensor]:
            return {"k": x["k"], "v": x["v"], "w": -x["log_w"], "u": x["u"]}

        return _Adapter(prepare, run), version

    return find


#: Which checkout → operator → peer's name → how to build it.
BUILT: dict[str, dict[str, dict[str, Callable[[Path, GpuCase], tuple[_Adapter, str]]]]] = {
    "rwkv_lm": {
        "wkv4": {"RWKV-LM": _rwkv_lm_wkv4},
        "wkv6": {"RWKV-LM": _rwkv_lm_wkv6},
        "wkv7": {
            "RWKV-LM": _rwkv_lm_wkv7(("rwkv7_clampw.cu", "rwkv7_clampw.cpp"), "rwkv7_clampw"),
            "RWKV-LM v3": _rwkv_lm_wkv7(("rwkv7_clampw_v3_for_h100.cu", "rwkv7_clampw_v3.cpp"), "rwkv7_clampw_v3"),
        },
    },
    "vision_rwkv": {
        "bi_wkv": {
            "Vision-RWKV": _vision_rwkv("cuda", ("wkv_op.cpp", "wkv_cuda.cu"), "wkv_vision"),
            "Vision-RWKV new": _vision_rwkv("cuda_new", ("bi_wkv.cpp", "bi_wkv_kernel.cu"), "bi_wkv"),
        }
    },
}


def _of_form(run: Callable[[Inputs], Tensor]) -> _Adapter:
    def prepare(x: Inputs) -> dict[str, Tensor]:
        dtype = next(iter(x.values())).dtype  # torch's own convolution wants one for all
        return {name: value.to(dtype) for name, value in x.items()}

    return _Adapter(prepare, run)


def attention(case: GpuCase) -> GpuPeer | None:
    """torch's scaled dot product attention with the heads of ``case``: another function, as a yardstick of time.

    ``None`` for what does not carry anything over a sequence."""
    if case.op in ("causal_conv1d", "token_mix", "token_shift"):
        return None
    first = next(iter(case.shapes))

    def heads(x: Inputs) -> tuple[int, int]:
        sizes = case.sizes
        if "H" in sizes:
            return sizes["H"], sizes.get("P") or sizes["K"]
        return max(1, sizes["C"] // 64), min(64, sizes["C"])

    def prepare(x: Inputs) -> dict[str, Tensor]:
        like = x[first]
        H, N = heads(x)
        shape = (like.shape[0], H, like.shape[1], N)
        return {name: torch.randn(shape, dtype=like.dtype, device=like.device) for name in ("q", "k", "v")}

    def run(x: Inputs) -> Tensor:
        return F.scaled_dot_product_attention(x["q"], x["k"], x["v"], is_causal=case.op != "bi_wkv")

    return GpuPeer("torch SDPA", torch.__version__, prepare, run)


def find_gpu_peers(
    case: GpuCase, checkouts: Mapping[str, Path | None], names: tuple[str, ...] | None = None
) -> tuple[list[GpuPeer], dict[str, str]]:
    """The peers of a case that run here, and why each of the others does not.

    Args:
        case: what is measured.
        checkouts: ``rwkv_lm`` and ``vision_rwkv``: where they lie, or ``None``.
        names: only these; ``None`` means all.
    """
    found: list[GpuPeer] = []
    absent: dict[str, str] = {}

    def add(name: str, make: Callable[[], tuple[_Adapter, str]]) -> None:
        if names is not None and name not in names:
            return
        try:
            adapter, version = make()
        except Exception as error:  # an import or a build may fail in any way; that is a fact about it, not about us
            absent[name] = f"{type(error).__name__}: {_short(error)}"
        else:
            found.append(GpuPeer(name, version, *adapter))

    for name, (package, find) in PEERS.get(case.op, {}).items():
        add(name, lambda package=package, find=find: (find(case), metadata.version(package)))
    for which, ops in BUILT.items():
        for name, build in ops.get(case.op, {}).items():
            checkout = checkouts.get(which)
            if checkout is None:
                if names is None or name in names:
                    absent[name] = f"no checkout given (--{which.replace('_', '-')})"
            else:
                add(name, lambda build=build, checkout=checkout: build(checkout, case))
    for name, form in FORMS.get(case.op, {}).items():
        if case.op not in ("bi_wkv", "token_mix"):  # a loop over tokens; one that stacks its outputs
            add(name, lambda form=form: (_of_form(form), torch.__version__))
    return found, absent


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "error" in line.lower()] or lines
    return (told[0] if told else "")[:200]
