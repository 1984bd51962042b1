"""Published packages that compute the same thing, behind our operators' own arguments.

Each adapter imports its package when asked, carries our layout over, and says which version it ran. Nothing here is a
dependency: a peer that is not installed is reported as absent.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from statewise import ops

__all__ = ["PEERS", "Peer", "Run", "find_peers", "join", "ours", "rwkv_lm_loop"]

Run = Callable[[Mapping[str, Tensor]], Tensor]


class Peer(NamedTuple):
    """A runnable peer. ``run`` takes the inputs by our operator's names and layouts, and returns y in ours."""

    name: str
    version: str
    run: Run


def join(ys: Tensor | Sequence[Tensor]) -> Tensor:
    """One tensor of what an operator returns: token_mix has several outputs, stacked along a new first axis."""
    return ys if isinstance(ys, Tensor) else torch.stack(list(ys))


def ours(op: str, backend: str, **options: Any) -> Run:
    """Our own operator, as a peer is run: one tensor, whatever the operator returns."""
    function = getattr(ops, op)

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        result = function(**inputs, **options, backend=backend)
        return join(result if isinstance(result, Tensor) else result[0])  # bi_wkv has no state

    return run


def _transformers_wkv4() -> Run:
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        # Theirs takes the stored decay, ours the log decay: log_w = -exp(time_decay).
        y, _ = rwkv_linear_attention_cpu(torch.log(-inputs["log_w"]), inputs["u"], inputs["k"], inputs["v"])
        return y  # type: ignore[no-any-return]

    return run


def _mambapy_scan() -> Run:
    from mambapy.mamba import MambaBlock, MambaConfig  # type: ignore[import-not-found]

    # The scan is a method that reads its arguments alone: the block it belongs to may be of any size.
    block = MambaBlock(MambaConfig(d_model=2, n_layers=1))

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        x = inputs["x"]
        skip = torch.zeros(x.shape[-1], dtype=x.dtype, device=x.device)
        return block.selective_scan(x, inputs["dt"], inputs["A"], inputs["B"], inputs["C"], skip)  # type: ignore[no-any-return]

    return run


def _fla_wkv7(name: str) -> Callable[[], Run]:
    def find() -> Run:
        from fla.ops.generalized_delta_rule.dplr import naive  # type: ignore[import-not-found]

        function = getattr(naive, name)

        def run(inputs: Mapping[str, Tensor]) -> Tensor:
            r, log_w, k, v, a, b = (inputs[key].transpose(1, 2) for key in ("r", "log_w", "k", "v", "a", "b"))
            # Theirs scales the query by 1/sqrt(K), which RWKV-7 does not.
            y, _ = function(r * r.shape[-1] ** 0.5, k, v, a, b, log_w)
            return y.transpose(1, 2)  # type: ignore[no-any-return]

        return run

    return find


def _fla_wkv6() -> Run:
    from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6  # type: ignore[import-not-found]

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        log_w = inputs["log_w"]  # theirs has no constant decay
        log_w = (log_w[:, None] if log_w.dim() == 1 else log_w).expand_as(inputs["k"])
        r, log_w, k, v = (x.transpose(1, 2) for x in (inputs["r"], log_w, inputs["k"], inputs["v"]))
        y, _ = naive_recurrent_rwkv6(r, k, v, log_w, inputs["u"], scale=1.0)
        return y.transpose(1, 2)  # type: ignore[no-any-return]

    return run


def _transformers_ssd(chunk: int) -> Callable[[], Run]:
    def find() -> Run:
        from transformers.models.mamba2 import modeling_mamba2

        function = modeling_mamba2.mamba2_chunk_scan

        def run(inputs: Mapping[str, Tensor]) -> Tensor:
            y = function(*[inputs[name] for name in ("x", "dt", "A", "B", "C")], chunk_size=chunk)
            return y[0] if isinstance(y, tuple) else y  # type: ignore[no-any-return]

        return run

    return find


def rwkv_lm_loop(path: Path) -> Peer:
    """The official torch loop of WKV-7, from a checkout of RWKV-LM, which publishes no package.

    The file is a script: only its function ``RWKV7_OP`` (the one with the loop) is compiled, the rest is not run. The
    version told is the start of the file's SHA-256.

    Args:
        path: the checkout, or its file ``RWKV-v7/rwkv_v7_demo.py``.

    Raises:
        ValueError: no such file, or no such function in it.
    """
    file = path / "RWKV-v7" / "rwkv_v7_demo.py" if path.is_dir() else path
    try:
        source = file.read_bytes()
        tree = ast.parse(source)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"path: cannot read {file} as a Python file: {error}") from error
    loops = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and node.name == "RWKV7_OP"
        and any(isinstance(inner, ast.For) for inner in ast.walk(node))
    ]
    if not loops:
        raise ValueError(f"path: {file} has no function RWKV7_OP with a loop")
    names: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module(body=[loops[0]], type_ignores=[]), str(file), "exec"), names)

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        shape = inputs["r"].shape
        names.update(HEAD_SIZE=shape[-1], DTYPE=inputs["v"].dtype)  # globals of the script
        flat = {key: value.flatten(2) for key, value in inputs.items()}
        raw = torch.log(-flat["log_w"])
        y = names["RWKV7_OP"](flat["r"], raw, flat["k"], flat["v"], flat["a"], flat["b"])
        return y.reshape(shape)  # type: ignore[no-any-return]

    return Peer("RWKV-LM loop", f"sha256 {hashlib.sha256(source).hexdigest()[:12]}", run)


#: Operator → peer's name → (package, how to find it).
PEERS: dict[str, dict[str, tuple[str, Callable[[], Run]]]] = {
    "wkv4": {"transformers": ("transformers", _transformers_wkv4)},
    "wkv7": {
        "fla-recurrence": ("fla-core", _fla_wkv7("dplr_recurrence")),
        "fla-chunkwise": ("fla-core", _fla_wkv7("dplr_chunkwise")),
    },
    "wkv6": {"fla-naive": ("fla-core", _fla_wkv6)},
    "selective_scan": {"mambapy-pscan": ("mambapy", _mambapy_scan)},
    "ssd": {
        "transformers-64": ("transformers", _transformers_ssd(64)),
        "transformers-256": ("transformers", _transformers_ssd(256)),
    },
}


def find_peers(op: str) -> tuple[list[Peer], dict[str, str]]:
    """The peers of ``op`` that run here, and for each of the others why it does not."""
    found: list[Peer] = []
    absent: dict[str, str] = {}
    for name in PEERS.get(op, {}):
        result = _find(op, name)
        if isinstance(result, Peer):
            found.append(result)
        else:
            absent[name] = result
    return found, absent


def _find(op: str, name: str) -> Peer | str:
    package, find = PEERS[op][name]
    try:
        return Peer(name, metadata.version(package), find())
    except Exception as error:  # a peer's own import may fail in any way; that is a fact about it, not about us
        return f"{type(error).__name__}: {error}"
