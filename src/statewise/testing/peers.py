"""Published packages that compute the same thing, behind our operators' own arguments.

Each adapter imports its package when asked, carries our layout over, and says which version it ran. Nothing here is a
dependency: a peer that is not installed is reported as absent.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["PEERS", "Peer", "find_peers", "rwkv_lm_loop"]

Run = Callable[[Mapping[str, Tensor]], Tensor]


class Peer(NamedTuple):
    """A runnable peer: inputs by our names → y, in our layout."""

    name: str
    version: str
    run: Run


def _transformers_wkv4() -> Run:
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu  # type: ignore[import-not-found]

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        # Theirs takes the stored decay, ours the log decay: log_w = -exp(time_decay).
        y, _ = rwkv_linear_attention_cpu(torch.log(-inputs["log_w"]), inputs["u"], inputs["k"], inputs["v"])
        return y  # type: ignore[no-any-return]

    return run


def _mambapy_scan() -> Run:
    from mambapy.mamba import MambaBlock, MambaConfig  # type: ignore[import-not-found]

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        channels, size = inputs["A"].shape
        block = MambaBlock(MambaConfig(d_model=max(channels // 2, 1), n_layers=1, d_state=size))
        skip = torch.zeros(channels)
        y = block.selective_scan(inputs["x"], inputs["dt"], inputs["A"], inputs["B"], inputs["C"], skip)
        return y  # type: ignore[no-any-return]

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


def rwkv_lm_loop(path: Path) -> Run:
    """The official torch loop of WKV-7, taken from RWKV-LM's `RWKV-v7/rwkv_v7_demo.py` at ``path``.

    The file is a script: only its function ``RWKV7_OP`` (the one with the loop) is compiled, the rest is not run.

    Raises:
        ValueError: no such function in the file.
    """
    tree = ast.parse(path.read_text("utf-8"))
    loops = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and node.name == "RWKV7_OP"
        and any(isinstance(inner, ast.For) for inner in ast.walk(node))
    ]
    if not loops:
        raise ValueError(f"{path}: no function RWKV7_OP with a loop")
    module = ast.Module(body=[loops[0]], type_ignores=[])

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        shape = inputs["r"].shape
        names: dict[str, Any] = {"torch": torch, "HEAD_SIZE": shape[-1], "DTYPE": torch.float32}
        exec(compile(module, str(path), "exec"), names)
        flat = {key: value.flatten(2) for key, value in inputs.items()}
        raw = torch.log(-flat["log_w"])
        y = names["RWKV7_OP"](flat["r"], raw, flat["k"], flat["v"], flat["a"], flat["b"])
        return y.reshape(shape)  # type: ignore[no-any-return]

    return run


#: Operator → peer's name → (package, how to find it).
PEERS: dict[str, dict[str, tuple[str, Callable[[], Run]]]] = {
    "wkv4": {"transformers": ("transformers", _transformers_wkv4)},
    "wkv7": {
        "fla-recurrence": ("fla-core", _fla_wkv7("dplr_recurrence")),
        "fla-chunkwise": ("fla-core", _fla_wkv7("dplr_chunkwise")),
    },
    "selective_scan": {"mambapy-pscan": ("mambapy", _mambapy_scan)},
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
