"""The curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from statewise.files import atomic_write
from statewise.training.metrics import Record

__all__ = ["draw_curve"]


def draw_curve(records: Sequence[Record], path: Path, title: str) -> None:
    """Bits per byte against steps, training and validation, as a PNG that appears whole or not at all.

    Args:
        records: as of ``metrics.jsonl``; nothing is drawn from none.
        path: the ``.png``.
        title: put above the curve.
    """
    if not records:
        return
    # Neither pyplot nor its global state: a library must not choose the caller's backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([r["step"] for r in records], [r["bits_per_byte"] for r in records], label="training", linewidth=1.2)
    valid = [r for r in records if "valid_bits_per_byte" in r]
    if valid:
        axes.plot(
            [r["step"] for r in valid],
            [r["valid_bits_per_byte"] for r in valid],
            "o-",
            label="validation",
            markersize=4,
        )
    axes.set(xlabel="step", ylabel="bits per byte", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    atomic_write(path, lambda temporary: canvas.print_figure(temporary, format="png", dpi=120))
