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

__all__ = ["curves_table", "draw_accuracies", "draw_curves", "draw_growth", "draw_images", "growth_table"]

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
    else:
        draw_curves(document, plot)
        print(curves_table(document), end="")


if __name__ == "__main__":
    main()
