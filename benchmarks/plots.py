"""Bars of comparisons as PNG. Needs matplotlib (`pip install recess[bench]`); without it there are no plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.figures import quantile

PANELS = (("standstill", "standstill, ms", 1e3), ("durable", "durable, ms", 1e3), ("stored", "stored, MB", 1e-6),
          ("restore", "restore to the guest's answer, ms", 1e3))  # fmt: skip


def plot_snapshots(sides: Mapping[str, Mapping[str, Sequence[float]]], target: Path) -> str:
    """Write the panels of the snapshot comparison; return what became of it in a line."""
    return plot_panels(sides, target, PANELS, columns=2)


def plot_panels(
    sides: Mapping[str, Mapping[str, Sequence[float]]],
    target: Path,
    panels: Sequence[tuple[str, str, float]],
    *,
    columns: int,
) -> str:
    """Write one panel for each metric (key, title, factor), p50 as a bar and p95 as its whisker; return what became of it
    in a line."""
    try:
        import matplotlib as mpl
    except ImportError:
        return "no plots: matplotlib is not installed (pip install 'recess[bench]')"
    mpl.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5.5 * columns, 3 * rows), constrained_layout=True)
    for spare in axes.flat[len(panels) :]:
        spare.axis("off")
    for axis, (key, title, factor) in zip(axes.flat, panels, strict=False):
        shown = {name: [s * factor for s in samples[key]] for name, samples in sides.items() if samples.get(key)}
        names = list(shown)
        p50 = [quantile(shown[name], 0.5) for name in names]
        over = [max(0.0, quantile(shown[name], 0.95) - low) for name, low in zip(names, p50, strict=True)]
        bars = axis.barh(names, p50, xerr=[[0.0] * len(names), over], color="#5b7fa6", ecolor="#333333", capsize=3)
        axis.bar_label(bars, fmt="%.3g", padding=4)
        axis.set_xlim(0, 1.25 * max(low + more for low, more in zip(p50, over, strict=True)))
        axis.set_title(title)
        axis.invert_yaxis()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return f"plots: {target}"
