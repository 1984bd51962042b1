"""``statewise bench``: an operator's or a model's time and memory, beside installed peers and the machine's limit.

The limit of a row is the longer of two times on this machine, measured in the same run: moving every input and output
once (gradients too, with ``--backward``) as fast as a large copy goes, and doing the recurrence's multiply-adds as fast
as a large matrix product goes. A backward pass counts as twice the forward's arithmetic.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from statewise.cli import COMMANDS
from statewise.cli.options import Dtype, from_arguments

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Options", "main"]


@dataclass(frozen=True)
class Options:
    """What the command line may say."""

    target: Annotated[str, "an operator (`statewise backends` lists them) or a model's name"]
    lengths: Annotated[tuple[int, ...], "tokens in a row, one table row each"] = (128, 512, 1024)
    batch_size: Annotated[int, "rows"] = 2
    width: Annotated[int, "channels of the operator, or width of the model"] = 512
    num_layers: Annotated[int, "layers of a model"] = 2
    backends: Annotated[tuple[str, ...] | None, "which of ours to time; by default all that serve but the loop"] = None
    against: Annotated[tuple[str, ...] | None, "peers by name; by default all that are installed"] = None
    backward: Annotated[bool, "time forward and backward together instead of forward alone"] = True
    repeats: Annotated[int, "the median of this many timings is told"] = 5
    cap: Annotated[float, "leave out what would take longer than this many seconds, as its last row foretells"] = 20.0
    threads: Annotated[int | None, "how many threads torch may use"] = None
    device: Annotated[str, "where to run"] = "cpu"
    dtype: Annotated[Dtype, "precision of the inputs"] = "float32"
    json: Annotated[bool, "print one JSON document"] = False


_Runner = Callable[[Mapping[str, "Tensor"]], "Tensor"]


class _Contest(NamedTuple):
    """One length: what is computed, by whom (ours first), and how much work it is at least."""

    inputs: dict[str, Tensor]
    runners: dict[str, _Runner]
    flops: float  # of one forward pass


def main(arguments: Sequence[str]) -> int:
    """Run the command; see :func:`statewise.cli.main`."""
    options = from_arguments(Options, arguments, prog="statewise bench", description=COMMANDS["bench"])
    for name in ("batch_size", "width", "num_layers", "repeats"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; 1 or more is accepted")
    if not options.lengths or min(options.lengths) < 1:
        raise ValueError(f"--lengths is {options.lengths}; numbers of 1 or more are accepted")
    import torch

    from statewise.cli.checkpoints import find_device
    from statewise.cli.console import print_json, print_table, progress

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = find_device(options.device)
    peers, absent = _peers(options)
    roof = _Roof.of(device)
    rows: list[dict[str, Any]] = []
    with progress(len(options.lengths), f"bench {options.target}") as bar:
        for index, length in enumerate(options.lengths):
            bar(index, f"T = {length}")
            rows += _measure(options, length, device, roof, peers, rows)
        bar(len(options.lengths))
    if options.json:
        print_json(
            {
                "target": options.target,
                "backward": options.backward,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "copy_bytes_per_second": roof.bytes_per_second,
                "matmul_flops_per_second": roof.flops_per_second,
                "rows": rows,
                "absent": absent,
            }
        )
        return 0
    what = "forward and backward" if options.backward else "forward"
    print_table(
        ["T", "who", "ms", "ratio", "MiB", "of the limit"],
        [_cells(row) for row in rows],
        title=f"{options.target}, {what}, batch {options.batch_size}, width {options.width}, {options.dtype}, "
        f"{torch.get_num_threads()} threads",
    )
    for name, reason in absent.items():
        print(f"not timed: {name}: {reason}")
    return 0


def _cells(row: dict[str, Any]) -> list[str]:
    if "skipped" in row:
        return [str(row["length"]), row["who"], "-", "-", "-", row["skipped"]]
    return [
        str(row["length"]),
        row["who"],
        f"{row['seconds'] * 1e3:.2f}",
        f"{row['ratio']:.2f}",
        "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}",
        "-" if row["of_limit"] is None else f"{100 * row['of_limit']:.1f} %",
    ]


def _peers(options: Options) -> tuple[dict[str, _Runner], dict[str, str]]:
    """The peers asked for (by default all that are installed), and why others are not here.

    Raises:
        ValueError: a peer asked for by name that is unknown or not installed.
    """
    from statewise.testing.peers import PEERS, find_peers

    found, absent = find_peers(options.target)
    if options.against is None:
        return {f"{peer.name} {peer.version}": peer.run for peer in found}, absent
    for name in options.against:
        if name not in PEERS.get(options.target, {}):
            known = ", ".join(PEERS.get(options.target, {})) or "none"
            raise ValueError(f"--against: {options.target} has no peer called {name!r}; known: {known}")
        if name in absent:
            raise ValueError(f"--against {name}: {absent[name]}")
    return {f"{peer.name} {peer.version}": peer.run for peer in found if peer.name in options.against}, {}


def _measure(
    options: Options,
    length: int,
    device: torch.device,
    roof: _Roof,
    peers: dict[str, _Runner],
    before: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    contest = _contest(options, length, device)
    least = None
    if contest.flops:
        output = contest.inputs[_OUTPUT_LIKE[options.target]]
        moved = sum(leaf.nbytes for leaf in contest.inputs.values()) + output.nbytes
        factor = 2 if options.backward else 1
        least = max(factor * moved / roof.bytes_per_second, (2 * factor - 1) * contest.flops / roof.flops_per_second)
    rows: list[dict[str, Any]] = []
    for who, runner in {**contest.runners, **peers}.items():
        row: dict[str, Any] = {"length": length, "who": who}
        reason = _reason_to_skip(row, before, options.cap) or (_disagreement(contest, runner) if who in peers else None)
        if reason:
            rows.append({**row, "skipped": reason})
            continue
        seconds, peak = _timed(runner, contest.inputs, options)
        first = next((other["seconds"] for other in rows if "seconds" in other), seconds)
        times = {"seconds": seconds, "ratio": seconds / first, "peak_bytes": peak}
        rows.append({**row, **times, "of_limit": None if least is None else least / seconds})
    return rows


def _reason_to_skip(row: dict[str, Any], before: list[dict[str, Any]], cap: float) -> str | None:
    """Loops over ``x[:, t]`` have a backward pass that grows with the square of T."""
    earlier = [other for other in before if other["who"] == row["who"] and other["length"] < row["length"]]
    if not earlier:
        return None
    last = max(earlier, key=lambda other: int(other["length"]))
    if "skipped" in last:
        return str(last["skipped"])
    expected = last["seconds"] * (row["length"] / last["length"]) ** 2
    return f"would take about {expected:.0f} s" if expected > cap else None


def _disagreement(contest: _Contest, peer: _Runner) -> str | None:
    """Why ``peer`` is not timed: another answer than ours, or none."""
    import torch

    with torch.no_grad():
        ours = next(iter(contest.runners.values()))(contest.inputs).float()
        try:
            theirs = peer(contest.inputs).detach().float()
        except Exception as error:  # whatever a peer raises on these inputs is a fact about the peer
            return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    gap = float((theirs - ours).abs().max() / ours.abs().max())
    return None if gap < 1e-2 else f"differs from ours by {gap:.0e}"


def _timed(runner: _Runner, inputs: dict[str, Tensor], options: Options) -> tuple[float, int | None]:
    """Median seconds, and by how much the process's resident memory grew (``None`` where it cannot be told)."""
    import torch

    def once() -> None:
        with torch.set_grad_enabled(options.backward):
            output = runner(inputs)
            if options.backward:
                output.sum().backward()  # type: ignore[no-untyped-call]
                for leaf in inputs.values():
                    leaf.grad = None
        if output.device.type == "cuda":
            torch.cuda.synchronize()

    seconds: list[float] = []
    once()  # compiles, fills caches
    while len(seconds) < options.repeats and sum(seconds) < options.cap:
        started = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - started)
    from statewise.testing.memory import resident_peak

    before = resident_peak(reset=True)
    once()
    after = resident_peak(reset=False)
    peak = None if before is None or after is None else max(0, after - before)
    return statistics.median(seconds), peak


class _Roof(NamedTuple):
    """What this machine does at best, as measured now."""

    bytes_per_second: float
    flops_per_second: float

    @classmethod
    def of(cls, device: torch.device) -> _Roof:
        """A copy of 128 MiB and a product of two 1024 x 1024 matrices, the best of a few."""
        import torch

        source, size = torch.ones(1 << 25, device=device), 1024
        target, matrix = torch.empty_like(source), torch.ones(size, size, device=device)

        def best(work: Callable[[], object]) -> float:
            times = []
            for _ in range(6):
                started = time.perf_counter()
                work()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - started)
            return min(times)

        copied, multiplied = best(lambda: target.copy_(source)), best(lambda: matrix @ matrix)
        return cls(2 * source.nbytes / copied, 2 * size**3 / multiplied)


# Which input the output is shaped like.
_OUTPUT_LIKE = {
    "bi_wkv": "v",
    "causal_conv1d": "x",
    "mamba3-op": "x",
    "selective_scan": "x",
    "ssd": "x",
    "token_mix": "x",
    "token_shift": "x",
    "wkv4": "v",
    "wkv6": "v",
    "wkv7": "v",
}


def _contest(options: Options, length: int, device: torch.device) -> _Contest:
    import torch

    from statewise import ops
    from statewise.cli.checkpoints import DTYPES
    from statewise.models import create, list_models
    from statewise.testing.peers import ours

    name, batch, width = options.target, options.batch_size, options.width
    if name in list_models("language"):
        model = create(name, vocab_size=256, num_layers=options.num_layers, width=width)
        model = model.to(device=device, dtype=DTYPES[options.dtype])
        tokens = torch.randint(256, (batch, length), device=device)
        return _Contest({}, {f"statewise {name}": lambda _: model(tokens)[0]}, 0.0)
    if name not in _OUTPUT_LIKE:
        raise ValueError(
            f"nothing called {name!r} to time; known: {', '.join([*_OUTPUT_LIKE, *list_models('language')])}"
        )
    inputs, flops = _INPUTS[name](torch.Generator().manual_seed(0), batch, length, width)
    inputs = {
        key: leaf.to(device=device, dtype=DTYPES[options.dtype]).requires_grad_(options.backward)
        for key, leaf in inputs.items()
    }

    op = name.removesuffix("-op")  # where a model has the same name
    served = [backend for backend, status in reversed(ops.backends()[op].items()) if status.serves]
    wanted = [backend for backend in served if backend != "reference"] if options.backends is None else options.backends
    runners = {f"statewise {backend}": ours(op, backend) for backend in wanted}
    return _Contest(inputs, runners, flops)


_Inputs = tuple[dict[str, "Tensor"], float]


def _wkv4(generator: torch.Generator, batch: int, length: int, width: int) -> _Inputs:
    import torch

    k, v = torch.randn(2, batch, length, width, generator=generator)
    log_w, u = -torch.rand(width, generator=generator), torch.randn(width, generator=generator)
    return {"k": k, "v": v, "log_w": log_w, "u": u}, 12.0 * k.numel()


def _bi_wkv(generator: torch.Generator, batch: int, length: int, width: int) -> _Inputs:
    inputs, flops = _wkv4(generator, batch, length, width)
    return inputs, 2 * flops


def _wkv6(generator: torch.Generator, batch: int, length: int, width: int) -> _Inputs:
    import torch

    if width % 64:
        raise ValueError(f"--width is {width}; wkv6 has heads of 64, so a multiple of 64 is accepted")
    heads = (batch, length, width // 64, 64)
    r, k, v, decay = torch.randn(4, *heads, generator=generator)
    inputs = {"r": r, "log_w": -torch.exp(decay - 2), "k": k, "v": v}
    # A step decays the state, reads it once and adds to it once: 5 operations an entry.
    return {**inputs, "u": torch.randn(heads[2:], generator=generator)}, 5.0 * r.numel() * 64


def _wkv7(generator: torch.Generator, batch: int, length: int, width: int) -> _Inputs:
    import torch

    if width % 64:
        raise ValueError(f"--width is {width}; wkv7 has heads of 64, so a multiple of 64 is accepted")
    heads = (batch, length, width // 64, 64)
    r, k, v, direction, decay, rate = torch.randn(6, *heads, generator=generator)
    direction = torch.nn.functional.normalize(direction, dim=-1)
    inputs = {"r": r, "log_w": -0.6065306597 * decay.sigmoid(), "k": k, "v": v, "a": -direction}
    # A step decays the state, reads it twice and adds to it twice: 9 operations an entry.
    return {**inputs, "b": direction * rate.sigmoid()}, 9.0 * r.numel() * 64


def _selective_scan(generator: torch.Generator, batch: int, length: int, width: int) -> _Inputs:
    import torch

    N = 16
    x, dt = torch.randn(2, batch, length, width, generator=generator)
    B, C = torch.randn(2, batch, length, N, generator=generator)
    A = -torch.arange(1.0, N + 1).repeat(width, 1)
    return {"x": x, "dt": torch.nn.functional.softplus(dt - 3), "A": A, "B": B, "C": C}, 7.0 * x.numel() * N


def _ssd(generator: torch.Generator, batch: int, length: int, width: int) -> _Inputs:
    import torch

    if width % 64:
        raise ValueError(f"--width is {width}; ssd is timed with heads of 64, so a multiple of 64 is accepted")
    N, heads = 128, width // 64
    x = torch.randn(batch, length, heads, 64, generator=generator)
    dt = torch.nn.functional.softplus(torch.randn(batch, length, heads, generator=generator) - 3)
    B, C = torch.randn(2, batch, length, 1, N, generator=generator)
    return {"x": x, "dt": dt, "A": -torch.arange(1.0, heads + 1), "B": B, "C": C}, 5.0 * x.numel() * N


def _mamba3(generator: torch.Generator, batch: int, length: int, width: int) -> _Inputs:
    import torch

    if width % 64:
        raise ValueError(f"--width is {width}; mamba3 is timed with heads of 64, so a multiple of 64 is accepted")
    N, heads = 128, width // 64
    x, rates = torch.randn(batch, length, heads, 64, generator=generator), (batch, length, heads)
    B, C = torch.randn(2, batch, length, 1, N, generator=generator)
    dt = torch.nn.functional.softplus(torch.randn(rates, generator=generator) - 3)
    trap, angles = torch.randn(rates, generator=generator), torch.randn(*rates, N // 4, generator=generator)
    C_bias, B_bias = torch.ones(2, heads, N)
    inputs = {"C": C, "B": B, "x": x, "log_decay": -dt, "dt": dt, "trap": trap, "angles": angles}
    return {**inputs, "C_bias": C_bias, "B_bias": B_bias}, 7.0 * x.numel() * N


def _token_mix(generator: torch.Generator, batch: int, length: int, width: int) -> _Inputs:
    import torch

    x = torch.randn(batch, length, width, generator=generator)
    return {"x": x, "mix": torch.rand(3, width, generator=generator)}, 7.0 * x.numel()


def _causal_conv1d(generator: torch.Generator, batch: int, length: int, width: int) -> _Inputs:
    import torch

    x = torch.randn(batch, length, width, generator=generator)
    return {"x": x, "weight": torch.randn(width, 4, generator=generator)}, 8.0 * x.numel()


def _token_shift(generator: torch.Generator, batch: int, length: int, width: int) -> _Inputs:
    import torch

    x = torch.randn(batch, length, width, generator=generator)
    return {"x": x}, 1.0 * x.numel()


_INPUTS: dict[str, Callable[[torch.Generator, int, int, int], _Inputs]] = {
    "bi_wkv": _bi_wkv,
    "causal_conv1d": _causal_conv1d,
    "mamba3-op": _mamba3,
    "selective_scan": _selective_scan,
    "ssd": _ssd,
    "token_mix": _token_mix,
    "token_shift": _token_shift,
    "wkv4": _wkv4,
    "wkv6": _wkv6,
    "wkv7": _wkv7,
}
