"""GPU kernels without a GPU: compiled ahead of time, and the bytes they move counted.

    python -m benchmarks.gpu_ahead [--capabilities 80,90,100] [--ops wkv7,...] [--out JSON]

Every operator runs on CPU tensors that nobody fills, its launches noted instead of made. Each distinct launch is
compiled for each architecture, and the assembler's own report read: registers, bytes of stack (spilled registers) and
shared memory; and, from the intermediate code, how often matrix products are made. At the published shape, the tensors
of all launches are added up: what is read and written at least once a launch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_cases import CASES, GpuCase
from benchmarks.machine import describe
from statewise import ops
from statewise.files import atomic_write
from statewise.ops import gpu

__all__ = ["compile_launch", "count_bytes", "launches", "main", "repeated"]

_NAMES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


def launches(case: GpuCase, dtype: torch.dtype, *, full: bool = False) -> tuple[list[gpu.Launch], list[gpu.Launch]]:
    """What forward alone, and forward with backward launch at a published shape (``full``), or at few tokens of it."""
    small = {} if full else {"batch": 1, "time": 128}
    arguments = case.arguments(torch.empty, dtype, "cpu", **small)
    function, options = getattr(ops, case.op), dict(case.options or {})
    with gpu.capture() as forward, torch.no_grad():
        function(**arguments, **options, backend="triton")
    with gpu.capture() as both:
        result = function(**{n: x.requires_grad_() for n, x in arguments.items()}, **options, backend="triton")
        y = result if isinstance(result, Tensor) else result[0]
        ys = [y] if isinstance(y, Tensor) else list(y)
        torch.autograd.grad(ys, list(arguments.values()), [torch.empty_like(x) for x in ys], allow_unused=True)
    return forward, both


def count_bytes(noted: Sequence[gpu.Launch]) -> int:
    """Bytes of the distinct tensors of every launch."""
    total = 0
    for one in noted:
        seen = {x.data_ptr(): x.nbytes for x in one.arguments.values() if isinstance(x, Tensor) and x.numel()}
        total += sum(seen.values())
    return total


def signature(one: gpu.Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Types, compile-time arguments and what is known of alignment, as a real launch would have them."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    known: dict[tuple[int], Any] = {}
    for index, parameter in enumerate(one.kernel.params):
        value = one.arguments[parameter.name]
        divisible = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            types[parameter.name] = f"*{_NAMES[value.dtype]}"
            known[(index,)] = divisible
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            types[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, float):
            types[parameter.name] = "fp32"
        else:
            types[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                known[(index,)] = divisible
    return types, constants, known


def repeated(ttgir: str) -> float:
    """How often a kernel's matrix products are made, on average over their multiply-adds as the code spells them (a
    loop counts once): above 1 where warps laid along one axis reach past the tile, and make the same rows again.

    Nothing is repeated on Blackwell's tensor memory, where no warp holds a product. 1 without any.
    """
    layouts = {}
    for name, said in re.findall(r"^(#\w+) = #ttg\.nvidia_mma<\{(.*?)\}>", ttgir, re.M):
        warps, shape = (re.search(rf"{key} = \[([\d, ]+)\]", said) for key in ("warpsPerCTA", "instrShape"))
        assert warps is not None, said
        assert shape is not None, said
        layouts[name] = [[int(n) for n in found[1].split(",")][:2] for found in (warps, shape)]
    made = needed = 0.0
    number = r"(?:tensor|!ttg\.memdesc)<(\d+)x(\d+)x"
    products = rf"(?:tt\.dot|warp_group_dot) .*? : {number}.*? \* {number}.*? -> tensor<\d+x\d+xf(?:32|64), (#\w+)>"
    for rows, inner, _, columns, layout in re.findall(products, ttgir):
        work, times = int(rows) * int(inner) * int(columns), 1.0
        for size, warps, tile in zip((rows, columns), *layouts.get(layout, [[1, 1]] * 2), strict=True):
            times *= max(1.0, warps * tile / int(size))
        made, needed = made + work * times, needed + work
    return made / needed if needed else 1.0


def compile_launch(one: gpu.Launch, capability: int) -> dict[str, float]:
    """Compile for ``sm_CAPABILITY``; registers, stack and shared bytes of the machine code, and what is
    :func:`repeated`.

    Raises:
        RuntimeError: this process runs kernels in the interpreter, where nothing is compiled.
    """
    if gpu.interpreting():
        raise RuntimeError("TRITON_INTERPRET is set: nothing can be compiled in this process")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, known = signature(one)
    source = ASTSource(one.kernel, signature=types, constexprs=constants, attrs=known)
    options = {**one.options, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report.stdout)
    if found is None:
        raise RuntimeError(f"no resource report for {one.kernel.__name__}: {report.stdout[:200]}")
    registers, stack, _, local = map(int, found.groups())
    return {
        "registers": registers,
        "spilled_bytes": stack + local,
        "shared_bytes": compiled.metadata.shared,
        "repeated": round(repeated(compiled.asm["ttgir"]), 2),
    }


def _distinct(noted: Sequence[gpu.Launch]) -> list[gpu.Launch]:
    return list({(one.kernel.__name__, str(signature(one)), str(one.options)): one for one in noted}.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if any kernel spills."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_ahead", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--capabilities", default="80,90,100")
    parser.add_argument("--ops", default="", help="only these, comma separated")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--out", type=Path, metavar="JSON")
    chosen = parser.parse_args(arguments)
    results: list[dict[str, Any]] = []
    spilled = 0
    for case in CASES:
        if chosen.ops and case.op not in chosen.ops.split(","):
            continue
        for name in chosen.dtypes.split(","):
            dtype = getattr(torch, name)
            real = launches(case, dtype, full=True)
            moved = [count_bytes(noted) for noted in real]
            unit = case.arguments(torch.empty, dtype, "cpu")[next(iter(case.shapes))].nbytes
            entry: dict[str, Any] = {"case": case.label, "dtype": name, "bytes_forward": moved[0]}
            entry |= {"bytes_both": moved[1], "tensors": [round(m / unit, 2) for m in moved], "floor": case.floor}
            entry["kernels"] = []
            print(f"{case.label} {name}: {entry['tensors']} tensors moved, floor {list(case.floor)}", flush=True)
            for one in _distinct(real[1]):
                for capability in map(int, chosen.capabilities.split(",")):
                    used = compile_launch(one, capability)
                    spilled += used["spilled_bytes"] > 0
                    entry["kernels"].append({"kernel": one.kernel.__name__, "sm": capability, **one.options, **used})
                    print(f"  {one.kernel.__name__:24} sm_{capability} {used}", flush=True)
            results.append(entry)
    if chosen.out is not None:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(chosen.out, json.dumps({"kind": "gpu ahead", "machine": describe(), "results": results}, indent=1))
    return int(spilled > 0)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    raise SystemExit(main())
