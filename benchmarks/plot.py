"""Results as pictures, and as tables for the README.

python -m benchmarks.plot benchmarks/results/DATE-ops-cpu.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from statewise.files import atomic_write

__all__ = [
    "curves_table",
    "draw_accuracies",
    "draw_curves",
    "draw_decode",
    "draw_gpu",
    "draw_growth",
    "draw_images",
    "gpu_table",
    "growth_table",
    "models_table",
]

#: Everyday compressors' score on the language models' test split is drawn beside theirs.
COMPRESSORS = ("gzip", "xz")


def draw_growth(document: Mapping[str, Any], path: Path) -> None:
    """Time over T, both axes logarithmic, one panel an operator; a grey line shows what linear growth looks like.

    Ours, the first of each operator, is drawn thick."""
    figure, save = _figure(path)
    rows = [row for row in document["rows"] if "both_ms" in row]
    names = list(dict.fromkeys(row["op"] for row in rows))
    columns = min(3, max(1, len(names)))
    lines = -(-len(names) // columns)
    figure.set_size_inches(5 * columns, 4.2 * lines)
    for index, op in enumerate(names):
        axis = figure.add_subplot(lines, columns, index + 1)
        mine = [row for row in rows if row["op"] == op]
        lengths = sorted({row["T"] for row in mine})
        for who in dict.fromkeys(row["who"] for row in mine):
            points = [(row["T"], row["both_ms"]) for row in mine if row["who"] == who]
            thick = who == mine[0]["who"]
            axis.loglog(*zip(*points, strict=True), marker="o", label=who, linewidth=2.5 if thick else 1.2)
        start = min(row["both_ms"] for row in mine if row["T"] == lengths[0])
        linear = [start * length / lengths[0] for length in lengths]
        axis.loglog(lengths, linear, color="grey", linestyle=":", linewidth=1, label="linear in T")
        axis.set(title=f"{op} ({mine[0]['shape']}, {document['dtype']})", xlabel="T", ylabel="forward + backward, ms")
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save()


def growth_table(document: Mapping[str, Any]) -> str:
    """Markdown, one table an operator: milliseconds forward / forward and backward over T, and how they grow."""
    exponents = {(entry["op"], entry["who"]): entry for entry in document["growth"]}
    tables = []
    for op in dict.fromkeys(row["op"] for row in document["rows"]):
        mine = [row for row in document["rows"] if row["op"] == op]
        lengths = sorted({row["T"] for row in mine})
        cells = {(row["who"], row["T"]): row for row in mine}
        lines = [["", *(f"T = {length}" for length in lengths), "growth", "memory"]]
        for who in dict.fromkeys(row["who"] for row in mine):
            timed = [cells[who, length] for length in lengths if "both_ms" in cells.get((who, length), {})]
            times = [
                f"{_short(row['forward_ms'])} / {_short(row['both_ms'])}" if "both_ms" in row else "–"
                for row in (cells.get((who, length), {}) for length in lengths)
            ]
            entry = exponents.get((op, who))
            grown = f"T^{entry['exponent']:.2f}" if entry else "–"
            held = f"{timed[-1]['peak_mib']} MiB at {timed[-1]['T']}" if timed and "peak_mib" in timed[-1] else "–"
            lines.append([who, *times, grown, held])
        title = f"`{op}`, {mine[0]['shape']}, {document['dtype']}, ms forward / forward and backward:"
        tables.append(f"{title}\n\n{_markdown(lines)}")
    return "\n\n".join(tables) + "\n"


def draw_gpu(document: Mapping[str, Any], path: Path) -> None:
    """Time of forward and backward over T, at about as many tokens in all, one panel a case.

    Ours is drawn thick; grey is what the memory's speed allows for the least that must be moved."""
    figure, save = _figure(path)
    cases = [case for case in document["cases"] if any("both_ms" in row for row in case["rows"])]
    columns = min(3, max(1, len(cases)))
    lines = max(1, -(-len(cases) // columns))
    figure.set_size_inches(5.4 * columns, 4.2 * lines)
    for index, case in enumerate(cases):
        axis = figure.add_subplot(lines, columns, index + 1)
        rows = [row for row in case["rows"] if "both_ms" in row]
        for who in dict.fromkeys(row["who"] for row in rows):
            points = [(row["T"], row["both_ms"]) for row in rows if row["who"] == who]
            style = {"linewidth": 2.5} if who == "statewise triton" else {"linewidth": 1.2}
            style |= {"linestyle": "--"} if who == "torch SDPA" else {}
            axis.loglog(*zip(*points, strict=True), marker="o", markersize=4, label=who, **style)
        least = sorted({(row["T"], row["both_floor_ms"]) for row in rows if row.get("both_floor_ms")})
        if least:
            axis.loglog(*zip(*least, strict=True), color="grey", linestyle=":", label="memory's speed")
        lengths = sorted({row["T"] for row in rows})
        axis.set(title=case["label"], xlabel="T, at B x T of the title", ylabel="forward + backward, ms")
        axis.set_xticks(lengths, [_thousands(length) for length in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    if document["rehearsal"]:
        figure.suptitle("A rehearsal on a CPU: times without a meaning")
    save()


def gpu_table(document: Mapping[str, Any]) -> str:
    """Markdown, a table a case at its own shape and one over T, then who was not there and why."""
    parts = []
    accelerator = document["machine"]["accelerator"]
    copy, product = document["copy_bytes_per_second"] / 1e12, document["matmul_flops_per_second"] / 1e12
    parts.append(
        f"{accelerator.get('name', accelerator['device'])}, {document['dtype']}: copies {copy:.2f} TB/s, matrix "
        f"products {product:.0f} TFLOP/s"
    )
    if document["rehearsal"]:
        parts.append("A rehearsal on a CPU: no time here means anything.")
    for case in document["cases"]:
        parts.append(f"**{case['label']}**\n\n{_markdown(_case_lines(case))}")
        lengths = sorted({row["T"] for row in case["rows"]})
        if len(lengths) > 1:
            cells = {(row["who"], row["T"]): row for row in case["rows"]}
            lines = [["ms, forward / both", *(f"T = {_thousands(length)}" for length in lengths)]]
            for who in dict.fromkeys(row["who"] for row in case["rows"]):
                found = [cells.get((who, length), {}) for length in lengths]
                lines.append([who, *map(_times, found)])
            parts.append(_markdown(lines))
        told = [f"{who}: {reason}" for who, reason in case["absent"].items()]
        told += [f"{who}: {found['failed']}" for who, found in case["errors"].items() if "failed" in found]
        told += [f"{r['who']} at T = {r['T']}: {r['skipped']}" for r in case["rows"] if "skipped" in r]
        if told:
            parts.append("Not timed: " + "; ".join(dict.fromkeys(told)) + ".")
    for name, label in (("faults", "FAULTS"), ("left_out", "Left out, for want of time")):
        if document[name]:
            parts.append(f"{label}: " + "; ".join(document[name]))
    return "\n\n".join(parts) + "\n"


def _case_lines(case: Mapping[str, Any]) -> list[list[str]]:
    batch, time = case["own"]
    rows = [row for row in case["rows"] if (row["B"], row["T"]) == (batch, time)]
    head = ["", "forward ms", "both ms", "of floor", "of bandwidth", "of matmul", "peak MiB"]
    head += ["y off", "gradients off", "alike keys"]
    lines = [head]
    for row in rows:
        if "both_ms" not in row:
            continue
        errors = case["errors"].get(row["who"], {})
        peak = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        lines.append(
            [row["who"], _short(row["forward_ms"]), _short(row["both_ms"])]
            + [_pair(row, key) for key in ("of_floor", "of_bandwidth", "of_matmul")]
            + [peak, _worst(errors.get("random"), True), _worst(errors.get("random"), False)]
            + [_worst(errors.get("alike"), None)]
        )
    return lines


def _pair(row: Mapping[str, Any], key: str) -> str:
    found = [row.get(f"{kind}_{key}") for kind in ("forward", "both")]
    return "–" if found == [None, None] else " / ".join("–" if x is None else f"{x:.2f}" for x in found)


def _worst(errors: Mapping[str, float] | None, output: bool | None) -> str:
    """The largest error: of y (``True``), of gradients (``False``), of all (``None``)."""
    found = {name: x for name, x in (errors or {}).items() if output is None or (name == "y") is output}
    if not found:
        return "–"
    name = max(found, key=lambda key: found[key])
    return f"{found[name]:.1e}" + ("" if name == "y" else f" ({name})")


def _times(row: Mapping[str, Any]) -> str:
    return f"{_short(row['forward_ms'])} / {_short(row['both_ms'])}" if "both_ms" in row else "–"


def _thousands(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else str(length)


def draw_decode(document: Mapping[str, Any], path: Path) -> None:
    """Tokens a second over the batch, one panel a model; dashed: kernel by kernel, full: as a CUDA graph."""
    figure, save = _figure(path)
    rows = [row for row in document["rows"] if row["task"] == "decode" and "tokens_per_second" in row]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure.set_size_inches(5.4 * max(1, len(models)), 4.4)
    for index, model in enumerate(models):
        axis = figure.add_subplot(1, len(models), index + 1)
        mine = [row for row in rows if row["model"] == model]
        for how in dict.fromkeys(row["how"] for row in mine):
            points = [(row["batch"], row["tokens_per_second"]) for row in mine if row["how"] == how]
            style = "--" if how == "eager" else "-"
            axis.loglog(*zip(*points, strict=True), style, marker="o", label=how)
        roofs = [(row["batch"], row["roof"]) for row in mine if row["how"] == mine[0]["how"] and "roof" in row]
        if roofs:
            axis.loglog(*zip(*roofs, strict=True), color="grey", linestyle=":", label="memory's speed")
        batches = sorted({row["batch"] for row in mine})
        axis.set(title=model, xlabel="sequences at a time", ylabel="tokens a second, all together")
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    if document["rehearsal"]:
        figure.suptitle("A rehearsal on a CPU: times without a meaning")
    save()


def models_table(document: Mapping[str, Any]) -> str:
    """Markdown: training over context, decoding over batch."""
    parts = ["A rehearsal on a CPU: no time here means anything."] if document["rehearsal"] else []
    training = [row for row in document["rows"] if row["task"] == "training"]
    if training:
        lines = [["training, tokens/s", "parameters", "context", "eager", "compiled", "peak GiB"]]
        for key in dict.fromkeys((row["model"], row["context"]) for row in training):
            mine = {row["how"]: row for row in training if (row["model"], row["context"]) == key}
            any_row = next(iter(mine.values()))
            peak = next((row["peak_bytes"] for row in mine.values() if row.get("peak_bytes")), None)
            lines.append(
                [key[0], f"{any_row['parameters'] / 1e6:.0f} M", str(key[1])]
                + [_speed(mine.get(how, {})) for how in ("eager", "compiled")]
                + ["–" if peak is None else f"{peak / 2**30:.1f}"]
            )
        parts.append(_markdown(lines))
    decode = [row for row in document["rows"] if row["task"] == "decode"]
    if decode:
        batches = sorted({row["batch"] for row in decode})
        lines = [["decoding, tokens/s", "", *(f"batch {batch}" for batch in batches)]]
        for model, how in dict.fromkeys((row["model"], row["how"]) for row in decode):
            mine = {row["batch"]: row for row in decode if (row["model"], row["how"]) == (model, how)}
            lines.append([model, how, *(_speed(mine.get(batch, {})) for batch in batches)])
        parts.append(_markdown(lines))
    told = dict.fromkeys(f"{r['model']}, {r['how']}: {r['skipped']}" for r in document["rows"] if "skipped" in r)
    if told:
        parts.append("Not timed: " + "; ".join(told) + ".")
    if document["left_out"]:
        parts.append("Left out, for want of time: " + "; ".join(document["left_out"]))
    return "\n\n".join(parts) + "\n"


def _speed(row: Mapping[str, Any]) -> str:
    if "tokens_per_second" not in row:
        return "–"
    part = f" ({row['of_roof']:.2f})" if "of_roof" in row else ""
    return f"{row['tokens_per_second']:,.0f}{part}"


def draw_curves(document: Mapping[str, Any], path: Path) -> None:
    """Bits per byte of the text as it was first read, over time; compressors' score as dashed lines."""
    figure, save = _figure(path)
    axis = figure.add_subplot()
    for result in document["results"]:
        minutes = [point["seconds"] / 60 for point in result["curve"]]
        label = f"{result['model']}: test {result['test_bits_per_byte']:.3f}, {result['parameters'] / 1e6:.2f} M"
        line = axis.plot(minutes, [p["bits_per_byte"] for p in result["curve"]], label=label, linewidth=1.3)[0]
        if minutes:
            axis.plot(minutes[-1], result["test_bits_per_byte"], "o", color=line.get_color(), markersize=5)
    for name in COMPRESSORS:
        bits = document["compressors"][name]
        axis.axhline(bits, color="grey", linestyle="--", linewidth=0.8)
        axis.text(0, bits, f" {name} {bits:.2f}", fontsize=8, va="bottom", color="grey")
    settings = document["settings"]
    axis.set(
        title=f"{settings['data']}, context {settings['context']}, batch {settings['batch_size']}; dots: test split",
        xlabel=f"minutes of training, {document['machine']['threads']} threads"
        if settings["device"] == "cpu"
        else "minutes",
        ylabel="bits per byte, text not seen before",
        ylim=(1.2, 4.5),
    )
    axis.grid(alpha=0.3)
    axis.legend()
    save()


def curves_table(document: Mapping[str, Any]) -> str:
    """Markdown: what each model read in its time, and what it scores on the test split."""
    lines = [["", "layers x width", "parameters", "tokens/s", "tokens read", "bits per byte, test"]]
    for result in document["results"]:
        size, read = f"{result['parameters'] / 1e6:.2f} M", f"{result['tokens'] / 1e6:.2f} M"
        shape = f"{result['layers']} x {document['settings']['width']}"
        score = f"{result['test_bits_per_byte']:.3f}"
        lines.append([result["model"], shape, size, str(result["tokens_per_second"]), read, score])
    lines += [[name, "", "", "", "", f"{document['compressors'][name]:.2f}"] for name in COMPRESSORS]
    return _markdown(lines) + "\n"


def draw_accuracies(document: Mapping[str, Any], path: Path) -> None:
    """Share of test images classified rightly, over time of training."""
    figure, save = _figure(path)
    axis = figure.add_subplot()
    for result in document["results"]:
        minutes = [point["seconds"] / 60 for point in result["curve"]]
        label = f"{result['model']}: {100 * result['top1']:.1f} %, {result['parameters'] / 1e6:.2f} M"
        axis.plot(minutes, [100 * point["top1"] for point in result["curve"]], marker="o", label=label)
    axis.set(
        title=f"{document['settings']['data']}: top-1 on test images",
        xlabel=f"minutes of training, {document['machine']['threads']} threads",
        ylabel="%",
    )
    axis.grid(alpha=0.3)
    axis.legend()
    save()


def draw_images(document: Mapping[str, Any], path: Path) -> None:
    """Time and memory over the number of patches, both axes logarithmic: a column a task, dashed for half."""
    figure, save = _figure(path)
    rows = document["rows"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    figure.set_size_inches(5.5 * len(tasks), 8)
    for column, task in enumerate(tasks):
        for line, (key, label) in enumerate((("ms", "milliseconds an image"), ("peak_mib", "MiB at their most"))):
            axis = figure.add_subplot(2, len(tasks), line * len(tasks) + column + 1)
            for index, who in enumerate(dict.fromkeys(row["who"] for row in rows)):
                for precision, style in zip(precisions, ("-", "--"), strict=False):
                    mine = [r for r in rows if (r["who"], r["task"], r["precision"]) == (who, task, precision)]
                    points = [(row["tokens"], row[key]) for row in mine if row[key]]
                    if points:
                        name = f"{who}, {precision}"
                        axis.loglog(*zip(*points, strict=True), style, color=f"C{index}", marker="o", label=name)
            axis.set(title=task, xlabel="patches of 16 x 16", ylabel=label)
            axis.grid(alpha=0.3)
            if not line and not column:
                axis.legend(fontsize=8)
    save()


def _figure(path: Path) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, lambda: atomic_write(path, lambda file: figure.savefig(file, dpi=120, format="png"))


def _short(milliseconds: float) -> str:
    return (
        f"{milliseconds:.2f}"
        if milliseconds < 1
        else f"{milliseconds:.1f}"
        if milliseconds < 100
        else f"{milliseconds:.0f}"
    )


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    ruled = [lines[0], ["---", *("---:" for _ in lines[0][1:])], *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.plot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path, help="a JSON file of benchmarks/results")
    parser.add_argument("--plot", type=Path, help="PNG; default: beside the result, of the same name")
    options = parser.parse_args(arguments)
    document = json.loads(options.result.read_text("utf-8"))
    plot = options.plot or options.result.with_suffix(".png")
    if document["kind"] == "ops":
        draw_growth(document, plot)
        print(growth_table(document), end="")
    elif document["kind"] == "vision":
        draw_images(document, plot)
    elif document["kind"] == "image models":
        draw_accuracies(document, plot)
    elif document["kind"] == "gpu ops":
        draw_gpu(document, plot)
        print(gpu_table(document), end="")
    elif document["kind"] == "gpu models":
        draw_decode(document, plot)
        print(models_table(document), end="")
    else:
        draw_curves(document, plot)
        print(curves_table(document), end="")


if __name__ == "__main__":
    main()
